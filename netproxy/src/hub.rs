//! The owner of the cluster's state: events in, jobs for the worker, the node's configuration and what balancers are told out.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1 as core;
use oarlock_netlink::{Connection, Protocol as NetlinkProtocol, WireguardKey};
use parking_lot::RwLock;
use tokio::sync::{Mutex, mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::announce::{Candidate, NodeId, World};
use crate::balancer_health::Wanted;
use crate::cluster::Cluster;
use crate::config::{Config, Tunnel};
use crate::dns::Upstream;
use crate::health::Status;
use crate::host;
use crate::node::{self, Node, ServiceRoute};
use crate::overlay;
use crate::plan::{self, Context};
use crate::proxy;
use crate::service::{Service, ServiceName, Slice};
use crate::watch::{Event, Kind};
use crate::wireguard;
use crate::worker::{Change, Job, MAX_TRIGGERS};

const EVENT_BATCH: usize = 4096;
const AUDIT_INTERVAL: Duration = Duration::from_secs(3);
const ANNOTATION_TIMEOUT: Duration = Duration::from_secs(5);
const HOST_AUDIT_INTERVAL: Duration = Duration::from_secs(30);
/// How soon after a change of the nodes WireGuard is asked who has answered, and how rarely in the end: the kernel tells
/// nobody.
const FIRST_CALL_CHECK: Duration = Duration::from_millis(50);
const LAST_CALL_CHECK: Duration = Duration::from_secs(10);
/// How long the other end of a tunnel may go on sending through VXLAN: it asks as rarely as this node.
const VXLAN_REST: Duration = Duration::from_secs(12);

/// The owner of the cluster's state.
pub struct Hub {
    config: Arc<Config>,
    /// One for each network of the configuration.
    contexts: Vec<Context>,
    cluster: Arc<RwLock<Cluster>>,
    status: Arc<Status>,
    jobs: mpsc::Sender<Job>,
    balancers: watch::Sender<Arc<Wanted>>,
    pod_cidrs: watch::Sender<Option<Vec<ipnet::IpNet>>>,
    enforced: watch::Receiver<Option<Vec<ipnet::IpNet>>>,
    nodes: HashMap<Arc<str>, Node>,
    listed: HashSet<Kind>,
    dirty: HashSet<ServiceName>,
    started: Timestamp,
    /// When the changes came about that have made something dirty.
    triggers: Vec<Timestamp>,
    /// What balancers are told, by Service.
    health_ports: BTreeMap<ServiceName, (u16, usize)>,
    /// Balancer addresses of ours, by Service, with the nodes that have endpoints where only those may announce them.
    announced: BTreeMap<ServiceName, Announced>,
    world: watch::Sender<Arc<World>>,
    /// With the right to annotate this node.
    nodes_api: kube::Api<core::Node>,
    /// Held while the Node is annotated.
    announcing: Arc<Mutex<()>>,
    upstream: Arc<Upstream>,
    /// For each network whether packets that only cross a bridge are out of sight.
    unseen: Vec<bool>,
}

/// Addresses of a Service, and who may announce them.
type Announced = (Vec<IpAddr>, Option<BTreeSet<NodeId>>);

/// Where a hub's results go.
pub struct Outputs {
    pub cluster: Arc<RwLock<Cluster>>,
    pub status: Arc<Status>,
    pub jobs: mpsc::Sender<Job>,
    pub balancers: watch::Sender<Arc<Wanted>>,
    /// The addresses of this node's pods, once the nodes are known.
    pub pod_cidrs: watch::Sender<Option<Vec<ipnet::IpNet>>>,
    /// For which of them network policies hold: pods may be started with those.
    pub enforced: watch::Receiver<Option<Vec<ipnet::IpNet>>>,
    /// Balancer addresses and the nodes that may announce them.
    pub world: watch::Sender<Arc<World>>,
    /// A client with the right to annotate this node.
    pub node_client: kube::Client,
    /// Told when stub domains change.
    pub upstream: Arc<Upstream>,
    /// For each network whether packets that only cross a bridge are out of sight.
    pub unseen: Vec<bool>,
}

impl Hub {
    pub fn new(config: Arc<Config>, outputs: Outputs) -> Hub {
        Hub {
            contexts: config.networks.iter().map(|network| Context::new(&config, network)).collect(),
            config,
            cluster: outputs.cluster,
            status: outputs.status,
            jobs: outputs.jobs,
            balancers: outputs.balancers,
            pod_cidrs: outputs.pod_cidrs,
            enforced: outputs.enforced,
            nodes: HashMap::new(),
            listed: HashSet::new(),
            dirty: HashSet::new(),
            started: Timestamp::now(),
            triggers: Vec::new(),
            health_ports: BTreeMap::new(),
            announced: BTreeMap::new(),
            world: outputs.world,
            nodes_api: kube::Api::all(outputs.node_client),
            announcing: Arc::default(),
            upstream: outputs.upstream,
            unseen: outputs.unseen,
        }
    }

    pub async fn run(
        mut self,
        mut events: mpsc::Receiver<Event>,
        mut changes: Option<watch::Receiver<Config>>,
        shutdown: CancellationToken,
    ) {
        // Before the first rules: who waits for those may count on the node's own way to Services too.
        let mut is_prepared = self.check_host().await;
        let [mut audit, mut host_audit] = [AUDIT_INTERVAL, HOST_AUDIT_INTERVAL].map(|period| {
            let mut ticks = interval_at(Instant::now() + period, period);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            ticks
        });
        let mut batch = Vec::with_capacity(EVENT_BATCH);
        let mut conflist_pending = false;
        let mut calls = Calls::default();
        loop {
            let nodes_changed = tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                // Before events, which may come without end: repairs are not to wait for quiet times.
                _ = audit.tick() => {
                    if self.look_at_bridges().await.is_err() {
                        return;
                    }
                    if !is_prepared {
                        is_prepared = self.check_host().await;
                    }
                    // A full queue means that the worker is busy, and the next tick is soon.
                    let _ = self.jobs.try_send(Job::Audit);
                    conflist_pending || self.lacks_conflist()
                }
                _ = host_audit.tick() => {
                    is_prepared = self.check_host().await;
                    true
                }
                count = events.recv_many(&mut batch, EVENT_BATCH) => {
                    if count == 0 {
                        return;
                    }
                    let nodes_changed = self.take(&mut batch);
                    if nodes_changed {
                        self.note_zone();
                        self.note_pod_cidrs();
                        self.note_leaving();
                    }
                    if self.apply().await.is_err() {
                        return;
                    }
                    if nodes_changed {
                        self.note_world();
                        calls.again();
                    }
                    nodes_changed
                }
                told = next_change(&mut changes) => {
                    if self.reconfigure(&told).await.is_err() {
                        return;
                    }
                    calls.again();
                    true
                }
                Ok(()) = self.enforced.changed() => true,
                () = sleep_until(calls.next.unwrap_or_else(Instant::now)), if calls.next.is_some() => {
                    // What fails now is tried again with the audits, which this is not to keep from their turn.
                    calls.next = None;
                    true
                }
            };
            if nodes_changed && self.listed.contains(&Kind::Nodes) {
                conflist_pending = !self.sync_nodes(&mut calls).await;
            }
        }
    }

    /// Goes by another configuration, as far as that can be without another start.
    async fn reconfigure(&mut self, told: &Config) -> Result<(), mpsc::error::SendError<Job>> {
        let (config, later) = self.config.with_changes_of(told);
        if !later.is_empty() {
            warn!(settings = later.join(", "), "changed settings that netproxy minds when it starts again");
        }
        if config == *self.config {
            return Ok(());
        }
        let stubs = match proxy::stub_domains(&config) {
            Ok(stubs) => stubs,
            Err(error) => {
                warn!(error = &error as &dyn std::error::Error, "the changed configuration is not used");
                return Ok(());
            }
        };
        self.upstream.set_stubs(stubs);
        self.jobs.send(Job::Configure(proxy::grounds(&config, &self.unseen))).await?;
        self.config = Arc::new(config);
        let zone = self.contexts.first().and_then(|context| context.zone.clone());
        let context = |network| Context { zone: zone.clone(), ..Context::new(&self.config, network) };
        self.contexts = self.config.networks.iter().map(context).collect();
        self.dirty.extend(self.cluster.read().names());
        info!("configuration changed");
        self.apply().await
    }

    /// Takes events in; says whether some were about nodes.
    fn take(&mut self, batch: &mut Vec<Event>) -> bool {
        let mut nodes_changed = false;
        let mut cluster = self.cluster.write();
        for event in batch.drain(..) {
            match event {
                Event::Service(name, service) => {
                    if cluster.set_service(&name, service.map(|service| *service)) {
                        self.dirty.insert(name);
                    }
                }
                Event::Slice(name, slice, trigger) => {
                    let is_other = cluster.set_slice(&name, slice, &mut self.dirty);
                    // What was there before this proxy did not wait for it.
                    let new = trigger.filter(|time| is_other && *time > self.started);
                    self.triggers.extend(new.filter(|_| self.triggers.len() < MAX_TRIGGERS));
                }
                Event::Node(name, node) => {
                    nodes_changed |= match node {
                        Some(node) => self.nodes.insert(name, node.clone()) != Some(node),
                        None => self.nodes.remove(&name).is_some(),
                    };
                }
                Event::Listed(kind) => {
                    self.listed.insert(kind);
                    if [Kind::Services, Kind::Slices].iter().all(|kind| self.listed.contains(kind)) {
                        cluster.set_listed();
                    }
                    nodes_changed |= kind == Kind::Nodes;
                }
            }
        }
        self.status.services.store(cluster.service_count() as u64, Ordering::Relaxed);
        nodes_changed
    }

    /// The node's zone decides which endpoints are near, for every Service.
    fn note_zone(&mut self) {
        let zone = self.nodes.get(self.config.node_name.as_str()).and_then(|node| node.zone.clone());
        if self.contexts.iter().all(|context| context.zone == zone) {
            return;
        }
        info!(?zone, "zone of this node");
        self.contexts.iter_mut().for_each(|context| context.zone = zone.clone());
        self.dirty.extend(self.cluster.read().names());
    }

    fn note_leaving(&self) {
        let leaving = self.nodes.get(self.config.node_name.as_str()).is_some_and(|own| own.leaving);
        self.status.leaving.store(leaving, Ordering::Relaxed);
    }

    fn note_pod_cidrs(&self) {
        if !self.listed.contains(&Kind::Nodes) {
            return;
        }
        let cidrs = self.nodes.get(self.config.node_name.as_str()).map(|node| node.pod_cidrs.clone());
        self.pod_cidrs.send_if_modified(|known| {
            let cidrs = Some(cidrs.unwrap_or_default());
            let changed = *known != cidrs;
            *known = cidrs;
            changed
        });
    }

    /// What the announcers go by.
    fn note_world(&self) {
        let mut world = World::default();
        for (addresses, only) in self.announced.values() {
            // Services that share an address have the same policy and endpoints; where they do not yet, the first by name decides.
            for address in addresses {
                world.addresses.entry(*address).or_insert_with(|| only.clone());
            }
        }
        if !world.addresses.is_empty() {
            let nodes = self.nodes.iter().filter(|(_, node)| node.takes_traffic);
            let candidate =
                |(name, node): (&Arc<str>, &Node)| Candidate { name: name.clone(), internal: node.internal.clone() };
            world.nodes = nodes.map(candidate).collect();
            world.nodes.sort_by(|a, b| a.name.cmp(&b.name));
        }
        self.world.send_if_modified(|known| {
            let changed = **known != world;
            *known = Arc::new(world);
            changed
        });
    }

    /// Plans what is dirty and hands it on. Nothing is planned before everything is known: a proxy that starts must not take
    /// away what it has not heard of yet.
    async fn apply(&mut self) -> Result<(), mpsc::error::SendError<Job>> {
        let complete = [Kind::Services, Kind::Slices, Kind::Nodes].iter().all(|kind| self.listed.contains(kind));
        let started = self.status.queued_at.load(Ordering::Relaxed) != 0;
        if !complete || (started && self.dirty.is_empty()) {
            return Ok(());
        }
        let mut planned = Vec::with_capacity(self.dirty.len());
        let mut balancers_changed = false;
        let mut announced_changed = false;
        {
            let cluster = self.cluster.read();
            for name in self.dirty.drain() {
                let slices: Vec<_> = cluster.slices(&name).collect();
                let service = cluster.service(&name);
                let entries = |context| service.map(|service| plan::service(service, &slices, context));
                let by_family = self.contexts.iter().map(|context| entries(context).unwrap_or_default()).collect();
                let port = service.filter(|service| !service.other_proxy).and_then(|one| one.health_check_port);
                let told = port.map(|port| (port, plan::local_endpoints(&slices)));
                balancers_changed |= match told {
                    Some(told) => self.health_ports.insert(name.clone(), told) != Some(told),
                    None => self.health_ports.remove(&name).is_some(),
                };
                let announced = service.and_then(|service| announced(&self.config, service, &slices));
                announced_changed |= match announced {
                    Some(announced) => self.announced.insert(name.clone(), announced.clone()) != Some(announced),
                    None => self.announced.remove(&name).is_some(),
                };
                planned.push((name, by_family));
            }
        }
        if announced_changed {
            self.note_world();
        }
        if balancers_changed || self.balancers.borrow().networks != self.config.node_port_addresses {
            let by_port = |(name, (port, count)): (&ServiceName, &(u16, usize))| (*port, (name.clone(), *count));
            let ports = self.health_ports.iter().map(by_port).collect();
            self.balancers.send_replace(Arc::new(Wanted { ports, networks: self.config.node_port_addresses.clone() }));
        }
        let (number, triggers) = (self.status.queued(), std::mem::take(&mut self.triggers));
        self.jobs.send(Job::Apply(Change { services: planned, number, triggers })).await?;
        Ok(())
    }

    /// The CNI configuration and the routes to other nodes; says whether all of it could be done.
    async fn sync_nodes(&self, calls: &mut Calls) -> bool {
        let config = self.config.clone();
        let keeps_vxlan = calls.keeps_vxlan();
        let enforced = self.enforced.borrow().clone();
        let mut answers = std::mem::take(&mut calls.answers);
        let own = self.nodes.get(config.node_name.as_str()).cloned();
        let others: BTreeMap<String, Node> = self
            .nodes
            .iter()
            .filter(|(name, _)| name.as_ref() != config.node_name && config.tunnel != Tunnel::None)
            .map(|(name, node)| (name.to_string(), node.clone()))
            .collect();
        let work = move || {
            let mut complete = true;
            let mut mtu = 0;
            let cluster: Vec<_> = config.networks.iter().map(|network| network.cluster_cidr).collect();
            let this = overlay::Own {
                name: &config.node_name,
                node: own.as_ref(),
                tunnel: config.tunnel,
                wireguard_key: config.wireguard_key.as_deref(),
                keeps_vxlan,
                cluster: &cluster,
            };
            let mut key = None;
            let mut peers = None;
            match overlay::sync(this, &others, &mut answers) {
                Ok(synced) => {
                    (mtu, key) = (synced.mtu, synced.wireguard_key);
                    peers = Some((synced.secure, synced.called));
                    if synced.changed > 0 {
                        info!(changed = synced.changed, "ways to other nodes changed");
                    }
                }
                Err(error) => {
                    warn!(
                        error = &error as &dyn std::error::Error,
                        "routes to other nodes cannot be set; trying again"
                    );
                    complete = false;
                }
            }
            // A pod that starts by the configuration is isolated from its beginning.
            let own = own.filter(|own| !own.pod_cidrs.is_empty() && enforced.as_ref() == Some(&own.pod_cidrs));
            let written = match (&config.cni_conf_dir, own) {
                (Some(directory), _) if config.tunnel == Tunnel::None => node::remove_conflist(directory),
                // How large packets may be is not known now; who wrote it knew.
                (Some(directory), Some(_)) if !complete && directory.join(node::CONFLIST).exists() => Ok(()),
                (Some(directory), Some(own)) => {
                    let content = node::conflist(&own.pod_cidrs, &cluster, &config.cni_state_dir, mtu);
                    node::write_conflist(directory, &content).map(|written| {
                        if written {
                            info!(pod_cidrs = ?own.pod_cidrs, "CNI configuration written");
                        }
                    })
                }
                _ => Ok(()),
            };
            if let Err(error) = written {
                warn!(error = &error as &dyn std::error::Error, "CNI configuration cannot be written; trying again");
                complete = false;
            }
            (complete, key, peers, answers)
        };
        let Ok((complete, key, peers, answers)) = tokio::task::spawn_blocking(work).await else { return false };
        calls.answers = answers;
        if let Some((secure, called)) = peers {
            calls.done(secure, called);
        }
        complete & self.announce_key(key)
    }

    /// Tells the other nodes with which key this one can be reached; says whether they know.
    fn announce_key(&self, key: Option<WireguardKey>) -> bool {
        let Some(own) = self.nodes.get(self.config.node_name.as_str()).filter(|own| own.wireguard_key != key) else {
            return true;
        };
        // Services shall not wait for that, and the Node tells when it is done.
        if let Ok(turn) = self.announcing.clone().try_lock_owned() {
            let (nodes, name, had) =
                (self.nodes_api.clone(), self.config.node_name.clone(), own.wireguard_key.is_some());
            tokio::spawn(async move {
                announce(&nodes, &name, key, had).await;
                drop(turn);
            });
        }
        false
    }

    /// Others may have put bridged packets out of sight, and policies with them; or the kernel can show them only now.
    async fn look_at_bridges(&mut self) -> Result<(), mpsc::error::SendError<Job>> {
        let record = self.config.sysctl_record.as_deref();
        let unseen = self.config.networks.iter().map(|network| !host::see_bridged(network.is_ipv4(), record));
        let unseen: Vec<bool> = unseen.collect();
        if unseen == self.unseen {
            return Ok(());
        }
        info!(out_of_sight = unseen.contains(&true), "whether bridged packets are seen has changed");
        self.unseen = unseen;
        self.jobs.send(Job::Configure(proxy::grounds(&self.config, &self.unseen))).await?;
        // Before the first Services the commit is theirs: nothing is to be taken away that has not been heard of yet.
        if self.status.queued_at.load(Ordering::Relaxed) == 0 {
            return Ok(());
        }
        self.jobs.send(Job::Apply(Change { number: self.status.queued(), ..Change::default() })).await
    }

    /// Whether somebody took the CNI configuration away, so that no pod can start.
    fn lacks_conflist(&self) -> bool {
        let has = |directory: &std::path::PathBuf| directory.join(node::CONFLIST).exists();
        let wanted = self.config.cni_conf_dir.as_ref().filter(|_| self.config.tunnel != Tunnel::None);
        self.enforced.borrow().is_some() && wanted.is_some_and(|directory| !has(directory))
    }

    /// What others may have taken from the host meanwhile. Says whether the host has now all that it should.
    async fn check_host(&self) -> bool {
        let config = self.config.clone();
        let work = move || {
            let check = |network| check_network(network, config.sysctl_record.as_deref());
            config.networks.iter().map(check).collect::<Result<Vec<bool>, _>>()
        };
        match tokio::task::spawn_blocking(work).await {
            Ok(Ok(prepared)) => {
                debug!("host checked");
                !prepared.contains(&false)
            }
            Ok(Err(error)) => {
                warn!(error = &error as &dyn std::error::Error, "forwarding cannot be switched on");
                true
            }
            Err(_panicked) => true,
        }
    }
}

