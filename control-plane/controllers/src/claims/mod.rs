//! Binding PersistentVolumeClaims to PersistentVolumes that exist: those that name each other, and otherwise the smallest that fits.
//!
//! Makes no volumes and deletes none. Claims of a class that waits for its first consumer are left alone. The volume is written first:
//! one that names a claim is found again by whoever goes on after a crash.

mod fit;

use std::sync::Arc;

use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use kube::{Api, ResourceExt};
use oarlock_machinery::{ApiError, Key, Next, WorkQueue, merge, merge_status, queue};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::shared::{Shared, Task};

const CONCURRENCY: usize = 2;

pub(crate) fn start(shared: &Arc<Shared>, stop: &CancellationToken) -> Task {
    let claims: Arc<WorkQueue<Key>> = WorkQueue::new();
    let volumes: Arc<WorkQueue<String>> = WorkQueue::new();
    let (on_claim, claims_volume, on_volume) = (claims.clone(), volumes.clone(), volumes.clone());
    shared.claims.on_change(move |change| {
        let claim = change.object();
        on_claim.add(Key::of(claim.as_ref()));
        if let Some(volume) = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone()) {
            claims_volume.add(volume);
        }
    });
    let (waiting, again) = (shared.claims.clone(), claims.clone());
    shared.volumes.on_change(move |change| {
        on_volume.add(change.object().name_any());
        for claim in waiting.list().into_iter().filter(|claim| !fit::is_bound(claim)) {
            again.add(Key::of(claim.as_ref()));
        }
    });
    let (shared, stop) = (shared.clone(), stop.clone());
    Box::pin(async move {
        shared.claims.wait_synced().await;
        shared.volumes.wait_synced().await;
        shared.classes.wait_synced().await;
        let claim = |key: Key| reconcile_claim(shared.clone(), key);
        let volume = |name: String| reconcile_volume(shared.clone(), name);
        tokio::join!(
            queue::work("claims", claims, CONCURRENCY, stop.clone(), claim),
            queue::work("volumes", volumes, CONCURRENCY, stop, volume),
        );
    })
}

async fn reconcile_claim(shared: Arc<Shared>, key: Key) -> Result<Next, ApiError> {
    let Some(claim) = shared.claims.get_key(&key).filter(|claim| claim.metadata.deletion_timestamp.is_none()) else {
        return Ok(Next::Done);
    };
    if fit::is_bound(&claim) {
        return Ok(Next::Done);
    }
    let named = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone()).filter(|name| !name.is_empty());
    let found = match named {
        Some(name) => shared.volumes.get("", &name).filter(|volume| fit::may_have(&claim, volume)),
        None if waits(&shared, &claim) => None,
        None => fit::best(&claim, &shared.volumes.list()),
    };
    match found {
        Some(volume) => bind(&shared, &claim, &volume).await.map(|()| Next::Done),
        None => Ok(Next::Done),
    }
}

/// Whether the claim's class wants a pod to be scheduled first.
fn waits(shared: &Shared, claim: &PersistentVolumeClaim) -> bool {
    let class = claim.spec.as_ref().and_then(|spec| spec.storage_class_name.as_deref()).unwrap_or_default();
    let class = shared.classes.get("", class);
    class.is_some_and(|class| class.volume_binding_mode.as_deref() == Some("WaitForFirstConsumer"))
}

async fn bind(shared: &Shared, claim: &PersistentVolumeClaim, volume: &PersistentVolume) -> Result<(), ApiError> {
    let (namespace, name) = (claim.namespace().unwrap_or_default(), claim.name_any());
    let volumes: Api<PersistentVolume> = Api::all(shared.client.clone());
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(shared.client.clone(), &namespace);
    let volume_name = volume.name_any();
    let reference = json!({ "kind": "PersistentVolumeClaim", "apiVersion": "v1", "namespace": namespace, "name": name,
        "uid": claim.metadata.uid, "resourceVersion": claim.metadata.resource_version });
    // Refused where another claim took the volume meanwhile.
    let version = json!({ "resourceVersion": volume.metadata.resource_version });
    let patch = json!({ "metadata": version, "spec": { "claimRef": reference } });
    merge("bind persistentvolume", &volumes, &volume_name, &patch).await?;
    merge_status("bind persistentvolume", &volumes, &volume_name, &json!({ "status": { "phase": "Bound" } })).await?;
    let marks = json!({ "pv.kubernetes.io/bind-completed": "yes", "pv.kubernetes.io/bound-by-controller": "yes" });
    let patch = json!({ "metadata": { "annotations": marks }, "spec": { "volumeName": volume_name } });
    merge("bind persistentvolumeclaim", &claims, &name, &patch).await?;
    let spec = volume.spec.clone().unwrap_or_default();
    let status = json!({ "status": { "phase": "Bound", "capacity": spec.capacity, "accessModes": spec.access_modes } });
    merge_status("bind persistentvolumeclaim", &claims, &name, &status).await?;
    tracing::info!(claim = %name, claim.namespace = %namespace, volume = volume_name, "claim bound to volume");
    Ok(())
}

/// The volume's phase: free, taken, or left behind by a claim that is gone.
async fn reconcile_volume(shared: Arc<Shared>, name: String) -> Result<Next, ApiError> {
    let Some(volume) = shared.volumes.get("", &name) else { return Ok(Next::Done) };
    let claim = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref()).and_then(|reference| {
        let (namespace, name) = (reference.namespace.clone()?, reference.name.clone()?);
        shared.claims.get(&namespace, &name)
    });
    let phase = fit::phase(&volume, claim.as_deref());
    let now = volume.status.as_ref().and_then(|status| status.phase.as_deref());
    if now == Some(phase) {
        return Ok(Next::Done);
    }
    let api: Api<PersistentVolume> = Api::all(shared.client.clone());
    let status = json!({ "status": { "phase": phase } });
    merge_status("update persistentvolume", &api, &name, &status).await.map(|_| Next::Done)
}
