//! Statistics in the shape of the summary API.

use std::collections::HashMap;

use jiff::Timestamp;
use oarlock_csi::VolumeUse;
use oarlock_proto::cri;
use serde_json::{Map, Value, json};

use super::machine;
use crate::eviction::PodUsage;
use crate::node::capacity::Disk;
use crate::shared::Shared;
use crate::spec::names;

fn time(nanos: i64) -> String {
    let at = Timestamp::from_nanosecond(i128::from(nanos)).unwrap_or(Timestamp::UNIX_EPOCH);
    Timestamp::from_second(at.as_second()).unwrap_or(at).to_string()
}

fn number(value: Option<&cri::UInt64Value>) -> Option<u64> {
    value.map(|value| value.value)
}

/// An object of the fields that have a value.
fn object(time_nanos: i64, fields: &[(&str, Option<u64>)]) -> Value {
    let mut map = Map::new();
    map.insert("time".to_owned(), Value::from(time(time_nanos)));
    for (name, value) in fields {
        if let Some(value) = value {
            map.insert((*name).to_owned(), Value::from(*value));
        }
    }
    Value::Object(map)
}

fn cpu(usage: Option<&cri::CpuUsage>) -> Option<Value> {
    let usage = usage?;
    let fields = [
        ("usageNanoCores", number(usage.usage_nano_cores.as_ref())),
        ("usageCoreNanoSeconds", number(usage.usage_core_nano_seconds.as_ref())),
    ];
    Some(object(usage.timestamp, &fields))
}

fn memory(usage: Option<&cri::MemoryUsage>) -> Option<Value> {
    let usage = usage?;
    let fields = [
        ("availableBytes", number(usage.available_bytes.as_ref())),
        ("usageBytes", number(usage.usage_bytes.as_ref())),
        ("workingSetBytes", number(usage.working_set_bytes.as_ref())),
        ("rssBytes", number(usage.rss_bytes.as_ref())),
        ("pageFaults", number(usage.page_faults.as_ref())),
        ("majorPageFaults", number(usage.major_page_faults.as_ref())),
    ];
    Some(object(usage.timestamp, &fields))
}

fn network(usage: Option<&cri::NetworkUsage>) -> Option<Value> {
    let usage = usage?;
    let interface = usage.default_interface.as_ref()?;
    let fields = [
        ("rxBytes", number(interface.rx_bytes.as_ref())),
        ("rxErrors", number(interface.rx_errors.as_ref())),
        ("txBytes", number(interface.tx_bytes.as_ref())),
        ("txErrors", number(interface.tx_errors.as_ref())),
    ];
    let mut value = object(usage.timestamp, &fields);
    value["name"] = Value::from(interface.name.clone());
    value["interfaces"] = json!([{ "name": interface.name, "rxBytes": number(interface.rx_bytes.as_ref()),
        "txBytes": number(interface.tx_bytes.as_ref()) }]);
    Some(value)
}

fn put(target: &mut Map<String, Value>, name: &str, value: Option<Value>) {
    if let Some(value) = value {
        target.insert(name.to_owned(), value);
    }
}

fn container(stats: &cri::ContainerStats, facts: &Facts<'_>, disk: Option<&PodUsage>) -> Value {
    let name = stats.attributes.as_ref().and_then(|a| a.labels.get(names::CONTAINER_NAME)).cloned();
    let mut map = Map::new();
    map.insert("name".to_owned(), Value::from(name.unwrap_or_default()));
    put(&mut map, "cpu", cpu(stats.cpu.as_ref()));
    put(&mut map, "memory", memory(stats.memory.as_ref()));
    let layer = stats.writable_layer.as_ref().map(|layer| {
        let used = number(layer.used_bytes.as_ref());
        let mut rootfs = facts.room(used);
        put_in(&mut rootfs, "inodesUsed", number(layer.inodes_used.as_ref()));
        rootfs
    });
    put(&mut map, "rootfs", layer);
    let own = disk.and_then(|disk| disk.containers.get(map.get("name")?.as_str()?));
    put(&mut map, "logs", own.map(|own| facts.room(Some(own.log_bytes))));
    let swap = stats
        .swap
        .as_ref()
        .map(|swap| object(swap.timestamp, &[("swapUsageBytes", number(swap.swap_usage_bytes.as_ref()))]));
    put(&mut map, "swap", swap);
    Value::Object(map)
}

