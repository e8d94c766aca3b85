//! [`ProbeManager`]: starts and stops the probe tasks of containers.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;
use rand::Rng;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use crate::action::Prober;
use crate::http::HttpProber;
use crate::model::{ExecProbe, Kind, Outcome, Target, Update};
use crate::worker::{Counts, Timing, Worker};

/// More containers than this taken up within [`CROWD_WINDOW`] get their first probes spread out, unless they are fresh:
/// someone waits for those.
const CROWD: usize = 20;
const CROWD_WINDOW: Duration = Duration::from_secs(1);
const FRESH: Duration = Duration::from_secs(5);

/// Runs one task for each probe of each started container.
pub struct ProbeManager {
    prober: Prober,
    updates: mpsc::Sender<Update>,
    /// By pod UID and container name.
    running: Mutex<BTreeMap<(String, String), Running>>,
    recent_starts: Mutex<VecDeque<Instant>>,
}

/// A container's tasks; dropping ends them.
struct Running {
    container_id: String,
    counts: Vec<(Kind, Arc<Counts>)>,
    _tasks: Vec<AbortOnDropHandle<()>>,
}

impl ProbeManager {
    pub fn new(exec: Arc<dyn ExecProbe>, updates: mpsc::Sender<Update>) -> Self {
        Self {
            prober: Prober { exec, http: HttpProber::new() },
            updates,
            running: Mutex::default(),
            recent_starts: Mutex::default(),
        }
    }

    /// Starts the probes of a container; replaces those of an earlier container of the same name, and does nothing when
    /// this container's are running already. Needs a tokio runtime.
    pub fn start(&self, target: Target) {
        let key = (target.pod_uid.clone(), target.container.name.clone());
        let mut running = self.running.lock();
        if running.get(&key).is_some_and(|running| running.container_id == target.container_id) {
            return;
        }
        running.insert(key, self.spawn(target));
    }

    fn spawn(&self, target: Target) -> Running {
        let container = &target.container;
        let started = container.startup_probe.is_none() || target.initial.startup == Some(Outcome::Success);
        let gate = Arc::new(watch::Sender::new(started));
        let probes = [
            (Kind::Startup, container.startup_probe.clone().filter(|_| !started)),
            (Kind::Readiness, container.readiness_probe.clone()),
            (Kind::Liveness, container.liveness_probe.clone()),
        ];
        let age = jiff::Timestamp::now().duration_since(target.started_at);
        let fresh = Duration::try_from(age).is_ok_and(|age| age < FRESH);
        let crowded = self.note_start() && !fresh;
        let target = Arc::new(target);
        let mut counts = Vec::new();
        let mut tasks = Vec::new();
        for (kind, probe) in probes {
            let Some(probe) = probe else { continue };
            let stagger = if crowded {
                rand::rng().random_range(Duration::ZERO..Timing::of(&probe).period)
            } else {
                Duration::ZERO
            };
            let count = Arc::new(Counts::default());
            counts.push((kind, count.clone()));
            let worker = Worker {
                kind,
                probe,
                target: target.clone(),
                prober: self.prober.clone(),
                updates: self.updates.clone(),
                counts: count,
                gate: gate.clone(),
                stagger,
            };
            tasks.push(AbortOnDropHandle::new(tokio::spawn(worker.run())));
        }
        Running { container_id: target.container_id.clone(), counts, _tasks: tasks }
    }

    /// Whether many containers were started just now, as after a restart of the agent.
    fn note_start(&self) -> bool {
        let now = Instant::now();
        let mut recent = self.recent_starts.lock();
        while recent.front().is_some_and(|start| now.duration_since(*start) > CROWD_WINDOW) {
            recent.pop_front();
        }
        if recent.len() <= CROWD {
            recent.push_back(now);
        }
        recent.len() > CROWD
    }

    /// Stops a container's probes. Nothing is told about it.
    pub fn stop(&self, pod_uid: &str, container_name: &str) {
        self.running.lock().remove(&(pod_uid.to_string(), container_name.to_string()));
    }

    /// Stops all probes of a pod.
    pub fn stop_pod(&self, pod_uid: &str) {
        self.running.lock().retain(|(uid, _), _| uid != pod_uid);
    }

    /// Prometheus text of `/metrics/probes`.
    pub fn metrics(&self) -> String {
        let mut text = String::from(
            "# HELP prober_probe_total [BETA] Attempts of liveness, readiness and startup probes by result.\n\
             # TYPE prober_probe_total counter\n",
        );
        for ((uid, container), running) in self.running.lock().iter() {
            for (kind, counts) in &running.counts {
                let results =
                    [("failed", &counts.failed), ("successful", &counts.successful), ("unknown", &counts.unknown)];
                for (result, count) in results {
                    let count = count.load(Ordering::Relaxed);
                    if count > 0 {
                        let _ = writeln!(
                            text,
                            "prober_probe_total{{container={container:?},pod_uid={uid:?},probe_type=\"{}\",result=\"{result}\"}} {count}",
                            kind.as_str()
                        );
                    }
                }
            }
        }
        text
    }
}

#[cfg(test)]
#[path = "manager_tests.rs"]
mod tests;
