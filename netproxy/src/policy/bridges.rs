//! Whether packets between pods of this node, which only cross a bridge, come by the rules at all.
//!
//! They do where the kernel has `br_netfilter` and is told to show them, for all bridges of the namespace or for the one. The
//! first is a setting that others change. So each bridge of pods is told on its own as well, which then holds whatever
//! becomes of the other. Without `br_netfilter` nothing helps: then it is said, and not only in the log.

use std::path::Path;

use ipnet::IpNet;
use oarlock_netlink::{Connection, Protocol};
use tracing::{error, info, warn};

/// What was found out about the bridges.
#[derive(Debug, Default)]
pub struct Bridges {
    /// Bridges whose packets no rule sees, as far as is known.
    unseen: Option<Vec<String>>,
}

impl Bridges {
    /// Looks at the bridges of these networks and tells each to show its packets. Those that do not, when they are others
    /// than before.
    pub fn look(&mut self, cidrs: &[IpNet]) -> Option<Vec<String>> {
        let unseen = match find_unseen(cidrs) {
            Ok(unseen) => unseen,
            Err(error) => {
                warn!(error = &error as &dyn std::error::Error, "bridges of pods cannot be looked at");
                return None;
            }
        };
        let before = self.unseen.replace(unseen.clone());
        if before.as_ref() == Some(&unseen) || (before.is_none() && unseen.is_empty()) {
            return None;
        }
        if unseen.is_empty() {
            info!("network policies hold between pods of this node again");
        } else {
            error!(
                bridges = unseen.join(", "),
                "network policies do not hold between pods of this node: the kernel has no br_netfilter"
            );
        }
        Some(unseen)
    }

    /// There is nothing to enforce, and nothing that is not.
    pub fn forget(&mut self) -> Option<Vec<String>> {
        self.unseen.take().filter(|unseen| !unseen.is_empty()).map(|_| Vec::new())
    }

    /// Whether nobody has looked yet.
    pub fn is_unknown(&self) -> bool {
        self.unseen.is_none()
    }
}

fn find_unseen(cidrs: &[IpNet]) -> oarlock_netlink::Result<Vec<String>> {
    let mut connection = Connection::open(Protocol::Route)?;
    let addresses = connection.addresses()?;
    let mut unseen = Vec::new();
    for bridge in connection.bridges()? {
        let own = addresses.iter().filter(|one| one.link == bridge.index).map(|one| one.net.addr());
        let mut families: Vec<bool> =
            own.filter(|own| cidrs.iter().any(|net| net.contains(own))).map(|own| own.is_ipv4()).collect();
        families.sort_unstable();
        families.dedup();
        for is_ipv4 in families {
            if !shows(&mut connection, &bridge, is_ipv4) && !unseen.contains(&bridge.name) {
                unseen.push(bridge.name.clone());
            }
        }
    }
    Ok(unseen)
}

/// Whether a bridge shows packets of a family to their rules, which it is told to.
fn shows(connection: &mut Connection, bridge: &oarlock_netlink::Bridge, is_ipv4: bool) -> bool {
    let name = if is_ipv4 { "bridge-nf-call-iptables" } else { "bridge-nf-call-ip6tables" };
    // Bridges have a setting of their own also where the module is missing that would go by it.
    let Ok(setting) = std::fs::read_to_string(Path::new("/proc/sys/net/bridge").join(name)) else { return false };
    if if is_ipv4 { bridge.shows_ipv4 } else { bridge.shows_ipv6 } {
        return true;
    }
    match connection.show_bridged(bridge.index, is_ipv4) {
        Ok(()) => true,
        Err(error) => {
            let bridge = bridge.name.as_str();
            warn!(error = &error as &dyn std::error::Error, bridge, "bridge cannot be told to show its packets");
            setting.trim() == "1"
        }
    }
}
