//! Attaching volumes of CSI drivers to the nodes of the pods that use them: makes and deletes VolumeAttachments, which the drivers'
//! attachers act on and agents wait for, and notes in the node's status what is attached.
//!
//! A volume is not detached while its node says that it has it mounted.

mod memory;
mod plan;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, PersistentVolume, Pod};
use k8s_openapi::api::storage::v1::{VolumeAttachment, VolumeAttachmentSource, VolumeAttachmentSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, PostParams};
use kube::{Api, ResourceExt};
use oarlock_machinery::{ApiError, Change, EventType, Next, WorkQueue, call, merge_status, queue};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use self::memory::Memory;
use self::plan::{Plan, Standing, Volume, plan};
use crate::pods;
use crate::shared::{Shared, Task};

const CONCURRENCY: usize = 2;

pub(crate) fn start(shared: &Arc<Shared>, stop: &CancellationToken) -> Task {
    let queue: Arc<WorkQueue<String>> = WorkQueue::new();
    let (on_pod, on_node, on_attachment) = (queue.clone(), queue.clone(), queue.clone());
    shared.pods.on_change(move |change| {
        let pod = change.object();
        if !pods::node_name(pod).is_empty() && pods::claims(pod).next().is_some() {
            on_pod.add(pods::node_name(pod).to_owned());
        }
    });
    shared.nodes.on_change(move |change| on_node.add(change.object().name_any()));
    // A claim that gets its volume, or a driver that says what it needs, concerns every node; there are few such changes.
    let everywhere = {
        let (queue, all) = (queue.clone(), Arc::downgrade(shared));
        Arc::new(move || {
            let nodes = all.upgrade().map(|shared| shared.nodes.list()).unwrap_or_default();
            nodes.iter().for_each(|node| queue.add(node.name_any()));
        })
    };
    let (on_claim, on_volume, on_driver) = (everywhere.clone(), everywhere.clone(), everywhere.clone());
    let memory = Arc::new(Memory::default());
    let (seen, others) = (memory.clone(), everywhere.clone());
    shared.attachments.on_change(move |change| {
        if !matches!(change, Change::Deleted(_)) {
            seen.settle(&change.object().name_any());
        }
        on_attachment.add(change.object().spec.node_name.clone());
        // What one node has let go another may wait for.
        if matches!(change, Change::Deleted(_)) {
            everywhere();
        }
    });
    shared.claims.on_change(move |_| on_claim());
    shared.volumes.on_change(move |_| on_volume());
    shared.csi_drivers.on_change(move |_| on_driver());
    let (shared, stop) = (shared.clone(), stop.clone());
    Box::pin(async move {
        tokio::join!(
            shared.pods.wait_synced(),
            shared.nodes.wait_synced(),
            shared.claims.wait_synced(),
            shared.volumes.wait_synced(),
            shared.csi_drivers.wait_synced(),
            shared.attachments.wait_synced(),
        );
        let work = |node: String| {
            let (shared, memory, others) = (shared.clone(), memory.clone(), others.clone());
            async move { reconcile(&shared, &memory, &*others, node).await }
        };
        queue::work("attachments", queue, CONCURRENCY, stop, work).await;
    })
}

/// The driver's volume behind a PersistentVolume, if it has to be attached.
fn volume(shared: &Shared, volume: &PersistentVolume) -> Option<Volume> {
    let driver = volume.spec.as_ref()?.csi.as_ref()?.driver.clone();
    Volume::of(volume, shared.csi_drivers.get("", &driver).as_deref())
}

/// The volumes that the pod uses and that have to be attached.
fn of_pod(shared: &Shared, pod: &Pod) -> Vec<Volume> {
    let namespace = pod.namespace().unwrap_or_default();
    let bound = |claim: &str| {
        let claim = shared.claims.get(&namespace, claim)?;
        let name = claim.spec.as_ref()?.volume_name.clone()?;
        let found = shared.volumes.get("", &name)?;
        let uid = found.spec.as_ref()?.claim_ref.as_ref()?.uid.clone();
        (uid == claim.metadata.uid).then_some(found)
    };
    pods::claims(pod).filter_map(bound).filter_map(|found| volume(shared, &found)).collect()
}

/// The pods of the node that may want volumes, with what they want.
fn users(shared: &Shared, node: &str) -> Vec<(Arc<Pod>, Vec<Volume>)> {
    let pods = shared.pods.indexed(node).into_iter().filter(|pod| !pods::is_terminal(pod));
    pods.map(|pod| (pod.clone(), of_pod(shared, &pod))).collect()
}

/// Decides, and promises what is to be attached: nobody else decides from the same caches meanwhile.
fn decide(shared: &Shared, memory: &Memory, name: &str, node: Standing<'_>, wanted: &[Volume]) -> Plan {
    let mut promises = memory.promises.lock();
    let all = shared.attachments.list();
    let known = |attachment: &VolumeAttachment| {
        let name = attachment.spec.source.persistent_volume_name.as_deref()?;
        volume(shared, shared.volumes.get("", name)?.as_ref())
    };
    let present: Vec<_> = all.iter().map(|attachment| (attachment.as_ref(), known(attachment))).collect();
    let mut made = plan(name, node, wanted, &present, &promises);
    match node {
        Standing::Here(_) => made.attach.iter().for_each(|volume| Memory::promise(&mut promises, volume, name)),
        Standing::Missing { .. } => made.attach.clear(),
    }
    made
}

