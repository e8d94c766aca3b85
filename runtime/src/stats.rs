//! Measures containers and sandboxes from their control groups, layers and interfaces.

use std::sync::Arc;

use oarlock_cgroup::{Cgroup, Stats};
use oarlock_proto::cri;

use crate::core::Core;
use crate::error::Error;
use crate::record::{ContainerPhase, ContainerRecord, SandboxPhase, SandboxRecord};
use crate::state::{Container, blocking, now_nanos};
use crate::view;

/// Two measurements closer than this say nothing about a rate.
const RATE_WINDOW_NANOS: i64 = 100_000_000;

/// Measures many containers on one worker.
pub(crate) async fn containers(
    core: &Arc<Core>,
    containers: Vec<Arc<Container>>,
) -> Result<Vec<cri::ContainerStats>, Error> {
    let core = core.clone();
    blocking("statistics", move || Ok(containers.iter().map(|container| container_stats(&core, container)).collect()))
        .await
}

/// Measures sandboxes with their containers.
pub(crate) async fn sandboxes(
    core: &Arc<Core>,
    records: Vec<Arc<SandboxRecord>>,
) -> Result<Vec<cri::PodSandboxStats>, Error> {
    let core = core.clone();
    blocking("statistics", move || Ok(records.iter().map(|record| sandbox_stats(&core, record)).collect())).await
}

/// The sandboxes of a statistics filter: only living ones use anything.
pub(crate) fn filtered_sandboxes(core: &Core, filter: Option<&cri::PodSandboxStatsFilter>) -> Vec<Arc<SandboxRecord>> {
    let filter = filter.map(|filter| cri::PodSandboxFilter {
        id: filter.id.clone(),
        label_selector: filter.label_selector.clone(),
        state: None,
    });
    let mut records = view::sandboxes(core, filter.as_ref());
    records.retain(|record| record.phase == SandboxPhase::Ready);
    records
}

/// The containers of a statistics filter: those that run.
pub(crate) fn filtered_containers(core: &Core, filter: Option<&cri::ContainerStatsFilter>) -> Vec<Arc<Container>> {
    let filter = filter.map(|filter| cri::ContainerFilter {
        id: filter.id.clone(),
        pod_sandbox_id: filter.pod_sandbox_id.clone(),
        label_selector: filter.label_selector.clone(),
        state: None,
    });
    let mut containers = view::containers(core, filter.as_ref());
    containers.retain(|container| container.phase() == ContainerPhase::Running);
    containers
}

fn container_stats(core: &Core, container: &Container) -> cri::ContainerStats {
    let record = container.record();
    let now = now_nanos();
    let stats = measure(&record.cgroup);
    let rate = stats.and_then(|stats| rate(container, now, stats.cpu_usage_nanos));
    cri::ContainerStats {
        attributes: Some(attributes(&record)),
        cpu: stats.map(|stats| cpu(&stats, rate, now)),
        memory: stats.map(|stats| memory(&stats, now)),
        writable_layer: Some(writable_layer(core, &record, now)),
        swap: stats.map(|stats| cri::SwapUsage {
            timestamp: now,
            swap_available_bytes: None,
            swap_usage_bytes: value(stats.memory_swap_bytes),
        }),
        io: None,
    }
}

fn measure(group: &str) -> Option<Stats> {
    let group = Cgroup::new(group).ok().filter(Cgroup::exists)?;
    group.stats().ok()
}

fn rate(container: &Container, now: i64, usage: u64) -> Option<u64> {
    let mut sample = container.cpu_sample.lock();
    let Some((then, before)) = *sample else {
        *sample = Some((now, usage));
        return None;
    };
    let elapsed = now - then;
    if elapsed < RATE_WINDOW_NANOS {
        return None;
    }
    *sample = Some((now, usage));
    Some(per_second(usage.saturating_sub(before), elapsed.unsigned_abs()))
}

fn per_second(amount: u64, elapsed_nanos: u64) -> u64 {
    u64::try_from(u128::from(amount) * 1_000_000_000 / u128::from(elapsed_nanos.max(1))).unwrap_or(u64::MAX)
}

fn value(value: u64) -> Option<cri::UInt64Value> {
    Some(cri::UInt64Value { value })
}

fn cpu(stats: &Stats, rate: Option<u64>, now: i64) -> cri::CpuUsage {
    cri::CpuUsage {
        timestamp: now,
        usage_core_nano_seconds: value(stats.cpu_usage_nanos),
        usage_nano_cores: rate.and_then(value),
        psi: None,
    }
}

