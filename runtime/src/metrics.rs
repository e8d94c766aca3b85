//! The metrics of pods and containers under the names that node monitoring has upstream: which there are, and their
//! values now, read from control groups, `/proc` and file systems.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use nix::sys::statvfs::statvfs;
use oarlock_cgroup::{Cgroup, Stats};
use oarlock_proto::cri::{self, MetricType};

use crate::core::Core;
use crate::error::Error;
use crate::record::{ContainerPhase, ContainerRecord, SandboxRecord};
use crate::state::{blocking, now_nanos};
use crate::stats;

const NANOS: u64 = 1_000_000_000;

/// Labels that every metric has.
const LABELS: &[&str] = &["container", "id", "image", "name", "namespace", "pod"];
const DISK: &[&str] = &["device", "major", "minor"];
const DISK_OPERATION: &[&str] = &["device", "major", "minor", "operation"];
const FAILURE: &[&str] = &["failure_type", "scope"];
const INTERFACE: &[&str] = &["interface"];
const PLAIN: &[&str] = &[];

/// Name, help, kind and further labels.
type Description = (&'static str, &'static str, MetricType, &'static [&'static str]);

use MetricType::{Counter, Gauge};

const METRICS: &[Description] = &[
    ("container_blkio_device_usage_total", "Bytes moved to and from block devices.", Counter, DISK_OPERATION),
    ("container_cpu_cfs_periods_total", "Periods in which the CPU quota was enforced.", Counter, PLAIN),
    ("container_cpu_cfs_throttled_periods_total", "Periods in which the CPU quota was used up.", Counter, PLAIN),
    ("container_cpu_cfs_throttled_seconds_total", "Time held back by the CPU quota.", Counter, PLAIN),
    ("container_cpu_system_seconds_total", "CPU time spent in the kernel.", Counter, PLAIN),
    ("container_cpu_usage_seconds_total", "CPU time spent.", Counter, PLAIN),
    ("container_cpu_user_seconds_total", "CPU time spent outside the kernel.", Counter, PLAIN),
    ("container_file_descriptors", "Open file descriptors.", Gauge, PLAIN),
    ("container_fs_inodes_free", "Free inodes of the file system of writable layers.", Gauge, PLAIN),
    ("container_fs_inodes_total", "Inodes of the file system of writable layers.", Gauge, PLAIN),
    ("container_fs_limit_bytes", "Size of the file system of writable layers.", Gauge, PLAIN),
    ("container_fs_reads_bytes_total", "Bytes read from block devices.", Counter, DISK),
    ("container_fs_reads_total", "Reads from block devices.", Counter, DISK),
    ("container_fs_usage_bytes", "Bytes of the writable layer.", Gauge, PLAIN),
    ("container_fs_writes_bytes_total", "Bytes written to block devices.", Counter, DISK),
    ("container_fs_writes_total", "Writes to block devices.", Counter, DISK),
    ("container_last_seen", "When this was measured, in seconds since the epoch.", Gauge, PLAIN),
    ("container_memory_cache", "Page cache in bytes.", Gauge, PLAIN),
    ("container_memory_failcnt", "Times the memory limit was hit.", Counter, PLAIN),
    ("container_memory_failures_total", "Page faults by kind.", Counter, FAILURE),
    ("container_memory_kernel_usage", "Kernel memory in bytes.", Gauge, PLAIN),
    ("container_memory_mapped_file", "Mapped files in bytes.", Gauge, PLAIN),
    ("container_memory_max_usage_bytes", "Most memory ever used.", Gauge, PLAIN),
    ("container_memory_rss", "Anonymous memory in bytes.", Gauge, PLAIN),
    ("container_memory_swap", "Swap in bytes.", Gauge, PLAIN),
    ("container_memory_usage_bytes", "Memory in bytes, page cache included.", Gauge, PLAIN),
    ("container_memory_working_set_bytes", "Memory without the cache that would be dropped first.", Gauge, PLAIN),
    ("container_network_receive_bytes_total", "Bytes received.", Counter, INTERFACE),
    ("container_network_receive_errors_total", "Errors while receiving.", Counter, INTERFACE),
    ("container_network_receive_packets_dropped_total", "Packets dropped while receiving.", Counter, INTERFACE),
    ("container_network_receive_packets_total", "Packets received.", Counter, INTERFACE),
    ("container_network_transmit_bytes_total", "Bytes sent.", Counter, INTERFACE),
    ("container_network_transmit_errors_total", "Errors while sending.", Counter, INTERFACE),
    ("container_network_transmit_packets_dropped_total", "Packets dropped while sending.", Counter, INTERFACE),
    ("container_network_transmit_packets_total", "Packets sent.", Counter, INTERFACE),
    ("container_oom_events_total", "Processes killed for want of memory.", Counter, PLAIN),
    ("container_processes", "Processes.", Gauge, PLAIN),
    ("container_sockets", "Open sockets.", Gauge, PLAIN),
    ("container_spec_cpu_period", "Length of a CPU quota's period in microseconds.", Gauge, PLAIN),
    ("container_spec_cpu_shares", "CPU shares.", Gauge, PLAIN),
    ("container_spec_memory_limit_bytes", "Memory limit; 0 is none.", Gauge, PLAIN),
    ("container_spec_memory_swap_limit_bytes", "Limit of memory and swap together; 0 is none.", Gauge, PLAIN),
    ("container_start_time_seconds", "When it started, in seconds since the epoch.", Gauge, PLAIN),
    ("container_threads", "Threads.", Gauge, PLAIN),
    ("container_threads_max", "Most threads allowed; 0 is no limit.", Gauge, PLAIN),
];

