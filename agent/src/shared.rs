//! What every part of the agent works with, and what the parts know of each other's pods.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use k8s_openapi::api::core::v1::{Node, Pod, PodStatus};
use oarlock_probes::ProbeManager;
use oarlock_volumes::{Allocatable, PodFacts, VolumeManager};
use parking_lot::{Mutex, RwLock};
use tokio::sync::{Notify, Semaphore};

use crate::Config;
use crate::assignment::Assignments;
use crate::cgroups::PodCgroups;
use crate::cri::Runtime;
use crate::eviction::Pressure;
use crate::metrics::Histogram;
use crate::model::{Observed, PodUid};
use crate::node::capacity::Capacity;
use crate::objects::Objects;
use crate::pull_credentials::Providers;
use crate::recorder::Recorder;
use crate::spec;
use crate::spec::resources::{NodeLimits, Swap};
use crate::users::UserRanges;
use crate::watched::Watched;

/// Bounds of how long pods take to run.
pub(crate) const POD_START_SECONDS: [f64; 25] = [
    0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 20.0, 30.0, 45.0, 60.0, 120.0, 180.0, 240.0, 300.0, 360.0, 480.0,
    600.0, 900.0, 1200.0, 1800.0, 2700.0, 3600.0,
];

/// What every part of the agent works with.
pub(crate) struct Shared {
    pub config: Config,
    pub client: kube::Client,
    pub runtime: Runtime,
    pub volumes: VolumeManager,
    pub storage: Arc<oarlock_csi::Storage>,
    pub probes: ProbeManager,
    pub recorder: Recorder,
    pub objects: Arc<Objects>,
    pub watched: Arc<Watched>,
    pub cgroups: ArcSwap<PodCgroups>,
    pub capacity: Capacity,
    /// What containers may use of swap.
    pub swap: Swap,
    pub assignments: Assignments,
    pub users: Arc<UserRanges>,
    pub table: PodTable,
    /// `<runtime>://`, before container ids.
    pub id_scheme: ArcSwap<String>,
    /// The node object as the API has it.
    pub node: ArcSwap<Node>,
    /// Whether the runtime was reached when last tried.
    pub runtime_ok: AtomicBool,
    /// Image pulls under way.
    pub pulls: Semaphore,
    /// Programs that know credentials of registries.
    pub pull_credentials: Providers,
    /// The machine is going down.
    pub shutting_down: AtomicBool,
    /// What the node is short of.
    pub pressure: Mutex<Pressure>,
    /// Something that the node's status shows has changed.
    pub node_changed: Notify,
    /// The API has taken the node's status.
    pub node_told: Notify,
    /// Seconds from a pod's coming to its running.
    pub pod_starts: Mutex<Histogram>,
}

impl Shared {
    /// The node's address, and that of the other family if it has one.
    pub(crate) fn host_ips(&self) -> Vec<String> {
        [self.config.node_ip].into_iter().chain(self.config.second_node_ip).map(|ip| ip.to_string()).collect()
    }

    /// `<pods>/<uid>`.
    pub(crate) fn pod_dir(&self, uid: &str) -> PathBuf {
        self.config.pods_root().join(uid)
    }

    /// `<namespace>_<name>_<uid>` under the logs' root.
    pub(crate) fn log_dir(&self, pod: &Pod) -> PathBuf {
        let name = format!("{}_{}_{}", spec::pod_namespace(pod), spec::pod_name(pod), spec::pod_uid(pod));
        self.config.pod_logs_dir.join(name)
    }

    pub(crate) fn pod_facts(&self, pod_ip: Option<&str>) -> PodFacts {
        let milli = |name: &str| self.capacity.allocatable.get(name).copied().unwrap_or(0).max(0) as u64;
        PodFacts {
            node_name: self.config.node_name.clone(),
            host_ip: Some(self.config.node_ip),
            pod_ip: pod_ip.and_then(|ip| ip.parse().ok()),
            allocatable: Allocatable {
                cpu_millis: milli("cpu"),
                memory_bytes: milli("memory") / 1000,
                ephemeral_storage_bytes: milli("ephemeral-storage") / 1000,
            },
        }
    }

    /// What of the node bears on a container's cgroup values.
    pub(crate) fn node_limits(&self) -> NodeLimits {
        NodeLimits {
            memory_bytes: self.capacity.memory_bytes(),
            cpu_period_us: self.cgroups.load().cpu_period_us,
            swap: self.swap,
        }
    }

    pub(crate) fn pressure(&self) -> Pressure {
        *self.pressure.lock()
    }

    /// Notes what the node is short of, and has its status told when that is new.
    pub(crate) fn set_pressure(&self, pressure: Pressure) {
        let before = std::mem::replace(&mut *self.pressure.lock(), pressure);
        if before != pressure {
            tracing::info!(?pressure, "what the node is short of has changed");
            self.node_changed.notify_one();
        }
    }

    pub(crate) fn runtime_ok(&self) -> bool {
        self.runtime_ok.load(Ordering::Relaxed)
    }
}

/// A pod as its worker last saw it.
#[derive(Clone)]
pub(crate) struct PodEntry {
    pub pod: Arc<Pod>,
    pub status: Arc<PodStatus>,
    pub observed: Arc<Observed>,
    /// Whether the API has the status.
    pub told: bool,
}

impl PodEntry {
    /// The pod with the status that the agent gives it.
    pub(crate) fn with_status(&self) -> Pod {
        let mut pod = (*self.pod).clone();
        pod.status = Some((*self.status).clone());
        pod
    }
}

/// The pods that have a worker, for those who only read.
#[derive(Default)]
pub(crate) struct PodTable {
    pods: RwLock<HashMap<PodUid, PodEntry>>,
    changed: Notify,
}

impl PodTable {
    pub(crate) fn set(&self, uid: &PodUid, entry: PodEntry) {
        self.pods.write().insert(uid.clone(), entry);
        self.changed.notify_waiters();
    }

    pub(crate) fn remove(&self, uid: &PodUid) {
        self.pods.write().remove(uid);
        self.changed.notify_waiters();
    }

    pub(crate) fn get(&self, uid: &PodUid) -> Option<PodEntry> {
        self.pods.read().get(uid).cloned()
    }

    pub(crate) fn all(&self) -> Vec<PodEntry> {
        self.pods.read().values().cloned().collect()
    }

    /// Waits until the table satisfies `wanted`, but no longer than `limit`; gives whether it does.
    pub(crate) async fn wait_for(&self, limit: Duration, wanted: impl Fn(&PodTable) -> bool) -> bool {
        let satisfied = async {
            loop {
                let changed = self.changed.notified();
                if wanted(self) {
                    return;
                }
                changed.await;
            }
        };
        tokio::time::timeout(limit, satisfied).await.is_ok()
    }

    /// By name; of several with one name, the one that was made last.
    pub(crate) fn find(&self, namespace: &str, name: &str) -> Option<PodEntry> {
        let pods = self.pods.read();
        let named = pods
            .values()
            .filter(|entry| spec::pod_namespace(&entry.pod) == namespace && spec::pod_name(&entry.pod) == name);
        named.max_by_key(|entry| entry.pod.metadata.creation_timestamp.as_ref().map(|at| at.0)).cloned()
    }
}
