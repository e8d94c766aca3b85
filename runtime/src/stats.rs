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

pub(crate) fn measure(group: &str) -> Option<Stats> {
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
    let usage = |interface: Interface| cri::NetworkInterfaceUsage {
        name: interface.name,
        rx_bytes: value(interface.received.bytes),
        rx_errors: value(interface.received.errors),
        tx_bytes: value(interface.sent.bytes),
        tx_errors: value(interface.sent.errors),
    };
    let mut interfaces: Vec<_> = interface_counters(core, record).into_iter().map(usage).collect();
    let default = interfaces.iter().position(|interface| interface.name == "eth0");
    let default_interface = default.map(|index| interfaces.remove(index));
    Some(cri::NetworkUsage { timestamp: now, default_interface, interfaces })
}

/// One direction of an interface.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Traffic {
    pub bytes: u64,
    pub packets: u64,
    pub errors: u64,
    pub dropped: u64,
}

/// An interface of a pod.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Interface {
    pub name: String,
    pub received: Traffic,
    pub sent: Traffic,
}

/// The interfaces of a sandbox's own network, without loopback.
pub(crate) fn interface_counters(core: &Core, record: &SandboxRecord) -> Vec<Interface> {
    if record.host_network {
        return Vec::new();
    }
    let netns = core.paths.sandbox(&record.id).namespaces().join("net");
    let table = oarlock_netns::run_in(&netns, || std::fs::read_to_string("/proc/thread-self/net/dev"));
    table.ok().and_then(Result::ok).map(|table| interfaces(&table)).unwrap_or_default()
}

/// Reads `/proc/net/dev`.
fn interfaces(table: &str) -> Vec<Interface> {
    let parse = |line: &str| {
        let (name, numbers) = line.split_once(':')?;
        let numbers: Vec<u64> = numbers.split_ascii_whitespace().filter_map(|number| number.parse().ok()).collect();
        let direction = |first: usize| {
            let at = |index: usize| numbers.get(first + index).copied().unwrap_or(0);
            Traffic { bytes: at(0), packets: at(1), errors: at(2), dropped: at(3) }
        };
        Some(Interface { name: name.trim().to_owned(), received: direction(0), sent: direction(8) })
    };
    table.lines().skip(2).filter_map(parse).filter(|interface| interface.name != "lo").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_left_out_and_columns_are_the_right_ones() {
        let table = "Inter-|   Receive |  Transmit\n face |bytes\n    lo: 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9\n  eth0: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n";
        let expected = Interface {
            name: "eth0".into(),
            received: Traffic { bytes: 1, packets: 2, errors: 3, dropped: 4 },
            sent: Traffic { bytes: 9, packets: 10, errors: 11, dropped: 12 },
        };
        assert_eq!(interfaces(table), [expected]);
    }

    #[test]
    fn a_rate_is_per_second() {
        assert_eq!(per_second(500_000_000, 2_000_000_000), 250_000_000);
        assert_eq!(per_second(1, 0), 1_000_000_000);
    }
}
