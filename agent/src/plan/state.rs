//! Everything the planner knows about one pod, and how events change it. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;
use oarlock_probes::Outcome as ProbeOutcome;

use super::backoff::{Backoff, Retry, later};
use super::view::{ContainerView, PodView, RestartPolicy, Role};
use super::{Action, Key, KillReason};
use crate::model::{Container, ContainerId, Observed, RunState, SandboxId};
use crate::resize::Pending;

/// Why a pod ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Why {
    /// Every container is done and none is to run again.
    Completed,
    /// Its API object is being deleted, or is gone.
    Deleted,
    /// The agent ends it: deadline, admission, eviction. The reason and message of its Failed status.
    Failed { reason: String, message: String },
}

/// A pod that ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct End {
    pub why: Why,
    pub since: Timestamp,
    pub grace: Duration,
}

/// What the probes of one container last said.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct ProbeView {
    pub startup: Option<ProbeOutcome>,
    pub readiness: Option<ProbeOutcome>,
    pub liveness: Option<ProbeOutcome>,
}

/// What is known of a container's image for its next start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ImageState {
    Ready { image_ref: String },
    Failed { reason: String, message: String, at: Timestamp, retry_at: Option<Timestamp> },
}

/// An action under way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Busy {
    pub action: Action,
    pub cancelled: bool,
}

/// How an action ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    Done,
    /// The image is there, and this is what the runtime calls it.
    ImageReady {
        image_ref: String,
    },
    /// `reason` is a container's waiting reason where there is one. `pull_failed` makes later pulls wait.
    Failed {
        reason: String,
        message: String,
    },
    Cancelled,
}

/// Everything the planner knows about one pod.
#[derive(Debug, Clone, Default)]
pub(crate) struct State {
    pub spec: Option<PodView>,
    /// The API object's grace, once its deletion was asked for.
    pub deletion: Option<Duration>,
    /// No source knows the pod any more.
    pub gone: bool,
    pub end: Option<End>,
    /// When the agent first took the pod up.
    pub started_at: Option<Timestamp>,
    /// None until the runtime was looked at.
    pub observed: Option<Observed>,
    observed_ticket: u64,
    /// Keys whose last action's effect has not been seen, and the observation that will show it.
    unsettled: BTreeMap<Key, u64>,
    pub busy: BTreeMap<Key, Busy>,
    pub retry: BTreeMap<Key, Retry>,
    pub volumes_ready: bool,
    pub volumes_torn_down: bool,
    pub cgroup_removed: bool,
    pub stopped_sandboxes: BTreeSet<SandboxId>,
    pub images: BTreeMap<String, ImageState>,
    pull_backoff: BTreeMap<String, Backoff>,
    pub backoff: BTreeMap<String, Backoff>,
    /// Reason and message of each container's last failed start.
    pub start_errors: BTreeMap<String, (String, String)>,
    pub probes: BTreeMap<ContainerId, ProbeView>,
    /// Restarts that the API knows of, for containers whose records the runtime has lost.
    pub known_restarts: BTreeMap<String, u32>,
    /// Resources that running containers were given since they were made.
    resized: BTreeMap<ContainerId, String>,
    /// The instance of each container, by its restart count, that was made while this agent runs.
    made_here: BTreeMap<String, u32>,
    /// Why a container's last resize failed.
    pub resize_errors: BTreeMap<String, String>,
    /// Why the size that the API object asks for is not allocated.
    pub resize_pending: Option<Pending>,
    /// Containers that live on although their preStop hook has run.
    pub pre_stopped: BTreeSet<ContainerId>,
    /// Containers that are ended, or were, only to run again, with the restart count of the instance that was.
    replaced: BTreeMap<String, u32>,
    /// Whether the API has the status as it stands now.
    pub status_sent: bool,
    pub deletion_finished: bool,
    /// The longest delay between restarts, where it differs from the usual one.
    pub longest_delay: Option<Duration>,
    /// Room is needed: containers of a pod that is over go although its object stays.
    pub reclaim: bool,
}

