//! [`CpuPool`]: the processors that all containers share, and those that one container has to itself.

use std::collections::BTreeMap;

use super::take::take;
use crate::cpuset::CpuSet;
use crate::hints::{Hint, Nodes, places};
use crate::state::CpuState;
use crate::topology::Topology;

/// cpuManagerPolicyOptions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuOptions {
    /// full-pcpus-only: whole cores or nothing.
    pub full_physical: bool,
    /// distribute-cpus-across-numa.
    pub distribute_across_numa: bool,
    /// align-by-socket.
    pub align_by_socket: bool,
    /// distribute-cpus-across-cores.
    pub distribute_across_cores: bool,
    /// strict-cpu-reservation: reserved processors are not shared either.
    pub strict_reservation: bool,
    /// prefer-align-cpus-by-uncorecache.
    pub prefer_cache: bool,
}

impl CpuOptions {
    /// By upstream's names; Err is the option that is wrong and why.
    pub fn named(options: &BTreeMap<String, String>) -> Result<Self, (String, String)> {
        let mut found = Self::default();
        for (name, text) in options {
            let value = match text.as_str() {
                "true" | "1" | "t" | "T" | "TRUE" | "True" => true,
                "false" | "0" | "f" | "F" | "FALSE" | "False" => false,
                _ => return Err((name.clone(), format!("{text:?} is neither true nor false"))),
            };
            let option = match name.as_str() {
                "full-pcpus-only" => &mut found.full_physical,
                "distribute-cpus-across-numa" => &mut found.distribute_across_numa,
                "align-by-socket" => &mut found.align_by_socket,
                "distribute-cpus-across-cores" => &mut found.distribute_across_cores,
                "strict-cpu-reservation" => &mut found.strict_reservation,
                "prefer-align-cpus-by-uncorecache" => &mut found.prefer_cache,
                _ => return Err((name.clone(), "is not an option of the static policy".to_owned())),
            };
            *option = value;
        }
        let clash = |problem: &str| Err(("distribute-cpus-across-cores".to_owned(), problem.to_owned()));
        if found.distribute_across_cores && found.full_physical {
            return clash("cannot be used together with full-pcpus-only");
        }
        if found.distribute_across_cores && found.distribute_across_numa {
            return clash("cannot be used together with distribute-cpus-across-numa");
        }
        if found.prefer_cache && found.distribute_across_cores {
            return clash("cannot be used together with prefer-align-cpus-by-uncorecache");
        }
        if found.prefer_cache && found.distribute_across_numa {
            let problem = "cannot be used together with distribute-cpus-across-numa".to_owned();
            return Err(("prefer-align-cpus-by-uncorecache".to_owned(), problem));
        }
        Ok(found)
    }
}

/// What is kept from containers that ask for whole processors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reserved {
    /// So many thousandths, rounded up to whole ones.
    Milli(u64),
    These(CpuSet),
}

/// Why processors could not be given. Display is what users read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CpuError {
    #[error("not enough cpus available to satisfy request: requested={requested}, available={available}")]
    NotEnough { requested: usize, available: usize },
    #[error("SMT Alignment Error: requested {requested} cpus not multiple cpus per core = {per_core}")]
    NotWholeCores { requested: usize, per_core: usize },
    #[error(
        "SMT Alignment Error: not enough free physical CPUs: available physical CPUs = {available}, requested CPUs = {requested}, CPUs per core = {per_core}"
    )]
    NotEnoughCores { requested: usize, available: usize, per_core: usize },
    #[error(
        "the static policy needs some cpu to be reserved for the system: kubeReserved, systemReserved or reservedSystemCPUs"
    )]
    NothingReserved,
    #[error("unable to reserve the required amount of CPUs (size of {reserved} did not equal {wanted})")]
    CannotReserve { reserved: usize, wanted: usize },
    #[error("current set of available CPUs \"{now}\" doesn't match with CPUs in state \"{saved}\"")]
    OtherMachine { now: CpuSet, saved: CpuSet },
    #[error("pod: {pod}, container: {container} cpuset: \"{cpus}\" overlaps with the shared cpuset \"{shared}\"")]
    Overlap { pod: String, container: String, cpus: CpuSet, shared: CpuSet },
}

