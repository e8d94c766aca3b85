//! Machines on one segment, each with network, mount and cgroup namespaces of its own, in which real programs run.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use oarlock_testkit::binary;

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

/// Runs a command as a process of the machine.
const ENTER: &str = r#"if [ -e /sys/fs/cgroup/machine ]; then groups=/sys/fs/cgroup/machine; else groups="/sys/fs/cgroup/*"; fi
for group in $groups; do
  if [ -e "$group/cgroup.procs" ]; then echo $$ > "$group/cgroup.procs" || exit 99; fi
done
exec "$@""#;

fn run(program: &str, line: &str) {
    let output = Command::new(program).args(line.split(' ')).output().expect("run");
    assert!(output.status.success(), "{program} {line}: {}", text(&output.stderr));
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A machine's own group in each hierarchy of the host.
fn groups(name: &str) -> Vec<PathBuf> {
    let top = Path::new("/sys/fs/cgroup");
    let group = format!("oarlock-node-{}-{name}", std::process::id());
    if top.join("cgroup.controllers").exists() {
        for controller in ["cpu", "cpuset", "io", "memory", "pids"] {
            let _ = std::fs::write(top.join("cgroup.subtree_control"), format!("+{controller}"));
        }
        return vec![top.join(group)];
    }
    let all = std::fs::read_dir(top).expect("cgroups").flatten().map(|entry| entry.path());
    all.filter(|path| path.join("cgroup.procs").exists()).map(|path| path.join(&group)).collect()
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

/// A machine with a link to the segment.
pub struct Machine {
    pub name: &'static str,
    pub address: String,
    directory: tempfile::TempDir,
    groups: Vec<PathBuf>,
    holder: Child,
}

impl Machine {
    pub fn start(name: &'static str, number: u8) -> Self {
        let directory = tempfile::Builder::new().prefix("oarlock-node-").tempdir().expect("tempdir");
        let groups = groups(name);
        make_groups(&groups);
        let listed: Vec<String> = groups.iter().map(|group| group.to_string_lossy().into_owned()).collect();
        let mut holder = Command::new("sh")
            .args(["-c", BOOT])
            .env("MACHINE_GROUPS", listed.join(" "))
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
        let address = format!("192.0.2.{number}");
        let machine = Self { name, address, directory, groups, holder };
        for line in [&format!("address add {}/24 dev eth0", machine.address), "link set eth0 up"] {
            let output = machine.run("ip", line.split(' '));
            assert!(output.status.success(), "{}", text(&output.stderr));
        }
        let output = machine.run("ip", ["route", "add", "default", "via", "192.0.2.254"]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        machine
    }

    pub fn data_dir(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    /// A command that runs on the machine.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        let pid = self.holder.id().to_string();
        command.args(["--target", &pid, "--net", "--mount", "--cgroup", "sh", "-c", ENTER, "sh"]);
        command.arg(program).env("HOME", self.directory.path()).env_remove("KUBECONFIG").stdin(Stdio::null());
        command
    }

    pub fn run<'a>(&self, program: impl AsRef<OsStr>, arguments: impl IntoIterator<Item = &'a str>) -> Output {
        self.command(program).args(arguments).output().expect("nsenter")
    }

    /// Runs `oarlock` with this machine's directory, name and address.
    pub fn try_oarlock(&self, line: &str) -> Output {
        let mut command = self.command(binary("oarlock"));
        command.arg("--data-dir").arg(self.data_dir());
        command.args(["--node-name", self.name, "--node-ip", &self.address]);
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