impl State {
    /// Takes in a changed specification.
    pub(crate) fn set_spec(&mut self, view: PodView) {
        if let Some(old) = &self.spec {
            for container in &view.containers {
                if old.find(&container.name).is_some_and(|before| before.hash != container.hash) {
                    // What went wrong with the old definition is not held against the new one.
                    self.images.remove(&container.name);
                    self.pull_backoff.remove(&container.name);
                    self.backoff.remove(&container.name);
                }
            }
        }
        self.spec = Some(view);
    }

    /// Makes the pod end, or shortens the grace of one that is ending.
    pub(crate) fn finish_with(&mut self, why: Why, grace: Duration, now: Timestamp) {
        match &mut self.end {
            None => self.end = Some(End { why, since: now, grace }),
            Some(end) => {
                let remaining = end.remaining(now);
                if grace < remaining {
                    end.since = now;
                    end.grace = grace;
                }
            }
        }
    }

    /// Takes in what the runtime shows. `ticket` orders looks: a look that began later has the higher one.
    pub(crate) fn observe(&mut self, ticket: u64, observed: Observed) {
        if self.observed.is_some() && ticket <= self.observed_ticket {
            return;
        }
        self.observed_ticket = ticket;
        self.unsettled.retain(|_, needed| *needed > ticket);
        let alive: BTreeSet<ContainerId> = observed.containers.iter().map(|container| container.id.clone()).collect();
        self.probes.retain(|id, _| alive.contains(id));
        self.resized.retain(|id, _| alive.contains(id));
        self.pre_stopped.retain(|id| alive.contains(id));
        self.stopped_sandboxes.retain(|id| observed.sandboxes.iter().any(|sandbox| sandbox.id == *id));
        self.observed = Some(observed);
    }

    /// Notes that an action begins.
    pub(crate) fn begin(&mut self, action: &Action, now: Timestamp) {
        if let Action::StartContainer { name, restart_count } = action {
            self.made_here.insert(name.clone(), *restart_count);
            let longest = self.longest_delay.unwrap_or(super::backoff::LONGEST);
            let ended = self.observed.as_ref().and_then(|observed| observed.latest(name));
            if let Some(ended) = ended.filter(|container| container.state == RunState::Exited) {
                let ended_at = ended.finished_at.unwrap_or(ended.created_at);
                let next = Backoff::next(self.backoff.get(name).copied(), ended_at, now, longest);
                self.backoff.insert(name.clone(), next);
            }
        }
        if let Action::KillContainer { name, why, .. } = action {
            let never = || {
                let view = self.spec.as_ref().and_then(|spec| spec.find(name));
                view.is_none_or(|view| view.restart == RestartPolicy::Never)
            };
            let again = match why {
                KillReason::DefinitionChanged => true,
                KillReason::Resized | KillReason::LivenessProbe | KillReason::StartupProbe => !never(),
                _ => false,
            };
            let record = self.observed.as_ref().and_then(|observed| observed.latest(name));
            if let Some(record) = record.filter(|_| again) {
                self.replaced.insert(name.clone(), record.restart_count);
            }
        }
        if let Some(key) = action.key() {
            self.busy.insert(key, Busy { action: action.clone(), cancelled: false });
        }
    }

    /// Marks the action under way for `key` as asked to end early.
    pub(crate) fn cancel(&mut self, key: &Key) {
        if let Some(busy) = self.busy.get_mut(key) {
            busy.cancelled = true;
        }
    }

