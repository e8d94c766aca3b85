//! All pods of the node: takes in what the sources, the runtime and the probes tell, keeps one worker for each pod UID, and
//! hands everything on to it. Decides only whether a pod is admitted, since that depends on all of them.
//!
//! A pod that the runtime has and no source knows is ended, but only once every source has been listed: while the API is
//! away, its containers are nobody's to touch.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Pod};
use oarlock_probes::Update;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::admission::{self, Refusal};
use crate::cri::{Found, found_pods};
use crate::model::PodUid;
use crate::preemption;
use crate::recorder::Level;
use crate::resize::{self, Pending};
use crate::shared::{PodEntry, PodTable, Shared};
use crate::spec::resources::{Amounts, Qos, pod_requests, qos_of};
use crate::spec::{self, names};
use crate::worker::{self, Event, Worker, unknown_pod};

/// How long a pod whose node's labels do not fit may hold up others.
const NODE_CALL: Duration = Duration::from_secs(2);

/// How long a pod that makes room may take beyond its grace, at the least.
const LEAST_OVERTIME: Duration = Duration::from_secs(10);

/// What the sources and the runtime tell.
#[derive(Debug)]
pub(crate) enum News {
    /// A source begins to tell everything that it has.
    SourceInit(Source),
    /// A source has this pod.
    Pod(Source, Arc<Pod>),
    /// A source has told everything.
    SourceReady(Source),
    /// A source has this pod no more.
    PodGone(Source, PodUid),
    /// Something happened to a pod in the runtime.
    Runtime(PodUid),
    /// Events of the runtime may have been missed.
    RuntimeAll,
    /// Something that the pod's volumes show has changed.
    ContentChanged(PodUid),
    /// The node needs this pod to end.
    End { uid: PodUid, reason: String, message: String, grace: Duration },
    /// Containers of pods that are over are to go.
    ReclaimDead,
    /// These pods have something in the runtime.
    RuntimeFound(Vec<Found>),
}

/// Where pods come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Source {
    Api,
    Files,
}

struct Known {
    mailbox: mpsc::Sender<Box<Event>>,
    /// As the source has it.
    desired: Arc<Pod>,
    /// With the resources that it has been given.
    pod: Arc<Pod>,
    source: Option<Source>,
    /// Counts towards what is taken of the node.
    admitted: bool,
    /// Its plugins are still being asked; it does not start before.
    admitting: bool,
}

/// The keeper of all workers.
pub(crate) struct Pods {
    shared: Arc<Shared>,
    known: HashMap<PodUid, Known>,
    workers: JoinSet<(PodUid, bool)>,
    /// Pods for which plugins are asked, and what came of it.
    admissions: JoinSet<(PodUid, Result<(), Refusal>)>,
    /// UIDs told since a source began.
    told: HashMap<Source, HashSet<PodUid>>,
    ready: HashSet<Source>,
    sources: HashSet<Source>,
    /// The CPU that burstable pods ask for, as their cgroup was last told.
    burstable_milli: i64,
    weights_stale: bool,
    /// Static pods that wait until the pod of their name that ran before is gone, the newest of each name.
    queued: HashMap<(String, String), Arc<Pod>>,
    shutdown: CancellationToken,
}

impl Pods {
    pub(crate) fn new(shared: Arc<Shared>, sources: HashSet<Source>, shutdown: CancellationToken) -> Self {
        Self {
            shared,
            known: HashMap::new(),
            workers: JoinSet::new(),
            admissions: JoinSet::new(),
            told: HashMap::new(),
            ready: HashSet::new(),
            sources,
            burstable_milli: -1,
            weights_stale: true,
            queued: HashMap::new(),
            shutdown,
        }
    }

