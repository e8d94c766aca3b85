//! The owner task: takes events in, schedules one pod after the other, and sends bindings and explanations out.

mod reserve;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Binding, ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, Client};
use oarlock_machinery::{ApiError, EventType, Recorder, call};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::cache::Cache;
use crate::cycle::{Decision, Nominated, decide, explain};
use crate::filter::Plugin;
use crate::pod::PodInfo;
use crate::preempt::{self, Budget, Candidate};
use crate::queue::{Queue, Wake};
use crate::sources::{self, Event, SeenPod};
use crate::storage::{Choice, Written};
use crate::{Config, Error, message};

use self::reserve::Reservation;

/// Events that wait to be taken in.
const EVENT_LIMIT: usize = 1024;
/// Bindings and explanations under way.
const EFFECT_LIMIT: usize = 256;

/// What came of something that was sent.
enum Effect {
    Bound {
        pod: Arc<PodInfo>,
        node: String,
        result: Result<(), ApiError>,
    },
    /// What its claims need was written.
    Reserved {
        pod: Arc<PodInfo>,
        choice: Choice,
        result: Result<Written, ApiError>,
    },
    Other,
}

struct Owner {
    client: Client,
    config: Config,
    recorder: Recorder,
    cache: Cache,
    queue: Queue,
    nominated: Nominated,
    budgets: HashMap<String, Budget>,
    /// What waiting pods say already, so that it is not said again.
    said: HashMap<String, (String, String)>,
    effects: JoinSet<Effect>,
    /// Pods with a node whose claims do not have their volumes yet, by uid.
    reservations: HashMap<String, Reservation>,
    listed: HashSet<&'static str>,
    next_node: usize,
}

pub(crate) async fn run(client: Client, config: Config, shutdown: CancellationToken) -> Result<(), Error> {
    // The component's name is a label in events; there are as many as there are schedulers configured: one.
    let (recorder, writer) = Recorder::new(client.clone(), "default-scheduler");
    let stop = shutdown.child_token();
    let _stop_on_return = stop.clone().drop_guard();
    let (sender, receiver) = mpsc::channel(EVENT_LIMIT);
    let mut tasks: JoinSet<&'static str> = JoinSet::new();
    let (watching, writing) = (sources::run(client.clone(), sender, stop.clone()), writer.run(stop.clone()));
    tasks.spawn(async move {
        watching.await;
        "watches"
    });
    tasks.spawn(async move {
        writing.await;
        "events"
    });
    let owner = Owner {
        client,
        config,
        recorder,
        cache: Cache::default(),
        queue: Queue::default(),
        nominated: Nominated::new(),
        budgets: HashMap::new(),
        said: HashMap::new(),
        effects: JoinSet::new(),
        reservations: HashMap::new(),
        listed: HashSet::new(),
        next_node: 0,
    };
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = owner.run(receiver) => {}
        ended = tasks.join_next() => if !shutdown.is_cancelled() {
            let task = ended.and_then(Result::ok).unwrap_or("panicked");
            return Err(Error::TaskEnded { task });
        }
    }
    stop.cancel();
    while tasks.join_next().await.is_some() {}
    Ok(())
}

impl Owner {
    async fn run(mut self, mut events: mpsc::Receiver<Event>) {
        loop {
            // Everything that has happened is taken in before the next decision.
            while let Ok(event) = events.try_recv() {
                self.take_in(event);
            }
            while let Some(effect) = self.effects.try_join_next() {
                self.settle(effect);
            }
            self.queue.advance(Instant::now());
            self.give_up_late(Instant::now());
            if self.is_ready()
                && self.effects.len() < EFFECT_LIMIT
                && let Some(pod) = self.queue.pop(Instant::now())
            {
                self.schedule(&pod);
                // Bindings just sent get their turn on this thread too.
                tokio::task::yield_now().await;
                continue;
            }
            let wake_at = self.queue.next_time().unwrap_or_else(|| Instant::now() + crate::queue::FORGOTTEN_AFTER);
            let wake_at = self.reservations.values().map(|one| one.deadline).fold(wake_at, Instant::min);
            tokio::select! {
                event = events.recv() => match event {
                    Some(event) => self.take_in(event),
                    None => return,
                },
                Some(effect) = self.effects.join_next() => self.settle(effect),
                () = tokio::time::sleep_until(wake_at) => {}
            }
        }
    }

