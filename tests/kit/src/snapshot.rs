//! Host state that a test must leave as it found it.
#![allow(unsafe_code, reason = "the C library has no wrapper for pidfd_open")]

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// A CNI plugin that deleted something leaves a child that ends when the kernel has tidied up, milliseconds later.
const PLUGINS: [&str; 6] = ["bridge", "portmap", "bandwidth", "firewall", "tuning", "loopback"];
/// How long such a child may take at most, in milliseconds.
const PLUGIN_LIMIT_MS: u16 = 10_000;

/// What exists on the host at one moment, as sorted lines: interfaces, mounts, cgroups, nftables tables, processes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    lines: BTreeSet<String>,
}

impl Snapshot {
    /// Takes a snapshot of the caller's namespaces. Of processes it lists those whose command line holds `marker` (a path
    /// that only the test uses), so that unrelated processes of the machine do not count.
    pub fn take(marker: &str) -> Self {
        let mut lines = BTreeSet::new();
        lines.extend(interfaces());
        lines.extend(mounts());
        lines.extend(cgroups());
        lines.extend(tables());
        lines.extend(processes(marker));
        Self { lines }
    }

    /// The same without control groups. Those are the machine's, where other programs have theirs meanwhile: a test that makes
    /// none has none to answer for.
    pub fn without_cgroups(mut self) -> Self {
        self.lines.retain(|line| !line.starts_with("cgroup "));
        self
    }

    /// Lines that `later` has and this one has not.
    pub fn leaked(&self, later: &Self) -> Vec<String> {
        later.lines.difference(&self.lines).cloned().collect()
    }

    /// Fails the test with the list of what `later` has more.
    pub fn assert_nothing_leaked(&self, later: &Self) {
        let leaked = self.leaked(later);
        assert!(leaked.is_empty(), "left behind:\n{}", leaked.join("\n"));
    }
}

fn interfaces() -> Vec<String> {
    let Ok(entries) =
        fs::read_dir("/proc/thread-self/net").and_then(|_| fs::read_to_string("/proc/thread-self/net/dev"))
    else {
        return Vec::new();
    };
    entries
        .lines()
        .skip(2)
        .filter_map(|line| line.split(':').next())
        .map(|name| format!("interface {}", name.trim()))
        .collect()
}

fn mounts() -> Vec<String> {
    fs::read_to_string("/proc/thread-self/mountinfo")
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|point| format!("mount {point}"))
        .collect()
}

/// Every cgroup directory whose name shows that Oarlock made it.
fn cgroups() -> Vec<String> {
    let mut found = Vec::new();
    let mut pending = vec![(Path::new("/sys/fs/cgroup").to_owned(), 0)];
    while let Some((directory, depth)) = pending.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            let path = entry.path();
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("kubepods") || name.starts_with("oarlock") {
                found.push(format!("cgroup {}", path.display()));
            }
            if depth < 3 {
                pending.push((path, depth + 1));
            }
        }
    }
    found
}

fn tables() -> Vec<String> {
    let Ok(output) = Command::new("nft").args(["list", "tables"]).output() else { return Vec::new() };
    String::from_utf8_lossy(&output.stdout).lines().map(|line| format!("nft {line}")).collect()
}

fn processes(marker: &str) -> Vec<String> {
    let own = std::process::id();
    let Ok(all) = procfs::process::all_processes() else { return Vec::new() };
    all.flatten()
        .filter(|process| process.pid.unsigned_abs() != own)
        .filter_map(|process| process.cmdline().ok().map(|words| (process.pid, words.join(" "))))
        .filter(|(_, command)| command.contains(marker))
        .filter(|(pid, command)| !(is_plugin(command) && ends_soon(*pid)))
        .map(|(pid, command)| format!("process {pid} {command}"))
        .collect()
}

fn is_plugin(command: &str) -> bool {
    Path::new(command).file_name().is_some_and(|name| PLUGINS.iter().any(|plugin| name == *plugin))
}

/// Waits for the end of a process; says whether it came.
fn ends_soon(pid: i32) -> bool {
    // SAFETY: the call takes two numbers and gives a descriptor that nobody else has, or -1.
    let descriptor = unsafe { nix::libc::syscall(nix::libc::SYS_pidfd_open, pid, 0) };
    let Ok(number) = i32::try_from(descriptor) else { return false };
    if number < 0 {
        return nix::errno::Errno::last() == nix::errno::Errno::ESRCH;
    }
    // SAFETY: the kernel has just given this descriptor to this process.
    let process = unsafe { OwnedFd::from_raw_fd(number) };
    let mut watched = [PollFd::new(std::os::fd::AsFd::as_fd(&process), PollFlags::POLLIN)];
    poll(&mut watched, PollTimeout::from(PLUGIN_LIMIT_MS)).is_ok_and(|ended| ended == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plugins_are_waited_for() {
        assert!(is_plugin("/tmp/some-test/cni-bin/bridge"));
        assert!(!is_plugin("/tmp/some-test/oarlock-shim --sandbox /run/bridge/x"));
        let mut child = Command::new("true").spawn().unwrap();
        assert!(ends_soon(i32::try_from(child.id()).unwrap()));
        child.wait().unwrap();
    }
}
