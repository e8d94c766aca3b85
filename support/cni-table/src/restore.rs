//! Comparing records with the kernel, and putting back what is missing.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use oarlock_nft::{Bytes, Command, Element, Kernel, Netlink, NftError, Table, Transaction};

use crate::part::{Conflict, Entry, Part};
use crate::state::{Record, State};
use crate::{Foundation, Result, TableError};

/// Puts back what is on record below `state_dir` for the calling thread's network namespace and missing in the kernel:
/// sets, chains and rules, and elements. Returns how many chains and elements were missing; 0 when everything was in place
/// or nothing is on record. Elements of others are left alone, and what the kernel refuses keeps nothing else away (see
/// [`Restorer::refused`]). Blocks, for milliseconds with hundreds of attachments.
pub fn restore(state_dir: &Path) -> Result<usize> {
    compare(&mut open()?, state_dir).map(|restored| restored.count)
}

/// As [`restore`] through a socket that is open, with what was refused.
pub(crate) fn compare(kernel: &mut Netlink, state_dir: &Path) -> Result<Restored> {
    // While this is held no plugin is between its record and the kernel.
    match State::open_alone(state_dir, kernel)? {
        Some(state) => {
            let restored = put_back(kernel, &state.records()?)?;
            state.remove_if_empty().map(|()| restored)
        }
        None => Ok(Restored::default()),
    }
}

/// What the kernel would not take back.
#[derive(Debug, thiserror::Error)]
#[error("cannot restore {} in table {} of the CNI plugins", whose(owner.as_deref()), table.name)]
pub struct Refusal {
    /// Whose elements; nobody's for the rules that all of them need.
    pub owner: Option<String>,
    pub table: Table,
    pub source: NftError,
}

fn whose(owner: Option<&str>) -> String {
    owner.map_or_else(|| "common rules".to_owned(), |owner| format!("what is on record for {owner}"))
}

/// What came of a restoration.
#[derive(Debug, Default)]
pub(crate) struct Restored {
    /// Chains and elements.
    pub count: usize,
    pub refused: Vec<Refusal>,
}

/// What was refused is tried again after so long, even when nobody has changed any rules.
const RETRY_INTERVAL: Duration = Duration::from_secs(30);

/// Restores when somebody changed nftables since it last found everything in place.
#[derive(Debug)]
pub struct Restorer {
    state_dir: PathBuf,
    generation: Option<u32>,
    refused: Vec<Refusal>,
    looked_at: Instant,
}

impl Restorer {
    pub fn new(state_dir: &Path) -> Restorer {
        Restorer { state_dir: state_dir.to_owned(), generation: None, refused: Vec::new(), looked_at: Instant::now() }
    }

    /// As [`restore`]; one question to the kernel when nothing was committed since the last call.
    pub fn restore(&mut self) -> Result<usize> {
        let mut kernel = open()?;
        let generation = kernel.generation().map_err(TableError::nft("look at the table"))?;
        let is_retry = !self.refused.is_empty() && self.looked_at.elapsed() >= RETRY_INTERVAL;
        if self.generation == Some(generation) && !is_retry {
            return Ok(0);
        }
        self.generation = None;
        self.looked_at = Instant::now();
        let restored = compare(&mut kernel, &self.state_dir)?;
        if restored.count == 0 {
            self.generation = Some(generation);
        }
        self.refused = restored.refused;
        Ok(restored.count)
    }

    /// What the kernel refused when it was last compared.
    pub fn refused(&self) -> &[Refusal] {
        &self.refused
    }
}

fn open() -> Result<Netlink> {
    Netlink::open().map_err(TableError::nft("open the table"))
}

/// The foundations that parts need, each once, by table.
pub(crate) fn foundations<'a>(parts: impl IntoIterator<Item = &'a Part>) -> BTreeMap<Table, Vec<Foundation>> {
    let mut found: BTreeMap<Table, Vec<Foundation>> = BTreeMap::new();
    for part in parts {
        let of_table = found.entry(part.table()).or_default();
        let foundation = part.foundation();
        if !of_table.contains(&foundation) {
            of_table.push(foundation);
        }
    }
    found
}

/// What records, the oldest first, want in one table.
#[derive(Default)]
struct Wanted {
    entries: Missing,
}

/// Elements by set and key.
type Missing = BTreeMap<&'static str, HashMap<Bytes, Element>>;

impl Wanted {
    fn insert(&mut self, entry: Entry) {
        let of_set = self.entries.entry(entry.set).or_default();
        match entry.conflict {
            // An address has been given again: the record of the former holder was left behind.
            Conflict::Replace | Conflict::Share => {
                of_set.insert(entry.element.key, entry.element);
            }
            // ADD refused the later one and was killed before it could forget.
            Conflict::Refuse => {
                of_set.entry(entry.element.key).or_insert(entry.element);
            }
        }
    }
}

