//! A runtime daemon of a test's own: temporary directories, own control group root, the project's plugins and test image,
//! in the fresh namespaces of the kit.

use std::fs;
use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use oarlock_cgroup::{Cgroup, slice_name};
use oarlock_proto::cri;
use oarlock_proto::cri::image_service_client::ImageServiceClient;
use oarlock_proto::cri::runtime_service_client::RuntimeServiceClient;
use oarlock_proto::images::ImportRequest;
use oarlock_proto::images::images_client::ImagesClient;
use oarlock_runtime::{CgroupDriver, Config, Runtime};
use oarlock_systemd::Systemd;
use oarlock_testkit::{Snapshot, binary, image_archive, in_fresh_namespaces};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};

pub const IMAGE: &str = "oarlock.local/testimage:1";
pub const LIMIT: Duration = Duration::from_secs(30);

const CONFLIST: &str = r#"{
  "cniVersion": "1.1.0", "name": "pods",
  "plugins": [
    {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
     "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.77.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}], "dataDir": "@DATA@"}},
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}"#;

/// A daemon with its directories. What it is asked is asked through its socket.
pub struct Daemon {
    directory: tempfile::TempDir,
    cgroup_root: String,
    driver: CgroupDriver,
    /// How long plugins of the node resource interface may take.
    pub plugin_limit: Duration,
    running: Option<(CancellationToken, JoinHandle<Result<(), oarlock_runtime::Error>>)>,
    pub runtime: RuntimeServiceClient<Channel>,
    pub images: ImageServiceClient<Channel>,
}

/// Runs a test against a daemon in fresh namespaces, and fails it for whatever is left behind.
pub fn with_daemon<F: Future<Output = Daemon>>(name: &'static str, test: impl FnOnce(Daemon) -> F + Send + 'static) {
    with_daemon_by(CgroupDriver::Cgroupfs, name, test);
}

/// As [`with_daemon`], with control groups made in another way.
pub fn with_daemon_by<F: Future<Output = Daemon>>(
    driver: CgroupDriver,
    name: &'static str,
    test: impl FnOnce(Daemon) -> F + Send + 'static,
) {
    in_fresh_namespaces(move || {
        oarlock_netns::bring_loopback_up().unwrap();
        let marker = format!("oarlock-runtime-{name}");
        let before = Snapshot::take(&marker);
        let threads = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        threads.block_on(async {
            let daemon = test(Daemon::start(name, driver).await).await;
            daemon.finish().await;
        });
        drop(threads);
        // The bridge and the plugins' table are the network's own, not a pod's.
        let later = Snapshot::take(&marker);
        let leaked: Vec<String> = before.leaked(&later).into_iter().filter(|line| !is_shared(line, name)).collect();
        assert!(leaked.is_empty(), "left behind:\n{}", leaked.join("\n"));
    });
}

/// What outlives pods by design, and what tests that run beside this one have.
fn is_shared(line: &str, name: &str) -> bool {
    line == "interface cni0"
        || line.starts_with("nft ")
        || (line.starts_with("cgroup ") && !line.contains(&format!("oarlock-test-{name}")))
}

impl Daemon {
    async fn start(name: &str, driver: CgroupDriver) -> Daemon {
        let directory = tempfile::Builder::new().prefix(&format!("oarlock-runtime-{name}-")).tempdir().unwrap();
        // As the directories of a real node: root of a user namespace has to get through.
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o711)).unwrap();
        lay_out(directory.path());
        let cgroup_root = format!("oarlock-test-{name}-{}", std::process::id());
        let (runtime, images) = clients(&directory.path().join("run/runtime.sock"));
        let plugin_limit = Duration::from_secs(20);
        let mut daemon = Daemon { directory, cgroup_root, driver, plugin_limit, running: None, runtime, images };
        daemon.open().await;
        let mut import = ImagesClient::new(channel(&daemon.socket()));
        let request = ImportRequest { path: image_archive().display().to_string() };
        let mut progress = import.import(request).await.unwrap().into_inner();
        let mut last = None;
        while let Some(message) = progress.message().await.unwrap() {
            last = Some(message);
        }
        let last = last.expect("an import ends with a message");
        assert!(last.done && !last.images.is_empty(), "{last:?}");
        daemon
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    pub fn socket(&self) -> PathBuf {
        self.path().join("run/runtime.sock")
    }

    pub fn config(&self) -> Config {
        let mut config = Config { cgroup_driver: self.driver, ..config_in(self.path(), &self.cgroup_root) };
        (config.plugins.registration_timeout, config.plugins.request_timeout) = (self.plugin_limit, self.plugin_limit);
        config
    }

    /// Opens the daemon and serves.
    pub async fn open(&mut self) {
        let stop = CancellationToken::new();
        let runtime = Runtime::new(self.config()).await.unwrap();
        let task = tokio::spawn(runtime.run(stop.clone()));
        self.running = Some((stop, task));
        let (runtime, images) = clients(&self.socket());
        (self.runtime, self.images) = (runtime, images);
        let deadline = Instant::now() + LIMIT;
        while self.runtime.version(cri::VersionRequest::default()).await.is_err() {
            assert!(Instant::now() < deadline, "the daemon does not answer");
            tokio::task::yield_now().await;
        }
    }

    /// Ends the daemon as a crash does: nothing is said, nothing is waited for.
    pub async fn crash(&mut self) {
        let (_, task) = self.running.take().expect("the daemon runs");
        task.abort();
        let _ = task.await;
        // A process would be gone by now; in this one the tasks that the daemon left end by themselves.
        let socket = self.path().join("run/nri.sock");
        let deadline = Instant::now() + LIMIT;
        while std::os::unix::net::UnixStream::connect(&socket).is_ok() {
            assert!(Instant::now() < deadline, "plugins can still connect");
            tokio::task::yield_now().await;
        }
    }

    async fn finish(mut self) {
        let sandboxes =
            self.runtime.list_pod_sandbox(cri::ListPodSandboxRequest::default()).await.unwrap().into_inner();
        for sandbox in sandboxes.items {
            self.runtime.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: sandbox.id }).await.unwrap();
        }
        for directory in
            ["run/sandboxes", "run/containers", "data/records/sandboxes", "data/records/containers", "data/volumes"]
        {
            let left: Vec<_> =
                fs::read_dir(self.path().join(directory)).unwrap().flatten().map(|entry| entry.file_name()).collect();
            assert!(left.is_empty(), "{directory} has {left:?}");
        }
        let leases = fs::read_dir(self.path().join("ipam/pods")).into_iter().flatten().flatten();
        let leases: Vec<_> =
            leases.map(|entry| entry.file_name()).filter(|name| name.to_string_lossy().starts_with("10.")).collect();
        assert!(leases.is_empty(), "addresses still taken: {leases:?}");
        let (stop, task) = self.running.take().expect("the daemon runs");
        stop.cancel();
        tokio::time::timeout(LIMIT, task).await.expect("the daemon stops").unwrap().unwrap();
        if self.driver != CgroupDriver::Cgroupfs {
            Systemd::connect().unwrap().stop(&self.slice()).unwrap();
        }
        Cgroup::new(&self.cgroup_root).unwrap().remove().unwrap();
    }

    /// The slice of the daemon's own where systemd makes control groups.
    pub fn slice(&self) -> String {
        slice_name(&[&self.cgroup_root])
    }

    /// Runs a sandbox with the bridge network.
    pub async fn sandbox(&mut self, name: &str) -> String {
        self.run(sandbox_config(name, &self.log_directory(name))).await.unwrap()
    }

    pub fn log_directory(&self, name: &str) -> String {
        self.path().join("logs").join(name).display().to_string()
    }

    pub async fn run(&mut self, config: cri::PodSandboxConfig) -> Result<String, tonic::Status> {
        let request = cri::RunPodSandboxRequest { config: Some(config), runtime_handler: String::new() };
        Ok(self.runtime.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id)
    }

    pub async fn create(&mut self, sandbox: &str, config: cri::ContainerConfig) -> Result<String, tonic::Status> {
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: sandbox.to_owned(),
            config: Some(config),
            sandbox_config: None,
        };
        Ok(self.runtime.create_container(request).await?.into_inner().container_id)
    }

    pub async fn start_container(&mut self, id: &str) -> Result<(), tonic::Status> {
        let request = cri::StartContainerRequest { container_id: id.to_owned() };
        self.runtime.start_container(request).await.map(drop)
    }

    /// Makes and starts a container.
    pub async fn container(&mut self, sandbox: &str, config: cri::ContainerConfig) -> String {
        let id = self.create(sandbox, config).await.unwrap();
        self.start_container(&id).await.unwrap();
        id
    }

    pub async fn status(&mut self, id: &str) -> cri::ContainerStatus {
        let request = cri::ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        self.runtime.container_status(request).await.unwrap().into_inner().status.unwrap()
    }

    /// The first process of a container, seen from here.
    pub async fn pid(&mut self, id: &str) -> i32 {
        let request = cri::ContainerStatusRequest { container_id: id.to_owned(), verbose: true };
        let info = self.runtime.container_status(request).await.unwrap().into_inner().info;
        let info: serde_json::Value = serde_json::from_str(&info["info"]).unwrap();
        i32::try_from(info["pid"].as_i64().unwrap()).unwrap()
    }

    /// Waits for the container's end.
    pub async fn exited(&mut self, id: &str) -> cri::ContainerStatus {
        let deadline = Instant::now() + LIMIT;
        loop {
            let status = self.status(id).await;
            if status.state == cri::ContainerState::ContainerExited as i32 {
                return status;
            }
            assert!(Instant::now() < deadline, "container {id} does not end: {status:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub async fn exec(&mut self, id: &str, command: &[&str]) -> Result<cri::ExecSyncResponse, tonic::Status> {
        let request = cri::ExecSyncRequest { container_id: id.to_owned(), cmd: words(command), timeout: 10 };
        Ok(self.runtime.exec_sync(request).await?.into_inner())
    }

    /// What a command in the container prints.
    pub async fn output(&mut self, id: &str, command: &[&str]) -> String {
        let response = self.exec(id, command).await.unwrap();
        assert_eq!(response.exit_code, 0, "{command:?}: {}", String::from_utf8_lossy(&response.stderr));
        String::from_utf8(response.stdout).unwrap()
    }

    /// The text of a container's log, one line each, without times.
    pub async fn log(&mut self, id: &str) -> Vec<String> {
        let path = self.status(id).await.log_path;
        let text = fs::read_to_string(&path).unwrap();
        text.lines().map(|line| line.split_once(' ').map_or("", |(_, rest)| rest).to_owned()).collect()
    }
}

/// The plugins and the network's configuration.
pub fn lay_out(directory: &Path) {
    let plugins = directory.join("cni-bin");
    fs::create_dir(&plugins).unwrap();
    for plugin in ["bridge", "host-local", "portmap", "loopback"] {
        std::os::unix::fs::symlink(binary("oarlock-cni-plugins"), plugins.join(plugin)).unwrap();
    }
    let data = directory.join("ipam").display().to_string();
    fs::create_dir(directory.join("cni-conf")).unwrap();
    fs::write(directory.join("cni-conf/10-pods.conflist"), CONFLIST.replace("@DATA@", &data)).unwrap();
}

/// A daemon's configuration with everything below one directory.
pub fn config_in(directory: &Path, cgroup_root: &str) -> Config {
    Config {
        shim_binary: binary("oarlock-shim"),
        cni_conf_dir: directory.join("cni-conf"),
        cni_bin_dirs: vec![directory.join("cni-bin")],
        cgroup_root: cgroup_root.to_owned(),
        cdi_dirs: vec![directory.join("cdi")],
        handlers: [("crun", "/usr/bin/crun"), ("runc", "/usr/sbin/runc"), ("gone", "/no/such/runtime")]
            .map(|(name, path)| (name.to_owned(), path.into()))
            .into_iter()
            .chain([("dumping".to_owned(), directory.join("dumping"))])
            .collect(),
        criu_binary: directory.join("criu"),
        ..Config::in_dirs(&directory.join("data"), &directory.join("run"))
    }
}

pub fn channel(socket: &Path) -> Channel {
    let socket = socket.to_owned();
    Endpoint::from_static("http://runtime").connect_with_connector_lazy(tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    }))
}

