//! Pods nobody looks after: on a node that is gone, being deleted without ever having had a node, or ended long ago
//! and too many.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{DeleteParams, Preconditions};
use kube::{Api, ResourceExt};
use oarlock_machinery::{ApiError, Change, Key, Next, WorkQueue, call, merge_status, queue};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::pods::{is_terminal, is_terminating, node_name};
use crate::shared::{Shared, Task};

const CONCURRENCY: usize = 4;
/// A node may be registered anew within this; then its pods are not orphans.
const QUARANTINE: Duration = Duration::from_secs(40);
/// Ended pods beyond this number are deleted, oldest first.
const ENDED_LIMIT: usize = 12_500;

pub(crate) fn start(shared: &Arc<Shared>, stop: &CancellationToken) -> Task {
    let queue: Arc<WorkQueue<Key>> = WorkQueue::new();
    let (on_pod, on_node) = (queue.clone(), queue.clone());
    let nodes = shared.nodes.clone();
    shared.pods.on_change(move |change| {
        let pod = change.object();
        if matches!(change, Change::Deleted(_)) {
            return;
        }
        if node_name(pod).is_empty() {
            if is_terminating(pod) {
                on_pod.add(Key::of(pod.as_ref()));
            }
        } else if is_terminal(pod) {
            on_pod.add(Key::of(pod.as_ref()));
        } else if nodes.get("", node_name(pod)).is_none() {
            on_pod.add_after(Key::of(pod.as_ref()), QUARANTINE);
        }
    });
    let pods = shared.pods.clone();
    shared.nodes.on_change(move |change| {
        if let Change::Deleted(node) = change {
            for pod in pods.indexed(&node.name_any()) {
                on_node.add_after(Key::of(pod.as_ref()), QUARANTINE);
            }
        }
    });
    let (shared, stop) = (shared.clone(), stop.clone());
    Box::pin(async move {
        shared.pods.wait_synced().await;
        shared.nodes.wait_synced().await;
        queue::work("pod-gc", queue, CONCURRENCY, stop, |key| reconcile(shared.clone(), key)).await;
    })
}

async fn reconcile(shared: Arc<Shared>, key: Key) -> Result<Next, ApiError> {
    let Some(pod) = shared.pods.get_key(&key) else { return Ok(Next::Done) };
    let node = node_name(&pod);
    if node.is_empty() {
        if is_terminating(&pod) {
            delete(&shared, &pod).await?;
        }
        return Ok(Next::Done);
    }
    if shared.nodes.get("", node).is_none() {
        let api: Api<Node> = Api::all(shared.client.clone());
        if call("get node", api.get_metadata_opt(node)).await?.is_some() {
            return Ok(Next::After(QUARANTINE));
        }
        if !is_terminal(&pod) {
            mark_failed(&shared, &pod).await?;
        }
        delete(&shared, &pod).await?;
        return Ok(Next::Done);
    }
    if is_terminal(&pod) && shared.pods.len() > ENDED_LIMIT {
        let mut ended = shared.pods.list();
        ended.retain(|pod| is_terminal(pod));
        ended.sort_by(|a, b| a.metadata.creation_timestamp.cmp(&b.metadata.creation_timestamp));
        let excess = ended.len().saturating_sub(ENDED_LIMIT);
        for pod in ended.into_iter().take(excess) {
            delete(&shared, &pod).await?;
        }
    }
    Ok(Next::Done)
}

/// Says why the pod ended, since its node cannot any more.
async fn mark_failed(shared: &Shared, pod: &Pod) -> Result<(), ApiError> {
    let api: Api<Pod> = Api::namespaced(shared.client.clone(), &pod.namespace().unwrap_or_default());
    let mut conditions = pod.status.as_ref().and_then(|status| status.conditions.clone()).unwrap_or_default();
    conditions.retain(|condition| condition.type_ != "DisruptionTarget");
    conditions.push(k8s_openapi::api::core::v1::PodCondition {
        type_: "DisruptionTarget".to_owned(),
        status: "True".to_owned(),
        reason: Some("DeletionByPodGC".to_owned()),
        message: Some("PodGC: node no longer exists".to_owned()),
        last_transition_time: Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(
            k8s_openapi::jiff::Timestamp::now(),
        )),
        ..Default::default()
    });
    let patch = json!({"metadata": {"uid": pod.uid()}, "status": {"phase": "Failed", "conditions": conditions}});
    let name = pod.name_any();
    match merge_status("patch pod status", &api, &name, &patch).await {
        Err(error) if error.is_not_found() => Ok(()),
        result => result.map(drop),
    }
}

async fn delete(shared: &Shared, pod: &Pod) -> Result<(), ApiError> {
    let api: Api<Pod> = Api::namespaced(shared.client.clone(), &pod.namespace().unwrap_or_default());
    let preconditions = Preconditions { uid: pod.uid(), resource_version: None };
    let parameters = DeleteParams::default().grace_period(0).preconditions(preconditions);
    match call("delete pod", api.delete(&pod.name_any(), &parameters)).await {
        Err(error) if !(error.is_not_found() || error.is_conflict()) => Err(error),
        _ => Ok(()),
    }
}
