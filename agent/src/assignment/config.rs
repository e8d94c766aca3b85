//! How the node gives out processors, memory and devices; and why it could not be set up so.

use std::collections::BTreeMap;
use std::path::PathBuf;

use oarlock_allocation::hints::Policy;
use oarlock_allocation::{CpuError, CpuOptions, CpuSet, MemoryError, StateError, Topology};

use crate::node::capacity::Machine;
use crate::{Config, Signal};

/// The cpu, memory and topology managers' settings.
#[derive(Debug, Clone)]
pub struct AssignmentConfig {
    /// cpuManagerPolicy is `static`.
    pub cpu_static: bool,
    pub cpu_options: CpuOptions,
    /// reservedSystemCPUs.
    pub reserved_cpus: Option<CpuSet>,
    /// How often containers' processors are made sure of when nothing tells of a change.
    pub reconcile_period: std::time::Duration,
    /// memoryManagerPolicy is `Static`.
    pub memory_static: bool,
    /// reservedMemory: bytes by NUMA node and kind.
    pub reserved_memory: BTreeMap<u32, BTreeMap<String, u64>>,
    pub topology_policy: Policy,
    /// One place for all containers of a pod.
    pub topology_scope_pod: bool,
    /// prefer-closest-numa-nodes.
    pub prefer_closest: bool,
    /// max-allowable-numa-nodes.
    pub most_nodes: usize,
    /// Where the machine's topology is read.
    pub sys: PathBuf,
}

impl Default for AssignmentConfig {
    fn default() -> Self {
        Self {
            cpu_static: false,
            cpu_options: CpuOptions::default(),
            reserved_cpus: None,
            reconcile_period: std::time::Duration::from_secs(10),
            memory_static: false,
            reserved_memory: BTreeMap::new(),
            topology_policy: Policy::None,
            topology_scope_pod: false,
            prefer_closest: false,
            most_nodes: 8,
            sys: "/sys".into(),
        }
    }
}

/// Why processors, memory or devices cannot be given out as configured.
#[derive(Debug, thiserror::Error)]
pub enum AssignmentError {
    #[error(
        "could not restore state from checkpoint: {source}, please drain this node and delete the {what} checkpoint file {path:?} before restarting Kubelet"
    )]
    State { what: &'static str, path: PathBuf, source: StateError },
    #[error(
        "could not restore state from checkpoint: {source}, please drain this node and delete the CPU manager checkpoint file {path:?} before restarting Kubelet"
    )]
    CpuState { path: PathBuf, source: CpuError },
    #[error(
        "could not restore state from checkpoint: {source}, please drain this node and delete the memory manager checkpoint file {path:?} before restarting Kubelet"
    )]
    MemoryState { path: PathBuf, source: MemoryError },
    #[error(
        "the total amount {given} of type {kind:?} is not equal to the value {expected} determined by Node Allocatable feature"
    )]
    ReservedMemory { kind: String, given: u64, expected: u64 },
    #[error("unsupported on machines with more than {most} NUMA Nodes")]
    TooManyNodes { most: usize },
    #[error("{operation} {}", path.display())]
    Io {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

impl AssignmentConfig {
    /// Checks what only shows on the machine itself.
    pub(super) fn check(&self, config: &Config, machine: &Machine, topology: &Topology) -> Result<(), AssignmentError> {
        if self.topology_policy != Policy::None && topology.nodes().len() > self.most_nodes {
            return Err(AssignmentError::TooManyNodes { most: self.most_nodes });
        }
        if !self.memory_static {
            return Ok(());
        }
        let evicted = config.eviction.hard(Signal::MemoryAvailable).map_or(0, |below| below.of(machine.memory_bytes));
        let expected = config.reserved_memory_bytes.saturating_add(u64::try_from(evicted).unwrap_or(0));
        let given = self.reserved_memory.values().filter_map(|kinds| kinds.get("memory")).sum();
        if given == expected {
            return Ok(());
        }
        Err(AssignmentError::ReservedMemory { kind: "memory".to_owned(), given, expected })
    }
}