fn pod(stats: &cri::PodSandboxStats, facts: &Facts<'_>) -> Option<Value> {
    let metadata = stats.attributes.as_ref()?.metadata.as_ref()?;
    let linux = stats.linux.clone().unwrap_or_default();
    let disk = facts.disk.get(&metadata.uid);
    let mut map = Map::new();
    map.insert(
        "podRef".to_owned(),
        json!({ "name": metadata.name, "namespace": metadata.namespace, "uid": metadata.uid }),
    );
    put(&mut map, "startTime", facts.started.get(&metadata.uid).cloned().map(Value::from));
    map.insert("containers".to_owned(), linux.containers.iter().map(|stats| container(stats, facts, disk)).collect());
    put(&mut map, "cpu", cpu(linux.cpu.as_ref()));
    put(&mut map, "memory", memory(linux.memory.as_ref()));
    put(&mut map, "network", network(linux.network.as_ref()));
    let volumes = disk.map(|disk| {
        let volume = |(name, used): (&String, &u64)| {
            let mut volume = facts.room(Some(*used));
            volume["name"] = Value::from(name.clone());
            volume
        };
        disk.volumes.iter().map(volume).collect::<Value>()
    });
    let own = volumes.as_ref().and_then(Value::as_array).cloned().unwrap_or_default();
    let of_drivers = facts.drivers.get(&metadata.uid).into_iter().flatten();
    let all: Vec<Value> = own.into_iter().chain(of_drivers.map(|usage| facts.driver_volume(usage))).collect();
    put(&mut map, "volume", (volumes.is_some() || !all.is_empty()).then_some(Value::Array(all)));
    let whole = disk.map(|disk| {
        let mut whole = facts.room(Some(disk.disk_bytes()));
        put_in(&mut whole, "inodesUsed", Some(disk.inodes));
        whole
    });
    put(&mut map, "ephemeral-storage", whole);
    let processes = linux.process.as_ref().and_then(|process| number(process.process_count.as_ref()));
    put(&mut map, "process_stats", processes.map(|count| json!({ "process_count": count })));
    Some(Value::Object(map))
}

/// What beside the runtime's statistics the summary shows.
pub(super) struct Facts<'a> {
    pub node_name: &'a str,
    pub now_nanos: i64,
    /// Start of each pod by UID.
    pub started: HashMap<String, String>,
    /// Files of each pod by UID.
    pub disk: &'a HashMap<String, PodUsage>,
    /// Volumes of each pod whose drivers tell, by UID.
    pub drivers: &'a HashMap<String, Vec<VolumeUse>>,
    /// The file system of pods and images.
    pub room: Disk,
    /// Processor time a second, in nanoseconds.
    pub cpu_rate: Option<u64>,
}

impl Facts<'_> {
    fn driver_volume(&self, usage: &VolumeUse) -> Value {
        let mut value = json!({ "time": time(self.now_nanos), "name": usage.volume });
        for (names, amounts) in [
            (["availableBytes", "capacityBytes", "usedBytes"], usage.bytes),
            (["inodesFree", "inodes", "inodesUsed"], usage.inodes),
        ] {
            if let Some((available, total, used)) = amounts {
                for (name, amount) in names.into_iter().zip([available, total, used]) {
                    put_in(&mut value, name, u64::try_from(amount).ok());
                }
            }
        }
        if let Some((namespace, name)) = &usage.claim {
            value["pvcRef"] = json!({ "name": name, "namespace": namespace });
        }
        value["volumeHealthStats"] = json!({ "abnormal": usage.trouble.is_some() });
        value
    }

    /// A part of the file system that takes so many bytes.
    fn room(&self, used: Option<u64>) -> Value {
        let mut value = json!({ "time": time(self.now_nanos), "availableBytes": self.room.available_bytes,
            "capacityBytes": self.room.total_bytes, "inodesFree": self.room.inodes_free, "inodes": self.room.inodes });
        put_in(&mut value, "usedBytes", used);
        value
    }
}

fn put_in(target: &mut Value, name: &str, number: Option<u64>) {
    if let Some(number) = number {
        target[name] = Value::from(number);
    }
}

/// The start of each pod by UID.
pub(super) fn starts(shared: &Shared) -> HashMap<String, String> {
    let entries = shared.table.all();
    let starts = entries.iter().filter_map(|entry| {
        let at = entry.status.start_time.as_ref()?;
        Some((entry.pod.metadata.uid.clone()?, at.0.to_string()))
    });
    starts.collect()
}

/// `/stats/summary`.
pub(super) fn summary(
    facts: &Facts<'_>,
    pods: &[cri::PodSandboxStats],
    images: Option<&cri::ImageFsInfoResponse>,
) -> Value {
    let now = facts.now_nanos;
    let (available, total) = memory_now();
    let (busy, booted) = machine::processor();
    let image_bytes =
        images.and_then(|info| info.image_filesystems.first()).and_then(|fs| number(fs.used_bytes.as_ref()));
    let used = u64::try_from(facts.room.total_bytes - facts.room.available_bytes).ok();
    let mut node = json!({
        "nodeName": facts.node_name,
        "startTime": time(booted.map_or(now, |second| second.saturating_mul(1_000_000_000))),
        "cpu": object(now, &[("usageNanoCores", facts.cpu_rate), ("usageCoreNanoSeconds", busy)]),
        "memory": { "time": time(now), "availableBytes": available, "usageBytes": total.saturating_sub(available),
            "workingSetBytes": total.saturating_sub(available) },
        "fs": facts.room(used),
        "runtime": { "imageFs": facts.room(image_bytes), "containerFs": facts.room(image_bytes) },
    });
    if let Value::Object(node) = &mut node {
        put(node, "network", machine::network(&time(now)));
        put(node, "rlimit", machine::processes(&time(now)));
    }
    json!({ "node": node, "pods": pods.iter().filter_map(|stats| pod(stats, facts)).collect::<Vec<_>>() })
}

/// Available and total memory in bytes.
pub(super) fn memory_now() -> (u64, u64) {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let of = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
    };
    (of("MemAvailable:"), of("MemTotal:"))
}
