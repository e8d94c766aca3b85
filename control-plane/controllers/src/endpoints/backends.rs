//! What a pod means for a Service: its addresses, its ports, whether it is ready. Pure.

use k8s_openapi::api::core::v1::{ContainerPort, Node, ObjectReference, Pod, Service, ServicePort};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;

use crate::pods::{is_ready, is_terminal, is_terminating};

const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// Whether a change of the pod can change any endpoint.
pub(super) fn differ(old: &Pod, new: &Pod) -> bool {
    old.metadata.labels != new.metadata.labels
        || is_ready(old) != is_ready(new)
        || is_terminating(old) != is_terminating(new)
        || is_terminal(old) != is_terminal(new)
        || addresses(old) != addresses(new)
        || crate::pods::node_name(old) != crate::pods::node_name(new)
}

pub(super) fn zone(node: &Node) -> Option<&String> {
    node.labels().get(ZONE_LABEL)
}

fn addresses(pod: &Pod) -> Vec<&str> {
    let Some(status) = &pod.status else { return Vec::new() };
    let mut all: Vec<&str> = status.pod_ips.iter().flatten().map(|ip| ip.ip.as_str()).collect();
    if all.is_empty() {
        all.extend(status.pod_ip.as_deref());
    }
    all.retain(|ip| !ip.is_empty());
    all
}

/// The pod's address of a family ("IPv4", "IPv6").
pub(super) fn address<'a>(pod: &'a Pod, family: &str) -> Option<&'a str> {
    addresses(pod).into_iter().find(|ip| ip.contains(':') == (family == "IPv6"))
}

pub(super) fn publishes_unready(service: &Service) -> bool {
    service.spec.as_ref().and_then(|spec| spec.publish_not_ready_addresses).unwrap_or(false)
}

pub(super) fn is_headless(service: &Service) -> bool {
    service.spec.as_ref().and_then(|spec| spec.cluster_ip.as_deref()) == Some("None")
}

pub(super) fn ports(service: &Service) -> &[ServicePort] {
    service.spec.as_ref().and_then(|spec| spec.ports.as_deref()).unwrap_or_default()
}

pub(super) fn protocol(port: &ServicePort) -> &str {
    port.protocol.as_deref().unwrap_or("TCP")
}

/// The number a Service's port has in this pod; `None` if the pod has no port of that name.
pub(super) fn target_port(pod: &Pod, port: &ServicePort) -> Option<i32> {
    match &port.target_port {
        None => Some(port.port),
        Some(IntOrString::Int(0)) => Some(port.port),
        Some(IntOrString::Int(number)) => Some(*number),
        Some(IntOrString::String(name)) => {
            let spec = pod.spec.as_ref()?;
            let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
            let named = |candidate: &&ContainerPort| {
                candidate.name.as_ref() == Some(name)
                    && candidate.protocol.as_deref().unwrap_or("TCP") == protocol(port)
            };
            containers
                .flat_map(|container| container.ports.iter().flatten())
                .find(named)
                .map(|port| port.container_port)
        }
    }
}

/// The host name that DNS should know the pod by under this Service.
pub(super) fn hostname(pod: &Pod, service: &Service) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let hostname = spec.hostname.as_ref().filter(|hostname| !hostname.is_empty())?;
    (spec.subdomain.as_deref() == service.metadata.name.as_deref()).then(|| hostname.clone())
}

pub(super) fn target(pod: &Pod) -> ObjectReference {
    ObjectReference {
        kind: Some("Pod".to_owned()),
        namespace: pod.namespace(),
        name: Some(pod.name_any()),
        uid: pod.uid(),
        ..Default::default()
    }
}

pub(super) fn node(pod: &Pod) -> Option<String> {
    pod.spec.as_ref().and_then(|spec| spec.node_name.clone())
}
