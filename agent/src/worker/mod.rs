//! The owner of one pod: a task that takes in events, asks the planner, and carries its actions out.
//!
//! ```text
//!   API watch ─┐                     ┌──────────────┐   actions    ┌───────────────────────────┐
//!   runtime  ──┼─ Event ──▶ Worker ──│ State · plan │─────────────▶│ one background task a key │
//!   probes   ──┘              ▲      └──────┬───────┘              └────────────┬──────────────┘
//!                             │             │ status                            │
//!                             │             ▼                                   │
//!                             │     one patch under way at a time               │
//!                             └──────────────── Event ◀─────────────────────────┘
//! ```
//!
//! The worker itself never waits for anything but events. Everything it starts ends in an event of its own. It decides
//! nothing that `plan` and `status` do not say.

mod actions;
mod image;
mod ledger;
mod report;
mod start;
mod upkeep;

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use oarlock_probes::{InitialOutcomes, Kind, Outcome as ProbeOutcome, Update};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::model::{ContainerId, Observed, PodUid, RunState};
use crate::plan::{self, Action, Key, Outcome, PodView, State, Why};
use crate::recorder::Level;
use crate::resize::Pending;
use crate::shared::{PodEntry, Shared};
use crate::{spec, status};

pub(crate) const MAILBOX: usize = 64;
/// How long readers of the status are spared a container's replacement. Upstream's kubelet looks at containers once a second,
/// and then tells at its next turn.
const REPLACEMENT: Duration = Duration::from_secs(2);

/// Everything that can happen to a pod, from outside.
#[derive(Debug)]
pub(crate) enum Event {
    /// A source has the pod, in this form; its resources are those allocated. With them, why others that it asks for are not.
    Desired(Arc<Pod>, Option<Pending>),
    /// The API object that shows a static pod.
    Mirror(Arc<Pod>),
    /// No source has the pod any more.
    Gone,
    /// The pod may not run here.
    Rejected {
        reason: String,
        message: String,
    },
    /// Something that the volumes show has changed.
    ContentChanged,
    /// The node needs the pod to end: reason and message of its Failed status.
    End {
        reason: String,
        message: String,
        grace: Duration,
    },
    /// Containers of a pod that is over are to go.
    Reclaim,
    /// Something happened in the runtime.
    RuntimeChanged,
    Probe(Update),
}

/// What the worker's own background tasks come back with.
enum Ended {
    Action { key: Key, outcome: Outcome, seen_from: u64, observed: Option<(u64, Observed)> },
    Observed { ticket: u64, observed: Option<Observed> },
    Reported(report::Sent),
    Refreshed,
}

/// The owner of one pod.
pub(crate) struct Worker {
    shared: Arc<Shared>,
    uid: PodUid,
    pod: Arc<Pod>,
    state: State,
    /// Boxed, since a channel keeps room for 32 of what it carries.
    mailbox: mpsc::Receiver<Box<Event>>,
    tasks: JoinSet<Ended>,
    cancels: BTreeMap<Key, CancellationToken>,
    tickets: Arc<AtomicU64>,
    looking: bool,
    look_again: bool,
    look_failures: u32,
    probing: HashSet<ContainerId>,
    report: report::Report,
    refresh_at: tokio::time::Instant,
    /// Contents changed since they were last brought up to date.
    refresh_wanted: bool,
    refreshing: bool,
    /// Containers that make way for their new definition, and since when they do not run.
    replaced: BTreeMap<ContainerId, Option<tokio::time::Instant>>,
    saved: ledger::Ledger,
}

impl Worker {
    /// A worker for a pod that a source has, or (with `gone`) that only the runtime has.
    pub(crate) fn new(shared: Arc<Shared>, pod: Arc<Pod>, mailbox: mpsc::Receiver<Box<Event>>) -> Self {
        let uid = PodUid::from(spec::pod_uid(&pod));
        let last = pod.status.clone().unwrap_or_default();
        let now = Timestamp::now();
        let saved = ledger::load(&shared.config.state_dir(), &uid);
        let mut state = State::default();
        state.backoff = saved.backoff.clone();
        state.longest_delay = Some(shared.config.max_restart_delay);
        state.started_at = Some(last.start_time.as_ref().map_or(now, |at| at.0));
        for known in [&last.container_statuses, &last.init_container_statuses].into_iter().flatten().flatten() {
            if known.container_id.is_some() {
                state.known_restarts.insert(known.name.clone(), u32::try_from(known.restart_count).unwrap_or(0));
            }
        }
        // What the agent had begun to end, it ends.
        let ended_by_us =
            matches!(last.reason.as_deref(), Some("Evicted" | "DeadlineExceeded" | "Preempting" | "Terminated"));
        if ended_by_us || matches!(last.phase.as_deref(), Some("Failed" | "Succeeded")) {
            let why = match (&last.reason, &last.message) {
                (Some(reason), message) => {
                    Why::Failed { reason: reason.clone(), message: message.clone().unwrap_or_default() }
                }
                (None, _) => Why::Completed,
            };
            state.finish_with(why, Duration::from_secs(30), now);
        }
        Self {
            report: report::Report::new(last),
            shared,
            uid,
            state,
            pod,
            mailbox,
            tasks: JoinSet::new(),
            cancels: BTreeMap::new(),
            tickets: Arc::new(AtomicU64::new(1)),
            looking: false,
            look_again: false,
            look_failures: 0,
            probing: HashSet::new(),
            refresh_at: tokio::time::Instant::now() + upkeep::jittered(),
            refresh_wanted: false,
            refreshing: false,
            replaced: BTreeMap::new(),
            saved,
        }
    }

