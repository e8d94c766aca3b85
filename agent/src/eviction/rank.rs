//! Which pod goes first when something runs short. Pure.

use std::cmp::Reverse;

use k8s_openapi::api::core::v1::Pod;

use super::threshold::Signal;
use super::usage::PodUsage;
use crate::spec;
use crate::spec::resources::pod_requests;

/// The lowest priority of pods that are never ended for the node's sake.
pub(crate) const CRITICAL_PRIORITY: i32 = 2_000_000_000;

/// Whether the node needs the pod: static, the mirror of a static one, or of a system priority.
pub(crate) fn is_critical(pod: &Pod) -> bool {
    spec::is_static(pod) || spec::is_mirror(pod) || priority(pod) >= CRITICAL_PRIORITY
}

fn priority(pod: &Pod) -> i32 {
    pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or(0)
}

/// What a pod's part in a shortage amounts to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Share {
    pub request: i64,
    /// None when it could not be measured.
    pub usage: Option<i64>,
}

/// The part of a pod in a shortage of `signal`. `split` says that images have a file system of their own.
pub(super) fn share(pod: &Pod, usage: Option<&PodUsage>, signal: Signal, split: bool) -> Share {
    let request = |name: &str| pod_requests(pod).get(name).map_or(0, |milli| milli / 1000);
    let whole = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    match signal {
        Signal::MemoryAvailable => {
            Share { request: request("memory"), usage: usage.and_then(|usage| usage.memory_bytes).map(whole) }
        }
        Signal::NodefsAvailable => {
            let of = |usage: &PodUsage| if split { usage.without_layers_bytes() } else { usage.disk_bytes() };
            Share { request: request("ephemeral-storage"), usage: usage.map(of).map(whole) }
        }
        Signal::ImagefsAvailable => {
            let of = |usage: &PodUsage| if split { usage.layers_bytes() } else { usage.disk_bytes() };
            Share { request: request("ephemeral-storage"), usage: usage.map(of).map(whole) }
        }
        Signal::NodefsInodesFree | Signal::ImagefsInodesFree => {
            Share { request: 0, usage: usage.map(|usage| whole(usage.inodes)) }
        }
        Signal::PidAvailable => Share { request: 0, usage: usage.and_then(|usage| usage.processes).map(whole) },
    }
}

/// Sorts pods, the first to go first: those above their request, then by priority, then by how far above it they are. A
/// pod that cannot be measured counts as above.
pub(super) fn order<T>(signal: Signal, candidates: &mut [(T, Share)], pod: impl Fn(&T) -> Pod) {
    candidates.sort_by_cached_key(|(candidate, share)| {
        let pod = pod(candidate);
        let above = share.usage.is_none_or(|usage| usage > share.request);
        let over = share.usage.map_or(i64::MAX, |usage| usage.saturating_sub(share.request));
        // Process ids have no request: priority comes first.
        let within = signal != Signal::PidAvailable && !above;
        (within, priority(&pod), Reverse(over), spec::pod_uid(&pod).to_owned())
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, priority: i32) -> Pod {
        serde_json::from_value(serde_json::json!({"metadata": {"name": name, "uid": name},
            "spec": {"priority": priority, "containers": []}}))
        .expect("a pod")
    }

    fn ordered(signal: Signal, pods: &[(&str, i32, i64, Option<i64>)]) -> Vec<String> {
        let mut candidates: Vec<(Pod, Share)> = pods
            .iter()
            .map(|(name, priority, request, usage)| (pod(name, *priority), Share { request: *request, usage: *usage }))
            .collect();
        order(signal, &mut candidates, Clone::clone);
        candidates.iter().map(|(pod, _)| spec::pod_name(pod).to_owned()).collect()
    }

    #[test]
    fn above_request_then_priority_then_the_excess() {
        let pods = [
            ("within", 0, 100, Some(50)),
            ("important", 1000, 10, Some(900)),
            ("little-above", 0, 100, Some(110)),
            ("far-above", 0, 100, Some(800)),
            ("within-most", 0, 500, Some(499)),
            ("unmeasured", 0, 0, None),
        ];
        let order = ordered(Signal::MemoryAvailable, &pods);
        assert_eq!(order, ["unmeasured", "far-above", "little-above", "important", "within-most", "within"]);
    }

    #[test]
    fn process_ids_go_by_priority_and_then_by_count() {
        let pods = [("few", 0, 0, Some(3)), ("many", 0, 0, Some(300)), ("important", 10, 0, Some(9000))];
        assert_eq!(ordered(Signal::PidAvailable, &pods), ["many", "few", "important"]);
    }

    #[test]
    fn system_pods_and_static_pods_are_critical() {
        assert!(is_critical(&pod("a", CRITICAL_PRIORITY)));
        assert!(!is_critical(&pod("a", CRITICAL_PRIORITY - 1)));
        let mut of_file = pod("a", 0);
        let annotations = of_file.metadata.annotations.get_or_insert_default();
        annotations.insert(spec::names::CONFIG_SOURCE.to_owned(), "file".to_owned());
        assert!(is_critical(&of_file));
    }
}