fn memory(stats: &Stats, now: i64) -> cri::MemoryUsage {
    let available = stats.memory_limit_bytes.map(|limit| limit.saturating_sub(stats.memory_working_set_bytes));
    cri::MemoryUsage {
        timestamp: now,
        working_set_bytes: value(stats.memory_working_set_bytes),
        available_bytes: available.and_then(value),
        usage_bytes: value(stats.memory_usage_bytes),
        rss_bytes: value(stats.memory_rss_bytes),
        page_faults: value(stats.page_faults),
        major_page_faults: value(stats.major_page_faults),
        psi: None,
    }
}

fn attributes(record: &ContainerRecord) -> cri::ContainerAttributes {
    cri::ContainerAttributes {
        id: record.id.clone(),
        metadata: record.config.metadata.clone(),
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
    }
}

fn writable_layer(core: &Core, record: &ContainerRecord, now: i64) -> cri::FilesystemUsage {
    let usage = core.images.rootfs_usage(&record.id);
    cri::FilesystemUsage {
        timestamp: now,
        fs_id: Some(cri::FilesystemIdentifier { mountpoint: core.images.root().to_string_lossy().into_owned() }),
        used_bytes: value(usage.bytes),
        inodes_used: value(usage.inodes),
    }
}

fn sandbox_stats(core: &Core, record: &SandboxRecord) -> cri::PodSandboxStats {
    let now = now_nanos();
    let stats = measure(&record.cgroup_parent);
    let mut members = core.index.containers_of(&record.id);
    members.retain(|container| container.phase() == ContainerPhase::Running);
    cri::PodSandboxStats {
        attributes: Some(cri::PodSandboxAttributes {
            id: record.id.clone(),
            metadata: record.config.metadata.clone(),
            labels: record.config.labels.clone(),
            annotations: record.config.annotations.clone(),
        }),
        linux: Some(cri::LinuxPodSandboxStats {
            cpu: stats.map(|stats| cpu(&stats, None, now)),
            memory: stats.map(|stats| memory(&stats, now)),
            network: network(core, record, now),
            process: stats.map(|stats| cri::ProcessUsage { timestamp: now, process_count: value(stats.pids) }),
            containers: members.iter().map(|container| container_stats(core, container)).collect(),
            io: None,
        }),
        windows: None,
    }
}

fn network(core: &Core, record: &SandboxRecord, now: i64) -> Option<cri::NetworkUsage> {
    if record.host_network {
        return None;
    }
    let netns = core.paths.sandbox(&record.id).namespaces().join("net");
    let table = oarlock_netns::run_in(&netns, || std::fs::read_to_string("/proc/thread-self/net/dev")).ok()?.ok()?;
    let mut interfaces = interfaces(&table);
    let default =
        interfaces.iter().position(|interface| interface.name == "eth0").map(|index| interfaces.remove(index));
    Some(cri::NetworkUsage { timestamp: now, default_interface: default, interfaces })
}

/// Reads `/proc/net/dev`; loopback is nobody's business.
fn interfaces(table: &str) -> Vec<cri::NetworkInterfaceUsage> {
    let parse = |line: &str| {
        let (name, numbers) = line.split_once(':')?;
        let numbers: Vec<u64> = numbers.split_ascii_whitespace().filter_map(|number| number.parse().ok()).collect();
        let at = |index: usize| numbers.get(index).copied().and_then(value);
        Some(cri::NetworkInterfaceUsage {
            name: name.trim().to_owned(),
            rx_bytes: at(0),
            rx_errors: at(2),
            tx_bytes: at(8),
            tx_errors: at(10),
        })
    };
    table.lines().skip(2).filter_map(parse).filter(|interface| interface.name != "lo").collect()
}

/// A metric as [`describe`] lists it: name, help, kind and how it is read.
struct Metric {
    name: &'static str,
    help: &'static str,
    kind: cri::MetricType,
    read: fn(&Stats) -> u64,
}

