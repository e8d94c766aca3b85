//! [`MemoryPool`]: memory and huge pages of NUMA nodes for containers whose requests are exact.
//!
//! Nodes that have given memory to one container together form a group; after that they give only as this group, and nodes that
//! have given alone give only alone, so that no container's memory is taken from under another's.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::hints::{Hint, Nodes};
use crate::state::MemoryState;

/// Bytes of one kind on one node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Table {
    pub total: u64,
    pub system_reserved: u64,
    pub allocatable: u64,
    pub reserved: u64,
    pub free: u64,
}

/// One node's memory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeMemory {
    pub number_of_assignments: u32,
    pub memory_map: BTreeMap<String, Table>,
    /// The group that the node gives memory in.
    pub cells: Vec<u32>,
}

/// What a container was given of one kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Block {
    #[serde(rename = "numaAffinity")]
    pub nodes: Vec<u32>,
    #[serde(rename = "type")]
    pub kind: String,
    pub size: u64,
}

/// Why memory could not be given. Display is what users read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    #[error("[memorymanager] failed to get the default NUMA affinity, no NUMA nodes with enough memory is available")]
    NoPlace,
    #[error("[memorymanager] failed to find NUMA nodes to extend the current topology hint")]
    CannotExtend,
    #[error("[memorymanager] preferred hint violates NUMA node allocation")]
    Violates,
    #[error("[memorymanager] the machine state is different from the real one")]
    OtherMachine,
    #[error("[memorymanager] {kind} reserved on NUMA node {node}, which has less or does not exist")]
    CannotReserve { node: u32, kind: String },
}

/// Bytes by kind.
pub type Amounts = BTreeMap<String, u64>;

/// A node's memory, and who has which.
#[derive(Debug, Clone, Default)]
pub struct MemoryPool {
    nodes: BTreeMap<u32, NodeMemory>,
    assigned: BTreeMap<String, BTreeMap<String, Vec<Block>>>,
}

impl MemoryPool {
    /// A pool of the machine's `memory` without what is `reserved`, with what was given out before.
    pub fn new(
        memory: &BTreeMap<u32, Amounts>,
        reserved: &BTreeMap<u32, Amounts>,
        saved: Option<MemoryState>,
    ) -> Result<Self, MemoryError> {
        let mut pool = Self::default();
        for (node, kinds) in memory {
            let mut state = NodeMemory { cells: vec![*node], ..Default::default() };
            for (kind, total) in kinds {
                let system_reserved = reserved.get(node).and_then(|kinds| kinds.get(kind)).copied().unwrap_or(0);
                let too_much = || MemoryError::CannotReserve { node: *node, kind: kind.clone() };
                let allocatable = total.checked_sub(system_reserved).ok_or_else(too_much)?;
                let table = Table { total: *total, system_reserved, allocatable, reserved: 0, free: allocatable };
                state.memory_map.insert(kind.clone(), table);
            }
            pool.nodes.insert(*node, state);
        }
        for (node, kinds) in reserved {
            if let Some(kind) =
                kinds.keys().find(|kind| memory.get(node).is_none_or(|known| !known.contains_key(*kind)))
            {
                return Err(MemoryError::CannotReserve { node: *node, kind: kind.clone() });
            }
        }
        match saved {
            Some(saved) => pool.restored(saved),
            None => Ok(pool),
        }
    }

    /// The machine must be the same, apart from what is in use.
    fn restored(self, saved: MemoryState) -> Result<Self, MemoryError> {
        let shape = |nodes: &BTreeMap<u32, NodeMemory>| -> BTreeMap<(u32, String), (u64, u64)> {
            let tables = nodes.iter().flat_map(|(node, state)| state.memory_map.iter().map(move |t| (*node, t)));
            tables.map(|(node, (kind, t))| ((node, kind.clone()), (t.total, t.system_reserved))).collect()
        };
        if shape(&self.nodes) != shape(&saved.nodes) {
            return Err(MemoryError::OtherMachine);
        }
        Ok(Self { nodes: saved.nodes, assigned: saved.assigned })
    }

