//! Looking at the machine and at what its pods use. Blocks on files where it says so.

use std::collections::{BTreeMap, HashMap};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use oarlock_proto::cri;

use super::judge::{Reading, Readings};
use super::threshold::Signal;
use crate::node::capacity::disk;
use crate::shared::Shared;
use crate::spec::{self, names};

/// A directory tree is counted for no longer than this; what was found by then counts.
const LONGEST_COUNT: Duration = Duration::from_secs(20);

/// What one container uses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct ContainerUsage {
    pub memory_bytes: Option<u64>,
    /// Its writable layer.
    pub layer_bytes: u64,
    pub log_bytes: u64,
}

/// What one pod uses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct PodUsage {
    /// The working set.
    pub memory_bytes: Option<u64>,
    pub processes: Option<u64>,
    /// Of layers, logs and volumes together.
    pub inodes: u64,
    pub containers: BTreeMap<String, ContainerUsage>,
    /// Bytes of each volume on the node's own disk.
    pub volumes: BTreeMap<String, u64>,
}

impl PodUsage {
    /// Layers, logs and volumes.
    pub(crate) fn disk_bytes(&self) -> u64 {
        self.layers_bytes() + self.without_layers_bytes()
    }

    pub(super) fn layers_bytes(&self) -> u64 {
        self.containers.values().map(|container| container.layer_bytes).sum()
    }

    pub(super) fn without_layers_bytes(&self) -> u64 {
        let logs: u64 = self.containers.values().map(|container| container.log_bytes).sum();
        logs + self.volumes.values().sum::<u64>()
    }
}

/// What the machine has left, and whether images have a file system of their own. Blocks.
pub(super) fn read_node(node_dir: &Path, image_dir: Option<&Path>) -> (Readings, bool) {
    let mut readings = Readings::new();
    readings.extend(memory().map(|reading| (Signal::MemoryAvailable, reading)));
    readings.extend(process_ids().map(|reading| (Signal::PidAvailable, reading)));
    let device = |path: &Path| path.ancestors().find_map(|path| std::fs::metadata(path).ok()).map(|meta| meta.dev());
    let image_dir = image_dir.unwrap_or(node_dir);
    let split = device(node_dir) != device(image_dir);
    for (path, bytes, inodes) in [
        (node_dir, Signal::NodefsAvailable, Signal::NodefsInodesFree),
        (image_dir, Signal::ImagefsAvailable, Signal::ImagefsInodesFree),
    ] {
        let Some(room) = disk(path) else { continue };
        readings.insert(bytes, Reading { available: room.available_bytes, capacity: room.total_bytes });
        // Some file systems make inodes as they go and count none.
        if room.inodes > 0 {
            readings.insert(inodes, Reading { available: room.inodes_free, capacity: room.inodes });
        }
    }
    (readings, split)
}

/// Memory that is free or holds file pages the kernel would drop first: capacity less the working set.
fn memory() -> Option<Reading> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let of = |name: &str| -> Option<i64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse::<i64>().ok().map(|kib| kib * 1024)
    };
    Some(Reading { available: of("MemFree")? + of("Inactive(file)")?, capacity: of("MemTotal")? })
}

fn process_ids() -> Option<Reading> {
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<i64>().ok();
    let most =
        [number("/proc/sys/kernel/pid_max"), number("/proc/sys/kernel/threads-max")].into_iter().flatten().min()?;
    let load = std::fs::read_to_string("/proc/loadavg").ok()?;
    let used: i64 = load.split_whitespace().nth(3)?.split('/').nth(1)?.parse().ok()?;
    Some(Reading { available: most - used, capacity: most })
}

/// Where the runtime keeps images.
pub(super) async fn image_dir(shared: &Shared) -> Option<PathBuf> {
    let info = shared.runtime.image_fs_info().await.ok()?;
    let mount = info.image_filesystems.first()?.fs_id.as_ref()?.mountpoint.clone();
    (!mount.is_empty()).then(|| PathBuf::from(mount))
}

/// Bytes and inodes of a directory tree, on its own file system, links not followed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Tree {
    pub bytes: u64,
    pub inodes: u64,
}

/// Counts a tree. Blocks.
pub(super) fn count(root: &Path) -> Tree {
    let mut tree = Tree::default();
    let Ok(top) = std::fs::symlink_metadata(root) else { return tree };
    let until = Instant::now() + LONGEST_COUNT;
    let mut pending = vec![root.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            if meta.dev() != top.dev() {
                continue;
            }
            tree.bytes += meta.blocks() * 512;
            tree.inodes += 1;
            if meta.is_dir() {
                pending.push(entry.path());
            }
        }
        if Instant::now() > until {
            break;
        }
    }
    tree
}

/// The directories of a pod that are to be counted: logs by container, volumes by name.
#[derive(Debug, Clone, Default)]
pub(super) struct Places {
    pub logs: Vec<(String, PathBuf)>,
    pub volumes: Vec<(String, PathBuf)>,
}