/// What is told of every container, under the names that node metrics have upstream.
const METRICS: &[Metric] = &[
    Metric {
        name: "container_cpu_usage_seconds_total",
        help: "Cumulative cpu time consumed in seconds.",
        kind: cri::MetricType::Counter,
        read: |stats| stats.cpu_usage_nanos / 1_000_000_000,
    },
    Metric {
        name: "container_cpu_user_seconds_total",
        help: "Cumulative user cpu time consumed in seconds.",
        kind: cri::MetricType::Counter,
        read: |stats| stats.cpu_user_nanos / 1_000_000_000,
    },
    Metric {
        name: "container_cpu_system_seconds_total",
        help: "Cumulative system cpu time consumed in seconds.",
        kind: cri::MetricType::Counter,
        read: |stats| stats.cpu_system_nanos / 1_000_000_000,
    },
    Metric {
        name: "container_cpu_cfs_throttled_periods_total",
        help: "Number of throttled period intervals.",
        kind: cri::MetricType::Counter,
        read: |stats| stats.cpu_throttled_periods,
    },
    Metric {
        name: "container_memory_usage_bytes",
        help: "Current memory usage in bytes, including all memory regardless of when it was accessed.",
        kind: cri::MetricType::Gauge,
        read: |stats| stats.memory_usage_bytes,
    },
    Metric {
        name: "container_memory_working_set_bytes",
        help: "Current working set in bytes.",
        kind: cri::MetricType::Gauge,
        read: |stats| stats.memory_working_set_bytes,
    },
    Metric {
        name: "container_memory_rss",
        help: "Size of RSS in bytes.",
        kind: cri::MetricType::Gauge,
        read: |stats| stats.memory_rss_bytes,
    },
    Metric {
        name: "container_memory_swap",
        help: "Container swap usage in bytes.",
        kind: cri::MetricType::Gauge,
        read: |stats| stats.memory_swap_bytes,
    },
    Metric {
        name: "container_oom_events_total",
        help: "Count of out of memory events observed for the container.",
        kind: cri::MetricType::Counter,
        read: |stats| stats.oom_kills,
    },
    Metric {
        name: "container_processes",
        help: "Number of processes running inside the container.",
        kind: cri::MetricType::Gauge,
        read: |stats| stats.pids,
    },
];

/// The metrics there are.
pub(crate) fn describe() -> Vec<cri::MetricDescriptor> {
    let labels = ["id", "name"].map(str::to_owned).to_vec();
    let one = |metric: &Metric| cri::MetricDescriptor {
        name: metric.name.to_owned(),
        help: metric.help.to_owned(),
        label_keys: labels.clone(),
    };
    METRICS.iter().map(one).collect()
}

/// The metrics of all living sandboxes.
pub(crate) async fn metrics(core: &Arc<Core>) -> Result<Vec<cri::PodSandboxMetrics>, Error> {
    let core = core.clone();
    blocking("metrics", move || {
        let records = filtered_sandboxes(&core, None);
        Ok(records.iter().map(|record| sandbox_metrics(&core, record)).collect())
    })
    .await
}

fn sandbox_metrics(core: &Core, record: &SandboxRecord) -> cri::PodSandboxMetrics {
    let now = now_nanos();
    let of_group = |group: &str, labels: &[String]| -> Vec<cri::Metric> {
        let Some(stats) = measure(group) else { return Vec::new() };
        let one = |metric: &Metric| cri::Metric {
            name: metric.name.to_owned(),
            timestamp: now,
            metric_type: metric.kind as i32,
            label_values: labels.to_vec(),
            value: value((metric.read)(&stats)),
        };
        METRICS.iter().map(one).collect()
    };
    let mut members = core.index.containers_of(&record.id);
    members.retain(|container| container.phase() == ContainerPhase::Running);
    let container_metrics = members.iter().map(|container| {
        let record = container.record();
        let labels = [record.id.clone(), record.metadata().name];
        cri::ContainerMetrics { container_id: record.id.clone(), metrics: of_group(&record.cgroup, &labels) }
    });
    cri::PodSandboxMetrics {
        pod_sandbox_id: record.id.clone(),
        metrics: of_group(&record.cgroup_parent, &[record.id.clone(), "POD".to_owned()]),
        container_metrics: container_metrics.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_left_out_and_columns_are_the_right_ones() {
        let table = "Inter-|   Receive |  Transmit\n face |bytes\n    lo: 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9\n  eth0: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n";
        let read = interfaces(table);
        assert_eq!(read.len(), 1);
        let numbers = [&read[0].rx_bytes, &read[0].rx_errors, &read[0].tx_bytes, &read[0].tx_errors];
        assert_eq!(numbers.map(|number| number.as_ref().unwrap().value), [1, 3, 9, 11]);
    }

    #[test]
    fn a_rate_is_per_second() {
        assert_eq!(per_second(500_000_000, 2_000_000_000), 250_000_000);
        assert_eq!(per_second(1, 0), 1_000_000_000);
    }
}
