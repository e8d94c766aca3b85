//! The runtime daemon with systemd as its cgroup driver: slices, scopes and their properties, as `systemctl` shows them. Needs
//! root, systemd, and control groups of version 2; where there are none, it is seen that the daemon says so.

#[allow(dead_code, reason = "shared with the tests of other files, which use the rest")]
mod runtime_daemon;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use oarlock_cgroup::Layout;
use oarlock_proto::cri;
use oarlock_runtime::{CgroupDriver, Config, Runtime};
use oarlock_testkit::{in_fresh_namespaces, is_lab, wait_for};
use runtime_daemon::{Daemon, LIMIT, config_in, container_config, sandbox_config, with_daemon_by};
use tonic::Code;

/// Where the pods of these tests are, as a kubelet would say it.
const PARENT: &str = "/sdtest.slice/sdtest-burstable.slice/sdtest-burstable-podu_1.slice";

fn has_systemd() -> bool {
    let has = oarlock_systemd::is_running() && Layout::host().unwrap().is_v2();
    assert!(has || !is_lab(), "the guest has both");
    if !has {
        println!("not run: this machine has no systemd, or not control groups of version 2 alone");
    }
    has
}

fn with_systemd<F: Future<Output = Daemon>>(name: &'static str, test: impl FnOnce(Daemon) -> F + Send + 'static) {
    if has_systemd() {
        with_daemon_by(CgroupDriver::Systemd, name, test);
        systemctl(&["stop", "sdtest.slice"]);
        assert_eq!(units("*oarlock*"), Vec::<String>::new());
        assert_eq!(units("sdtest*"), Vec::<String>::new());
    }
}

fn systemctl(arguments: &[&str]) -> String {
    let output = Command::new("systemctl").args(arguments).stdin(Stdio::null()).output().expect("systemctl");
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "systemctl {arguments:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// All units of names like this that systemd knows, whatever became of them.
fn units(pattern: &str) -> Vec<String> {
    let text = systemctl(&["list-units", "--all", "--plain", "--no-legend", pattern]);
    text.lines().map(|line| line.split_whitespace().take(4).collect::<Vec<_>>().join(" ")).collect()
}

fn show(unit: &str) -> BTreeMap<String, String> {
    let text = systemctl(&["show", unit]);
    text.lines().filter_map(|line| line.split_once('=')).map(|(name, value)| (name.into(), value.into())).collect()
}

fn scope(id: &str) -> String {
    format!("cri-oarlock-{id}.scope")
}

fn group(id: &str) -> PathBuf {
    PathBuf::from(format!("/sys/fs/cgroup{PARENT}/{}", scope(id)))
}

fn read(id: &str, file: &str) -> String {
    let path = group(id).join(file);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).trim().to_owned()
}

/// What the kernel holds the container to.
fn limits(id: &str) -> [String; 5] {
    ["memory.max", "cpu.max", "cpu.weight", "cpuset.cpus", "pids.max"].map(|file| read(id, file))
}

/// Whether a process in the container's group can open the kernel's log, which is no device of its.
fn reaches_kernel_log(id: &str) -> bool {
    let script = format!("echo $$ > {}/cgroup.procs && true < /dev/null && true < /dev/kmsg", group(id).display());
    Command::new("sh").args(["-c", &script]).stderr(Stdio::null()).status().unwrap().success()
}

fn in_parent(name: &str, daemon: &Daemon) -> cri::PodSandboxConfig {
    let mut config = sandbox_config(name, &daemon.log_directory(name));
    config.linux.as_mut().unwrap().cgroup_parent = PARENT.into();
    config
}

fn limited(command: &[&str]) -> cri::ContainerConfig {
    let mut config = container_config("main", command);
    config.linux.as_mut().unwrap().resources = Some(cri::LinuxContainerResources {
        memory_limit_in_bytes: 64 << 20,
        cpu_quota: 20_000,
        cpu_period: 100_000,
        cpu_shares: 512,
        cpuset_cpus: "0".into(),
        ..cri::LinuxContainerResources::default()
    });
    config
}

fn gone(id: &str) {
    wait_for("the end of the scope", LIMIT, || units(&scope(id)).is_empty().then_some(()));
}

