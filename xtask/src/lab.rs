//! `cargo xtask lab`: tests on a virtual machine of its own, which has what this machine may lack: Debian 13 with its kernel,
//! systemd, and cgroup version 2.
//!
//! The guest is made from Debian's packages below the target directory and runs in QEMU. It gets the built programs and the
//! tests' executables on its disk, runs them, says on its serial port what they print, and powers off. Emulated in software
//! it is some ten times slower than the host.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde_json::Value;

use crate::test::{APART, APART_AT_ONCE, Counts};
use crate::{build, lab_cluster, packages, step, target_dir};

/// The guest's release of Debian.
const SUITE: &str = "trixie";
/// What is installed in the guest beside the minimal system.
const PACKAGES: &[&str] = &[
    "apparmor",
    "ca-certificates",
    "conntrack",
    "crun",
    "curl",
    "iproute2",
    "iputils-ping",
    "linux-image-cloud-amd64",
    "netbase",
    "nftables",
    "procps",
    "runc",
    "systemd-resolved",
    "systemd-sysv",
    "util-linux-extra",
];
/// The end-to-end cases that run in the guest, where everything is slow: those that cgroups, the kernel or systemd touch.
const CASES: &[&str] = &[
    "limits_are_enforced",
    "each_class_of_pods",
    "machines_stop_waits",
    "swap_and_huge_pages",
    "oom_killed",
    "logs_in",
    "exec_piped",
    "names_resolve",
    "all_four_killed",
];
/// The test programs that `cargo xtask test` runs in the guest: those that meet cgroups, systemd's mounts or another kernel.
pub(crate) const DEFAULT_TESTS: &[&str] = &[
    "cni",
    "cni_chained",
    "cni_options",
    "e2e",
    "netns",
    "node_routes",
    "runtime",
    "runtime_inside",
    "runtime_pods",
    "runtime_systemd",
    "sctp",
    "shim",
];
/// The test programs that `lab network` runs in the guest: all that send packets.
const NETWORK_TESTS: &[&str] = &[
    "balancer",
    "cni",
    "cni_chained",
    "cni_options",
    "cluster_dns",
    "cluster_dns_upstream",
    "netpolicy",
    "netproxy",
    "netproxy_random",
    "nft",
    "node_routes",
    "sctp",
    "several_nodes",
];
/// Whether this machine can run the guest.
pub(crate) const CAN_RUN: bool = cfg!(target_arch = "x86_64");
const MEMORY_MEGABYTES: u32 = 1536;
const DISK_MEGABYTES: u32 = 4096;
/// Kernel modules that the guest loads while it boots. Emulated in software, each that has to be loaded on first use takes
/// seconds, which add up to more than daemons are given to start.
const MODULES: &[&str] = &[
    "br_netfilter",
    "nf_conntrack_netlink",
    "nft_ct",
    "nft_fib_ipv4",
    "nft_fib_ipv6",
    "nft_masq",
    "nft_nat",
    "nft_numgen",
    "nft_reject_ipv4",
    "nft_reject_ipv6",
    "overlay",
    "veth",
    "vxlan",
    "wireguard",
];
/// How long the guest may take in all, and with the tests of the network.
const DEADLINE: Duration = Duration::from_secs(30 * 60);
const NETWORK_DEADLINE: Duration = Duration::from_secs(60 * 60);
/// What the guest prints at its end.
const FINISHED: &str = "the guest has finished";

#[derive(clap::Args)]
pub(crate) struct LabFlags {
    #[command(subcommand)]
    chore: LabChore,
}

#[derive(clap::Subcommand)]
enum LabChore {
    /// Run the privileged tests and some end-to-end cases in a guest
    Test {
        /// Run these test programs (cni, e2e, netns, netproxy, nft, runtime, shim, volumes …) and not those of every run
        #[arg(long)]
        only: Vec<String>,
        /// Use KVM instead of software emulation
        #[arg(long)]
        kvm: bool,
        /// Take the programs from this directory instead of building them
        #[arg(long, value_name = "DIR")]
        bin: Option<PathBuf>,
    },
    /// Run every test that sends packets in a guest, then the checks between three guests
    Network {
        /// Use KVM instead of software emulation
        #[arg(long)]
        kvm: bool,
        /// Take the programs from this directory instead of building them
        #[arg(long, value_name = "DIR")]
        bin: Option<PathBuf>,
    },
    /// Start three guests on two segments as a cluster: a server, which is the router, and two machines that join it
    Up(lab_cluster::UpFlags),
}

