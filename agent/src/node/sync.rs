//! Keeps the node object true: registers it, reports its status on change and every few minutes, renews its lease; and takes
//! in what others write to it, as the watch tells it.
//!
//! While the node is not Ready the runtime is asked often, so that Ready follows within a moment of the network's; after
//! that now and then.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::{Node, NodeStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference};
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::runtime::watcher;
use serde_json::json;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::status::{self, Health, Identity};
use crate::cgroups::PodCgroups;
use crate::objects::Delays;
use crate::recorder::Level;
use crate::shared::Shared;
use crate::shutdown;

const CALL: Duration = Duration::from_secs(10);
/// How often a node that is not Ready is looked at.
const EAGER: Duration = Duration::from_millis(100);
const EAGER_FOR: Duration = Duration::from_secs(60);
const LEASE_NAMESPACE: &str = "kube-node-lease";
/// Images are listed again after this many calm rounds.
const IMAGE_ROUNDS: u32 = 6;

/// What the watch of the node tells.
pub(crate) enum Told {
    Node(Box<Node>),
    /// The node of this UID is gone; without one, whichever was told last.
    Gone(Option<String>),
}

/// The keeper of the node object.
pub(crate) struct NodeSync {
    shared: Arc<Shared>,
    told: mpsc::Receiver<Told>,
    identity: Identity,
    sent: Option<(NodeStatus, tokio::time::Instant)>,
    /// Somebody has written other conditions than ours.
    overwritten: bool,
    pod_cidr: Option<String>,
    rounds: u32,
    images: Vec<k8s_openapi::api::core::v1::ContainerImage>,
    /// What the runtime could do when it was last asked.
    abilities: status::Abilities,
    was_ready: Option<bool>,
    /// Whether a restart of the machine, which happened before the agent began, has been told.
    reboot_told: bool,
    /// Whether the runtime has told how it makes cgroups.
    driver_known: bool,
}

impl NodeSync {
    pub(crate) fn new(shared: Arc<Shared>, identity: Identity, told: mpsc::Receiver<Told>) -> Self {
        Self {
            shared,
            told,
            identity,
            sent: None,
            overwritten: false,
            pod_cidr: None,
            rounds: 0,
            images: Vec::new(),
            abilities: Default::default(),
            was_ready: None,
            reboot_told: false,
            driver_known: false,
        }
    }

    fn fixed<'a>(&'a self, shared: &'a Shared) -> status::Fixed<'a> {
        let capacity = shared.capacity.with_devices(&shared.assignments.plugins.counts());
        status::Fixed { config: &shared.config, capacity, identity: &self.identity }
    }