    /// Decisions on half a list would be wrong.
    fn is_ready(&self) -> bool {
        sources::NEEDED.iter().all(|kind| self.listed.contains(kind)) && self.queue.has_active()
    }

    fn take_in(&mut self, event: Event) {
        let now = Instant::now();
        match event {
            Event::Pod(seen) => self.take_in_pod(*seen, now),
            Event::PodGone(uid) => self.pod_gone(&uid, now),
            Event::Node(node) => {
                if self.cache.update_node(&node) {
                    self.queue.wake(Wake::NodeAddedOrChanged, now);
                }
            }
            Event::NodeGone(name) => self.cache.remove_node(&name),
            Event::Namespace(name, labels) => drop(self.cache.namespaces.insert(name, labels)),
            Event::NamespaceGone(name) => drop(self.cache.namespaces.remove(&name)),
            Event::Budget(uid, budget) => drop(self.budgets.insert(uid, *budget)),
            Event::BudgetGone(uid) => drop(self.budgets.remove(&uid)),
            Event::Listed(kind) => drop(self.listed.insert(kind)),
            of_storage => self.take_in_storage(of_storage, now),
        }
    }

    fn take_in_storage(&mut self, event: Event, now: Instant) {
        let storage = &mut self.cache.storage;
        match event {
            Event::Claim(claim) => storage.put_claim(*claim),
            Event::ClaimGone(key) => storage.remove_claim(&key),
            Event::Volume(name, volume) => storage.put_volume(name, *volume),
            Event::VolumeGone(name) => storage.remove_volume(&name),
            Event::Class(name, class) => storage.put_class(name, *class),
            Event::ClassGone(name) => storage.remove_class(&name),
            Event::Driver(name, driver) => storage.put_driver(name, &driver),
            Event::DriverGone(name) => storage.remove_driver(&name),
            Event::Room(room) => storage.put_room(&room),
            Event::RoomGone(key) => storage.remove_room(&key),
            _ => return,
        }
        self.queue.wake(Wake::StorageChanged, now);
        self.follow_reservations(now);
    }

    fn pod_gone(&mut self, uid: &str, now: Instant) {
        if let Some(reservation) = self.reservations.remove(uid) {
            self.take_back(&reservation.choice, now);
        }
        self.queue.remove(uid);
        self.said.remove(uid);
        let was_promised = self.nominated.remove(uid).is_some();
        if self.cache.remove(uid) || was_promised {
            self.queue.wake(Wake::PodGone, now);
        }
    }

    fn take_in_pod(&mut self, seen: SeenPod, now: Instant) {
        let Some(pod) = seen.info else { return self.pod_gone(&seen.uid, now) };
        if !pod.node_name.is_empty() {
            if let Some(reservation) = self.reservations.remove(&pod.uid) {
                self.cache.storage.take_back(&reservation.choice);
            }
            self.queue.remove(&pod.uid);
            self.nominated.remove(&pod.uid);
            self.said.remove(&pod.uid);
            let node = self.cache.node(&pod.node_name);
            let is_new = node.is_none_or(|node| !node.pods.contains_key(&pod.uid)) || self.cache.is_assumed(&pod.uid);
            self.cache.put(pod);
            if is_new {
                self.queue.wake(Wake::PodPlaced, now);
            }
            return;
        }
        if seen.scheduler_name != self.config.scheduler_name {
            return;
        }
        if pod.terminating {
            return self.pod_gone(&pod.uid, now);
        }
        match seen.said {
            Some(said) => drop(self.said.insert(pod.uid.clone(), said)),
            None => drop(self.said.remove(&pod.uid)),
        }
        if let Some(node) = &pod.nominated_node {
            self.nominated.insert(pod.uid.clone(), (node.clone(), pod.clone()));
        }
        if pod.gated {
            self.explain(&pod, "SchedulingGated", "Scheduling is blocked due to non-empty scheduling gates", None);
        }
        if !self.cache.is_assumed(&pod.uid) {
            self.queue.upsert(pod, now);
        }
    }