pub(crate) fn run(flags: &LabFlags) -> anyhow::Result<()> {
    let (only, kvm, bin) = match &flags.chore {
        LabChore::Test { only, kvm, bin } => (only, kvm, bin),
        LabChore::Network { kvm, bin } => return network(*kvm, bin.as_deref()),
        LabChore::Up(flags) => return lab_cluster::run(flags),
    };
    let bin = bin.clone().map_or_else(build::run, Ok)?;
    let only: Vec<&str> = only.iter().map(String::as_str).collect();
    let tested = if only.is_empty() { DEFAULT_TESTS } else { &only };
    verdict(run_tests(&bin, tested, *kvm, DEADLINE)?)
}

/// Every test that sends packets, on the guest's kernel and between guests.
fn network(kvm: bool, bin: Option<&Path>) -> anyhow::Result<()> {
    let bin = bin.map_or_else(build::run, |bin| Ok(bin.to_owned()))?;
    let in_guest = run_tests(&bin, NETWORK_TESTS, kvm, NETWORK_DEADLINE).and_then(verdict);
    // Whatever became of the first half, the second has something of its own to say.
    lab_cluster::run(&lab_cluster::UpFlags::checks(kvm, &bin)).and(in_guest)
}

fn verdict((counts, succeeded): (Counts, bool)) -> anyhow::Result<()> {
    println!("{} passed, {} failed, {} skipped", counts.passed, counts.failed, counts.not_run);
    anyhow::ensure!(succeeded && counts.failed == 0 && counts.passed > 0, "the tests in the guest failed");
    Ok(())
}

/// As [`run_tests`], within the time that is meant for one in every run.
pub(crate) fn test(bin: &Path, names: &[&str], kvm: bool) -> anyhow::Result<(Counts, bool)> {
    run_tests(bin, names, kvm, DEADLINE)
}

/// Makes the guest, runs the test programs of these names in it and adds up their results.
fn run_tests(bin: &Path, names: &[&str], kvm: bool, deadline: Duration) -> anyhow::Result<(Counts, bool)> {
    anyhow::ensure!(CAN_RUN, "the guest is an x86_64 machine; this one is not");
    packages::ensure(packages::LAB)?;
    let lab = target_dir().join("lab");
    fs::create_dir_all(&lab).with_context(|| format!("cannot make {}", lab.display()))?;
    let system = system(&lab)?;
    let root = lab.join("root");
    remove(&root)?;
    fs::create_dir_all(&root)?;
    step::run("unpack the guest's system", Command::new("tar").arg("xf").arg(&system).arg("-C").arg(&root))?;
    let tests = test_programs(names)?;
    anyhow::ensure!(tests.len() == names.len(), "not all of these are test programs: {}", names.join(" "));
    furnish(&root, bin, &tests)?;
    let guest = Guest::make(&lab, &root, "disk.img")?;
    remove(&root)?;
    guest.run(kvm, deadline)
}

/// The minimal system as a tar archive, made once.
pub(crate) fn system(lab: &Path) -> anyhow::Result<PathBuf> {
    // Another list of packages is another system.
    let mut hasher = DefaultHasher::new();
    PACKAGES.hash(&mut hasher);
    let archive = lab.join(format!("{SUITE}-{:016x}.tar", hasher.finish()));
    if archive.exists() {
        return Ok(archive);
    }
    let partial = lab.join("partial.tar");
    step::run(
        &format!("make Debian {SUITE} for the guest"),
        Command::new("mmdebstrap")
            .args(["--quiet", "--variant=minbase", "--include", &PACKAGES.join(","), SUITE])
            .arg(&partial),
    )?;
    fs::rename(&partial, &archive).with_context(|| format!("cannot place {}", archive.display()))?;
    Ok(archive)
}