impl Places {
    pub(super) fn of(shared: &Shared, pod: &k8s_openapi::api::core::v1::Pod) -> Places {
        let log_dir = shared.log_dir(pod);
        let spec = pod.spec.clone().unwrap_or_default();
        let containers = spec.init_containers.iter().flatten().chain(&spec.containers);
        Places {
            logs: containers.map(|container| (container.name.clone(), log_dir.join(&container.name))).collect(),
            volumes: shared.volumes.disk_volumes(pod),
        }
    }
}

/// Usage of all pods by UID, as far as the runtime tells it.
pub(super) async fn from_runtime(shared: &Shared) -> HashMap<String, PodUsage> {
    let mut pods: HashMap<String, PodUsage> = HashMap::new();
    let number = |value: &Option<cri::UInt64Value>| value.as_ref().map(|value| value.value);
    for stats in shared.runtime.sandbox_stats().await.unwrap_or_default() {
        let Some(metadata) = stats.attributes.as_ref().and_then(|a| a.metadata.as_ref()) else { continue };
        let Some(linux) = &stats.linux else { continue };
        let usage = pods.entry(metadata.uid.clone()).or_default();
        usage.memory_bytes = linux.memory.as_ref().and_then(|memory| number(&memory.working_set_bytes));
        usage.processes = linux.process.as_ref().and_then(|process| number(&process.process_count));
    }
    for stats in shared.runtime.container_stats().await.unwrap_or_default() {
        let label = |name: &str| stats.attributes.as_ref().and_then(|a| a.labels.get(name)).cloned();
        let (Some(uid), Some(name)) = (label(names::POD_UID), label(names::CONTAINER_NAME)) else { continue };
        let usage = pods.entry(uid).or_default();
        let container = usage.containers.entry(name).or_default();
        container.memory_bytes = stats.memory.as_ref().and_then(|memory| number(&memory.working_set_bytes));
        if let Some(layer) = &stats.writable_layer {
            container.layer_bytes += number(&layer.used_bytes).unwrap_or(0);
            usage.inodes += number(&layer.inodes_used).unwrap_or(0);
        }
    }
    pods
}

/// Adds what logs and volumes take. Blocks.
pub(super) fn add_places(usage: &mut PodUsage, places: &Places) {
    for (container, path) in &places.logs {
        let tree = count(path);
        usage.containers.entry(container.clone()).or_default().log_bytes = tree.bytes;
        usage.inodes += tree.inodes;
    }
    for (volume, path) in &places.volumes {
        let tree = count(path);
        usage.volumes.insert(volume.clone(), tree.bytes);
        usage.inodes += tree.inodes;
    }
}

/// Usage of every pod, files included.
pub(crate) async fn of_all(shared: &Shared) -> HashMap<String, PodUsage> {
    let mut pods = from_runtime(shared).await;
    let places: Vec<(String, Places)> = shared
        .table
        .all()
        .iter()
        .map(|entry| (spec::pod_uid(&entry.pod).to_owned(), Places::of(shared, &entry.pod)))
        .collect();
    let count = move || {
        for (uid, places) in places {
            if let Some(usage) = pods.get_mut(&uid) {
                add_places(usage, &places);
            }
        }
        pods
    };
    tokio::task::spawn_blocking(count).await.unwrap_or_default()
}

/// The pod's name for logs.
pub(super) fn shown(pod: &k8s_openapi::api::core::v1::Pod) -> String {
    format!("{}/{}", spec::pod_namespace(pod), spec::pod_name(pod))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_counted_without_following_links() {
        let dir = tempfile::tempdir().expect("a directory");
        let (inner, outside) = (dir.path().join("a/b"), dir.path().join("outside"));
        std::fs::create_dir_all(&inner).unwrap();
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("large"), vec![1; 1 << 20]).unwrap();
        std::fs::write(inner.join("file"), vec![1; 100_000]).unwrap();
        std::os::unix::fs::symlink(&outside, inner.join("link")).unwrap();
        let tree = count(&dir.path().join("a"));
        assert_eq!(tree.inodes, 3);
        assert!((98_304..200_000).contains(&tree.bytes), "{tree:?}");
        assert_eq!(count(&dir.path().join("absent")), Tree::default());
    }

    #[test]
    fn this_machine_can_be_read() {
        let dir = tempfile::tempdir().expect("a directory");
        let (readings, split) = read_node(dir.path(), None);
        assert!(!split);
        for signal in [Signal::MemoryAvailable, Signal::NodefsAvailable, Signal::ImagefsAvailable, Signal::PidAvailable]
        {
            let reading = readings[&signal];
            assert!(reading.available > 0 && reading.available <= reading.capacity, "{signal:?} {reading:?}");
        }
    }
}
