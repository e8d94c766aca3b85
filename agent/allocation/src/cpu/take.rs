//! Which processors of a free set to take. Pure.

use std::collections::BTreeMap;

use super::pool::CpuOptions;
use crate::cpuset::CpuSet;
use crate::topology::{Cpu, Topology};

/// Takes `count` processors of `free`, close together or spread as the options have it; None when there are not so many.
pub(super) fn take(topology: &Topology, options: &CpuOptions, free: &CpuSet, count: usize) -> Option<CpuSet> {
    if free.len() < count {
        return None;
    }
    if options.distribute_across_numa {
        let group = if options.full_physical { topology.cpus_per_core() } else { 1 };
        if let Some(spread) = distributed(topology, options, free, count, group) {
            return Some(spread);
        }
    }
    Some(packed(topology, options, free, count))
}

/// A choice under way.
struct Taking<'a> {
    topology: &'a Topology,
    free: CpuSet,
    taken: CpuSet,
    count: usize,
}

/// Whole sockets and nodes first, then whole caches where preferred, whole cores, and single threads last.
fn packed(topology: &Topology, options: &CpuOptions, free: &CpuSet, count: usize) -> CpuSet {
    let mut taking = Taking { topology, free: free.clone(), taken: CpuSet::default(), count };
    let all = topology.all();
    let (by_socket, by_node) = (topology.by(&all, |cpu| cpu.socket), topology.by(&all, |cpu| cpu.node));
    // The larger of the two first.
    let levels: [fn(&Cpu) -> u32; 2] = if by_socket.len() <= by_node.len() {
        [|cpu| cpu.socket, |cpu| cpu.node]
    } else {
        [|cpu| cpu.node, |cpu| cpu.socket]
    };
    for level in levels {
        taking.whole(level);
    }
    if options.prefer_cache {
        taking.whole(|cpu| cpu.cache);
        taking.within_one_cache();
    }
    if options.distribute_across_cores {
        taking.one_of_each_core();
    } else {
        taking.whole_cores();
    }
    taking.singles();
    taking.taken
}

impl Taking<'_> {
    fn left(&self) -> usize {
        self.count - self.taken.len()
    }

    fn move_over(&mut self, cpus: &CpuSet) {
        self.free = self.free.minus(cpus);
        self.taken = self.taken.union(cpus);
    }

    /// Takes every unit that is wholly free, as long as it is wholly needed.
    fn whole(&mut self, level: fn(&Cpu) -> u32) {
        let sizes = self.topology.by(&self.topology.all(), level);
        for (unit, cpus) in self.topology.by(&self.free, level) {
            if sizes.get(&unit).is_some_and(|all| all.len() == cpus.len()) && cpus.len() <= self.left() {
                self.move_over(&cpus);
            }
        }
    }

    /// What is left from one cache that has it all, the fullest first.
    fn within_one_cache(&mut self) {
        let mut caches: Vec<CpuSet> = self.topology.by(&self.free, |cpu| cpu.cache).into_values().collect();
        caches.sort_by_key(CpuSet::len);
        let left = self.left();
        let Some(fitting) = caches.into_iter().find(|cpus| left > 0 && cpus.len() >= left) else { return };
        let mut inner = Taking { topology: self.topology, free: fitting, taken: CpuSet::default(), count: left };
        inner.whole_cores();
        inner.singles();
        let chosen = inner.taken;
        self.move_over(&chosen);
    }

    /// Free processors core by core; of sockets, nodes and cores those with the least left first.
    fn cores(&self) -> Vec<CpuSet> {
        let mut cores = Vec::new();
        for socket in fullest_first(self.topology.by(&self.free, |cpu| cpu.socket)) {
            for node in fullest_first(self.topology.by(&socket, |cpu| cpu.node)) {
                cores.extend(fullest_first(self.topology.by(&node, |cpu| cpu.core)));
            }
        }
        cores
    }

    fn whole_cores(&mut self) {
        let sizes = self.topology.by(&self.topology.all(), |cpu| cpu.core);
        let whole = |cpus: &CpuSet| {
            let core = cpus.iter().next().and_then(|cpu| self.topology.cpus.get(&cpu)).map(|cpu| cpu.core);
            core.and_then(|core| sizes.get(&core)).is_some_and(|all| all.len() == cpus.len())
        };
        for cpus in self.cores().into_iter().filter(whole).collect::<Vec<_>>() {
            if cpus.len() <= self.left() {
                self.move_over(&cpus);
            }
        }
    }

    /// One thread of a core after the other, so that as many cores as can be are used.
    fn one_of_each_core(&mut self) {
        while self.left() > 0 {
            for cpus in self.cores().into_iter().take(self.left()).collect::<Vec<_>>() {
                self.move_over(&cpus.iter().take(1).collect());
            }
        }
    }

    fn singles(&mut self) {
        let order: Vec<u32> = self.cores().iter().flat_map(|cpus| cpus.iter().collect::<Vec<_>>()).collect();
        let chosen: CpuSet = order.into_iter().take(self.left()).collect();
        self.move_over(&chosen);
    }
}

