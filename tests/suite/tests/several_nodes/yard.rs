//! Machines on one segment, each with network, mount and cgroup namespaces of its own, in which real programs run.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use oarlock_testkit::{ON_ANY_DISK, binary};

/// What joins the machines.
const BRIDGE: &str = "yard";

/// What a machine does first; it lives until its standard input ends. Its groups, made by the yard, become the roots of its own
/// cgroup file systems.
const BOOT: &str = r#"set -e
for group in $MACHINE_GROUPS; do echo $$ > "$group/cgroup.procs"; done
exec unshare --net --mount --cgroup sh -e -c '
for group in $MACHINE_GROUPS; do mount --bind "$group" "${group%/*}"; done
if [ -e /sys/fs/cgroup/machine ]; then echo $$ > /sys/fs/cgroup/machine/cgroup.procs; fi
printf "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n" > "$DATA/resolv.conf"
mount --bind "$DATA/resolv.conf" "$(readlink -f /etc/resolv.conf)"
ip link set lo up
echo ready
read end || true'"#;

/// Runs a command as a process of the machine. It joins the machine's groups first: from inside their namespace, systems that
/// delegate by namespaces let nobody in.
const ENTER: &str = r#"for group in $MACHINE_GROUPS; do
  if [ -e "$group/machine" ]; then group="$group/machine"; fi
  echo $$ > "$group/cgroup.procs" || exit 99
done
unset MACHINE_GROUPS
exec nsenter "$@""#;

fn run(program: &str, line: &str) {
    let output = Command::new(program).args(line.split(' ')).output().expect("run");
    assert!(output.status.success(), "{program} {line}: {}", text(&output.stderr));
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What the names of this program's machines begin with, beside those of other programs like it.
pub fn marker() -> String {
    format!("oarlock-node-{}-", std::process::id())
}

/// A machine's own group in each hierarchy of the host.
fn groups(name: &str) -> Vec<PathBuf> {
    let top = Path::new("/sys/fs/cgroup");
    let group = format!("{}{name}", marker());
    if top.join("cgroup.controllers").exists() {
        for controller in ["cpu", "cpuset", "io", "memory", "pids"] {
            let _ = std::fs::write(top.join("cgroup.subtree_control"), format!("+{controller}"));
        }
        return vec![top.join(group)];
    }
    let all = std::fs::read_dir(top).expect("cgroups").flatten().map(|entry| entry.path());
    all.filter(|path| path.join("cgroup.procs").exists()).map(|path| path.join(&group)).collect()
}

fn listed(groups: &[PathBuf]) -> String {
    groups.iter().map(|group| group.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

fn make_groups(groups: &[PathBuf]) {
    for group in groups {
        std::fs::create_dir(group).expect("make a cgroup");
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if let Ok(above) = std::fs::read_to_string(group.with_file_name(file)) {
                std::fs::write(group.join(file), above.trim()).expect("copy a cpuset");
            }
        }
        // The one hierarchy of version 2 has processes in leaves only.
        if group.parent() == Some(Path::new("/sys/fs/cgroup")) {
            std::fs::create_dir(group.join("machine")).expect("make a cgroup");
        }
    }
}

/// Removes what is left of a tree of groups, innermost first.
fn remove_group(group: &Path) {
    for entry in std::fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_group(&entry.path());
        }
    }
    let _ = std::fs::remove_dir(group);
}

/// Makes the segment in the calling thread's network namespace.
pub fn lay_out() {
    run("ip", &format!("link add {BRIDGE} type bridge"));
    run("ip", &format!("link set {BRIDGE} up"));
}

/// Takes the segment away again.
pub fn clear() {
    run("ip", &format!("link del {BRIDGE}"));
}

/// The address families of a cluster, the primary one first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Ipv4,
    Ipv6,
    Dual,
}

impl Mode {
    pub fn prefixes(self) -> &'static [&'static str] {
        match self {
            Mode::Ipv4 => &["192.0.2."],
            Mode::Ipv6 => &["fd07::"],
            Mode::Dual => &["192.0.2.", "fd07::"],
        }
    }

    /// What the configuration file of the machine with the control plane says of networks.
    fn config(self) -> &'static str {
        match self {
            Mode::Ipv4 => "",
            Mode::Ipv6 => "clusterCIDR: 'fd2a::/48'\nserviceCIDR: 'fd2b::/112'\n",
            Mode::Dual => "clusterCIDR: '10.42.0.0/16,fd2a::/48'\nserviceCIDR: '10.43.0.0/16,fd2b::/112'\n",
        }
    }
}

/// An address as it is in front of a port.
pub fn in_url(address: &str) -> String {
    if address.contains(':') { format!("[{address}]") } else { address.to_owned() }
}

