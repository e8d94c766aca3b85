//! Volumes for a pod that has just been given a node: what was chosen for its claims is counted as taken at once, written to the
//! API, and waited for; the pod is bound when all its claims are.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use kube::{Api, Client, ResourceExt};
use oarlock_machinery::volumes::{BOUND_BY_CONTROLLER, SELECTED_NODE, is_kept_for};
use oarlock_machinery::{ApiError, Key, merge};
use serde_json::json;
use tokio::time::Instant;

use super::{Effect, Owner};
use crate::pod::PodInfo;
use crate::queue::Wake;
use crate::storage::{Choice, Progress, Written, reference, version};

/// How long claims may take to get their volumes, as upstream's bindTimeoutSeconds.
const PATIENCE: Duration = Duration::from_secs(600);

/// A pod that waits for its volumes on the node that it was given.
pub(super) struct Reservation {
    pod: Arc<PodInfo>,
    pub choice: Choice,
    written: Written,
    pub deadline: Instant,
}

/// What is written of a choice: volumes with their claims, and claims that get a node.
struct Writes {
    node: String,
    volumes: Vec<(Arc<PersistentVolume>, Arc<PersistentVolumeClaim>)>,
    claims: Vec<Arc<PersistentVolumeClaim>>,
}

impl Owner {
    /// What has to be written before the pod may be bound to the node; None where nothing has.
    pub(super) fn choose_volumes(&self, pod: &PodInfo, node: &str) -> Option<Choice> {
        let needs = self.cache.storage.needs(pod).ok()?;
        let choice = needs.judge(self.cache.node(node)?).ok()?;
        (!choice.is_empty()).then_some(choice)
    }

    /// Counts the choice as taken, and writes it.
    pub(super) fn reserve(&mut self, pod: &Arc<PodInfo>, choice: Choice) {
        let storage = &mut self.cache.storage;
        let writes = Writes {
            node: choice.node.clone(),
            volumes: choice.bind.iter().filter_map(|(volume, key)| storage.pair(volume, key)).collect(),
            claims: choice.provision.iter().filter_map(|key| storage.known_claim(key)).collect(),
        };
        storage.promise(&choice);
        let (client, pod) = (self.client.clone(), pod.clone());
        self.effects.spawn(async move {
            let result = write(&client, writes).await;
            Effect::Reserved { pod, choice, result }
        });
    }

    /// What was promised is to be had by others again, also by pods that were refused because of it.
    pub(super) fn take_back(&mut self, choice: &Choice, now: Instant) {
        self.cache.storage.take_back(choice);
        self.queue.wake(Wake::StorageChanged, now);
    }

    /// The choice was written, or was not.
    pub(super) fn reserved(&mut self, pod: Arc<PodInfo>, choice: Choice, result: Result<Written, ApiError>) {
        if !self.cache.is_assumed(&pod.uid) {
            // It went meanwhile.
            return self.take_back(&choice, Instant::now());
        }
        match result {
            Ok(written) => {
                let deadline = Instant::now() + PATIENCE;
                self.reservations.insert(pod.uid.clone(), Reservation { pod, choice, written, deadline });
                self.follow_reservations(Instant::now());
            }
            Err(error) => {
                self.take_back(&choice, Instant::now());
                self.not_bound(&pod, failure(&error.user_message()));
            }
        }
    }

    /// Binds the pods whose claims have their volumes, and lets go of those whose claims will not get them.
    pub(super) fn follow_reservations(&mut self, now: Instant) {
        let look = |one: &Reservation| {
            let labels = self.cache.node(&one.choice.node).map(|node| node.labels.clone()).unwrap_or_default();
            match self.cache.storage.progress(&one.choice, &one.written, &labels) {
                Progress::Waiting if one.deadline <= now => {
                    Progress::Failed("timed out waiting for the condition".to_owned())
                }
                progress => progress,
            }
        };
        let looks = self.reservations.iter().map(|(uid, one)| (uid.clone(), look(one)));
        let settled: Vec<_> = looks.filter(|(_, progress)| *progress != Progress::Waiting).collect();
        for (uid, progress) in settled {
            let Some(one) = self.reservations.remove(&uid) else { continue };
            match progress {
                Progress::Failed(why) => {
                    self.take_back(&one.choice, now);
                    tracing::debug!(pod = %one.pod.key, cause = why, "volumes were not bound");
                    self.not_bound(&one.pod, failure(&why));
                }
                _ => self.bind(one.pod, one.choice.node),
            }
        }
    }

    /// Lets go of pods whose claims have taken too long.
    pub(super) fn give_up_late(&mut self, now: Instant) {
        if self.reservations.values().any(|one| one.deadline <= now) {
            self.follow_reservations(now);
        }
    }
}

fn failure(why: &str) -> String {
    format!("running PreBind plugin \"VolumeBinding\": binding volumes: {why}")
}

/// Each write is refused where the object has changed since it was looked at.
async fn write(client: &Client, writes: Writes) -> Result<Written, ApiError> {
    let mut written = Written::default();
    let volumes: Api<PersistentVolume> = Api::all(client.clone());
    for (volume, claim) in writes.volumes {
        let name = volume.name_any();
        let mut metadata = json!({ "uid": volume.uid(), "resourceVersion": volume.resource_version() });
        // What its administrator has kept for the claim is not marked as ours.
        if !is_kept_for(&claim, &volume) {
            metadata["annotations"] = json!({ BOUND_BY_CONTROLLER: "yes" });
        }
        let patch = json!({ "metadata": metadata, "spec": { "claimRef": reference(&claim) } });
        let taken = merge("reserve persistentvolume", &volumes, &name, &patch).await?;
        written.volumes.insert(name, version(&taken.metadata));
    }
    for claim in writes.claims {
        let key = Key::of(claim.as_ref());
        let claims: Api<PersistentVolumeClaim> = Api::namespaced(client.clone(), &key.namespace);
        let patch = json!({ "metadata": { "uid": claim.uid(), "resourceVersion": claim.resource_version(),
            "annotations": { SELECTED_NODE: writes.node } } });
        let chosen = merge("choose node of persistentvolumeclaim", &claims, &key.name, &patch).await?;
        written.claims.push((key, version(&chosen.metadata)));
    }
    Ok(written)
}
