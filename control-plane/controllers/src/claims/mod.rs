//! Binding PersistentVolumeClaims to PersistentVolumes: those that name each other, and otherwise the smallest that fits; and what
//! becomes of a volume whose claim is gone. Where a claim's class has it wait for its first pod, the scheduler chooses: it
//! names the claim in a volume, or the node in the claim.
//!
//! Makes no volumes and deletes none: claims are marked for the provisioner of their class, which also deletes what it made. The
//! volume is written first: one that names a claim is found again by whoever goes on after a crash.

mod fit;
pub(crate) mod protection;
mod reclaim;

use std::sync::Arc;

use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use kube::{Api, ResourceExt};
use oarlock_machinery::volumes::{BOUND_BY_CONTROLLER, NO_PROVISIONER, SELECTED_NODE, class_name, is_bound, may_have};
use oarlock_machinery::{ApiError, Change, EventType, Key, Next, WorkQueue, call, merge, merge_status, queue};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use self::reclaim::Reclaim;
use crate::pods;
use crate::shared::{Shared, Task};

const CONCURRENCY: usize = 2;
/// By which of them provisioners know their claims depends on their age.
const PROVISIONER: &[&str] =
    &["volume.kubernetes.io/storage-provisioner", "volume.beta.kubernetes.io/storage-provisioner"];

pub(crate) fn start(shared: &Arc<Shared>, stop: &CancellationToken) -> Task {
    let claims: Arc<WorkQueue<Key>> = WorkQueue::new();
    let volumes: Arc<WorkQueue<String>> = WorkQueue::new();
    let kept = shared.volumes.clone();
    let (on_claim, claims_volume, on_volume) = (claims.clone(), volumes.clone(), volumes.clone());
    shared.claims.on_change(move |change| {
        let claim = change.object();
        on_claim.add(Key::of(claim.as_ref()));
        if let Some(volume) = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone()) {
            claims_volume.add(volume);
        }
        // A binding that was cut off is known to the volume alone.
        if matches!(change, Change::Deleted(_)) {
            let of_it = |volume: &Arc<PersistentVolume>| fit::names(volume, claim);
            kept.list().into_iter().filter(of_it).for_each(|volume| claims_volume.add(volume.name_any()));
        }
    });
    let (waiting, on_pod) = (shared.claims.clone(), claims.clone());
    shared.pods.on_change(move |change| {
        let Change::Added(pod) = change else { return };
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let open = |claim: &&str| waiting.get(namespace, claim).is_some_and(|claim| !is_bound(&claim));
        pods::claims(pod).filter(open).for_each(|claim| on_pod.add(Key::new(namespace, claim)));
    });
    let (waiting, on_class) = (shared.claims.clone(), claims.clone());
    shared.classes.on_change(move |change| {
        let class = change.object().name_any();
        let of_it = |claim: &Arc<PersistentVolumeClaim>| class_name(claim) == class && !is_bound(claim);
        waiting.list().into_iter().filter(of_it).for_each(|claim| on_class.add(Key::of(claim.as_ref())));
    });
    let (waiting, again) = (shared.claims.clone(), claims.clone());
    shared.volumes.on_change(move |change| {
        on_volume.add(change.object().name_any());
        if let Change::Deleted(volume) = change
            && let Some(reference) = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref())
        {
            let (namespace, name) = (reference.namespace.clone(), reference.name.clone());
            again.add(Key::new(namespace.unwrap_or_default(), name.unwrap_or_default()));
        }
        for claim in waiting.list().into_iter().filter(|claim| !is_bound(claim)) {
            again.add(Key::of(claim.as_ref()));
        }
    });
    let (shared, stop) = (shared.clone(), stop.clone());
    Box::pin(async move {
        shared.claims.wait_synced().await;
        shared.volumes.wait_synced().await;
        shared.classes.wait_synced().await;
        shared.pods.wait_synced().await;
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
    let named = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone()).filter(|name| !name.is_empty());
    if is_bound(&claim) {
        return lost(&shared, &claim, named.as_deref()).await;
    }
    if let Some(name) = named {
        let found = shared.volumes.get("", &name).filter(|volume| may_have(&claim, volume));
        return match found {
            Some(volume) => bind(&shared, &claim, &volume).await.map(|()| Next::Done),
            None => Ok(Next::Done),
        };
    }
    let waits = waits(&shared, &claim);
    match fit::best(&claim, &shared.volumes.list(), waits) {
        Some(volume) => bind(&shared, &claim, &volume).await?,
        None if waits && !claim.annotations().contains_key(SELECTED_NODE) => {
            let (reason, message) = waits_for(&shared, &claim);
            shared.recorder.event(claim.as_ref(), EventType::Normal, reason, message);
        }
        None => provision(&shared, &claim).await?,
    }
    Ok(Next::Done)
}