/// A machine with a link to the segment.
pub struct Machine {
    pub name: &'static str,
    /// The primary one first.
    pub addresses: Vec<String>,
    directory: tempfile::TempDir,
    groups: Vec<PathBuf>,
    holder: Child,
}

impl Machine {
    pub fn start(mode: Mode, name: &'static str, number: u8) -> Self {
        let directory = tempfile::Builder::new().prefix(&marker()).tempdir().expect("tempdir");
        let groups = groups(name);
        make_groups(&groups);
        let mut holder = Command::new("sh")
            .args(["-c", BOOT])
            .env("MACHINE_GROUPS", listed(&groups))
            .env("DATA", directory.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("sh");
        let mut line = String::new();
        BufReader::new(holder.stdout.take().expect("stdout")).read_line(&mut line).expect("read");
        assert_eq!(line.trim(), "ready", "the machine {name} did not start");
        let pid = holder.id();
        run("ip", &format!("link add to-{name} type veth peer name eth0 netns {pid}"));
        run("ip", &format!("link set to-{name} master {BRIDGE} up"));
        let addresses = mode.prefixes().iter().map(|prefix| format!("{prefix}{number}")).collect();
        let machine = Self { name, addresses, directory, groups, holder };
        let networks = if name == "a" { mode.config() } else { "" };
        std::fs::write(machine.config_file(), format!("{networks}kubelet: {{{ON_ANY_DISK}}}\n")).expect("write");
        machine.ip("link set eth0 up");
        for (prefix, address) in mode.prefixes().iter().zip(&machine.addresses) {
            let (length, more) = if address.contains(':') { (64, " nodad") } else { (24, "") };
            machine.ip(&format!("address add {address}/{length} dev eth0{more}"));
            machine.ip(&format!("route add default via {prefix}254"));
        }
        machine
    }

    fn ip(&self, line: &str) {
        let output = self.run("ip", line.split(' '));
        assert!(output.status.success(), "{}: ip {line}: {}", self.name, text(&output.stderr));
    }

    fn config_file(&self) -> PathBuf {
        self.directory.path().join("config.yaml")
    }

    pub fn data_dir(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    /// A command that runs on the machine.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("sh");
        let pid = self.holder.id().to_string();
        command.args(["-c", ENTER, "sh", "--target", &pid, "--net", "--mount", "--cgroup", "--"]);
        command.env("MACHINE_GROUPS", listed(&self.groups));
        command.arg(program).env("HOME", self.directory.path()).env_remove("KUBECONFIG").stdin(Stdio::null());
        command
    }

    pub fn run<'a>(&self, program: impl AsRef<OsStr>, arguments: impl IntoIterator<Item = &'a str>) -> Output {
        self.command(program).args(arguments).output().expect("nsenter")
    }

    /// What the machine itself gets from a URL; none where nobody answers soon.
    pub fn page(&self, url: &str) -> Option<String> {
        let output = self.run("curl", ["-sS", "-g", "-m", "3", url]);
        output.status.success().then(|| text(&output.stdout).trim().to_owned())
    }

    /// Runs `oarlock` with this machine's directory, name, addresses and configuration file.
    pub fn try_oarlock(&self, line: &str) -> Output {
        let mut command = self.command(binary("oarlock"));
        command.arg("--data-dir").arg(self.data_dir());
        command.args(["--node-name", self.name, "--node-ip", &self.addresses.join(",")]);
        command.arg("--config").arg(self.config_file());
        command.args(line.split(' ')).output().expect("nsenter")
    }

    /// As [`Self::try_oarlock`]; it must succeed. Its standard output.
    pub fn oarlock(&self, line: &str) -> String {
        let output = self.try_oarlock(line);
        let said = format!("{}{}", text(&output.stdout), text(&output.stderr));
        if !output.status.success() {
            self.show_logs();
        }
        assert!(output.status.success(), "{}: oarlock {line}: {said}", self.name);
        text(&output.stdout)
    }

    pub fn show_logs(&self) {
        for daemon in ["server", "runtime", "agent", "netproxy"] {
            let log = std::fs::read_to_string(self.data_dir().join(format!("log/{daemon}.log"))).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            println!("--- {} {daemon}\n{}", self.name, lines[lines.len().saturating_sub(12)..].join("\n"));
        }
    }

    /// Takes the machine's link away, or gives it back.
    pub fn set_link(&self, up: bool) {
        run("ip", &format!("link set to-{} {}", self.name, if up { "up" } else { "down" }));
    }
}

/// Ends what this machine runs, by its own directory, and the machine.
impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.try_oarlock("reset --yes");
        let _ = Command::new("ip").args(["link", "del", &format!("to-{}", self.name)]).status();
        drop(self.holder.stdin.take());
        let _ = self.holder.wait();
        self.groups.iter().for_each(|group| remove_group(group));
    }
}
