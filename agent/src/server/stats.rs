//! Statistics in the shapes that clients read: the summary API, and Prometheus text.

use std::collections::HashMap;
use std::fmt::Write;

use jiff::Timestamp;
use oarlock_proto::cri;
use serde_json::{Map, Value, json};

use crate::node::capacity::disk;
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

fn container(stats: &cri::ContainerStats) -> Value {
    let name = stats.attributes.as_ref().and_then(|a| a.labels.get(names::CONTAINER_NAME)).cloned();
    let mut map = Map::new();
    map.insert("name".to_owned(), Value::from(name.unwrap_or_default()));
    put(&mut map, "cpu", cpu(stats.cpu.as_ref()));
    put(&mut map, "memory", memory(stats.memory.as_ref()));
    let layer = stats.writable_layer.as_ref().map(|layer| {
        let used = number(layer.used_bytes.as_ref());
        object(layer.timestamp, &[("usedBytes", used), ("inodesUsed", number(layer.inodes_used.as_ref()))])
    });
    put(&mut map, "rootfs", layer);
    Value::Object(map)
}

fn pod(stats: &cri::PodSandboxStats, started: &HashMap<String, String>) -> Option<Value> {
    let metadata = stats.attributes.as_ref()?.metadata.as_ref()?;
    let linux = stats.linux.clone().unwrap_or_default();
    let mut map = Map::new();
    map.insert(
        "podRef".to_owned(),
        json!({ "name": metadata.name, "namespace": metadata.namespace, "uid": metadata.uid }),
    );
    put(&mut map, "startTime", started.get(&metadata.uid).cloned().map(Value::from));
    map.insert("containers".to_owned(), linux.containers.iter().map(container).collect());
    put(&mut map, "cpu", cpu(linux.cpu.as_ref()));
    put(&mut map, "memory", memory(linux.memory.as_ref()));
    put(&mut map, "network", network(linux.network.as_ref()));
    let processes = linux.process.as_ref().and_then(|process| number(process.process_count.as_ref()));
    put(&mut map, "process_stats", processes.map(|count| json!({ "process_count": count })));
    Some(Value::Object(map))
}

/// `/stats/summary`.
pub(super) fn summary(
    shared: &Shared,
    pods: &[cri::PodSandboxStats],
    images: Option<&cri::ImageFsInfoResponse>,
) -> Value {
    let started: HashMap<String, String> = shared
        .table
        .all()
        .iter()
        .filter_map(|entry| {
            let at = entry.status.start_time.as_ref()?;
            Some((entry.pod.metadata.uid.clone()?, at.0.to_string()))
        })
        .collect();
    let now = i64::try_from(Timestamp::now().as_nanosecond()).unwrap_or(0);
    let (available, total) = memory_now();
    let room = disk(&shared.config.data_dir).unwrap_or_default();
    let filesystem = |used: i64| {
        json!({ "time": time(now), "availableBytes": room.available_bytes, "capacityBytes": room.total_bytes,
            "usedBytes": used, "inodesFree": room.inodes_free, "inodes": room.inodes,
            "inodesUsed": room.inodes - room.inodes_free })
    };
    let image_bytes = images.and_then(|info| info.image_filesystems.first()).and_then(|fs| fs.used_bytes.as_ref());
    let image_bytes = image_bytes.map_or(0, |used| i64::try_from(used.value).unwrap_or(i64::MAX));
    json!({
        "node": {
            "nodeName": shared.config.node_name,
            "startTime": time(now),
            "cpu": object(now, &[("usageCoreNanoSeconds", cpu_nanos_now())]),
            "memory": { "time": time(now), "availableBytes": available, "usageBytes": total.saturating_sub(available),
                "workingSetBytes": total.saturating_sub(available) },
            "fs": filesystem(room.total_bytes - room.available_bytes),
            "runtime": { "imageFs": filesystem(image_bytes) },
        },
        "pods": pods.iter().filter_map(|stats| pod(stats, &started)).collect::<Vec<_>>(),
    })
}

/// Available and total memory in bytes.
fn memory_now() -> (u64, u64) {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let of = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
    };
    (of("MemAvailable:"), of("MemTotal:"))
}

/// Nanoseconds that all processors together have worked.
fn cpu_nanos_now() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/stat").ok()?;
    let mut fields = text.lines().next()?.split_whitespace().skip(1).map(|field| field.parse::<u64>().unwrap_or(0));
    let busy: u64 = fields.by_ref().take(3).sum();
    // Ticks of a hundredth of a second.
    Some(busy * 10_000_000)
}