    /// Runs until the pod is forgotten (true) or `shutdown` (false), which leaves its containers alone.
    pub(crate) async fn run(mut self: Box<Self>, shutdown: CancellationToken) -> (PodUid, bool) {
        let forgotten = self.work(&shutdown).await;
        (self.uid.clone(), forgotten)
    }

    async fn work(&mut self, shutdown: &CancellationToken) -> bool {
        self.look();
        loop {
            let wake = self.advance();
            let Some(wake) = wake else { break };
            let sleep = tokio::time::sleep_until(wake.min(self.refresh_at));
            tokio::select! {
                () = shutdown.cancelled() => return false,
                event = self.mailbox.recv() => match event {
                    Some(event) => self.take(*event),
                    None => return false,
                },
                Some(ended) = self.tasks.join_next(), if !self.tasks.is_empty() => {
                    if let Ok(ended) = ended {
                        self.ended(ended);
                    }
                }
                () = sleep => {}
            }
            while let Ok(event) = self.mailbox.try_recv() {
                self.take(*event);
            }
            while let Some(Ok(ended)) = self.tasks.try_join_next() {
                self.ended(ended);
            }
            self.refresh();
        }
        self.shared.probes.stop_pod(self.uid.as_str());
        self.shared.objects.forget_pod(self.uid.as_str());
        self.shared.watched.forget(&self.uid);
        self.shared.table.remove(&self.uid);
        ledger::remove(&self.shared.config.state_dir(), &self.uid);
        true
    }

    fn take(&mut self, event: Event) {
        let now = Timestamp::now();
        match event {
            Event::Desired(pod, pending) => {
                self.resize_pending(&pod, pending);
                self.desired(pod, now);
            }
            Event::Mirror(mirror) => self.report.seen(&mirror),
            Event::Gone => {
                self.state.gone = true;
                let grace = self
                    .state
                    .deletion
                    .unwrap_or_else(|| self.state.spec.as_ref().map_or(Duration::from_secs(30), |spec| spec.grace));
                self.state.finish_with(Why::Deleted, grace, now);
            }
            Event::Rejected { reason, message } => {
                self.shared.recorder.pod(&self.pod, Level::Warning, reason.clone(), message.clone());
                let message = format!("Pod was rejected: {message}");
                self.state.finish_with(Why::Failed { reason, message }, Duration::from_secs(1), now);
            }
            Event::ContentChanged => self.refresh_wanted = true,
            Event::End { reason, message, grace } => {
                self.state.finish_with(Why::Failed { reason, message }, grace, now);
            }
            Event::Reclaim => self.state.reclaim |= self.state.end.is_some(),
            Event::RuntimeChanged => self.look(),
            Event::Probe(update) => self.probe(update),
        }
    }

    fn resize_pending(&mut self, pod: &Pod, pending: Option<Pending>) {
        if let Some(pending) = pending.as_ref().filter(|pending| self.state.resize_pending.as_ref() != Some(*pending)) {
            let reason = format!("Resize{}", pending.reason);
            self.shared.recorder.pod(pod, Level::Warning, reason, pending.message.clone());
        }
        self.state.resize_pending = pending;
    }

    fn desired(&mut self, pod: Arc<Pod>, now: Timestamp) {
        self.state.gone = false;
        self.state.set_spec(PodView::of(&pod));
        if pod.metadata.deletion_timestamp.is_some() {
            let seconds = pod.metadata.deletion_grace_period_seconds.unwrap_or(30);
            let grace = Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
            if self.state.deletion != Some(grace) {
                self.state.deletion = Some(grace);
                self.state.finish_with(Why::Deleted, grace, now);
            }
        }
        self.report.seen(&pod);
        if self.state.end.is_none() {
            self.shared.watched.follow(&self.uid, &pod);
        } else {
            self.shared.watched.forget(&self.uid);
        }
        let (old, new) = (&self.pod.metadata, &pod.metadata);
        self.refresh_wanted |= old.labels != new.labels || old.annotations != new.annotations;
        self.pod = pod;
    }

