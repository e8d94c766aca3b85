//! Finalizers that keep claims which pods use, and volumes that are bound, from going while they are deleted.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use oarlock_machinery::{ApiError, Change, Key, Next, WorkQueue, call, merge_metadata, queue};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::pods;
use crate::shared::{Shared, Task};

const CONCURRENCY: usize = 2;
const OF_CLAIMS: &str = "kubernetes.io/pvc-protection";
const OF_VOLUMES: &str = "kubernetes.io/pv-protection";

pub(crate) fn start(shared: &Arc<Shared>, stop: &CancellationToken) -> Task {
    let claims: Arc<WorkQueue<Key>> = WorkQueue::new();
    let volumes: Arc<WorkQueue<String>> = WorkQueue::new();
    let (on_claim, on_pod, on_volume) = (claims.clone(), claims.clone(), volumes.clone());
    shared.claims.on_change(move |change| on_claim.add(Key::of(change.object().as_ref())));
    shared.pods.on_change(move |change| {
        let pod = change.object();
        if matches!(change, Change::Deleted(_)) || pods::is_terminal(pod) {
            let namespace = pod.namespace().unwrap_or_default();
            pods::claims(pod).for_each(|claim| on_pod.add(Key::new(namespace.clone(), claim)));
        }
    });
    shared.volumes.on_change(move |change| on_volume.add(change.object().name_any()));
    let (shared, stop) = (shared.clone(), stop.clone());
    Box::pin(async move {
        shared.pods.wait_synced().await;
        shared.claims.wait_synced().await;
        shared.volumes.wait_synced().await;
        let claim = |key: Key| claim(shared.clone(), key);
        let volume = |name: String| volume(shared.clone(), name);
        tokio::join!(
            queue::work("claim-protection", claims, CONCURRENCY, stop.clone(), claim),
            queue::work("volume-protection", volumes, CONCURRENCY, stop, volume),
        );
    })
}

/// What is to be done with a finalizer.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Nothing,
    Add,
    /// If nobody uses the object.
    Remove,
}

fn step(metadata: &ObjectMeta, finalizer: &str) -> Step {
    let there = metadata.finalizers.iter().flatten().any(|known| known == finalizer);
    match (metadata.deletion_timestamp.is_some(), there) {
        (false, false) => Step::Add,
        (true, true) => Step::Remove,
        _ => Step::Nothing,
    }
}

/// The object's finalizers with or without one; refused where somebody has changed the object meanwhile.
fn patch(metadata: &ObjectMeta, finalizer: &str, there: bool) -> Value {
    let mut finalizers = metadata.finalizers.clone().unwrap_or_default();
    finalizers.retain(|known| known != finalizer);
    if there {
        finalizers.push(finalizer.to_owned());
    }
    json!({ "metadata": { "resourceVersion": metadata.resource_version, "finalizers": finalizers } })
}

/// A pod that has no node yet or is over does not use its claims.
fn uses(pod: &Pod, claim: &str) -> bool {
    !pods::is_terminal(pod) && !pods::node_name(pod).is_empty() && pods::claims(pod).any(|used| used == claim)
}

async fn claim(shared: Arc<Shared>, key: Key) -> Result<Next, ApiError> {
    let Some(claim) = shared.claims.get_key(&key) else { return Ok(Next::Done) };
    let namespaced = &key.namespace;
    let there = match step(&claim.metadata, OF_CLAIMS) {
        Step::Nothing => return Ok(Next::Done),
        Step::Add => true,
        Step::Remove => {
            let used = |pod: &Pod| uses(pod, &key.name);
            if shared.pods.in_namespace(namespaced).iter().any(|pod| used(pod)) {
                return Ok(Next::Done);
            }
            // What is cached may be behind: a pod may have got its node a moment ago.
            let api: Api<Pod> = Api::namespaced(shared.client.clone(), namespaced);
            let mut all = call("list pods", api.list(&ListParams::default())).await?.items;
            all.iter_mut().for_each(pods::trim);
            if all.iter().any(used) {
                return Ok(Next::Done);
            }
            false
        }
    };
    let api: Api<PersistentVolumeClaim> = Api::namespaced(shared.client.clone(), namespaced);
    settle("protect persistentvolumeclaim", &api, &key.name, &patch(&claim.metadata, OF_CLAIMS, there)).await
}

async fn volume(shared: Arc<Shared>, name: String) -> Result<Next, ApiError> {
    let Some(volume) = shared.volumes.get("", &name) else { return Ok(Next::Done) };
    let bound = volume.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Bound");
    let there = match step(&volume.metadata, OF_VOLUMES) {
        Step::Remove if !bound => false,
        Step::Add => true,
        _ => return Ok(Next::Done),
    };
    let api: Api<PersistentVolume> = Api::all(shared.client.clone());
    settle("protect persistentvolume", &api, &name, &patch(&volume.metadata, OF_VOLUMES, there)).await
}

async fn settle<K>(operation: &'static str, api: &Api<K>, name: &str, patch: &Value) -> Result<Next, ApiError>
where
    K: Clone + serde::de::DeserializeOwned + std::fmt::Debug,
{
    match merge_metadata(operation, api, name, patch).await {
        Err(error) if !error.is_not_found() => Err(error),
        _ => Ok(Next::Done),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(json: Value) -> ObjectMeta {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn others_finalizers_stay() {
        let own = metadata(json!({"resourceVersion": "7", "finalizers": ["a", OF_CLAIMS, "b"]}));
        assert_eq!(step(&own, OF_CLAIMS), Step::Nothing);
        assert_eq!(
            patch(&own, OF_CLAIMS, false)["metadata"],
            json!({"resourceVersion": "7", "finalizers": ["a", "b"]})
        );
        let bare = metadata(json!({"finalizers": ["a"]}));
        assert_eq!(step(&bare, OF_CLAIMS), Step::Add);
        assert_eq!(patch(&bare, OF_CLAIMS, true)["metadata"]["finalizers"], json!(["a", OF_CLAIMS]));
        let going = metadata(json!({"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": [OF_CLAIMS]}));
        assert_eq!(step(&going, OF_CLAIMS), Step::Remove);
        assert_eq!(step(&going, OF_VOLUMES), Step::Nothing, "none is added to what is going");
    }

    #[test]
    fn only_a_pod_on_a_node_uses_its_claims() {
        let pod = |node: &str, phase: &str| {
            let mut pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p"}, "status": {"phase": phase},
                "spec": {"nodeName": node, "containers": [], "volumes": [
                    {"name": "v", "persistentVolumeClaim": {"claimName": "c"}}, {"name": "own", "ephemeral": {}}]}}))
            .unwrap();
            pods::trim(&mut pod);
            pod
        };
        assert!(uses(&pod("n", "Pending"), "c") && uses(&pod("n", "Running"), "p-own"));
        assert!(!uses(&pod("n", "Running"), "other"));
        assert!(!uses(&pod("", "Pending"), "c") && !uses(&pod("n", "Succeeded"), "c"));
    }
}
