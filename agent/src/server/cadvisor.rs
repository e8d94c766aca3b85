//! `/metrics/cadvisor`: what dashboards read of containers, pods and the machine, under cAdvisor's names. Pure.

use std::collections::BTreeMap;
use std::fmt::Write;

use oarlock_proto::cri;

use crate::spec::names;

/// Of the machine.
pub(super) struct MachineFacts {
    pub cores: i64,
    pub memory_bytes: i64,
}

/// One metric: type and lines.
#[derive(Default)]
struct Page {
    metrics: BTreeMap<&'static str, (&'static str, Vec<String>)>,
}

impl Page {
    fn add(&mut self, name: &'static str, kind: &'static str, labels: &str, value: Option<f64>) {
        if let Some(value) = value {
            self.metrics.entry(name).or_insert((kind, Vec::new())).1.push(format!("{name}{{{labels}}} {value}"));
        }
    }

    fn text(self) -> String {
        let mut text = String::new();
        for (name, (kind, lines)) in self.metrics {
            let _ = writeln!(text, "# TYPE {name} {kind}");
            for line in lines {
                let _ = writeln!(text, "{line}");
            }
        }
        text
    }
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn labels(container: &str, id: &str, image: &str, namespace: &str, pod: &str) -> String {
    let part = |name: &str, value: &str| format!("{name}=\"{}\"", escaped(value));
    [part("container", container), part("id", id), part("image", image), part("namespace", namespace), part("pod", pod)]
        .join(",")
}

fn number(value: Option<&cri::UInt64Value>) -> Option<f64> {
    value.map(|value| value.value as f64)
}

fn usage(page: &mut Page, labels: &str, cpu: Option<&cri::CpuUsage>, memory: Option<&cri::MemoryUsage>) {
    let seconds = cpu.and_then(|cpu| number(cpu.usage_core_nano_seconds.as_ref())).map(|nanos| nanos / 1e9);
    page.add("container_cpu_usage_seconds_total", "counter", &format!("{labels},cpu=\"total\""), seconds);
    let Some(memory) = memory else { return };
    let gauge = "gauge";
    page.add("container_memory_working_set_bytes", gauge, labels, number(memory.working_set_bytes.as_ref()));
    page.add("container_memory_usage_bytes", gauge, labels, number(memory.usage_bytes.as_ref()));
    page.add("container_memory_rss", gauge, labels, number(memory.rss_bytes.as_ref()));
    for (kind, faults) in [("pgfault", &memory.page_faults), ("pgmajfault", &memory.major_page_faults)] {
        let labels = format!("{labels},failure_type=\"{kind}\",scope=\"container\"");
        page.add("container_memory_failures_total", "counter", &labels, number(faults.as_ref()));
    }
}

fn container(page: &mut Page, stats: &cri::ContainerStats) {
    let Some(attributes) = &stats.attributes else { return };
    let of = |name: &str| attributes.labels.get(name).cloned().unwrap_or_default();
    let labels = labels(
        &of(names::CONTAINER_NAME),
        &attributes.id,
        attributes.annotations.get("io.kubernetes.cri.image-name").map_or("", String::as_str),
        &of(names::POD_NAMESPACE),
        &of(names::POD_NAME),
    );
    usage(page, &labels, stats.cpu.as_ref(), stats.memory.as_ref());
    let layer = stats.writable_layer.as_ref();
    page.add("container_fs_usage_bytes", "gauge", &labels, layer.and_then(|layer| number(layer.used_bytes.as_ref())));
    page.add("container_fs_inodes_total", "gauge", &labels, layer.and_then(|l| number(l.inodes_used.as_ref())));
    let swap = stats.swap.as_ref().and_then(|swap| number(swap.swap_usage_bytes.as_ref()));
    page.add("container_memory_swap", "gauge", &labels, swap);
}

fn pod(page: &mut Page, stats: &cri::PodSandboxStats) {
    let Some(attributes) = &stats.attributes else { return };
    let metadata = attributes.metadata.clone().unwrap_or_default();
    let labels = labels("", &attributes.id, "", &metadata.namespace, &metadata.name);
    let linux = stats.linux.clone().unwrap_or_default();
    usage(page, &labels, linux.cpu.as_ref(), linux.memory.as_ref());
    let processes = linux.process.as_ref().and_then(|process| number(process.process_count.as_ref()));
    page.add("container_processes", "gauge", &labels, processes);
    let Some(network) = &linux.network else { return };
    for interface in network.default_interface.iter().chain(&network.interfaces) {
        let labels = format!("{labels},interface=\"{}\"", escaped(&interface.name));
        for (name, value) in [
            ("container_network_receive_bytes_total", &interface.rx_bytes),
            ("container_network_receive_errors_total", &interface.rx_errors),
            ("container_network_transmit_bytes_total", &interface.tx_bytes),
            ("container_network_transmit_errors_total", &interface.tx_errors),
        ] {
            page.add(name, "counter", &labels, number(value.as_ref()));
        }
    }
}

/// The page.
pub(super) fn metrics(
    machine: &MachineFacts,
    pods: &[cri::PodSandboxStats],
    containers: &[cri::ContainerStats],
) -> String {
    let mut page = Page::default();
    for stats in containers {
        container(&mut page, stats);
    }
    for stats in pods {
        pod(&mut page, stats);
    }
    let mut text = page.text();
    for (name, value) in [("machine_cpu_cores", machine.cores), ("machine_memory_bytes", machine.memory_bytes)] {
        let _ = writeln!(text, "# TYPE {name} gauge\n{name} {value}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_pods_and_the_machine_have_cadvisors_names() {
        let value = |value| Some(cri::UInt64Value { value });
        let cpu = Some(cri::CpuUsage { usage_core_nano_seconds: value(2_500_000_000), ..Default::default() });
        let stats = cri::ContainerStats {
            attributes: Some(cri::ContainerAttributes {
                id: "c1".into(),
                labels: [
                    (names::CONTAINER_NAME.to_owned(), "app".to_owned()),
                    (names::POD_NAME.to_owned(), "w\"eb".to_owned()),
                ]
                .into(),
                ..Default::default()
            }),
            cpu,
            memory: Some(cri::MemoryUsage { working_set_bytes: value(77), ..Default::default() }),
            ..Default::default()
        };
        let interface = cri::NetworkInterfaceUsage { name: "eth0".into(), rx_bytes: value(9), ..Default::default() };
        let network = cri::NetworkUsage { default_interface: Some(interface), ..Default::default() };
        let pod = cri::PodSandboxStats {
            attributes: Some(cri::PodSandboxAttributes { id: "s1".into(), ..Default::default() }),
            linux: Some(cri::LinuxPodSandboxStats { network: Some(network), ..Default::default() }),
            ..Default::default()
        };
        let text = metrics(&MachineFacts { cores: 4, memory_bytes: 1024 }, &[pod], &[stats]);
        for expected in [
            "container_cpu_usage_seconds_total{container=\"app\",id=\"c1\",image=\"\",namespace=\"\",pod=\"w\\\"eb\",cpu=\"total\"} 2.5",
            "container_memory_working_set_bytes{container=\"app\"",
            "container_network_receive_bytes_total{container=\"\",id=\"s1\",image=\"\",namespace=\"\",pod=\"\",interface=\"eth0\"} 9",
            "machine_cpu_cores 4",
            "# TYPE container_network_receive_bytes_total counter",
        ] {
            assert!(text.contains(expected), "{expected} is not in:\n{text}");
        }
    }
}