    /// Notes that the action for `key` has ended. Observations numbered `seen_from` and up show its effect.
    pub(crate) fn finish(&mut self, key: &Key, outcome: Outcome, seen_from: u64, now: Timestamp) {
        let Some(busy) = self.busy.remove(key) else { return };
        if matches!(key, Key::Sandbox | Key::Container(_)) && self.observed_ticket < seen_from {
            self.unsettled.insert(key.clone(), seen_from);
        }
        match &outcome {
            Outcome::Failed { .. } if !matches!(key, Key::Image(_)) => {
                let next = Retry::after(self.retry.get(key).copied(), now);
                self.retry.insert(key.clone(), next);
            }
            Outcome::Cancelled => {}
            _ => {
                self.retry.remove(key);
            }
        }
        match (busy.action, outcome) {
            (Action::SetUpVolumes, Outcome::Done) => self.volumes_ready = true,
            (Action::TearDownVolumes, Outcome::Done) => self.volumes_torn_down = true,
            (Action::RemoveCgroup, Outcome::Done) => self.cgroup_removed = true,
            (Action::FinishDeletion, Outcome::Done) => self.deletion_finished = true,
            (Action::StopSandbox { id }, Outcome::Done) => {
                self.stopped_sandboxes.insert(id);
            }
            // However it went: a hook is run once.
            (Action::RunPreStop { id, .. }, _) => {
                self.pre_stopped.insert(id);
            }
            (Action::EnsureImage { container }, outcome) => self.image_checked(container, outcome, now),
            (Action::ResizeContainer { id, name, resources, .. }, Outcome::Done) => {
                self.resize_errors.remove(&name);
                self.resized.insert(id, resources);
            }
            (Action::ResizeContainer { name, .. }, Outcome::Failed { message, .. }) => {
                self.resize_errors.insert(name, message);
            }
            (Action::StartContainer { name, .. }, Outcome::Failed { reason, message }) => {
                self.images.remove(&name);
                self.start_errors.insert(name, (reason, message));
            }
            (Action::StartContainer { name, .. }, Outcome::Done) => {
                self.images.remove(&name);
                self.start_errors.remove(&name);
            }
            _ => {}
        }
    }

    fn image_checked(&mut self, container: String, outcome: Outcome, now: Timestamp) {
        match outcome {
            Outcome::ImageReady { image_ref } => {
                self.images.insert(container, ImageState::Ready { image_ref });
            }
            Outcome::Failed { reason, message } => {
                let retry_at = match reason.as_str() {
                    "InvalidImageName" => None,
                    "ErrImageNeverPull" => Some(later(now, super::backoff::INITIAL)),
                    _ => {
                        let next = Backoff::next(
                            self.pull_backoff.get(&container).copied(),
                            now,
                            now,
                            super::backoff::LONGEST,
                        );
                        self.pull_backoff.insert(container.clone(), next);
                        Some(later(now, next.delay))
                    }
                };
                self.images.insert(container, ImageState::Failed { reason, message, at: now, retry_at });
            }
            Outcome::Done | Outcome::Cancelled => {}
        }
    }

    /// Draws the conclusions that time and observations allow: a passed deadline, a pod that is done.
    pub(crate) fn settle(&mut self, now: Timestamp) {
        if self.end.is_some() {
            return;
        }
        let Some(spec) = &self.spec else { return };
        let grace = spec.grace;
        if self.deadline().is_some_and(|deadline| deadline <= now) {
            let why = Why::Failed {
                reason: "DeadlineExceeded".to_owned(),
                message: "Pod was active on the node longer than the specified deadline".to_owned(),
            };
            self.finish_with(why, grace, now);
        } else if self.completed() {
            self.finish_with(Why::Completed, grace, now);
        }
    }

    /// When activeDeadlineSeconds runs out.
    pub(crate) fn deadline(&self) -> Option<Timestamp> {
        Some(later(self.started_at?, self.spec.as_ref()?.active_deadline?))
    }

    /// Whether every container that matters is done for good.
    fn completed(&self) -> bool {
        let (Some(spec), Some(observed)) = (&self.spec, &self.observed) else { return false };
        let busy = |name: &str| self.occupied(&Key::Container(name.to_owned()));
        let mut inits = spec.of_role(Role::Init);
        let failed_init = inits.any(|init| {
            observed.latest(&init.name).is_some_and(|record| {
                record.state == RunState::Exited
                    && record.exit_code != 0
                    && !init.restarts_after(record.exit_code)
                    && !busy(&init.name)
            })
        });
        if failed_init {
            return true;
        }
        let mut mains = spec.of_role(Role::Main);
        mains.all(|main| {
            !busy(&main.name)
                && observed.latest(&main.name).is_some_and(|record| {
                    record.state == RunState::Exited && !self.runs_again(main, record.exit_code, record.restart_count)
                })
        })
    }

