//! Taint eviction: a pod leaves a node with a NoExecute taint it does not tolerate, at once or when the time it
//! tolerates the taint is over.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Pod, Taint, Toleration};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::api::{DeleteParams, Preconditions};
use kube::{Api, ResourceExt};
use oarlock_machinery::{ApiError, Change, EventType, Key, Next, Recorder, WorkQueue, call, merge_status, queue};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::health::NO_EXECUTE;
use crate::pods::{is_terminal, is_terminating, node_name};
use crate::shared::{Shared, Task};

const CONCURRENCY: usize = 8;

pub(crate) fn start(shared: &Arc<Shared>, stop: &CancellationToken) -> Task {
    let queue: Arc<WorkQueue<Key>> = WorkQueue::new();
    let recorder = shared.recorder.named("taint-eviction-controller");
    let (on_pod, on_node) = (queue.clone(), queue.clone());
    let nodes = shared.nodes.clone();
    shared.pods.on_change(move |change| {
        let pod = change.object();
        let tainted = nodes.get("", node_name(pod)).is_some_and(|node| no_execute(&node).next().is_some());
        if tainted && !matches!(change, Change::Deleted(_)) {
            on_pod.add(Key::of(pod.as_ref()));
        }
    });
    let pods = shared.pods.clone();
    shared.nodes.on_change(move |change| {
        let taints = |node: &Node| no_execute(node).cloned().collect::<Vec<Taint>>();
        let changed = match change {
            Change::Added(node) => no_execute(node).next().is_some(),
            Change::Updated { old, new } => taints(old) != taints(new),
            Change::Deleted(_) => false,
        };
        if changed {
            pods.indexed(&change.object().name_any()).iter().for_each(|pod| on_node.add(Key::of(pod.as_ref())));
        }
    });
    let (shared, stop) = (shared.clone(), stop.clone());
    Box::pin(async move {
        shared.pods.wait_synced().await;
        shared.nodes.wait_synced().await;
        // Pods that were listed before their node was are looked at now.
        shared.pods.list().iter().for_each(|pod| queue.add(Key::of(pod.as_ref())));
        let reconcile = |key| reconcile(shared.clone(), recorder.clone(), key);
        queue::work("taint-eviction", queue, CONCURRENCY, stop, reconcile).await;
    })
}

fn no_execute(node: &Node) -> impl Iterator<Item = &Taint> {
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    taints.filter(|taint| taint.effect == NO_EXECUTE)
}

fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let effect = toleration.effect.as_deref().unwrap_or_default();
    let key = toleration.key.as_deref().unwrap_or_default();
    if (!effect.is_empty() && effect != taint.effect) || (!key.is_empty() && key != taint.key) {
        return false;
    }
    match toleration.operator.as_deref().unwrap_or("Equal") {
        "Exists" => true,
        "Equal" | "" => {
            !key.is_empty()
                && toleration.value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default()
        }
        _ => false,
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Stay {
    Forever,
    Until(Timestamp),
}

/// How long the tolerations let a pod stay on a node with these taints. Each taint counts from when it was added.
fn stay<'a>(tolerations: &[Toleration], taints: impl Iterator<Item = &'a Taint>) -> Stay {
    let mut until: Option<Timestamp> = None;
    for taint in taints {
        let since = taint.time_added.as_ref().map_or(Timestamp::MIN, |time| time.0);
        let matching = tolerations.iter().filter(|toleration| tolerates(toleration, taint));
        let limits: Vec<Option<i64>> = matching.map(|toleration| toleration.toleration_seconds).collect();
        let end = match limits.iter().flatten().min() {
            _ if limits.is_empty() => Some(Timestamp::MIN),
            Some(seconds) if *seconds <= 0 => Some(Timestamp::MIN),
            Some(seconds) => since.checked_add(SignedDuration::from_secs(*seconds)).ok(),
            None => None,
        };
        until = match (until, end) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
    }
    until.map_or(Stay::Forever, Stay::Until)
}