    fn schedule(&mut self, pod: &Arc<PodInfo>) {
        match decide(pod, &self.cache, &self.nominated, &mut self.next_node) {
            Decision::Node(node) => {
                self.cache.assume(pod, &node);
                match self.choose_volumes(pod, &node) {
                    Some(choice) => self.reserve(pod, choice),
                    None => self.bind(pod.clone(), node),
                }
            }
            Decision::Nowhere(refusals) => {
                let budgets: Vec<Budget> = self.budgets.values().cloned().collect();
                let unavailable = explain(&refusals);
                let plan = preempt::plan(pod, &self.cache, &refusals, &budgets, &self.nominated);
                let plugins: HashSet<Plugin> = refusals.iter().map(|(_, refusal)| refusal.plugin).collect();
                self.queue.unschedulable(&pod.uid, plugins, Instant::now());
                let (text, nominated) = match plan {
                    Ok(candidate) => {
                        let node = candidate.node.clone();
                        self.preempt(pod, candidate);
                        (unavailable, Some(node))
                    }
                    Err(why) => (message::unschedulable(&unavailable, &why), None),
                };
                self.recorder.event_about(reference(pod), EventType::Warning, "FailedScheduling", text.clone());
                self.explain(pod, "Unschedulable", &text, nominated);
            }
        }
    }

    /// Writes the PodScheduled condition, unless it says so already.
    fn explain(&mut self, pod: &Arc<PodInfo>, reason: &str, text: &str, nominated: Option<String>) {
        let said = (reason.to_owned(), text.to_owned());
        if self.said.get(&pod.uid) == Some(&said) && nominated.is_none() {
            return;
        }
        self.said.insert(pod.uid.clone(), said);
        let mut status = json!({"conditions": [{
            "type": "PodScheduled", "status": "False", "reason": reason, "message": text,
            "lastTransitionTime": Time(Timestamp::now()),
        }]});
        if let Some(node) = nominated {
            status["nominatedNodeName"] = json!(node);
        }
        let (client, pod) = (self.client.clone(), pod.clone());
        self.effects.spawn(async move {
            if let Err(error) = patch_status(&client, &pod, status).await
                && !error.is_not_found()
            {
                tracing::debug!(pod = %pod.key, cause = %error.user_message(), "condition not written");
            }
            Effect::Other
        });
    }

    fn preempt(&mut self, pod: &Arc<PodInfo>, candidate: Candidate) {
        self.nominated.insert(pod.uid.clone(), (candidate.node.clone(), pod.clone()));
        for victim in candidate.victims {
            let text = format!("Preempted by pod {} on node {}", pod.uid, candidate.node);
            self.recorder.event_about(reference(&victim), EventType::Normal, "Preempted", text);
            let (client, preemptor) = (self.client.clone(), pod.key.to_string());
            self.effects.spawn(async move {
                if let Err(error) = evict(&client, &victim).await {
                    tracing::warn!(pod = %preemptor, victim = %victim.key, cause = %error.user_message(), "preemption failed");
                }
                Effect::Other
            });
        }
    }

    /// Tells the API which node the pod has; its volumes are there.
    pub(super) fn bind(&mut self, pod: Arc<PodInfo>, node: String) {
        let client = self.client.clone();
        self.effects.spawn(async move {
            let result = bind(client, &pod, &node).await;
            Effect::Bound { pod, node, result }
        });
    }

