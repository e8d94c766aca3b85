//! nf_tables in memory, with the kernel's rules about what may refer to what: for tests of whoever owns a ruleset.

use std::collections::{BTreeMap, HashMap};

use nix::errno::Errno;

use crate::expression::{Expr, Rule};
use crate::kernel::Kernel;
use crate::key::{Bytes, fields_len};
use crate::model::{Chain, Command, Element, Set, SetData, Table, Transaction, Value, Verdict};
use crate::{NftError, Result};

/// A set with its elements.
#[derive(Debug, Clone)]
pub(crate) struct FakeSet {
    pub declaration: Set,
    pub elements: HashMap<Bytes, Element>,
}

/// A table with all that is in it.
#[derive(Debug, Clone, Default)]
pub(crate) struct FakeTable {
    pub comment: String,
    pub sets: BTreeMap<String, FakeSet>,
    pub chains: BTreeMap<String, (Chain, Vec<Rule>)>,
}

/// Tables in memory.
#[derive(Debug, Clone, Default)]
pub struct Fake {
    pub(crate) tables: BTreeMap<Table, FakeTable>,
    generation: u32,
}

impl Fake {
    pub fn new() -> Fake {
        Fake::default()
    }

    /// What an administrator's `nft flush ruleset` does.
    pub fn flush_ruleset(&mut self) {
        self.tables.clear();
        self.generation += 1;
    }

    /// What an administrator's `nft flush table` does: the rules go, everything else stays.
    pub fn flush_rules(&mut self) {
        for (_, rules) in self.tables.values_mut().flat_map(|table| table.chains.values_mut()) {
            rules.clear();
        }
        self.generation += 1;
    }

    /// How many elements the sets of all tables have together.
    pub fn element_count(&self) -> usize {
        self.tables.values().flat_map(|table| table.sets.values()).map(|set| set.elements.len()).sum()
    }
}

impl Kernel for Fake {
    fn commit(&mut self, transaction: &Transaction) -> Result<()> {
        if transaction.is_empty() {
            return Ok(());
        }
        let mut table = self.tables.get(&transaction.table).cloned();
        for command in &transaction.commands {
            apply(&mut table, command).map_err(|errno| refused(command, errno))?;
        }
        if let Some(table) = &table {
            check_references(table).map_err(|(what, errno)| NftError::Refused {
                what,
                count: 1,
                hint: String::new(),
                source: errno,
            })?;
        }
        match table {
            Some(table) => self.tables.insert(transaction.table.clone(), table),
            None => self.tables.remove(&transaction.table),
        };
        self.generation += 1;
        Ok(())
    }

    fn table_comment(&mut self, table: &Table) -> Result<Option<String>> {
        Ok(self.tables.get(table).map(|table| table.comment.clone()))
    }

    fn chains(&mut self, table: &Table) -> Result<Vec<String>> {
        Ok(self.tables.get(table).map(|table| table.chains.keys().cloned().collect()).unwrap_or_default())
    }

    fn rule_count(&mut self, table: &Table) -> Result<usize> {
        Ok(self.tables.get(table).map(|table| table.chains.values().map(|(_, rules)| rules.len()).sum()).unwrap_or(0))
    }

    fn rules(&mut self, table: &Table) -> Result<Vec<(String, String)>> {
        let rules =
            self.tables.get(table).into_iter().flat_map(|table| table.chains.values()).flat_map(|(_, rules)| rules);
        Ok(rules.map(|rule| (rule.chain.clone(), rule.comment.clone().unwrap_or_default())).collect())
    }

    fn elements(&mut self, table: &Table, set: &str) -> Result<Option<Vec<Element>>> {
        let set = self.tables.get(table).and_then(|table| table.sets.get(set));
        Ok(set.map(|set| set.elements.values().cloned().collect()))
    }

    fn generation(&mut self) -> Result<u32> {
        Ok(self.generation)
    }
}

fn refused(command: &Command, errno: Errno) -> NftError {
    let what = command.to_string().lines().next().unwrap_or_default().to_owned();
    NftError::Refused { what, count: 1, hint: String::new(), source: errno }
}

