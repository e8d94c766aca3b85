//! The plugins' way to the nftables table that they have together.

use oarlock_cni_table::{Holder, Missing, Part, Place};
use oarlock_nft::{Kernel, Netlink};

use crate::call::Call;
use crate::error::{PluginError, Result};
use crate::linger;

/// A kernel that can be spoken to about nftables.
pub fn open() -> Result<Netlink> {
    Netlink::open().map_err(|source| PluginError::Nft { what: "nftables cannot be used", source })
}

/// STATUS: fails where the kernel does not answer about nftables.
pub fn status() -> Result<()> {
    open()?.generation().map(drop).map_err(|source| PluginError::Nft { what: "nftables cannot be used", source })
}

/// ADD: puts parts into the table and on record.
pub fn add(call: &Call, plugin: &str, parts: &[Part]) -> Result<()> {
    if parts.is_empty() {
        return Ok(());
    }
    let mut kernel = open()?;
    let owner = call.owner();
    let holder = Holder { state_dir: call.state_dir(), owner: &owner, plugin };
    let added = oarlock_cni_table::add(&mut kernel, &holder, parts);
    if !matches!(added, Ok(false)) {
        // Something was deleted on the way.
        linger::keep_open(kernel);
    }
    Ok(added.map(drop)?)
}

/// DEL: takes away what is this call's, see [`oarlock_cni_table::remove`].
pub fn remove(call: &Call, plugin: &str, sets: &[&'static str], places: Option<&[Place]>) -> Result<()> {
    let mut kernel = open()?;
    let owner = call.owner();
    let holder = Holder { state_dir: call.state_dir(), owner: &owner, plugin };
    let removed = oarlock_cni_table::remove(&mut kernel, &holder, sets, places);
    linger::keep_open(kernel);
    Ok(removed?)
}

/// GC: takes away what belongs to no valid attachment of the network.
pub fn keep_only(call: &Call, plugin: &str, sets: &[&'static str]) -> Result<()> {
    let mut kernel = open()?;
    let valid = call.valid_owners();
    let of_network = (call.network.name.as_str(), valid.as_slice());
    let removed = oarlock_cni_table::keep_only(&mut kernel, call.state_dir(), plugin, sets, of_network);
    linger::keep_open(kernel);
    Ok(removed?)
}

/// CHECK: fails when a rule that the parts need is missing, or else with what `describe` says of a missing element.
pub fn check(call: &Call, parts: &[Part], describe: impl Fn(&oarlock_cni_table::Entry) -> String) -> Result<()> {
    match oarlock_cni_table::missing(&mut open()?, &call.owner(), parts)? {
        None => Ok(()),
        Some(Missing::Entry(entry)) => Err(PluginError::Drift(describe(&entry))),
        Some(Missing::Chain { family, chain }) => {
            Err(PluginError::Drift(format!("chain {chain} of table {family} oarlock-cni does not have its rules")))
        }
    }
}
