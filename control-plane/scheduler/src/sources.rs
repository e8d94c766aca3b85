//! The watches that feed the scheduler. Each turns a stream of objects, relists included, into plain events.

use std::collections::HashSet;
use std::fmt::Debug;
use std::sync::Arc;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{Namespace, Node, PersistentVolume, PersistentVolumeClaim, Pod};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::storage::v1::{CSIDriver, CSIStorageCapacity, StorageClass};
use kube::runtime::watcher;
use kube::{Api, Client, Resource, ResourceExt};
use oarlock_machinery::informer::Backoff;
use oarlock_machinery::{Key, Selector};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::pod::PodInfo;
use crate::preempt::Budget;
use crate::terms::Labels;

/// A waiting or running pod.
#[derive(Debug)]
pub(crate) struct SeenPod {
    /// `None` if it has ended.
    pub info: Option<Arc<PodInfo>>,
    pub uid: String,
    pub scheduler_name: String,
    /// Reason and message of PodScheduled while it is False.
    pub said: Option<(String, String)>,
}

#[derive(Debug)]
pub(crate) enum Event {
    Pod(Box<SeenPod>),
    PodGone(String),
    Node(Box<Node>),
    NodeGone(String),
    Namespace(String, Labels),
    NamespaceGone(String),
    Budget(String, Box<Budget>),
    BudgetGone(String),
    Claim(Box<PersistentVolumeClaim>),
    ClaimGone(Key),
    Volume(String, Box<PersistentVolume>),
    VolumeGone(String),
    Class(String, Box<StorageClass>),
    ClassGone(String),
    Driver(String, Box<CSIDriver>),
    DriverGone(String),
    Room(Box<CSIStorageCapacity>),
    RoomGone(Key),
    /// The first list of a kind is complete.
    Listed(&'static str),
}

/// A kind that is watched.
struct Source<K> {
    kind: &'static str,
    identify: fn(&K) -> String,
    seen: fn(K) -> Event,
    gone: fn(String) -> Event,
}

const PODS: &str = "pods";
const NODES: &str = "nodes";
const CLAIMS: &str = "persistentvolumeclaims";
const VOLUMES: &str = "persistentvolumes";
const CLASSES: &str = "storageclasses";
const DRIVERS: &str = "csidrivers";
const ROOMS: &str = "csistoragecapacities";
/// What must be known whole before anything is decided.
pub(crate) const NEEDED: [&str; 7] = [PODS, NODES, CLAIMS, VOLUMES, CLASSES, DRIVERS, ROOMS];

/// Runs all watches until `stop`; ends earlier only if nobody listens.
pub(crate) async fn run(client: Client, events: mpsc::Sender<Event>, stop: CancellationToken) {
    let pods = Source::<Pod> {
        kind: PODS,
        identify: |pod| pod.uid().unwrap_or_default(),
        seen: |pod| Event::Pod(Box::new(seen(&pod))),
        gone: Event::PodGone,
    };
    let nodes = Source::<Node> {
        kind: NODES,
        identify: |node| node.name_any(),
        seen: |node| Event::Node(Box::new(node)),
        gone: Event::NodeGone,
    };
    let namespaces = Source::<Namespace> {
        kind: "namespaces",
        identify: |namespace| namespace.name_any(),
        seen: |namespace| Event::Namespace(namespace.name_any(), namespace.labels().clone()),
        gone: Event::NamespaceGone,
    };
    let budgets = Source::<PodDisruptionBudget> {
        kind: "poddisruptionbudgets",
        identify: |budget| budget.uid().unwrap_or_default(),
        seen: |budget| Event::Budget(budget.uid().unwrap_or_default(), Box::new(self::budget(&budget))),
        gone: Event::BudgetGone,
    };
    let claims = Source::<PersistentVolumeClaim> {
        kind: CLAIMS,
        identify: |claim| Key::of(claim).to_string(),
        seen: |claim| Event::Claim(Box::new(claim)),
        gone: |id| Event::ClaimGone(key(&id)),
    };
    let volumes = Source::<PersistentVolume> {
        kind: VOLUMES,
        identify: |volume| volume.name_any(),
        seen: |volume| Event::Volume(volume.name_any(), Box::new(volume)),
        gone: Event::VolumeGone,
    };
    let classes = Source::<StorageClass> {
        kind: CLASSES,
        identify: |class| class.name_any(),
        seen: |class| Event::Class(class.name_any(), Box::new(class)),
        gone: Event::ClassGone,
    };
    let drivers = Source::<CSIDriver> {
        kind: DRIVERS,
        identify: |driver| driver.name_any(),
        seen: |driver| Event::Driver(driver.name_any(), Box::new(driver)),
        gone: Event::DriverGone,
    };
    let rooms = Source::<CSIStorageCapacity> {
        kind: ROOMS,
        identify: |room| Key::of(room).to_string(),
        seen: |room| Event::Room(Box::new(room)),
        gone: |id| Event::RoomGone(key(&id)),
    };
    let all = || (client.clone(), events.clone(), stop.clone());
    let ((c1, e1, s1), (c2, e2, s2), (c3, e3, s3), (c4, e4, s4)) = (all(), all(), all(), all());
    let ((c5, e5, s5), (c6, e6, s6), (c7, e7, s7)) = (all(), all(), all());
    let ((c8, e8, s8), (c9, e9, s9)) = (all(), all());
    tokio::join!(
        pods.run(c1, e1, s1),
        nodes.run(c2, e2, s2),
        namespaces.run(c3, e3, s3),
        budgets.run(c4, e4, s4),
        claims.run(c5, e5, s5),
        volumes.run(c6, e6, s6),
        classes.run(c7, e7, s7),
        drivers.run(c8, e8, s8),
        rooms.run(c9, e9, s9),
    );
}

/// Namespace and name with a slash between them.
fn key(id: &str) -> Key {
    let (namespace, name) = id.split_once('/').unwrap_or(("", id));
    Key::new(namespace, name)
}

fn seen(pod: &Pod) -> SeenPod {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let mut waiting = conditions.filter(|condition| condition.type_ == "PodScheduled" && condition.status == "False");
    let said = waiting
        .next()
        .map(|condition| (condition.reason.clone().unwrap_or_default(), condition.message.clone().unwrap_or_default()));
    let spec = pod.spec.as_ref();
    SeenPod {
        info: PodInfo::compile(pod),
        uid: pod.uid().unwrap_or_default(),
        scheduler_name: spec
            .and_then(|spec| spec.scheduler_name.clone())
            .unwrap_or_else(|| "default-scheduler".to_owned()),
        said,
    }
}

fn budget(budget: &PodDisruptionBudget) -> Budget {
    let selector = budget.spec.as_ref().and_then(|spec| spec.selector.as_ref());
    let status = budget.status.as_ref();
    Budget {
        namespace: budget.namespace().unwrap_or_default(),
        selector: Selector::compile(selector).unwrap_or(Selector::nothing()),
        allowed: status.and_then(|status| status.disruptions_allowed).unwrap_or(0),
        pending: status
            .and_then(|status| status.disrupted_pods.as_ref())
            .into_iter()
            .flatten()
            .map(|(name, _)| name.clone())
            .collect(),
    }
}

impl<K> Source<K>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
{
    async fn run(self, client: Client, sender: mpsc::Sender<Event>, stop: CancellationToken) {
        let mut events = Box::pin(watcher(Api::<K>::all(client), watcher::Config::default()));
        let mut known: HashSet<String> = HashSet::new();
        let mut listed: HashSet<String> = HashSet::new();
        let mut pause = Backoff::default();
        loop {
            let event = tokio::select! {
                () = stop.cancelled() => return,
                event = events.next() => event,
            };
            let mut out: Vec<Event> = Vec::new();
            match event {
                None => return,
                Some(Err(error)) => {
                    let delay = pause.next_delay();
                    tracing::debug!(kind = self.kind, %error, ?delay, "watch interrupted");
                    tokio::select! {
                        () = stop.cancelled() => return,
                        () = tokio::time::sleep(delay) => continue,
                    }
                }
                Some(Ok(watcher::Event::Init)) => {
                    // It begins each attempt, also one that fails.
                    listed.clear();
                    continue;
                }
                Some(Ok(watcher::Event::InitApply(object))) => {
                    listed.insert((self.identify)(&object));
                    out.push((self.seen)(object));
                }
                Some(Ok(watcher::Event::InitDone)) => {
                    out.extend(known.difference(&listed).cloned().map(self.gone));
                    known = std::mem::take(&mut listed);
                    out.push(Event::Listed(self.kind));
                }
                Some(Ok(watcher::Event::Apply(object))) => {
                    known.insert((self.identify)(&object));
                    out.push((self.seen)(object));
                }
                Some(Ok(watcher::Event::Delete(object))) => {
                    let id = (self.identify)(&object);
                    known.remove(&id);
                    out.push((self.gone)(id));
                }
            }
            pause = Backoff::default();
            for event in out {
                if sender.send(event).await.is_err() {
                    return;
                }
            }
        }
    }
}
