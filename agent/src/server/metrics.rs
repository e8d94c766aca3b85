//! Statistics as Prometheus text: `/metrics` and `/metrics/resource`. Those in cAdvisor's names are elsewhere.

use std::collections::HashMap;
use std::fmt::Write;

use oarlock_csi::VolumeUse;
use oarlock_proto::cri;

use super::machine;
use super::stats::memory_now;
use crate::cri::CriError;
use crate::model::RunState;
use crate::shared::{PodEntry, Shared};
use crate::spec::names;

/// `/metrics`.
pub(super) fn agent_metrics(shared: &Shared) -> String {
    let mut text = pod_metrics(&shared.table.all());
    let _ = writeln!(text, "# HELP kubelet_node_name The node's name. The count is always 1.");
    let _ = writeln!(text, "# TYPE kubelet_node_name gauge");
    let _ = writeln!(text, "kubelet_node_name{{node=\"{}\"}} 1", shared.config.node_name);
    let name = "kubelet_pod_start_duration_seconds";
    let _ = writeln!(text, "# HELP {name} Seconds from a pod's coming to its running.\n# TYPE {name} histogram");
    shared.pod_starts.lock().write(&mut text, name, "");
    text + &shared.runtime.metrics()
}

/// How many pods have a sandbox that runs, and how many containers are in each state.
fn pod_metrics(entries: &[PodEntry]) -> String {
    let running = entries.iter().filter(|entry| entry.observed.sandboxes.iter().any(|sandbox| sandbox.ready)).count();
    let mut text = String::new();
    let _ = writeln!(text, "# HELP kubelet_running_pods Number of pods that have a running pod sandbox");
    let _ = writeln!(text, "# TYPE kubelet_running_pods gauge\nkubelet_running_pods {running}");
    let _ = writeln!(text, "# HELP kubelet_running_containers Number of containers by state");
    let _ = writeln!(text, "# TYPE kubelet_running_containers gauge");
    let states = [
        ("created", RunState::Created),
        ("exited", RunState::Exited),
        ("running", RunState::Running),
        ("unknown", RunState::Unknown),
    ];
    for (label, state) in states {
        let containers = entries.iter().flat_map(|entry| &entry.observed.containers);
        let count = containers.filter(|container| container.state == state).count();
        if count > 0 || state == RunState::Running {
            let _ = writeln!(text, "kubelet_running_containers{{container_state=\"{label}\"}} {count}");
        }
    }
    text
}

/// What of `/metrics` tells of claims' volumes.
pub(super) fn volume_metrics<'a>(volumes: impl Iterator<Item = &'a VolumeUse>) -> String {
    let mut lines: [Vec<String>; 6] = Default::default();
    let names = ["available_bytes", "capacity_bytes", "used_bytes", "inodes_free", "inodes", "inodes_used"];
    for usage in volumes {
        let Some((namespace, claim)) = &usage.claim else { continue };
        let of = |amounts: Option<(i64, i64, i64)>| amounts.map_or([None; 3], |(a, b, c)| [Some(a), Some(b), Some(c)]);
        let amounts = of(usage.bytes).into_iter().chain(of(usage.inodes));
        for ((name, amount), lines) in names.iter().zip(amounts).zip(&mut lines) {
            if let Some(amount) = amount {
                let labels = format!("namespace=\"{namespace}\",persistentvolumeclaim=\"{claim}\"");
                lines.push(format!("kubelet_volume_stats_{name}{{{labels}}} {amount}"));
            }
        }
    }
    let mut text = String::new();
    for (name, lines) in names.iter().zip(lines).filter(|(_, lines)| !lines.is_empty()) {
        let _ = writeln!(text, "# TYPE kubelet_volume_stats_{name} gauge\n{}", lines.join("\n"));
    }
    text
}

/// What the runtime told of its pods, and of its containers.
pub(super) type Told = (Result<Vec<cri::PodSandboxStats>, CriError>, Result<Vec<cri::ContainerStats>, CriError>);

/// The start of each container that runs, in seconds of the epoch, by its id.
pub(super) fn container_starts(shared: &Shared) -> HashMap<String, f64> {
    let entries = shared.table.all();
    let containers = entries.iter().flat_map(|entry| &entry.observed.containers);
    let running = containers.filter(|container| container.state == RunState::Running);
    running.filter_map(|c| Some((c.id.to_string(), c.started_at?.as_nanosecond() as f64 / 1e9))).collect()
}

/// One metric of `/metrics/resource`.
struct Family {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
}

