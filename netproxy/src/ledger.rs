//! What the kernel should hold: the elements of all Services put together, and what a change of one Service changes. Pure.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;

use oarlock_nft::{Bytes, Command, Element, Transaction};

use crate::element::{Dynamic, ElementKey, Entry, Map, Target};
use crate::rules::{self, Settings};
use crate::service::ServiceName;

/// Elements of all Services.
#[derive(Debug, Default)]
pub struct Ledger {
    numbers: HashMap<ServiceName, u32>,
    /// The keys that each Service claims, by its number, sorted.
    claimed: Vec<Box<[ElementKey]>>,
    /// Numbers that no Service has any more.
    free: Vec<u32>,
    elements: HashMap<ElementKey, Claim>,
    /// Further claims on keys that somebody has already. Two Services can claim one key for a moment, when a port moves from
    /// one to the other; the first has it until it lets go.
    rivals: HashMap<ElementKey, Vec<Claim>>,
    /// How many elements lead to each chain that comes and goes.
    chains: HashMap<Dynamic, usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Claim {
    service: u32,
    target: Target,
}

/// Elements that changed, with what they were and what they are now.
#[derive(Debug, Default)]
pub struct Delta {
    changes: HashMap<ElementKey, (Option<Target>, Option<Target>)>,
}

impl Delta {
    fn record(&mut self, key: ElementKey, old: Option<Target>, new: Option<Target>) {
        if old == new {
            return;
        }
        match self.changes.entry(key) {
            Slot::Vacant(slot) => {
                slot.insert((old, new));
            }
            Slot::Occupied(mut slot) => {
                slot.get_mut().1 = new;
                if slot.get().0 == new {
                    slot.remove();
                }
            }
        }
    }

    /// The changes, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&ElementKey, Option<Target>, Option<Target>)> {
        self.changes.iter().map(|(key, (old, new))| (key, *old, *new))
    }
}

impl Ledger {
    /// Replaces the elements of one Service, sorted and each key once, and records in `delta` what that changes.
    pub fn set(&mut self, service: &ServiceName, entries: &[Entry], delta: &mut Delta) {
        let known = self.numbers.get(service).copied();
        let number = match known {
            Some(number) => number,
            None if entries.is_empty() => return,
            None => self.number(service),
        };
        let old = std::mem::take(&mut self.claimed[number as usize]);
        // Both are sorted by key, so what is gone is found by one walk; what is new or changed is claimed after it.
        let mut fresh = entries.iter().peekable();
        for key in &old {
            while fresh.next_if(|new| new.key < *key).is_some() {}
            if fresh.peek().is_none_or(|new| new.key != *key) {
                self.release(number, *key, delta);
            }
        }
        for entry in entries {
            self.claim(entry.key, Claim { service: number, target: entry.target }, delta);
        }
        if entries.is_empty() {
            self.numbers.remove(service);
            self.free.push(number);
        } else {
            self.claimed[number as usize] = entries.iter().map(|entry| entry.key).collect();
        }
    }

    /// A number for a Service that has none.
    fn number(&mut self, service: &ServiceName) -> u32 {
        let number = self.free.pop().unwrap_or_else(|| {
            self.claimed.push(Box::default());
            (self.claimed.len() - 1) as u32
        });
        self.numbers.insert(service.clone(), number);
        number
    }

    fn claim(&mut self, key: ElementKey, claim: Claim, delta: &mut Delta) {
        let (old, new) = match self.elements.entry(key) {
            Slot::Vacant(slot) => {
                slot.insert(claim);
                (None, claim.target)
            }
            Slot::Occupied(mut slot) => {
                let first = slot.get_mut();
                let old = first.target;
                if first.service == claim.service {
                    first.target = claim.target;
                } else {
                    let rivals = self.rivals.entry(key).or_default();
                    rivals.retain(|rival| rival.service != claim.service);
                    rivals.push(claim);
                }
                (Some(old), first.target)
            }
        };
        self.count(old, Some(new));
        delta.record(key, old, Some(new));
    }

    fn release(&mut self, service: u32, key: ElementKey, delta: &mut Delta) {
        let Slot::Occupied(mut slot) = self.elements.entry(key) else { return };
        let old = slot.get().target;
        let mut rivals = self.rivals.remove(&key).unwrap_or_default();
        let new = if slot.get().service != service {
            rivals.retain(|rival| rival.service != service);
            Some(old)
        } else if rivals.is_empty() {
            slot.remove();
            None
        } else {
            *slot.get_mut() = rivals.remove(0);
            Some(slot.get().target)
        };
        if !rivals.is_empty() {
            self.rivals.insert(key, rivals);
        }
        self.count(Some(old), new);
        delta.record(key, Some(old), new);
    }

    fn count(&mut self, old: Option<Target>, new: Option<Target>) {
        if old == new {
            return;
        }
        if let Some(chain) = new.and_then(Target::dynamic) {
            *self.chains.entry(chain).or_default() += 1;
        }
        if let Some(chain) = old.and_then(Target::dynamic)
            && let Slot::Occupied(mut slot) = self.chains.entry(chain)
        {
            *slot.get_mut() -= 1;
            if *slot.get() == 0 {
                slot.remove();
            }
        }
    }

