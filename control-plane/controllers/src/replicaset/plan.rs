//! What a ReplicaSet should do: how many pods to create, which to delete, what status to show. Pure.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::{ReplicaSet, ReplicaSetCondition, ReplicaSetStatus};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use crate::conditions;
use crate::owners::controller_reference;
use crate::pods::{
    available_at, deletion_cost, is_active, is_available, is_ready, is_terminating, node_name, phase, ready_since,
    restarts,
};

/// No more pods than this are created or deleted in one go.
pub(super) const BURST: usize = 500;

#[derive(Debug, PartialEq)]
pub(super) enum Scale {
    Keep,
    Create(usize),
    Delete(Vec<Arc<Pod>>),
}

pub(super) fn desired(set: &ReplicaSet) -> i32 {
    set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1)
}

pub(super) fn min_ready_seconds(set: &ReplicaSet) -> i32 {
    set.spec.as_ref().and_then(|spec| spec.min_ready_seconds).unwrap_or(0)
}

/// `active` are the set's active pods; `related` all active pods of the same owner, for spreading over nodes.
pub(super) fn scale(set: &ReplicaSet, active: &[Arc<Pod>], related: &[Arc<Pod>], now: Timestamp) -> Scale {
    let wanted = usize::try_from(desired(set)).unwrap_or(0);
    match active.len().cmp(&wanted) {
        Ordering::Equal => Scale::Keep,
        Ordering::Less => Scale::Create((wanted - active.len()).min(BURST)),
        Ordering::Greater => Scale::Delete(choose(active, related, (active.len() - wanted).min(BURST), now)),
    }
}

fn choose(active: &[Arc<Pod>], related: &[Arc<Pod>], count: usize, now: Timestamp) -> Vec<Arc<Pod>> {
    let mut on_node: HashMap<&str, usize> = HashMap::new();
    for pod in related {
        *on_node.entry(node_name(pod)).or_default() += 1;
    }
    let mut ranked: Vec<&Arc<Pod>> = active.iter().collect();
    ranked.sort_by(|a, b| removal_order(a, b, &on_node, now));
    ranked.into_iter().take(count).cloned().collect()
}

/// Less means "goes first": the least useful and the youngest.
fn removal_order(a: &Pod, b: &Pod, on_node: &HashMap<&str, usize>, now: Timestamp) -> Ordering {
    let assigned = |pod: &Pod| !node_name(pod).is_empty();
    let progress = |pod: &Pod| match phase(pod) {
        "Pending" => 0,
        "Unknown" => 1,
        _ => 2,
    };
    let crowd = |pod: &Pod| on_node.get(node_name(pod)).copied().unwrap_or(0);
    let age = |time: Option<Timestamp>| time.map_or(0, |time| now.duration_since(time).as_secs().max(0));
    let created = |pod: &Pod| pod.metadata.creation_timestamp.as_ref().map(|time| time.0);
    assigned(a)
        .cmp(&assigned(b))
        .then_with(|| progress(a).cmp(&progress(b)))
        .then_with(|| is_ready(a).cmp(&is_ready(b)))
        .then_with(|| deletion_cost(a).cmp(&deletion_cost(b)))
        .then_with(|| crowd(b).cmp(&crowd(a)))
        .then_with(|| magnitude(age(ready_since(a))).cmp(&magnitude(age(ready_since(b)))))
        .then_with(|| restarts(b).cmp(&restarts(a)))
        .then_with(|| magnitude(age(created(a))).cmp(&magnitude(age(created(b)))))
        .then_with(|| a.metadata.uid.cmp(&b.metadata.uid))
}

/// Ages are compared by their order of magnitude only, so that among pods of about the same age chance decides.
fn magnitude(seconds: i64) -> u32 {
    seconds.max(0).checked_ilog2().map_or(0, |log| log + 1)
}

/// The pod to create; the API server completes the name.
pub(super) fn new_pod(set: &ReplicaSet) -> Pod {
    let template = set.spec.as_ref().and_then(|spec| spec.template.clone()).unwrap_or_default();
    let meta = template.metadata.unwrap_or_default();
    Pod {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}-", set.name_any())),
            namespace: set.namespace(),
            labels: meta.labels,
            annotations: meta.annotations,
            finalizers: meta.finalizers,
            owner_references: Some(vec![controller_reference(set)]),
            ..Default::default()
        },
        spec: template.spec,
        status: None,
    }
}