    /// Runs until `shutdown`.
    pub(crate) async fn run(mut self, shutdown: CancellationToken) {
        let mut delays = Delays::default();
        let began = tokio::time::Instant::now();
        loop {
            let health = self.health().await;
            let ready = health.troubles.is_empty();
            match self.report(&health).await {
                Ok(()) => {
                    self.shared.storage.in_use_is_known(&health.volumes_in_use);
                    delays.reset();
                }
                Err(error) => {
                    tracing::debug!(%error, "the node's status was not taken");
                    delays.wait(&shutdown).await;
                    if shutdown.is_cancelled() {
                        return;
                    }
                    continue;
                }
            }
            self.rounds += 1;
            let eager = !ready && began.elapsed() < EAGER_FOR;
            let pause = if eager {
                EAGER
            } else if ready {
                self.shared.config.node_status_update_period
            } else {
                Duration::from_secs(1)
            };
            let shared = self.shared.clone();
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = shared.node_changed.notified() => {}
                () = shared.storage.in_use_has_news() => {}
                () = tokio::time::sleep(pause) => {}
                () = self.hear() => {}
            }
        }
    }

    /// Takes in what the watch tells, until there is cause to report. A node that somebody removed registers anew with the
    /// next report; one that others called unreachable says otherwise at once.
    async fn hear(&mut self) {
        while let Some(told) = self.told.recv().await {
            match told {
                Told::Node(node) => {
                    let sent = self.sent.as_ref().map(|(status, _)| status);
                    self.overwritten = sent.is_some_and(|sent| status::is_overwritten(sent, &node));
                    self.take_node(*node).await;
                    if self.overwritten {
                        return;
                    }
                }
                Told::Gone(uid) => {
                    if uid.is_none() || uid == self.shared.node.load().metadata.uid {
                        self.sent = None;
                    }
                }
            }
        }
        std::future::pending().await
    }

    async fn health(&mut self) -> Health {
        let shared = &self.shared;
        let status = shared.runtime.status().await.map_err(|error| error.to_string());
        let reached = status.is_ok();
        if shared.runtime_ok.swap(reached, Ordering::Relaxed) != reached {
            tracing::info!(reached, "the container runtime changed");
        }
        let mut health = Health { troubles: status::runtime_troubles(&status), ..Default::default() };
        if let Ok(status) = &status {
            self.abilities = status::abilities(status);
        }
        (health.runtime_handlers, health.features) = self.abilities.clone();
        if reached && let Ok(version) = shared.runtime.version().await {
            health.runtime_version = format!("{}://{}", version.runtime_name, version.runtime_version);
            let scheme = format!("{}://", version.runtime_name);
            if **shared.id_scheme.load() != scheme {
                shared.id_scheme.store(Arc::new(scheme));
            }
            if self.rounds.is_multiple_of(IMAGE_ROUNDS)
                && let Ok(images) = shared.runtime.list_images().await
            {
                self.images = status::listed_images(images, shared.config.node_status_max_images);
            }
        }
        if reached && !self.driver_known {
            // Of a runtime that cannot say the configuration says it.
            let systemd = shared.runtime.systemd_cgroups().await;
            self.driver_known = systemd.as_ref().map_or_else(|error| error.unimplemented(), |_| true);
            let cgroups = shared.cgroups.load_full();
            if let Some(systemd) = systemd.ok().filter(|systemd| *systemd != cgroups.systemd) {
                tracing::info!(systemd, "cgroups are made as the runtime makes them");
                let enabled = shared.config.cgroups_per_qos;
                shared.cgroups.store(Arc::new(PodCgroups { systemd, enabled, ..(*cgroups).clone() }));
                crate::agent::prepare_cgroups(shared).await;
            }
        }
        health.images = self.images.clone();
        let storage = shared.storage.clone();
        health.volumes_in_use = tokio::task::spawn_blocking(move || storage.volumes_in_use()).await.unwrap_or_default();
        health.pressure = shared.pressure();
        if shared.shutting_down.load(Ordering::Relaxed) {
            health.troubles.push(shutdown::NOT_READY.to_owned());
        }
        health
    }

    /// Registers the node if need be, and sends the status when it says something new or is due.
    async fn report(&mut self, health: &Health) -> Result<(), kube::Error> {
        let shared = self.shared.clone();
        let config = &shared.config;
        let last = self.sent.as_ref().map(|(status, _)| status);
        let now = Timestamp::now();
        let node = shared.node.load();
        // Transitions are from what the API has.
        let before = last.map(|sent| if self.overwritten { node.status.as_ref().unwrap_or(sent) } else { sent });
        let next = status::node_status(&self.fixed(&shared), health, before, now);
        let late = |(_, at): &(NodeStatus, tokio::time::Instant)| at.elapsed() >= config.node_status_report_period;
        let due = self.overwritten || self.sent.as_ref().is_none_or(late);
        let news = last.is_none_or(|last| !status::same(last, &next));
        if !due && !news {
            self.tell_pod_cidr().await;
            return Ok(());
        }
        let (next, before) = match &self.sent {
            None => self.register(next, health).await?,
            Some((last, _)) => (next, Some(last.clone())),
        };
        let api: Api<Node> = Api::all(shared.client.clone());
        let patch = Patch::Strategic(json!({ "status": patch_body(&next) }));
        let params = PatchParams::default();
        match bounded(api.patch_status(&config.node_name, &params, &patch)).await {
            Ok(node) => self.take_node(node).await,
            Err(kube::Error::Api(refusal)) if refusal.code == 404 => {
                // Somebody removed the node: it registers anew.
                self.sent = None;
                return Err(kube::Error::Api(refusal));
            }
            Err(error) => return Err(error),
        }
        self.tell_pressure(before.as_ref(), &next);
        self.tell_changes(health);
        self.overwritten = false;
        self.sent = Some((next, tokio::time::Instant::now()));
        Ok(())
    }

    fn tell_changes(&mut self, health: &Health) {
        let ready = health.troubles.is_empty();
        if self.was_ready == Some(ready) {
            return;
        }
        let name = &self.shared.config.node_name;
        if ready {
            tracing::info!(node.name = name, "the node is ready");
            let message = format!("Node {name} status is now: NodeReady");
            self.shared.recorder.node(name, Level::Normal, "NodeReady", message);
        } else if self.was_ready == Some(true) {
            tracing::warn!(node.name = name, troubles = ?health.troubles, "the node is not ready");
            let message = format!("Node {name} status is now: NodeNotReady");
            self.shared.recorder.node(name, Level::Normal, "NodeNotReady", message);
        }
        self.was_ready = Some(ready);
    }

    /// Tells what the node has come to be short of, and no longer is; of a new node all of it.
    fn tell_pressure(&self, before: Option<&NodeStatus>, next: &NodeStatus) {
        let name = &self.shared.config.node_name;
        for reason in status::pressure_events(before, next) {
            self.shared.recorder.node(name, Level::Normal, reason, format!("Node {name} status is now: {reason}"));
        }
    }

    /// Tells once that the machine has been started anew since the node object was last written.
    fn tell_reboot(&mut self, before: Option<&NodeStatus>) {
        let (name, now) = (&self.shared.config.node_name, &self.identity.boot_id);
        if self.reboot_told || !status::rebooted(before, &self.identity) {
            return;
        }
        self.reboot_told = true;
        let message = format!("Node {name} has been rebooted, boot id: {now}");
        self.shared.recorder.node(name, Level::Warning, "Rebooted", message);
    }

    /// Creates the node object, or adopts the one that is there; transition times are carried over from it. Gives the status to
    /// send, and what the object said before.
    async fn register(
        &mut self,
        status: NodeStatus,
        health: &Health,
    ) -> Result<(NodeStatus, Option<NodeStatus>), kube::Error> {
        let shared = self.shared.clone();
        let api: Api<Node> = Api::all(shared.client.clone());
        let name = &shared.config.node_name;
        let object = status::new_node(&shared.config, &self.identity, status.clone());
        match bounded(api.create(&PostParams::default(), &object)).await {
            Ok(node) => {
                tracing::info!(node.name = name, "registered the node");
                shared.recorder.node(name, Level::Normal, "Starting", "Starting kubelet.");
                self.take_node(node).await;
                return Ok((status, None));
            }
            Err(kube::Error::Api(refusal)) if refusal.code == 409 => {}
            Err(error) => return Err(error),
        }
        let found = bounded(api.get(name)).await?;
        let wanted = status::labels(&shared.config, &self.identity);
        let stale = wanted
            .iter()
            .any(|(key, value)| found.metadata.labels.as_ref().and_then(|labels| labels.get(key)) != Some(value));
        if stale {
            let patch = Patch::Merge(json!({ "metadata": { "labels": wanted } }));
            bounded(api.patch(name, &PatchParams::default(), &patch)).await?;
        }
        let last = found.status.clone();
        self.take_node(found).await;
        self.tell_reboot(last.as_ref());
        let now = Timestamp::now();
        Ok((status::node_status(&self.fixed(&shared), health, last.as_ref(), now), last))
    }

    async fn take_node(&mut self, mut node: Node) {
        node.metadata.managed_fields = None;
        self.shared.node.store(Arc::new(node));
        self.shared.node_told.notify_waiters();
        self.tell_pod_cidr().await;
    }

    /// Tells the runtime the node's pod addresses, where it does not know them.
    async fn tell_pod_cidr(&mut self) {
        let node = self.shared.node.load_full();
        let cidr = node.spec.as_ref().and_then(|spec| spec.pod_cidr.clone()).filter(|cidr| !cidr.is_empty());
        if let Some(cidr) = cidr.filter(|cidr| self.pod_cidr.as_ref() != Some(cidr)) {
            match self.shared.runtime.update_pod_cidr(cidr.clone()).await {
                Ok(()) => self.pod_cidr = Some(cidr),
                Err(error) if error.unimplemented() => self.pod_cidr = Some(cidr),
                Err(error) => tracing::debug!(%error, "the runtime was not told of the pod addresses"),
            }
        }
    }
}