    fn probe(&mut self, update: Update) {
        let id = ContainerId::from(update.container_id.as_str());
        let known = self.state.observed.as_ref().is_some_and(|o| o.containers.iter().any(|c| c.id == id));
        if !known {
            return;
        }
        let ending = self.state.end.is_some();
        if let Some(message) = update.probe_failed.filter(|_| !ending || update.kind == Kind::Readiness) {
            let level = Level::Warning;
            self.shared.recorder.container(&self.pod, &update.container_name, level, "Unhealthy", message);
        }
        if let Some(message) = update.probe_warned {
            self.shared.recorder.container(&self.pod, &update.container_name, Level::Warning, "ProbeWarning", message);
        }
        let view = self.state.probes.entry(id).or_default();
        match update.kind {
            Kind::Startup => view.startup = Some(update.outcome),
            Kind::Readiness => view.readiness = Some(update.outcome),
            Kind::Liveness => view.liveness = Some(update.outcome),
        }
    }

    fn ended(&mut self, ended: Ended) {
        let now = Timestamp::now();
        match ended {
            Ended::Action { key, outcome, seen_from, observed } => {
                self.cancels.remove(&key);
                self.state.finish(&key, outcome, seen_from, now);
                match observed {
                    Some((ticket, observed)) => self.state.observe(ticket, observed),
                    None if matches!(key, Key::Sandbox | Key::Container(_)) => self.look(),
                    None => {}
                }
            }
            Ended::Observed { ticket, observed } => {
                self.looking = false;
                match observed {
                    Some(observed) => {
                        self.look_failures = 0;
                        self.state.observe(ticket, observed);
                    }
                    None => {
                        self.look_failures += 1;
                        self.look_again = true;
                    }
                }
                if std::mem::take(&mut self.look_again) {
                    self.look();
                }
            }
            Ended::Reported(sent) => self.report.ended(sent),
            Ended::Refreshed => self.refreshing = false,
        }
    }

    /// Looks at the pod in the runtime, in the background; once at a time.
    fn look(&mut self) {
        if self.looking {
            self.look_again = true;
            return;
        }
        self.looking = true;
        let delay = match self.look_failures {
            0 => Duration::ZERO,
            failures => Duration::from_millis(100 << failures.min(6)),
        };
        let (shared, uid, tickets) = (self.shared.clone(), self.uid.clone(), self.tickets.clone());
        let known = self.state.observed.clone();
        self.tasks.spawn(async move {
            tokio::time::sleep(delay).await;
            let ticket = tickets.fetch_add(1, Ordering::Relaxed);
            let observed = shared.runtime.observe(&uid, known.as_ref()).await;
            if let Err(error) = &observed {
                tracing::debug!(pod.uid = %uid, %error, "the runtime could not be looked at");
            }
            Ended::Observed { ticket, observed: observed.ok() }
        });
    }

    /// Draws conclusions, starts what the plan says, tells the API. Gives the time to look again, or None to end.
    fn advance(&mut self) -> Option<tokio::time::Instant> {
        let now = Timestamp::now();
        self.state.settle(now);
        self.run_probes();
        let report_wake = self.tell(now);
        let plan = plan::plan(&self.state, now);
        for action in plan.actions {
            match action {
                Action::Forget => return None,
                Action::Cancel(key) => {
                    self.state.cancel(&key);
                    if let Some(token) = self.cancels.get(&key) {
                        token.cancel();
                    }
                }
                action => self.begin(action, now),
            }
        }
        self.save();
        let far = tokio::time::Instant::now() + Duration::from_secs(86_400);
        let wake = plan.wake_at.map_or(far, |at| {
            tokio::time::Instant::now() + Duration::try_from(at.duration_since(now)).unwrap_or_default()
        });
        Some(wake.min(report_wake.unwrap_or(far)))
    }

    fn begin(&mut self, action: Action, now: Timestamp) {
        let Some(key) = action.key() else { return };
        if let Action::KillContainer { id, why: plan::KillReason::DefinitionChanged, .. } = &action {
            self.replaced.entry(id.clone()).or_default();
        }
        self.state.begin(&action, now);
        let cancel = CancellationToken::new();
        self.cancels.insert(key.clone(), cancel.clone());
        let job = actions::Job {
            shared: self.shared.clone(),
            pod: self.pod.clone(),
            uid: self.uid.clone(),
            observed: self.state.observed.clone().unwrap_or_default(),
            image: self.image_for(&action),
            cancel,
        };
        let tickets = self.tickets.clone();
        self.tasks.spawn(async move {
            let outcome = job.perform(action).await;
            let ticket = tickets.fetch_add(1, Ordering::Relaxed);
            let observed = match key {
                Key::Sandbox | Key::Container(_) => {
                    job.shared.runtime.observe(&job.uid, Some(&job.observed)).await.ok()
                }
                _ => None,
            };
            Ended::Action { key, outcome, seen_from: ticket, observed: observed.map(|observed| (ticket, observed)) }
        });
    }