/// `/metrics`.
pub(super) fn agent_metrics(shared: &Shared) -> String {
    let entries = shared.table.all();
    let (mut running, mut containers) = (0usize, 0usize);
    for entry in &entries {
        let live = entry.observed.containers.iter().filter(|container| container.live()).count();
        containers += live;
        running += usize::from(live > 0);
    }
    let mut text = String::new();
    let _ = writeln!(text, "# HELP kubelet_running_pods Number of pods that have a running pod sandbox");
    let _ = writeln!(text, "# TYPE kubelet_running_pods gauge\nkubelet_running_pods {running}");
    let _ = writeln!(text, "# HELP kubelet_running_containers Number of containers currently running");
    let _ = writeln!(text, "# TYPE kubelet_running_containers gauge");
    let _ = writeln!(text, "kubelet_running_containers{{container_state=\"running\"}} {containers}");
    let _ = writeln!(text, "# HELP kubelet_node_name The node's name. The count is always 1.");
    let _ = writeln!(text, "# TYPE kubelet_node_name gauge");
    let _ = writeln!(text, "kubelet_node_name{{node=\"{}\"}} 1", shared.config.node_name);
    text
}

/// `/metrics/resource`, and what of `/metrics/cadvisor` the runtime's statistics give.
pub(super) fn resource_metrics(
    pods: &[cri::PodSandboxStats],
    containers: &[cri::ContainerStats],
    cadvisor: bool,
) -> String {
    let mut text = String::new();
    let (cpu_name, memory_name) = ("container_cpu_usage_seconds_total", "container_memory_working_set_bytes");
    let labels = |stats: &cri::ContainerStats| {
        let of = |name: &str| stats.attributes.as_ref().and_then(|a| a.labels.get(name)).cloned().unwrap_or_default();
        format!(
            "container=\"{}\",namespace=\"{}\",pod=\"{}\"",
            of(names::CONTAINER_NAME),
            of(names::POD_NAMESPACE),
            of(names::POD_NAME)
        )
    };
    let seconds = |usage: Option<&cri::CpuUsage>| {
        usage.and_then(|usage| number(usage.usage_core_nano_seconds.as_ref())).map(|nanos| nanos as f64 / 1e9)
    };
    let working_set = |usage: Option<&cri::MemoryUsage>| usage.and_then(|u| number(u.working_set_bytes.as_ref()));
    let _ = writeln!(text, "# TYPE {cpu_name} counter");
    for stats in containers {
        if let Some(value) = seconds(stats.cpu.as_ref()) {
            let _ = writeln!(text, "{cpu_name}{{{}}} {value}", labels(stats));
        }
    }
    let _ = writeln!(text, "# TYPE {memory_name} gauge");
    for stats in containers {
        if let Some(value) = working_set(stats.memory.as_ref()) {
            let _ = writeln!(text, "{memory_name}{{{}}} {value}", labels(stats));
        }
    }
    if cadvisor {
        return text;
    }
    let (available, total) = memory_now();
    let _ = writeln!(text, "# TYPE node_cpu_usage_seconds_total counter");
    let _ = writeln!(text, "node_cpu_usage_seconds_total {}", cpu_nanos_now().unwrap_or(0) as f64 / 1e9);
    let _ = writeln!(text, "# TYPE node_memory_working_set_bytes gauge");
    let _ = writeln!(text, "node_memory_working_set_bytes {}", total.saturating_sub(available));
    for (name, kind) in [("pod_cpu_usage_seconds_total", "counter"), ("pod_memory_working_set_bytes", "gauge")] {
        let _ = writeln!(text, "# TYPE {name} {kind}");
        for stats in pods {
            let Some(metadata) = stats.attributes.as_ref().and_then(|a| a.metadata.as_ref()) else { continue };
            let linux = stats.linux.clone().unwrap_or_default();
            let value = match kind {
                "counter" => seconds(linux.cpu.as_ref()),
                _ => working_set(linux.memory.as_ref()).map(|bytes| bytes as f64),
            };
            if let Some(value) = value {
                let _ =
                    writeln!(text, "{name}{{namespace=\"{}\",pod=\"{}\"}} {value}", metadata.namespace, metadata.name);
            }
        }
    }
    let _ = writeln!(text, "# TYPE scrape_error gauge\nscrape_error 0");
    text
}
