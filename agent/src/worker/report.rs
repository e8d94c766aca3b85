//! Telling the API: at most one status patch of a pod is under way, each goes from what the API has to what is true now,
//! a failed one is tried again. Also the events that follow from a change of status.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ContainerStatus, Pod, PodStatus};
use kube::api::{Api, Patch, PatchParams};
use oarlock_probes::{InitialOutcomes, Outcome};
use serde_json::Value;
use tokio::time::Instant;

use crate::model::ContainerId;
use crate::recorder::{Level, Recorder};
use crate::spec;
use crate::status::patch::status_patch;

const CALL: Duration = Duration::from_secs(10);
const LONGEST_DELAY: Duration = Duration::from_secs(5);

/// What the API has and what it should have.
pub(super) struct Report {
    /// The status as it is.
    current: Arc<PodStatus>,
    /// The status that the API has; when that is the same, it is the same in memory.
    acknowledged: Arc<PodStatus>,
    acknowledged_version: u64,
    under_way: bool,
    /// What the watch delivered while a patch was under way.
    seen_meanwhile: Option<Box<Pod>>,
    failures: u32,
    not_before: Option<Instant>,
}

/// What to do about the API.
pub(super) enum Next {
    Nothing,
    Wait(Instant),
    Send(Value),
}

/// How sending ended.
pub(super) enum Sent {
    Done {
        status: Arc<PodStatus>,
        answer: Box<Pod>,
    },
    /// There is no such pod any more.
    Gone,
    Failed,
}

impl Report {
    pub(super) fn new(last: PodStatus) -> Self {
        let last = Arc::new(last);
        Self {
            current: last.clone(),
            acknowledged: last,
            acknowledged_version: 0,
            under_way: false,
            seen_meanwhile: None,
            failures: 0,
            not_before: None,
        }
    }

    /// Takes in an object that the watch delivered: others' conditions, and what someone may have overwritten.
    pub(super) fn seen(&mut self, pod: &Pod) {
        let version = resource_version(pod);
        if self.under_way {
            // Judged once it is known which of the two came later.
            self.seen_meanwhile = Some(Box::new(pod.clone()));
            return;
        }
        if version < self.acknowledged_version {
            return;
        }
        self.acknowledged_version = version;
        let none = PodStatus::default();
        let status = pod.status.as_ref().unwrap_or(&none);
        self.adopt_foreign_conditions(status);
        self.acknowledged = if *status == *self.current { self.current.clone() } else { Arc::new(status.clone()) };
    }

    /// The status as it is.
    pub(super) fn current(&self) -> &Arc<PodStatus> {
        &self.current
    }

    /// Takes in the status as it is now.
    pub(super) fn set_current(&mut self, status: PodStatus) {
        if status == *self.acknowledged {
            self.current = self.acknowledged.clone();
        } else if status != *self.current {
            // A copy has no room to grow, which would be kept as long as the pod.
            self.current = Arc::new(status.clone());
        }
    }

    fn adopt_foreign_conditions(&mut self, status: &PodStatus) {
        let own = |kind: &str| self.current.conditions.iter().flatten().any(|condition| condition.type_ == kind);
        let owned: Vec<_> = self.current.conditions.iter().flatten().cloned().collect();
        let is_ours = |kind: &str| {
            matches!(
                kind,
                "PodReadyToStartContainers"
                    | "Initialized"
                    | "Ready"
                    | "ContainersReady"
                    | "DisruptionTarget"
                    | "PodResizePending"
                    | "PodResizeInProgress"
            ) && own(kind)
        };
        let theirs = status.conditions.iter().flatten().filter(|condition| !is_ours(&condition.type_)).cloned();
        let ours = owned.into_iter().filter(|condition| is_ours(&condition.type_));
        let conditions = Some(ours.chain(theirs).collect());
        if conditions != self.current.conditions {
            Arc::make_mut(&mut self.current).conditions = conditions;
        }
    }

    /// The next patch to send, if it is time for one.
    pub(super) fn next_patch(&mut self, uid: Option<&str>) -> Next {
        if self.under_way {
            return Next::Nothing;
        }
        let Some(patch) = status_patch(uid, &self.acknowledged, &self.current) else { return Next::Nothing };
        if let Some(until) = self.not_before.filter(|until| *until > Instant::now()) {
            return Next::Wait(until);
        }
        self.under_way = true;
        Next::Send(patch)
    }

    /// Whether the API has everything.
    pub(super) fn settled(&self) -> bool {
        !self.under_way && status_patch(None, &self.acknowledged, &self.current).is_none()
    }

