//! Graceful shutdown of the machine: pods end in the order of their priority before the agent does.
//!
//! When the machine is about to stop, every pod is ended with what its priority is given; the node is told as not ready and
//! takes no more pods. Of login1 the agent hears that before anything is stopped (see [`crate::inhibitor`]). Where there is no
//! login1, it is when the agent is asked to end and the machine is on its way down; when only the agent ends, pods stay. The
//! agent's service is stopped before the runtime's and the network's, and systemd waits for it as long as its stop timeout
//! allows.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::eviction::CRITICAL_PRIORITY;
use crate::inhibitor::LoginConfig;
use crate::model::PodUid;
use crate::pods::News;
use crate::shared::{PodEntry, Shared};
use crate::spec;

/// Reason and message of pods that the shutdown ends, and of those it keeps from starting.
const REASON: &str = "Terminated";
const MESSAGE: &str = "Pod was terminated in response to imminent node shutdown.";
pub(crate) const REFUSED_REASON: &str = "NodeShutdown";
pub(crate) const REFUSED_MESSAGE: &str = "Pod was rejected as the node is shutting down.";
pub(crate) const NOT_READY: &str = "node is shutting down";

/// How long the API gets to take the node's status.
const NODE_TOLD: Duration = Duration::from_secs(5);

/// How long pods get when the machine goes down.
#[derive(Debug, Clone)]
pub struct ShutdownConfig {
    /// From the lowest priority up: pods of at least this priority, and less than the next, get so long together. Empty leaves
    /// pods to whatever stops the runtime.
    pub groups: Vec<(i32, Duration)>,
    /// Whether the machine is going down. Blocks.
    pub machine_stops: fn() -> bool,
    pub login: LoginConfig,
}

impl Default for ShutdownConfig {
    fn default() -> Self {
        Self { groups: Vec::new(), machine_stops: systemd_stops, login: LoginConfig::default() }
    }
}

impl ShutdownConfig {
    /// `shutdownGracePeriod`, of which the last `critical` is for critical pods. None when that is longer than the whole.
    pub fn of_periods(whole: Duration, critical: Duration) -> Option<Vec<(i32, Duration)>> {
        let groups = [(0, whole.checked_sub(critical)?), (CRITICAL_PRIORITY, critical)];
        Some(if whole.is_zero() { Vec::new() } else { groups.into() })
    }

    /// The place of a priority among the groups. What is below the lowest goes with it.
    fn group_of(&self, priority: i32) -> usize {
        self.groups.iter().rposition(|(from, _)| *from <= priority).unwrap_or(0)
    }
}

/// systemd's manager is stopping everything.
fn systemd_stops() -> bool {
    let asked = Command::new("systemctl").arg("is-system-running").stdin(Stdio::null()).stderr(Stdio::null()).output();
    asked.is_ok_and(|answer| answer.stdout.trim_ascii() == b"stopping")
}

fn priority(pod: &Pod) -> i32 {
    pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or(0)
}

/// Waits for `asked`; when the machine goes down, ends all pods; then cancels `rest`.
pub(crate) async fn follow(
    shared: Arc<Shared>,
    news: mpsc::Sender<News>,
    asked: CancellationToken,
    rest: CancellationToken,
) {
    tokio::select! {
        () = asked.cancelled() => {}
        () = rest.cancelled() => return,
    }
    let config = &shared.config.shutdown;
    let stops = config.machine_stops;
    if !config.groups.is_empty() && tokio::task::spawn_blocking(stops).await.unwrap_or(false) {
        end_all(&shared, &news).await;
    }
    rest.cancel();
}

/// Takes no more pods, tells the node as not ready, and ends the pods there are.
pub(crate) async fn end_all(shared: &Shared, news: &mpsc::Sender<News>) {
    shared.shutting_down.store(true, Ordering::Relaxed);
    tokio::join!(end_pods(shared, news), node_not_ready(shared));
}

/// Has the node told as not ready, and waits a moment until it is.
async fn node_not_ready(shared: &Shared) {
    let told = async {
        loop {
            let next = shared.node_told.notified();
            let node = shared.node.load_full();
            let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
            if conditions.into_iter().any(|condition| condition.type_ == "Ready" && condition.status == "False") {
                return;
            }
            shared.node_changed.notify_one();
            next.await;
        }
    };
    let _ = tokio::time::timeout(NODE_TOLD, told).await;
}

async fn end_pods(shared: &Shared, news: &mpsc::Sender<News>) {
    let config = &shared.config.shutdown;
    let live = |entry: &PodEntry| entry.observed.containers.iter().any(|container| container.live());
    for (group, (_, period)) in config.groups.iter().enumerate() {
        let mut entries = shared.table.all();
        entries.retain(|entry| live(entry) && config.group_of(priority(&entry.pod)) == group);
        tracing::info!(pods = entries.len(), ?period, group, "the machine is shutting down: ending pods");
        let mut uids = Vec::new();
        for entry in entries {
            let own = entry.pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds).unwrap_or(30);
            let grace = Duration::from_secs(u64::try_from(own).unwrap_or(0)).min(*period);
            let uid = PodUid::from(spec::pod_uid(&entry.pod));
            let end = News::End { uid: uid.clone(), reason: REASON.into(), message: MESSAGE.into(), grace };
            let _ = news.send(end).await;
            uids.push(uid);
        }
        // An entry that ended is told to the API too, within the same time.
        let over = |entry: PodEntry| !live(&entry) && entry.told;
        shared.table.wait_for(*period, |table| uids.iter().all(|uid| table.get(uid).is_none_or(over))).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn critical_pods_have_the_end_of_the_time_to_themselves() {
        let seconds = Duration::from_secs;
        let groups = ShutdownConfig::of_periods(seconds(30), seconds(10)).expect("it fits");
        assert_eq!(groups, [(0, seconds(20)), (CRITICAL_PRIORITY, seconds(10))]);
        assert_eq!(ShutdownConfig::of_periods(seconds(10), seconds(30)), None);
        assert_eq!(ShutdownConfig::of_periods(Duration::ZERO, Duration::ZERO), Some(Vec::new()));
        let config = ShutdownConfig {
            groups: vec![(0, seconds(1)), (100, seconds(1)), (5000, seconds(1))],
            ..Default::default()
        };
        let places = [-5, 0, 99, 100, 4999, 5000, i32::MAX].map(|priority| config.group_of(priority));
        assert_eq!(places, [0, 0, 0, 1, 1, 2, 2]);
    }
}
