//! Deployments: a ReplicaSet for each pod template, and the way from one to the next.
//!
//! `sets` says which ReplicaSet is new and which are old, `rolling` how large each should be, `status` what to show,
//! `template` when two templates are the same. This file reads caches and sends requests; every reconcile takes at
//! most one step, whose echo in the caches brings the next.

mod rolling;
mod sets;
mod status;
mod template;

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::{Deployment, DeploymentStatus, ReplicaSet};
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, PostParams, Preconditions};
use kube::{Api, ResourceExt};
use oarlock_machinery::{
    ApiError, Change, EventType, Key, Next, Recorder, Selector, WorkQueue, call, merge, merge_metadata, merge_status,
    queue,
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::conditions::{self, status_patch};
use crate::owners::{claim_all, controller_of};
use crate::pods::is_terminal;
use crate::shared::{Shared, Task};
use rolling::Resize;
use sets::Sets;

pub(crate) use sets::scaled as scaled_value;

const CONCURRENCY: usize = 8;

struct Controller {
    shared: Arc<Shared>,
    recorder: Recorder,
    queue: Arc<WorkQueue<Key>>,
}

pub(crate) fn start(shared: &Arc<Shared>, stop: &CancellationToken) -> Task {
    let controller = Arc::new(Controller {
        shared: shared.clone(),
        recorder: shared.recorder.named("deployment-controller"),
        queue: WorkQueue::new(),
    });
    let queue = controller.queue.clone();
    shared.deployments.on_change(move |change| queue.add(Key::of(change.object().as_ref())));
    let listener = controller.clone();
    shared.replica_sets.on_change(move |change| listener.set_changed(change));
    let stop = stop.clone();
    Box::pin(async move {
        controller.shared.deployments.wait_synced().await;
        controller.shared.replica_sets.wait_synced().await;
        controller.shared.pods.wait_synced().await;
        let queue = controller.queue.clone();
        queue::work("deployment", queue, CONCURRENCY, stop, |key| controller.clone().reconcile(key)).await;
    })
}

/// One Deployment under reconciliation, with what has been read and done so far.
struct Session<'a> {
    shared: &'a Shared,
    recorder: &'a Recorder,
    deployments: Api<Deployment>,
    replica_sets: Api<ReplicaSet>,
    /// As the cache had it: what status patches are made against.
    before: Arc<Deployment>,
    /// With conditions found on the way, not yet written.
    deployment: Deployment,
    sets: Sets,
}

impl Controller {
    fn set_changed(&self, change: &Change<'_, ReplicaSet>) {
        let set = change.object();
        let namespace = set.namespace().unwrap_or_default();
        let owner = |set: &ReplicaSet| {
            let owner = controller_of(&set.metadata).filter(|owner| owner.kind == "Deployment")?;
            Some(Key::new(namespace.clone(), owner.name.clone()))
        };
        if let Change::Updated { old, .. } = change
            && let Some(before) = owner(old)
        {
            self.queue.add(before);
        }
        if let Some(owner) = owner(set) {
            return self.queue.add(owner);
        }
        if !matches!(change, Change::Deleted(_)) && controller_of(&set.metadata).is_none() {
            for deployment in self.shared.deployments.in_namespace(&namespace) {
                if selector(&deployment).matches(set.metadata.labels.as_ref()) {
                    self.queue.add(Key::of(deployment.as_ref()));
                }
            }
        }
    }

    async fn reconcile(self: Arc<Self>, key: Key) -> Result<Next, ApiError> {
        let Some(before) = self.shared.deployments.get_key(&key) else { return Ok(Next::Done) };
        let deployments: Api<Deployment> = Api::namespaced(self.shared.client.clone(), &key.namespace);
        let replica_sets: Api<ReplicaSet> = Api::namespaced(self.shared.client.clone(), &key.namespace);
        let selector = selector(&before);
        let owned =
            claim_all(&deployments, &replica_sets, &self.shared.replica_sets, before.as_ref(), &selector).await?;
        let session = Session {
            shared: &self.shared,
            recorder: &self.recorder,
            deployments,
            replica_sets,
            deployment: (*before).clone(),
            sets: Sets::split(&before, owned),
            before,
        };
        session.reconcile().await
    }
}

