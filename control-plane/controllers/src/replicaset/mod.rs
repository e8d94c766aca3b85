//! ReplicaSets: keeps as many pods as are wanted. Decisions are in `plan`; this file reads caches and sends requests.

mod expectations;
mod plan;

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use k8s_openapi::api::apps::v1::ReplicaSet;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, PostParams, Preconditions};
use kube::{Api, ResourceExt};
use oarlock_machinery::{
    ApiError, Change, EventType, Key, Next, Recorder, Selector, WorkQueue, call, merge_status, queue,
};
use tokio_util::sync::CancellationToken;

use crate::conditions::status_patch;
use crate::owners::{claim_all, controller_of};
use crate::pods::{is_active, is_terminating};
use crate::shared::{Shared, Task};
use expectations::Expectations;
use plan::{Failure, Scale};

const CONCURRENCY: usize = 16;

struct Controller {
    shared: Arc<Shared>,
    recorder: Recorder,
    queue: Arc<WorkQueue<Key>>,
    expectations: Expectations,
}

pub(crate) fn start(shared: &Arc<Shared>, stop: &CancellationToken) -> Task {
    let controller = Arc::new(Controller {
        shared: shared.clone(),
        recorder: shared.recorder.named("replicaset-controller"),
        queue: WorkQueue::new(),
        expectations: Expectations::default(),
    });
    let listener = controller.clone();
    shared.replica_sets.on_change(move |change| {
        let key = Key::of(change.object().as_ref());
        if let Change::Deleted(_) = change {
            listener.expectations.forget(&key);
        }
        listener.queue.add(key);
    });
    let listener = controller.clone();
    shared.pods.on_change(move |change| listener.pod_changed(change));
    let stop = stop.clone();
    Box::pin(async move {
        controller.shared.replica_sets.wait_synced().await;
        controller.shared.pods.wait_synced().await;
        let queue = controller.queue.clone();
        queue::work("replicaset", queue, CONCURRENCY, stop, |key| controller.clone().reconcile(key)).await;
    })
}

impl Controller {
    fn pod_changed(&self, change: &Change<'_, Pod>) {
        let pod = change.object();
        let owner = self.owner_key(pod);
        if let Change::Updated { old, .. } = change
            && let Some(before) = self.owner_key(old)
            && Some(&before) != owner.as_ref()
        {
            self.queue.add(before);
        }
        if let Some(owner) = owner {
            match change {
                Change::Added(_) => self.expectations.created(&owner),
                Change::Deleted(_) => {
                    self.expectations.deleted(&owner, pod.metadata.uid.as_deref().unwrap_or_default())
                }
                Change::Updated { .. } => {}
            }
            if is_terminating(pod) {
                self.expectations.deleted(&owner, pod.metadata.uid.as_deref().unwrap_or_default());
            }
            self.queue.add(owner);
            return;
        }
        let may_be_adopted = match change {
            Change::Added(_) => true,
            Change::Updated { old, new } => {
                old.metadata.labels != new.metadata.labels
                    || old.metadata.owner_references != new.metadata.owner_references
            }
            Change::Deleted(_) => false,
        };
        if may_be_adopted && controller_of(&pod.metadata).is_none() {
            for set in self.shared.replica_sets.in_namespace(&pod.namespace().unwrap_or_default()) {
                if selector(&set).matches(pod.metadata.labels.as_ref()) {
                    self.queue.add(Key::of(set.as_ref()));
                }
            }
        }
    }

    fn owner_key(&self, pod: &Pod) -> Option<Key> {
        let owner = controller_of(&pod.metadata).filter(|owner| owner.kind == "ReplicaSet")?;
        Some(Key::new(pod.namespace().unwrap_or_default(), owner.name.clone()))
    }

    async fn reconcile(self: Arc<Self>, key: Key) -> Result<Next, ApiError> {
        let Some(set) = self.shared.replica_sets.get_key(&key) else { return Ok(Next::Done) };
        let api: Api<ReplicaSet> = Api::namespaced(self.shared.client.clone(), &key.namespace);
        let pods: Api<Pod> = Api::namespaced(self.shared.client.clone(), &key.namespace);
        let selector = selector(&set);
        // Asked before the cache is read: what is seen afterwards includes everything that was expected.
        let in_step = self.expectations.are_met(&key);
        let claimed = claim_all(&api, &pods, &self.shared.pods, set.as_ref(), &selector).await?;
        let mut failure = None;
        let mut outcome = Ok(());
        if in_step && set.metadata.deletion_timestamp.is_none() {
            let active: Vec<Arc<Pod>> = claimed.iter().filter(|pod| is_active(pod)).cloned().collect();
            let acted = match plan::scale(&set, &active, &self.related(&set, &active), Timestamp::now()) {
                Scale::Keep => Ok(()),
                Scale::Create(count) => self.create(&key, &set, &pods, count).await.map_err(|e| ("FailedCreate", e)),
                Scale::Delete(chosen) => self.delete(&key, &set, &pods, chosen).await.map_err(|e| ("FailedDelete", e)),
            };
            if let Err((reason, error)) = acted {
                failure = Some(Failure { reason, message: error.user_message() });
                outcome = Err(error);
            }
        } else if let Some(old) = set.status.as_ref().and_then(|status| status.conditions.as_ref()) {
            // Nothing was tried, so nothing is known: keep what was said before.
            failure = old.iter().find(|condition| condition.type_ == "ReplicaFailure").map(|condition| Failure {
                reason: if condition.reason.as_deref() == Some("FailedDelete") {
                    "FailedDelete"
                } else {
                    "FailedCreate"
                },
                message: condition.message.clone().unwrap_or_default(),
            });
        }
        let now = Timestamp::now();
        self.write_status(&api, &set, &plan::status(&set, &claimed, failure.as_ref(), now)).await?;
        outcome?;
        Ok(match plan::next_availability(&set, &claimed, now) {
            Some(at) => Next::After(Duration::try_from(at.duration_since(now)).unwrap_or_default()),
            None => Next::Done,
        })
    }