/// Puts back what records, the oldest first, want and the kernel does not have: each table in one transaction, or record by
/// record where that is refused.
fn put_back(kernel: &mut dyn Kernel, records: &[Record]) -> Result<Restored> {
    put_back_unless_flushed(kernel, records, true)
}

fn put_back_unless_flushed(kernel: &mut dyn Kernel, records: &[Record], is_first: bool) -> Result<Restored> {
    let failed = TableError::nft("restore the table");
    let mut wanted: BTreeMap<Table, Wanted> = BTreeMap::new();
    for record in records {
        for part in &record.parts {
            let of_table = wanted.entry(part.table()).or_default();
            part.entries(&record.owner).into_iter().for_each(|entry| of_table.insert(entry));
        }
    }
    let mut restored = Restored::default();
    for (table, mut foundations) in foundations(records.iter().flat_map(|record| &record.parts)) {
        let rules = kernel.rules(&table).map_err(&failed)?;
        foundations.retain(|foundation| foundation.broken_chain(&rules).is_some());
        let mut missing = wanted.remove(&table).unwrap_or_default().entries;
        for (set, entries) in &mut missing {
            let present = kernel.elements(&table, set).map_err(&failed)?.unwrap_or_default();
            present.iter().for_each(|element| drop(entries.remove(&element.key)));
        }
        let mut transaction = Transaction::new(table.clone());
        transaction.commands.extend(foundations.iter().flat_map(|foundation| foundation.transaction().commands));
        for (set, entries) in missing.iter().filter(|(_, entries)| !entries.is_empty()) {
            let elements = entries.values().cloned().collect();
            transaction.push(Command::AddElements { set: (*set).into(), elements, exclusive: false });
        }
        match kernel.commit(&transaction) {
            Ok(()) => restored.count += foundations.len() + missing.values().map(HashMap::len).sum::<usize>(),
            // Somebody took away meanwhile what was in place.
            Err(error) if is_first && foundations.is_empty() && error.is_not_found() => {
                let again = put_back_unless_flushed(kernel, records, false)?;
                return Ok(Restored { count: restored.count + again.count, ..again });
            }
            Err(NftError::Refused { .. } | NftError::TooLarge { .. }) => {
                put_back_each(kernel, &foundations, (table, missing), records, &mut restored).map_err(&failed)?;
            }
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(restored)
}

/// As [`put_back`] in one table, each foundation and each record in a transaction of its own. Records that need a foundation
/// which is refused are not tried.
fn put_back_each(
    kernel: &mut dyn Kernel,
    foundations: &[Foundation],
    (table, mut missing): (Table, Missing),
    records: &[Record],
    restored: &mut Restored,
) -> oarlock_nft::Result<()> {
    let mut commit =
        |transaction: &Transaction, owner: Option<&String>, restored: &mut Restored| match kernel.commit(transaction) {
            Ok(()) => Ok(true),
            Err(source @ (NftError::Refused { .. } | NftError::TooLarge { .. })) => {
                restored.refused.push(Refusal { owner: owner.cloned(), table: table.clone(), source });
                Ok(false)
            }
            Err(error) => Err(error),
        };
    let mut lacking = Vec::new();
    for foundation in foundations {
        match commit(&foundation.transaction(), None, restored)? {
            true => restored.count += 1,
            false => lacking.push(foundation),
        }
    }
    for record in records {
        let of_table = record.parts.iter().filter(|part| part.table() == table);
        if of_table.clone().any(|part| lacking.contains(&&part.foundation())) {
            continue;
        }
        let mut entries: Vec<Entry> = of_table.flat_map(|part| part.entries(&record.owner)).collect();
        // Of records that want the same key one has it, and one that is there by now is not put back again.
        entries.retain(|entry| {
            missing.get(entry.set).and_then(|of_set| of_set.get(&entry.element.key)) == Some(&entry.element)
        });
        let mut transaction = Transaction::new(table.clone());
        for Entry { set, element, .. } in &entries {
            let (set, elements) = ((*set).into(), vec![element.clone()]);
            transaction.push(Command::AddElements { set, elements, exclusive: false });
        }
        if commit(&transaction, Some(&record.owner), restored)? {
            restored.count += entries.len();
            let mut forget = |entry: Entry| missing.get_mut(entry.set).and_then(|set| set.remove(&entry.element.key));
            entries.into_iter().for_each(|entry| drop(forget(entry)));
        }
    }
    Ok(())
}