    pub fn state(&self) -> MemoryState {
        MemoryState { nodes: self.nodes.clone(), assigned: self.assigned.clone() }
    }

    pub fn nodes(&self) -> &BTreeMap<u32, NodeMemory> {
        &self.nodes
    }

    pub fn of(&self, pod: &str, container: &str) -> &[Block] {
        self.assigned.get(pod).and_then(|containers| containers.get(container)).map_or(&[], Vec::as_slice)
    }

    pub fn pods(&self) -> impl Iterator<Item = &str> {
        self.assigned.keys().map(String::as_str)
    }

    fn sum(&self, nodes: Nodes, kind: &str, of: impl Fn(&Table) -> u64) -> u64 {
        nodes.iter().filter_map(|node| self.nodes.get(&node)?.memory_map.get(kind)).map(of).sum()
    }

    /// What containers of the pod that are `done` by then have on exactly these nodes.
    fn reusable(&self, pod: &str, done: &[&str], nodes: Nodes, kind: &str) -> u64 {
        let blocks = done.iter().flat_map(|container| self.of(pod, container));
        let there = |block: &&Block| block.kind == kind && Nodes::of(block.nodes.iter().copied()) == nodes;
        blocks.filter(there).map(|block| block.size).sum()
    }

    /// Whether giving from these nodes together would break up a group, or make one of nodes that already give.
    fn violates(&self, nodes: Nodes) -> bool {
        nodes.iter().any(|node| {
            let Some(state) = self.nodes.get(&node) else { return true };
            let grouped = Nodes::of(state.cells.iter().copied());
            state.number_of_assignments > 0 && grouped != nodes
        })
    }

    fn allowed(&self, pod: &str, done: &[&str], wanted: &Amounts, nodes: Nodes) -> bool {
        let enough = |(kind, size): (&String, &u64)| {
            self.sum(nodes, kind, |table| table.free) + self.reusable(pod, done, nodes, kind) >= *size
        };
        !self.violates(nodes) && wanted.iter().all(enough)
    }

    /// Where the container's memory could come from; the same for every kind.
    pub fn hints(&self, pod: &str, container: &str, wanted: &Amounts, done: &[&str]) -> Vec<Hint> {
        let own = self.of(pod, container);
        if let Some(first) = own.first() {
            let same = own.iter().all(|block| wanted.contains_key(&block.kind));
            let nodes = Some(Nodes::of(first.nodes.iter().copied()));
            return if same { vec![Hint { nodes, preferred: true }] } else { Vec::new() };
        }
        let all = Nodes::of(self.nodes.keys().copied());
        let could = |nodes: &Nodes| {
            wanted.iter().all(|(kind, size)| self.sum(*nodes, kind, |table| table.allocatable) >= *size)
        };
        let subsets: Vec<Nodes> = all.subsets().into_iter().filter(could).collect();
        let least = subsets.iter().map(|nodes| nodes.count()).min().unwrap_or(0);
        let possible = subsets.into_iter().filter(|nodes| self.allowed(pod, done, wanted, *nodes));
        possible.map(|nodes| Hint { nodes: Some(nodes), preferred: nodes.count() == least }).collect()
    }

    /// Gives the container its memory from `nodes`, or from more nodes where these have too little. What it has, it keeps.
    pub fn allocate(
        &mut self,
        pod: &str,
        container: &str,
        wanted: &Amounts,
        nodes: Option<Nodes>,
        done: &[&str],
    ) -> Result<(), MemoryError> {
        let wanted: Amounts = wanted.iter().filter(|(_, size)| **size > 0).map(|(k, s)| (k.clone(), *s)).collect();
        if wanted.is_empty() || !self.of(pod, container).is_empty() {
            return Ok(());
        }
        let hints = self.hints(pod, container, &wanted, done);
        let best = |hints: &mut dyn Iterator<Item = &Hint>| {
            let ordered = hints.min_by_key(|hint| (!hint.preferred, hint.nodes.map_or(0, Nodes::count), hint.nodes));
            ordered.and_then(|hint| hint.nodes)
        };
        let chosen = match nodes {
            None => best(&mut hints.iter()).ok_or(MemoryError::NoPlace)?,
            Some(nodes) if self.allowed(pod, done, &wanted, nodes) => nodes,
            Some(nodes) => {
                let wider = |hint: &&Hint| hint.nodes.is_some_and(|wider| wider.both(nodes) == nodes);
                best(&mut hints.iter().filter(wider)).ok_or(MemoryError::CannotExtend)?
            }
        };
        if self.violates(chosen) {
            return Err(MemoryError::Violates);
        }
        let blocks = self.book(pod, &wanted, chosen, done);
        self.assigned.entry(pod.to_owned()).or_default().insert(container.to_owned(), blocks);
        Ok(())
    }

