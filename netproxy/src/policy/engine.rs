//! What is known, the tables that follow from it, and the kernel that has them: one round of work at a time, on a thread
//! that may block.

use std::collections::HashSet;

use ipnet::IpNet;
use oarlock_nft::Kernel;
use tracing::{info, warn};

use super::index::{Index, Touched};
use super::keeper::Keeper;
use super::{Event, Kind};

/// The policies of this node's pods, for each family in turn.
pub struct Engine<K> {
    index: Index,
    keepers: Vec<Keeper<K>>,
    listed: HashSet<Kind>,
    /// The networks of this node's pods, once they are known.
    cidrs: Option<Vec<IpNet>>,
}

impl<K: Kernel> Engine<K> {
    /// `keepers` says of each whether its family is IPv4.
    pub fn new(keepers: Vec<(bool, Keeper<K>)>) -> Engine<K> {
        let families: Vec<bool> = keepers.iter().map(|(is_ipv4, _)| *is_ipv4).collect();
        Engine {
            index: Index::new(&families),
            keepers: keepers.into_iter().map(|(_, keeper)| keeper).collect(),
            listed: HashSet::new(),
            cidrs: None,
        }
    }

    /// Whether there are policies, so that pods and namespaces matter.
    pub fn has_policies(&self) -> bool {
        self.index.has_policies()
    }

    /// Whether a pod of this node is isolated.
    pub fn isolates(&self) -> bool {
        self.index.isolates()
    }

    pub fn set_pod_cidrs(&mut self, cidrs: Option<Vec<IpNet>>) {
        self.index.set_pod_cidrs(cidrs.as_deref().unwrap_or_default());
        self.cidrs = cidrs;
    }

    pub fn take(&mut self, event: Event) {
        match event {
            Event::Policy(name, policy) => self.index.set_policy(&name, policy),
            Event::Pod(name, pod) => self.index.set_pod(&name, pod),
            Event::Namespace(name, labels) => self.index.set_namespace(&name, labels),
            Event::Listed(kind) => drop(self.listed.insert(kind)),
        }
    }

    /// Writes what has changed, once everything is known that it depends on. For which networks of this node's pods the
    /// kernel has it all; none while something is missing.
    pub fn apply(&mut self) -> Option<Vec<IpNet>> {
        let needed: &[Kind] =
            if self.has_policies() { &[Kind::Policies, Kind::Pods, Kind::Namespaces] } else { &[Kind::Policies] };
        if self.cidrs.is_none() || !needed.iter().all(|kind| self.listed.contains(kind)) {
            return None;
        }
        let mut complete = true;
        let has_policies = self.has_policies();
        for (side, keeper) in self.index.sides().iter_mut().zip(&mut self.keepers) {
            let written = match has_policies {
                true => keeper.apply(&side.desired, &side.touched),
                false => keeper.clear(),
            };
            match written {
                Ok(()) => side.touched = Touched::default(),
                Err(error) => {
                    warn!(error = &error as &dyn std::error::Error, "network policies cannot be written; trying again");
                    complete = false;
                }
            }
        }
        self.cidrs.clone().filter(|_| complete)
    }

    /// Puts right what others changed.
    pub fn audit(&mut self) {
        for keeper in &mut self.keepers {
            match keeper.audit() {
                Ok(true) => info!("network policies restored"),
                Ok(false) => {}
                Err(error) => warn!(error = &error as &dyn std::error::Error, "network policies cannot be audited"),
            }
        }
    }

    #[cfg(test)]
    pub fn keepers(&mut self) -> &mut [Keeper<K>] {
        &mut self.keepers
    }

    #[cfg(test)]
    pub fn desired(&mut self, position: usize) -> &super::plan::Desired {
        &self.index.sides()[position].desired
    }
}