fn apply(table: &mut Option<FakeTable>, command: &Command) -> Result<(), Errno> {
    if let Command::AddTable { comment, exclusive } = command {
        return match table {
            Some(_) if *exclusive => Err(Errno::EEXIST),
            Some(_) => Ok(()),
            None => {
                *table = Some(FakeTable { comment: comment.clone(), ..FakeTable::default() });
                Ok(())
            }
        };
    }
    if matches!(command, Command::DeleteTable) {
        return table.take().map(drop).ok_or(Errno::ENOENT);
    }
    let table = table.as_mut().ok_or(Errno::ENOENT)?;
    match command {
        Command::AddTable { .. } | Command::DeleteTable => Ok(()),
        Command::AddSet(set) => {
            if set.dynamic && set.size.is_none() {
                return Err(Errno::EINVAL);
            }
            match table.sets.get(&set.name) {
                Some(existing) if existing.declaration != *set => Err(Errno::EEXIST),
                Some(_) => Ok(()),
                None => {
                    let new = FakeSet { declaration: set.clone(), elements: HashMap::new() };
                    table.sets.insert(set.name.clone(), new);
                    Ok(())
                }
            }
        }
        Command::DeleteSet(name) => table.sets.remove(name).map(drop).ok_or(Errno::ENOENT),
        Command::AddChain(chain) => {
            table.chains.entry(chain.name.clone()).or_insert_with(|| (chain.clone(), Vec::new()));
            Ok(())
        }
        Command::DeleteChain(name) => {
            // A chain goes with its rules; who else still refers to it is checked at the end.
            table.chains.remove(name).map(drop).ok_or(Errno::ENOENT)
        }
        Command::FlushChain(name) => table.chains.get_mut(name).map(|chain| chain.1.clear()).ok_or(Errno::ENOENT),
        Command::AddRule(rule) => {
            let chain = table.chains.get_mut(&rule.chain).ok_or(Errno::ENOENT)?;
            chain.1.push(rule.clone());
            Ok(())
        }
        Command::AddElements { set, elements, exclusive } => {
            let set = table.sets.get_mut(set).ok_or(Errno::ENOENT)?;
            elements.iter().try_for_each(|element| add_element(set, element, *exclusive))
        }
        Command::DeleteElements { set, keys } => {
            let set = table.sets.get_mut(set).ok_or(Errno::ENOENT)?;
            keys.iter().try_for_each(|key| set.elements.remove(key).map(drop).ok_or(Errno::ENOENT))
        }
        Command::FlushSet(name) => table.sets.get_mut(name).map(|set| set.elements.clear()).ok_or(Errno::ENOENT),
    }
}

fn add_element(set: &mut FakeSet, element: &Element, exclusive: bool) -> Result<(), Errno> {
    if element.key.as_slice().len() as u32 != fields_len(&set.declaration.key) {
        return Err(Errno::EINVAL);
    }
    let fits = match (&set.declaration.data, &element.value) {
        (None, None) | (Some(SetData::Verdict), Some(Value::Verdict(_))) => true,
        (Some(SetData::Fields(fields)), Some(Value::Data(bytes))) => {
            bytes.as_slice().len() as u32 == fields_len(fields)
        }
        _ => false,
    };
    if !fits || (element.timeout.is_some() && set.declaration.timeout.is_none()) {
        return Err(Errno::EINVAL);
    }
    match set.elements.get(&element.key) {
        Some(existing) if exclusive || existing.value != element.value => Err(Errno::EEXIST),
        Some(_) => Ok(()),
        None => {
            set.elements.insert(element.key, element.clone());
            Ok(())
        }
    }
}

/// Every set and chain that is named exists.
fn check_references(table: &FakeTable) -> Result<(), (String, Errno)> {
    let chain_exists = |verdict: &Verdict| verdict.chain().is_none_or(|chain| table.chains.contains_key(chain));
    for (name, set) in &table.sets {
        for element in set.elements.values() {
            if let Some(Value::Verdict(verdict)) = &element.value
                && !chain_exists(verdict)
            {
                return Err((format!("keep {verdict} in {name}"), Errno::EBUSY));
            }
        }
    }
    for rule in table.chains.values().flat_map(|(_, rules)| rules) {
        for expression in &rule.expressions {
            let sound = match expression {
                Expr::InSet { set, .. } | Expr::Update { set, .. } => table.sets.contains_key(set),
                Expr::LoadMap { map, .. } | Expr::VerdictMap { map, .. } => table.sets.contains_key(map),
                Expr::Verdict(verdict) => chain_exists(verdict),
                _ => true,
            };
            if !sound {
                return Err((format!("keep [{expression}] in chain {}", rule.chain), Errno::ENOENT));
            }
        }
    }
    Ok(())
}
