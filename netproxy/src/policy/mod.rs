//! NetworkPolicies of the pods of this node, in a table of their own.
//!
//! `objects` reduces what the API has, `index` keeps what follows from it change by change, `plan` says how that looks in
//! nftables: all pure. `keeper` carries it out, `engine` puts these together, `bridges` sees to it that packets come by, and
//! `event` tells when they do not. This file watches: pods and namespaces only once there is a policy, so that clusters
//! without any pay nothing.

mod bridges;
mod engine;
mod event;
mod index;
mod keeper;
#[cfg(test)]
mod model;
mod objects;
mod plan;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{Api, Client};
use oarlock_nft::{Family, Netlink, NftError, Table};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::health::Status;
use crate::watch as watches;
use bridges::Bridges;
use engine::Engine;
use keeper::Keeper;
use objects::{Labels, Name, Pod, Policy};

const EVENT_QUEUE: usize = 1024;
const EVENT_BATCH: usize = 1024;
const AUDIT_INTERVAL: Duration = Duration::from_secs(3);

/// The table's name, in family `ip`, `ip6` or both.
pub const TABLE: &str = "oarlock-policy";

/// Why policies are enforced no longer.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    #[error("cannot use nftables")]
    Nftables(#[source] NftError),
    #[error("the thread that writes network policies ended")]
    Worker(#[source] tokio::task::JoinError),
    #[error("a watch that network policies depend on ended")]
    Watch,
}

/// A change of something that policies depend on.
#[derive(Debug, Clone)]
enum Event {
    Policy(Name, Option<Policy>),
    Pod(Name, Option<Pod>),
    Namespace(Arc<str>, Option<Labels>),
    Listed(Kind),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    Policies,
    Pods,
    Namespaces,
}

pub fn table(is_ipv4: bool) -> Table {
    Table::new(if is_ipv4 { Family::Ip } else { Family::Ip6 }, TABLE)
}

/// What the policies are for.
pub struct Scope {
    pub node_name: String,
    /// Whether each of the cluster's families is IPv4.
    pub families: Vec<bool>,
    /// The addresses of this node's pods, once the nodes are known.
    pub pod_cidrs: watch::Receiver<Option<Vec<IpNet>>>,
    /// For which of them the policies hold.
    pub enforced: watch::Sender<Option<Vec<IpNet>>>,
}

/// Enforces policies until shutdown. The rules stay, so that pods are not open during a restart.
pub async fn run(
    client: Client,
    scope: Scope,
    status: Arc<Status>,
    shutdown: CancellationToken,
) -> Result<(), PolicyError> {
    let keepers = scope
        .families
        .iter()
        .map(|is_ipv4| Netlink::open().map(|kernel| (*is_ipv4, Keeper::new(kernel, table(*is_ipv4), *is_ipv4))));
    let keepers = keepers.collect::<Result<Vec<_>, _>>().map_err(PolicyError::Nftables)?;
    let (events_in, events) = mpsc::channel(EVENT_QUEUE);
    let mut watchers = JoinSet::new();
    watchers.spawn(watch_policies(client.clone(), events_in.clone(), shutdown.clone()));
    let enforcer = Enforcer { client, scope, status, watchers, events_in, is_watching: false };
    let mut worker = Worker { engine: Engine::new(keepers), bridges: Bridges::default() };
    enforcer.run(move |round| worker.work(round), events, shutdown).await
}

/// What works on a thread of its own, and is handed to and fro.
struct Worker {
    engine: Engine<Netlink>,
    bridges: Bridges,
}

/// What a round of work starts with.
struct Round {
    batch: Vec<Event>,
    pod_cidrs: Option<Vec<IpNet>>,
    audit: bool,
}

/// What has come of a round.
struct Outcome {
    /// Whether pods and namespaces matter.
    has_policies: bool,
    enforced: Option<Vec<IpNet>>,
    /// Bridges whose packets no rule sees, when they are others than before.
    unseen: Option<Vec<String>>,
}

impl Worker {
    fn work(&mut self, round: Round) -> Outcome {
        let cidrs = round.pod_cidrs.clone().unwrap_or_default();
        self.engine.set_pod_cidrs(round.pod_cidrs);
        round.batch.into_iter().for_each(|event| self.engine.take(event));
        if round.audit {
            self.engine.audit();
        }
        let enforced = self.engine.apply();
        let unseen = match (self.engine.isolates(), round.audit || self.bridges.is_unknown()) {
            (false, _) => self.bridges.forget(),
            (true, true) => self.bridges.look(&cidrs),
            (true, false) => None,
        };
        Outcome { has_policies: self.engine.has_policies(), enforced, unseen }
    }
}

struct Enforcer {
    client: Client,
    scope: Scope,
    status: Arc<Status>,
    watchers: JoinSet<()>,
    events_in: mpsc::Sender<Event>,
    /// Whether pods and namespaces are watched.
    is_watching: bool,
}

impl Enforcer {
    async fn run(
        mut self,
        mut work: impl FnMut(Round) -> Outcome + Send + 'static,
        mut events: mpsc::Receiver<Event>,
        shutdown: CancellationToken,
    ) -> Result<(), PolicyError> {
        let mut audit = tokio::time::interval(AUDIT_INTERVAL);
        audit.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let mut round = Round { batch: Vec::new(), pod_cidrs: None, audit: false };
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return Ok(()),
                Some(_) = self.watchers.join_next() => {
                    return if shutdown.is_cancelled() { Ok(()) } else { Err(PolicyError::Watch) };
                }
                // Before events, which may come without end: repairs are not to wait for quiet times.
                _ = audit.tick() => round.audit = true,
                _ = events.recv_many(&mut round.batch, EVENT_BATCH) => {}
                changed = self.scope.pod_cidrs.changed() => {
                    if changed.is_err() {
                        // Who tells them ends when all does.
                        shutdown.cancelled().await;
                        return Ok(());
                    }
                }
            }
            round.pod_cidrs = self.scope.pod_cidrs.borrow_and_update().clone();
            let working = tokio::task::spawn_blocking(move || {
                let outcome = work(round);
                (work, outcome)
            });
            let outcome;
            // Nothing would be enforced any more without it.
            (work, outcome) = working.await.map_err(PolicyError::Worker)?;
            let has_policies = outcome.has_policies;
            self.tell(outcome, &shutdown);
            if has_policies && !std::mem::replace(&mut self.is_watching, true) {
                let (client, events_in) = (self.client.clone(), self.events_in.clone());
                let node = self.scope.node_name.clone();
                self.watchers.spawn(watch_pods(client.clone(), node, events_in.clone(), shutdown.clone()));
                self.watchers.spawn(watch_namespaces(client, events_in, shutdown.clone()));
            }
        }
    }

    fn tell(&self, outcome: Outcome, shutdown: &CancellationToken) {
        if let Some(cidrs) = outcome.enforced {
            self.status.policies_enforced();
            self.scope.enforced.send_if_modified(|known| {
                let changed = known.as_ref() != Some(&cidrs);
                *known = Some(cidrs);
                changed
            });
        }
        if let Some(unseen) = outcome.unseen {
            self.status.unseen_bridges.store(unseen.len() as u64, Ordering::Relaxed);
            let record = event::record(self.client.clone(), self.scope.node_name.clone(), unseen);
            let shutdown = shutdown.clone();
            tokio::spawn(async move {
                tokio::select! {
                    () = record => {}
                    () = shutdown.cancelled() => {}
                }
            });
        }
    }
}