/// The metrics there are.
pub(crate) fn describe() -> Vec<cri::MetricDescriptor> {
    let one = |(name, help, _, further): &Description| cri::MetricDescriptor {
        name: (*name).to_owned(),
        help: (*help).to_owned(),
        label_keys: LABELS.iter().chain(*further).map(|label| (*label).to_owned()).collect(),
    };
    METRICS.iter().map(one).collect()
}

/// The values of all living sandboxes.
pub(crate) async fn collect(core: &Arc<Core>) -> Result<Vec<cri::PodSandboxMetrics>, Error> {
    let core = core.clone();
    blocking("metrics", move || {
        let records = stats::filtered_sandboxes(&core, None);
        Ok(records.iter().map(|record| of_sandbox(&core, record)).collect())
    })
    .await
}

fn of_sandbox(core: &Core, record: &SandboxRecord) -> cri::PodSandboxMetrics {
    let pod = record.metadata();
    let mut values = Values::new([
        String::new(),
        record.cgroup_parent.clone(),
        String::new(),
        record.id.clone(),
        pod.namespace,
        pod.name,
    ]);
    of_group(&mut values, &record.cgroup_parent);
    of_network(core, &mut values, record);
    let mut members = core.index.containers_of(&record.id);
    members.retain(|container| container.phase() == ContainerPhase::Running);
    cri::PodSandboxMetrics {
        pod_sandbox_id: record.id.clone(),
        metrics: values.metrics,
        container_metrics: members.iter().map(|container| of_container(core, record, &container.record())).collect(),
    }
}

fn of_container(core: &Core, sandbox: &SandboxRecord, record: &ContainerRecord) -> cri::ContainerMetrics {
    let pod = sandbox.metadata();
    let image = record.config.image.as_ref().map(|image| image.image.clone()).unwrap_or_default();
    let labels = [record.metadata().name, record.cgroup.clone(), image, record.id.clone(), pod.namespace, pod.name];
    let mut values = Values::new(labels);
    of_group(&mut values, &record.cgroup);
    of_processes(&mut values, &record.cgroup);
    of_layer(core, &mut values, record);
    let limits = &record.resources;
    let positive = |value: i64| u64::try_from(value).unwrap_or(0);
    values.add("container_spec_cpu_period", positive(limits.cpu_period));
    values.add("container_spec_cpu_shares", positive(limits.cpu_shares));
    values.add("container_spec_memory_limit_bytes", positive(limits.memory_limit_in_bytes));
    values.add("container_spec_memory_swap_limit_bytes", positive(limits.memory_swap_limit_in_bytes));
    values.add("container_start_time_seconds", positive(record.started_at_nanos) / NANOS);
    cri::ContainerMetrics { container_id: record.id.clone(), metrics: values.metrics }
}

/// Values as they are gathered, all with one set of common labels.
struct Values {
    labels: [String; 6],
    now: i64,
    metrics: Vec<cri::Metric>,
}

impl Values {
    fn new(labels: [String; 6]) -> Values {
        let mut values = Values { labels, now: now_nanos(), metrics: Vec::new() };
        values.add("container_last_seen", values.now.unsigned_abs() / NANOS);
        values
    }

    fn add(&mut self, name: &'static str, value: u64) {
        self.add_with(name, &[], value);
    }

    fn add_with(&mut self, name: &'static str, further: &[&str], value: u64) {
        let kind = METRICS.iter().find(|(known, ..)| *known == name).map_or(Gauge, |(_, _, kind, _)| *kind);
        let further = further.iter().map(|label| (*label).to_owned());
        self.metrics.push(cri::Metric {
            name: name.to_owned(),
            timestamp: self.now,
            metric_type: kind as i32,
            label_values: self.labels.iter().cloned().chain(further).collect(),
            value: Some(cri::UInt64Value { value }),
        });
    }
}