    fn book(&mut self, pod: &str, wanted: &Amounts, nodes: Nodes, done: &[&str]) -> Vec<Block> {
        let mut blocks = Vec::new();
        for (kind, size) in wanted {
            let reused = self.reusable(pod, done, nodes, kind).min(*size);
            self.hand_on(pod, done, nodes, kind, reused);
            let mut left = size - reused;
            for node in nodes.iter() {
                let Some(table) = self.nodes.get_mut(&node).and_then(|state| state.memory_map.get_mut(kind)) else {
                    continue;
                };
                let part = table.free.min(left);
                table.free -= part;
                table.reserved += part;
                left -= part;
            }
            blocks.push(Block { nodes: nodes.iter().collect(), kind: kind.clone(), size: *size });
        }
        for node in nodes.iter() {
            if let Some(state) = self.nodes.get_mut(&node) {
                state.number_of_assignments += u32::try_from(blocks.len()).unwrap_or(0);
                state.cells = nodes.iter().collect();
            }
        }
        blocks
    }

    /// Takes `size` off the blocks of containers that are done: it is booked once.
    fn hand_on(&mut self, pod: &str, done: &[&str], nodes: Nodes, kind: &str, mut size: u64) {
        let Some(containers) = self.assigned.get_mut(pod) else { return };
        for (_, blocks) in containers.iter_mut().filter(|(name, _)| done.contains(&name.as_str())) {
            for block in blocks.iter_mut() {
                if block.kind == kind && Nodes::of(block.nodes.iter().copied()) == nodes {
                    let part = block.size.min(size);
                    block.size -= part;
                    size -= part;
                }
            }
        }
    }

    /// Takes back everything that the pod has.
    pub fn release(&mut self, pod: &str) {
        for block in self.assigned.remove(pod).unwrap_or_default().into_values().flatten() {
            let mut left = block.size;
            for node in &block.nodes {
                let Some(state) = self.nodes.get_mut(node) else { continue };
                state.number_of_assignments = state.number_of_assignments.saturating_sub(1);
                if state.number_of_assignments == 0 {
                    state.cells = vec![*node];
                }
                if let Some(table) = state.memory_map.get_mut(&block.kind) {
                    let part = table.reserved.min(left);
                    table.reserved -= part;
                    table.free += part;
                    left -= part;
                }
            }
        }
    }