fn name_of(metadata: &ObjectMeta) -> Option<Name> {
    Some((metadata.namespace.as_deref()?.into(), metadata.name.as_deref()?.into()))
}

async fn watch_policies(client: Client, events: mpsc::Sender<Event>, shutdown: CancellationToken) {
    let name = |object: &NetworkPolicy| name_of(&object.metadata);
    let event = |name, object: Option<NetworkPolicy>| Event::Policy(name, object.as_ref().and_then(Policy::read));
    watches::run(Api::all(client), Event::Listed(Kind::Policies), name, event, events, shutdown).await;
}

async fn watch_pods(client: Client, node: String, events: mpsc::Sender<Event>, shutdown: CancellationToken) {
    let name = |object: &core::Pod| name_of(&object.metadata);
    let event =
        move |name, object: Option<core::Pod>| Event::Pod(name, object.and_then(|object| Pod::read(&object, &node)));
    watches::run(Api::all(client), Event::Listed(Kind::Pods), name, event, events, shutdown).await;
}

async fn watch_namespaces(client: Client, events: mpsc::Sender<Event>, shutdown: CancellationToken) {
    let name = |object: &core::Namespace| object.metadata.name.as_deref().map(Arc::<str>::from);
    let event = |name, object: Option<core::Namespace>| {
        Event::Namespace(name, object.map(|object| object.metadata.labels.unwrap_or_default()))
    };
    watches::run(Api::all(client), Event::Listed(Kind::Namespaces), name, event, events, shutdown).await;
}