/// A failure of the last attempt to create or delete pods.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Failure {
    pub reason: &'static str,
    pub message: String,
}

pub(super) fn status(
    set: &ReplicaSet,
    claimed: &[Arc<Pod>],
    failure: Option<&Failure>,
    now: Timestamp,
) -> ReplicaSetStatus {
    let active: Vec<&Arc<Pod>> = claimed.iter().filter(|pod| is_active(pod)).collect();
    let template = set.spec.as_ref().and_then(|spec| spec.template.as_ref());
    let wanted = template.and_then(|template| template.metadata.as_ref()).and_then(|meta| meta.labels.as_ref());
    let labelled = |pod: &&&Arc<Pod>| {
        let labels = pod.metadata.labels.as_ref();
        wanted.into_iter().flatten().all(|(key, value)| labels.and_then(|labels| labels.get(key)) == Some(value))
    };
    let count = |filter: &dyn Fn(&Pod) -> bool| {
        let number = active.iter().filter(|pod| filter(pod)).count();
        i32::try_from(number).ok().filter(|number| *number > 0)
    };
    let terminating = claimed.iter().filter(|pod| is_terminating(pod) && !crate::pods::is_terminal(pod)).count();
    let old = set.status.as_ref();
    let mut all = old.and_then(|status| status.conditions.clone()).unwrap_or_default();
    match failure {
        Some(Failure { reason, message }) => {
            let condition: ReplicaSetCondition =
                conditions::Condition::new("ReplicaFailure", true, reason, message.clone(), now);
            conditions::set(&mut all, true, reason, condition);
        }
        None => conditions::remove(&mut all, "ReplicaFailure"),
    }
    ReplicaSetStatus {
        replicas: i32::try_from(active.len()).unwrap_or(i32::MAX),
        fully_labeled_replicas: i32::try_from(active.iter().filter(labelled).count()).ok().filter(|n| *n > 0),
        ready_replicas: count(&is_ready),
        available_replicas: count(&|pod| is_available(pod, min_ready_seconds(set), now)),
        terminating_replicas: i32::try_from(terminating).ok(),
        observed_generation: set.metadata.generation,
        conditions: (!all.is_empty()).then_some(all),
    }
}

/// When the next ready pod becomes available, if one is waiting for its minReadySeconds.
pub(super) fn next_availability(set: &ReplicaSet, claimed: &[Arc<Pod>], now: Timestamp) -> Option<Timestamp> {
    let times = claimed.iter().filter(|pod| is_active(pod)).filter_map(|pod| available_at(pod, min_ready_seconds(set)));
    times.filter(|at| *at > now).min()
}

