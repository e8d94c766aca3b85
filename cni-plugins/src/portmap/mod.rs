//! `portmap`: ports of the host that lead to the container, by elements of nftables maps.
//!
//! The maps and rules are those of [`oarlock_cni_table::host_ports`].

mod config;

use std::collections::HashSet;
use std::net::IpAddr;
use std::path::Path;

use oarlock_cni::types::CniResult;
use oarlock_cni_table::host_ports::{self, HostPorts, Mapping};
use oarlock_cni_table::{Part, Place, TableError};
use oarlock_netlink::conntrack::Flow;
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
    forget_flows(&config.mappings, &previous.container_ips())?;
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

/// Flows to these ports of this host that began before the mapping, and those that it led to the container, would go on as they
/// are: their tracking lives as long as they send. TCP is not among them, as a connection ends with one of its ends.
fn forget_flows(mappings: &[Mapping], addresses: &[IpAddr]) -> Result<()> {
    let tracked: Vec<&Mapping> =
        mappings.iter().filter(|mapping| mapping.protocol != host_ports::Protocol::TCP).collect();
    if tracked.is_empty() {
        return Ok(());
    }
    let mut links = Connection::open(Protocol::Route).context(|| "cannot talk to the kernel about addresses".into())?;
    let own: HashSet<IpAddr> =
        links.addresses().context(|| "list addresses".into())?.into_iter().map(|one| one.net.addr()).collect();
    let mut connection =
        Connection::open(Protocol::Netfilter).context(|| "cannot talk to connection tracking".into())?;
    let protocols: Vec<u8> = tracked.iter().map(|mapping| mapping.protocol.number()).collect();
    let mut stale = Vec::new();
    for is_ipv4 in [true, false] {
        let listed = connection.each_flow(is_ipv4, &protocols, |flow| {
            if tracked.iter().any(|mapping| is_of(mapping, &flow, &own, addresses)) {
                stale.push(flow);
            }
        });
        listed.context(|| "list flows".into())?;
    }
    connection.delete_flows(&stale).context(|| "forget flows".into())
}

/// Whether a flow goes to the mapping's port of the host, or went there when the host had another address. Flows of the same
/// port to other hosts and to Services do not.
fn is_of(mapping: &Mapping, flow: &Flow, own: &HashSet<IpAddr>, containers: &[IpAddr]) -> bool {
    let (to, answers) = (flow.original.destination, flow.reply.source);
    let is_led = containers.contains(&answers.ip()) && answers.port() == mapping.container_port && answers != to;
    flow.original.protocol == mapping.protocol.number()
        && to.port() == mapping.host_port
        && mapping.host_ip.is_none_or(|address| address == to.ip())
        && (own.contains(&to.ip()) || is_led)
}

fn del(call: &Call) -> Result<()> {
    let config = Config::read(call)?;
    let addresses = call.prev_result().ok().flatten().map(|previous| previous.container_ips()).unwrap_or_default();
    let places = places(&config.mappings, &addresses);
    // A runtime that does not repeat what it asked of ADD leaves no other way than to look at everything, without a record.
    let is_known = !config.mappings.is_empty() && !addresses.is_empty();
    let removed = table::remove(call, PLUGIN.name, &host_ports::SETS, is_known.then_some(places.as_slice()));
    removed.and(forget_flows(&config.mappings, &addresses))
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
    table::status()
}

fn gc(call: &Call) -> Result<()> {
    Config::read(call)?;
    table::keep_only(call, PLUGIN.name, &host_ports::SETS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use oarlock_netlink::conntrack::Tuple;

    /// A flow from a client to `to`, answered by `by`.
    fn flow(protocol: host_ports::Protocol, to: &str, by: &str) -> Flow {
        let tuple = |source: &str, destination: &str| Tuple {
            protocol: protocol.number(),
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
        };
        Flow { original: tuple("192.0.2.9:4000", to), reply: tuple(by, "192.0.2.9:4000") }
    }

    #[test]
    fn only_flows_to_the_port_of_this_host_are_forgotten() {
        let own = HashSet::from(["192.0.2.1".parse().unwrap()]);
        let pods = ["10.42.0.5".parse().unwrap()];
        for protocol in [host_ports::Protocol::UDP, host_ports::Protocol::SCTP] {
            let mapping = Mapping { host_port: 53, container_port: 5353, protocol, host_ip: None };
            let is_of = |to: &str, by: &str| is_of(&mapping, &flow(protocol, to, by), &own, &pods);
            assert!(is_of("192.0.2.1:53", "192.0.2.1:53"), "a server of the host");
            assert!(is_of("192.0.2.1:53", "10.42.0.5:5353"), "led to the container");
            assert!(is_of("192.0.2.7:53", "10.42.0.5:5353"), "at an address that the host had");
            assert!(!is_of("198.51.100.1:53", "198.51.100.1:53"), "another host");
            assert!(!is_of("10.43.0.10:53", "10.42.0.6:53"), "a Service");
            assert!(!is_of("192.0.2.1:54", "192.0.2.1:54"), "another port");
        }
        let mapping = Mapping {
            host_port: 53,
            container_port: 5353,
            protocol: host_ports::Protocol::UDP,
            host_ip: Some("192.0.2.2".parse().unwrap()),
        };
        let other = flow(host_ports::Protocol::UDP, "192.0.2.1:53", "192.0.2.1:53");
        assert!(!super::is_of(&mapping, &other, &own, &pods), "another address of the host");
        let sctp = flow(host_ports::Protocol::SCTP, "192.0.2.2:53", "192.0.2.2:53");
        assert!(!super::is_of(&mapping, &sctp, &own, &pods), "another protocol");
    }
}
