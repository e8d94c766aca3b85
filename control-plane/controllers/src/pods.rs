//! What controllers ask about pods, and what the shared cache keeps of them. Pure.

use k8s_openapi::api::core::v1::{
    Container, ContainerStatus, PersistentVolumeClaimVolumeSource, Pod, PodCondition, PodSpec, PodStatus, Volume,
};
use k8s_openapi::jiff::{SignedDuration, Timestamp};

/// Drops from a cached pod what no controller reads: about nine tenths of it.
pub(crate) fn trim(pod: &mut Pod) {
    if let Some(annotations) = &mut pod.metadata.annotations {
        annotations.retain(|key, _| key == DELETION_COST);
    }
    pod.metadata.generate_name = None;
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    if let Some(spec) = &mut pod.spec {
        let containers = std::mem::take(&mut spec.containers);
        // Sidecars may own a named port; ordinary init containers cannot be an endpoint.
        let sidecars = spec.init_containers.take().into_iter().flatten();
        let sidecars = sidecars.filter(|init| init.restart_policy.as_deref() == Some("Always"));
        *spec = PodSpec {
            containers: containers.into_iter().map(trim_container).collect(),
            init_containers: Some(sidecars.map(trim_container).collect()),
            node_name: spec.node_name.take(),
            hostname: spec.hostname.take(),
            subdomain: spec.subdomain.take(),
            host_network: spec.host_network,
            tolerations: spec.tolerations.take(),
            volumes: Some(claim_volumes(name, spec.volumes.take())).filter(|volumes| !volumes.is_empty()),
            ..Default::default()
        };
    }
    if let Some(status) = &mut pod.status {
        let restarts = status.container_statuses.take().into_iter().flatten();
        let restarts =
            restarts.map(|container| ContainerStatus { restart_count: container.restart_count, ..Default::default() });
        *status = PodStatus {
            phase: status.phase.take(),
            pod_ip: status.pod_ip.take(),
            pod_ips: status.pod_ips.take(),
            conditions: status.conditions.take(),
            container_statuses: Some(restarts.collect()),
            start_time: status.start_time.take(),
            ..Default::default()
        };
    }
}

/// The volumes that are claims, each with the claim's name; one of the pod's own is a claim by name as well.
fn claim_volumes(pod: &str, volumes: Option<Vec<Volume>>) -> Vec<Volume> {
    let claim = |volume: Volume| {
        let own = volume.ephemeral.is_some().then(|| format!("{pod}-{}", volume.name));
        let claim_name = volume.persistent_volume_claim.map(|source| source.claim_name).or(own)?;
        let source = PersistentVolumeClaimVolumeSource { claim_name, read_only: None };
        Some(Volume { name: volume.name, persistent_volume_claim: Some(source), ..Default::default() })
    };
    volumes.into_iter().flatten().filter_map(claim).collect()
}

/// Names of the claims that the (trimmed) pod uses, in its own namespace.
pub(crate) fn claims(pod: &Pod) -> impl Iterator<Item = &str> {
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    volumes.filter_map(|volume| volume.persistent_volume_claim.as_ref()).map(|source| source.claim_name.as_str())
}

fn trim_container(container: Container) -> Container {
    Container { name: container.name, ports: container.ports, ..Default::default() }
}

/// Annotation by which a user says which pods to remove first.
pub(crate) const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";

pub(crate) fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or("Pending")
}

/// Ended for good: Succeeded or Failed.
pub(crate) fn is_terminal(pod: &Pod) -> bool {
    matches!(phase(pod), "Succeeded" | "Failed")
}

pub(crate) fn is_terminating(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some()
}

/// Counts towards a ReplicaSet: neither ended nor being deleted.
pub(crate) fn is_active(pod: &Pod) -> bool {
    !is_terminal(pod) && !is_terminating(pod)
}

pub(crate) fn node_name(pod: &Pod) -> &str {
    pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or_default()
}

pub(crate) fn condition<'a>(pod: &'a Pod, type_: &str) -> Option<&'a PodCondition> {
    pod.status.as_ref()?.conditions.iter().flatten().find(|condition| condition.type_ == type_)
}

pub(crate) fn is_ready(pod: &Pod) -> bool {
    condition(pod, "Ready").is_some_and(|ready| ready.status == "True")
}

/// Since when the pod is ready, if it is and says so.
pub(crate) fn ready_since(pod: &Pod) -> Option<Timestamp> {
    let ready = condition(pod, "Ready").filter(|ready| ready.status == "True")?;
    ready.last_transition_time.as_ref().map(|time| time.0)
}

/// Since when the pod is ready or unready, if it says so.
pub(crate) fn ready_changed(pod: &Pod) -> Option<Timestamp> {
    condition(pod, "Ready")?.last_transition_time.as_ref().map(|time| time.0)
}

/// When the pod, ready now, will have been ready for `min_ready_seconds`; `None` if it is not ready.
pub(crate) fn available_at(pod: &Pod, min_ready_seconds: i32) -> Option<Timestamp> {
    if !is_ready(pod) {
        return None;
    }
    if min_ready_seconds <= 0 {
        return Some(Timestamp::MIN);
    }
    Some(ready_since(pod)? + SignedDuration::from_secs(i64::from(min_ready_seconds)))
}

pub(crate) fn is_available(pod: &Pod, min_ready_seconds: i32, now: Timestamp) -> bool {
    available_at(pod, min_ready_seconds).is_some_and(|at| at <= now)
}

pub(crate) fn restarts(pod: &Pod) -> i32 {
    let statuses = pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
    statuses.map(|status| status.restart_count).max().unwrap_or(0)
}

pub(crate) fn deletion_cost(pod: &Pod) -> i32 {
    let annotation = pod.metadata.annotations.as_ref().and_then(|annotations| annotations.get(DELETION_COST));
    annotation.and_then(|cost| cost.parse().ok()).unwrap_or(0)
}
