//! `portmap`: ports of the host that lead to the container, by elements of nftables maps.
//!
//! The maps and rules are those of [`oarlock_cni_table::host_ports`].

mod config;

use std::net::IpAddr;
use std::path::Path;

use oarlock_cni::types::CniResult;
use oarlock_cni_table::host_ports::{self, HostPorts, Mapping};
use oarlock_cni_table::{Part, Place, TableError};
use oarlock_netlink::{Connection, Protocol};
use oarlock_nft::Kernel;

use crate::call::Call;
use crate::error::{Context, PluginError, Result};
use crate::plugin::Plugin;
use crate::table;
use config::Config;

pub const PLUGIN: Plugin = Plugin { name: "portmap", add, del, check, status, gc };

fn add(call: &Call) -> Result<CniResult> {
    let config = Config::read(call)?;
    let previous =
        call.prev_result()?.ok_or_else(|| PluginError::config("prevResult", "is required: portmap is chained"))?;
    let parts = parts(&config, &previous, true)?;
    match table::add(call, PLUGIN.name, &parts) {
        Err(PluginError::Table(TableError::Taken { set })) => return Err(taken(call, &parts, set)),
        other => other?,
    }
    forget_flows(&config.mappings)?;
    Ok(previous)
}

/// What the attachment has in the nftables table: for each family with an address and mappings the ways to that address. A
/// result without any address of a family has nothing to lead that family's mappings to.
fn parts(config: &Config, previous: &CniResult, with_bridge: bool) -> Result<Vec<Part>> {
    let addresses = previous.container_ips();
    let mut parts = Vec::new();
    for is_ipv4 in [true, false] {
        let Some(address) = addresses.iter().copied().find(|address| address.is_ipv4() == is_ipv4) else { continue };
        let mappings: Vec<Mapping> =
            config.mappings.iter().filter(|mapping| mapping.is_for(is_ipv4)).cloned().collect();
        if !mappings.is_empty() {
            let bridge = if with_bridge { unseen_bridge(previous, is_ipv4)? } else { None };
            parts.push(Part::HostPorts(HostPorts { address, mappings, snat: config.snat, bridge }));
        }
    }
    Ok(parts)
}

/// The error for a host port that somebody has.
fn taken(call: &Call, parts: &[Part], set: &'static str) -> PluginError {
    let find = || -> Result<Option<PluginError>> {
        let mut kernel = table::open()?;
        for part in parts {
            let Part::HostPorts(ports) = part else { continue };
            for mapping in &ports.mappings {
                let (set, key) = mapping.place();
                let found = kernel.element(&part.table(), set, &key);
                let found = found.map_err(|source| PluginError::Nft { what: "cannot read port mappings", source })?;
                if found.is_some_and(|found| found.comment.as_deref() != Some(call.owner().as_str())) {
                    let protocol = mapping.protocol.to_string();
                    return Ok(Some(PluginError::PortTaken { protocol, port: mapping.host_port }));
                }
            }
        }
        Ok(None)
    };
    find().ok().flatten().unwrap_or(PluginError::Table(TableError::Taken { set }))
}

/// The bridge of the container's network, where packets that only cross it are out of nftables' sight: there is no
/// `br_netfilter`, or it is switched off.
fn unseen_bridge(previous: &CniResult, is_ipv4: bool) -> Result<Option<String>> {
    let name = if is_ipv4 { "bridge-nf-call-iptables" } else { "bridge-nf-call-ip6tables" };
    let setting = std::fs::read_to_string(Path::new("/proc/sys/net/bridge").join(name));
    if setting.is_ok_and(|value| value.trim() == "1") {
        return Ok(None);
    }
    let mut connection = Connection::open(Protocol::Route).context(|| "cannot look at links".into())?;
    for interface in previous.interfaces.iter().filter(|one| one.sandbox.as_deref().is_none_or(str::is_empty)) {
        let link = connection.link(&interface.name).context(|| format!("look at link {}", interface.name))?;
        if link.is_some_and(|link| link.kind.as_deref() == Some("bridge")) {
            return Ok(Some(interface.name.clone()));
        }
    }
    Ok(None)
}

/// Flows to these ports that began before the mapping would go on without it.
fn forget_flows(mappings: &[Mapping]) -> Result<()> {
    let ports: Vec<u16> = mappings
        .iter()
        .filter(|mapping| mapping.protocol == host_ports::Protocol::UDP)
        .map(|mapping| mapping.host_port)
        .collect();
    if ports.is_empty() {
        return Ok(());
    }
    let mut connection =
        Connection::open(Protocol::Netfilter).context(|| "cannot talk to connection tracking".into())?;
    let mut stale = Vec::new();
    for is_ipv4 in [true, false] {
        let listed = connection.each_flow(is_ipv4, &[libc::IPPROTO_UDP as u8], |flow| {
            if ports.contains(&flow.original.destination.port()) {
                stale.push(flow);
            }
        });
        listed.context(|| "list UDP flows".into())?;
    }
    connection.delete_flows(&stale).context(|| "forget UDP flows".into())
}

fn del(call: &Call) -> Result<()> {
    let config = Config::read(call)?;
    let addresses = call.prev_result().ok().flatten().map(|previous| previous.container_ips()).unwrap_or_default();
    let places = places(&config.mappings, &addresses);
    // A runtime that does not repeat what it asked of ADD leaves no other way than to look at everything, without a record.
    let is_known = !config.mappings.is_empty() && !addresses.is_empty();
    let removed = table::remove(call, PLUGIN.name, &host_ports::SETS, is_known.then_some(places.as_slice()));
    removed.and(forget_flows(&config.mappings))
}

/// Where the elements of these mappings to these addresses are.
fn places(mappings: &[Mapping], addresses: &[IpAddr]) -> Vec<Place> {
    let mut places = Vec::new();
    for is_ipv4 in [true, false] {
        let ports = mappings.iter().filter(|mapping| mapping.is_for(is_ipv4)).map(Mapping::place);
        let own = addresses.iter().filter(|address| address.is_ipv4() == is_ipv4);
        let all = ports.chain(own.map(|address| host_ports::hairpin_place(*address)));
        places.extend(all.map(|(set, key)| Place { table: oarlock_cni_table::table(is_ipv4), set, key }));
    }
    places
}

fn check(call: &Call) -> Result<()> {
    let config = Config::read(call)?;
    let previous = call.prev_result()?.ok_or_else(|| PluginError::config("prevResult", "is required for CHECK"))?;
    let parts = parts(&config, &previous, false)?;
    if parts.is_empty() {
        return Ok(());
    }
    table::check(call, &parts, |entry| {
        let is_at = |mapping: &&Mapping| mapping.place() == (entry.set, entry.element.key);
        match config.mappings.iter().find(is_at) {
            Some(mapping) => format!("host port {}/{} is not mapped", mapping.protocol, mapping.host_port),
            None => format!("an element of {} is missing", entry.set),
        }
    })
}

fn status(call: &Call) -> Result<()> {
    Config::read(call)?;
    table::open().map(drop)
}

fn gc(call: &Call) -> Result<()> {
    Config::read(call)?;
    table::keep_only(call, PLUGIN.name, &host_ports::SETS)
}
