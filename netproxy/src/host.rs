//! What the node's kernel has to allow: forwarding, and bridged packets in sight of nftables.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use tracing::{info, warn};

/// A sysctl that could not be set.
#[derive(Debug, thiserror::Error)]
#[error("cannot set {} to {value}", path.display())]
pub struct SysctlError {
    path: PathBuf,
    value: &'static str,
    source: io::Error,
}

/// Lets the node forward.
pub fn enable_forwarding(is_ipv4: bool) -> Result<(), SysctlError> {
    if is_ipv4 {
        return ensure(Path::new("/proc/sys/net/ipv4/ip_forward"), "1");
    }
    let path = Path::new("/proc/sys/net/ipv6/conf/all/forwarding");
    if !fs::read_to_string(path).is_ok_and(|current| current.trim() == "1") {
        keep_advertised_routes();
    }
    ensure(path, "1")
}

/// A node that forwards stops listening to routers, and would lose a default route that it has from them, unless the link
/// is told to go on.
fn keep_advertised_routes() {
    const BY_ADVERTISEMENT: u8 = 9;
    let names = || -> oarlock_netlink::Result<Vec<String>> {
        let mut connection = oarlock_netlink::Connection::open(oarlock_netlink::Protocol::Route)?;
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
                match ensure(&path, "2") {
                    Ok(()) => info!(link = name, "router advertisements are still accepted while forwarding"),
                    Err(error) => warn!(error = &error as &dyn std::error::Error, "an advertised route may be lost"),
                }
            }
        }
        Err(error) => warn!(error = &error as &dyn std::error::Error, "advertised routes cannot be looked for"),
    }
}

/// Shows packets that only cross a bridge to nftables, so that an answer from one pod to another of the same node is
/// translated back. Says whether the kernel can.
pub fn enable_bridge_filtering(is_ipv4: bool) -> bool {
    let name = if is_ipv4 { "bridge-nf-call-iptables" } else { "bridge-nf-call-ip6tables" };
    let path = Path::new("/proc/sys/net/bridge").join(name);
    if !path.exists() {
        // Built in, or loaded already, on most hosts; where it is neither, this is the only way to get it.
        let loaded = Command::new("modprobe").arg("br_netfilter").output();
        if !loaded.is_ok_and(|output| output.status.success()) || !path.exists() {
            warn!("kernel has no br_netfilter: pods of one node see the node as source behind a Service");
            return false;
        }
        info!("kernel module br_netfilter loaded");
    }
    match ensure(&path, "1") {
        Ok(()) => true,
        Err(error) => {
            warn!(error = &error as &dyn std::error::Error, "bridged packets stay out of sight");
            false
        }
    }
}

fn ensure(path: &Path, value: &'static str) -> Result<(), SysctlError> {
    if fs::read_to_string(path).is_ok_and(|current| current.trim() == value) {
        return Ok(());
    }
    fs::write(path, value).map_err(|source| SysctlError { path: path.to_owned(), value, source })
}