    /// Whether a container that ended with that code runs again: by its policy, or because it was ended for that.
    pub(crate) fn runs_again(&self, container: &ContainerView, exit_code: i32, restart_count: u32) -> bool {
        self.replaced.get(&container.name) == Some(&restart_count) || container.restarts_after(exit_code)
    }

    /// The resources that a container runs with. One that was made without a note has what is allocated.
    pub(crate) fn actuated<'a>(&'a self, container: &'a ContainerView, record: &'a Container) -> &'a str {
        let noted = Some(record.resources.as_str()).filter(|noted| !noted.is_empty());
        self.resized.get(&record.id).map(String::as_str).or(noted).unwrap_or(&container.resources)
    }

    /// Whether what a container runs with is known for sure. The annotation of one that another agent made does not tell
    /// of updates since; one more update does no harm.
    pub(crate) fn confirmed(&self, container: &ContainerView, record: &Container) -> bool {
        let may_have_changed = self.spec.as_ref().is_some_and(|spec| spec.changed) && container.sized;
        !may_have_changed
            || self.resized.contains_key(&record.id)
            || self.made_here.get(&container.name) == Some(&record.restart_count)
    }

    /// Whether an action for the key is under way or not yet seen.
    pub(crate) fn occupied(&self, key: &Key) -> bool {
        self.busy.contains_key(key) || self.unsettled.contains_key(key)
    }

    /// Whether the container is between its creation and the end of its start, postStart hook included.
    pub(crate) fn starting(&self, name: &str) -> bool {
        matches!(
            self.busy.get(&Key::Container(name.to_owned())),
            Some(Busy { action: Action::StartContainer { .. }, .. })
        )
    }

    /// Whether a running container counts as started: its postStart hook is over and its startup probe has passed.
    pub(crate) fn started(&self, name: &str, record: &Container) -> bool {
        if record.state != RunState::Running || self.starting(name) {
            return false;
        }
        let probed = self.spec.as_ref().and_then(|spec| spec.find(name)).is_some_and(|view| view.startup_probe);
        !probed || self.probes.get(&record.id).and_then(|probes| probes.startup) == Some(ProbeOutcome::Success)
    }

    /// Whether a container passes its readiness probe, or has none and is started.
    pub(crate) fn ready(&self, name: &str, record: &Container) -> bool {
        if !self.started(name, record) {
            return false;
        }
        let probed = self.spec.as_ref().and_then(|spec| spec.find(name)).is_some_and(|view| view.readiness_probe);
        !probed || self.probes.get(&record.id).and_then(|probes| probes.readiness) == Some(ProbeOutcome::Success)
    }

    /// When an ended container that is to run again may do so; None when it may `now`.
    pub(crate) fn restart_at(&self, record: &Container, now: Timestamp) -> Option<Timestamp> {
        let at = self.backoff.get(&record.name)?.ready_at(record.finished_at.unwrap_or(record.created_at))?;
        super::backoff::pending(at, now, super::backoff::LONGEST).then_some(at)
    }

    /// Whether no container of the pod can have a process.
    pub(crate) fn nothing_lives(&self) -> bool {
        let quiet = self.observed.as_ref().is_some_and(|observed| !observed.containers.iter().any(Container::live));
        let container_key = |key: &Key| matches!(key, Key::Container(_));
        quiet && !self.busy.keys().any(container_key) && !self.unsettled.keys().any(container_key)
    }

    /// Whether processes, network and volumes of the pod are gone.
    pub(crate) fn torn_down(&self) -> bool {
        let Some(observed) = &self.observed else { return false };
        self.nothing_lives()
            && self.volumes_torn_down
            && !self.occupied(&Key::Sandbox)
            && observed.sandboxes.iter().all(|sandbox| self.stopped_sandboxes.contains(&sandbox.id))
    }
}

impl End {
    /// When the grace time is over.
    pub(crate) fn deadline(&self) -> Timestamp {
        later(self.since, self.grace)
    }

    /// What is left of the grace time, and never less than a second.
    pub(crate) fn remaining(&self, now: Timestamp) -> Duration {
        let passed = Duration::try_from(now.duration_since(self.since)).unwrap_or_default();
        self.grace.saturating_sub(passed).max(Duration::from_secs(1))
    }
}
