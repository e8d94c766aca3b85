//! The AppArmor profile of containers that name none: its text, and loading it into the kernel.
//!
//! What it forbids is what a container has no business with even as root: mounting, and writing to those files of proc and
//! sysfs by which the kernel itself is steered. Capabilities, devices, namespaces and seccomp are bounded elsewhere.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::unistd::geteuid;

use crate::spec::SpecError;

/// The profile's name, and the label of processes under it.
pub(crate) const DEFAULT_PROFILE: &str = "oarlock-default";
const PARSER: [&str; 3] = ["/usr/sbin/apparmor_parser", "/sbin/apparmor_parser", "/usr/bin/apparmor_parser"];
const ENABLED: &str = "/sys/module/apparmor/parameters/enabled";
const LOADED: &str = "/sys/kernel/security/apparmor/profiles";
const LIMIT: Duration = Duration::from_secs(20);

/// In the language of apparmor.d(5). The kernel's own label of the daemon and of shims is `unconfined`.
const PROFILE: &str = r"
profile oarlock-default flags=(attach_disconnected,mediate_deleted) {
  capability,
  file,
  network,
  unix,
  umount,
  deny mount,

  # Stopping and killing come from outside, everything else from within.
  signal (receive) peer=unconfined,
  signal (send, receive) peer=oarlock-default,
  ptrace (trace, tracedby, read, readby) peer=oarlock-default,

  # Settings of the whole machine; those of a network or IPC namespace stay the container's own.
  deny /proc/sys/{abi,debug,dev,fs,user,vm}/** wklx,
  deny /proc/sys/kernel/{acct,bpf*,cad_pid,core*,dmesg_restrict,ftrace*,hotplug,hung_task*,kexec*,keys/**,kptr_restrict} wklx,
  deny /proc/sys/kernel/{modprobe,modules_disabled,nmi*,panic*,perf*,pid_max,poweroff_cmd,print*,random*,randomize*} wklx,
  deny /proc/sys/kernel/{sched*,soft*,stack*,sysrq,tainted,threads-max,unprivileged*,usermodehelper/**,watchdog*,yama/**} wklx,
  deny /proc/{acpi,asound,bus,driver,fs,irq,scsi,tty}/** wklx,
  deny /proc/{kcore,kmem,kpage*,mem,sysrq-trigger,timer_list} rwklx,

  deny /sys/{block,bus,class,dev,devices,firmware,hypervisor,kernel,module,power}/** wklx,
  deny /sys/fs/{bpf,btrfs,ext4,f2fs,fuse,pstore,resctrl,selinux,smackfs,xfs}/** wklx,
  deny /sys/{firmware,kernel/security,devices/virtual/powercap}/** rwklx,
}
";

/// Whether the kernel has AppArmor switched on.
pub(crate) fn is_enabled() -> bool {
    fs::read_to_string(ENABLED).is_ok_and(|on| on.starts_with('Y'))
}

/// Refuses a profile that the kernel does not have, by name: the kernel's own answer, once the container is half made, says
/// only that something was not found. What cannot be looked up is left to the kernel.
pub(crate) fn require(name: &str) -> Result<(), SpecError> {
    let Ok(loaded) = fs::read_to_string(LOADED) else { return Ok(()) };
    if name == "unconfined" || is_listed(&loaded, name) {
        return Ok(());
    }
    Err(SpecError::invalid("linux.security_context.apparmor", format!("the profile {name} is not loaded on this host")))
}

/// Each line is a name and its mode: `name (enforce)`.
fn is_listed(loaded: &str, name: &str) -> bool {
    loaded.lines().any(|line| line.rsplit_once(" (").is_some_and(|(listed, _)| listed == name))
}

/// Loads the default profile, replacing one of an earlier version; tells whether containers can have it. Takes some tens of
/// milliseconds, and nothing where there is no AppArmor.
pub(crate) fn load_default() -> bool {
    if !is_enabled() || !geteuid().is_root() {
        return false;
    }
    let Some(parser) = PARSER.iter().map(Path::new).find(|path| path.exists()) else {
        tracing::warn!(
            "AppArmor is on, but there is no apparmor_parser (package apparmor): containers run without a profile"
        );
        return false;
    };
    match parse(parser) {
        Ok(()) => true,
        Err(error) => {
            tracing::warn!(
                error,
                "the AppArmor profile {DEFAULT_PROFILE} could not be loaded: containers run without it"
            );
            false
        }
    }
}

fn parse(parser: &Path) -> Result<(), String> {
    // Neither reads nor writes a cache; a profile that is there is replaced.
    let mut child = Command::new(parser)
        .args(["--skip-cache", "--replace", "--quiet"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{}: {error}", parser.display()))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A parser that does not read says why below.
        let _ = stdin.write_all(PROFILE.as_bytes());
    }
    let end = std::time::Instant::now() + LIMIT;
    loop {
        match child.try_wait() {
            Ok(Some(_)) => break,
            Ok(None) if std::time::Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
            _ => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("{} did not end within {} s", parser.display(), LIMIT.as_secs()));
            }
        }
    }
    let output = child.wait_with_output().map_err(|error| error.to_string())?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::is_listed;

    #[test]
    fn a_profile_is_loaded_under_its_whole_name() {
        let loaded = "oarlock-default (enforce)\n/usr/bin/man (complain)\nmy profile (mixed) (unconfined)\n";
        assert!(is_listed(loaded, "/usr/bin/man") && is_listed(loaded, "my profile (mixed)"));
        assert!(!is_listed(loaded, "/usr/bin") && !is_listed(loaded, "my profile"));
    }
}
