//! Whether a pod may run on this node: selectors, affinity, operating system, resources, host ports. Pure.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Node, NodeSelectorRequirement, NodeSelectorTerm, Pod};

use crate::eviction::{self, Pressure};
use crate::node::capacity::Capacity;
use crate::spec::resources::{Amounts, Qos, pod_requests, qos_of};
use crate::sysctls::AllowedSysctls;
use crate::{shutdown, spec};

/// The reason of a refusal that goes by the node's labels.
pub(crate) const NODE_AFFINITY: &str = "NodeAffinity";

/// Why a pod may not run here: reason and message of its Failed status.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub reason: String,
    pub message: String,
    /// What there is too little of, and how much, in thousandths. Empty when something else is in the way.
    pub lacking: Amounts,
}

fn refusal(reason: &str, message: impl Into<String>) -> Refusal {
    Refusal { reason: reason.to_owned(), message: message.into(), lacking: Amounts::new() }
}

/// The node that a pod wants to run on.
pub(crate) struct Place<'a> {
    pub node: &'a Node,
    pub capacity: &'a Capacity,
    pub pressure: Pressure,
    pub shutting_down: bool,
    pub sysctls: &'a AllowedSysctls,
}

/// Judges `pod` beside those already running.
pub(crate) fn admit(pod: &Pod, place: &Place<'_>, others: &[&Pod]) -> Result<(), Refusal> {
    let Place { node, capacity, pressure, shutting_down, sysctls } = place;
    if *shutting_down {
        return Err(refusal(shutdown::REFUSED_REASON, shutdown::REFUSED_MESSAGE));
    }
    not_pressed(pod, *pressure)?;
    if let Some(os) = pod.spec.as_ref().and_then(|spec| spec.os.as_ref()).filter(|os| os.name != "linux") {
        let message = format!("Failed to admit pod as the OS field doesn't match node OS: {}", os.name);
        return Err(refusal("PodOSNotSupported", message));
    }
    if !matches_node(pod, node) {
        let message = "Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector";
        return Err(refusal(NODE_AFFINITY, message));
    }
    if let Some(message) = sysctls.refusal(pod) {
        return Err(refusal("SysctlForbidden", message));
    }
    ports_free(pod, others)?;
    resources_free(pod, capacity, others)
}

/// A node that is short of something takes no pod that would add to it.
fn not_pressed(pod: &Pod, pressure: Pressure) -> Result<(), Refusal> {
    let conditions =
        [(pressure.disk, "DiskPressure"), (pressure.memory, "MemoryPressure"), (pressure.pid, "PIDPressure")];
    let on: Vec<&str> = conditions.into_iter().filter(|(on, _)| *on).map(|(_, name)| name).collect();
    if on.is_empty() || eviction::is_critical(pod) {
        return Ok(());
    }
    if on == ["MemoryPressure"] && (qos_of(pod) != Qos::BestEffort || tolerates_memory_pressure(pod)) {
        return Ok(());
    }
    Err(refusal(eviction::REASON, eviction::pressed(&on)))
}

fn tolerates_memory_pressure(pod: &Pod) -> bool {
    pod.spec.iter().flat_map(|spec| spec.tolerations.iter().flatten()).any(|toleration| {
        let effect = toleration.effect.as_deref().is_none_or(|effect| effect.is_empty() || effect == "NoSchedule");
        let key = toleration.key.as_deref().unwrap_or_default();
        let exists = toleration.operator.as_deref() == Some("Exists");
        let valueless = toleration.value.as_deref().unwrap_or_default().is_empty();
        effect && ((key.is_empty() && exists) || (key == "node.kubernetes.io/memory-pressure" && (exists || valueless)))
    })
}

/// Whether what the pod asks for is free beside the others.
pub(crate) fn resources_free(pod: &Pod, capacity: &Capacity, others: &[&Pod]) -> Result<(), Refusal> {
    let mut used = Amounts::new();
    for other in others {
        for (name, amount) in pod_requests(other) {
            *used.entry(name).or_default() += amount;
        }
    }
    used.insert("pods".to_owned(), i64::try_from(others.len()).unwrap_or(i64::MAX).saturating_mul(1000));
    let mut wanted = pod_requests(pod);
    wanted.insert("pods".to_owned(), 1000);
    let mut first: Option<Refusal> = None;
    for (name, amount) in wanted {
        let Some(total) = capacity.allocatable.get(&name).copied() else {
            // Resources that the node does not count itself are the scheduler's to check.
            continue;
        };
        let taken = used.get(&name).copied().unwrap_or(0);
        if amount > 0 && taken.saturating_add(amount) > total {
            let unit = if name == "cpu" { 1 } else { 1000 };
            let message = format!(
                "Node didn't have enough resource: {name}, requested: {}, used: {}, capacity: {}",
                amount / unit,
                taken / unit,
                total / unit
            );
            let refused = first.get_or_insert_with(|| refusal(&format!("OutOf{name}"), message));
            refused.lacking.insert(name, taken.saturating_add(amount) - total);
        }
    }
    first.map_or(Ok(()), Err)
}

