//! `firewall`: which packets are forwarded to containers, by nftables.
//!
//! With `ingressPolicy` `open` everything is, as far as this table is concerned. With `same-bridge`, bridges whose
//! networks say so are kept apart: new connections from one of them to another are dropped, others pass. The administrator's
//! own rules go into the chain `firewall-admin`, which comes first and is never touched.
//!
//! The rules are those of [`oarlock_cni_table::firewall`]. What `accept` says here does not overrule other tables that drop.

use oarlock_cni::types::CniResult;
use oarlock_cni_table::Part;
use oarlock_cni_table::firewall::{BRIDGES, Firewall, places};
use oarlock_netlink::{Connection, Protocol};
use oarlock_nft::{Command, Kernel, Transaction};
use serde::Deserialize;

use crate::call::Call;
use crate::chained::required_result;
use crate::error::{Context, PluginError, Result};
use crate::plugin::Plugin;
use crate::table;

pub const PLUGIN: Plugin = Plugin { name: "firewall", add, del, check, status, gc };

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Policy {
    Open,
    SameBridge,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    #[serde(default)]
    backend: Option<String>,
    #[serde(default)]
    ingress_policy: Option<String>,
}

fn read(call: &Call) -> Result<Policy> {
    let raw: Raw = call.config()?;
    if let Some(backend) = raw.backend.filter(|backend| !backend.is_empty() && backend != "nftables") {
        return Err(PluginError::config("backend", format!("{backend:?} is not supported, only \"nftables\"")));
    }
    match raw.ingress_policy.as_deref() {
        None | Some("" | "open") => Ok(Policy::Open),
        Some("same-bridge") => Ok(Policy::SameBridge),
        Some(other) => Err(PluginError::config("ingressPolicy", format!("{other:?} is unknown"))),
    }
}

/// The bridge that the result names: the first link of the host, as the plugin `bridge` tells it.
fn bridge_of(result: &CniResult) -> Result<String> {
    let host = |sandbox: Option<&String>| sandbox.is_none_or(String::is_empty);
    let mut connection = Connection::open(Protocol::Route).context(|| "cannot talk to the kernel".into())?;
    for interface in result.interfaces.iter().filter(|one| host(one.sandbox.as_ref())) {
        let link = connection.link(&interface.name).context(|| format!("look up {}", interface.name))?;
        if link.is_some_and(|link| link.kind.as_deref() == Some("bridge")) {
            return Ok(interface.name.clone());
        }
    }
    Err(PluginError::config("prevResult", "names no bridge, which \"same-bridge\" needs"))
}

fn families(result: &CniResult) -> Vec<bool> {
    let addresses = result.container_ips();
    [true, false].into_iter().filter(|is_ipv4| addresses.iter().any(|one| one.is_ipv4() == *is_ipv4)).collect()
}

fn parts(call: &Call) -> Result<(CniResult, Vec<Part>)> {
    let policy = read(call)?;
    let result = required_result(call, "firewall")?;
    let bridge = if policy == Policy::SameBridge { Some(bridge_of(&result)?) } else { None };
    let part = |is_ipv4| Part::Firewall(Firewall { is_ipv4, bridge: bridge.clone() });
    let parts = families(&result).into_iter().map(part).collect();
    Ok((result, parts))
}

fn add(call: &Call) -> Result<CniResult> {
    let (result, parts) = parts(call)?;
    table::add(call, PLUGIN.name, &parts)?;
    Ok(result)
}

/// What belongs to bridges that are gone. A bridge is kept apart from the others as long as it exists, whichever of its
/// containers asked for it.
fn del(call: &Call) -> Result<()> {
    read(call)?;
    table::remove(call, PLUGIN.name, &[], Some(&[]))?;
    remove_gone()
}

fn remove_gone() -> Result<()> {
    let failed = |source| PluginError::Nft { what: "cannot clean up the firewall", source };
    let mut kernel = table::open()?;
    let mut connection = Connection::open(Protocol::Route).context(|| "cannot talk to the kernel".into())?;
    for is_ipv4 in [true, false] {
        let table = oarlock_cni_table::table(is_ipv4);
        for element in kernel.elements(&table, BRIDGES).map_err(failed)?.unwrap_or_default() {
            let name = oarlock_netlink::wire::read_string(element.key.as_slice());
            if connection.link(&name).context(|| format!("look up {name}"))?.is_some() {
                continue;
            }
            let mut transaction = Transaction::new(table.clone());
            for (set, key) in places(&name) {
                transaction.push(Command::DeleteElements { set: set.into(), keys: vec![key] });
            }
            match kernel.commit(&transaction) {
                Err(error) if error.is_not_found() => {}
                other => other.map_err(failed)?,
            }
        }
    }
    Ok(())
}

fn check(call: &Call) -> Result<()> {
    let (_, parts) = parts(call)?;
    table::check(call, &parts, |entry| {
        let bridge = oarlock_netlink::wire::read_string(entry.element.key.as_slice());
        format!("{bridge} is not in {}", entry.set)
    })
}

fn status(call: &Call) -> Result<()> {
    read(call)?;
    table::status()
}

fn gc(call: &Call) -> Result<()> {
    read(call)?;
    table::keep_only(call, PLUGIN.name, &[])?;
    remove_gone()
}