fn of_group(values: &mut Values, path: &str) {
    let (Some(stats), Ok(group)) = (stats::measure(path), Cgroup::new(path)) else { return };
    of_stats(values, &stats);
    let v2 = group.layout().is_v2();
    let text = |controller: &str, file: &str| {
        group.dir_of(controller).and_then(|dir| fs::read_to_string(dir.join(file)).ok()).unwrap_or_default()
    };
    let (cpu, memory) = (text("cpu", "cpu.stat"), text("memory", "memory.stat"));
    values.add("container_cpu_cfs_periods_total", keyed(&cpu, "nr_periods"));
    let throttled = if v2 { keyed(&cpu, "throttled_usec") / 1_000_000 } else { keyed(&cpu, "throttled_time") / NANOS };
    values.add("container_cpu_cfs_throttled_seconds_total", throttled);
    let single = |file: &str| text("memory", file).trim().parse().unwrap_or(0);
    let (cache, mapped, failures, kernel, most) = match v2 {
        true => (
            keyed(&memory, "file"),
            keyed(&memory, "file_mapped"),
            keyed(&text("memory", "memory.events"), "max"),
            keyed(&memory, "kernel"),
            single("memory.peak"),
        ),
        false => (
            keyed(&memory, "total_cache"),
            keyed(&memory, "total_mapped_file"),
            single("memory.failcnt"),
            single("memory.kmem.usage_in_bytes"),
            single("memory.max_usage_in_bytes"),
        ),
    };
    values.add("container_memory_cache", cache);
    values.add("container_memory_mapped_file", mapped);
    values.add("container_memory_failcnt", failures);
    values.add("container_memory_kernel_usage", kernel);
    values.add("container_memory_max_usage_bytes", most);
    // "max" is not a number and stands for no limit.
    values.add("container_threads_max", text("pids", "pids.max").trim().parse().unwrap_or(0));
    let disks = match v2 {
        true => disks_v2(&text("io", "io.stat")),
        false => {
            disks_v1(&text("blkio", "blkio.throttle.io_service_bytes"), &text("blkio", "blkio.throttle.io_serviced"))
        }
    };
    for disk in disks {
        of_disk(values, &disk);
    }
}

fn of_stats(values: &mut Values, stats: &Stats) {
    values.add("container_cpu_usage_seconds_total", stats.cpu_usage_nanos / NANOS);
    values.add("container_cpu_user_seconds_total", stats.cpu_user_nanos / NANOS);
    values.add("container_cpu_system_seconds_total", stats.cpu_system_nanos / NANOS);
    values.add("container_cpu_cfs_throttled_periods_total", stats.cpu_throttled_periods);
    values.add("container_memory_usage_bytes", stats.memory_usage_bytes);
    values.add("container_memory_working_set_bytes", stats.memory_working_set_bytes);
    values.add("container_memory_rss", stats.memory_rss_bytes);
    values.add("container_memory_swap", stats.memory_swap_bytes);
    values.add("container_oom_events_total", stats.oom_kills);
    values.add("container_threads", stats.pids);
    for (kind, count) in [("pgfault", stats.page_faults), ("pgmajfault", stats.major_page_faults)] {
        values.add_with("container_memory_failures_total", &[kind, "hierarchy"], count);
    }
}

/// What one block device did for a group.
#[derive(Debug, Default, PartialEq, Eq)]
struct Disk {
    number: String,
    read_bytes: u64,
    written_bytes: u64,
    reads: u64,
    writes: u64,
}

fn of_disk(values: &mut Values, disk: &Disk) {
    let (major, minor) = disk.number.split_once(':').unwrap_or((&disk.number, "0"));
    let device = fs::read_link(format!("/sys/dev/block/{}", disk.number)).ok();
    let device = device.as_deref().and_then(Path::file_name).map(|name| format!("/dev/{}", name.to_string_lossy()));
    let device = device.unwrap_or_default();
    let labels = [device.as_str(), major, minor];
    values.add_with("container_fs_reads_bytes_total", &labels, disk.read_bytes);
    values.add_with("container_fs_writes_bytes_total", &labels, disk.written_bytes);
    values.add_with("container_fs_reads_total", &labels, disk.reads);
    values.add_with("container_fs_writes_total", &labels, disk.writes);
    for (operation, bytes) in [("Read", disk.read_bytes), ("Write", disk.written_bytes)] {
        values.add_with("container_blkio_device_usage_total", &[&device, major, minor, operation], bytes);
    }
}

