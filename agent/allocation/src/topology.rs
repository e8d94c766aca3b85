//! The machine's processors and memory as data, and reading them from sysfs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::cpuset::CpuSet;

/// Where a processor sits. Numbers are unique over the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cpu {
    pub core: u32,
    pub socket: u32,
    pub node: u32,
    /// The group of processors that share the last level of cache.
    pub cache: u32,
}

/// Processors, and memory by NUMA node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Topology {
    pub cpus: BTreeMap<u32, Cpu>,
    /// Bytes by node and kind: `memory`, `hugepages-2Mi`, …
    pub memory: BTreeMap<u32, BTreeMap<String, u64>>,
    /// How far nodes are from each other, by pairs.
    pub distances: BTreeMap<(u32, u32), u32>,
}

impl Topology {
    pub fn all(&self) -> CpuSet {
        self.cpus.keys().copied().collect()
    }

    /// The NUMA nodes that have processors or memory.
    pub fn nodes(&self) -> BTreeSet<u32> {
        self.cpus.values().map(|cpu| cpu.node).chain(self.memory.keys().copied()).collect()
    }

    pub fn node_of(&self, cpu: u32) -> Option<u32> {
        self.cpus.get(&cpu).map(|cpu| cpu.node)
    }

    /// The processors of `set` by some number of theirs.
    pub(crate) fn by(&self, set: &CpuSet, number: impl Fn(&Cpu) -> u32) -> BTreeMap<u32, CpuSet> {
        let mut groups: BTreeMap<u32, CpuSet> = BTreeMap::new();
        for cpu in set.iter() {
            if let Some(place) = self.cpus.get(&cpu) {
                groups.entry(number(place)).or_default().insert(cpu);
            }
        }
        groups
    }

    /// Processors that share a core, on most cores.
    pub fn cpus_per_core(&self) -> usize {
        let cores: BTreeSet<u32> = self.cpus.values().map(|cpu| cpu.core).collect();
        (self.cpus.len() / cores.len().max(1)).max(1)
    }

    /// The sockets on which a node has processors.
    pub(crate) fn sockets_of(&self, nodes: impl Fn(u32) -> bool) -> BTreeSet<u32> {
        self.cpus.values().filter(|cpu| nodes(cpu.node)).map(|cpu| cpu.socket).collect()
    }

    /// Reads `/sys` (or a copy of it); blocks on files. What is missing there counts as one node, one socket, one thread a core.
    pub fn read(sys: &Path) -> Self {
        let mut topology = Self::default();
        let online = list(&sys.join("devices/system/cpu/online"));
        let nodes = node_cpus(&sys.join("devices/system/node"));
        for number in online.iter() {
            let dir = sys.join(format!("devices/system/cpu/cpu{number}"));
            let siblings = [dir.join("topology/core_cpus_list"), dir.join("topology/thread_siblings_list")];
            let first = siblings.iter().filter_map(|path| list(path).iter().next()).next().unwrap_or(number);
            let socket = number_in(&dir.join("topology/physical_package_id")).unwrap_or(0);
            let node = nodes.iter().find(|(_, cpus)| cpus.contains(number)).map_or(0, |(node, _)| *node);
            let cache = last_cache(&dir.join("cache")).unwrap_or(socket);
            topology.cpus.insert(number, Cpu { core: first, socket, node, cache });
        }
        for node in nodes.keys() {
            let dir = sys.join(format!("devices/system/node/node{node}"));
            topology.memory.insert(*node, node_memory(&dir));
            let text = std::fs::read_to_string(dir.join("distance")).unwrap_or_default();
            for (other, distance) in nodes.keys().zip(text.split_whitespace()) {
                if let Ok(distance) = distance.parse() {
                    topology.distances.insert((*node, *other), distance);
                }
            }
        }
        topology
    }
}

fn number_in(path: &Path) -> Option<u32> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn list(path: &Path) -> CpuSet {
    std::fs::read_to_string(path).ok().and_then(|text| text.parse().ok()).unwrap_or_default()
}

/// The processors of each node.
fn node_cpus(dir: &Path) -> BTreeMap<u32, CpuSet> {
    let mut nodes = BTreeMap::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(node) = name.strip_prefix("node").and_then(|number| number.parse::<u32>().ok()) {
            nodes.insert(node, list(&entry.path().join("cpulist")));
        }
    }
    nodes
}

/// The lowest processor that shares the highest level of cache stands for it.
fn last_cache(dir: &Path) -> Option<u32> {
    let mut last: Option<(u32, u32)> = None;
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let Some(level) = number_in(&entry.path().join("level")) else { continue };
        let Some(first) = list(&entry.path().join("shared_cpu_list")).iter().next() else { continue };
        last = last.max(Some((level, first)));
    }
    last.filter(|(level, _)| *level >= 3).map(|(_, first)| first)
}

