//! NetworkPolicies of the pods of this node, in a table of their own.
//!
//! `objects` reduces what the API has, `plan` says what it means: both pure. `keeper` carries it out. This file watches:
//! pods and namespaces only once there is a policy, so that clusters without any pay nothing.

mod keeper;
mod objects;
mod plan;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{Api, Client};
use oarlock_nft::{Family, Netlink, NftError, Table};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::watch as watches;
use keeper::Keeper;
use objects::{Labels, Name, Pod, Policy};
use plan::World;

const EVENT_QUEUE: usize = 1024;
const EVENT_BATCH: usize = 1024;
const AUDIT_INTERVAL: Duration = Duration::from_secs(3);

/// The table's name, in family `ip`, `ip6` or both.
pub const TABLE: &str = "oarlock-policy";

/// A change of something that policies depend on.
#[derive(Debug, Clone)]
enum Event {
    Policy(Name, Option<Policy>),
    Pod(Name, Option<Pod>),
    Namespace(Arc<str>, Option<Labels>),
    Listed(Kind),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    /// The addresses of this node's pods.
    pub pod_cidrs: watch::Receiver<Vec<IpNet>>,
}

/// Enforces policies until shutdown. The rules stay, so that pods are not open during a restart.
pub async fn run(client: Client, scope: Scope, shutdown: CancellationToken) -> Result<(), NftError> {
    let keepers = scope
        .families
        .iter()
        .map(|is_ipv4| Netlink::open().map(|kernel| (*is_ipv4, Keeper::new(kernel, table(*is_ipv4), *is_ipv4))));
    let keepers = keepers.collect::<Result<Vec<_>, _>>()?;
    let (events_in, events) = mpsc::channel(EVENT_QUEUE);
    tokio::spawn(watch_policies(client.clone(), events_in.clone(), shutdown.clone()));
    let enforcer = Enforcer {
        client,
        scope,
        world: World::default(),
        listed: Vec::new(),
        watching: false,
        keepers: Some(keepers),
        dirty: false,
        events_in,
    };
    enforcer.run(events, shutdown).await;
    Ok(())
}

struct Enforcer {
    client: Client,
    scope: Scope,
    world: World,
    listed: Vec<Kind>,
    /// Whether pods and namespaces are watched.
    watching: bool,
    /// Away while a thread works with them.
    keepers: Option<Vec<(bool, Keeper<Netlink>)>>,
    dirty: bool,
    events_in: mpsc::Sender<Event>,
}

impl Enforcer {
    async fn run(mut self, mut events: mpsc::Receiver<Event>, shutdown: CancellationToken) {
        let mut audit = tokio::time::interval(AUDIT_INTERVAL);
        let mut batch = Vec::with_capacity(EVENT_BATCH);
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                count = events.recv_many(&mut batch, EVENT_BATCH) => {
                    if count == 0 {
                        return;
                    }
                    batch.drain(..).for_each(|event| self.take(event));
                }
                changed = self.scope.pod_cidrs.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    self.dirty = true;
                }
                _ = audit.tick() => self.audit().await,
            }
            if !self.world.policies.is_empty() && !std::mem::replace(&mut self.watching, true) {
                let (client, events_in) = (self.client.clone(), self.events_in.clone());
                let node = self.scope.node_name.clone();
                tokio::spawn(watch_pods(client.clone(), node, events_in.clone(), shutdown.clone()));
                tokio::spawn(watch_namespaces(client, events_in, shutdown.clone()));
            }
            self.apply().await;
        }
    }

    fn take(&mut self, event: Event) {
        self.dirty |= match event {
            Event::Policy(name, Some(policy)) => self.world.policies.insert(name, policy.clone()) != Some(policy),
            Event::Policy(name, None) => self.world.policies.remove(&name).is_some(),
            Event::Pod(name, Some(pod)) => self.world.pods.insert(name, pod.clone()) != Some(pod),
            Event::Pod(name, None) => self.world.pods.remove(&name).is_some(),
            Event::Namespace(name, Some(labels)) => self.world.namespaces.insert(name, labels.clone()) != Some(labels),
            Event::Namespace(name, None) => self.world.namespaces.remove(&name).is_some(),
            Event::Listed(kind) => {
                let new = !self.listed.contains(&kind);
                self.listed.extend(new.then_some(kind));
                new
            }
        };
    }

    /// Writes what has changed, once everything is known that it depends on.
    async fn apply(&mut self) {
        let needed: &[Kind] = if self.world.policies.is_empty() {
            &[Kind::Policies]
        } else {
            &[Kind::Policies, Kind::Pods, Kind::Namespaces]
        };
        if !self.dirty || !needed.iter().all(|kind| self.listed.contains(kind)) {
            return;
        }
        let cidrs = self.scope.pod_cidrs.borrow().clone();
        let world = &self.world;
        let planned: Vec<_> = self
            .scope
            .families
            .iter()
            .map(|is_ipv4| (!world.policies.is_empty()).then(|| plan::plan(world, *is_ipv4, &cidrs)))
            .collect();
        let Some(mut keepers) = self.keepers.take() else { return };
        let work = move || {
            let mut complete = true;
            for ((_, keeper), wanted) in keepers.iter_mut().zip(planned) {
                if let Err(error) = keeper.apply(wanted) {
                    warn!(error = &error as &dyn std::error::Error, "network policies cannot be written; trying again");
                    complete = false;
                }
            }
            (keepers, complete)
        };
        if let Ok((keepers, complete)) = tokio::task::spawn_blocking(work).await {
            self.keepers = Some(keepers);
            self.dirty = !complete;
        }
    }

    async fn audit(&mut self) {
        let Some(mut keepers) = self.keepers.take() else { return };
        let work = move || {
            for (_, keeper) in &mut keepers {
                match keeper.audit() {
                    Ok(true) => info!("network policies restored"),
                    Ok(false) => {}
                    Err(error) => {
                        warn!(error = &error as &dyn std::error::Error, "network policies cannot be audited")
                    }
                }
            }
            keepers
        };
        self.keepers = tokio::task::spawn_blocking(work).await.ok();
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