    /// Runs until `shutdown`.
    pub(crate) async fn run(mut self, mut news: mpsc::Receiver<News>, mut probes: mpsc::Receiver<Update>) {
        loop {
            tokio::select! {
                () = self.shutdown.cancelled() => break,
                Some(news) = news.recv() => self.take(news).await,
                Some(update) = probes.recv() => {
                    let uid = PodUid::from(update.pod_uid.as_str());
                    self.send(&uid, Event::Probe(update)).await;
                }
                Some(ended) = self.workers.join_next(), if !self.workers.is_empty() => self.ended(ended).await,
                Some(Ok((uid, result))) = self.admissions.join_next(), if !self.admissions.is_empty() => {
                    self.admitted(&uid, result).await;
                }
            }
            if std::mem::take(&mut self.weights_stale) {
                self.allocate_waiting().await;
                self.weigh_burstable();
            }
        }
        while self.workers.join_next().await.is_some() {}
    }

    /// Keeps the weight of burstable pods among all at what they ask for.
    fn weigh_burstable(&mut self) {
        let admitted = self.known.values().filter(|known| known.admitted && qos_of(&known.pod) == Qos::Burstable);
        let requested = admitted.map(|known| pod_requests(&known.pod).get("cpu").copied().unwrap_or(0)).sum();
        if self.burstable_milli == requested {
            return;
        }
        self.burstable_milli = requested;
        let cgroups = self.shared.cgroups.load_full();
        tokio::task::spawn_blocking(move || {
            if let Err(error) = cgroups.weigh_burstable(requested) {
                tracing::debug!(%error, "the weight of burstable pods could not be set");
            }
        });
    }

    async fn ended(&mut self, ended: Result<(PodUid, bool), tokio::task::JoinError>) {
        match ended {
            Ok((uid, true)) => {
                self.weights_stale = true;
                let ended = self.known.remove(&uid);
                self.take_back();
                if let Some(next) = ended.and_then(|ended| self.queued.remove(&full_name(&ended.pod))) {
                    self.desired(Source::Files, next).await;
                }
            }
            Ok((_, false)) => {}
            Err(error) => {
                // A worker that broke must not leave its pod without an owner.
                tracing::error!(%error, "a pod worker broke; the agent ends to start afresh");
                self.shutdown.cancel();
            }
        }
    }

    async fn send(&self, uid: &PodUid, event: Event) {
        if let Some(known) = self.known.get(uid) {
            // A closed mailbox means that the worker has just ended.
            let _ = known.mailbox.send(Box::new(event)).await;
        }
    }

    async fn take(&mut self, news: News) {
        match news {
            News::SourceInit(source) => {
                self.told.insert(source, HashSet::new());
            }
            News::Pod(source, pod) => self.desired(source, pod).await,
            News::SourceReady(source) => self.source_ready(source).await,
            News::PodGone(source, uid) => {
                if self.known.get(&uid).is_some_and(|known| known.source == Some(source)) {
                    self.gone(&uid).await;
                }
            }
            News::Runtime(uid) => self.send(&uid, Event::RuntimeChanged).await,
            News::RuntimeAll => {
                let uids: Vec<PodUid> = self.known.keys().cloned().collect();
                for uid in uids {
                    self.send(&uid, Event::RuntimeChanged).await;
                }
            }
            News::ContentChanged(uid) => self.send(&uid, Event::ContentChanged).await,
            News::End { uid, reason, message, grace } => {
                if let Some(known) = self.known.get_mut(&uid) {
                    known.admitted = false;
                }
                self.send(&uid, Event::End { reason, message, grace }).await;
            }
            News::ReclaimDead => {
                let uids: Vec<PodUid> = self.known.keys().cloned().collect();
                for uid in uids {
                    self.send(&uid, Event::Reclaim).await;
                }
            }
            News::RuntimeFound(found) => self.end_unknown(found).await,
        }
    }

    async fn gone(&mut self, uid: &PodUid) {
        if let Some(known) = self.known.get_mut(uid) {
            known.source = None;
            known.admitted = false;
        }
        self.send(uid, Event::Gone).await;
    }