impl CpuError {
    /// Whether this is about whole cores.
    pub fn is_alignment(&self) -> bool {
        matches!(self, CpuError::NotWholeCores { .. } | CpuError::NotEnoughCores { .. })
    }
}

/// The processors of a node, and who has which.
#[derive(Debug, Clone)]
pub struct CpuPool {
    topology: Topology,
    options: CpuOptions,
    reserved: CpuSet,
    shared: CpuSet,
    assigned: BTreeMap<String, BTreeMap<String, CpuSet>>,
}

impl CpuPool {
    /// A pool with what was given out before, if anything was.
    pub fn new(
        topology: Topology,
        options: CpuOptions,
        reserved: &Reserved,
        saved: Option<CpuState>,
    ) -> Result<Self, CpuError> {
        let all = topology.all();
        let reserved = match reserved {
            Reserved::These(cpus) if cpus.is_empty() => return Err(CpuError::NothingReserved),
            Reserved::Milli(0) => return Err(CpuError::NothingReserved),
            Reserved::These(cpus) if cpus.is_subset(&all) => cpus.clone(),
            Reserved::These(cpus) => {
                return Err(CpuError::CannotReserve { reserved: cpus.both(&all).len(), wanted: cpus.len() });
            }
            Reserved::Milli(milli) => {
                let wanted = usize::try_from(milli.div_ceil(1000)).unwrap_or(usize::MAX);
                let plain = CpuOptions::default();
                take(&topology, &plain, &all, wanted).ok_or(CpuError::CannotReserve { reserved: all.len(), wanted })?
            }
        };
        let shared = if options.strict_reservation { all.minus(&reserved) } else { all };
        let mut pool = Self { topology, options, reserved, shared, assigned: BTreeMap::new() };
        if let Some(saved) = saved {
            pool.restore(saved)?;
        }
        Ok(pool)
    }

    fn restore(&mut self, saved: CpuState) -> Result<(), CpuError> {
        let mut known = saved.shared.clone();
        for (pod, containers) in &saved.assigned {
            for (container, cpus) in containers {
                if !cpus.both(&saved.shared).is_empty() {
                    return Err(CpuError::Overlap {
                        pod: pod.clone(),
                        container: container.clone(),
                        cpus: cpus.clone(),
                        shared: saved.shared,
                    });
                }
                known = known.union(cpus);
            }
        }
        let expected = self.shared.clone();
        if known != expected {
            return Err(CpuError::OtherMachine { now: expected, saved: known });
        }
        self.shared = saved.shared;
        self.assigned = saved.assigned;
        Ok(())
    }

    pub fn state(&self) -> CpuState {
        CpuState { shared: self.shared.clone(), assigned: self.assigned.clone() }
    }

    /// The processors that containers without own ones run on.
    pub fn shared(&self) -> &CpuSet {
        &self.shared
    }

    pub fn reserved(&self) -> &CpuSet {
        &self.reserved
    }

    /// All that may ever be given to one container alone.
    pub fn allocatable(&self) -> CpuSet {
        self.topology.all().minus(&self.reserved)
    }

    pub fn of(&self, pod: &str, container: &str) -> Option<&CpuSet> {
        self.assigned.get(pod)?.get(container)
    }

    pub fn pods(&self) -> impl Iterator<Item = &str> {
        self.assigned.keys().map(String::as_str)
    }

    /// What is free to be given to one container alone.
    pub fn available(&self) -> CpuSet {
        let free = self.shared.minus(&self.reserved);
        if !self.options.full_physical {
            return free;
        }
        let cores = self.topology.by(&self.topology.all(), |cpu| cpu.core);
        free.filter(|cpu| {
            let core = self.topology.cpus.get(&cpu).and_then(|cpu| cores.get(&cpu.core));
            core.is_some_and(|whole| whole.is_subset(&free))
        })
    }