/// Lines such as `8:0 Read 4096`.
fn disks_v1(bytes: &str, operations: &str) -> Vec<Disk> {
    let mut disks: Vec<Disk> = Vec::new();
    for (text, counts_bytes) in [(bytes, true), (operations, false)] {
        for line in text.lines() {
            let [number, operation, value] = line.split(' ').collect::<Vec<_>>()[..] else { continue };
            let Ok(value) = value.parse() else { continue };
            let disk = entry(&mut disks, number);
            match (operation, counts_bytes) {
                ("Read", true) => disk.read_bytes = value,
                ("Write", true) => disk.written_bytes = value,
                ("Read", false) => disk.reads = value,
                ("Write", false) => disk.writes = value,
                _ => {}
            }
        }
    }
    disks
}

/// Lines such as `8:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0`.
fn disks_v2(text: &str) -> Vec<Disk> {
    let mut disks = Vec::new();
    for line in text.lines() {
        let mut fields = line.split(' ');
        let disk = entry(&mut disks, fields.next().unwrap_or_default());
        for (key, value) in fields.filter_map(|field| field.split_once('=')) {
            let value = value.parse().unwrap_or(0);
            match key {
                "rbytes" => disk.read_bytes = value,
                "wbytes" => disk.written_bytes = value,
                "rios" => disk.reads = value,
                "wios" => disk.writes = value,
                _ => {}
            }
        }
    }
    disks
}

fn entry<'a>(disks: &'a mut Vec<Disk>, number: &str) -> &'a mut Disk {
    let index = disks.iter().position(|disk| disk.number == number).unwrap_or_else(|| {
        disks.push(Disk { number: number.to_owned(), ..Disk::default() });
        disks.len() - 1
    });
    &mut disks[index]
}

fn of_processes(values: &mut Values, path: &str) {
    let pids = Cgroup::new(path).and_then(|group| group.pids()).unwrap_or_default();
    let (mut descriptors, mut sockets) = (0, 0);
    for pid in &pids {
        // A process that ended meanwhile has none.
        for entry in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
            descriptors += 1;
            let target = fs::read_link(entry.path());
            sockets +=
                u64::from(target.is_ok_and(|target| target.as_os_str().as_encoded_bytes().starts_with(b"socket:")));
        }
    }
    values.add("container_processes", pids.len() as u64);
    values.add("container_file_descriptors", descriptors);
    values.add("container_sockets", sockets);
}

fn of_layer(core: &Core, values: &mut Values, record: &ContainerRecord) {
    values.add("container_fs_usage_bytes", core.images.rootfs_usage(&record.id).bytes);
    if let Ok(whole) = statvfs(core.images.root()) {
        values.add("container_fs_limit_bytes", whole.blocks() * whole.fragment_size());
        values.add("container_fs_inodes_total", whole.files());
        values.add("container_fs_inodes_free", whole.files_free());
    }
}

fn of_network(core: &Core, values: &mut Values, record: &SandboxRecord) {
    for interface in stats::interface_counters(core, record) {
        let named = [
            ("container_network_receive_bytes_total", interface.received.bytes),
            ("container_network_receive_packets_total", interface.received.packets),
            ("container_network_receive_errors_total", interface.received.errors),
            ("container_network_receive_packets_dropped_total", interface.received.dropped),
            ("container_network_transmit_bytes_total", interface.sent.bytes),
            ("container_network_transmit_packets_total", interface.sent.packets),
            ("container_network_transmit_errors_total", interface.sent.errors),
            ("container_network_transmit_packets_dropped_total", interface.sent.dropped),
        ];
        for (name, value) in named {
            values.add_with(name, &[&interface.name], value);
        }
    }
}

/// The number after a key at the start of a line; 0 where there is none.
fn keyed(text: &str, key: &str) -> u64 {
    let mut numbers = text.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok());
    numbers.next().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_tell_the_same_of_a_disk() {
        let disk = Disk { number: "8:0".into(), read_bytes: 1, written_bytes: 2, reads: 3, writes: 4 };
        let v1 = disks_v1("8:0 Read 1\n8:0 Write 2\n8:0 Sync 3\nTotal 3\n", "8:0 Read 3\n8:0 Write 4\n");
        assert_eq!(v1, disks_v2("8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n"));
        assert_eq!(v1, [disk]);
    }

    #[test]
    fn a_value_has_as_many_labels_as_its_description() {
        let mut values = Values::new(Default::default());
        of_disk(&mut values, &Disk { number: "8:0".into(), ..Disk::default() });
        of_stats(&mut values, &Stats::default());
        let descriptions = describe();
        for metric in &values.metrics {
            let description = descriptions.iter().find(|description| description.name == metric.name).unwrap();
            assert_eq!(metric.label_values.len(), description.label_keys.len(), "{}", metric.name);
        }
    }

    #[test]
    fn names_are_in_order_and_unique() {
        assert!(METRICS.is_sorted_by(|(a, ..), (b, ..)| a < b));
    }
}
