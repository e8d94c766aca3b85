//! Which processors, memory and devices of the node a container gets for itself.
//!
//! Owns the topology of a machine as data, the choice of whole processors ([`CpuPool`]), of memory on NUMA nodes
//! ([`MemoryPool`]) and of devices ([`devices`]), the agreement of all of them on NUMA nodes ([`hints`]), and the text of the
//! state files. Everything but [`Topology::read`] is pure. Owns neither pods nor plugins nor cgroups.

mod cpu;
mod cpuset;
pub mod devices;
pub mod hints;
mod memory;
mod state;
mod topology;

pub use cpu::{CpuError, CpuOptions, CpuPool, Reserved};
pub use cpuset::CpuSet;
pub use memory::{Block, MemoryError, MemoryPool, NodeMemory, Table};
pub use state::{CpuState, MemoryState, StateError};
pub use topology::{Cpu, Topology};