/// A bound claim whose volume is gone says so.
async fn lost(shared: &Shared, claim: &PersistentVolumeClaim, volume: Option<&str>) -> Result<Next, ApiError> {
    let Some(volume) = volume.filter(|volume| shared.volumes.get("", volume).is_none()) else { return Ok(Next::Done) };
    let volumes: Api<PersistentVolume> = Api::all(shared.client.clone());
    if call("get persistentvolume", volumes.get_opt(volume)).await?.is_some() {
        return Ok(Next::Done);
    }
    let message = "Bound claim has lost its PersistentVolume. Data on the volume is lost!";
    shared.recorder.event(claim, EventType::Warning, "ClaimLost", message);
    let claims: Api<PersistentVolumeClaim> =
        Api::namespaced(shared.client.clone(), &claim.namespace().unwrap_or_default());
    let status = json!({ "status": { "phase": "Lost" } });
    merge_status("update persistentvolumeclaim", &claims, &claim.name_any(), &status).await.map(|_| Next::Done)
}

/// Whether the claim's class wants a pod to be scheduled first.
fn waits(shared: &Shared, claim: &PersistentVolumeClaim) -> bool {
    let class = shared.classes.get("", class_name(claim));
    class.is_some_and(|class| class.volume_binding_mode.as_deref() == Some("WaitForFirstConsumer"))
}

/// Reason and message of a wait: for a pod, or for the scheduler to give one a node.
fn waits_for(shared: &Shared, claim: &PersistentVolumeClaim) -> (&'static str, String) {
    let (namespace, name) = (claim.namespace().unwrap_or_default(), claim.name_any());
    let waits = |pod: &Pod| {
        pods::is_active(pod) && pods::node_name(pod).is_empty() && pods::claims(pod).any(|used| used == name)
    };
    let pods = shared.pods.in_namespace(&namespace);
    let mut waiting: Vec<String> = pods.iter().filter(|pod| waits(pod)).map(|pod| pod.name_any()).collect();
    waiting.sort();
    match waiting.as_slice() {
        [] => ("WaitForFirstConsumer", "waiting for first consumer to be created before binding".to_owned()),
        [only] => ("WaitForPodScheduled", format!("waiting for pod {only} to be scheduled")),
        many => ("WaitForPodScheduled", format!("waiting for pods {} to be scheduled", many.join(","))),
    }
}

/// Marks the claim for the provisioner of its class, or says why none will make a volume.
async fn provision(shared: &Shared, claim: &PersistentVolumeClaim) -> Result<(), ApiError> {
    let recorder = &shared.recorder;
    let name = class_name(claim);
    if name.is_empty() {
        let message = "no persistent volumes available for this claim and no storage class is set";
        recorder.event(claim, EventType::Normal, "FailedBinding", message);
        return Ok(());
    }
    let Some(class) = shared.classes.get("", name) else {
        let message = format!("storageclass.storage.k8s.io {name:?} not found");
        recorder.event(claim, EventType::Warning, "ProvisioningFailed", message);
        return Ok(());
    };
    let provisioner = class.provisioner.as_str();
    let marked = |key: &str, value: &str| claim.annotations().get(key).map(String::as_str) == Some(value);
    let mut marks = serde_json::Map::new();
    if provisioner != NO_PROVISIONER {
        marks.extend(PROVISIONER.iter().map(|key| ((*key).to_owned(), json!(provisioner))));
    }
    marks.retain(|key, value| !marked(key, value.as_str().unwrap_or_default()));
    if !marks.is_empty() {
        let claims: Api<PersistentVolumeClaim> =
            Api::namespaced(shared.client.clone(), &claim.namespace().unwrap_or_default());
        let patch = json!({ "metadata": { "annotations": marks } });
        merge("mark persistentvolumeclaim", &claims, &claim.name_any(), &patch).await?;
    }
    if provisioner == NO_PROVISIONER {
        let message = format!("no volume plugin matched name: {NO_PROVISIONER}");
        recorder.event(claim, EventType::Warning, "ProvisioningFailed", message);
    } else {
        let message = format!(
            "Waiting for a volume to be created either by the external provisioner '{provisioner}' or manually by the system administrator. If volume creation is delayed, please verify that the provisioner is running and correctly registered."
        );
        recorder.event(claim, EventType::Normal, "ExternalProvisioning", message);
    }
    Ok(())
}

