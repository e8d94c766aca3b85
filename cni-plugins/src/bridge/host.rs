//! The host's side: the bridge, its addresses, its ports.

use std::io::Read;
use std::os::fd::BorrowedFd;

use ipnet::IpNet;
use oarlock_cni::types::IpConfig;
use oarlock_netlink::{Connection, Link, LinkChange, Mac, VethPair};

use super::config::Config;
use crate::call::Call;
use crate::error::{Context, PluginError, Result};
use crate::sysctl;

const VETH_PREFIX: &str = "veth";
const VETH_NAME_BYTES: usize = 15;

/// A random address of the locally administered, unicast kind.
pub fn random_mac() -> Mac {
    let mut bytes = [0; 6];
    // Without a source of randomness the address is only less random.
    let _ = std::fs::File::open("/dev/urandom").and_then(|mut source| source.read_exact(&mut bytes));
    bytes[0] = bytes[0] & 0xfc | 0x02;
    Mac(bytes)
}

/// The bridge if it exists.
pub fn existing_bridge(connection: &mut Connection, config: &Config) -> Result<Option<Link>> {
    let link = connection.link(&config.bridge).context(|| format!("look up {}", config.bridge))?;
    match link {
        Some(link) if link.kind.as_deref() != Some("bridge") => Err(PluginError::NotABridge { name: link.name }),
        other => Ok(other),
    }
}

/// The bridge, made if need be, up. Of several calls at once, all find the same one.
pub fn ensure_bridge(connection: &mut Connection, config: &Config) -> Result<Link> {
    if let Some(bridge) = existing_bridge(connection, config)? {
        return set_up(connection, config, bridge);
    }
    // With an address of its own the bridge does not take over that of its lowest port, and keeps it when ports go.
    match connection.create_bridge(&config.bridge, Some(random_mac()), config.mtu, false) {
        Err(error) if !error.is_exists() => Err(error).context(|| format!("create bridge {}", config.bridge))?,
        _ => {}
    }
    sysctl::ensure(&format!("net/ipv6/conf/{}/accept_ra", config.bridge), "0")?;
    let bridge = existing_bridge(connection, config)?;
    let bridge = bridge.ok_or_else(|| PluginError::Drift(format!("bridge {} was deleted meanwhile", config.bridge)))?;
    set_up(connection, config, bridge)
}

fn set_up(connection: &mut Connection, config: &Config, bridge: Link) -> Result<Link> {
    let promiscuous = config.promisc_mode && bridge.promiscuity == 0;
    if !bridge.up || promiscuous {
        let change = LinkChange { up: Some(true), promiscuous: promiscuous.then_some(true), ..LinkChange::default() };
        connection.change_link(bridge.index, &change).context(|| format!("bring {} up", bridge.name))?;
    }
    Ok(Link { up: true, ..bridge })
}

/// What the pair is made of.
pub struct Pair<'a> {
    pub veth: &'a str,
    pub bridge: u32,
    pub call: &'a Call,
    pub mac: Mac,
    pub mtu: u32,
}

/// Makes the veth pair with the container's end in `netns`.
pub fn create_pair(connection: &mut Connection, pair: &Pair<'_>, netns: BorrowedFd<'_>) -> Result<()> {
    let whole = VethPair {
        name: pair.veth,
        master: Some(pair.bridge),
        mac: None,
        peer_name: &pair.call.ifname,
        peer_mac: Some(pair.mac),
        peer_netns: netns,
        mtu: pair.mtu,
    };
    let failed = || format!("create {} and {} of the container", pair.veth, pair.call.ifname);
    match connection.create_veth(&whole) {
        // The container does not have its end, so this is what an earlier namespace of the container left.
        Err(error) if error.is_exists() => {
            connection.delete_link_by_name(pair.veth).context(failed)?;
            connection.create_veth(&whole).context(failed)
        }
        other => other.context(failed),
    }
}

/// Gives the bridge its gateway addresses and lets the host forward.
pub fn ensure_gateways(connection: &mut Connection, config: &Config, bridge: &Link, ips: &[IpConfig]) -> Result<()> {
    let failed = || format!("set up the addresses of {}", bridge.name);
    let existing = connection.addresses().context(failed)?;
    let existing: Vec<IpNet> = existing.into_iter().filter(|one| one.link == bridge.index).map(|one| one.net).collect();
    for ip in ips {
        let Some(wanted) = ip.gateway.and_then(|gateway| IpNet::new(gateway, ip.address.prefix_len()).ok()) else {
            continue;
        };
        if existing.contains(&wanted) {
            continue;
        }
        // Another address of the same kind means another network's bridge, except that IPv6 links have link-local ones.
        let rivals =
            existing.iter().filter(|net| net.addr().is_ipv4() == wanted.addr().is_ipv4() && !is_link_local(net));
        for rival in rivals {
            if !config.force_address && (wanted.addr().is_ipv4() || rival.contains(&wanted.network())) {
                return Err(PluginError::OtherAddress { name: bridge.name.clone(), existing: *rival, wanted });
            }
            if config.force_address {
                connection.delete_address(bridge.index, *rival).context(failed)?;
            }
        }
        connection.ensure_address(bridge.index, wanted).context(failed)?;
    }
    for ip in ips {
        let forwarding =
            if ip.address.addr().is_ipv4() { "net/ipv4/ip_forward" } else { "net/ipv6/conf/all/forwarding" };
        sysctl::ensure(forwarding, "1")?;
    }
    Ok(())
}

fn is_link_local(net: &IpNet) -> bool {
    matches!(net, IpNet::V6(net) if net.addr().is_unicast_link_local())
}

/// CHECK: the bridge and the port are there and belong together.
pub fn check(connection: &mut Connection, config: &Config, veth: &str) -> Result<()> {
    let drift = |text: String| Err(PluginError::Drift(text));
    let Some(bridge) = existing_bridge(connection, config)? else {
        return drift(format!("bridge {} is missing", config.bridge));
    };
    if !bridge.up {
        return drift(format!("bridge {} is down", bridge.name));
    }
    match connection.link(veth).context(|| format!("look up {veth}"))? {
        None => drift(format!("the host's end {veth} is missing")),
        Some(port) if port.master != Some(bridge.index) => drift(format!("{veth} is not a port of {}", bridge.name)),
        Some(port) if port.hairpin != config.hairpin_mode => {
            drift(format!("hairpin mode of {veth} is {}", port.hairpin))
        }
        Some(port) if !port.up => drift(format!("{veth} is down")),
        Some(_) => Ok(()),
    }
}

/// GC: deletes the ports of the bridge that this plugin made and that belong to no valid attachment.
pub fn remove_stray_ports(connection: &mut Connection, config: &Config, valid: &[String]) -> Result<()> {
    let Some(bridge) = existing_bridge(connection, config)? else { return Ok(()) };
    for link in connection.links().context(|| "list links".into())? {
        let ours = link.name.len() == VETH_NAME_BYTES && link.name.starts_with(VETH_PREFIX);
        if link.master == Some(bridge.index) && ours && !valid.contains(&link.name) {
            connection.delete_link(link.index).context(|| format!("delete {}", link.name))?;
        }
    }
    Ok(())
}