/// Waits for another configuration, for ever where none can come.
async fn next_change(changes: &mut Option<watch::Receiver<Config>>) -> Config {
    if let Some(receiver) = changes {
        if receiver.changed().await.is_ok() {
            return receiver.borrow_and_update().clone();
        }
        *changes = None;
    }
    std::future::pending().await
}

/// Peers of WireGuard that are called, and when to look next.
#[derive(Debug, Default)]
struct Calls {
    next: Option<Instant>,
    delay: Duration,
    called: usize,
    secure: usize,
    /// Until when VXLAN devices stay for the sake of others.
    vxlan_until: Option<Instant>,
    answers: wireguard::Answers,
}

impl Calls {
    /// Nodes have changed, so answers may come soon.
    fn again(&mut self) {
        self.delay = Duration::ZERO;
    }

    fn keeps_vxlan(&self) -> bool {
        self.called > 0 || self.vxlan_until.is_some_and(|until| Instant::now() < until)
    }

    /// What there is now: peers that packets go to, and such as have not answered.
    fn done(&mut self, secure: usize, called: usize) {
        let now = Instant::now();
        if called < self.called {
            info!(secure, called, "nodes answer through WireGuard");
            self.vxlan_until = Some(now + VXLAN_REST);
        }
        if called > self.called && secure < self.secure {
            warn!(secure, called, "nodes do not answer through WireGuard any more: VXLAN takes over, in plain sight");
        }
        (self.called, self.secure) = (called, secure);
        self.vxlan_until = self.vxlan_until.filter(|until| now < *until);
        self.delay = (self.delay * 2).clamp(FIRST_CALL_CHECK, LAST_CALL_CHECK);
        self.next = if called > 0 { Some(now + self.delay) } else { self.vxlan_until };
    }
}