pub fn clients(socket: &Path) -> (RuntimeServiceClient<Channel>, ImageServiceClient<Channel>) {
    let channel = channel(socket);
    (RuntimeServiceClient::new(channel.clone()), ImageServiceClient::new(channel))
}

pub fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// A pod's sandbox as a kubelet asks for it, but for the control group.
pub fn sandbox_config(name: &str, log_directory: &str) -> cri::PodSandboxConfig {
    let namespaces =
        cri::NamespaceOption { pid: cri::NamespaceMode::Container as i32, ..cri::NamespaceOption::default() };
    let context = cri::LinuxSandboxSecurityContext {
        namespace_options: Some(namespaces),
        ..cri::LinuxSandboxSecurityContext::default()
    };
    cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: name.to_owned(),
            uid: format!("uid-{name}"),
            namespace: "tests".to_owned(),
            attempt: 0,
        }),
        hostname: name.to_owned(),
        log_directory: log_directory.to_owned(),
        dns_config: Some(cri::DnsConfig {
            servers: words(&["10.43.0.10"]),
            searches: words(&["tests.svc.cluster.local"]),
            options: words(&["ndots:5"]),
        }),
        labels: [("app".to_owned(), name.to_owned())].into(),
        linux: Some(cri::LinuxPodSandboxConfig {
            security_context: Some(context),
            ..cri::LinuxPodSandboxConfig::default()
        }),
        ..cri::PodSandboxConfig::default()
    }
}

/// A container of the test image.
pub fn container_config(name: &str, command: &[&str]) -> cri::ContainerConfig {
    let namespaces =
        cri::NamespaceOption { pid: cri::NamespaceMode::Container as i32, ..cri::NamespaceOption::default() };
    let context = cri::LinuxContainerSecurityContext {
        namespace_options: Some(namespaces),
        seccomp: Some(cri::SecurityProfile::default()),
        masked_paths: words(&["/proc/kcore", "/proc/keys"]),
        readonly_paths: words(&["/proc/sys"]),
        ..cri::LinuxContainerSecurityContext::default()
    };
    cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata { name: name.to_owned(), attempt: 0 }),
        image: Some(cri::ImageSpec { image: IMAGE.to_owned(), ..cri::ImageSpec::default() }),
        command: words(command),
        log_path: format!("{name}/0.log"),
        linux: Some(cri::LinuxContainerConfig { resources: None, security_context: Some(context) }),
        ..cri::ContainerConfig::default()
    }
}
