//! The host's side: the bridge, its addresses, its ports.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use ipnet::IpNet;
use oarlock_cni::types::{CniResult, IpConfig};
use oarlock_cni_table::stable_hash;
use oarlock_netlink::{Connection, Link, LinkChange, Mac, PortVlan, VethPair};

use super::config::Config;
use crate::call::Call;
use crate::error::{Context, PluginError, Result};
use crate::sysctl;

const VETH_PREFIX: &str = "veth";
const VETH_NAME_BYTES: usize = 15;
/// The VLAN that bridges put every new port into.
const DEFAULT_VLAN: u16 = 1;

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
    // With an address of its own the bridge does not take over that of its lowest port, and keeps it when ports go. Without
    // an MTU of its own it has the smallest of its ports'.
    match connection.create_bridge(&config.bridge, Some(random_mac()), 0, !config.vlans.is_empty()) {
        Err(error) if !error.is_exists() => Err(error).context(|| format!("create bridge {}", config.bridge))?,
        _ => {}
    }
    let bridge = existing_bridge(connection, config)?;
    let bridge = bridge.ok_or_else(|| PluginError::Drift(format!("bridge {} was deleted meanwhile", config.bridge)))?;
    set_up(connection, config, bridge)
}

/// With the container's port in it: a bridge that somebody gave an MTU keeps that whatever its ports have, and would drop
/// what is too large for the smallest, or cut what is not.
pub fn adjust_mtu(connection: &mut Connection, config: &Config, bridge: Link) -> Result<Link> {
    if config.mtu == 0 {
        return Ok(bridge);
    }
    let failed = || format!("set the MTU of {}", bridge.name);
    let now = connection.link_by_index(bridge.index).context(failed)?.unwrap_or(bridge.clone());
    let wanted = if now.mtu < config.mtu {
        let ports = connection.links().context(failed)?.into_iter().filter(|link| link.master == Some(bridge.index));
        ports.map(|port| port.mtu).min().unwrap_or(config.mtu)
    } else {
        config.mtu
    };
    if wanted != now.mtu {
        let change = LinkChange { mtu: Some(wanted), ..LinkChange::default() };
        connection.change_link(bridge.index, &change).context(failed)?;
    }
    Ok(Link { mtu: wanted, ..bridge })
}

/// No routers are listened to, and the link-local address is usable at once: until it is, the host asks for no neighbour
/// on behalf of packets that it forwards.
fn prepare_ipv6(link: &str) -> Result<()> {
    ["accept_ra", "accept_dad"].iter().try_for_each(|name| sysctl::ensure(&format!("net/ipv6/conf/{link}/{name}"), "0"))
}

