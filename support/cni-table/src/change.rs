//! What the plugins do with their parts: ADD, DEL, CHECK and GC.

use std::path::Path;

use oarlock_nft::{Bytes, Command, Kernel, Netlink, Table, Transaction};

use crate::owner::Owner;
use crate::part::{Conflict, Entry, Part};
use crate::restore::{Refusal, compare, foundations};
use crate::state::State;
use crate::{Result, TableError};

/// How often somebody else may take the table away during one ADD.
const ATTEMPTS: u32 = 20;

/// On whose behalf the table is changed, and where that is recorded.
#[derive(Debug, Clone, Copy)]
pub struct Holder<'a> {
    pub state_dir: &'a Path,
    pub owner: &'a Owner,
    pub plugin: &'a str,
}

/// Where an element may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub table: Table,
    pub set: &'static str,
    pub key: Bytes,
}

/// Puts parts on record and into the kernel. When the table, or a rule that the parts need, is missing, everything on record is
/// put back with them. Says whether something was deleted on the way, which closing the socket waits for.
///
/// # Errors
/// [`TableError::Taken`] when another attachment has what only one can have; then nothing of the parts is left.
pub fn add(kernel: &mut Netlink, holder: &Holder<'_>, parts: &[Part]) -> Result<bool> {
    let state = State::open(holder.state_dir, kernel)?;
    state.record(holder.owner, holder.plugin, parts)?;
    let added = add_elements(kernel, holder.owner, parts);
    drop(state);
    let outcome = match added {
        Ok(Added::Afresh) => return Ok(false),
        Ok(Added::InPlace) => return Ok(true),
        Ok(Added::WithoutRules) => restore_and_add(kernel, holder, parts),
        Err(error) => Err(error),
    };
    if outcome.is_err() {
        // The first error is the one to tell; DEL repeats what fails here.
        let _ = give_up(kernel, holder, parts);
    }
    outcome.map(|()| true)
}

fn give_up(kernel: &mut Netlink, holder: &Holder<'_>, parts: &[Part]) -> Result<()> {
    let state = State::open(holder.state_dir, kernel)?;
    let taken = take_back(kernel, holder.owner, parts);
    state.forget(holder.owner, holder.plugin)?;
    state.close()?;
    taken
}

fn restore_and_add(kernel: &mut Netlink, holder: &Holder<'_>, parts: &[Part]) -> Result<()> {
    for _ in 0..ATTEMPTS {
        let refused = compare(kernel, holder.state_dir)?.refused;
        let mine = |refusal: &Refusal| match &refusal.owner {
            Some(owner) => owner == holder.owner.as_str(),
            None => parts.iter().any(|part| part.table() == refusal.table),
        };
        if let Some(refusal) = refused.into_iter().find(mine) {
            return Err(TableError::nft("restore the table")(refusal.source));
        }
        let _state = State::open(holder.state_dir, kernel)?;
        match add_elements(kernel, holder.owner, parts)? {
            Added::Afresh | Added::InPlace => return Ok(()),
            Added::WithoutRules => {}
        }
    }
    Err(TableError::Vanished)
}

/// How elements were added.
#[derive(Clone, Copy)]
enum Added {
    Afresh,
    /// In the place of others.
    InPlace,
    /// Not all of them, or the rules that look at them are missing.
    WithoutRules,
}