/// Name and executable of these test programs of the suite.
fn test_programs(names: &[&str]) -> anyhow::Result<Vec<(String, PathBuf)>> {
    let mut command = step::cargo();
    command.args(["test", "--package", "oarlock-tests", "--locked", "--no-run", "--message-format=json"]);
    command.args(names.iter().flat_map(|name| ["--test", name]));
    let output = step::output(&mut command).context("not all of these are test programs")?;
    let mut programs = Vec::new();
    for line in output.lines() {
        let Ok(message) = serde_json::from_str::<Value>(line) else { continue };
        let is_test = message["target"]["kind"][0] == "test";
        if let (true, Some(executable), Some(name)) =
            (is_test, message["executable"].as_str(), message["target"]["name"].as_str())
        {
            programs.push((name.to_owned(), PathBuf::from(executable)));
        }
    }
    // Cargo tells of them as they get ready, which is another order each time.
    programs.sort();
    anyhow::ensure!(!programs.is_empty(), "cargo named no test programs");
    Ok(programs)
}

/// Puts programs, tests and what starts them into the guest's system.
fn furnish(root: &Path, bin: &Path, tests: &[(String, PathBuf)]) -> anyhow::Result<()> {
    let test_directory = root.join("opt/tests");
    fs::create_dir_all(&test_directory)?;
    for (name, executable) in tests {
        step::output(
            Command::new("strip").arg("--strip-debug").arg("-o").arg(test_directory.join(name)).arg(executable),
        )?;
    }
    let network = "[Match]\nName=en*\n[Network]\nAddress=10.0.2.15/24\nGateway=10.0.2.2\nIPv6AcceptRA=no\n";
    equip(root, bin, "lab", network, &guest_script(tests))
}

/// Puts the programs into a guest's system, names it, connects it, and lets `script` run once it is connected.
pub(crate) fn equip(root: &Path, bin: &Path, name: &str, network: &str, script: &str) -> anyhow::Result<()> {
    let programs = root.join("opt/oarlock");
    fs::create_dir_all(&programs)?;
    for entry in fs::read_dir(bin)?.flatten() {
        fs::copy(entry.path(), programs.join(entry.file_name()))?;
    }
    fs::copy(packages::KUBECTL.program()?, root.join("usr/local/bin/kubectl"))?;
    let file = root.join("opt/run");
    fs::write(&file, script)?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;

    let etc = root.join("etc");
    fs::write(etc.join("hostname"), format!("{name}\n"))?;
    fs::create_dir_all(etc.join("modules-load.d"))?;
    fs::write(etc.join("modules-load.d/lab.conf"), MODULES.join("\n") + "\n")?;
    fs::write(etc.join("fstab"), "/dev/vda / ext4 rw 0 1\n")?;
    fs::create_dir_all(etc.join("systemd/network"))?;
    fs::write(etc.join("systemd/network/10-lab.network"), network)?;
    let units = etc.join("systemd/system");
    fs::write(
        units.join("run.service"),
        "[Unit]\nAfter=network-online.target\nWants=network-online.target\n[Service]\nExecStart=/opt/run\nKillMode=process\n",
    )?;
    // A login prompt on the serial port would hang up on the script.
    symlink("/dev/null", units.join("serial-getty@ttyS0.service"))?;
    let own = Path::new("/usr/lib/systemd/system");
    for (target, unit, file) in [
        ("multi-user.target.wants", "run.service", units.join("run.service")),
        ("multi-user.target.wants", "systemd-networkd.service", own.join("systemd-networkd.service")),
        ("network-online.target.wants", "wait-online.service", own.join("systemd-networkd-wait-online.service")),
    ] {
        fs::create_dir_all(units.join(target))?;
        let link = units.join(target).join(unit);
        let _ = fs::remove_file(&link);
        symlink(file.strip_prefix(root).map_or(file.clone(), |inside| Path::new("/").join(inside)), link)?;
    }
    Ok(())
}

/// What the guest runs: each test program in turn.
fn guest_script(tests: &[(String, PathBuf)]) -> String {
    let mut script = String::from(
        "#!/bin/bash\nexec >/dev/ttyS0 2>&1\nexport OARLOCK_LAB=1 OARLOCK_BIN_DIR=/opt/oarlock KUBECTL=/usr/local/bin/kubectl HOME=/root\necho \"kernel $(uname -r), $(stat -fc %T /sys/fs/cgroup), up $(cut -d' ' -f1 /proc/uptime) s\"\n\
         fallocate -l 128M /swap && chmod 600 /swap && mkswap -q /swap && swapon /swap && echo 8 > /proc/sys/vm/nr_hugepages\n",
    );
    for (name, _) in tests {
        let filter = if name == "e2e" { CASES.join(" ") } else { String::new() };
        let threads = if APART.contains(&name.as_str()) { APART_AT_ONCE } else { 1 };
        script.push_str(&format!(
            "echo '--- {name}'; /opt/tests/{name} --test-threads={threads} {filter} || echo '--- {name} failed'; echo \"up $(cut -d' ' -f1 /proc/uptime) s\"\n"
        ));
    }
    script.push_str(&format!("echo '{FINISHED}'\nsync\nsystemctl poweroff -ff\n"));
    script
}