    async fn desired(&mut self, source: Source, pod: Arc<Pod>) {
        if spec::is_mirror(&pod) && source == Source::Api {
            self.mirror(pod).await;
            return;
        }
        let uid = PodUid::from(spec::pod_uid(&pod));
        if uid.as_str().is_empty() {
            return;
        }
        self.told.entry(source).or_default().insert(uid.clone());
        let name = full_name(&pod);
        if source == Source::Files
            && !self.known.contains_key(&uid)
            && self.known.values().any(|k| full_name(&k.pod) == name)
        {
            // A changed manifest is a new pod; it starts when the old one has let go of ports and files.
            self.queued.insert(name, pod);
            return;
        }
        let terminal = |pod: &Pod| {
            let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
            matches!(phase, Some("Succeeded" | "Failed"))
        };
        if let Some(known) = self.known.get_mut(&uid) {
            known.source = Some(source);
            known.desired = pod.clone();
            known.admitted &= !terminal(&pod);
            self.allocate(&uid).await;
            return;
        }
        // Taken up before the agent last started: judged then.
        let acknowledged = pod.status.as_ref().is_some_and(|status| status.start_time.is_some());
        let mut judged = if acknowledged || terminal(&pod) || pod.metadata.deletion_timestamp.is_some() {
            Ok(())
        } else {
            self.judge(&pod).await
        };
        let mut leaving = Vec::new();
        if let Some(found) = judged.as_ref().err().and_then(|refusal| self.room_for(&pod, &refusal.lacking)) {
            (judged, leaving) = (Ok(()), found);
        }
        let admitted = judged.is_ok() && !terminal(&pod);
        let asks = admitted && !acknowledged && self.shared.assignments.concerns(&pod);
        self.start_worker(uid.clone(), pod.clone(), Some(source), admitted);
        let limit = self.preempt(&leaving).await;
        if asks || !leaving.is_empty() {
            self.begin_admission(uid.clone(), pod, asks, leaving, limit);
        }
        self.allocate(&uid).await;
        if let Err(refusal) = judged {
            self.send(&uid, Event::Rejected { reason: refusal.reason, message: refusal.message }).await;
        }
    }

    /// Whether the pod may run here. Labels that were changed just before a pod came may not have been heard of yet.
    async fn judge(&self, pod: &Pod) -> Result<(), Refusal> {
        let judged = self.judge_on(pod, &self.shared.node.load());
        if judged.as_ref().is_err_and(|refusal| refusal.reason == admission::NODE_AFFINITY) {
            let nodes: kube::Api<Node> = kube::Api::all(self.shared.client.clone());
            let asked = tokio::time::timeout(NODE_CALL, nodes.get(&self.shared.config.node_name)).await;
            if let Ok(Ok(node)) = asked {
                return self.judge_on(pod, &node);
            }
        }
        judged
    }

    fn judge_on(&self, pod: &Pod, node: &Node) -> Result<(), Refusal> {
        let others: Vec<&Pod> = self.known.values().filter(|known| known.admitted).map(|k| &*k.pod).collect();
        let place = admission::Place {
            node,
            capacity: &self.shared.capacity,
            pressure: self.shared.pressure(),
            shutting_down: self.shared.shutting_down.load(Ordering::Relaxed),
            sysctls: &self.shared.config.allowed_sysctls,
        };
        admission::admit(pod, &place, &others)
    }

    /// The pods that go so that one that the node needs has room.
    fn room_for(&self, pod: &Pod, lacking: &Amounts) -> Option<Vec<PodUid>> {
        if lacking.is_empty() {
            return None;
        }
        let admitted = self.known.iter().filter(|(_, known)| known.admitted);
        let (uids, others): (Vec<&PodUid>, Vec<&Pod>) = admitted.map(|(uid, known)| (uid, &*known.pod)).unzip();
        let victims = preemption::victims(pod, &others, lacking)?;
        Some(victims.into_iter().map(|index| uids[index].clone()).collect())
    }