    pub(super) fn ended(&mut self, sent: Sent) {
        self.under_way = false;
        match sent {
            Sent::Done { status, answer } => {
                self.failures = 0;
                self.not_before = None;
                self.acknowledged = status;
                self.acknowledged_version = self.acknowledged_version.max(resource_version(&answer));
            }
            // The watch will say so too; until then there is nobody to tell.
            Sent::Gone => self.acknowledged = self.current.clone(),
            Sent::Failed => {
                let delay = Duration::from_millis(100 << self.failures.min(6)).min(LONGEST_DELAY);
                self.failures += 1;
                self.not_before = Some(Instant::now() + delay);
            }
        }
        if let Some(pod) = self.seen_meanwhile.take() {
            self.seen(&pod);
        }
    }

    /// What the API last knew of a container's probes.
    pub(super) fn outcomes_before(&self, name: &str, id: &ContainerId, scheme: &str) -> InitialOutcomes {
        let full_id = format!("{scheme}{id}");
        let same = |status: &&ContainerStatus| {
            status.name == name
                && status.container_id.as_deref() == Some(&full_id)
                && status.state.as_ref().is_some_and(|state| state.running.is_some())
        };
        let lists = [&self.acknowledged.container_statuses, &self.acknowledged.init_container_statuses];
        let Some(known) = lists.into_iter().flatten().flatten().find(same) else { return InitialOutcomes::default() };
        InitialOutcomes {
            startup: (known.started == Some(true)).then_some(Outcome::Success),
            readiness: known.ready.then_some(Outcome::Success),
            liveness: None,
        }
    }
}

fn resource_version(pod: &Pod) -> u64 {
    pod.metadata.resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or(0)
}

/// Sends a patch; `status` is what the API has afterwards.
pub(super) async fn send(client: kube::Client, pod: &Pod, patch: Value, status: Arc<PodStatus>) -> Sent {
    let api: Api<Pod> = Api::namespaced(client, spec::pod_namespace(pod));
    let params = PatchParams::default();
    let patch = Patch::Strategic(patch);
    let call = api.patch_status(spec::pod_name(pod), &params, &patch);
    match tokio::time::timeout(CALL, call).await {
        Ok(Ok(answer)) => Sent::Done { status, answer: Box::new(answer) },
        // The mirror of a static pod may only be about to be made. A conflict may be with another writer, or with another pod of
        // the name; of that one the watch tells.
        Ok(Err(kube::Error::Api(refusal))) if refusal.code == 404 && !spec::is_static(pod) => Sent::Gone,
        Ok(Err(error)) => {
            tracing::debug!(pod.name = spec::pod_name(pod), %error, "pod status was not taken");
            Sent::Failed
        }
        Err(_) => Sent::Failed,
    }
}

/// A change of a container's waiting reason that users are told of.
pub(super) enum Transition {
    CrashLoop { container: String },
    PullBackoff { container: String },
}

/// What changed from one status to the next.
pub(super) fn transitions(old: &PodStatus, new: &PodStatus) -> Vec<Transition> {
    let lists = |status: &PodStatus| -> Vec<ContainerStatus> {
        let all = [&status.init_container_statuses, &status.container_statuses];
        all.into_iter().flatten().flatten().cloned().collect()
    };
    let waiting = |status: &ContainerStatus| {
        status.state.as_ref().and_then(|state| state.waiting.as_ref()).and_then(|waiting| waiting.reason.clone())
    };
    let before = lists(old);
    let mut found = Vec::new();
    for status in lists(new) {
        let reason = waiting(&status);
        if before.iter().find(|old| old.name == status.name).and_then(waiting) == reason {
            continue;
        }
        match reason.as_deref() {
            Some("CrashLoopBackOff") => found.push(Transition::CrashLoop { container: status.name }),
            Some("ImagePullBackOff") => found.push(Transition::PullBackoff { container: status.name }),
            _ => {}
        }
    }
    found
}

impl Transition {
    pub(super) fn record(&self, recorder: &Recorder, pod: &Pod) {
        match self {
            Transition::CrashLoop { container } => {
                let shown = spec::shown_name(pod);
                let message = format!("Back-off restarting failed container {container} in pod {shown}");
                recorder.container(pod, container, Level::Warning, "BackOff", message);
            }
            Transition::PullBackoff { container } => {
                let image = pod.spec.as_ref().and_then(|spec| spec::find_container(spec, container));
                let image = image.and_then(|(container, _)| container.image).unwrap_or_default();
                let message = format!("Back-off pulling image \"{image}\"");
                recorder.container(pod, container, Level::Normal, "BackOff", message);
                recorder.container(pod, container, Level::Warning, "Failed", "Error: ImagePullBackOff");
            }
        }
    }
}