/// Batch sizes of creations: 1, 2, 4 …; if the first pod is refused, only one request was wasted.
pub(super) fn slow_start(total: usize) -> impl Iterator<Item = usize> {
    let mut left = total;
    let mut size = 1;
    std::iter::from_fn(move || {
        let batch = size.min(left);
        left -= batch;
        size *= 2;
        (batch > 0).then_some(batch)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    const NOW: i64 = 1_000_000;

    fn now() -> Timestamp {
        Timestamp::from_second(NOW).unwrap()
    }

    fn time(age: i64) -> String {
        Timestamp::from_second(NOW - age).unwrap().to_string()
    }

    fn pod(name: &str, node: &str, phase: &str, ready_age: Option<i64>, age: i64) -> Arc<Pod> {
        let ready = if ready_age.is_some() { "True" } else { "False" };
        Arc::new(
            serde_json::from_value(json!({
                "metadata": {"name": name, "uid": name, "creationTimestamp": time(age), "labels": {"app": "a"}},
                "spec": {"nodeName": node, "containers": []},
                "status": {"phase": phase, "conditions": [
                    {"type": "Ready", "status": ready, "lastTransitionTime": time(ready_age.unwrap_or(0))}
                ]},
            }))
            .unwrap(),
        )
    }

    fn set(replicas: i32, min_ready: i32) -> ReplicaSet {
        serde_json::from_value(json!({
            "metadata": {"name": "web-1", "namespace": "default", "uid": "set", "generation": 3},
            "spec": {"replicas": replicas, "minReadySeconds": min_ready, "selector": {},
                     "template": {"metadata": {"labels": {"app": "a"}}, "spec": {"containers": []}}},
        }))
        .unwrap()
    }

    fn deleted(set: &ReplicaSet, pods: &[Arc<Pod>]) -> Vec<String> {
        match scale(set, pods, pods, now()) {
            Scale::Delete(pods) => pods.iter().map(|pod| pod.name_any()).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_least_useful_pods_go_first() {
        let pods = [
            pod("steady", "n1", "Running", Some(5000), 6000),
            pod("young", "n2", "Running", Some(10), 20),
            pod("unready", "n3", "Running", None, 6000),
            pod("pending", "n4", "Pending", None, 6000),
            pod("unassigned", "", "Pending", None, 6000),
        ];
        assert_eq!(deleted(&set(1, 0), &pods), ["unassigned", "pending", "unready", "young"]);
    }

    #[test]
    fn crowded_nodes_and_deletion_cost_decide_between_equals() {
        let pods = [
            pod("alone", "n1", "Running", Some(100), 100),
            pod("crowd-1", "n2", "Running", Some(100), 100),
            pod("crowd-2", "n2", "Running", Some(100), 100),
        ];
        assert_eq!(deleted(&set(2, 0), &pods), ["crowd-1"]);
        let mut cheap = (*pods[0]).clone();
        cheap.annotations_mut().insert(crate::pods::DELETION_COST.into(), "-5".into());
        assert_eq!(deleted(&set(2, 0), &[Arc::new(cheap), pods[1].clone(), pods[2].clone()]), ["alone"]);
    }

    #[test]
    fn status_counts_ready_available_and_terminating() {
        let mut going = (*pod("going", "n", "Running", Some(100), 100)).clone();
        going.metadata.deletion_timestamp = going.metadata.creation_timestamp.clone();
        let pods = [
            pod("old", "n", "Running", Some(100), 100),
            pod("fresh", "n", "Running", Some(5), 100),
            pod("unready", "n", "Running", None, 100),
            pod("failed", "n", "Failed", None, 100),
            Arc::new(going),
        ];
        let set = set(3, 30);
        let status = status(&set, &pods, None, now());
        assert_eq!((status.replicas, status.ready_replicas, status.available_replicas), (3, Some(2), Some(1)));
        assert_eq!((status.terminating_replicas, status.observed_generation), (Some(1), Some(3)));
        let wait = next_availability(&set, &pods, now()).unwrap().duration_since(now());
        assert_eq!(wait.as_secs(), 25);
    }

    #[test]
    fn a_failure_is_shown_and_taken_back() {
        let mut set = set(1, 0);
        let failure = Failure { reason: "FailedCreate", message: "quota".into() };
        set.status = Some(status(&set, &[], Some(&failure), now()));
        let shown = &set.status.as_ref().unwrap().conditions.as_ref().unwrap()[0];
        assert_eq!((shown.type_.as_str(), shown.reason.as_deref()), ("ReplicaFailure", Some("FailedCreate")));
        assert_eq!(status(&set, &[], None, now()).conditions, None);
    }

    proptest! {
        #[test]
        fn scaling_always_meets_the_wanted_number(replicas in 0i32..40, have in 0usize..40) {
            let pods: Vec<_> = (0..have).map(|n| pod(&format!("p{n}"), "n", "Running", None, 10)).collect();
            let after = match scale(&set(replicas, 0), &pods, &pods, now()) {
                Scale::Keep => have,
                Scale::Create(count) => have + count,
                Scale::Delete(gone) => have - gone.len(),
            };
            prop_assert_eq!(after, replicas as usize);
        }

        #[test]
        fn slow_start_sends_everything_once(total in 0usize..2000) {
            prop_assert_eq!(slow_start(total).sum::<usize>(), total);
        }
    }
}