/// Address, protocol and port of each host port.
fn host_ports(pod: &Pod) -> BTreeSet<(String, String, i32)> {
    let Some(spec) = &pod.spec else { return BTreeSet::new() };
    let sidecars = spec.init_containers.iter().flatten().filter(|c| c.restart_policy.as_deref() == Some("Always"));
    let ports = spec.containers.iter().chain(sidecars).flat_map(|container| container.ports.iter().flatten());
    let host_network = spec.host_network.unwrap_or(false);
    let mut found = BTreeSet::new();
    for port in ports {
        let number = port.host_port.unwrap_or(if host_network { port.container_port } else { 0 });
        if number > 0 {
            let ip = port.host_ip.clone().filter(|ip| !ip.is_empty()).unwrap_or_else(|| "0.0.0.0".to_owned());
            found.insert((ip, port.protocol.clone().unwrap_or_else(|| "TCP".to_owned()), number));
        }
    }
    found
}

fn ports_free(pod: &Pod, others: &[&Pod]) -> Result<(), Refusal> {
    let any = |ip: &str| matches!(ip, "0.0.0.0" | "::");
    let wanted = host_ports(pod);
    for (ip, protocol, port) in others.iter().flat_map(|other| host_ports(other)) {
        let clash = wanted.iter().any(|(wanted_ip, wanted_protocol, wanted_port)| {
            *wanted_port == port && *wanted_protocol == protocol && (*wanted_ip == ip || any(wanted_ip) || any(&ip))
        });
        if clash {
            let message = "Predicate NodePorts failed: node(s) didn't have free ports for the requested pod ports";
            return Err(refusal("NodePorts", message));
        }
    }
    Ok(())
}

/// Node selector and required node affinity.
fn matches_node(pod: &Pod, node: &Node) -> bool {
    let none = BTreeMap::new();
    let labels = node.metadata.labels.as_ref().unwrap_or(&none);
    let Some(pod_spec) = &pod.spec else { return true };
    let selected = pod_spec.node_selector.iter().flatten().all(|(key, value)| labels.get(key) == Some(value));
    if !selected || spec::is_static(pod) {
        return selected || spec::is_static(pod);
    }
    let affinity = pod_spec.affinity.as_ref().and_then(|affinity| affinity.node_affinity.as_ref());
    let required = affinity.and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref());
    match required {
        None => true,
        Some(selector) => selector.node_selector_terms.iter().any(|term| term_matches(term, labels, node)),
    }
}

fn term_matches(term: &NodeSelectorTerm, labels: &BTreeMap<String, String>, node: &Node) -> bool {
    let fields = BTreeMap::from([("metadata.name".to_owned(), node.metadata.name.clone().unwrap_or_default())]);
    let empty = term.match_expressions.is_none() && term.match_fields.is_none();
    !empty
        && term.match_expressions.iter().flatten().all(|requirement| requirement_met(requirement, labels))
        && term.match_fields.iter().flatten().all(|requirement| requirement_met(requirement, &fields))
}