    /// Ends these pods for the sake of another; says how long that may take.
    async fn preempt(&mut self, uids: &[PodUid]) -> Duration {
        let mut limit = Duration::ZERO;
        for uid in uids {
            let Some(known) = self.known.get_mut(uid) else { continue };
            known.admitted = false;
            let own = known.pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds).unwrap_or(30);
            let grace = Duration::from_secs(u64::try_from(own).unwrap_or(0));
            limit = limit.max(grace + (grace / 2).max(LEAST_OVERTIME));
            let (reason, message) = (preemption::REASON.to_owned(), preemption::MESSAGE.to_owned());
            self.shared.recorder.pod(&known.pod, Level::Warning, reason.clone(), message.clone());
            self.send(uid, Event::End { reason, message, grace }).await;
        }
        limit
    }

    /// Lets the pod wait, in the background, until those that are `leaving` have ended or the `limit` has passed; and has it
    /// given what it `asks` for itself: plugins may take their time.
    fn begin_admission(&mut self, uid: PodUid, pod: Arc<Pod>, asks: bool, leaving: Vec<PodUid>, limit: Duration) {
        self.take_back();
        if let Some(known) = self.known.get_mut(&uid) {
            known.admitting = true;
        }
        let shared = self.shared.clone();
        self.admissions.spawn(async move {
            if !leaving.is_empty() {
                let runs = |entry: &PodEntry| entry.observed.containers.iter().any(|container| container.live());
                // A worker that has not looked at the runtime yet says nothing of its pod.
                let seen = parking_lot::Mutex::new(HashSet::new());
                let is_gone = |table: &PodTable, uid: &PodUid| match table.get(uid) {
                    Some(entry) => {
                        seen.lock().insert(uid.clone());
                        !runs(&entry)
                    }
                    None => seen.lock().contains(uid),
                };
                let gone = |table: &PodTable| leaving.iter().all(|uid| is_gone(table, uid));
                if shared.table.wait_for(limit, gone).await {
                    shared.assignments.keep_only(|held| !leaving.iter().any(|uid| uid.as_str() == held));
                } else {
                    let uid = uid.as_str();
                    tracing::warn!(pod.uid = uid, "pods that make room take longer than their grace; going on");
                }
            }
            let result = if asks { shared.assignments.admit(&pod).await } else { Ok(()) };
            (uid, result)
        });
    }

    async fn admitted(&mut self, uid: &PodUid, result: Result<(), Refusal>) {
        match self.known.get_mut(uid) {
            Some(known) => {
                known.admitting = false;
                known.admitted &= result.is_ok();
            }
            // It went meanwhile.
            None => return self.take_back(),
        }
        self.allocate(uid).await;
        if let Err(refusal) = result {
            self.weights_stale = true;
            self.send(uid, Event::Rejected { reason: refusal.reason, message: refusal.message }).await;
        }
    }

    /// Takes back what pods have for themselves that are over: their containers have ended, or nobody knows them any more.
    fn take_back(&self) {
        let all_ready = self.all_ready();
        self.shared.assignments.keep_only(|uid| {
            let uid = PodUid::from(uid);
            let Some(known) = self.known.get(&uid) else { return !all_ready };
            let runs = |entry: PodEntry| entry.observed.containers.iter().any(|container| container.live());
            known.admitted || known.admitting || self.shared.table.get(&uid).is_none_or(runs)
        });
    }

    /// Gives a pod the resources that its object asks for, if the node has them, and hands it on.
    async fn allocate(&mut self, uid: &PodUid) {
        // One that is deleted while it waits has nothing to wait for.
        let hears = |known: &&Known| !known.admitting || known.desired.metadata.deletion_timestamp.is_some();
        let Some(known) = self.known.get(uid).filter(hears) else { return };
        let desired = known.desired.clone();
        let mut pending = None;
        let mut pod = desired.clone();
        if resize::differs(&desired, &known.pod) {
            let others = self.known.iter().filter(|(other, known)| known.admitted && *other != uid);
            let others: Vec<&Pod> = others.map(|(_, known)| &*known.pod).collect();
            pending = resize::judge(&desired, &self.shared.capacity, &others).err();
            if let Some(message) = self.shared.assignments.resize_refused(&known.pod) {
                pending = Some(Pending { reason: "Infeasible", message: message.to_owned() });
            }
            if pending.is_some() {
                pod = Arc::new(resize::with_resources_of(&desired, &known.pod));
            } else {
                self.weights_stale = true;
            }
        }
        if let Some(known) = self.known.get_mut(uid) {
            known.pod = pod.clone();
        }
        self.send(uid, Event::Desired(pod, pending)).await;
    }

    /// Room may have become free: resizes that wait are judged again.
    async fn allocate_waiting(&mut self) {
        let waiting = self.known.iter().filter(|(_, known)| resize::differs(&known.desired, &known.pod));
        let waiting: Vec<PodUid> = waiting.map(|(uid, _)| uid.clone()).collect();
        for uid in waiting {
            self.allocate(&uid).await;
        }
    }

    /// The object of a static pod: its owner compares what it shows with what is so.
    async fn mirror(&self, mirror: Arc<Pod>) {
        let shown = |known: &Known| {
            known.source == Some(Source::Files)
                && full_name(&known.pod) == full_name(&mirror)
                && spec::annotation(&mirror, names::CONFIG_MIRROR) == spec::annotation(&known.pod, names::CONFIG_HASH)
        };
        if let Some((uid, _)) = self.known.iter().find(|(_, known)| shown(known)) {
            let uid = uid.clone();
            self.send(&uid, Event::Mirror(mirror)).await;
        }
    }

    fn start_worker(&mut self, uid: PodUid, pod: Arc<Pod>, source: Option<Source>, admitted: bool) {
        let (mailbox, receiver) = mpsc::channel(worker::MAILBOX);
        let desired = pod;
        let pod = Arc::new(resize::as_last_told(&desired));
        let worker = Worker::new(self.shared.clone(), pod.clone(), receiver);
        let shutdown = self.shutdown.clone();
        self.known.insert(uid.clone(), Known { mailbox, desired, pod, source, admitted, admitting: false });
        self.weights_stale = true;
        self.workers.spawn(Box::new(worker).run(shutdown));
    }

    /// A source has told everything: what it has not told is gone; then the runtime is searched for what nobody knows.
    async fn source_ready(&mut self, source: Source) {
        self.ready.insert(source);
        let told = self.told.remove(&source).unwrap_or_default();
        self.queued.retain(|_, pod| source != Source::Files || told.contains(&PodUid::from(spec::pod_uid(pod))));
        let known = self.known.iter().filter(|(uid, known)| known.source == Some(source) && !told.contains(*uid));
        let missing: Vec<PodUid> = known.map(|(uid, _)| uid.clone()).collect();
        for uid in missing {
            self.gone(&uid).await;
        }
        if self.all_ready() {
            match found_pods(&self.shared.runtime).await {
                Ok(found) => self.end_unknown(found).await,
                Err(error) => tracing::debug!(%error, "the runtime could not be searched for unknown pods yet"),
            }
            self.end_leftovers().await;
            self.take_back();
        }
    }

    fn all_ready(&self) -> bool {
        self.sources.iter().all(|source| self.ready.contains(source))
    }

    /// Ends pods that the runtime has and no source knows.
    async fn end_unknown(&mut self, found: Vec<Found>) {
        if !self.all_ready() {
            return;
        }
        for found in found.into_iter().filter(|found| !self.known.contains_key(&found.uid)).collect::<Vec<_>>() {
            tracing::info!(pod.uid = %found.uid, pod.name = found.name, "ending a pod that nobody knows");
            let uid = found.uid.clone();
            self.start_worker(uid.clone(), Arc::new(unknown_pod(&found)), None, false);
            self.send(&uid, Event::Gone).await;
        }
    }

    /// Ends pods of which only volumes are left.
    async fn end_leftovers(&mut self) {
        let known: HashSet<String> = self.known.keys().map(ToString::to_string).collect();
        for uid in self.shared.volumes.orphans(&known) {
            let found = Found { uid: PodUid::from(uid), name: String::new(), namespace: String::new() };
            self.start_worker(found.uid.clone(), Arc::new(unknown_pod(&found)), None, false);
            self.send(&found.uid, Event::Gone).await;
        }
    }
}

/// Namespace and name.
fn full_name(pod: &Pod) -> (String, String) {
    (spec::pod_namespace(pod).to_owned(), spec::pod_name(pod).to_owned())
}