#[test]
fn a_host_without_systemd_or_with_version_1_is_refused_by_the_options_name() {
    if oarlock_systemd::is_running() && Layout::host().unwrap().is_v2() {
        return;
    }
    // Its run directory becomes a mount point, which goes before the directory.
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_owned();
    in_fresh_namespaces(move || {
        let config = |cgroup_driver| Config { cgroup_driver, ..config_in(&path, "oarlock-test-refused") };
        let threads = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let opened =
            |driver| threads.block_on(Runtime::new(config(driver))).map(drop).map_err(|error| error.full_message());
        let refused = opened(CgroupDriver::Systemd).unwrap_err();
        assert!(refused.starts_with("configuration: cgroup_driver: systemd "), "{refused}");
        assert_eq!(opened(CgroupDriver::Auto), Ok(()));
    });
}

#[test]
fn a_container_is_a_scope_in_its_pods_slice_and_a_reload_leaves_its_limits() {
    with_systemd("scope", |mut daemon| async move {
        let told = daemon.runtime.runtime_config(cri::RuntimeConfigRequest {}).await.unwrap().into_inner();
        assert_eq!(told.linux.unwrap().cgroup_driver, cri::CgroupDriver::Systemd as i32);
        let info = daemon.runtime.status(cri::StatusRequest { verbose: true }).await.unwrap().into_inner().info;
        assert!(info["config"].contains(r#""cgroupDriver":"systemd""#), "{info:?}");

        let sandbox = daemon.run(in_parent("scope", &daemon)).await.unwrap();
        let id = daemon.container(&sandbox, limited(&["sleep"])).await;
        let pid = daemon.pid(&id).await;
        let own = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        assert_eq!(own.trim(), format!("0::{PARENT}/{}", scope(&id)));
        assert_eq!(read(&id, "cgroup.procs"), pid.to_string(), "nothing else is in it");

        let unit = show(&scope(&id));
        for (name, value) in [
            ("ActiveState", "active"),
            ("Slice", "sdtest-burstable-podu_1.slice"),
            ("Delegate", "yes"),
            ("MemoryMax", "67108864"),
            ("CPUWeight", "59"),
            ("CPUQuotaPerSecUSec", "200ms"),
            ("AllowedCPUs", "0"),
            ("TasksMax", "infinity"),
        ] {
            assert_eq!(unit[name], value, "{name}");
        }
        assert_eq!(limits(&id), ["67108864", "20000 100000", "59", "0", "max"]);
        assert!(!reaches_kernel_log(&id));
        systemctl(&["daemon-reload"]);
        assert_eq!(limits(&id), ["67108864", "20000 100000", "59", "0", "max"]);
        assert!(!reaches_kernel_log(&id));

        let linux = cri::LinuxContainerResources {
            memory_limit_in_bytes: 128 << 20,
            cpu_quota: 50_000,
            cpu_period: 100_000,
            cpu_shares: 1024,
            ..cri::LinuxContainerResources::default()
        };
        let request = cri::UpdateContainerResourcesRequest {
            container_id: id.clone(),
            linux: Some(linux),
            ..cri::UpdateContainerResourcesRequest::default()
        };
        daemon.runtime.update_container_resources(request).await.unwrap();
        let updated = ["134217728", "50000 100000", "100", "0", "max"];
        assert_eq!(limits(&id), updated);
        systemctl(&["daemon-reload"]);
        assert_eq!(limits(&id), updated);
        assert_eq!(show(&scope(&id))["MemoryMax"], "134217728");

        let inside = daemon.output(&id, &["cat", "/proc/self/cgroup"]).await;
        assert_eq!(inside.trim(), "0::/", "an exec is where the container is");
        let shims = units(&format!("{}-shims.scope", daemon.slice().trim_end_matches(".slice")));
        assert_eq!(shims.len(), 1, "{shims:?}");

        let stop = cri::StopContainerRequest { container_id: id.clone(), timeout: 10 };
        daemon.runtime.stop_container(stop).await.unwrap();
        daemon.exited(&id).await;
        gone(&id);
        assert!(!group(&id).exists());
        daemon
    });
}

#[test]
fn a_scope_outlives_the_daemon_and_ends_with_the_container_whoever_dies() {
    with_systemd("crash", |mut daemon| async move {
        let sandbox = daemon.run(in_parent("crash", &daemon)).await.unwrap();
        let stays = daemon.container(&sandbox, limited(&["sleep"])).await;
        let hungry = daemon.container(&sandbox, container_config("hungry", &["sleep"])).await;
        let pid = daemon.pid(&hungry).await;
        daemon.crash().await;
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        daemon.open().await;
        assert_eq!(daemon.exited(&hungry).await.exit_code, 137);
        gone(&hungry);
        assert_eq!(show(&scope(&stays))["ActiveState"], "active");

        let request = cri::PodSandboxStatusRequest { pod_sandbox_id: sandbox, verbose: true };
        let info = daemon.runtime.pod_sandbox_status(request).await.unwrap().into_inner().info;
        let info: serde_json::Value = serde_json::from_str(&info["info"]).unwrap();
        let shim = i32::try_from(info["shimPid"].as_i64().unwrap()).unwrap();
        daemon.crash().await;
        kill(Pid::from_raw(shim), Signal::SIGKILL).unwrap();
        daemon.open().await;
        daemon.exited(&stays).await;
        gone(&stays);
        daemon
    });
}

#[test]
fn a_scope_that_something_has_left_is_replaced() {
    with_systemd("left", |mut daemon| async move {
        let sandbox = daemon.run(in_parent("left", &daemon)).await.unwrap();
        let id = daemon.create(&sandbox, container_config("main", &["sleep"])).await.unwrap();
        let mut left = Command::new("systemd-run")
            .args(["--quiet", "--scope", "--unit", &scope(&id), "sleep", "1000"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        wait_for("the scope in the way", LIMIT, || (!units(&scope(&id)).is_empty()).then_some(()));
        daemon.start_container(&id).await.unwrap();
        left.wait().unwrap();
        assert_eq!(read(&id, "cgroup.procs"), daemon.pid(&id).await.to_string());
        daemon
    });
}

#[test]
fn a_pod_without_a_parent_gets_a_slice_that_goes_with_it() {
    with_systemd("own", |mut daemon| async move {
        let id = daemon.sandbox("own").await;
        let slice = daemon.slice().replace(".slice", &format!("-{id}.slice"));
        assert_eq!(units(&slice).len(), 1);
        let resources = cri::LinuxContainerResources { memory_limit_in_bytes: 1 << 28, ..Default::default() };
        let request = cri::UpdatePodSandboxResourcesRequest {
            pod_sandbox_id: id.clone(),
            overhead: None,
            resources: Some(resources),
        };
        daemon.runtime.update_pod_sandbox_resources(request).await.unwrap();
        assert_eq!(show(&slice)["MemoryMax"], "268435456");
        let container = daemon.container(&id, container_config("main", &["sleep"])).await;
        assert_eq!(show(&scope(&container))["Slice"], slice);
        daemon.runtime.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: id }).await.unwrap();
        assert_eq!(units(&slice), Vec::<String>::new());

        let mut config = sandbox_config("wrong", "");
        config.linux.as_mut().unwrap().cgroup_parent = "/kubepods/pod1".into();
        let refused = daemon.run(config).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().starts_with("config.linux.cgroup_parent: "), "{refused}");
        daemon
    });
}

#[test]
fn other_oci_runtimes_make_the_same_scope() {
    with_systemd("others", |mut daemon| async move {
        for handler in ["crun", "runc"] {
            let request = cri::RunPodSandboxRequest {
                config: Some(in_parent(handler, &daemon)),
                runtime_handler: handler.to_owned(),
            };
            let sandbox = daemon.runtime.run_pod_sandbox(request).await.unwrap().into_inner().pod_sandbox_id;
            let id = daemon.container(&sandbox, limited(&["sleep"])).await;
            let pid = daemon.pid(&id).await;
            let own = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
            assert_eq!(own.trim(), format!("0::{PARENT}/{}", scope(&id)), "{handler}");
            assert_eq!(show(&scope(&id))["MemoryMax"], "67108864", "{handler}");
            assert_eq!(daemon.output(&id, &["cat", "/proc/self/cgroup"]).await.trim(), "0::/", "{handler}");
            let remove = cri::RemovePodSandboxRequest { pod_sandbox_id: sandbox };
            daemon.runtime.remove_pod_sandbox(remove).await.unwrap();
            gone(&id);
        }
        daemon
    });
}
