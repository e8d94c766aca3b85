//! What the kernel should hold: the elements of all Services put together, and what a change of one Service changes. Pure.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;

use oarlock_nft::{Bytes, Command, Element, Transaction};

use crate::plan::{Dynamic, Entry, Map, Target};
use crate::rules::{self, Settings};
use crate::service::ServiceName;

/// Elements of all Services.
#[derive(Debug, Default)]
pub struct Ledger {
    services: HashMap<ServiceName, Vec<Entry>>,
    elements: HashMap<(Map, Bytes), Claims>,
    /// How many elements lead to each chain that comes and goes.
    chains: HashMap<Dynamic, usize>,
}

/// Who wants an element. Two Services can claim one key for a moment, when a port moves from one to the other; the first
/// has it until it lets go.
#[derive(Debug, Clone)]
struct Claims {
    service: ServiceName,
    target: Target,
    others: Vec<(ServiceName, Target)>,
}

/// Elements that changed, with what they were and what they are now.
#[derive(Debug, Default)]
pub struct Delta {
    changes: HashMap<(Map, Bytes), (Option<Target>, Option<Target>)>,
}

impl Delta {
    fn record(&mut self, key: (Map, Bytes), old: Option<Target>, new: Option<Target>) {
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
    pub fn iter(&self) -> impl Iterator<Item = (Map, &Bytes, Option<Target>, Option<Target>)> {
        self.changes.iter().map(|((map, key), (old, new))| (*map, key, *old, *new))
    }
}

impl Ledger {
    /// Replaces the elements of one Service, sorted and each key once, and records in `delta` what that changes.
    pub fn set(&mut self, service: &ServiceName, entries: Vec<Entry>, delta: &mut Delta) {
        let old = self.services.remove(service).unwrap_or_default();
        let key = |entry: &Entry| (entry.map, entry.key);
        // Both are sorted by key, so what is gone is found by one walk; what is new or changed is claimed after it.
        let mut fresh = entries.iter().peekable();
        for entry in &old {
            while fresh.next_if(|new| key(new) < key(entry)).is_some() {}
            if fresh.peek().is_none_or(|new| key(new) != key(entry)) {
                self.release(service, key(entry), delta);
            }
        }
        for entry in &entries {
            self.claim(service, entry, delta);
        }
        if !entries.is_empty() {
            self.services.insert(service.clone(), entries);
        }
    }

    fn claim(&mut self, service: &ServiceName, entry: &Entry, delta: &mut Delta) {
        let key = (entry.map, entry.key);
        let (old, new) = match self.elements.entry(key) {
            Slot::Vacant(slot) => {
                slot.insert(Claims { service: service.clone(), target: entry.target, others: Vec::new() });
                (None, entry.target)
            }
            Slot::Occupied(mut slot) => {
                let claims = slot.get_mut();
                let old = claims.target;
                if claims.service == *service {
                    claims.target = entry.target;
                } else {
                    claims.others.retain(|(other, _)| other != service);
                    claims.others.push((service.clone(), entry.target));
                }
                (Some(old), claims.target)
            }
        };
        self.count(old, Some(new));
        delta.record(key, old, Some(new));
    }

    fn release(&mut self, service: &ServiceName, key: (Map, Bytes), delta: &mut Delta) {
        let Slot::Occupied(mut slot) = self.elements.entry(key) else { return };
        let claims = slot.get_mut();
        let old = claims.target;
        let new = if claims.service != *service {
            claims.others.retain(|(other, _)| other != service);
            Some(old)
        } else if claims.others.is_empty() {
            slot.remove();
            None
        } else {
            (claims.service, claims.target) = claims.others.remove(0);
            Some(claims.target)
        };
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

    pub fn target(&self, map: Map, key: Bytes) -> Option<Target> {
        self.elements.get(&(map, key)).map(|claims| claims.target)
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

    /// All elements, by map.
    pub fn by_map(&self) -> HashMap<Map, Vec<(Bytes, Target)>> {
        let mut all: HashMap<Map, Vec<(Bytes, Target)>> = HashMap::new();
        for ((map, key), claims) in &self.elements {
            all.entry(*map).or_default().push((*key, claims.target));
        }
        all
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
        let mut maps: Vec<_> = self.by_map().into_iter().collect();
        maps.sort_by_key(|(map, _)| *map);
        for (map, mut elements) in maps {
            elements.sort();
            transaction.push(add(map, elements.into_iter().map(|(key, target)| rules::element(key, target)).collect()));
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
        for (map, key, old, new) in delta.iter() {
            if old.is_some() {
                removed.entry(map).or_default().push(*key);
            }
            if let Some(target) = new {
                added.entry(map).or_default().push(rules::element(*key, target));
            }
        }
        self.patch(settings, removed, added, present)
    }

    /// Elements removed and added, with the chains that come and go with them.
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
            present.iter().partition(|chain| self.chains.contains_key(chain));
        for chain in unused {
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