    pub fn target(&self, key: &ElementKey) -> Option<Target> {
        self.elements.get(key).map(|claim| claim.target)
    }

    pub fn has_affinity(&self) -> bool {
        self.chains.keys().any(|chain| matches!(chain, Dynamic::Remember(_)))
    }

    /// The chains that elements lead to.
    pub fn chains(&self) -> impl Iterator<Item = &Dynamic> {
        self.chains.keys()
    }

    pub fn element_count(&self) -> usize {
        self.elements.len()
    }

    /// The elements of a map, in no order.
    pub fn of_map(&self, map: Map) -> impl Iterator<Item = (&ElementKey, Target)> {
        self.elements.iter().filter(move |(key, _)| key.map == map).map(|(key, claim)| (key, claim.target))
    }

    /// A table with everything in it, in the place of whatever has its name.
    pub fn whole(&self, settings: &Settings, replaces: bool, affinity: Vec<Element>) -> Transaction {
        let mut transaction = Transaction::new(settings.table.clone());
        if replaces {
            transaction.push(Command::DeleteTable);
        }
        transaction.push(Command::AddTable { comment: settings.marker(), exclusive: false });
        transaction.commands.extend(rules::foundation(settings).commands);
        let mut chains: Vec<&Dynamic> = self.chains.keys().collect();
        chains.sort();
        for chain in chains {
            transaction.commands.extend(rules::dynamic(settings, chain));
        }
        let mut counts = [0; Map::ALL.len()];
        self.elements.keys().for_each(|key| counts[key.map as usize] += 1);
        let mut elements = counts.map(Vec::with_capacity);
        for (key, claim) in &self.elements {
            elements[key.map as usize].push(rules::element(settings, key, claim.target));
        }
        for (map, elements) in Map::ALL.into_iter().zip(elements).filter(|(_, elements)| !elements.is_empty()) {
            transaction.push(add(map, elements));
        }
        if !affinity.is_empty() {
            let set = rules::AFFINITY.to_owned();
            transaction.push(Command::AddElements { set, elements: affinity, exclusive: false });
        }
        transaction
    }

    /// What `delta` means for a kernel that has everything else already. `present` are the chains of ours that it has and that come and go,
    /// brought up to date by this.
    pub fn change(&self, settings: &Settings, delta: &Delta, present: &mut Vec<Dynamic>) -> Transaction {
        let mut removed: HashMap<Map, Vec<Bytes>> = HashMap::new();
        let mut added: HashMap<Map, Vec<Element>> = HashMap::new();
        for (key, old, new) in delta.iter() {
            if let Some(target) = old {
                removed.entry(key.map).or_default().push(rules::key_bytes(settings, key, target));
            }
            if let Some(target) = new {
                added.entry(key.map).or_default().push(rules::element(settings, key, target));
            }
        }
        self.patch(settings, removed, added, present)
    }

    /// Elements removed and added, with the chains that come and go with them and the classes of those.
    pub fn patch(
        &self,
        settings: &Settings,
        removed: HashMap<Map, Vec<Bytes>>,
        added: HashMap<Map, Vec<Element>>,
        present: &mut Vec<Dynamic>,
    ) -> Transaction {
        let mut transaction = Transaction::new(settings.table.clone());
        let mut missing: Vec<Dynamic> = self.chains.keys().filter(|one| !present.contains(one)).copied().collect();
        missing.sort();
        for chain in &missing {
            transaction.commands.extend(rules::dynamic(settings, chain));
        }
        let mut removed: Vec<_> = removed.into_iter().filter(|(_, keys)| !keys.is_empty()).collect();
        removed.sort_by_key(|(map, _)| *map);
        for (map, mut keys) in removed {
            keys.sort();
            transaction.push(Command::DeleteElements { set: map.name().into(), keys });
        }
        let mut added: Vec<_> = added.into_iter().filter(|(_, elements)| !elements.is_empty()).collect();
        added.sort_by_key(|(map, _)| *map);
        for (map, mut elements) in added {
            elements.sort_by_key(|element| element.key);
            transaction.push(add(map, elements));
        }
        let (kept, unused): (Vec<Dynamic>, Vec<Dynamic>) =
            present.iter().partition(|chain| self.chains.contains_key(*chain));
        for chain in &unused {
            if let Some((classes, element)) = rules::class_of(chain) {
                transaction.push(Command::DeleteElements { set: classes.into(), keys: vec![element.key] });
            }
            transaction.push(Command::FlushChain(chain.chain()));
            transaction.push(Command::DeleteChain(chain.chain()));
        }
        *present = kept.into_iter().chain(missing).collect();
        transaction
    }
}

fn add(map: Map, elements: Vec<Element>) -> Command {
    Command::AddElements { set: map.name().into(), elements, exclusive: false }
}
