//! Bringing the policy table of one family to what is planned, element by element, and keeping it there.

use oarlock_nft::{Bytes, Chain, Command, Element, Kernel, NftError, Set, Table, Transaction, Value, Verdict};
use tracing::{info, warn};

use super::index::Touched;
use super::plan::{self, Desired, Direction, Members};

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

    /// Whether the kernel has what is wanted, and the keeper knows of it.
    #[cfg(test)]
    pub fn has(&mut self, wanted: &Desired) -> Result<bool, NftError> {
        let is_known = matches!(&self.applied, Applied::Table(applied) if **applied == *wanted);
        Ok(is_known && self.is_intact(wanted)?)
    }

    /// Makes the table what is wanted. `touched` is at least what has changed since it was last made so, or all.
    pub fn apply(&mut self, wanted: &Desired, touched: &Touched) -> Result<(), NftError> {
        if matches!(self.applied, Applied::Table(_)) && touched.is_empty() {
            return Ok(());
        }
        let before = std::mem::replace(&mut self.applied, Applied::Unknown);
        let (transaction, applied) = match before {
            Applied::Table(mut old) => {
                let transaction = self.change(&old, wanted, touched);
                old.copy(wanted, touched);
                (transaction, old)
            }
            _ => (self.whole(wanted)?, Box::new(wanted.clone())),
        };
        self.kernel.commit(&transaction)?;
        self.applied = Applied::Table(applied);
        self.generation = None;
        Ok(())
    }

    /// Takes the table away, as there are no policies.
    pub fn clear(&mut self) -> Result<(), NftError> {
        if matches!(self.applied, Applied::Nothing) {
            return Ok(());
        }
        self.applied = Applied::Unknown;
        let transaction = self.removal()?;
        self.kernel.commit(&transaction)?;
        self.applied = Applied::Nothing;
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
        let content = self.change(&Desired::default(), wanted, &Touched::all(wanted));
        transaction.commands.extend(content.commands);
        Ok(transaction)
    }

    /// What leads from one to the other where it was touched: first what others refer to, at last what nobody does any more.
    fn change(&self, old: &Desired, new: &Desired, touched: &Touched) -> Transaction {
        let mut transaction = Transaction::new(self.table.clone());
        let mut unused = Vec::new();
        for (name, keys) in &touched.sets {
            match (old.sets.get(name), new.sets.get(name)) {
                (None, None) => {}
                (Some(_), None) => unused.push(Command::DeleteSet(name.clone())),
                (None, Some(Members { fields, elements })) => {
                    transaction.push(Command::AddSet(Set::new(name, fields)));
                    add(&mut transaction, name, elements.iter().map(|key| Element::key(*key)).collect());
                }
                (Some(before), Some(after)) => {
                    let differs =
                        keys.iter().filter(|key| before.elements.contains(key) != after.elements.contains(key));
                    let (come, gone) = differs.partition::<Vec<&Bytes>, _>(|key| after.elements.contains(key));
                    remove(&mut transaction, name, gone.into_iter().copied().collect());
                    add(&mut transaction, name, come.into_iter().map(|key| Element::key(*key)).collect());
                }
            }
        }
        let is_base = |name: &str| Direction::BOTH.iter().any(|direction| direction.name() == name);
        let changed = || touched.chains.iter().filter(|name| old.chains.get(*name) != new.chains.get(*name));
        for name in changed().filter(|name| !old.chains.contains_key(*name) && !is_base(name)) {
            transaction.push(Command::AddChain(Chain::regular(name)));
        }
        for name in changed() {
            let Some(content) = new.chains.get(name) else { continue };
            if old.chains.contains_key(name) {
                transaction.push(Command::FlushChain(name.clone()));
            }
            transaction.commands.extend(plan::rules(name, content));
        }
        for direction in Direction::BOTH {
            let index = direction as usize;
            let (before, after) = (&old.maps[index], &new.maps[index]);
            let differs: Vec<&Bytes> =
                touched.maps[index].iter().filter(|key| before.get(*key) != after.get(*key)).collect();
            let gone = differs.iter().filter(|key| before.contains_key(*key)).map(|key| **key).collect();
            remove(&mut transaction, direction.name(), gone);
            let come = differs.iter().filter_map(|key| Some(plan::map_element(key, after.get(*key)?)));
            add(&mut transaction, direction.name(), come.collect());
        }
        let gone: Vec<&String> = changed().filter(|name| !new.chains.contains_key(*name)).collect();
        transaction.commands.extend(gone.iter().map(|name| Command::FlushChain((*name).clone())));
        transaction.commands.extend(gone.iter().map(|name| Command::DeleteChain((*name).clone())));
        transaction.commands.extend(unused);
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
        self.apply(&wanted, &Touched::default())?;
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
        for direction in Direction::BOTH {
            let map = &wanted.maps[direction as usize];
            let Some(found) = self.kernel.elements(&self.table, direction.name())? else { return Ok(false) };
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