fn requirement_met(requirement: &NodeSelectorRequirement, labels: &BTreeMap<String, String>) -> bool {
    let value = labels.get(&requirement.key);
    let values = requirement.values.as_deref().unwrap_or_default();
    let compare = |greater: bool| {
        let own = value.and_then(|value| value.parse::<i64>().ok());
        let bound = values.first().and_then(|bound| bound.parse::<i64>().ok());
        matches!((own, bound), (Some(own), Some(bound)) if if greater { own > bound } else { own < bound })
    };
    match requirement.operator.as_str() {
        "In" => value.is_some_and(|value| values.contains(value)),
        "NotIn" => value.is_none_or(|value| !values.contains(value)),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => compare(true),
        "Lt" => compare(false),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(spec: serde_json::Value) -> Pod {
        serde_json::from_value(serde_json::json!({"metadata": {"name": "p"}, "spec": spec})).expect("a pod")
    }

    fn node() -> Node {
        serde_json::from_value(serde_json::json!({"metadata": {"name": "n", "labels": {"disk": "ssd", "gen": "4"}}}))
            .expect("a node")
    }

    fn room(cpu: i64) -> Capacity {
        let allocatable = BTreeMap::from([("cpu".to_owned(), cpu), ("pods".to_owned(), 2000)]);
        Capacity { capacity: allocatable.clone(), allocatable }
    }

    fn judge(pod: &Pod, capacity: &Capacity, others: &[&Pod]) -> Result<(), Refusal> {
        admit(
            pod,
            &Place {
                node: &node(),
                capacity,
                pressure: Pressure::default(),
                shutting_down: false,
                sysctls: &AllowedSysctls::default(),
            },
            others,
        )
    }

    #[test]
    fn a_pressed_node_takes_what_does_not_add_to_it() {
        let best_effort = pod(serde_json::json!({"containers": [{"name": "c"}]}));
        let burstable =
            pod(serde_json::json!({"containers": [{"name": "c", "resources": {"requests": {"memory": "1Mi"}}}]}));
        let tolerant = pod(serde_json::json!({"containers": [{"name": "c"}],
            "tolerations": [{"key": "node.kubernetes.io/memory-pressure", "operator": "Exists", "effect": "NoSchedule"}]}));
        let critical = pod(serde_json::json!({"priority": 2_000_001_000, "containers": [{"name": "c"}]}));
        let on = |pod: &Pod, pressure: Pressure| {
            admit(
                pod,
                &Place {
                    node: &node(),
                    capacity: &room(1000),
                    pressure,
                    shutting_down: false,
                    sysctls: &AllowedSysctls::default(),
                },
                &[],
            )
            .map_err(|r| r.message)
        };
        let memory = Pressure { memory: true, ..Default::default() };
        let disk = Pressure { disk: true, ..Default::default() };
        assert_eq!(on(&best_effort, memory), Err("The node had condition: [MemoryPressure]. ".to_owned()));
        assert_eq!(on(&burstable, memory), Ok(()));
        assert_eq!(on(&tolerant, memory), Ok(()));
        assert_eq!(on(&burstable, disk), Err("The node had condition: [DiskPressure]. ".to_owned()));
        assert_eq!(on(&critical, Pressure { memory: true, disk: true, pid: true }), Ok(()));
    }

    #[test]
    fn a_full_node_refuses_with_numbers() {
        let one = pod(serde_json::json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": "600m"}}}]}));
        assert_eq!(judge(&one, &room(1000), &[]), Ok(()));
        let refused = judge(&one, &room(1000), &[&one]).unwrap_err();
        assert_eq!(refused.reason, "OutOfcpu");
        assert_eq!(refused.message, "Node didn't have enough resource: cpu, requested: 600, used: 600, capacity: 1000");
        let none = pod(serde_json::json!({"containers": []}));
        assert_eq!(judge(&none, &room(1000), &[&none, &none]).unwrap_err().reason, "OutOfpods");
    }

    #[test]
    fn selectors_and_affinity_are_checked() {
        let with = |spec: serde_json::Value| {
            let mut spec = spec;
            spec["containers"] = serde_json::json!([]);
            judge(&pod(spec), &room(1000), &[]).map_err(|refusal| refusal.reason)
        };
        let affinity = |expressions: serde_json::Value| {
            serde_json::json!({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution":
                {"nodeSelectorTerms": [{"matchExpressions": expressions}]}}}})
        };
        let wrong = Err("NodeAffinity".to_owned());
        assert_eq!(with(serde_json::json!({"nodeSelector": {"disk": "ssd"}})), Ok(()));
        assert_eq!(with(serde_json::json!({"nodeSelector": {"disk": "hdd"}})), wrong);
        assert_eq!(with(affinity(serde_json::json!([{"key": "gen", "operator": "Gt", "values": ["3"]}]))), Ok(()));
        assert_eq!(with(affinity(serde_json::json!([{"key": "disk", "operator": "DoesNotExist"}]))), wrong);
    }

    #[test]
    fn a_host_port_is_given_once() {
        let with = |ip: &str| {
            pod(
                serde_json::json!({"containers": [{"name": "c", "ports": [{"containerPort": 80, "hostPort": 80, "hostIP": ip}]}]}),
            )
        };
        let refused = |a: &Pod, b: &Pod| judge(a, &room(1000), &[b]).is_err();
        assert!(refused(&with(""), &with("127.0.0.1")));
        assert!(refused(&with("127.0.0.1"), &with("127.0.0.1")));
        assert!(!refused(&with("127.0.0.1"), &with("127.0.0.2")));
    }
}