    /// What the runtime calls the image of the container that is to start.
    fn image_for(&self, action: &Action) -> Option<String> {
        let Action::StartContainer { name, .. } = action else { return None };
        match self.state.images.get(name) {
            Some(plan::ImageState::Ready { image_ref }) => Some(image_ref.clone()),
            _ => None,
        }
    }

    /// Makes the status, lets readers see it, and sends what changed.
    fn tell(&mut self, now: Timestamp) -> Option<tokio::time::Instant> {
        let observed = self.state.observed.clone()?;
        let scheme = self.shared.id_scheme.load();
        let host_ips = self.shared.host_ips();
        let facts = status::StatusFacts { host_ips: &host_ips, id_scheme: &scheme, now };
        let next = status::pod_status(&self.pod, &self.state, self.report.current(), &facts);
        for transition in report::transitions(self.report.current(), &next) {
            transition.record(&self.shared.recorder, &self.pod);
        }
        self.note_start(&next, now);
        self.report.set_current(next);
        let entry = PodEntry {
            pod: self.pod.clone(),
            status: self.report.current().clone(),
            observed: Arc::new(observed),
            told: false,
        };
        let wake = self.send_status();
        self.state.status_sent = self.report.settled();
        self.shared.table.set(&self.uid, PodEntry { told: self.state.status_sent, ..entry });
        wake
    }

    /// Until when the status waits for a container's successor, if there is one to wait for. What is replaced in
    /// milliseconds was never away: telling both ends of it would be two patches and two moves of every endpoint.
    fn replacing_until(&mut self) -> Option<tokio::time::Instant> {
        let now = tokio::time::Instant::now();
        let observed = self.state.observed.as_ref().filter(|_| self.state.end.is_none());
        let state = &self.state;
        self.replaced.retain(|id, away_since| {
            let containers = observed.map(|observed| observed.containers.as_slice()).unwrap_or_default();
            let Some(old) = containers.iter().find(|one| one.id == *id) else { return false };
            if old.state == RunState::Running {
                return true;
            }
            let since = *away_since.get_or_insert(now);
            let follows = |one: &&crate::model::Container| {
                one.name == old.name && one.restart_count > old.restart_count && one.state == RunState::Running
            };
            let has_successor = containers.iter().find(follows).is_some_and(|_| !state.starting(&old.name));
            since + REPLACEMENT > now && !has_successor
        });
        self.replaced.values().flatten().min().map(|since| *since + REPLACEMENT)
    }

    fn send_status(&mut self) -> Option<tokio::time::Instant> {
        if self.state.gone {
            return None;
        }
        if let Some(until) = self.replacing_until() {
            return Some(until);
        }
        let uid = Some(self.uid.as_str()).filter(|_| !spec::is_static(&self.pod));
        let patch = match self.report.next_patch(uid) {
            report::Next::Nothing => return None,
            report::Next::Wait(until) => return Some(until),
            report::Next::Send(patch) => patch,
        };
        let (client, pod, status) = (self.shared.client.clone(), self.pod.clone(), self.report.current().clone());
        self.tasks.spawn(async move { Ended::Reported(report::send(client, &pod, patch, status).await) });
        None
    }

    /// Keeps on disk what a restart of the agent must not lose.
    fn save(&mut self) {
        let mut ledger = ledger::Ledger { backoff: self.state.backoff.clone(), ..Default::default() };
        for (id, view) in &self.state.probes {
            let settled = |outcome: Option<ProbeOutcome>| outcome.filter(|outcome| *outcome != ProbeOutcome::Unknown);
            let kept =
                InitialOutcomes { startup: settled(view.startup), readiness: settled(view.readiness), liveness: None };
            if kept != InitialOutcomes::default() {
                ledger.probes.insert(id.to_string(), kept);
            }
        }
        if ledger != self.saved {
            ledger::store(&self.shared.config.state_dir(), &self.uid, &ledger);
            self.saved = ledger;
        }
    }
}

/// A pod that only the runtime knows, as far as its labels tell.
pub(crate) fn unknown_pod(found: &crate::cri::Found) -> Pod {
    let mut pod = Pod::default();
    pod.metadata.name = Some(found.name.clone());
    pod.metadata.namespace = Some(found.namespace.clone());
    pod.metadata.uid = Some(found.uid.to_string());
    pod.status = Some(PodStatus::default());
    pod
}