impl Session<'_> {
    async fn reconcile(mut self) -> Result<Next, ApiError> {
        if self.deployment.metadata.deletion_timestamp.is_some() {
            let status = status::counts(&self.deployment, &self.sets, Timestamp::now());
            return self.write_status(status).await.map(|()| Next::Done);
        }
        let paused = sets::is_paused(&self.deployment);
        if let Some(condition) = status::pause_condition(&self.deployment, paused, Timestamp::now()) {
            conditions::replace(self.conditions(), condition);
        }
        if paused || rolling::is_scaling(&self.deployment, &self.sets) {
            self.refresh_new_set().await?;
            let resizes = rolling::scale(&self.deployment, &self.sets);
            self.apply(resizes).await?;
            if paused {
                self.clean_up().await?;
            }
            let status = status::counts(&self.deployment, &self.sets, Timestamp::now());
            return self.write_status(status).await.map(|()| Next::Done);
        }
        if sets::is_rolling(&self.deployment) {
            self.roll().await?
        } else {
            self.recreate().await?
        }
        let now = Timestamp::now();
        let status = status::rollout(&self.deployment, &self.sets, now);
        let next = status::next_check(&self.deployment, &status, now);
        if status::is_complete(&self.deployment, &status) {
            self.clean_up().await?;
        }
        self.write_status(status).await?;
        Ok(next.map_or(Next::Done, |wait| Next::After(Duration::try_from(wait).unwrap_or_default())))
    }

    async fn roll(&mut self) -> Result<(), ApiError> {
        self.ensure_new_set().await?;
        let resizes = rolling::rolling_step(&self.deployment, &self.sets);
        self.apply(resizes).await
    }

    async fn recreate(&mut self) -> Result<(), ApiError> {
        self.refresh_new_set().await?;
        let resizes = rolling::stop_old(&self.sets);
        if !resizes.is_empty() {
            return self.apply(resizes).await;
        }
        let old_uids = self.sets.old.iter().filter_map(|set| set.uid());
        let running = old_uids.flat_map(|uid| self.shared.pods.owned_by(&uid)).any(|pod| !is_terminal(&pod));
        if running {
            return Ok(());
        }
        self.ensure_new_set().await?;
        let wanted = sets::replicas(&self.deployment);
        match self.sets.new.clone() {
            Some(set) if sets::set_replicas(&set) != wanted => self.apply(vec![Resize { set, to: wanted }]).await,
            _ => Ok(()),
        }
    }

    fn conditions(&mut self) -> &mut Vec<k8s_openapi::api::apps::v1::DeploymentCondition> {
        self.deployment.status.get_or_insert_default().conditions.get_or_insert_default()
    }

    fn says_progress(&self) -> bool {
        let status = self.deployment.status.as_ref();
        let all = status.and_then(|status| status.conditions.as_deref()).unwrap_or_default();
        conditions::find(all, status::PROGRESSING).is_some()
    }

    /// Brings revision, annotations and minReadySeconds of the new set up to date, if there is one.
    async fn refresh_new_set(&mut self) -> Result<(), ApiError> {
        let Some(set) = self.sets.new.clone() else { return Ok(()) };
        let annotations = sets::new_set_annotations(&self.deployment, &set, self.sets.next_revision());
        let min_ready = self.deployment.spec.as_ref().and_then(|spec| spec.min_ready_seconds).unwrap_or(0);
        let has = set.spec.as_ref().and_then(|spec| spec.min_ready_seconds).unwrap_or(0);
        if annotations != *set.annotations() || min_ready != has {
            let patch = json!({
                "metadata": {"resourceVersion": set.resource_version(), "annotations": annotations},
                "spec": {"minReadySeconds": min_ready},
            });
            self.sets.new = Some(Arc::new(self.patch_set(&set, &patch).await?));
        }
        if status::deadline(&self.deployment).is_some() && !self.says_progress() {
            let message = format!("Found new replica set \"{}\"", set.name_any());
            let condition = status::progressing(true, "FoundNewReplicaSet", message, Timestamp::now());
            conditions::replace(self.conditions(), condition);
        }
        self.show_revision().await
    }

    /// The Deployment's own revision annotation is that of its new set.
    async fn show_revision(&mut self) -> Result<(), ApiError> {
        let Some(revision) = self.sets.new.as_deref().and_then(|set| sets::annotation(set, sets::REVISION)) else {
            return Ok(());
        };
        if sets::annotation(&self.deployment, sets::REVISION) == Some(revision) {
            return Ok(());
        }
        let patch = json!({"metadata": {
            "uid": self.deployment.uid(), "annotations": {sets::REVISION: revision},
        }});
        let name = self.deployment.name_any();
        merge_metadata("patch deployment annotations", &self.deployments, &name, &patch).await
    }

    async fn ensure_new_set(&mut self) -> Result<(), ApiError> {
        if self.sets.new.is_some() {
            return self.refresh_new_set().await;
        }
        let size = rolling::new_set_size(&self.deployment, sets::total(self.sets.all()), 0);
        let wanted = sets::new_set(&self.deployment, self.sets.next_revision(), size);
        let name = wanted.name_any();
        match call("create replicaset", self.replica_sets.create(&PostParams::default(), &wanted)).await {
            Ok(created) => {
                self.sets.new = Some(Arc::new(created));
                if size > 0 {
                    self.record_scaling(&name, 0, size);
                }
                if status::deadline(&self.deployment).is_some() {
                    let message = format!("Created new replica set \"{name}\"");
                    let condition = status::progressing(true, "NewReplicaSetCreated", message, Timestamp::now());
                    conditions::replace(self.conditions(), condition);
                }
                self.show_revision().await
            }
            Err(error) if error.is_already_exists() => self.resolve_collision(&name, error).await,
            Err(error) if error.is_namespace_terminating() => Ok(()),
            Err(error) => {
                let message = format!("Failed to create new replica set \"{name}\": {}", error.user_message());
                self.recorder.event(&self.deployment, EventType::Warning, "ReplicaSetCreateError", message.clone());
                if status::deadline(&self.deployment).is_some() {
                    let condition = status::progressing(false, "ReplicaSetCreateError", message, Timestamp::now());
                    conditions::replace(self.conditions(), condition);
                    let status = self.deployment.status.clone().unwrap_or_default();
                    self.write_status(status).await?;
                }
                Err(error)
            }
        }
    }

    /// The name is taken: by our own set that the cache has not shown yet, or by another template with this hash.
    async fn resolve_collision(&mut self, name: &str, error: ApiError) -> Result<(), ApiError> {
        let live = call("get replicaset", self.replica_sets.get(name)).await?;
        let ours =
            controller_of(&live.metadata).is_some_and(|owner| Some(&owner.uid) == self.before.metadata.uid.as_ref());
        let template = self.deployment.spec.as_ref().map(|spec| &spec.template);
        let same = live.spec.as_ref().and_then(|spec| spec.template.as_ref()).zip(template);
        if ours && same.is_some_and(|(live, wanted)| template::same(live, wanted)) {
            self.sets.new = Some(Arc::new(live));
            return self.refresh_new_set().await;
        }
        let mut status = self.deployment.status.clone().unwrap_or_default();
        status.collision_count = Some(status.collision_count.unwrap_or(0) + 1);
        self.write_status(status).await?;
        Err(error)
    }

    async fn patch_set(&self, set: &ReplicaSet, patch: &Value) -> Result<ReplicaSet, ApiError> {
        merge("patch replicaset", &self.replica_sets, &set.name_any(), patch).await
    }

    async fn apply(&mut self, resizes: Vec<Resize>) -> Result<(), ApiError> {
        let annotations = sets::size_annotations(&self.deployment);
        for Resize { set, to } in resizes {
            let from = sets::set_replicas(&set);
            let noted = annotations.iter().all(|(key, value)| sets::annotation(set.as_ref(), key) == Some(value));
            if from == to && noted {
                continue;
            }
            // With the version that was read: a size decided on a stale cache must not be written.
            let patch = json!({
                "metadata": {"resourceVersion": set.resource_version(), "annotations": {
                    annotations[0].0: annotations[0].1, annotations[1].0: annotations[1].1,
                }},
                "spec": {"replicas": to},
            });
            let patched = Arc::new(self.patch_set(&set, &patch).await?);
            if from != to {
                self.record_scaling(&set.name_any(), from, to);
            }
            let slots = self.sets.old.iter_mut().chain(&mut self.sets.new);
            slots.filter(|slot| slot.metadata.uid == patched.metadata.uid).for_each(|slot| *slot = patched.clone());
        }
        Ok(())
    }

    fn record_scaling(&self, set: &str, from: i32, to: i32) {
        let direction = if to > from { "up" } else { "down" };
        let message = format!("Scaled {direction} replica set {set} from {from} to {to}");
        self.recorder.event(&self.deployment, EventType::Normal, "ScalingReplicaSet", message);
    }

    async fn clean_up(&self) -> Result<(), ApiError> {
        for set in sets::to_clean_up(&self.deployment, &self.sets) {
            let preconditions = Preconditions { uid: set.uid(), resource_version: set.resource_version() };
            let parameters = DeleteParams::background().preconditions(preconditions);
            match call("delete replicaset", self.replica_sets.delete(&set.name_any(), &parameters)).await {
                Err(error) if error.is_not_found() => {}
                result => drop(result?),
            }
        }
        Ok(())
    }

    async fn write_status(&self, status: DeploymentStatus) -> Result<(), ApiError> {
        let uid = self.before.metadata.uid.as_deref();
        let Some(patch) = status_patch(uid, self.before.status.as_ref(), &status) else { return Ok(()) };
        let name = self.before.name_any();
        match merge_status("patch deployment status", &self.deployments, &name, &patch).await {
            Err(error) if error.is_not_found() => Ok(()),
            result => result.map(drop),
        }
    }
}

fn selector(deployment: &Deployment) -> Selector {
    let compiled = Selector::compile(deployment.spec.as_ref().map(|spec| &spec.selector));
    compiled.ok().filter(|selector| !selector.is_everything()).unwrap_or(Selector::nothing())
}
