//! A cluster in fresh namespaces: `oarlock up --detach --demo` below a temporary directory, and kubectl aimed at it. Its pods
//! run in our runtime or in containerd.

use std::cell::RefCell;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use oarlock_testkit::{NODE_ADDRESS, ON_ANY_DISK, Snapshot, binary, image_archive, is_lab, wait_for};
use serde_json::Value;

use super::containerd::Containerd;

/// How long anything in a pod may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

/// What the cluster is told beside its directory and its networks.
const CONFIG: &str = "cgroupDriver: auto\n";
/// In the guest, whose login1 may be told, the machine waits for pods; and pods share its swap.
const LAB_KUBELET: &str = ", shutdownGracePeriod: 30s, shutdownGracePeriodCriticalPods: 10s, failSwapOn: false, \
    memorySwap: {swapBehavior: LimitedSwap}";
/// What that leaves in the configuration of login1.
pub(crate) const LOGIN_DROP_IN: &str = "/etc/systemd/logind.conf.d/99-kubelet.conf";

/// The node's address of IPv6.
const NODE_ADDRESS_V6: &str = "fd07::2";
const BALANCERS: &str = "192.0.2.128/29";
const BALANCERS_V6: &str = "fd07::128/125";

/// The address families of a cluster, the primary one first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Ipv4,
    Ipv6,
    Dual,
}

impl Mode {
    /// The node's addresses.
    pub(crate) fn addresses(self) -> &'static [&'static str] {
        match self {
            Mode::Ipv4 => &[NODE_ADDRESS],
            Mode::Ipv6 => &[NODE_ADDRESS_V6],
            Mode::Dual => &[NODE_ADDRESS, NODE_ADDRESS_V6],
        }
    }

    fn config(self) -> String {
        let (pools, networks) = match self {
            Mode::Ipv4 => (BALANCERS.to_owned(), ""),
            Mode::Ipv6 => (BALANCERS_V6.to_owned(), "clusterCIDR: 'fd2a::/48'\nserviceCIDR: 'fd2b::/112'\n"),
            Mode::Dual => (
                format!("{BALANCERS}, {BALANCERS_V6}"),
                "clusterCIDR: '10.42.0.0/16,fd2a::/48'\nserviceCIDR: '10.43.0.0/16,fd2b::/112'\n",
            ),
        };
        format!("{CONFIG}loadBalancerPools: [{}]\n{networks}", pools.replace("fd07::128/125", "'fd07::128/125'"))
    }
}

/// An address as it is in front of a port.
pub(crate) fn in_url(address: &str) -> String {
    if address.contains(':') { format!("[{address}]") } else { address.to_owned() }
}

fn ip(line: &str) {
    let status = Command::new("ip").args(line.split(' ')).status().expect("run ip");
    assert!(status.success(), "ip {line}");
}

pub(crate) struct Cluster {
    pub(crate) mode: Mode,
    directory: tempfile::TempDir,
    config: tempfile::NamedTempFile,
    before: Snapshot,
    kubectl: RefCell<OsString>,
    /// What runs the pods, where that is not our own runtime.
    containerd: Option<RefCell<Containerd>>,
}

/// Another configuration for as long as this lives.
pub(crate) struct Configured<'a> {
    path: &'a Path,
    before: String,
}

impl Drop for Configured<'_> {
    fn drop(&mut self) {
        std::fs::write(self.path, &self.before).expect("write the configuration back");
    }
}

impl Cluster {
    /// Starts the cluster and checks what the demo printed.
    pub(crate) fn start() -> Self {
        Self::up(Mode::Ipv4, false)
    }

    /// The same in other address families.
    pub(crate) fn start_in(mode: Mode) -> Self {
        Self::up(mode, false)
    }

    /// The same with its pods in containerd.
    pub(crate) fn start_over_containerd() -> Self {
        Self::up(Mode::Ipv4, true)
    }