/// Watches the node object until `shutdown`.
pub(crate) async fn watch(shared: Arc<Shared>, told: mpsc::Sender<Told>, shutdown: CancellationToken) {
    let config = watcher::Config::default().fields(&format!("metadata.name={}", shared.config.node_name));
    let mut events = watcher(Api::<Node>::all(shared.client.clone()), config).boxed();
    let mut delays = Delays::default();
    // The list before the node is registered is empty.
    let (mut known, mut listed) = (false, false);
    loop {
        let event = tokio::select! {
            () = shutdown.cancelled() => return,
            event = events.next() => event,
        };
        let news = match event {
            None => return,
            Some(Err(error)) => {
                tracing::debug!(%error, "the node cannot be watched");
                delays.wait(&shutdown).await;
                continue;
            }
            Some(Ok(watcher::Event::Init)) => {
                listed = false;
                continue;
            }
            Some(Ok(watcher::Event::InitApply(node) | watcher::Event::Apply(node))) => {
                (known, listed) = (true, true);
                delays.reset();
                Told::Node(Box::new(node))
            }
            Some(Ok(watcher::Event::InitDone)) if listed || !known => continue,
            Some(Ok(watcher::Event::InitDone)) => Told::Gone(None),
            Some(Ok(watcher::Event::Delete(node))) => Told::Gone(node.metadata.uid),
        };
        if told.send(news).await.is_err() {
            return;
        }
    }
}

