//! What the machine has and what pods may use of it. Reading is apart from the pure part.

use std::collections::BTreeMap;
use std::path::Path;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::{Config, Signal};

/// Thousandths of each resource.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Capacity {
    pub capacity: BTreeMap<String, i64>,
    pub allocatable: BTreeMap<String, i64>,
}

/// What was read of the machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Machine {
    pub cpus: i64,
    pub memory_bytes: i64,
    pub storage_bytes: i64,
    pub swap_bytes: i64,
    /// Total bytes of huge pages by the size's name, such as `hugepages-2Mi`.
    pub hugepages: BTreeMap<String, i64>,
}

impl Capacity {
    /// Capacity, and what is left of it after reservations and hard eviction thresholds.
    pub(crate) fn of(machine: &Machine, config: &Config) -> Self {
        let mut capacity = BTreeMap::from([
            ("cpu".to_owned(), machine.cpus * 1000),
            ("memory".to_owned(), machine.memory_bytes.saturating_mul(1000)),
            ("ephemeral-storage".to_owned(), machine.storage_bytes.saturating_mul(1000)),
            ("pods".to_owned(), max_pods(machine, config) * 1000),
        ]);
        for (name, bytes) in &machine.hugepages {
            capacity.insert(name.clone(), bytes.saturating_mul(1000));
        }
        let mut allocatable = capacity.clone();
        let mut take = |name: &str, milli: i64| {
            if let Some(amount) = allocatable.get_mut(name) {
                *amount = (*amount - milli).max(0);
            }
        };
        let as_milli = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        take("cpu", as_milli(config.reserved_cpu_millis));
        let pages: i64 = machine.hugepages.values().sum();
        // What would have pods ended is not theirs to begin with.
        let floor = |signal: Signal, capacity: i64| config.eviction.hard(signal).map_or(0, |below| below.of(capacity));
        let kept =
            as_milli(config.reserved_memory_bytes).saturating_add(floor(Signal::MemoryAvailable, machine.memory_bytes));
        take("memory", kept.saturating_add(pages).saturating_mul(1000));
        let kept = floor(Signal::NodefsAvailable, machine.storage_bytes);
        let kept = kept.saturating_add(as_milli(config.reserved_storage_bytes));
        take("ephemeral-storage", kept.saturating_mul(1000));
        Self { capacity, allocatable }
    }

    /// With what device plugins have: all devices, and those in order.
    pub(crate) fn with_devices(&self, counts: &BTreeMap<String, (usize, usize)>) -> Self {
        let mut both = self.clone();
        let milli = |count: usize| i64::try_from(count).unwrap_or(i64::MAX).saturating_mul(1000);
        for (resource, (all, healthy)) in counts {
            both.capacity.insert(resource.clone(), milli(*all));
            both.allocatable.insert(resource.clone(), milli(*healthy));
        }
        both
    }

    pub(crate) fn memory_bytes(&self) -> i64 {
        self.capacity.get("memory").copied().unwrap_or(0) / 1000
    }
}

fn max_pods(machine: &Machine, config: &Config) -> i64 {
    match i64::from(config.pods_per_core) {
        0 => i64::from(config.max_pods),
        each => i64::from(config.max_pods).min(each * machine.cpus),
    }
}

/// Amounts as the API shows them.
pub(crate) fn quantities(amounts: &BTreeMap<String, i64>) -> BTreeMap<String, Quantity> {
    let shown = |(name, milli): (&String, &i64)| {
        let text = match name.as_str() {
            "memory" if milli % 1_024_000 == 0 => format!("{}Ki", milli / 1_024_000),
            _ if name.starts_with("hugepages-") && milli % 1000 == 0 => binary(milli / 1000),
            _ if milli % 1000 == 0 => (milli / 1000).to_string(),
            _ => format!("{milli}m"),
        };
        (name.clone(), Quantity(text))
    };
    amounts.iter().map(shown).collect()
}

/// Bytes in the largest binary unit of which they are a whole number.
fn binary(bytes: i64) -> String {
    let units = [(40, "Ti"), (30, "Gi"), (20, "Mi"), (10, "Ki")];
    let whole = units.into_iter().find(|(shift, _)| bytes != 0 && bytes % (1 << shift) == 0);
    whole.map_or_else(|| bytes.to_string(), |(shift, unit)| format!("{}{unit}", bytes >> shift))
}

impl Machine {
    /// Reads the machine; blocks on files.
    pub(crate) fn read(data_dir: &Path) -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, |n| i64::try_from(n.get()).unwrap_or(1));
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let kib = |name: &str| -> Option<i64> {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            line.split_whitespace().next()?.parse().ok()
        };
        let storage_bytes = disk(data_dir).map_or(0, |disk| disk.total_bytes);
        Self {
            cpus,
            memory_bytes: kib("MemTotal").unwrap_or(0) * 1024,
            storage_bytes,
            swap_bytes: kib("SwapTotal").unwrap_or(0) * 1024,
            hugepages: hugepages(Path::new("/sys/kernel/mm/hugepages")),
        }
    }
}

/// Room on a file system.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Disk {
    pub total_bytes: i64,
    pub available_bytes: i64,
    pub inodes: i64,
    pub inodes_free: i64,
}

/// The room on the file system of `path`, or of the nearest directory above it that exists.
pub(crate) fn disk(path: &Path) -> Option<Disk> {
    let existing = path.ancestors().find(|path| path.exists())?;
    let stats = nix::sys::statvfs::statvfs(existing).ok()?;
    let bytes = |blocks: u64| i64::try_from(blocks.saturating_mul(stats.fragment_size())).unwrap_or(i64::MAX);
    Some(Disk {
        total_bytes: bytes(stats.blocks()),
        available_bytes: bytes(stats.blocks_available()),
        inodes: i64::try_from(stats.files()).unwrap_or(i64::MAX),
        inodes_free: i64::try_from(stats.files_available()).unwrap_or(i64::MAX),
    })
}

fn hugepages(dir: &Path) -> BTreeMap<String, i64> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let kib = name.strip_prefix("hugepages-").and_then(|rest| rest.strip_suffix("kB"));
        let Some(kib) = kib.and_then(|kib| kib.parse::<i64>().ok()) else { continue };
        let pages = std::fs::read_to_string(entry.path().join("nr_hugepages")).unwrap_or_default();
        let pages: i64 = pages.trim().parse().unwrap_or(0);
        let size = if kib % (1 << 20) == 0 { format!("{}Gi", kib >> 20) } else { format!("{}Mi", kib >> 10) };
        found.insert(format!("hugepages-{size}"), pages * kib * 1024);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reservations_and_a_twentieth_of_the_disk_are_kept_back() {
        let machine = Machine {
            cpus: 2,
            memory_bytes: 1 << 30,
            storage_bytes: 1000,
            swap_bytes: 0,
            hugepages: [("hugepages-2Mi".to_owned(), 4 << 20)].into(),
        };
        let mut config = Config::new("n", "127.0.0.1".parse().unwrap());
        config.reserved_cpu_millis = 500;
        let capacity = Capacity::of(&machine, &config);
        let (all, left) = (quantities(&capacity.capacity), quantities(&capacity.allocatable));
        assert_eq!((all["cpu"].0.as_str(), left["cpu"].0.as_str()), ("2", "1500m"));
        assert_eq!((all["memory"].0.as_str(), left["memory"].0.as_str()), ("1048576Ki", "942080Ki"));
        assert_eq!(left["ephemeral-storage"].0, "950");
        assert_eq!((all["pods"].0.as_str(), all["hugepages-2Mi"].0.as_str()), ("110", "4Mi"));
    }
}