/// Takes away what the plugin has for the owner: what is on record, or without a record what is at `places`, or without
/// those whatever in `sets` says that it is the owner's. Nothing is fine too.
pub fn remove(
    kernel: &mut Netlink,
    holder: &Holder<'_>,
    sets: &[&'static str],
    places: Option<&[Place]>,
) -> Result<()> {
    let Holder { state_dir, owner, plugin } = *holder;
    let state = State::open_existing(state_dir, kernel)?;
    let recorded = state.as_ref().and_then(|state| state.parts(owner, plugin));
    match (recorded, places) {
        (Some(parts), _) => take_back(kernel, owner, &parts)?,
        (None, Some(places)) => places.iter().try_for_each(|place| remove_at(kernel, owner, place))?,
        (None, None) => remove_where(kernel, sets, |found| found == owner.as_str())?,
    }
    let Some(state) = state else { return Ok(()) };
    state.forget(owner, plugin)?;
    state.close()
}

/// Takes away what the plugin has in `sets` for attachments to `network` that are none of `valid`.
pub fn keep_only(
    kernel: &mut Netlink,
    state_dir: &Path,
    plugin: &str,
    sets: &[&'static str],
    (network, valid): (&str, &[Owner]),
) -> Result<()> {
    let state = State::open_existing(state_dir, kernel)?;
    remove_where(kernel, sets, |found| Owner::is_stale(found, network, valid))?;
    let Some(state) = state else { return Ok(()) };
    state.keep_only(network, valid, plugin)?;
    state.close()
}

fn remove_at(kernel: &mut dyn Kernel, owner: &Owner, place: &Place) -> Result<()> {
    let failed = TableError::nft("remove from the table");
    let Place { table, set, key } = place;
    let found = kernel.element(table, set, key).map_err(&failed)?;
    if found.and_then(|element| element.comment).as_deref() != Some(owner.as_str()) {
        return Ok(());
    }
    let mut transaction = Transaction::new(table.clone());
    transaction.push(Command::DeleteElements { set: (*set).into(), keys: vec![*key] });
    gone_is_fine(kernel.commit(&transaction)).map_err(failed)
}

fn remove_where(kernel: &mut dyn Kernel, sets: &[&'static str], is_stale: impl Fn(&str) -> bool) -> Result<()> {
    let failed = TableError::nft("remove from the table");
    for table in crate::foundation::tables() {
        let mut transaction = Transaction::new(table.clone());
        for set in sets {
            let elements = kernel.elements(&table, set).map_err(&failed)?.unwrap_or_default();
            let stale = elements.iter().filter(|element| element.comment.as_deref().is_some_and(&is_stale));
            let keys: Vec<Bytes> = stale.map(|element| element.key).collect();
            if !keys.is_empty() {
                transaction.push(Command::DeleteElements { set: (*set).into(), keys });
            }
        }
        gone_is_fine(kernel.commit(&transaction)).map_err(&failed)?;
    }
    Ok(())
}

fn gone_is_fine(outcome: oarlock_nft::Result<()>) -> oarlock_nft::Result<()> {
    match outcome {
        Err(error) if error.is_not_found() => Ok(()),
        other => other,
    }
}

fn add_elements(kernel: &mut Netlink, owner: &Owner, parts: &[Part]) -> Result<Added> {
    let failed = TableError::nft("add to the table");
    let mut added = Added::Afresh;
    for part in parts {
        let entries = part.entries(owner.as_str());
        match kernel.commit(&additions(part.table(), &entries)) {
            Ok(()) => {}
            Err(error) if error.is_not_found() => return Ok(Added::WithoutRules),
            Err(error) if error.is_exists() => {
                if !replace(kernel, &part.table(), &entries)? {
                    return Ok(Added::WithoutRules);
                }
                added = Added::InPlace;
            }
            Err(error) => return Err(failed(error)),
        }
    }
    for (table, foundations) in foundations(parts) {
        let rules = kernel.rules(&table).map_err(&failed)?;
        if foundations.iter().any(|foundation| foundation.broken_chain(&rules).is_some()) {
            return Ok(Added::WithoutRules);
        }
    }
    Ok(added)
}

fn additions(table: Table, entries: &[Entry]) -> Transaction {
    let mut transaction = Transaction::new(table);
    for entry in entries {
        transaction.push(Command::AddElements {
            set: entry.set.into(),
            elements: vec![entry.element.clone()],
            exclusive: entry.conflict != Conflict::Share,
        });
    }
    transaction
}

/// Adds elements in the place of those that former owners left. Says whether the table was there.
fn replace(kernel: &mut Netlink, table: &Table, entries: &[Entry]) -> Result<bool> {
    let failed = TableError::nft("add to the table");
    let mut transaction = Transaction::new(table.clone());
    for entry in entries.iter().filter(|entry| entry.conflict != Conflict::Share) {
        let Some(found) = kernel.element(table, entry.set, &entry.element.key).map_err(&failed)? else { continue };
        if entry.conflict == Conflict::Refuse && found.comment != entry.element.comment {
            return Err(TableError::Taken { set: entry.set });
        }
        transaction.push(Command::DeleteElements { set: entry.set.into(), keys: vec![entry.element.key] });
    }
    transaction.commands.extend(additions(table.clone(), entries).commands);
    match kernel.commit(&transaction) {
        Err(error) if error.is_not_found() => Ok(false),
        other => other.map(|()| true).map_err(failed),
    }
}

/// The first entry of the parts that is not in the kernel as `owner`'s.
fn missing_entry(kernel: &mut dyn Kernel, owner: &Owner, parts: &[Part]) -> Result<Option<Entry>> {
    for part in parts {
        for entry in part.entries(owner.as_str()) {
            let found = kernel.element(&part.table(), entry.set, &entry.element.key);
            let found = found.map_err(TableError::nft("look at the table"))?;
            if !found.is_some_and(|found| entry.is_met_by(&found)) {
                return Ok(Some(entry));
            }
        }
    }
    Ok(None)
}

/// CHECK: what of the parts is missing, as text; `None` when the kernel has all of it.
pub fn missing(kernel: &mut dyn Kernel, owner: &Owner, parts: &[Part]) -> Result<Option<Missing>> {
    if let Some(entry) = missing_entry(kernel, owner, parts)? {
        return Ok(Some(Missing::Entry(Box::new(entry))));
    }
    for (table, foundations) in foundations(parts) {
        let rules = kernel.rules(&table).map_err(TableError::nft("look at the table"))?;
        let broken = foundations.iter().find_map(|foundation| foundation.broken_chain(&rules));
        if let Some(chain) = broken {
            return Ok(Some(Missing::Chain { family: table.family.name(), chain: chain.to_owned() }));
        }
    }
    Ok(None)
}

/// What CHECK misses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Missing {
    Entry(Box<Entry>),
    Chain { family: &'static str, chain: String },
}

/// Takes away the elements of the parts that are `owner`'s; without the table there are none.
fn take_back(kernel: &mut dyn Kernel, owner: &Owner, parts: &[Part]) -> Result<()> {
    let failed = TableError::nft("remove from the table");
    for part in parts {
        let mut transaction = Transaction::new(part.table());
        for entry in part.entries(owner.as_str()) {
            let found = kernel.element(&part.table(), entry.set, &entry.element.key).map_err(&failed)?;
            if found.is_some_and(|found| found.comment.as_deref() == Some(owner.as_str())) {
                transaction.push(Command::DeleteElements { set: entry.set.into(), keys: vec![entry.element.key] });
            }
        }
        gone_is_fine(kernel.commit(&transaction)).map_err(&failed)?;
    }
    Ok(())
}