fn standing<'a>(memory: &Memory, name: &str, node: Option<&'a Node>) -> (Standing<'a>, Duration) {
    match node {
        Some(node) => {
            memory.is_here(name);
            (Standing::Here(node), Duration::ZERO)
        }
        None => {
            let left = memory.wait_for(name);
            (Standing::Missing { long: left.is_zero() }, left)
        }
    }
}

async fn reconcile(
    shared: &Shared,
    memory: &Memory,
    others: &(dyn Fn() + Sync),
    name: String,
) -> Result<Next, ApiError> {
    let api: Api<VolumeAttachment> = Api::all(shared.client.clone());
    let users = users(shared, &name);
    let wanted: BTreeSet<Volume> = users.iter().flat_map(|(_, volumes)| volumes.iter().cloned()).collect();
    let wanted: Vec<Volume> = wanted.into_iter().collect();
    for promised in memory.stale(&name, &wanted) {
        if call("get volumeattachment", api.get_opt(&promised)).await?.is_none() {
            memory.settle(&promised);
            others();
        }
    }
    let node = shared.nodes.get("", &name);
    if wanted.is_empty() && shared.attachments.list().iter().all(|attachment| attachment.spec.node_name != name) {
        memory.is_here(&name);
        return note(shared, node.as_deref(), &[]).await.map(|()| Next::Done);
    }
    let (standing, left) = standing(memory, &name, node.as_deref());
    let plan = decide(shared, memory, &name, standing, &wanted);
    let tell = |volume: &Volume, type_: EventType, reason: &str, message: String| {
        for (pod, _) in users.iter().filter(|(_, volumes)| volumes.contains(volume)) {
            shared.recorder.event(pod.as_ref(), type_, reason, message.clone());
        }
    };
    for volume in &plan.elsewhere {
        let message = format!(
            "Multi-Attach error for volume {:?} Volume is already exclusively attached to one node and can't be attached to another",
            volume.name
        );
        tell(volume, EventType::Warning, "FailedAttachVolume", message);
    }
    for volume in &plan.attach {
        let object = attachment(volume, &name);
        match call("create volumeattachment", api.create(&PostParams::default(), &object)).await {
            Err(error) if !error.is_already_exists() => return Err(error),
            _ => tracing::info!(volume = volume.name, node.name = name, "a volume is to be attached"),
        }
    }
    detach(shared, memory, &name, &wanted, &plan).await?;
    let before = node.as_deref().map(attached_by_status).unwrap_or_default();
    for volume in wanted.iter().filter(|volume| !before.contains(&volume.in_status())) {
        if plan.attached.contains(&volume.in_status()) {
            let message = format!("AttachVolume.Attach succeeded for volume {:?} ", volume.name);
            tell(volume, EventType::Normal, "SuccessfulAttachVolume", message);
        }
    }
    note(shared, node.as_deref(), &plan.attached).await?;
    Ok(if plan.waits && !left.is_zero() { Next::After(left) } else { Next::Done })
}

/// Detaches what the node does not have mounted by its latest word either: that of pods and that of nodes are cached apart.
async fn detach(shared: &Shared, memory: &Memory, name: &str, wanted: &[Volume], plan: &Plan) -> Result<(), ApiError> {
    if plan.detach.is_empty() {
        return Ok(());
    }
    let nodes: Api<Node> = Api::all(shared.client.clone());
    let latest = call("get node", nodes.get_opt(name)).await?;
    let (standing, _) = standing(memory, name, latest.as_ref());
    let sure = decide(shared, memory, name, standing, wanted).detach;
    let api: Api<VolumeAttachment> = Api::all(shared.client.clone());
    for gone in plan.detach.iter().filter(|gone| sure.contains(gone)) {
        match call("delete volumeattachment", api.delete(gone, &DeleteParams::default())).await {
            Err(error) if !error.is_not_found() => return Err(error),
            _ => tracing::info!(attachment = gone, node.name = name, "a volume is to be detached"),
        }
    }
    Ok(())
}

fn attachment(volume: &Volume, node: &str) -> VolumeAttachment {
    VolumeAttachment {
        metadata: ObjectMeta { name: Some(volume.attachment(node)), ..Default::default() },
        spec: VolumeAttachmentSpec {
            attacher: volume.driver.clone(),
            node_name: node.to_owned(),
            source: VolumeAttachmentSource { persistent_volume_name: Some(volume.name.clone()), ..Default::default() },
        },
        status: None,
    }
}

fn attached_by_status(node: &Node) -> Vec<String> {
    let volumes = node.status.as_ref().and_then(|status| status.volumes_attached.as_deref()).unwrap_or_default();
    let mut names: Vec<String> = volumes.iter().map(|volume| volume.name.clone()).collect();
    names.sort();
    names
}

/// Notes in the node's status what is attached to it.
async fn note(shared: &Shared, node: Option<&Node>, attached: &[String]) -> Result<(), ApiError> {
    let Some(node) = node.filter(|node| attached_by_status(node) != attached) else { return Ok(()) };
    let volumes: Vec<_> = attached.iter().map(|name| json!({ "name": name, "devicePath": "" })).collect();
    let api: Api<Node> = Api::all(shared.client.clone());
    let status = json!({ "status": { "volumesAttached": volumes } });
    match merge_status("note attached volumes", &api, &node.name_any(), &status).await {
        Err(error) if !error.is_not_found() => Err(error),
        _ => Ok(()),
    }
}