    fn settle(&mut self, effect: Result<Effect, tokio::task::JoinError>) {
        let (pod, node, result) = match effect {
            Ok(Effect::Bound { pod, node, result }) => (pod, node, result),
            Ok(Effect::Reserved { pod, choice, result }) => return self.reserved(pod, choice, result),
            Ok(Effect::Other) | Err(_) => return,
        };
        match result {
            Ok(()) => {
                let text = format!("Successfully assigned {} to {node}", pod.key);
                self.recorder.event_about(reference(&pod), EventType::Normal, "Scheduled", text);
                self.queue.remove(&pod.uid);
                self.nominated.remove(&pod.uid);
            }
            Err(error) if error.is_not_found() => {
                self.cache.forget_assumed(&pod.uid);
                self.queue.remove(&pod.uid);
            }
            Err(error) => {
                tracing::debug!(pod = %pod.key, node, cause = %error.user_message(), "binding failed");
                self.not_bound(&pod, format!("binding rejected: {}", error.user_message()));
            }
        }
    }

    /// The pod did not get the node that it was given; it is tried again later.
    pub(super) fn not_bound(&mut self, pod: &PodInfo, text: String) {
        self.cache.forget_assumed(&pod.uid);
        self.recorder.event_about(reference(pod), EventType::Warning, "FailedScheduling", text);
        self.queue.failed(&pod.uid, Instant::now());
        // Others may have been refused because of this one.
        self.queue.wake(Wake::PodGone, Instant::now());
        self.queue.wake(Wake::StorageChanged, Instant::now());
    }
}

fn reference(pod: &PodInfo) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Pod".to_owned()),
        namespace: Some(pod.key.namespace.clone()),
        name: Some(pod.key.name.clone()),
        uid: Some(pod.uid.clone()),
        resource_version: Some(pod.version.clone()),
        field_path: None,
    }
}

async fn bind(client: Client, pod: &PodInfo, node: &str) -> Result<(), ApiError> {
    let api: Api<Pod> = Api::namespaced(client, &pod.key.namespace);
    let binding = Binding {
        metadata: ObjectMeta {
            name: Some(pod.key.name.clone()),
            namespace: Some(pod.key.namespace.clone()),
            uid: Some(pod.uid.clone()),
            ..Default::default()
        },
        target: ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Node".to_owned()),
            name: Some(node.to_owned()),
            ..Default::default()
        },
    };
    let parameters = PostParams::default();
    call("bind pod", api.create_subresource::<_, Value>("binding", &pod.key.name, &parameters, &binding))
        .await
        .map(drop)
}

/// Conditions are merged by type, so that those of others stay.
async fn patch_status(client: &Client, pod: &PodInfo, status: Value) -> Result<(), ApiError> {
    let api: Api<Pod> = Api::namespaced(client.clone(), &pod.key.namespace);
    let patch = Patch::Strategic(json!({"metadata": {"uid": pod.uid}, "status": status}));
    call("patch pod status", api.patch_status(&pod.key.name, &PatchParams::default(), &patch)).await.map(drop)
}

async fn evict(client: &Client, victim: &PodInfo) -> Result<(), ApiError> {
    let status = json!({"conditions": [{
        "type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler",
        "message": "default-scheduler: preempting to accommodate a higher priority pod",
        "lastTransitionTime": Time(Timestamp::now()),
    }]});
    match patch_status(client, victim, status).await {
        Err(error) if !(error.is_not_found() || error.is_conflict()) => return Err(error),
        _ => {}
    }
    let api: Api<Pod> = Api::namespaced(client.clone(), &victim.key.namespace);
    let preconditions = Preconditions { uid: Some(victim.uid.clone()), resource_version: None };
    let parameters = DeleteParams::default().preconditions(preconditions);
    match call("delete pod", api.delete(&victim.key.name, &parameters)).await {
        Err(error) if !(error.is_not_found() || error.is_conflict()) => Err(error),
        _ => Ok(()),
    }
}
