//! Comparing records with the kernel, and putting back what is missing.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use oarlock_nft::{Bytes, Command, Element, Kernel, Netlink, Table, Transaction};

use crate::part::{Conflict, Entry, Part};
use crate::state::{Record, State};
use crate::{Foundation, Result, TableError};

/// Puts back what is on record below `state_dir` for the calling thread's network namespace and missing in the kernel:
/// sets, chains and rules, and elements. Returns how many chains and elements were missing; 0 when everything was in place
/// or nothing is on record. Elements of others are left alone. Blocks, for milliseconds with hundreds of attachments.
pub fn restore(state_dir: &Path) -> Result<usize> {
    restore_with(&mut open()?, state_dir)
}

/// As [`restore`] through a socket that is open.
pub fn restore_with(kernel: &mut Netlink, state_dir: &Path) -> Result<usize> {
    // While this is held no plugin is between its record and the kernel.
    match State::open_alone(state_dir, kernel)? {
        Some(state) => {
            let count = put_back(kernel, &state.records()?)?;
            state.remove_if_empty().map(|()| count)
        }
        None => Ok(0),
    }
}

/// Restores when somebody changed nftables since it last found everything in place.
#[derive(Debug)]
pub struct Restorer {
    state_dir: PathBuf,
    generation: Option<u32>,
}

impl Restorer {
    pub fn new(state_dir: &Path) -> Restorer {
        Restorer { state_dir: state_dir.to_owned(), generation: None }
    }

    /// As [`restore`]; one question to the kernel when nothing was committed since the last call.
    pub fn restore(&mut self) -> Result<usize> {
        let mut kernel = open()?;
        let generation = kernel.generation().map_err(TableError::nft("look at the table"))?;
        if self.generation == Some(generation) {
            return Ok(0);
        }
        self.generation = None;
        let put_back = restore_with(&mut kernel, &self.state_dir)?;
        if put_back == 0 {
            self.generation = Some(generation);
        }
        Ok(put_back)
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
    entries: BTreeMap<&'static str, HashMap<Bytes, Element>>,
}

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

/// Puts back what records, the oldest first, want and the kernel does not have. Says how much that was.
fn put_back(kernel: &mut dyn Kernel, records: &[Record]) -> Result<usize> {
    let failed = TableError::nft("restore the table");
    let mut wanted: BTreeMap<Table, Wanted> = BTreeMap::new();
    for record in records {
        for part in &record.parts {
            let of_table = wanted.entry(part.table()).or_default();
            part.entries(&record.owner).into_iter().for_each(|entry| of_table.insert(entry));
        }
    }
    let mut count = 0;
    for (table, foundations) in foundations(records.iter().flat_map(|record| &record.parts)) {
        let rules = kernel.rules(&table).map_err(&failed)?;
        let mut transaction = Transaction::new(table.clone());
        for foundation in &foundations {
            if foundation.broken_chain(&rules).is_some() {
                transaction.commands.extend(foundation.transaction().commands);
                count += 1;
            }
        }
        for (set, entries) in wanted.remove(&table).unwrap_or_default().entries {
            let present = kernel.elements(&table, set).map_err(&failed)?.unwrap_or_default();
            let present: HashSet<Bytes> = present.into_iter().map(|element| element.key).collect();
            let elements: Vec<Element> =
                entries.into_values().filter(|element| !present.contains(&element.key)).collect();
            count += elements.len();
            if !elements.is_empty() {
                transaction.push(Command::AddElements { set: set.into(), elements, exclusive: false });
            }
        }
        kernel.commit(&transaction).map_err(&failed)?;
    }
    Ok(count)
}