/// The status as a patch: lists that merge by key are sent whole.
fn patch_body(status: &NodeStatus) -> serde_json::Value {
    let mut body = serde_json::to_value(status).unwrap_or_default();
    if let Some(addresses) = body.get_mut("addresses").and_then(serde_json::Value::as_array_mut) {
        addresses.insert(0, json!({ "$patch": "replace" }));
    }
    body
}

async fn bounded<T>(call: impl Future<Output = Result<T, kube::Error>>) -> Result<T, kube::Error> {
    match tokio::time::timeout(CALL, call).await {
        Ok(answer) => answer,
        Err(elapsed) => Err(kube::Error::Service(Box::new(elapsed))),
    }
}

/// Renews the node's lease until `shutdown`.
pub(crate) async fn keep_lease(shared: Arc<Shared>, shutdown: CancellationToken) {
    let mut delays = Delays::default();
    let duration = shared.config.node_lease_duration;
    loop {
        match renew(&shared, duration).await {
            Ok(()) => delays.reset(),
            Err(error) => {
                tracing::debug!(%error, "the node's lease was not renewed");
                delays.wait(&shutdown).await;
                if shutdown.is_cancelled() {
                    return;
                }
                continue;
            }
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(duration / 4) => {}
        }
    }
}

async fn renew(shared: &Shared, duration: Duration) -> Result<(), kube::Error> {
    let api: Api<Lease> = Api::namespaced(shared.client.clone(), LEASE_NAMESPACE);
    let name = &shared.config.node_name;
    let now = MicroTime(Timestamp::now());
    let node = shared.node.load();
    // A lease that is older than its node gets its owner when there is one.
    let owner = node.metadata.uid.clone().map(|uid| OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: name.clone(),
        uid,
        ..Default::default()
    });
    let owners = owner.map(|owner| vec![owner]);
    let mut patch = json!({ "spec": { "holderIdentity": name, "renewTime": now,
        "leaseDurationSeconds": duration.as_secs() } });
    if let Some(owners) = &owners {
        patch["metadata"] = json!({ "ownerReferences": owners });
    }
    let patch = Patch::Merge(&patch);
    match bounded(api.patch(name, &PatchParams::default(), &patch)).await {
        Err(kube::Error::Api(refusal)) if refusal.code == 404 => {}
        other => return other.map(drop),
    }
    let lease = Lease {
        metadata: ObjectMeta {
            name: Some(name.clone()),
            namespace: Some(LEASE_NAMESPACE.to_owned()),
            owner_references: owners,
            ..Default::default()
        },
        spec: Some(LeaseSpec {
            holder_identity: Some(name.clone()),
            lease_duration_seconds: i32::try_from(duration.as_secs()).ok(),
            renew_time: Some(now),
            ..Default::default()
        }),
    };
    bounded(api.create(&PostParams::default(), &lease)).await.map(drop)
}
