//! Bringing the policy table of one family to what is planned, element by element, and keeping it there.

use std::collections::{BTreeMap, BTreeSet};

use oarlock_nft::{Bytes, Chain, Command, Element, Kernel, NftError, Set, Table, Transaction, Value, Verdict};
use tracing::{info, warn};

use super::plan::{self, Desired, Members};

const MARKER: &str = "oarlock network policies";

/// The owner of one family's table.
pub struct Keeper<K> {
    kernel: K,
    table: Table,
    is_ipv4: bool,
    applied: Applied,
    generation: Option<u32>,
}

/// What is in the kernel as far as it is known.
enum Applied {
    Unknown,
    Nothing,
    Table(Box<Desired>),
}

impl<K: Kernel> Keeper<K> {
    pub fn new(kernel: K, table: Table, is_ipv4: bool) -> Keeper<K> {
        Keeper { kernel, table, is_ipv4, applied: Applied::Unknown, generation: None }
    }

    #[cfg(test)]
    pub fn kernel_mut(&mut self) -> &mut K {
        &mut self.kernel
    }

    /// Makes the table what is wanted; without policies there is none.
    pub fn apply(&mut self, wanted: Option<Desired>) -> Result<(), NftError> {
        let before = std::mem::replace(&mut self.applied, Applied::Unknown);
        let (transaction, applied) = match (before, wanted) {
            (Applied::Nothing, None) => (Transaction::new(self.table.clone()), Applied::Nothing),
            (_, None) => (self.removal()?, Applied::Nothing),
            (Applied::Table(old), Some(new)) => (self.change(&old, &new), Applied::Table(Box::new(new))),
            (_, Some(new)) => (self.whole(&new)?, Applied::Table(Box::new(new))),
        };
        self.kernel.commit(&transaction)?;
        self.applied = applied;
        self.generation = None;
        Ok(())
    }

    fn removal(&mut self) -> Result<Transaction, NftError> {
        let mut transaction = Transaction::new(self.table.clone());
        if self.kernel.table_comment(&self.table)?.is_some() {
            transaction.push(Command::DeleteTable);
            info!(table = self.table.name, "no network policies");
        }
        Ok(transaction)
    }

    /// The table in the place of any other of its name: there is no moment without it.
    fn whole(&mut self, wanted: &Desired) -> Result<Transaction, NftError> {
        let mut transaction = self.removal()?;
        transaction.push(Command::AddTable { comment: MARKER.to_owned(), exclusive: false });
        transaction.commands.extend(plan::foundation(self.is_ipv4));
        let empty = Desired::default();
        transaction.commands.extend(self.change(&empty, wanted).commands);
        Ok(transaction)
    }

    fn change(&self, old: &Desired, new: &Desired) -> Transaction {
        let mut transaction = Transaction::new(self.table.clone());
        for (name, members) in &new.sets {
            let nothing = BTreeSet::new();
            let before = match old.sets.get(name) {
                Some(before) => &before.elements,
                None => {
                    transaction.push(Command::AddSet(Set::new(name, &members.fields)));
                    &nothing
                }
            };
            remove(&mut transaction, name, before.difference(&members.elements).copied().collect());
            let added = members.elements.difference(before).map(|key| Element::key(*key)).collect();
            add(&mut transaction, name, added);
        }
        let is_base =
            |name: &str| new.maps.iter().any(|(map, _)| *map == name) || old.maps.iter().any(|(map, _)| *map == name);
        for name in new.chains.keys().filter(|name| !old.chains.contains_key(*name) && !is_base(name)) {
            transaction.push(Command::AddChain(Chain::regular(name)));
        }
        for (name, rules) in new.chains.iter().filter(|(name, rules)| old.chains.get(*name) != Some(*rules)) {
            if old.chains.contains_key(name) {
                transaction.push(Command::FlushChain(name.clone()));
            }
            transaction.commands.extend(plan::rules(name, rules));
        }
        for (name, map) in &new.maps {
            let nothing = BTreeMap::new();
            let before = old.maps.iter().find(|(old, _)| old == name).map_or(&nothing, |(_, map)| map);
            let changed =
                |(key, chain): &(&Bytes, &String), other: &BTreeMap<Bytes, String>| other.get(*key) != Some(*chain);
            let gone = before.iter().filter(|pair| changed(pair, map)).map(|(key, _)| *key).collect();
            remove(&mut transaction, name, gone);
            let come = map.iter().filter(|pair| changed(pair, before));
            add(&mut transaction, name, come.map(|(key, chain)| plan::map_element(key, chain)).collect());
        }
        let gone: Vec<&String> = old.chains.keys().filter(|name| !new.chains.contains_key(*name)).collect();
        transaction.commands.extend(gone.iter().map(|name| Command::FlushChain((*name).clone())));
        transaction.commands.extend(gone.iter().map(|name| Command::DeleteChain((*name).clone())));
        let unused = old.sets.keys().filter(|name| !new.sets.contains_key(*name));
        transaction.commands.extend(unused.map(|name| Command::DeleteSet(name.clone())));
        transaction
    }

    /// Puts right what others changed; says whether that was needed. Cheap while nobody commits to nftables at all.
    pub fn audit(&mut self) -> Result<bool, NftError> {
        let Applied::Table(wanted) = &self.applied else { return Ok(false) };
        let generation = self.kernel.generation()?;
        if self.generation == Some(generation) {
            return Ok(false);
        }
        let wanted = Desired::clone(wanted);
        if self.is_intact(&wanted)? {
            self.generation = Some(generation);
            return Ok(false);
        }
        warn!(table = self.table.name, "network policies were changed or removed by someone else; restoring them");
        self.applied = Applied::Unknown;
        self.apply(Some(wanted))?;
        Ok(true)
    }

    fn is_intact(&mut self, wanted: &Desired) -> Result<bool, NftError> {
        let rules: usize = wanted.chains.values().map(|(_, rules)| rules.len()).sum();
        if self.kernel.table_comment(&self.table)?.as_deref() != Some(MARKER)
            || self.kernel.rule_count(&self.table)? != rules
        {
            return Ok(false);
        }
        for (name, Members { elements, .. }) in &wanted.sets {
            let Some(found) = self.kernel.elements(&self.table, name)? else { return Ok(false) };
            if found.len() != elements.len() || found.iter().any(|element| !elements.contains(&element.key)) {
                return Ok(false);
            }
        }
        for (name, map) in &wanted.maps {
            let Some(found) = self.kernel.elements(&self.table, name)? else { return Ok(false) };
            let is_right = |element: &Element| {
                map.get(&element.key)
                    .is_some_and(|chain| element.value == Some(Value::Verdict(Verdict::Goto(chain.clone()))))
            };
            if found.len() != map.len() || !found.iter().all(is_right) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn remove(transaction: &mut Transaction, set: &str, keys: Vec<Bytes>) {
    if !keys.is_empty() {
        transaction.push(Command::DeleteElements { set: set.to_owned(), keys });
    }
}

fn add(transaction: &mut Transaction, set: &str, elements: Vec<Element>) {
    if !elements.is_empty() {
        transaction.push(Command::AddElements { set: set.to_owned(), elements, exclusive: false });
    }
}
