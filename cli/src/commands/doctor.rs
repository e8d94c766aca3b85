//! `oarlock doctor`: what this machine has and lacks, one line a finding, with what to do.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use crate::config::Settings;

/// What a check found.
enum Finding {
    Good(String),
    /// Works, with the named limit.
    Limited(String),
    /// Must be fixed before `up`.
    Missing(String),
}

pub(crate) fn run(settings: &Settings) -> anyhow::Result<ExitCode> {
    let checks: [(&str, Finding); 9] = [
        ("user", user()),
        ("kernel", kernel()),
        ("cgroups", cgroups()),
        ("overlay", filesystem("overlay", "container root file systems cannot be made")),
        ("nftables", nftables()),
        ("seccomp", seccomp()),
        ("oom scores", oom_scores()),
        ("forwarding", forwarding()),
        ("disk", disk(settings)),
    ];
    let mut missing = 0;
    for (name, finding) in checks {
        let (mark, text) = match finding {
            Finding::Good(text) => ("ok     ", text),
            Finding::Limited(text) => ("limited", text),
            Finding::Missing(text) => {
                missing += 1;
                ("MISSING", text)
            }
        };
        println!("{mark}  {name}: {text}");
    }
    Ok(if missing == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn user() -> Finding {
    if nix::unistd::geteuid().is_root() {
        Finding::Good("root".to_owned())
    } else {
        Finding::Missing("not root; run oarlock as root".to_owned())
    }
}

fn kernel() -> Finding {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned();
    let mut numbers = release.split(['.', '-']).map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= (5, 10) { Finding::Good(release) } else { Finding::Missing(format!("{release} is older than 5.10")) }
}

fn cgroups() -> Finding {
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        return Finding::Good("version 2".to_owned());
    }
    let wanted = ["cpu", "memory", "pids", "cpuset"];
    let lacking: Vec<&str> =
        wanted.into_iter().filter(|name| !Path::new("/sys/fs/cgroup").join(name).exists()).collect();
    if lacking.is_empty() {
        Finding::Good("version 1 or hybrid".to_owned())
    } else {
        Finding::Missing(format!("no {} controller is mounted under /sys/fs/cgroup", lacking.join(", ")))
    }
}

fn filesystem(name: &str, without: &str) -> Finding {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if known.split_whitespace().any(|word| word == name) {
        return Finding::Good("known to the kernel".to_owned());
    }
    Finding::Missing(format!("the kernel does not know {name}: {without}; try `modprobe {name}`"))
}

fn nftables() -> Finding {
    match Command::new("nft").args(["list", "tables"]).output() {
        Ok(output) if output.status.success() => Finding::Good("nft works".to_owned()),
        Ok(output) => Finding::Missing(format!("nft fails: {}", String::from_utf8_lossy(&output.stderr).trim())),
        Err(error) => Finding::Missing(format!("nft cannot be run ({error}); install the package nftables")),
    }
}

fn seccomp() -> Finding {
    match fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail") {
        Ok(actions) if actions.contains("errno") => Finding::Good("filters work".to_owned()),
        _ => Finding::Limited("the kernel has no seccomp filters; containers run without".to_owned()),
    }
}

fn oom_scores() -> Finding {
    const CAP_SYS_RESOURCE: u32 = 24;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0);
    if effective & (1 << CAP_SYS_RESOURCE) != 0 {
        Finding::Good("may be lowered".to_owned())
    } else {
        Finding::Limited("no CAP_SYS_RESOURCE: containers with a negative OOM score keep their parent's".to_owned())
    }
}

fn forwarding() -> Finding {
    match fs::read_to_string("/proc/sys/net/ipv4/ip_forward").as_deref().map(str::trim) {
        Ok("1") => Finding::Good("on".to_owned()),
        Ok(_) => Finding::Good("off now; netproxy turns it on".to_owned()),
        Err(error) => Finding::Missing(format!("cannot read net.ipv4.ip_forward: {error}")),
    }
}

fn disk(settings: &Settings) -> Finding {
    let mut directory = settings.layout.data_dir();
    while !directory.exists() {
        let Some(parent) = directory.parent() else { break };
        directory = parent;
    }
    match nix::sys::statvfs::statvfs(directory) {
        Ok(stat) => {
            let free = stat.blocks_available() * stat.fragment_size() / (1 << 20);
            if free >= 1024 {
                Finding::Good(format!("{free} MiB free at {}", directory.display()))
            } else {
                Finding::Limited(format!("only {free} MiB free at {}", directory.display()))
            }
        }
        Err(error) => Finding::Missing(format!("cannot look at {}: {error}", directory.display())),
    }
}