/// A disk, a kernel and its initial file system.
pub(crate) struct Guest {
    disk: PathBuf,
    kernel: PathBuf,
    initrd: PathBuf,
}

impl Guest {
    pub(crate) fn make(lab: &Path, root: &Path, disk: &str) -> anyhow::Result<Self> {
        let guest = Self { disk: lab.join(disk), kernel: lab.join("vmlinuz"), initrd: lab.join("initrd") };
        let boot = root.join("boot");
        for entry in fs::read_dir(&boot).with_context(|| format!("no {}", boot.display()))?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let to = match () {
                () if name.starts_with("vmlinuz-") => &guest.kernel,
                () if name.starts_with("initrd.img-") => &guest.initrd,
                () => continue,
            };
            fs::copy(entry.path(), to)?;
        }
        remove(&guest.disk)?;
        step::output(
            Command::new("mke2fs")
                .args(["-q", "-t", "ext4", "-d"])
                .arg(root)
                .arg(&guest.disk)
                .arg(format!("{DISK_MEGABYTES}M")),
        )?;
        Ok(guest)
    }

    /// The machine, with no network yet.
    pub(crate) fn command(&self, kvm: bool, memory_megabytes: u32) -> Command {
        let accelerator: &[&str] =
            if kvm { &["-accel", "kvm", "-cpu", "host"] } else { &["-accel", "tcg", "-cpu", "max"] };
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-machine", "q35", "-smp", "2", "-nographic", "-no-reboot"])
            .args(["-m", &memory_megabytes.to_string()])
            .args(accelerator)
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(&self.initrd)
            .args(["-append", "console=ttyS0 root=/dev/vda rw quiet loglevel=1 systemd.show_status=0"])
            .arg("-drive")
            .arg(format!("file={},if=virtio,format=raw,cache=unsafe", self.disk.display()));
        command
    }

    /// Boots it, shows what it says, and returns once it has powered off. It is ended when it takes too long.
    fn run(&self, kvm: bool, deadline: Duration) -> anyhow::Result<(Counts, bool)> {
        println!("==> tests in the guest");
        let child = self
            .command(kvm, MEMORY_MEGABYTES)
            .args(["-nic", "user,restrict=on,model=virtio-net-pci"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start qemu-system-x86_64")?;
        let outcome = Ended(child).follow(deadline);
        remove(&self.disk)?;
        outcome
    }
}

/// A process that is ended and reaped whatever happens.
struct Ended(Child);

impl Ended {
    fn follow(mut self, deadline: Duration) -> anyhow::Result<(Counts, bool)> {
        let output = self.0.stdout.take().context("the guest has no serial port")?;
        let (sender, lines) = mpsc::sync_channel(64);
        let reader = std::thread::spawn(move || {
            let mut output = BufReader::new(output);
            let mut line = Vec::new();
            while output.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
                if sender.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                    return;
                }
                line.clear();
            }
        });
        let start = Instant::now();
        let mut counts = Counts::default();
        let (mut finished, mut failed) = (false, false);
        loop {
            let left = deadline.saturating_sub(start.elapsed());
            match lines.recv_timeout(left) {
                Ok(line) => {
                    println!("    | {line}");
                    std::io::stdout().flush().ok();
                    if let Some(at) = line.find("test result: ") {
                        counts.add(Counts::parse(&line[at + "test result: ".len()..]));
                    }
                    finished |= line.ends_with(FINISHED);
                    failed |= line.starts_with("--- ") && line.ends_with(" failed");
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    println!("    the guest did not finish within {} s", deadline.as_secs());
                    break;
                }
            }
        }
        drop(self);
        let _ = reader.join();
        println!("    guest: {:.0} s", start.elapsed().as_secs_f64());
        Ok((counts, finished && !failed))
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Removes a file or a tree that may be there.
pub(crate) fn remove(path: &Path) -> anyhow::Result<()> {
    let outcome = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match outcome {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
