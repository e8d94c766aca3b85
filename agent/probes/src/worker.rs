//! One probe's task.
//!
//! ```text
//! wait for start-up gate ─▶ initial delay ─▶ attempt ─▶ period ─▶ attempt …
//!                                              │ readiness, not yet passed ─▶ again within the period, ever less often
//!                                              │ startup: Success             ─▶ opens the gate, ends
//!                                              └ startup, liveness: Failure   ─▶ ends (the container will be replaced)
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use k8s_openapi::api::core::v1::Probe;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use crate::action::{self, Action, Attempt, Prober};
use crate::model::{Kind, Outcome, Target, Update};
use crate::standing::Standing;

/// The first pause after a readiness probe that failed while its container was starting.
const SOON: Duration = Duration::from_millis(50);

/// What of an attempt is passed on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Told {
    All,
    /// A failure that changes nothing is not worth an event.
    Changes,
}

/// Attempts by result.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub successful: AtomicU64,
    pub failed: AtomicU64,
    pub unknown: AtomicU64,
}

/// When a probe runs and what counts. Pure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Timing {
    pub initial_delay: Duration,
    pub period: Duration,
    pub timeout: Duration,
    pub success_threshold: u32,
    pub failure_threshold: u32,
}

impl Timing {
    pub fn of(probe: &Probe) -> Timing {
        let seconds = |value: Option<i32>, default: u64| match value {
            Some(value) if value > 0 => Duration::from_secs(value.unsigned_abs().into()),
            _ => Duration::from_secs(default),
        };
        let count = |value: Option<i32>, default: u32| value.filter(|v| *v > 0).map_or(default, i32::unsigned_abs);
        Timing {
            initial_delay: seconds(probe.initial_delay_seconds, 0),
            period: seconds(probe.period_seconds, 10),
            timeout: seconds(probe.timeout_seconds, 1),
            success_threshold: count(probe.success_threshold, 1),
            failure_threshold: count(probe.failure_threshold, 3),
        }
    }
}

/// Everything one probe's task needs.
pub(crate) struct Worker {
    pub kind: Kind,
    pub probe: Probe,
    pub target: Arc<Target>,
    pub prober: Prober,
    pub updates: mpsc::Sender<Update>,
    pub counts: Arc<Counts>,
    /// Opened by the startup probe.
    pub gate: Arc<watch::Sender<bool>>,
    /// Waited for once, so that many probes do not start together.
    pub stagger: Duration,
}

impl Worker {
    /// Runs until the probe is done with this container. Dropping it ends it.
    pub async fn run(self) {
        if self.kind != Kind::Startup {
            let mut gate = self.gate.subscribe();
            if gate.wait_for(|open| *open).await.is_err() {
                return;
            }
        }
        let timing = Timing::of(&self.probe);
        let action = action::parse(&self.probe, &self.target.container, self.target.pod_ip);
        let carried = match self.kind {
            Kind::Startup => self.target.initial.startup,
            Kind::Readiness => self.target.initial.readiness,
            Kind::Liveness => self.target.initial.liveness,
        };
        let mut standing =
            Standing::new(timing.success_threshold, timing.failure_threshold, carried.unwrap_or(Outcome::Unknown));
        let mut due = Instant::now() + self.remaining_delay(timing.initial_delay).max(self.stagger);
        let mut starting = self.kind == Kind::Readiness && carried.is_none();
        loop {
            sleep_until(due).await;
            due += timing.period;
            let attempt = self.attempt(&action, timing.timeout).await;
            due = due.max(Instant::now());
            if self.judge(attempt, &mut standing, Told::All).await.is_break() {
                return;
            }
            if std::mem::take(&mut starting) {
                let Some(next) = self.ask_soon(&action, timing, &mut standing, due).await else { return };
                due = next;
            }
        }
    }

    /// A container that is just starting is not left waiting for a whole period: it is asked again soon and then ever less
    /// often, until it is ready or the next attempt is due. Gives the time of that; None to end.
    async fn ask_soon(
        &self,
        action: &Result<Action, String>,
        timing: Timing,
        standing: &mut Standing,
        due: Instant,
    ) -> Option<Instant> {
        let mut pause = SOON;
        while standing.outcome() != Outcome::Success && Instant::now() + pause < due {
            tokio::time::sleep(pause).await;
            pause *= 2;
            let attempt = self.attempt(action, timing.timeout).await;
            if self.judge(attempt, standing, Told::Changes).await.is_break() {
                return None;
            }
            if standing.outcome() == Outcome::Success {
                return Some(Instant::now() + timing.period);
            }
        }
        Some(due.max(Instant::now()))
    }

    async fn attempt(&self, action: &Result<Action, String>, timeout: Duration) -> Attempt {
        match action {
            Ok(action) => self.prober.attempt(action, &self.target.container_id, timeout).await,
            Err(message) => Attempt::Error(message.clone()),
        }
    }

    /// What is left of the initial delay, counted from the container's start.
    fn remaining_delay(&self, delay: Duration) -> Duration {
        let age = jiff::Timestamp::now().duration_since(self.target.started_at);
        delay.saturating_sub(age.try_into().unwrap_or_default())
    }

    /// Counts an attempt and tells about it. Breaks when this probe has nothing more to find out.
    async fn judge(&self, attempt: Attempt, standing: &mut Standing, told: Told) -> std::ops::ControlFlow<()> {
        let kind = self.kind.as_str();
        let probe_warned = match &attempt {
            Attempt::Warning(message) if told == Told::All => Some(format!("{kind} probe warning: {message}")),
            _ => None,
        };
        let (counter, changed, message, probe_failed) = match attempt {
            Attempt::Success(message) | Attempt::Warning(message) => {
                (&self.counts.successful, standing.record(true), message, None)
            }
            Attempt::Failure(message) => {
                let text = format!("{kind} probe failed: {message}");
                (&self.counts.failed, standing.record(false), message, Some(text))
            }
            Attempt::Error(message) => {
                let text = format!("{kind} probe errored and resulted in Unknown state: {message}");
                (&self.counts.unknown, false, message, Some(text))
            }
        };
        let probe_failed = probe_failed.filter(|_| told == Told::All);
        counter.fetch_add(1, Ordering::Relaxed);
        let outcome = standing.outcome();
        if changed || probe_failed.is_some() || probe_warned.is_some() {
            let update = Update { probe_warned, ..self.update(outcome, changed, message, probe_failed) };
            if self.updates.send(update).await.is_err() {
                return std::ops::ControlFlow::Break(());
            }
        }
        match (self.kind, outcome) {
            (Kind::Startup, Outcome::Success) => {
                self.gate.send_replace(true);
                std::ops::ControlFlow::Break(())
            }
            (Kind::Startup | Kind::Liveness, Outcome::Failure) => std::ops::ControlFlow::Break(()),
            _ => std::ops::ControlFlow::Continue(()),
        }
    }

    fn update(&self, outcome: Outcome, changed: bool, message: String, probe_failed: Option<String>) -> Update {
        Update {
            pod_uid: self.target.pod_uid.clone(),
            container_name: self.target.container.name.clone(),
            container_id: self.target.container_id.clone(),
            kind: self.kind,
            outcome,
            changed,
            message,
            probe_failed,
            probe_warned: None,
        }
    }
}