fn node_memory(dir: &Path) -> BTreeMap<String, u64> {
    let mut memory = BTreeMap::new();
    let text = std::fs::read_to_string(dir.join("meminfo")).unwrap_or_default();
    let total = text.lines().find_map(|line| line.split_once("MemTotal:"));
    let kib: u64 = total.and_then(|(_, rest)| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0);
    let mut pages_bytes = 0;
    for entry in std::fs::read_dir(dir.join("hugepages")).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let size = name.strip_prefix("hugepages-").and_then(|rest| rest.strip_suffix("kB"));
        let Some(size_kib) = size.and_then(|size| size.parse::<u64>().ok()) else { continue };
        let bytes = u64::from(number_in(&entry.path().join("nr_hugepages")).unwrap_or(0)) * size_kib * 1024;
        let shown =
            if size_kib % (1 << 20) == 0 { format!("{}Gi", size_kib >> 20) } else { format!("{}Mi", size_kib >> 10) };
        memory.insert(format!("hugepages-{shown}"), bytes);
        pages_bytes += bytes;
    }
    memory.insert("memory".to_owned(), (kib * 1024).saturating_sub(pages_bytes));
    memory
}

#[cfg(test)]
pub(crate) mod synthetic {
    //! Machines that need not exist.

    use super::*;

    /// The shape of a machine: every socket has as many nodes, and so on.
    #[derive(Debug, Clone, Copy)]
    pub(crate) struct Shape {
        pub sockets: u32,
        pub nodes_per_socket: u32,
        pub cores_per_node: u32,
        pub threads_per_core: u32,
    }

    /// Threads are numbered as Linux does: first one of every core, then the others.
    pub(crate) fn machine(shape: Shape) -> Topology {
        let cores = shape.sockets * shape.nodes_per_socket * shape.cores_per_node;
        let mut topology = Topology::default();
        for thread in 0..shape.threads_per_core {
            for core in 0..cores {
                let node = core / shape.cores_per_node;
                let socket = node / shape.nodes_per_socket;
                let cpu = Cpu { core, socket, node, cache: node * 2 + u32::from(core % shape.cores_per_node >= 2) };
                topology.cpus.insert(thread * cores + core, cpu);
            }
        }
        for node in 0..shape.sockets * shape.nodes_per_socket {
            let memory = BTreeMap::from([("memory".to_owned(), 8 << 30), ("hugepages-2Mi".to_owned(), 1 << 30)]);
            topology.memory.insert(node, memory);
            for other in 0..shape.sockets * shape.nodes_per_socket {
                topology.distances.insert((node, other), 10 + 11 * node.abs_diff(other).min(2));
            }
        }
        topology
    }

    /// Two sockets, a node each, of four cores with two threads: 16 processors.
    pub(crate) fn dual() -> Topology {
        machine(Shape { sockets: 2, nodes_per_socket: 1, cores_per_node: 4, threads_per_core: 2 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_read_from_sysfs() {
        let dir = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = dir.path().join("devices/system").join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        put("cpu/online", "0-3\n");
        for cpu in 0..4 {
            put(&format!("cpu/cpu{cpu}/topology/core_cpus_list"), &format!("{},{}", cpu % 2, cpu % 2 + 2));
            put(&format!("cpu/cpu{cpu}/topology/physical_package_id"), &(cpu % 2).to_string());
            put(&format!("cpu/cpu{cpu}/cache/index3/level"), "3");
            put(&format!("cpu/cpu{cpu}/cache/index3/shared_cpu_list"), &format!("{},{}", cpu % 2, cpu % 2 + 2));
        }
        for node in 0..2 {
            put(&format!("node/node{node}/cpulist"), &format!("{node},{}", node + 2));
            put(&format!("node/node{node}/meminfo"), &format!("Node {node} MemTotal:       4096 kB\n"));
            put(&format!("node/node{node}/hugepages/hugepages-2048kB/nr_hugepages"), "1");
            put(&format!("node/node{node}/distance"), if node == 0 { "10 21" } else { "21 10" });
        }
        let topology = Topology::read(dir.path());
        assert_eq!(topology.cpus[&3], Cpu { core: 1, socket: 1, node: 1, cache: 1 });
        assert_eq!(topology.cpus_per_core(), 2);
        assert_eq!(topology.memory[&1]["hugepages-2Mi"], 2 << 20);
        assert_eq!(topology.memory[&1]["memory"], 2 << 20);
        assert_eq!(topology.distances[&(0, 1)], 21);
    }

    #[test]
    fn this_machine_can_be_read() {
        let topology = Topology::read(Path::new("/sys"));
        assert!(!topology.cpus.is_empty());
        assert!(!topology.nodes().is_empty());
    }
}
