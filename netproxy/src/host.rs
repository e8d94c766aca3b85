//! What the node's kernel has to allow: forwarding, and bridged packets in sight of nftables.
//!
//! What a setting was before is written down before it is changed, so that a reset can put it back.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use oarlock_netlink::{Connection, Protocol};
use tracing::{debug, info, warn};

/// A sysctl that could not be set.
#[derive(Debug, thiserror::Error)]
#[error("cannot set {} to {value}", path.display())]
pub struct SysctlError {
    path: PathBuf,
    value: String,
    source: io::Error,
}

/// The addresses of this node; none, and a warning, when the kernel does not tell.
pub fn addresses() -> Vec<IpAddr> {
    let listed = Connection::open(Protocol::Route).and_then(|mut connection| connection.addresses());
    match listed {
        Ok(addresses) => addresses.into_iter().map(|address| address.net.addr()).collect(),
        Err(error) => {
            warn!(error = &error as &dyn std::error::Error, "addresses of this node cannot be listed");
            Vec::new()
        }
    }
}

/// Lets this process have as many files open as it may: each port that is listened on is one, and what a service manager
/// gives without being asked is little.
pub fn raise_open_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(soft, hard)| if soft < hard { setrlimit(Resource::RLIMIT_NOFILE, hard, hard) } else { Ok(()) });
    if let Err(error) = raised {
        warn!(error = &error as &dyn std::error::Error, "number of open files stays as low as it is");
    }
}

/// Lets the node forward.
pub fn enable_forwarding(is_ipv4: bool, record: Option<&Path>) -> Result<(), SysctlError> {
    if is_ipv4 {
        return ensure(Path::new("/proc/sys/net/ipv4/ip_forward"), "1", record);
    }
    let path = Path::new("/proc/sys/net/ipv6/conf/all/forwarding");
    if !fs::read_to_string(path).is_ok_and(|current| current.trim() == "1") {
        keep_advertised_routes(record);
    }
    ensure(path, "1", record)
}

/// A node that forwards stops listening to routers, and would lose a default route that it has from them, unless the link
/// is told to go on.
fn keep_advertised_routes(record: Option<&Path>) {
    const BY_ADVERTISEMENT: u8 = 9;
    let names = || -> oarlock_netlink::Result<Vec<String>> {
        let mut connection = Connection::open(Protocol::Route)?;
        let routes = connection.routes()?;
        let links: std::collections::BTreeSet<u32> =
            routes.iter().filter(|route| route.protocol == BY_ADVERTISEMENT).map(|route| route.link).collect();
        let links = links.into_iter().map(|link| connection.link_by_index(link));
        links.filter_map(Result::transpose).map(|link| link.map(|link| link.name)).collect()
    };
    match names() {
        Ok(names) => {
            for name in names {
                let path = Path::new("/proc/sys/net/ipv6/conf").join(&name).join("accept_ra");
                match ensure(&path, "2", record) {
                    Ok(()) => info!(link = name, "router advertisements are still accepted while forwarding"),
                    Err(error) => warn!(error = &error as &dyn std::error::Error, "an advertised route may be lost"),
                }
            }
        }
        Err(error) => warn!(error = &error as &dyn std::error::Error, "advertised routes cannot be looked for"),
    }
}

fn bridge_setting(is_ipv4: bool) -> PathBuf {
    let name = if is_ipv4 { "bridge-nf-call-iptables" } else { "bridge-nf-call-ip6tables" };
    Path::new("/proc/sys/net/bridge").join(name)
}

/// Shows packets that only cross a bridge to nftables, so that an answer from one pod to another of the same node is
/// translated back. Says whether the kernel can.
pub fn enable_bridge_filtering(is_ipv4: bool, record: Option<&Path>) -> bool {
    let path = bridge_setting(is_ipv4);
    if !path.exists() {
        // Built in, or loaded already, on most hosts; where it is neither, this is the only way to get it.
        let loaded = Command::new("modprobe").arg("br_netfilter").output();
        if !loaded.is_ok_and(|output| output.status.success()) || !path.exists() {
            warn!("kernel has no br_netfilter: pods of one node see the node as source behind a Service");
            return false;
        }
        info!("kernel module br_netfilter loaded");
    }
    let seen = see_bridged(is_ipv4, record);
    if !seen {
        warn!(setting = %path.display(), "bridged packets stay out of sight: it cannot be set");
    }
    seen
}

/// As [`enable_bridge_filtering`], for a kernel as it is: others may have switched it off, or loaded the module since.
pub fn see_bridged(is_ipv4: bool, record: Option<&Path>) -> bool {
    let path = bridge_setting(is_ipv4);
    if !path.exists() {
        return false;
    }
    match ensure(&path, "1", record) {
        Ok(()) => true,
        Err(error) => {
            debug!(error = &error as &dyn std::error::Error, "bridged packets stay out of sight");
            false
        }
    }
}

fn ensure(path: &Path, value: &str, record: Option<&Path>) -> Result<(), SysctlError> {
    let failed = |source| SysctlError { path: path.to_owned(), value: value.to_owned(), source };
    let current = fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    if current == value {
        return Ok(());
    }
    if let Some(record) = record {
        remember(record, path, &current, value).map_err(failed)?;
    }
    fs::write(path, value).map_err(failed)
}

/// What settings were and what they were set to, by path, as a record has them.
fn read_record(record: &Path) -> io::Result<BTreeMap<PathBuf, (String, String)>> {
    let text = match fs::read_to_string(record) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        other => other?,
    };
    let entry = |line: &str| {
        let mut parts = line.split('\t');
        Some((PathBuf::from(parts.next()?), (parts.next()?.to_owned(), parts.next()?.to_owned())))
    };
    Ok(text.lines().filter_map(entry).collect())
}

/// Adds a setting to the record, unless it is there from the first time that it was changed.
fn remember(record: &Path, path: &Path, before: &str, value: &str) -> io::Result<()> {
    if read_record(record)?.contains_key(path) {
        return Ok(());
    }
    if let Some(directory) = record.parent() {
        fs::create_dir_all(directory)?;
    }
    let mut file = fs::File::options().create(true).append(true).open(record)?;
    writeln!(file, "{}\t{before}\t{value}", path.display())?;
    file.sync_all()
}

/// Puts back what the record says, as far as nobody has changed it since, and forgets it.
pub fn restore(record: &Path) -> Result<(), SysctlError> {
    let failed = |path: &Path, value: &str| {
        let (path, value) = (path.to_owned(), value.to_owned());
        move |source| SysctlError { path, value, source }
    };
    for (path, (before, value)) in read_record(record).map_err(failed(record, ""))? {
        let is_ours = fs::read_to_string(&path).is_ok_and(|current| current.trim() == value);
        if is_ours && !before.is_empty() {
            fs::write(&path, &before).map_err(failed(&path, &before))?;
        }
    }
    match fs::remove_file(record) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(record, "")(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_put_back_unless_somebody_changed_them_since() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let record = path("state/sysctls");
        for (name, value) in [("forward", "0\n"), ("other", "0\n"), ("right", "1\n")] {
            fs::write(path(name), value).unwrap();
            ensure(&path(name), "1", Some(&record)).unwrap();
            ensure(&path(name), "1", Some(&record)).unwrap();
        }
        fs::write(path("other"), "2").unwrap();
        restore(&record).unwrap();
        let read = |name: &str| fs::read_to_string(path(name)).unwrap().trim().to_owned();
        assert_eq!(["forward", "other", "right"].map(read), ["0", "2", "1"]);
        assert!(!record.exists());
        restore(&record).unwrap();
    }
}
