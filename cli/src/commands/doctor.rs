//! `oarlock doctor`: what this machine has and lacks, one line a finding, with what to do.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use oarlock_runtime::CgroupDriver;

use super::firewall;
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
    let checks: [(&str, Finding); 13] = [
        ("user", user()),
        ("kernel", kernel()),
        ("cgroups", cgroups(settings.cgroup_driver)),
        ("overlay", filesystem("overlay", "container root file systems cannot be made")),
        ("nftables", nftables()),
        ("host firewall", host_firewall(settings)),
        ("seccomp", seccomp()),
        ("oom scores", oom_scores()),
        ("forwarding", forwarding(settings)),
        ("bridged packets", bridged_packets(settings)),
        ("default route", default_route(&fs::read_to_string("/proc/net/route").unwrap_or_default())),
        ("link managers", link_managers()),
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

fn cgroups(driver: CgroupDriver) -> Finding {
    let version_2 = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let systemd = oarlock_systemd::is_running();
    let obstacle = match (version_2, systemd) {
        (true, true) => None,
        (false, _) => Some("control groups of version 2 alone"),
        (_, false) => Some("systemd as this machine's service manager"),
    };
    match (driver, obstacle) {
        (CgroupDriver::Systemd, Some(lacking)) => {
            return Finding::Missing(format!(
                "the cgroup driver systemd needs {lacking}; set cgroupDriver to cgroupfs"
            ));
        }
        (CgroupDriver::Systemd | CgroupDriver::Auto, None) => {
            return Finding::Good("version 2, through systemd".to_owned());
        }
        _ if version_2 => return Finding::Good("version 2".to_owned()),
        _ => {}
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
    // A mount loads the module.
    let module = Command::new("modprobe").args(["--dry-run", "--quiet", name]).status();
    if module.is_ok_and(|status| status.success()) {
        return Finding::Good("a module, loaded on use".to_owned());
    }
    Finding::Missing(format!("the kernel does not know {name}: {without}; try `modprobe {name}`"))
}

/// Other tables can only be told of: what they drop stays dropped, whatever ours accept.
fn host_firewall(settings: &Settings) -> Finding {
    let conflicts = match firewall::conflicts() {
        Ok(conflicts) => conflicts,
        Err(problem) => return Finding::Limited(format!("cannot be told: {problem}")),
    };
    if conflicts.is_empty() {
        return Finding::Good("no other table drops packets by default".to_owned());
    }
    let second = settings.secondary.as_ref().map(|second| format!(" and {}", second.cluster_cidr)).unwrap_or_default();
    let pods = format!("{}{second}", settings.cluster_cidr);
    Finding::Limited(format!("{}; let packets from and to {pods} pass there", conflicts.join("; ")))
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

/// The address families that the cluster has, as whether each is IPv4.
fn families(settings: &Settings) -> impl Iterator<Item = bool> {
    let second = settings.secondary.as_ref().map(|second| second.cluster_cidr.addr().is_ipv4());
    std::iter::once(settings.cluster_cidr.addr().is_ipv4()).chain(second)
}

fn forwarding(settings: &Settings) -> Finding {
    let mut is_on = true;
    for is_ipv4 in families(settings) {
        let name = if is_ipv4 { "net.ipv4.ip_forward" } else { "net.ipv6.conf.all.forwarding" };
        match fs::read_to_string(Path::new("/proc/sys").join(name.replace('.', "/"))).as_deref().map(str::trim) {
            Ok(value) => is_on &= value == "1",
            Err(error) => return Finding::Missing(format!("cannot read {name}: {error}")),
        }
    }
    Finding::Good(if is_on { "on" } else { "off now; netproxy turns it on" }.to_owned())
}

/// Network policies and Services between pods of one node hang on that.
fn bridged_packets(settings: &Settings) -> Finding {
    let settings_of = families(settings).map(|is_ipv4| if is_ipv4 { "iptables" } else { "ip6tables" });
    let paths: Vec<_> = settings_of.map(|name| format!("/proc/sys/net/bridge/bridge-nf-call-{name}")).collect();
    if paths.iter().all(|path| fs::read_to_string(path).is_ok_and(|value| value.trim() == "1")) {
        return Finding::Good("are seen".to_owned());
    }
    let is_there = paths.iter().all(|path| Path::new(path).exists());
    if is_there
        || Command::new("modprobe")
            .args(["--dry-run", "br_netfilter"])
            .output()
            .is_ok_and(|output| output.status.success())
    {
        return Finding::Good("not seen now; netproxy sees to that".to_owned());
    }
    Finding::Limited(
        "the kernel has no module br_netfilter: pods of one node see the node as client behind a Service".to_owned(),
    )
}

/// `table` is the text of `/proc/net/route`: interface, destination and gateway in the first columns.
fn default_route(table: &str) -> Finding {
    let through = table.lines().skip(1).find_map(|line| {
        let mut columns = line.split_whitespace();
        let (interface, destination) = (columns.next()?, columns.next()?);
        (destination == "00000000").then(|| interface.to_owned())
    });
    match through {
        Some(interface) => Finding::Good(format!("through {interface}")),
        None => Finding::Limited(
            "none: this machine itself cannot reach Services by their cluster IPs (pods can); any default route will do"
                .to_owned(),
        ),
    }
}

/// Programs that configure every new link would take the pods' links away from us.
fn link_managers() -> Finding {
    let states = Path::new("/run/systemd/netif/links");
    for (index, name) in nix::net::if_::if_nameindex().iter().flatten().filter_map(|interface| {
        let name = interface.name().to_string_lossy().into_owned();
        (name.starts_with("veth") || name.starts_with("cni")).then_some((interface.index(), name))
    }) {
        let state = fs::read_to_string(states.join(index.to_string())).unwrap_or_default();
        if state.lines().any(|line| line.starts_with("NETWORK_FILE=")) {
            return Finding::Limited(format!(
                "systemd-networkd configures {name}, which is ours: a [Match] in /etc/systemd/network is too wide, for example Type=ether; pods may be unreachable"
            ));
        }
    }
    Finding::Good("none takes the pods' links".to_owned())
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
            let percent = stat.blocks_available() * 100 / stat.blocks().max(1);
            if percent < 5 {
                Finding::Limited(format!(
                    "only {percent} % free ({free} MiB) at {}: below 5 % the node reports disk pressure and takes no pods",
                    directory.display()
                ))
            } else if free >= 1024 {
                Finding::Good(format!("{free} MiB free at {}", directory.display()))
            } else {
                Finding::Limited(format!("only {free} MiB free at {}", directory.display()))
            }
        }
        Err(error) => Finding::Missing(format!("cannot look at {}: {error}", directory.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_route_is_found_by_its_destination() {
        let header = "Iface\tDestination\tGateway\n";
        let local = "eth0\t0002000A\t00000000\n";
        assert!(matches!(default_route(&format!("{header}{local}")), Finding::Limited(_)));
        let both = format!("{header}{local}eth0\t00000000\t0202000A\n");
        assert!(matches!(default_route(&both), Finding::Good(text) if text == "through eth0"));
    }
}