impl Family {
    /// Writes the values that are known, each with its labels; without any, nothing.
    fn write(&self, text: &mut String, values: impl Iterator<Item = (String, Option<f64>)>) {
        let Family { name, kind, help } = self;
        let mut begun = false;
        for (labels, value) in values.filter_map(|(labels, value)| Some((labels, value?))) {
            if !std::mem::replace(&mut begun, true) {
                let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
            }
            let _ = writeln!(text, "{name}{labels} {value}");
        }
    }
}

const fn family(name: &'static str, kind: &'static str, help: &'static str) -> Family {
    Family { name, kind, help }
}

/// `/metrics/resource`. Where the runtime did not answer, the page says so and has what else is known.
pub(super) fn resource_metrics(told: &Told, starts: &HashMap<String, f64>) -> String {
    let failed = told.0.is_err() || told.1.is_err();
    let mut text = String::new();
    of_containers(&mut text, told.1.as_deref().unwrap_or_default(), starts);
    of_pods(&mut text, told.0.as_deref().unwrap_or_default());
    of_node(&mut text);
    for name in ["scrape_error", "resource_scrape_error"] {
        let help = "1 if there was an error while getting container metrics, 0 otherwise";
        family(name, "gauge", help).write(&mut text, one(Some(f64::from(u8::from(failed)))));
    }
    text
}

/// A metric of one value without labels.
fn one(value: Option<f64>) -> impl Iterator<Item = (String, Option<f64>)> {
    std::iter::once((String::new(), value))
}

fn value(number: Option<&cri::UInt64Value>) -> Option<f64> {
    number.map(|number| number.value as f64)
}

fn cpu_seconds(usage: Option<&cri::CpuUsage>) -> Option<f64> {
    value(usage?.usage_core_nano_seconds.as_ref()).map(|nanos| nanos / 1e9)
}

fn working_set(usage: Option<&cri::MemoryUsage>) -> Option<f64> {
    value(usage?.working_set_bytes.as_ref())
}

fn swap_usage(stats: &cri::ContainerStats) -> Option<f64> {
    value(stats.swap.as_ref()?.swap_usage_bytes.as_ref())
}

fn swap_limit(stats: &cri::ContainerStats) -> Option<f64> {
    let available = value(stats.swap.as_ref()?.swap_available_bytes.as_ref())?;
    Some(available + swap_usage(stats).unwrap_or(0.0))
}