/// Annotates the Node with the key that it can be reached with, or with none.
async fn announce(nodes: &kube::Api<core::Node>, name: &str, key: Option<WireguardKey>, had: bool) {
    let text = key.as_ref().map(wireguard::key_text);
    let patch = serde_json::json!({"metadata": {"annotations": {wireguard::ANNOTATION: text}}});
    let (parameters, patch) = (kube::api::PatchParams::default(), kube::api::Patch::Merge(&patch));
    match tokio::time::timeout(ANNOTATION_TIMEOUT, nodes.patch_metadata(name, &parameters, &patch)).await {
        Ok(Ok(_)) => info!(had, has = key.is_some(), "WireGuard key of this node announced"),
        Ok(Err(error)) => {
            warn!(error = &error as &dyn std::error::Error, "WireGuard key cannot be announced; trying again")
        }
        Err(_elapsed) => warn!("WireGuard key cannot be announced in time; trying again"),
    }
}

/// The addresses of a Service that the nodes announce, if there are any.
fn announced(config: &Config, service: &Service, slices: &[&Slice]) -> Option<Announced> {
    let is_ours = service.balancer_class.as_deref().is_none_or(|class| class == config.balancer_class);
    let in_pool = |address: &&IpAddr| config.balancer_pools.iter().any(|pool| pool.contains(*address));
    let addresses: Vec<IpAddr> =
        service.ingress.iter().filter(|_| is_ours && !service.other_proxy).filter(in_pool).copied().collect();
    let only = service.external_local.then(|| {
        let endpoints = slices.iter().flat_map(|slice| &slice.endpoints);
        endpoints.filter(|endpoint| endpoint.ready).filter_map(|endpoint| endpoint.node).collect()
    });
    (!addresses.is_empty()).then_some((addresses, only))
}

/// Says whether Service addresses have a route, or need none.
fn check_network(network: &crate::Network, record: Option<&std::path::Path>) -> Result<bool, host::SysctlError> {
    let service_cidr = network.service_cidr;
    let route = network.node_ip.map(|node_ip| node::ensure_service_route(service_cidr, node_ip));
    let is_reachable = match route.transpose() {
        Ok(Some(ServiceRoute::Added)) => {
            info!(%service_cidr, "route to Service addresses added");
            true
        }
        Ok(None | Some(ServiceRoute::Covered)) => true,
        Ok(Some(ServiceRoute::NoLink)) => false,
        Err(error) => {
            warn!(error = &error as &dyn std::error::Error, "route to Service addresses cannot be set");
            true
        }
    };
    if let Err(error) = ensure_dns_address(network.cluster_dns) {
        warn!(error = &error as &dyn std::error::Error, "cluster DNS address cannot be set");
    }
    host::enable_forwarding(network.is_ipv4(), record).map(|()| is_reachable)
}

/// Puts the cluster DNS address on this node.
pub fn ensure_dns_address(address: std::net::IpAddr) -> oarlock_netlink::Result<()> {
    Connection::open(NetlinkProtocol::Route)?.ensure_node_address(address)
}