fn fullest_first(groups: BTreeMap<u32, CpuSet>) -> Vec<CpuSet> {
    let mut groups: Vec<(u32, CpuSet)> = groups.into_iter().collect();
    groups.sort_by_key(|(number, cpus)| (cpus.len(), *number));
    groups.into_iter().map(|(_, cpus)| cpus).collect()
}

/// Evenly over as few nodes as can hold it, in multiples of `group`; what is left over goes where it evens out what stays free.
fn distributed(topology: &Topology, options: &CpuOptions, free: &CpuSet, count: usize, group: usize) -> Option<CpuSet> {
    if count == 0 || !count.is_multiple_of(group) {
        return None;
    }
    let nodes: Vec<CpuSet> = topology.by(free, |cpu| cpu.node).into_values().collect();
    let choices = 1u32..1 << nodes.len().min(16);
    let mut best: Option<(u32, usize, Vec<usize>)> = None;
    for choice in choices {
        let width = choice.count_ones();
        if best.as_ref().is_some_and(|(found, ..)| *found < width) {
            continue;
        }
        let Some(shares) = even_shares(&nodes, choice, count, group) else { continue };
        let left = nodes.iter().zip(&shares).map(|(cpus, share)| cpus.len() - share);
        let unevenness = left.map(|left| left * left).sum();
        if best.as_ref().is_none_or(|(found, score, _)| (width, unevenness) < (*found, *score)) {
            best = Some((width, unevenness, shares));
        }
    }
    let (_, _, shares) = best?;
    let mut taken = CpuSet::default();
    for (cpus, share) in nodes.iter().zip(shares) {
        taken = taken.union(&packed(topology, options, cpus, share));
    }
    Some(taken)
}

/// How many of each node, when those of `choice` share `count`.
fn even_shares(nodes: &[CpuSet], choice: u32, count: usize, group: usize) -> Option<Vec<usize>> {
    let width = choice.count_ones() as usize;
    let chosen = |place: usize| choice & (1 << place) != 0;
    let each = count / group / width * group;
    let mut shares: Vec<usize> = (0..nodes.len()).map(|place| if chosen(place) { each } else { 0 }).collect();
    if each == 0 || nodes.iter().zip(&shares).any(|(cpus, share)| cpus.len() < *share) {
        return None;
    }
    let mut over = count - each * width;
    while over > 0 {
        let room = |place: &usize| nodes[*place].len() - shares[*place];
        let most =
            (0..nodes.len()).filter(|place| chosen(*place)).max_by_key(|place| (room(place), nodes.len() - place))?;
        if room(&most) < group {
            return None;
        }
        shares[most] += group;
        over -= group;
    }
    Some(shares)
}
