//! A pod as the scheduler sees it: compiled once when it arrives, then only read. Pure.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{NodeSelector, Pod, PreferredSchedulingTerm, Toleration};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use oarlock_machinery::Key;

use crate::resources::{Resources, pod_requests, pod_use};
use crate::terms::{Labels, PodTerm, Spread};

/// A port of the node that a pod takes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct HostPort {
    pub ip: String,
    pub protocol: String,
    pub port: i32,
}

impl HostPort {
    /// The unspecified address takes the port on every address.
    pub fn conflicts(&self, other: &Self) -> bool {
        let any = |ip: &str| ip == "0.0.0.0" || ip == "::";
        self.port == other.port
            && self.protocol == other.protocol
            && (self.ip == other.ip || any(&self.ip) || any(&other.ip))
    }
}

#[derive(Debug)]
pub(crate) struct PodInfo {
    pub key: Key,
    pub uid: String,
    pub labels: Labels,
    pub node_name: String,
    pub priority: i32,
    pub may_preempt: bool,
    pub requests: Resources,
    /// With an assumed use where nothing is requested.
    pub usage: Resources,
    pub host_ports: Vec<HostPort>,
    pub node_selector: Labels,
    pub required_nodes: Option<NodeSelector>,
    pub preferred_nodes: Vec<PreferredSchedulingTerm>,
    pub tolerations: Vec<Toleration>,
    pub affinity: Vec<PodTerm>,
    pub anti_affinity: Vec<PodTerm>,
    /// Preferences for (positive) and against (negative) the company of pods.
    pub preferences: Vec<(i64, PodTerm)>,
    pub spread: Vec<Spread>,
    pub images: Vec<String>,
    /// The names of its persistent volume claims.
    pub claims: Vec<String>,
    pub gated: bool,
    pub terminating: bool,
    pub controller_uid: Option<String>,
    pub started: Option<Timestamp>,
    pub nominated_node: Option<String>,
    pub version: String,
}

fn is_terminal(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

impl PodInfo {
    /// `None` for a pod that has ended: it takes nothing and goes nowhere.
    pub fn compile(pod: &Pod) -> Option<Arc<Self>> {
        if is_terminal(pod) {
            return None;
        }
        let none = Default::default();
        let spec = pod.spec.as_ref().unwrap_or(&none);
        let affinity = spec.affinity.as_ref();
        let nodes = affinity.and_then(|affinity| affinity.node_affinity.as_ref());
        let together = affinity.and_then(|affinity| affinity.pod_affinity.as_ref());
        let apart = affinity.and_then(|affinity| affinity.pod_anti_affinity.as_ref());
        let compile = |term| PodTerm::compile(term, pod);
        let required = together.and_then(|it| it.required_during_scheduling_ignored_during_execution.as_ref());
        let forbidden = apart.and_then(|it| it.required_during_scheduling_ignored_during_execution.as_ref());
        let liked = together.and_then(|it| it.preferred_during_scheduling_ignored_during_execution.as_ref());
        let disliked = apart.and_then(|it| it.preferred_during_scheduling_ignored_during_execution.as_ref());
        let liked = liked.into_iter().flatten().map(|it| (i64::from(it.weight), compile(&it.pod_affinity_term)));
        let disliked = disliked.into_iter().flatten().map(|it| (-i64::from(it.weight), compile(&it.pod_affinity_term)));
        let controller = pod.metadata.owner_references.iter().flatten().find(|owner| owner.controller == Some(true));
        let controller_uid = controller.map(|owner| owner.uid.clone());
        let spread = match (&spec.topology_spread_constraints, &controller_uid) {
            (Some(constraints), _) if !constraints.is_empty() => {
                constraints.iter().map(|constraint| Spread::compile(constraint, pod)).collect()
            }
            (_, Some(controller)) => Spread::defaults(controller),
            _ => Vec::new(),
        };
        let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
        Some(Arc::new(Self {
            key: Key::of(pod),
            uid: pod.uid().unwrap_or_default(),
            labels: pod.metadata.labels.clone().unwrap_or_default(),
            node_name: spec.node_name.clone().unwrap_or_default(),
            priority: spec.priority.unwrap_or(0),
            may_preempt: spec.preemption_policy.as_deref() != Some("Never"),
            requests: pod_requests(spec),
            usage: pod_use(spec),
            host_ports: host_ports(spec),
            node_selector: spec.node_selector.clone().unwrap_or_default(),
            required_nodes: nodes.and_then(|it| it.required_during_scheduling_ignored_during_execution.clone()),
            preferred_nodes: nodes
                .and_then(|it| it.preferred_during_scheduling_ignored_during_execution.clone())
                .unwrap_or_default(),
            tolerations: spec.tolerations.clone().unwrap_or_default(),
            affinity: required.into_iter().flatten().map(compile).collect(),
            anti_affinity: forbidden.into_iter().flatten().map(compile).collect(),
            preferences: liked.chain(disliked).collect(),
            spread,
            images: containers.filter_map(|container| container.image.clone()).collect(),
            claims: claims(pod, spec),
            gated: spec.scheduling_gates.as_ref().is_some_and(|gates| !gates.is_empty()),
            terminating: pod.metadata.deletion_timestamp.is_some(),
            controller_uid,
            started: pod.status.as_ref().and_then(|status| status.start_time.as_ref()).map(|time| time.0),
            nominated_node: pod.status.as_ref().and_then(|status| status.nominated_node_name.clone()),
            version: pod.resource_version().unwrap_or_default(),
        }))
    }
}

/// Named by the pod, or made for it as ephemeral volumes.
fn claims(pod: &Pod, spec: &k8s_openapi::api::core::v1::PodSpec) -> Vec<String> {
    let volumes = spec.volumes.iter().flatten();
    let names = volumes.filter_map(|volume| match &volume.persistent_volume_claim {
        Some(source) => Some(source.claim_name.clone()),
        None => volume.ephemeral.as_ref().map(|_| format!("{}-{}", pod.name_any(), volume.name)),
    });
    names.collect()
}

fn host_ports(spec: &k8s_openapi::api::core::v1::PodSpec) -> Vec<HostPort> {
    let sidecars = spec.init_containers.iter().flatten();
    let sidecars = sidecars.filter(|container| container.restart_policy.as_deref() == Some("Always"));
    let ports = spec.containers.iter().chain(sidecars).flat_map(|container| container.ports.iter().flatten());
    let taken = ports.filter_map(|port| {
        let number = port.host_port.filter(|number| *number > 0)?;
        let ip = port.host_ip.clone().filter(|ip| !ip.is_empty()).unwrap_or_else(|| "0.0.0.0".to_owned());
        Some(HostPort { ip, protocol: port.protocol.clone().unwrap_or_else(|| "TCP".to_owned()), port: number })
    });
    taken.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_conflict_by_address_protocol_and_number() {
        let port = |ip: &str, protocol: &str, port| HostPort { ip: ip.into(), protocol: protocol.into(), port };
        assert!(port("0.0.0.0", "TCP", 80).conflicts(&port("10.0.0.1", "TCP", 80)));
        assert!(!port("10.0.0.2", "TCP", 80).conflicts(&port("10.0.0.1", "TCP", 80)));
        assert!(!port("0.0.0.0", "UDP", 80).conflicts(&port("0.0.0.0", "TCP", 80)));
        assert!(!port("0.0.0.0", "TCP", 81).conflicts(&port("0.0.0.0", "TCP", 80)));
    }
}