    /// Where `wanted` processors could come from, `reusable` ones of the same pod among them in any case.
    pub fn hints(&self, pod: &str, container: &str, wanted: usize, reusable: &CpuSet) -> Vec<Hint> {
        let (free, reusable) = match self.of(pod, container) {
            Some(own) if own.len() == wanted => (CpuSet::default(), own.clone()),
            Some(_) => return Vec::new(),
            None => (self.available(), reusable.clone()),
        };
        let on = |cpus: &CpuSet, nodes: Nodes| {
            cpus.iter().filter(|cpu| self.topology.node_of(*cpu).is_some_and(|node| nodes.contains(node))).count()
                as u64
        };
        let (all, free) = (self.topology.all(), free.minus(&reusable));
        let mut hints = places(
            &self.topology.nodes(),
            wanted as u64,
            |nodes| on(&all, nodes),
            |nodes| {
                let reused = on(&reusable, nodes);
                (reused == reusable.len() as u64).then(|| reused + on(&free, nodes))
            },
        );
        if self.options.align_by_socket {
            // As few sockets as can be are as good as few nodes.
            let sockets = |hint: &Hint| {
                let nodes = hint.nodes.unwrap_or_default();
                self.topology.sockets_of(|node| nodes.contains(node)).len()
            };
            let least = hints.iter().map(sockets).min().unwrap_or(0);
            for hint in &mut hints {
                hint.preferred = sockets(hint) == least;
            }
        }
        hints
    }

    /// Gives `wanted` processors to the container, from `nodes` as far as they have some. What it has already, it keeps.
    pub fn allocate(
        &mut self,
        pod: &str,
        container: &str,
        wanted: usize,
        nodes: Option<Nodes>,
        reusable: &CpuSet,
    ) -> Result<CpuSet, CpuError> {
        if let Some(own) = self.of(pod, container) {
            return Ok(own.clone());
        }
        self.check_cores(wanted, reusable)?;
        let free = self.available().union(reusable);
        let near = self.near(&free, nodes);
        let short = CpuError::NotEnough { requested: wanted, available: free.len() };
        if free.len() < wanted {
            return Err(short);
        }
        // What another container of the pod is done with comes first.
        let mut taken =
            self.take(&reusable.both(&near), reusable.both(&near).len().min(wanted)).ok_or_else(|| short.clone())?;
        let more = near.minus(&taken);
        let count = more.len().min(wanted - taken.len());
        taken = taken.union(&self.take(&more, count).ok_or_else(|| short.clone())?);
        let rest = self.take(&free.minus(&taken), wanted - taken.len()).ok_or(short)?;
        taken = taken.union(&rest);
        self.shared = self.shared.minus(&taken);
        self.assigned.entry(pod.to_owned()).or_default().insert(container.to_owned(), taken.clone());
        Ok(taken)
    }

    fn take(&self, free: &CpuSet, count: usize) -> Option<CpuSet> {
        take(&self.topology, &self.options, free, count)
    }

    fn near(&self, free: &CpuSet, nodes: Option<Nodes>) -> CpuSet {
        let Some(nodes) = nodes else { return free.clone() };
        if self.options.align_by_socket {
            let sockets = self.topology.sockets_of(|node| nodes.contains(node));
            return free.filter(|cpu| self.topology.cpus.get(&cpu).is_some_and(|cpu| sockets.contains(&cpu.socket)));
        }
        free.filter(|cpu| self.topology.node_of(cpu).is_some_and(|node| nodes.contains(node)))
    }

    fn check_cores(&self, wanted: usize, reusable: &CpuSet) -> Result<(), CpuError> {
        if !self.options.full_physical {
            return Ok(());
        }
        let per_core = self.topology.cpus_per_core();
        if !wanted.is_multiple_of(per_core) {
            return Err(CpuError::NotWholeCores { requested: wanted, per_core });
        }
        let available = self.available().union(reusable).len();
        if wanted > available {
            return Err(CpuError::NotEnoughCores { requested: wanted, available, per_core });
        }
        Ok(())
    }

    /// Takes back everything that the pod has.
    pub fn release(&mut self, pod: &str) {
        for (_, cpus) in self.assigned.remove(pod).unwrap_or_default() {
            self.shared = self.shared.union(&cpus);
        }
    }
}

#[cfg(test)]
#[path = "pool_tests.rs"]
mod tests;
