//! Waiting pods. Pure but for the clock that is handed in.
//!
//! ```text
//!            upsert                pop
//!   (new) ─────────▶ Active ─────────────▶ Working ──▶ (placed: removed)
//!     │                ▲  ▲                  │   │
//!     │ gates          │  │ time is up       │   └─ no node ──▶ Unschedulable
//!     ▼                │  └───── BackOff ◀───┘ failed               │
//!   Gated ─────────────┘            ▲                               │
//!           gates removed           └──── wake, too early ──────────┤
//!                                                 wake, in time ────┴──▶ Active
//! ```

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::filter::Plugin;
use crate::pod::PodInfo;

/// Shorter than upstream's second: at start-up a pod often is a few milliseconds earlier than its node.
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const LONGEST_BACKOFF: Duration = Duration::from_secs(10);
/// A pod that nothing has woken for this long is tried all the same.
pub(crate) const FORGOTTEN_AFTER: Duration = Duration::from_secs(300);

/// Something that may let a waiting pod fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wake {
    NodeAddedOrChanged,
    PodPlaced,
    PodGone,
    StorageChanged,
}

impl Wake {
    fn concerns(self, plugin: Plugin) -> bool {
        match (self, plugin) {
            (Self::NodeAddedOrChanged, _) | (_, Plugin::PodTopologySpread | Plugin::InterPodAffinity) => true,
            (Self::PodGone, Plugin::NodePorts | Plugin::NodeResourcesFit) => true,
            (Self::StorageChanged, Plugin::VolumeClaims | Plugin::VolumeBinding) => true,
            (Self::PodGone | Self::PodPlaced | Self::StorageChanged, _) => false,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Active(Reverse<i32>, u64),
    BackOff(Instant, u64),
    Unschedulable { since: Instant },
    Gated,
    Working,
}

struct Entry {
    pod: Arc<PodInfo>,
    place: Place,
    attempts: u32,
    last_attempt: Instant,
    plugins: HashSet<Plugin>,
    /// Something happened while the pod was worked on.
    woken: bool,
}

#[derive(Default)]
pub(crate) struct Queue {
    entries: HashMap<String, Entry>,
    active: BTreeMap<(Reverse<i32>, u64), String>,
    back_off: BTreeMap<(Instant, u64), String>,
    sequence: u64,
}

/// Whether a change of the pod may change where it fits.
fn matters(old: &PodInfo, new: &PodInfo) -> bool {
    old.gated != new.gated
        || old.labels != new.labels
        || old.requests != new.requests
        || old.tolerations != new.tolerations
        || old.node_selector != new.node_selector
        || old.required_nodes != new.required_nodes
        || old.priority != new.priority
}

impl Queue {
    /// A waiting pod is new or has changed.
    pub fn upsert(&mut self, pod: Arc<PodInfo>, now: Instant) {
        let uid = pod.uid.clone();
        let gated = pod.gated;
        match self.entries.get_mut(&uid) {
            None => {
                let entry = Entry {
                    pod,
                    place: Place::Gated,
                    attempts: 0,
                    last_attempt: now,
                    plugins: HashSet::new(),
                    woken: false,
                };
                self.entries.insert(uid.clone(), entry);
                if !gated {
                    self.activate(&uid);
                }
            }
            Some(entry) => {
                let changed = matters(&entry.pod, &pod);
                entry.pod = pod;
                match entry.place {
                    Place::Working => entry.woken |= changed,
                    Place::Active(..) if changed => self.activate(&uid),
                    Place::Unschedulable { .. } | Place::Gated if changed && !gated => self.activate(&uid),
                    _ => {}
                }
            }
        }
    }

    fn detach(&mut self, uid: &str) {
        match self.entries.get(uid).map(|entry| entry.place) {
            Some(Place::Active(priority, sequence)) => drop(self.active.remove(&(priority, sequence))),
            Some(Place::BackOff(at, sequence)) => drop(self.back_off.remove(&(at, sequence))),
            _ => {}
        }
    }

    fn activate(&mut self, uid: &str) {
        self.detach(uid);
        self.sequence += 1;
        let Some(entry) = self.entries.get_mut(uid) else { return };
        let slot = (Reverse(entry.pod.priority), self.sequence);
        entry.place = Place::Active(slot.0, slot.1);
        self.active.insert(slot, uid.to_owned());
    }

    fn hold_back(&mut self, uid: &str, until: Instant) {
        self.detach(uid);
        self.sequence += 1;
        let Some(entry) = self.entries.get_mut(uid) else { return };
        entry.place = Place::BackOff(until, self.sequence);
        self.back_off.insert((until, self.sequence), uid.to_owned());
    }

    /// The pod has a node, or is gone.
    pub fn remove(&mut self, uid: &str) {
        self.detach(uid);
        self.entries.remove(uid);
    }

    /// The most important pod, and of those the one that waits longest; it is Working until one of
    /// [`Queue::remove`], [`Queue::failed`] and [`Queue::unschedulable`].
    pub fn pop(&mut self, now: Instant) -> Option<Arc<PodInfo>> {
        let (_, uid) = self.active.pop_first()?;
        let entry = self.entries.get_mut(&uid)?;
        entry.place = Place::Working;
        entry.attempts += 1;
        entry.last_attempt = now;
        entry.woken = false;
        Some(entry.pod.clone())
    }

    /// The attempt failed for reasons that have nothing to do with the pod.
    pub fn failed(&mut self, uid: &str, now: Instant) {
        let Some(entry) = self.entries.get(uid) else { return };
        let until = now + backoff(entry.attempts);
        self.hold_back(uid, until);
    }

    /// No node fits; these plugins said so (none of them if there is no node at all).
    pub fn unschedulable(&mut self, uid: &str, plugins: HashSet<Plugin>, now: Instant) {
        let Some(entry) = self.entries.get_mut(uid) else { return };
        entry.plugins = plugins;
        if entry.woken {
            return self.failed(uid, now);
        }
        entry.place = Place::Unschedulable { since: now };
    }

    /// Something happened: pods that it concerns are tried again, at once or when their back-off is over.
    pub fn wake(&mut self, wake: Wake, now: Instant) {
        let concerned = |entry: &Entry| entry.plugins.is_empty() || entry.plugins.iter().any(|p| wake.concerns(*p));
        let woken: Vec<String> = self
            .entries
            .iter()
            .filter(|(_, entry)| matches!(entry.place, Place::Unschedulable { .. }) && concerned(entry))
            .map(|(uid, _)| uid.clone())
            .collect();
        for uid in woken {
            self.release(&uid, now);
        }
    }

    fn release(&mut self, uid: &str, now: Instant) {
        let Some(entry) = self.entries.get(uid) else { return };
        let until = entry.last_attempt + backoff(entry.attempts);
        if until <= now { self.activate(uid) } else { self.hold_back(uid, until) }
    }

    /// Lets go of pods whose back-off is over, and of those that were forgotten.
    pub fn advance(&mut self, now: Instant) {
        while let Some((slot, uid)) = self.back_off.pop_first() {
            if slot.0 > now {
                self.back_off.insert(slot, uid);
                break;
            }
            self.activate(&uid);
        }
        let forgotten =
            |place: Place| matches!(place, Place::Unschedulable { since } if since + FORGOTTEN_AFTER <= now);
        let forgotten: Vec<String> =
            self.entries.iter().filter(|(_, entry)| forgotten(entry.place)).map(|(uid, _)| uid.clone()).collect();
        forgotten.iter().for_each(|uid| self.activate(uid));
    }

    /// When [`Queue::advance`] has something to do.
    pub fn next_time(&self) -> Option<Instant> {
        let forgotten = self.entries.values().filter_map(|entry| match entry.place {
            Place::Unschedulable { since } => Some(since + FORGOTTEN_AFTER),
            _ => None,
        });
        self.back_off.keys().next().map(|(at, _)| *at).into_iter().chain(forgotten.min()).min()
    }

    pub fn has_active(&self) -> bool {
        !self.active.is_empty()
    }
}

fn backoff(attempts: u32) -> Duration {
    FIRST_BACKOFF.saturating_mul(1 << attempts.saturating_sub(1).min(10)).min(LONGEST_BACKOFF)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::tests::{cpu, pod};
    use serde_json::json;

    fn with_priority(name: &str, priority: i32) -> Arc<PodInfo> {
        pod(name, json!({"spec": {"priority": priority}}))
    }

    fn pop(queue: &mut Queue) -> Option<String> {
        queue.pop(Instant::now()).map(|pod| pod.key.name.clone())
    }

    #[tokio::test(start_paused = true)]
    async fn important_pods_go_first_and_equals_in_order() {
        let mut queue = Queue::default();
        for (name, priority) in [("a", 0), ("b", 10), ("c", 0), ("d", 10)] {
            queue.upsert(with_priority(name, priority), Instant::now());
        }
        let order: Vec<_> = std::iter::from_fn(|| pop(&mut queue)).collect();
        assert_eq!(order, ["b", "d", "a", "c"]);
    }

    #[tokio::test(start_paused = true)]
    async fn only_events_that_matter_wake_a_pod_and_not_before_its_backoff() {
        let mut queue = Queue::default();
        queue.upsert(pod("p", cpu("1")), Instant::now());
        pop(&mut queue);
        queue.unschedulable("p", HashSet::from([Plugin::NodeResourcesFit]), Instant::now());
        queue.wake(Wake::PodPlaced, Instant::now());
        assert_eq!(queue.next_time().unwrap() - Instant::now(), FORGOTTEN_AFTER, "still asleep");
        queue.wake(Wake::PodGone, Instant::now());
        assert!(!queue.has_active());
        assert_eq!(queue.next_time().unwrap() - Instant::now(), FIRST_BACKOFF);
        tokio::time::advance(FIRST_BACKOFF).await;
        queue.advance(Instant::now());
        assert_eq!(pop(&mut queue).as_deref(), Some("p"));
        queue.unschedulable("p", HashSet::from([Plugin::NodeResourcesFit]), Instant::now());
        tokio::time::advance(Duration::from_secs(30)).await;
        queue.wake(Wake::NodeAddedOrChanged, Instant::now());
        assert!(queue.has_active(), "the back-off was over");
    }

    #[tokio::test(start_paused = true)]
    async fn the_schedulers_own_status_update_does_not_wake_the_pod_but_a_change_does() {
        let mut queue = Queue::default();
        queue.upsert(pod("p", cpu("1")), Instant::now());
        pop(&mut queue);
        queue.unschedulable("p", HashSet::from([Plugin::NodeResourcesFit]), Instant::now());
        let mut said = cpu("1");
        said["status"] = json!({"conditions": [{"type": "PodScheduled", "status": "False"}]});
        queue.upsert(pod("p", said), Instant::now());
        assert!(!queue.has_active());
        queue.upsert(pod("p", cpu("500m")), Instant::now());
        assert!(queue.has_active());
    }

    #[tokio::test(start_paused = true)]
    async fn gated_pods_wait_for_their_gates() {
        let mut queue = Queue::default();
        queue.upsert(pod("p", json!({"spec": {"schedulingGates": [{"name": "g"}]}})), Instant::now());
        assert!(!queue.has_active());
        queue.upsert(pod("p", json!({})), Instant::now());
        assert_eq!(pop(&mut queue).as_deref(), Some("p"));
    }

    #[tokio::test(start_paused = true)]
    async fn backoff_doubles_up_to_ten_seconds_and_forgotten_pods_are_tried_again() {
        let backoffs = [1, 2, 3, 7, 8, 50].map(|attempts| backoff(attempts).as_millis());
        assert_eq!(backoffs, [100, 200, 400, 6400, 10_000, 10_000]);
        let mut queue = Queue::default();
        queue.upsert(pod("p", json!({})), Instant::now());
        pop(&mut queue);
        queue.unschedulable("p", HashSet::from([Plugin::NodeAffinity]), Instant::now());
        tokio::time::advance(FORGOTTEN_AFTER).await;
        queue.advance(Instant::now());
        assert!(queue.has_active());
    }
}