    /// Active pods of all sets of the same owner (a Deployment), to see which nodes are crowded.
    fn related(&self, set: &ReplicaSet, active: &[Arc<Pod>]) -> Vec<Arc<Pod>> {
        let Some(owner) = controller_of(&set.metadata) else { return active.to_vec() };
        let siblings = self.shared.replica_sets.owned_by(&owner.uid);
        let pods = siblings.iter().filter_map(|set| set.uid()).flat_map(|uid| self.shared.pods.owned_by(&uid));
        pods.filter(|pod| is_active(pod)).collect()
    }

    async fn create(&self, key: &Key, set: &ReplicaSet, pods: &Api<Pod>, count: usize) -> Result<(), ApiError> {
        self.expectations.expect_creations(key, count);
        let pod = plan::new_pod(set);
        let mut sent = 0;
        for batch in plan::slow_start(count) {
            let parameters = PostParams::default();
            let requests = (0..batch).map(|_| call("create pod", pods.create(&parameters, &pod)));
            sent += batch;
            let mut failed = None;
            for result in join_all(requests).await {
                match result {
                    Ok(created) => {
                        let message = format!("Created pod: {}", created.name_any());
                        self.recorder.event(set, EventType::Normal, "SuccessfulCreate", message);
                    }
                    Err(error) => {
                        self.expectations.created(key);
                        if !error.is_namespace_terminating() {
                            let message = format!("Error creating: {}", error.user_message());
                            self.recorder.event(set, EventType::Warning, "FailedCreate", message);
                        }
                        failed = Some(error);
                    }
                }
            }
            if let Some(error) = failed {
                self.expectations.creations_skipped(key, count - sent);
                // Nothing can be created in a namespace that goes away, and nothing needs to be.
                return if error.is_namespace_terminating() { Ok(()) } else { Err(error) };
            }
        }
        Ok(())
    }

    async fn delete(
        &self,
        key: &Key,
        set: &ReplicaSet,
        pods: &Api<Pod>,
        chosen: Vec<Arc<Pod>>,
    ) -> Result<(), ApiError> {
        self.expectations.expect_deletions(key, chosen.iter().filter_map(|pod| pod.uid()));
        let requests = chosen.iter().map(|pod| async move {
            let preconditions = Preconditions { uid: pod.uid(), resource_version: None };
            let parameters = DeleteParams::default().preconditions(preconditions);
            (pod, call("delete pod", pods.delete(&pod.name_any(), &parameters)).await)
        });
        let mut failed = None;
        for (pod, result) in join_all(requests).await {
            let uid = pod.metadata.uid.as_deref().unwrap_or_default();
            match result {
                Ok(_) => {
                    let message = format!("Deleted pod: {}", pod.name_any());
                    self.recorder.event(set, EventType::Normal, "SuccessfulDelete", message);
                }
                // Gone, or replaced by another of the same name: either way this one is no more.
                Err(error) if error.is_not_found() || error.is_conflict() => self.expectations.deleted(key, uid),
                Err(error) => {
                    self.expectations.deleted(key, uid);
                    let message = format!("Error deleting: {}", error.user_message());
                    self.recorder.event(set, EventType::Warning, "FailedDelete", message);
                    failed = Some(error);
                }
            }
        }
        failed.map_or(Ok(()), Err)
    }

    async fn write_status(
        &self,
        api: &Api<ReplicaSet>,
        set: &ReplicaSet,
        status: &k8s_openapi::api::apps::v1::ReplicaSetStatus,
    ) -> Result<(), ApiError> {
        let Some(patch) = status_patch(set.metadata.uid.as_deref(), set.status.as_ref(), status) else { return Ok(()) };
        let name = set.name_any();
        match merge_status("patch replicaset status", api, &name, &patch).await {
            Err(error) if error.is_not_found() => Ok(()),
            result => result.map(drop),
        }
    }
}

fn selector(set: &ReplicaSet) -> Selector {
    let compiled = Selector::compile(set.spec.as_ref().map(|spec| &spec.selector));
    // A selector that cannot be read, and one that would catch everything, own nothing.
    compiled.ok().filter(|selector| !selector.is_everything()).unwrap_or(Selector::nothing())
}