fn of_containers(text: &mut String, containers: &[cri::ContainerStats], starts: &HashMap<String, f64>) {
    let labels = |stats: &cri::ContainerStats| {
        let of = |name: &str| stats.attributes.as_ref().and_then(|a| a.labels.get(name)).cloned().unwrap_or_default();
        let (container, namespace, pod) = (of(names::CONTAINER_NAME), of(names::POD_NAMESPACE), of(names::POD_NAME));
        format!("{{container=\"{container}\",namespace=\"{namespace}\",pod=\"{pod}\"}}")
    };
    let start = |stats: &cri::ContainerStats| starts.get(&stats.attributes.as_ref()?.id).copied();
    type Of<'a> = &'a dyn Fn(&cri::ContainerStats) -> Option<f64>;
    let families: [(Family, Of<'_>); 5] = [
        (family("container_start_time_seconds", "gauge", "Start of the container in seconds of the epoch"), &start),
        (
            family("container_cpu_usage_seconds_total", "counter", "Processor time of the container in core-seconds"),
            &|s| cpu_seconds(s.cpu.as_ref()),
        ),
        (family("container_memory_working_set_bytes", "gauge", "Working set of the container"), &|s| {
            working_set(s.memory.as_ref())
        }),
        (family("container_swap_usage_bytes", "gauge", "Swap that the container uses"), &swap_usage),
        (family("container_swap_limit_bytes", "gauge", "Swap that the container may use"), &swap_limit),
    ];
    for (family, of) in families {
        family.write(text, containers.iter().map(|stats| (labels(stats), of(stats))));
    }
}

fn of_pods(text: &mut String, pods: &[cri::PodSandboxStats]) {
    let known = || {
        pods.iter().filter_map(|stats| {
            let metadata = stats.attributes.as_ref()?.metadata.as_ref()?;
            let labels = format!("{{namespace=\"{}\",pod=\"{}\"}}", metadata.namespace, metadata.name);
            Some((labels, stats.linux.as_ref()))
        })
    };
    family("pod_cpu_usage_seconds_total", "counter", "Processor time of the pod in core-seconds")
        .write(text, known().map(|(labels, linux)| (labels, linux.and_then(|linux| cpu_seconds(linux.cpu.as_ref())))));
    family("pod_memory_working_set_bytes", "gauge", "Working set of the pod")
        .write(text, known().map(|(labels, linux)| (labels, linux.and_then(|l| working_set(l.memory.as_ref())))));
    let swap = |linux: &cri::LinuxPodSandboxStats| {
        linux.containers.iter().filter_map(swap_usage).reduce(|sum, bytes| sum + bytes)
    };
    family("pod_swap_usage_bytes", "gauge", "Swap that the pod uses")
        .write(text, known().map(|(labels, linux)| (labels, linux.and_then(swap))));
}

fn of_node(text: &mut String) {
    let (available, total) = memory_now();
    family("node_cpu_usage_seconds_total", "counter", "Processor time of the node in core-seconds")
        .write(text, one(machine::processor().0.map(|nanos| nanos as f64 / 1e9)));
    family("node_memory_working_set_bytes", "gauge", "Working set of the node")
        .write(text, one(Some(total.saturating_sub(available) as f64)));
    family("node_swap_usage_bytes", "gauge", "Swap that the node uses")
        .write(text, one(machine::swap_used_bytes().map(|bytes| bytes as f64)));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(value: u64) -> Option<cri::UInt64Value> {
        Some(cri::UInt64Value { value })
    }

    fn container(id: &str, swap: Option<cri::SwapUsage>) -> cri::ContainerStats {
        let label = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        cri::ContainerStats {
            attributes: Some(cri::ContainerAttributes {
                id: id.to_owned(),
                labels: HashMap::from([
                    label(names::CONTAINER_NAME, id),
                    label(names::POD_NAMESPACE, "ns"),
                    label(names::POD_NAME, "p"),
                ]),
                ..Default::default()
            }),
            cpu: Some(cri::CpuUsage { usage_core_nano_seconds: bytes(1_500_000_000), ..Default::default() }),
            memory: Some(cri::MemoryUsage { working_set_bytes: bytes(7), ..Default::default() }),
            swap,
            ..Default::default()
        }
    }

    fn has(text: &str, line: &str) {
        assert!(text.lines().any(|known| known == line), "{line:?} is not in\n{text}");
    }

    #[test]
    fn resources_are_told_of_containers_pods_and_node() {
        let swap = |used, available| {
            Some(cri::SwapUsage { swap_usage_bytes: bytes(used), swap_available_bytes: bytes(available), timestamp: 1 })
        };
        let containers = vec![container("a", swap(5, 10)), container("b", swap(6, 0)), container("c", None)];
        let linux = cri::LinuxPodSandboxStats { containers: containers.clone(), ..Default::default() };
        let metadata = cri::PodSandboxMetadata { name: "p".into(), namespace: "ns".into(), ..Default::default() };
        let pods = vec![cri::PodSandboxStats {
            attributes: Some(cri::PodSandboxAttributes { metadata: Some(metadata), ..Default::default() }),
            linux: Some(linux),
            ..Default::default()
        }];
        let starts = HashMap::from([("a".to_owned(), 1_700_000_000.25)]);
        let text = resource_metrics(&(Ok(pods), Ok(containers)), &starts);
        has(&text, "container_start_time_seconds{container=\"a\",namespace=\"ns\",pod=\"p\"} 1700000000.25");
        has(&text, "container_cpu_usage_seconds_total{container=\"b\",namespace=\"ns\",pod=\"p\"} 1.5");
        has(&text, "container_memory_working_set_bytes{container=\"c\",namespace=\"ns\",pod=\"p\"} 7");
        has(&text, "container_swap_usage_bytes{container=\"a\",namespace=\"ns\",pod=\"p\"} 5");
        has(&text, "container_swap_limit_bytes{container=\"a\",namespace=\"ns\",pod=\"p\"} 15");
        has(&text, "pod_swap_usage_bytes{namespace=\"ns\",pod=\"p\"} 11");
        has(&text, "scrape_error 0");
        has(&text, "resource_scrape_error 0");
        assert!(text.contains("\nnode_swap_usage_bytes "), "{text}");
        // Nothing is said of what nobody knows.
        assert!(!text.contains("container_swap_usage_bytes{container=\"c\""), "{text}");
        assert!(!text.contains("container_start_time_seconds{container=\"b\""), "{text}");
        assert!(!text.contains("pod_cpu_usage_seconds_total"), "{text}");
    }

    #[test]
    fn a_runtime_that_does_not_answer_is_an_error_of_the_page() {
        let error = CriError::Incomplete { call: "ListContainerStats", missing: "an answer" };
        let text = resource_metrics(&(Ok(Vec::new()), Err(error)), &HashMap::new());
        has(&text, "resource_scrape_error 1");
        has(&text, "scrape_error 1");
        assert!(text.contains("node_memory_working_set_bytes "), "the node is told of all the same");
    }
}
