//! The runtime inside a privileged container of another one, as in CI: no systemd, a cgroup namespace, only the mounts that a
//! container gets. Needs root. The outer runtime is ours too.

#[allow(dead_code, reason = "shared with the tests of other files, which use the rest")]
mod runtime_daemon;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Instant;

use oarlock_proto::cri;
use oarlock_proto::images::ImportRequest;
use oarlock_proto::images::images_client::ImagesClient;
use oarlock_testkit::binary;
use runtime_daemon::{Daemon, LIMIT, channel, clients, container_config, sandbox_config, with_daemon, words};

const CONFLIST: &str = r#"{
  "cniVersion": "1.1.0", "name": "inner",
  "plugins": [{"type": "bridge", "bridge": "inner0", "isGateway": true, "ipMasq": true,
    "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.78.0.0/24"}]], "dataDir": "/inner/ipam"}}]
}"#;
const SETTINGS: &str = "cni: {confDir: /inner/cni-conf, binDirs: [/inner/cni-bin]}\n";

/// What the inner runtime reads, at `/inner` for it.
fn furnish(inner: &Path) {
    fs::create_dir_all(inner.join("cni-conf")).unwrap();
    fs::create_dir_all(inner.join("cni-bin")).unwrap();
    for plugin in ["bridge", "host-local"] {
        symlink("/oarlock/oarlock-cni-plugins", inner.join("cni-bin").join(plugin)).unwrap();
    }
    fs::write(inner.join("cni-conf/10-inner.conflist"), CONFLIST).unwrap();
    fs::write(inner.join("config.yaml"), SETTINGS).unwrap();
}

/// A privileged container with the programs, the host's libraries and `inner`, that runs a daemon with its data in `data`.
fn runtime_container(name: &str, inner: &Path, data: &str) -> cri::ContainerConfig {
    let programs = binary("oarlock").parent().unwrap().to_owned();
    let mount = |host: &Path, container: &str, readonly| cri::Mount {
        host_path: host.display().to_string(),
        container_path: container.to_owned(),
        readonly,
        ..cri::Mount::default()
    };
    let mut config = container_config(name, &[]);
    config.command = words(&["/oarlock/oarlock", "--config", "/inner/config.yaml", "--data-dir", data, "runtime"]);
    config.mounts = vec![mount(&programs, "/oarlock", true), mount(inner, "/inner", false)];
    for libraries in ["/usr", "/lib", "/lib64"] {
        if Path::new(libraries).exists() {
            config.mounts.push(mount(Path::new(libraries), libraries, true));
        }
    }
    let context = config.linux.get_or_insert_default().security_context.get_or_insert_default();
    *context = cri::LinuxContainerSecurityContext {
        privileged: true,
        namespace_options: context.namespace_options.clone(),
        ..cri::LinuxContainerSecurityContext::default()
    };
    config
}

async fn privileged_sandbox(daemon: &mut Daemon, name: &str) -> String {
    let mut config = sandbox_config(name, &daemon.log_directory(name));
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().privileged = true;
    daemon.run(config).await.unwrap()
}

#[test]
fn pods_run_in_a_runtime_inside_a_privileged_container() {
    with_daemon("inside", |mut daemon| async move {
        let inner = daemon.path().join("inner");
        furnish(&inner);
        let outer_sandbox = privileged_sandbox(&mut daemon, "outer").await;
        let outer = daemon.container(&outer_sandbox, runtime_container("runtime", &inner, "/inner/data")).await;

        let socket = inner.join("data/run/runtime.sock");
        let (mut runtime, _) = clients(&socket);
        let deadline = Instant::now() + LIMIT;
        while runtime.version(cri::VersionRequest::default()).await.is_err() {
            let status = daemon.status(&outer).await;
            let runs = status.state == cri::ContainerState::ContainerRunning as i32;
            assert!(runs && Instant::now() < deadline, "{status:?}\n{}", daemon.log(&outer).await.join("\n"));
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            (runtime, _) = clients(&socket);
        }
        let request = ImportRequest { path: "/oarlock/testimage.tar".to_owned() };
        let mut progress = ImagesClient::new(channel(&socket)).import(request).await.unwrap().into_inner();
        while progress.message().await.unwrap().is_some() {}

        let config = sandbox_config("within", "/inner/logs");
        let request = cri::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: String::new() };
        let sandbox = runtime.run_pod_sandbox(request).await.unwrap().into_inner().pod_sandbox_id;
        let mut container = container_config("main", &["sleep"]);
        container.linux.get_or_insert_default().resources =
            Some(cri::LinuxContainerResources { memory_limit_in_bytes: 64 << 20, ..Default::default() });
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: sandbox.clone(),
            config: Some(container),
            sandbox_config: Some(config),
        };
        let id = runtime.create_container(request).await.unwrap().into_inner().container_id;
        runtime.start_container(cri::StartContainerRequest { container_id: id.clone() }).await.unwrap();
        let request = cri::ExecSyncRequest { container_id: id.clone(), cmd: words(&["hostname"]), timeout: 20 };
        let answer = runtime.exec_sync(request).await.unwrap().into_inner();
        assert_eq!(String::from_utf8_lossy(&answer.stdout).trim(), "within");
        // Its limit holds in the groups that the outer container was given.
        let limits: Vec<_> = ["memory.max", "memory.limit_in_bytes"].iter().flat_map(|file| found(&id, file)).collect();
        assert_eq!(limits, ["67108864"]);

        runtime.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: sandbox.clone() }).await.unwrap();
        runtime.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: sandbox }).await.unwrap();
        daemon
    });
}

/// Contents of that file in every group of that container on this machine.
fn found(id: &str, file: &str) -> Vec<String> {
    let mut pending = vec![std::path::PathBuf::from("/sys/fs/cgroup")];
    let mut contents = Vec::new();
    while let Some(directory) = pending.pop() {
        if directory.ends_with(id) {
            contents.extend(fs::read_to_string(directory.join(file)).map(|text| text.trim().to_owned()));
        }
        let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
        pending.extend(entries.filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir())).map(|e| e.path()));
    }
    contents
}

#[test]
fn a_data_directory_on_an_overlay_is_refused_with_the_way_out() {
    with_daemon("overlay", |mut daemon| async move {
        let inner = daemon.path().join("inner");
        furnish(&inner);
        let sandbox = privileged_sandbox(&mut daemon, "outer").await;
        // The container's own root is an overlay, and the kernel does not write to one through another.
        let id = daemon.container(&sandbox, runtime_container("runtime", &inner, "/data")).await;
        let status = daemon.exited(&id).await;
        let said = daemon.log(&id).await.join("\n");
        assert_ne!(status.exit_code, 0, "{said}");
        assert!(said.contains("/data") && said.contains("overlay") && said.contains("volume"), "{said}");
        daemon
    });
}