/// Also of a bridge that was there: somebody else may have made it, or a call that was killed before it came to this.
fn set_up(connection: &mut Connection, config: &Config, bridge: Link) -> Result<Link> {
    prepare_ipv6(&bridge.name)?;
    if !config.vlans.is_empty() && !bridge.vlan_filtering {
        connection.enable_vlan_filtering(bridge.index).context(|| format!("let {} look at VLAN tags", bridge.name))?;
    }
    let promiscuous = config.promisc_mode && !bridge.promiscuous;
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

/// Makes the veth pair with the container's end in `netns`. Returns the host's end.
pub fn create_pair(connection: &mut Connection, pair: &Pair<'_>, netns: BorrowedFd<'_>) -> Result<Link> {
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
    let made = match connection.create_veth(&whole) {
        // The container does not have its end, so this is what an earlier namespace of the container left.
        Err(error) if error.is_exists() => {
            connection.delete_link_by_name(pair.veth).context(failed)?;
            connection.create_veth(&whole)
        }
        other => other,
    };
    match made.context(failed)? {
        Some(link) => Ok(link),
        None => connection.require_link(pair.veth).context(|| format!("find {}", pair.veth)),
    }
}

/// Puts a port of the bridge into these VLANs.
fn join_vlans(connection: &mut Connection, config: &Config, port: &Link, vlans: &[PortVlan]) -> Result<()> {
    let failed = || format!("put {} into its VLANs", port.name);
    if !vlans.is_empty() && !config.preserve_default_vlan {
        connection.remove_port_vlan(port.index, DEFAULT_VLAN).context(failed)?;
    }
    vlans.iter().try_for_each(|vlan| connection.add_port_vlan(port.index, vlan).context(failed))
}

/// Puts the container's port into the VLANs of the configuration.
pub fn join_own_vlans(connection: &mut Connection, config: &Config, port: &Link) -> Result<()> {
    join_vlans(connection, config, port, &config.vlans)
}

/// The host's own way into a VLAN of the bridge, which has the gateway's addresses there: a pair of which one end is a port
/// of the bridge, and the other is called `<bridge>.<VLAN>`.
pub fn ensure_vlan_link(connection: &mut Connection, config: &Config, bridge: &Link, vlan: u16) -> Result<Link> {
    let name = format!("{}.{vlan}", bridge.name);
    let failed = || format!("set up {name}");
    if !oarlock_cni::names::is_valid_interface(&name) {
        return Err(PluginError::config("vlan", format!("{name:?} is too long for an interface's name")));
    }
    if let Some(link) = connection.link(&name).context(failed)?.filter(|link| link.up) {
        prepare_ipv6(&name)?;
        return Ok(link);
    }
    let path = Path::new("/proc/self/ns/net");
    let own =
        File::open(path).map_err(|source| PluginError::File { operation: "open", path: path.to_owned(), source })?;
    let port = format!("{VETH_PREFIX}{:011x}", stable_hash(&["vlan", &name]) & 0xfff_ffff_ffff);
    let pair = VethPair {
        name: &port,
        master: Some(bridge.index),
        mac: None,
        peer_name: &name,
        peer_mac: Some(random_mac()),
        peer_netns: own.as_fd(),
        mtu: if config.mtu == 0 { bridge.mtu } else { config.mtu },
    };
    match connection.create_veth(&pair) {
        // Another call was quicker.
        Err(error) if !error.is_exists() => Err(error).context(failed)?,
        _ => {}
    }
    let port = connection.require_link(&port).context(failed)?;
    join_vlans(connection, config, &port, &[PortVlan { id: vlan, is_access: true }])?;
    let link = connection.require_link(&name).context(failed)?;
    prepare_ipv6(&name)?;
    connection.set_up(link.index).context(failed)?;
    Ok(link)
}

/// Gives the bridge its gateway addresses and lets the host forward.
pub fn ensure_gateways(connection: &mut Connection, config: &Config, bridge: &Link, ips: &[IpConfig]) -> Result<()> {
    let failed = || format!("set up the addresses of {}", bridge.name);
    let existing = connection.addresses().context(failed)?;
    let own = existing.into_iter().filter(|one| one.link == bridge.index).map(|one| one.net);
    let mut existing: Vec<IpNet> = own.collect();
    let gateway = |ip: &IpConfig| IpNet::new(ip.gateway?, ip.address.prefix_len()).ok();
    let all: Vec<IpNet> = ips.iter().filter_map(gateway).collect();
    for wanted in &all {
        if existing.contains(wanted) {
            continue;
        }
        let (rivals, others): (Vec<IpNet>, _) =
            existing.into_iter().partition(|net| !all.contains(net) && is_rival(net, wanted));
        existing = others;
        for rival in rivals {
            if !config.force_address {
                return Err(PluginError::OtherAddress { name: bridge.name.clone(), existing: rival, wanted: *wanted });
            }
            connection.delete_address(bridge.index, rival).context(failed)?;
        }
        connection.ensure_address(bridge.index, *wanted).context(failed)?;
    }
    for ip in ips {
        let forwarding =
            if ip.address.addr().is_ipv4() { "net/ipv4/ip_forward" } else { "net/ipv6/conf/all/forwarding" };
        sysctl::ensure(forwarding, "1")?;
    }
    Ok(())
}

/// Whether an address of the bridge is in the way of another. One more of IPv4 means another network's bridge; of IPv6 a
/// bridge may have one of each network, and its link-local one.
fn is_rival(existing: &IpNet, wanted: &IpNet) -> bool {
    if matches!(existing, IpNet::V6(net) if net.addr().is_unicast_link_local()) {
        return false;
    }
    let overlap = existing.contains(&wanted.addr()) || wanted.contains(&existing.addr());
    existing.addr().is_ipv4() == wanted.addr().is_ipv4() && (wanted.addr().is_ipv4() || overlap)
}

/// CHECK: the bridge and the port are there, belong together, and are what the configuration says; the bridge has the
/// gateway's addresses.
pub fn check(connection: &mut Connection, config: &Config, veth: &str, previous: &CniResult) -> Result<()> {
    let drift = |text: String| Err(PluginError::Drift(text));
    let Some(bridge) = existing_bridge(connection, config)? else {
        return drift(format!("bridge {} is missing", config.bridge));
    };
    if !bridge.up {
        return drift(format!("bridge {} is down", bridge.name));
    }
    if config.promisc_mode && !bridge.promiscuous {
        return drift(format!("bridge {} is not in promiscuous mode", bridge.name));
    }
    if config.is_gateway {
        check_gateways(connection, config, &bridge, &previous.ips)?;
    }
    // What plugins behind this one made of the MTU is in the result, as far as its version has that.
    let recorded = previous.interfaces.iter().find(|one| one.name == veth).and_then(|one| one.mtu);
    let mtu = recorded.or(Some(config.mtu).filter(|mtu| *mtu != 0));
    match connection.link(veth).context(|| format!("look up {veth}"))? {
        None => drift(format!("the host's end {veth} is missing")),
        Some(port) if port.master != Some(bridge.index) => drift(format!("{veth} is not a port of {}", bridge.name)),
        Some(port) if port.hairpin != config.hairpin_mode => {
            drift(format!("hairpin mode of {veth} is {}", port.hairpin))
        }
        Some(port) if port.isolated != config.port_isolation => {
            drift(format!("isolation of {veth} is {}", port.isolated))
        }
        Some(port) if mtu.is_some_and(|mtu| mtu != port.mtu) => drift(format!("the MTU of {veth} is {}", port.mtu)),
        Some(port) if !has_vlans(connection, config, port.index)? => {
            drift(format!("{veth} is not in the VLANs of the network"))
        }
        Some(port) if !port.up => drift(format!("{veth} is down")),
        Some(_) => Ok(()),
    }
}

fn check_gateways(connection: &mut Connection, config: &Config, bridge: &Link, ips: &[IpConfig]) -> Result<()> {
    let drift = |text: String| Err(PluginError::Drift(text));
    let name = config.access_vlan().map_or_else(|| bridge.name.clone(), |vlan| format!("{}.{vlan}", bridge.name));
    let link = if name == bridge.name { Some(bridge.clone()) } else { connection.link(&name).ok().flatten() };
    let Some(link) = link else { return drift(format!("{name} is missing")) };
    let existing = connection.addresses().context(|| format!("list the addresses of {name}"))?;
    for ip in ips {
        let Some(wanted) = ip.gateway.and_then(|gateway| IpNet::new(gateway, ip.address.prefix_len()).ok()) else {
            continue;
        };
        if !existing.iter().any(|one| one.link == link.index && one.net == wanted) {
            return drift(format!("{name} does not have address {wanted}"));
        }
    }
    Ok(())
}

fn has_vlans(connection: &mut Connection, config: &Config, port: u32) -> Result<bool> {
    if config.vlans.is_empty() {
        return Ok(true);
    }
    let found = connection.port_vlans(port).context(|| "list the VLANs of the port".into())?;
    Ok(config.vlans.iter().all(|vlan| found.contains(vlan)))
}

/// GC: deletes the ports of the bridge that this plugin made and that belong to no valid attachment.
pub fn remove_stray_ports(connection: &mut Connection, config: &Config, valid: &[String]) -> Result<()> {
    let Some(bridge) = existing_bridge(connection, config)? else { return Ok(()) };
    let links = connection.links().context(|| "list links".into())?;
    // Ports whose other ends are the host's own ways into VLANs.
    let prefix = format!("{}.", bridge.name);
    let host_ends: Vec<u32> =
        links.iter().filter(|link| link.name.starts_with(&prefix)).filter_map(|link| link.peer).collect();
    for link in links {
        let ours = link.name.len() == VETH_NAME_BYTES && link.name.starts_with(VETH_PREFIX);
        if link.master == Some(bridge.index) && ours && !host_ends.contains(&link.index) && !valid.contains(&link.name)
        {
            connection.delete_link(link.index).context(|| format!("delete {}", link.name))?;
        }
    }
    Ok(())
}