/// Has a patch refused where the object is not the one that was looked at, as it was then.
fn version_of(object: &impl ResourceExt) -> serde_json::Value {
    json!({ "uid": object.uid(), "resourceVersion": object.resource_version() })
}

async fn bind(shared: &Shared, claim: &PersistentVolumeClaim, volume: &PersistentVolume) -> Result<(), ApiError> {
    let (namespace, name) = (claim.namespace().unwrap_or_default(), claim.name_any());
    let volumes: Api<PersistentVolume> = Api::all(shared.client.clone());
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(shared.client.clone(), &namespace);
    let volume_name = volume.name_any();
    let reference = json!({ "kind": "PersistentVolumeClaim", "apiVersion": "v1", "namespace": namespace, "name": name,
        "uid": claim.metadata.uid, "resourceVersion": claim.metadata.resource_version });
    // Refused where another claim took the volume meanwhile.
    let patch = json!({ "metadata": version_of(volume), "spec": { "claimRef": reference } });
    let taken = merge("bind persistentvolume", &volumes, &volume_name, &patch).await?;
    let patch = json!({ "metadata": version_of(&taken), "status": { "phase": "Bound" } });
    merge_status("bind persistentvolume", &volumes, &volume_name, &patch).await?;
    let marks = json!({ "pv.kubernetes.io/bind-completed": "yes", BOUND_BY_CONTROLLER: "yes" });
    // Nor is the volume given to another claim that has got the name meanwhile.
    let mut metadata = version_of(claim);
    metadata["annotations"] = marks;
    let patch = json!({ "metadata": metadata, "spec": { "volumeName": volume_name } });
    let bound = merge("bind persistentvolumeclaim", &claims, &name, &patch).await?;
    let spec = volume.spec.clone().unwrap_or_default();
    let status = json!({ "metadata": version_of(&bound), "status": { "phase": "Bound", "capacity": spec.capacity, "accessModes": spec.access_modes } });
    merge_status("bind persistentvolumeclaim", &claims, &name, &status).await?;
    tracing::info!(claim = %name, claim.namespace = %namespace, volume = volume_name, "claim bound to volume");
    Ok(())
}

/// The volume's phase: free, taken, or left behind by a claim that is gone; then what its reclaim policy says.
async fn reconcile_volume(shared: Arc<Shared>, name: String) -> Result<Next, ApiError> {
    let Some(volume) = shared.volumes.get("", &name) else { return Ok(Next::Done) };
    let reference = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref());
    let uid = reference.and_then(|reference| reference.uid.as_deref()).unwrap_or_default();
    let expected = |claim: &Arc<PersistentVolumeClaim>| uid.is_empty() || claim.metadata.uid.as_deref() == Some(uid);
    let claim = match reference.and_then(|reference| reference.namespace.clone().zip(reference.name.clone())) {
        Some((namespace, name)) => match shared.claims.get(&namespace, &name).filter(|claim| expected(claim)) {
            // What is cached may be behind.
            None => {
                let claims: Api<PersistentVolumeClaim> = Api::namespaced(shared.client.clone(), &namespace);
                call("get persistentvolumeclaim", claims.get_opt(&name)).await?.map(Arc::new)
            }
            found => found,
        },
        None => None,
    };
    let phase = fit::phase(&volume, claim.as_deref());
    let now = volume.status.as_ref().and_then(|status| status.phase.as_deref());
    let status = match (phase, reclaim::of(&volume)) {
        ("Released", Reclaim::Impossible { .. }) if now == Some("Failed") => return Ok(Next::Done),
        // First what is so, then what cannot be done about it.
        ("Released", Reclaim::Impossible { reason, message }) if now == Some("Released") => {
            shared.recorder.event(volume.as_ref(), EventType::Warning, reason, message.clone());
            json!({ "metadata": version_of(volume.as_ref()), "status": { "phase": "Failed", "message": message } })
        }
        _ if now == Some(phase) => return Ok(Next::Done),
        _ => json!({ "metadata": version_of(volume.as_ref()), "status": { "phase": phase, "message": null } }),
    };
    let api: Api<PersistentVolume> = Api::all(shared.client.clone());
    merge_status("update persistentvolume", &api, &name, &status).await.map(|_| Next::Done)
}
