//! `host-local`: addresses from ranges of this node, kept in files.
//!
//! [`config`] reads what the network offers, [`range`] decides which addresses there are and in which order they are
//! given, [`store`] keeps who has which, in the files that the reference plugin uses.

mod config;
mod range;
mod store;

use std::net::IpAddr;

use oarlock_cni::types::{CniResult, IpConfig};

use crate::call::Call;
use crate::error::{PluginError, Result};
use crate::plugin::Plugin;
use config::Config;
use range::RangeSet;
use store::{Owner, Store};

pub const PLUGIN: Plugin = Plugin { name: "host-local", add, del, check, status, gc };

fn owner(call: &Call) -> Owner<'_> {
    Owner { container_id: &call.container_id, ifname: &call.ifname }
}

fn add(call: &Call) -> Result<CniResult> {
    let config = Config::read(call)?;
    // Whatever can fail comes before an address is taken.
    let dns = config.dns()?;
    if let Some(address) = config.requested_in_vain() {
        return Err(PluginError::OutOfRange { address });
    }
    let store = Store::open(&config.data_dir, &call.network.name)?;
    let owner = owner(call);
    let held = store.recorded(&owner)?.unwrap_or_default();
    let mut wanted = config.requested.clone();
    let mut given = Vec::new();
    for (index, set) in config.ranges.iter().enumerate() {
        let requested =
            wanted.iter().position(|address| set.contains(*address)).map(|position| wanted.remove(position));
        // Repeated for the same container and interface, ADD gives the same addresses again.
        let again = held.iter().copied().find(|address| set.contains(*address));
        let address = match (again, requested) {
            (Some(address), requested) if requested.is_none_or(|wanted| wanted == address) => Ok(address),
            (_, requested) => reserve(&store, &owner, index, set, requested),
        };
        match address {
            Ok(address) => given.push((set, address)),
            Err(error) => {
                // All or nothing, except for what the container had before.
                for (_, address) in given.iter().filter(|(_, address)| !held.contains(address)) {
                    store.release(&owner, *address)?;
                }
                return Err(error);
            }
        }
    }
    let ips = given.iter().filter_map(|(set, address)| set.ip_config(*address)).collect::<Vec<IpConfig>>();
    Ok(CniResult { ips, routes: config.routes.clone(), dns, ..CniResult::default() })
}

fn reserve(
    store: &Store,
    owner: &Owner<'_>,
    index: usize,
    set: &RangeSet,
    requested: Option<IpAddr>,
) -> Result<IpAddr> {
    if let Some(address) = requested {
        return match set.is_gateway(address) || !store.take(owner, index, address)? {
            true => Err(PluginError::Taken { address }),
            false => Ok(address),
        };
    }
    for address in set.candidates(store.last_reserved(index)) {
        if store.take(owner, index, address)? {
            return Ok(address);
        }
    }
    Err(PluginError::Exhausted { ranges: set.to_string() })
}

fn del(call: &Call) -> Result<()> {
    let config = Config::read(call)?;
    match Store::open_existing(&config.data_dir, &call.network.name)? {
        Some(store) => store.release_all(&owner(call)),
        None => Ok(()),
    }
}

/// The addresses that the container has from this plugin.
pub fn recorded(call: &Call) -> Result<Vec<IpAddr>> {
    let config = Config::read(call)?;
    match Store::open_existing(&config.data_dir, &call.network.name)? {
        Some(store) => Ok(store.recorded(&owner(call))?.unwrap_or_default()),
        None => Ok(Vec::new()),
    }
}

fn check(call: &Call) -> Result<()> {
    let config = Config::read(call)?;
    let held = match Store::open_existing(&config.data_dir, &call.network.name)? {
        Some(store) => store.addresses_of(&owner(call))?,
        None => Vec::new(),
    };
    if held.is_empty() {
        return Err(PluginError::Drift(format!("no address is reserved for container {}", call.container_id)));
    }
    for ip in call.prev_result()?.unwrap_or_default().ips {
        let address = ip.address.addr();
        if config.ranges.iter().any(|set| set.contains(address)) && !held.contains(&address) {
            return Err(PluginError::Drift(format!(
                "address {address} is not reserved for container {}",
                call.container_id
            )));
        }
    }
    Ok(())
}

fn status(call: &Call) -> Result<()> {
    // Whether an address is free is not asked: runtimes take an error for a network that does not work, and a kubelet would take
    // every pod of a full node out of its Services.
    let config = Config::read(call)?;
    Store::open(&config.data_dir, &call.network.name).map(drop)
}

/// Whether any container has an address of the network.
pub fn is_in_use(call: &Call) -> Result<bool> {
    let config = Config::read(call)?;
    let store = Store::open_existing(&config.data_dir, &call.network.name)?;
    Ok(store.is_some_and(|store| store.given().is_ok_and(|given| !given.is_empty())))
}

fn gc(call: &Call) -> Result<()> {
    let config = Config::read(call)?;
    match Store::open_existing(&config.data_dir, &call.network.name)? {
        Some(store) => store.keep_only(call.valid_attachments()),
        None => Ok(()),
    }
}