    fn up(mode: Mode, over_containerd: bool) -> Self {
        let directory = tempfile::Builder::new().prefix("oarlock-e2e-").tempdir().expect("tempdir");
        let before = Snapshot::take(&directory.path().to_string_lossy());
        let kubectl = std::env::var_os("KUBECTL").unwrap_or_else(|| "kubectl".into());
        let (mut text, mut kubelet) = (mode.config(), ON_ANY_DISK.to_owned());
        let image = image_archive().to_string_lossy().into_owned();
        let mut arguments = vec!["up", "--detach", "--demo"];
        let own = mode.addresses().join(",");
        if mode != Mode::Ipv4 {
            ip(&format!("address add {NODE_ADDRESS_V6}/64 dev eth0 nodad"));
            ip("-6 route add default via fd07::1 dev eth0");
            arguments.splice(0..0, ["--node-ip", &own]);
        }
        let containerd = over_containerd.then(|| Containerd::start(&directory.path().join("cni/bin")));
        match &containerd {
            Some(containerd) => {
                let (socket, networks) = (containerd.socket(), containerd.network_directory());
                write!(kubelet, ", containerRuntimeEndpoint: \"unix://{}\"", socket.display()).expect("a string");
                writeln!(text, "cni: {{confDir: {}}}", networks.display()).expect("a string");
            }
            None => {
                kubelet.push_str(if is_lab() { LAB_KUBELET } else { "" });
                arguments.extend(["--image", &image]);
            }
        }
        writeln!(text, "kubelet: {{{kubelet}}}").expect("a string");
        let mut config = tempfile::NamedTempFile::new().expect("a file");
        config.write_all(text.as_bytes()).expect("write the configuration");
        let containerd = containerd.map(RefCell::new);
        let cluster = Self { mode, directory, config, before, kubectl: RefCell::new(kubectl), containerd };
        let output = cluster.oarlock(&arguments);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "up failed:\n{text}\n{}", String::from_utf8_lossy(&output.stderr));
        println!("{text}");
        for expected in
            ["through the ClusterIP", "through the NodePort", "Kubernetes steers; Oarlock rows.", "many hands"]
        {
            assert!(text.contains(expected), "{expected:?} is not in:\n{text}");
        }
        assert_eq!(text.matches(" answered ").count(), 6, "three pods through two Services:\n{text}");
        cluster
    }

    /// Writes other lines into the configuration while the cluster runs; what it was comes back when the result is dropped,
    /// also where a case fails.
    pub(crate) fn configure(&self, change: impl FnOnce(&str) -> String) -> Configured<'_> {
        let before = std::fs::read_to_string(self.config.path()).expect("read the configuration");
        std::fs::write(self.config.path(), change(&before)).expect("write the configuration");
        Configured { path: self.config.path(), before }
    }

    pub(crate) fn data_dir(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.data_dir().join("admin.kubeconfig")
    }

    /// Uses another kubectl from now on.
    pub(crate) fn use_kubectl(&self, program: OsString) {
        self.kubectl.replace(program);
    }

    /// Runs `oarlock` on this cluster's directory.
    pub(crate) fn oarlock(&self, arguments: &[&str]) -> Output {
        let config = self.config.path().to_string_lossy();
        oarlock(self.data_dir(), &[&["--config", &config], arguments].concat())
    }

    /// A kubectl command with the administrator's kubeconfig.
    pub(crate) fn kubectl_command(&self) -> Command {
        let mut command = Command::new(&*self.kubectl.borrow());
        command
            .arg("--kubeconfig")
            .arg(self.kubeconfig())
            .env("HOME", self.data_dir())
            .env_remove("KUBECONFIG")
            .stdin(Stdio::null());
        command
    }

    /// Runs kubectl with words split at spaces.
    pub(crate) fn try_kubectl(&self, line: &str) -> Output {
        self.kubectl_command().args(line.split_whitespace()).output().expect("kubectl")
    }

    /// Runs kubectl, fails the case if it fails, and returns its standard output.
    pub(crate) fn kubectl(&self, line: &str) -> String {
        let output = self.try_kubectl(line);
        assert!(output.status.success(), "kubectl {line}: {}\n{}", text(&output.stderr), text(&output.stdout));
        text(&output.stdout)
    }

    /// Runs kubectl that must fail, and returns what it printed on both streams.
    pub(crate) fn kubectl_fails(&self, line: &str) -> String {
        let output = self.try_kubectl(line);
        assert!(!output.status.success(), "kubectl {line} must fail but printed {}", text(&output.stdout));
        format!("{}{}", text(&output.stdout), text(&output.stderr))
    }

    /// Runs kubectl with something on its standard input.
    pub(crate) fn kubectl_with_input(&self, line: &str, input: &str) -> Output {
        let mut child = self
            .kubectl_command()
            .args(line.split_whitespace())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("kubectl");
        child.stdin.take().expect("stdin").write_all(input.as_bytes()).expect("write to kubectl");
        child.wait_with_output().expect("kubectl")
    }

    /// Applies a manifest and returns what kubectl said.
    pub(crate) fn apply(&self, manifest: &str) -> String {
        let output = self.kubectl_with_input("apply -f -", manifest);
        assert!(output.status.success(), "apply: {}\n{manifest}", text(&output.stderr));
        text(&output.stdout)
    }

    /// An object as JSON.
    pub(crate) fn get(&self, line: &str) -> Value {
        serde_json::from_str(&self.kubectl(&format!("get {line} -o json"))).expect("JSON")
    }

    /// Waits until a kubectl command prints something that satisfies `wanted`.
    pub(crate) fn wait_for_output(&self, line: &str, what: &str, wanted: impl Fn(&str) -> bool) -> String {
        wait_for(what, PATIENCE, || {
            let output = self.try_kubectl(line);
            let all = format!("{}{}", text(&output.stdout), text(&output.stderr));
            wanted(&all).then_some(all)
        })
    }

    /// Ends a daemon without asking it. Who started it starts it again: `oarlock up`, or for containerd we.
    pub(crate) fn kill_daemon(&self, name: &str) {
        match &self.containerd {
            Some(containerd) if name == "runtime" => containerd.borrow_mut().kill_and_start_again(),
            _ => kill(Pid::from_raw(self.daemon_pid(name)), Signal::SIGKILL).expect("kill"),
        }
    }

    /// The pid of a daemon.
    pub(crate) fn daemon_pid(&self, name: &str) -> i32 {
        if let Some(containerd) = self.containerd.as_ref().filter(|_| name == "runtime") {
            return containerd.borrow().pid();
        }
        let directory = self.data_dir().to_string_lossy().into_owned();
        procfs::process::all_processes()
            .expect("/proc")
            .flatten()
            .find(|process| {
                process
                    .cmdline()
                    .is_ok_and(|words| words.last().is_some_and(|last| last == name) && words.contains(&directory))
            })
            .unwrap_or_else(|| panic!("{name} is not running"))
            .pid
    }

    /// Prints what helps to understand a failed case.
    pub(crate) fn show_state(&self) {
        for line in ["get pods -A -o wide", "get events -A"] {
            let output = self.try_kubectl(line);
            println!("--- kubectl {line}\n{}{}", text(&output.stdout), text(&output.stderr));
        }
        for name in ["server", "agent", "runtime", "netproxy"] {
            let log = std::fs::read_to_string(self.data_dir().join(format!("log/{name}.log"))).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            println!("--- {name}.log\n{}", lines[lines.len().saturating_sub(15)..].join("\n"));
        }
        if let Some(containerd) = &self.containerd {
            println!("--- containerd's log\n{}", containerd.borrow().last_lines(15));
        }
    }

    /// Resets the cluster and compares the host with how it was before.
    pub(crate) fn reset_and_check(mut self) {
        let output = self.oarlock(&["reset", "--yes"]);
        assert!(output.status.success(), "reset: {}{}", text(&output.stdout), text(&output.stderr));
        let left: Vec<_> =
            std::fs::read_dir(self.data_dir()).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        assert!(left.is_empty(), "files left: {left:?}");
        if let Some(containerd) = self.containerd.take() {
            containerd.into_inner().end_and_check();
        }
        assert!(!is_lab() || !Path::new(LOGIN_DROP_IN).exists());
        self.forget_addresses();
        self.before.assert_nothing_leaked(&Snapshot::take(&self.directory.path().to_string_lossy()));
    }
}

impl Cluster {
    /// Takes back what the node has more than usual.
    fn forget_addresses(&self) {
        if self.mode != Mode::Ipv4 {
            for line in ["-6 route del default".to_owned(), format!("address del {NODE_ADDRESS_V6}/64 dev eth0")] {
                let _ = Command::new("ip").args(line.split(' ')).output();
            }
        }
    }
}

/// Ends the cluster even when a case failed on the way; by the pids that belong to this directory only.
impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = self.oarlock(&["reset", "--yes"]);
        self.forget_addresses();
    }
}

/// Runs `oarlock` on a data directory and waits for it.
pub(crate) fn oarlock(data_dir: &Path, arguments: &[&str]) -> Output {
    Command::new(binary("oarlock"))
        .arg("--data-dir")
        .arg(data_dir)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .expect("oarlock")
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
