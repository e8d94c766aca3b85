//! Which pods use more local disk than they may: emptyDir sizeLimit, a container's and a pod's ephemeral-storage limit. Pure.

use k8s_openapi::api::core::v1::{Container, Pod};

use super::message;
use super::usage::PodUsage;
use crate::spec::resources::{pod_limits, value};

const RESOURCE: &str = "ephemeral-storage";

/// Whether a pod has a limit that only measuring can enforce.
pub(super) fn is_limited(pod: &Pod) -> bool {
    let Some(spec) = &pod.spec else { return false };
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    containers.into_iter().any(|container| limit(container).is_some())
        || spec.resources.as_ref().and_then(|r| r.limits.as_ref()).is_some_and(|limits| limits.contains_key(RESOURCE))
        || spec
            .volumes
            .iter()
            .flatten()
            .any(|volume| volume.empty_dir.as_ref().is_some_and(|source| source.size_limit.is_some()))
}

fn limit(container: &Container) -> Option<(i64, String)> {
    let quantity = container.resources.as_ref()?.limits.as_ref()?.get(RESOURCE)?;
    Some((value(quantity), quantity.0.clone()))
}

/// Why the pod has to go; None while it keeps within its limits.
pub(super) fn exceeded(pod: &Pod, usage: &PodUsage) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let more = |used: u64, limit: i64| i64::try_from(used).unwrap_or(i64::MAX) > limit;
    for volume in spec.volumes.iter().flatten() {
        let limit = volume.empty_dir.as_ref().and_then(|source| source.size_limit.as_ref());
        let used = usage.volumes.get(&volume.name);
        if let (Some(limit), Some(used)) = (limit, used)
            && value(limit) > 0
            && more(*used, value(limit))
        {
            return Some(message::empty_dir(&volume.name, &limit.0));
        }
    }
    if let Some(total) = pod_limits(pod).get(RESOURCE).map(|milli| milli / 1000)
        && more(usage.disk_bytes(), total)
    {
        return Some(message::pod_storage(&message::bytes(total)));
    }
    for container in spec.init_containers.iter().flatten().chain(&spec.containers) {
        if let (Some((limit, shown)), Some(used)) = (limit(container), usage.containers.get(&container.name))
            && more(used.layer_bytes + used.log_bytes, limit)
        {
            return Some(message::container_storage(&container.name, &shown));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::usage::ContainerUsage;
    use super::*;

    fn pod() -> Pod {
        serde_json::from_value(serde_json::json!({"metadata": {"name": "p"}, "spec": {
            "volumes": [{"name": "cache", "emptyDir": {"sizeLimit": "1Mi"}}, {"name": "open", "emptyDir": {}}],
            "containers": [{"name": "a", "resources": {"limits": {"ephemeral-storage": "2Mi"}}},
                {"name": "b", "resources": {"limits": {"ephemeral-storage": "4Mi"}}}]}}))
        .expect("a pod")
    }

    fn usage(cache: u64, open: u64, layer: u64, logs: u64) -> PodUsage {
        let used = ContainerUsage { memory_bytes: None, layer_bytes: layer, log_bytes: logs };
        PodUsage {
            volumes: [("cache".to_owned(), cache), ("open".to_owned(), open)].into(),
            containers: [("a".to_owned(), used)].into(),
            ..Default::default()
        }
    }

    #[test]
    fn each_limit_is_told_apart() {
        const MIB: u64 = 1 << 20;
        assert!(is_limited(&pod()));
        assert_eq!(exceeded(&pod(), &usage(MIB, MIB, MIB, MIB)), None, "as much as is allowed");
        let volume = exceeded(&pod(), &usage(MIB + 1, 0, 0, 0)).expect("too much");
        assert_eq!(volume, "Usage of EmptyDir volume \"cache\" exceeds the limit \"1Mi\". ");
        let container = exceeded(&pod(), &usage(0, 0, MIB, MIB + 1)).expect("too much");
        assert_eq!(container, "Container a exceeded its local ephemeral storage limit \"2Mi\". ");
        let whole = exceeded(&pod(), &usage(0, 5 * MIB, MIB, MIB)).expect("too much");
        assert_eq!(whole, "Pod ephemeral local storage usage exceeds the total limit of containers 6Mi. ");
    }

    #[test]
    fn a_pod_without_limits_is_not_measured_for_them() {
        let open = serde_json::json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "a"}],
            "volumes": [{"name": "v", "emptyDir": {}}]}});
        assert!(!is_limited(&serde_json::from_value(open).expect("a pod")));
    }
}