    /// The nodes that a container's processes get their memory from; empty where any will do.
    pub fn nodes_of(&self, pod: &str, container: &str) -> BTreeSet<u32> {
        self.of(pod, container).iter().flat_map(|block| block.nodes.iter().copied()).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GIB: u64 = 1 << 30;

    fn machine(nodes: u32) -> BTreeMap<u32, Amounts> {
        let each = || Amounts::from([("memory".to_owned(), 8 * GIB), ("hugepages-2Mi".to_owned(), GIB)]);
        (0..nodes).map(|node| (node, each())).collect()
    }

    fn pool() -> MemoryPool {
        let reserved = BTreeMap::from([(0, Amounts::from([("memory".to_owned(), GIB)]))]);
        MemoryPool::new(&machine(2), &reserved, None).unwrap()
    }

    fn memory(gib: u64) -> Amounts {
        Amounts::from([("memory".to_owned(), gib * GIB)])
    }

    #[test]
    fn memory_comes_from_one_node_where_one_has_enough() {
        let mut pool = pool();
        pool.allocate("a", "c", &memory(6), None, &[]).unwrap();
        assert_eq!(pool.nodes_of("a", "c"), BTreeSet::from([0]));
        pool.allocate("b", "c", &memory(6), None, &[]).unwrap();
        assert_eq!(pool.nodes_of("b", "c"), BTreeSet::from([1]));
        assert_eq!(pool.allocate("d", "c", &memory(3), None, &[]), Err(MemoryError::NoPlace));
        pool.release("a");
        pool.allocate("d", "c", &memory(3), None, &[]).unwrap();
        assert_eq!(pool.nodes_of("d", "c"), BTreeSet::from([0]));
    }

    #[test]
    fn nodes_that_gave_together_do_not_give_alone() {
        let mut pool = pool();
        pool.allocate("wide", "c", &memory(10), None, &[]).unwrap();
        assert_eq!(pool.nodes_of("wide", "c"), BTreeSet::from([0, 1]));
        let hints = pool.hints("a", "c", &memory(1), &[]);
        assert_eq!(hints, [Hint { nodes: Some(Nodes::of([0, 1])), preferred: false }]);
        pool.release("wide");
        assert!(pool.hints("a", "c", &memory(1), &[]).iter().any(|hint| hint.preferred));
    }

    #[test]
    fn a_place_that_is_too_small_is_widened() {
        let mut pool = pool();
        pool.allocate("a", "c", &memory(10), Some(Nodes::of([1])), &[]).unwrap();
        assert_eq!(pool.nodes_of("a", "c"), BTreeSet::from([0, 1]));
        assert_eq!(
            pool.allocate("b", "c", &memory(1), Some(Nodes::of([0])), &[]).map(|()| pool.nodes_of("b", "c")),
            Ok(BTreeSet::from([0, 1]))
        );
    }

    #[test]
    fn what_an_init_container_had_is_booked_once() {
        let mut pool = pool();
        pool.allocate("a", "init", &memory(4), None, &[]).unwrap();
        pool.allocate("a", "app", &memory(6), Some(Nodes::of([0])), &["init"]).unwrap();
        assert_eq!(pool.nodes()[&0].memory_map["memory"].free, GIB);
        pool.release("a");
        assert_eq!(pool.state(), super::tests::pool().state());
    }

    #[test]
    fn the_state_of_another_machine_is_refused() {
        let state = pool().state();
        assert!(MemoryPool::new(&machine(1), &BTreeMap::new(), Some(state)).is_err());
        let reserved = BTreeMap::from([(7, memory(1))]);
        assert!(matches!(MemoryPool::new(&machine(1), &reserved, None), Err(MemoryError::CannotReserve { .. })));
    }

    proptest! {
        #[test]
        fn no_byte_is_given_twice_or_lost(events in proptest::collection::vec((0u32..5, 0u64..14, 0u64..2), 1..40)) {
            let mut pool = MemoryPool::new(&machine(3), &BTreeMap::new(), None).unwrap();
            let fresh = pool.state();
            for (pod, gib, pages) in events {
                let name = format!("p{pod}");
                if gib == 0 {
                    pool.release(&name);
                } else {
                    let mut wanted = memory(gib);
                    wanted.insert("hugepages-2Mi".to_owned(), pages * GIB);
                    let _ = pool.allocate(&name, "c", &wanted, None, &[]);
                }
                for (kind, most) in [("memory", 8 * GIB), ("hugepages-2Mi", GIB)] {
                    let booked: u64 = pool.nodes().values().map(|node| node.memory_map[kind].reserved).sum();
                    let blocks = pool.assigned.values().flat_map(|pod| pod.values()).flatten();
                    let given: u64 = blocks.filter(|block| block.kind == kind).map(|block| block.size).sum();
                    prop_assert_eq!(booked, given);
                    for node in pool.nodes().values() {
                        prop_assert_eq!(node.memory_map[kind].free + node.memory_map[kind].reserved, most);
                    }
                }
            }
            for pod in 0..5 {
                pool.release(&format!("p{pod}"));
            }
            prop_assert_eq!(pool.state(), fresh);
        }
    }
}
