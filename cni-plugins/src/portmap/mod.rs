//! `portmap`: ports of the host that lead to the container, by elements of nftables maps.
//!
//! The table is that of [`crate::masquerade`], with two maps more: by port for mappings on every address of the host, and
//! by address and port for those with a `hostIP`. A connection from the container to itself through the host is
//! masqueraded. 127.0.0.0/8 is never a way in, because that would take `route_localnet`.

mod config;
mod rules;

use std::net::IpAddr;
use std::path::Path;

use oarlock_cni::types::CniResult;
use oarlock_netlink::{Connection, Protocol};
use oarlock_nft::{Kernel, Netlink, NftError, Transaction};

use crate::call::{Call, Owner};
use crate::error::{Context, PluginError, Result};
use crate::linger;
use crate::plugin::Plugin;
use config::{Config, Mapping};

pub const PLUGIN: Plugin = Plugin { name: "portmap", add, del, check, status, gc };

fn nft(what: &'static str) -> impl Fn(NftError) -> PluginError {
    move |source| PluginError::Nft { what, source }
}

fn add(call: &Call) -> Result<CniResult> {
    let config = Config::read(call)?;
    let previous =
        call.prev_result()?.ok_or_else(|| PluginError::config("prevResult", "is required: portmap is chained"))?;
    if config.mappings.is_empty() {
        return Ok(previous);
    }
    let addresses = previous.container_ips();
    let mut kernel = Netlink::open().map_err(nft("cannot map ports"))?;
    // A call that was killed may have left some of the same container's elements.
    remove_own(&mut kernel, call, &config.mappings, &addresses)?;
    for is_ipv4 in [true, false] {
        // A result without any address of a family has nothing to lead that family's mappings to.
        let Some(address) = addresses.iter().copied().find(|address| address.is_ipv4() == is_ipv4) else { continue };
        let mappings: Vec<&Mapping> = config.mappings.iter().filter(|mapping| mapping.is_for(is_ipv4)).collect();
        if mappings.is_empty() {
            continue;
        }
        let bridge = unseen_bridge(&previous, is_ipv4)?;
        let elements = rules::elements(call.owner().as_str(), &mappings, address, config.snat, bridge.as_deref());
        if let Err(error) = map(&mut kernel, &mappings, is_ipv4, &elements) {
            let _ = remove(&mut kernel, |owner| owner == call.owner().as_str());
            return Err(error);
        }
    }
    forget_udp(&config.mappings)?;
    Ok(previous)
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

fn map(kernel: &mut Netlink, mappings: &[&Mapping], is_ipv4: bool, elements: &Transaction) -> Result<()> {
    let failed = nft("cannot map ports");
    let outcome = match kernel.commit(elements) {
        Err(error) if error.is_not_found() => {
            let mut whole = rules::foundation(is_ipv4);
            whole.commands.extend(elements.commands.iter().cloned());
            kernel.commit(&whole)
        }
        other => other,
    };
    match outcome {
        Err(error) if error.is_exists() => Err(match rules::taken(kernel, mappings, is_ipv4).map_err(&failed)? {
            Some(mapping) => PluginError::PortTaken { protocol: mapping.protocol.to_string(), port: mapping.host_port },
            None => failed(error),
        }),
        other => other.map_err(failed),
    }
}

/// Flows to these ports that began before the mapping would go on without it.
fn forget_udp(mappings: &[Mapping]) -> Result<()> {
    let ports: Vec<u16> =
        mappings.iter().filter(|mapping| mapping.protocol.is_udp()).map(|mapping| mapping.host_port).collect();
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

/// Takes away the elements of which `is_stale` says so, given their owner.
fn remove(kernel: &mut Netlink, is_stale: impl Fn(&str) -> bool) -> Result<()> {
    let failed = nft("cannot remove port mappings");
    for is_ipv4 in [true, false] {
        let transaction = rules::removal(kernel, is_ipv4, &is_stale).map_err(&failed)?;
        match kernel.commit(&transaction) {
            Err(error) if error.is_not_found() => {}
            other => other.map_err(&failed)?,
        }
    }
    Ok(())
}

/// Takes away the container's own elements, at the ports and addresses that it is known to have.
fn remove_own(kernel: &mut Netlink, call: &Call, mappings: &[Mapping], addresses: &[IpAddr]) -> Result<()> {
    let failed = nft("cannot remove port mappings");
    let owner = call.owner();
    for is_ipv4 in [true, false] {
        let transaction = rules::own_removal(kernel, is_ipv4, owner.as_str(), mappings, addresses).map_err(&failed)?;
        match kernel.commit(&transaction) {
            Err(error) if error.is_not_found() => {}
            other => other.map_err(&failed)?,
        }
    }
    Ok(())
}

fn del(call: &Call) -> Result<()> {
    let config = Config::read(call)?;
    let owner = call.owner();
    let mut kernel = Netlink::open().map_err(nft("cannot remove port mappings"))?;
    let addresses = call.prev_result().ok().flatten().map(|previous| previous.container_ips()).unwrap_or_default();
    // A runtime that does not repeat what it asked of ADD leaves no other way than to look at everything.
    let removed = if config.mappings.is_empty() || addresses.is_empty() {
        remove(&mut kernel, |found| found == owner.as_str())
    } else {
        remove_own(&mut kernel, call, &config.mappings, &addresses)
    };
    linger::keep_open(kernel);
    removed.and(forget_udp(&config.mappings))
}

fn check(call: &Call) -> Result<()> {
    let config = Config::read(call)?;
    let previous = call.prev_result()?.ok_or_else(|| PluginError::config("prevResult", "is required for CHECK"))?;
    let mut kernel = Netlink::open().map_err(nft("cannot read port mappings"))?;
    for address in previous.container_ips() {
        let mappings: Vec<&Mapping> =
            config.mappings.iter().filter(|mapping| mapping.is_for(address.is_ipv4())).collect();
        let missing = rules::missing(&mut kernel, call.owner().as_str(), &mappings, address);
        if let Some(mapping) = missing.map_err(nft("cannot read port mappings"))? {
            return Err(PluginError::Drift(format!(
                "host port {}/{} is not mapped",
                mapping.protocol, mapping.host_port
            )));
        }
    }
    Ok(())
}

fn status(call: &Call) -> Result<()> {
    Config::read(call)?;
    Netlink::open().map(drop).map_err(nft("nftables cannot be used"))
}

fn gc(call: &Call) -> Result<()> {
    let valid = call.valid_owners();
    let mut kernel = Netlink::open().map_err(nft("cannot remove port mappings"))?;
    let removed = remove(&mut kernel, |found| Owner::is_stale(found, &call.network.name, &valid));
    linger::keep_open(kernel);
    removed
}