async fn reconcile(shared: Arc<Shared>, recorder: Recorder, key: Key) -> Result<Next, ApiError> {
    let Some(pod) = shared.pods.get_key(&key) else { return Ok(Next::Done) };
    let Some(node) = shared.nodes.get("", node_name(&pod)) else { return Ok(Next::Done) };
    if is_terminating(&pod) || is_terminal(&pod) {
        return Ok(Next::Done);
    }
    let tolerations = pod.spec.as_ref().and_then(|spec| spec.tolerations.as_deref()).unwrap_or_default();
    let Stay::Until(end) = stay(tolerations, no_execute(&node)) else { return Ok(Next::Done) };
    let now = Timestamp::now();
    if end > now {
        return Ok(Next::After(Duration::try_from(end.duration_since(now)).unwrap_or_default()));
    }
    let api: Api<Pod> = Api::namespaced(shared.client.clone(), &key.namespace);
    let mut conditions = pod.status.as_ref().and_then(|status| status.conditions.clone()).unwrap_or_default();
    conditions.retain(|condition| condition.type_ != "DisruptionTarget");
    conditions.push(k8s_openapi::api::core::v1::PodCondition {
        type_: "DisruptionTarget".to_owned(),
        status: "True".to_owned(),
        reason: Some("DeletionByTaintManager".to_owned()),
        message: Some("Taint manager: deleting due to NoExecute taint".to_owned()),
        last_transition_time: Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(now)),
        ..Default::default()
    });
    let metadata = json!({"uid": pod.uid(), "resourceVersion": pod.resource_version()});
    let patch = json!({"metadata": metadata, "status": {"conditions": conditions}});
    merge_status("patch pod status", &api, &key.name, &patch).await?;
    recorder.event(
        pod.as_ref(),
        EventType::Normal,
        "TaintManagerEviction",
        format!("Marking for deletion Pod {}/{}", key.namespace, key.name),
    );
    let parameters = DeleteParams::default().preconditions(Preconditions { uid: pod.uid(), resource_version: None });
    match call("delete pod", api.delete(&key.name, &parameters)).await {
        Err(error) if !(error.is_not_found() || error.is_conflict()) => Err(error),
        _ => Ok(Next::Done),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn taints(list: Value) -> Vec<Taint> {
        serde_json::from_value(list).unwrap()
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn tolerations_say_how_long_a_pod_stays() {
        let added = at(1000).to_string();
        let taints = taints(json!([{"key": "k", "effect": "NoExecute", "timeAdded": added}]));
        let cases = [
            (json!([]), Stay::Until(Timestamp::MIN)),
            (json!([{"key": "k", "operator": "Exists"}]), Stay::Forever),
            (json!([{"operator": "Exists"}]), Stay::Forever),
            (json!([{"key": "k", "operator": "Exists", "tolerationSeconds": 300}]), Stay::Until(at(1300))),
            (json!([{"key": "k", "operator": "Exists", "tolerationSeconds": 0}]), Stay::Until(Timestamp::MIN)),
            (json!([{"key": "k", "operator": "Exists", "effect": "NoSchedule"}]), Stay::Until(Timestamp::MIN)),
            (json!([{"key": "k", "value": "v"}]), Stay::Until(Timestamp::MIN)),
        ];
        for (tolerations, expected) in cases {
            let parsed: Vec<Toleration> = serde_json::from_value(tolerations.clone()).unwrap();
            assert_eq!(stay(&parsed, taints.iter()), expected, "{tolerations}");
        }
        assert_eq!(stay(&[], [].iter()), Stay::Forever);
    }

    #[test]
    fn the_least_tolerated_taint_decides() {
        let added = at(1000).to_string();
        let taints = taints(json!([
            {"key": "a", "effect": "NoExecute", "timeAdded": added},
            {"key": "b", "effect": "NoExecute", "timeAdded": added},
        ]));
        let tolerations: Vec<Toleration> = serde_json::from_value(json!([
            {"key": "a", "operator": "Exists"}, {"key": "b", "operator": "Exists", "tolerationSeconds": 60},
        ]))
        .unwrap();
        assert_eq!(stay(&tolerations, taints.iter()), Stay::Until(at(1060)));
    }
}
