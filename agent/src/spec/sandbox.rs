//! The pod sandbox as the runtime is asked for it. Pure.

use std::collections::{BTreeMap, HashMap};

use k8s_openapi::api::core::v1::Pod;
use oarlock_proto::cri;

use super::{names, resources, security};
use crate::sysctls::with_dots;
use crate::users::Range;

/// What beside the pod a sandbox needs to know.
pub(crate) struct SandboxFacts<'a> {
    pub attempt: u32,
    pub log_directory: String,
    pub dns: cri::DnsConfig,
    pub cgroup_parent: String,
    pub cluster_domain: &'a str,
    /// The pod's ids on the node, in a user namespace of its own.
    pub users: Option<Range>,
}

/// The sandbox of a pod.
pub(crate) fn sandbox_config(pod: &Pod, facts: SandboxFacts<'_>) -> cri::PodSandboxConfig {
    // One that cannot be has kept the sandbox from being made.
    let hostname = super::hosts::seen_host_name(pod, facts.cluster_domain).unwrap_or_default();
    let security_context = pod.spec.as_ref().and_then(|spec| spec.security_context.as_ref());
    let sysctls = security_context.and_then(|context| context.sysctls.clone()).unwrap_or_default();
    cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: super::pod_name(pod).to_owned(),
            uid: super::pod_uid(pod).to_owned(),
            namespace: super::pod_namespace(pod).to_owned(),
            attempt: facts.attempt,
        }),
        hostname,
        log_directory: facts.log_directory,
        dns_config: Some(facts.dns),
        port_mappings: port_mappings(pod),
        labels: pod_labels(pod),
        annotations: pod.metadata.annotations.clone().unwrap_or_default().into_iter().collect(),
        linux: Some(cri::LinuxPodSandboxConfig {
            cgroup_parent: facts.cgroup_parent,
            security_context: Some(security::sandbox_context(pod, facts.users)),
            sysctls: sysctls.into_iter().map(|sysctl| (with_dots(&sysctl.name), sysctl.value)).collect(),
            overhead: None,
            resources: Some(pod_resources(pod)),
        }),
        windows: None,
    }
}

/// The pod's sums, for runtimes that size something by them.
fn pod_resources(pod: &Pod) -> cri::LinuxContainerResources {
    let (requests, limits) = (resources::pod_requests(pod), resources::pod_limits(pod));
    let of = |amounts: &BTreeMap<String, i64>, name: &str| amounts.get(name).copied().unwrap_or(0);
    cri::LinuxContainerResources {
        cpu_shares: resources::cpu_shares(of(&requests, "cpu")),
        cpu_period: if limits.contains_key("cpu") { 100_000 } else { 0 },
        cpu_quota: resources::cpu_quota(of(&limits, "cpu"), 100_000),
        memory_limit_in_bytes: of(&limits, "memory") / 1000,
        ..Default::default()
    }
}

/// The pod's labels with those that say whose sandbox it is.
fn pod_labels(pod: &Pod) -> HashMap<String, String> {
    let mut labels: HashMap<String, String> = pod.metadata.labels.clone().unwrap_or_default().into_iter().collect();
    labels.extend(identity_labels(pod));
    labels
}

/// The labels that tie a sandbox or container to its pod.
pub(crate) fn identity_labels(pod: &Pod) -> HashMap<String, String> {
    HashMap::from([
        (names::POD_NAME.to_owned(), super::pod_name(pod).to_owned()),
        (names::POD_NAMESPACE.to_owned(), super::pod_namespace(pod).to_owned()),
        (names::POD_UID.to_owned(), super::pod_uid(pod).to_owned()),
    ])
}

/// Every port that a container declares; a pod on the host network maps none.
fn port_mappings(pod: &Pod) -> Vec<cri::PortMapping> {
    let spec = pod.spec.clone().unwrap_or_default();
    if spec.host_network.unwrap_or(false) {
        return Vec::new();
    }
    let sidecars = spec.init_containers.into_iter().flatten().filter(|c| c.restart_policy.as_deref() == Some("Always"));
    let ports = spec.containers.into_iter().chain(sidecars).flat_map(|container| container.ports.unwrap_or_default());
    let mut mappings = Vec::new();
    for port in ports.filter(|port| port.host_port.unwrap_or(0) > 0) {
        let protocol = match port.protocol.as_deref() {
            Some("UDP") => cri::Protocol::Udp,
            Some("SCTP") => cri::Protocol::Sctp,
            _ => cri::Protocol::Tcp,
        };
        let mapping = cri::PortMapping {
            protocol: protocol as i32,
            container_port: port.container_port,
            host_port: port.host_port.unwrap_or(0),
            host_ip: port.host_ip.unwrap_or_default(),
        };
        if !mappings.contains(&mapping) {
            mappings.push(mapping);
        }
    }
    mappings
}
