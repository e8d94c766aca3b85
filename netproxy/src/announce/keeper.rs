//! Who announces what, kept up to date: the election with those that live, this node's Lease, and its responders.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ipnet::IpNet;
use k8s_openapi::api::coordination::v1::Lease;
use kube::Api;
use kube::runtime::watcher;
use oarlock_netlink::{Connection, Protocol};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{info, warn};

use super::elect::{World, ranked};
use super::lease::{self, Liveness, Seen};
use super::responder::{self, Port};
use crate::health::Status;
use crate::watch as watches;

const LOOK_INTERVAL: Duration = Duration::from_secs(1);
const LINKS_INTERVAL: Duration = Duration::from_secs(10);
const EVENT_QUEUE: usize = 256;

/// Who this node is.
#[derive(Debug, Clone)]
pub struct Identity {
    pub name: Arc<str>,
    /// The node's addresses, by which its link is found when an address is on no network of a link.
    pub addresses: Vec<IpAddr>,
}

/// A link that addresses can be announced on.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Segment {
    network: IpNet,
    port: Port,
}

/// A responder and what it is told; it ends with this.
struct Responder {
    addresses: watch::Sender<BTreeSet<IpAddr>>,
    _end: DropGuard,
}

struct Keeper {
    identity: Identity,
    leases: Api<Lease>,
    liveness: Liveness,
    segments: Vec<Segment>,
    responders: BTreeMap<Port, Responder>,
    own: BTreeSet<IpAddr>,
    renewed: Option<Instant>,
    renewal_failed: bool,
}

/// Keeps this node's part of `world` announced until shutdown.
pub async fn run(
    identity: Identity,
    client: kube::Client,
    mut world: watch::Receiver<Arc<World>>,
    status: Arc<Status>,
    shutdown: CancellationToken,
) {
    let leases: Api<Lease> = Api::namespaced(client, lease::NAMESPACE);
    let (seen_in, mut seen) = mpsc::channel::<Option<Seen>>(EVENT_QUEUE);
    let mut watching = None;
    let mut keeper = Keeper {
        identity,
        leases: leases.clone(),
        liveness: Liveness::default(),
        segments: Vec::new(),
        responders: BTreeMap::new(),
        own: BTreeSet::new(),
        renewed: None,
        renewal_failed: false,
    };
    let mut look = interval(LOOK_INTERVAL);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut looked_at_links: Option<Instant> = None;
    loop {
        let is_idle = keeper.own.is_empty() && world.borrow().addresses.is_empty();
        tokio::select! {
            changed = world.changed() => if changed.is_err() { return },
            event = seen.recv() => {
                if let Some(Some((node, renewal))) = event {
                    keeper.liveness.hear(&node, renewal, Instant::now());
                }
                continue;
            }
            _ = look.tick(), if !is_idle => {}
            () = shutdown.cancelled() => return,
        }
        let now = world.borrow_and_update().clone();
        if now.addresses.is_empty() && keeper.own.is_empty() {
            continue;
        }
        // Nobody's Lease matters before there is something to announce.
        watching.get_or_insert_with(|| {
            tokio::spawn(watch_leases(leases.clone(), seen_in.clone(), shutdown.clone()));
        });
        if looked_at_links.is_none_or(|last| last.elapsed() >= LINKS_INTERVAL) {
            looked_at_links = Some(Instant::now());
            keeper.look_at_links().await;
        }
        let own = keeper.elect(&now).await;
        keeper.announce(&own, &shutdown);
        status.announced.store(own.len() as u64, Ordering::Relaxed);
        keeper.own = own;
        keeper.renew().await;
    }
}

async fn watch_leases(api: Api<Lease>, seen: mpsc::Sender<Option<Seen>>, shutdown: CancellationToken) {
    let config = watcher::Config::default().labels(&format!("{}=true", lease::LABEL));
    let event = |node: Arc<str>, lease: Option<Lease>| Some((node, lease.as_ref().and_then(lease::renewal)));
    watches::run_with((api, config), None, lease::holder, event, seen, shutdown).await;
}

impl Keeper {
    async fn look_at_links(&mut self) {
        match tokio::task::spawn_blocking(segments).await {
            Ok(Ok(segments)) => self.segments = segments,
            Ok(Err(error)) => {
                warn!(error = &error as &dyn std::error::Error, "links for balancer addresses cannot be listed")
            }
            Err(_) => {}
        }
    }

    /// The segment that an address belongs to: the one that has it, or else that of the node's own address.
    fn segment(&self, address: IpAddr) -> Option<&Segment> {
        let having = |address: IpAddr| {
            let all = self.segments.iter().filter(move |segment| segment.network.contains(&address));
            all.max_by_key(|segment| segment.network.prefix_len())
        };
        let own = self.identity.addresses.iter().find(|own| own.is_ipv4() == address.is_ipv4());
        having(address).or_else(|| having(*own?))
    }

    /// The addresses that are this node's to announce. A better node is passed over only once the API itself says that its
    /// Lease is not renewed; without an answer everything stays as it is.
    async fn elect(&mut self, world: &World) -> BTreeSet<IpAddr> {
        let mut own = BTreeSet::new();
        let mut dead: HashSet<Arc<str>> = HashSet::new();
        for address in world.addresses.keys() {
            let Some(segment) = self.segment(*address) else { continue };
            for node in ranked(world, *address, segment.network) {
                if node.name == self.identity.name {
                    own.insert(*address);
                    break;
                }
                if !dead.contains(&node.name) && self.lives(&node.name).await {
                    break;
                }
                dead.insert(node.name.clone());
            }
        }
        self.liveness.keep_only(|name| world.nodes.iter().any(|node| node.name.as_ref() == name));
        own
    }

    async fn lives(&mut self, node: &Arc<str>) -> bool {
        if self.liveness.is_alive(node, Instant::now()) {
            return true;
        }
        match lease::ask(&self.leases, node).await {
            Ok(renewal) => self.liveness.hear(node, renewal, Instant::now()),
            Err(()) => {
                self.liveness.trust(node, Instant::now());
                true
            }
        }
    }

    /// Gives each link's responder its addresses, and starts and ends responders.
    fn announce(&mut self, own: &BTreeSet<IpAddr>, shutdown: &CancellationToken) {
        for address in own.difference(&self.own) {
            info!(%address, "balancer address is announced by this node");
        }
        for address in self.own.difference(own) {
            info!(%address, "balancer address is not announced by this node any more");
        }
        let mut by_port: BTreeMap<Port, BTreeSet<IpAddr>> = BTreeMap::new();
        for address in own {
            if let Some(segment) = self.segment(*address) {
                by_port.entry(segment.port).or_default().insert(*address);
            }
        }
        self.responders.retain(|port, _| by_port.contains_key(port));
        for (port, addresses) in by_port {
            let responder = self.responders.entry(port).or_insert_with(|| {
                let (sender, receiver) = watch::channel(BTreeSet::new());
                let end = shutdown.child_token();
                tokio::spawn(end.clone().run_until_cancelled_owned(responder::run(port, receiver)));
                Responder { addresses: sender, _end: end.drop_guard() }
            });
            responder.addresses.send_if_modified(|known| {
                let changed = *known != addresses;
                *known = addresses;
                changed
            });
        }
    }

    async fn renew(&mut self) {
        if self.own.is_empty() || self.renewed.is_some_and(|last| last.elapsed() < lease::RENEW_INTERVAL) {
            return;
        }
        match lease::renew(&self.leases, &self.identity.name).await {
            Ok(()) => {
                self.renewed = Some(Instant::now());
                self.renewal_failed = false;
            }
            Err(error) => {
                if !std::mem::replace(&mut self.renewal_failed, true) {
                    warn!(
                        error = &error as &dyn std::error::Error,
                        "announcer's Lease cannot be renewed; trying again"
                    );
                }
            }
        }
    }
}

/// The Ethernet links with networks, without those that are the cluster's own.
fn segments() -> oarlock_netlink::Result<Vec<Segment>> {
    let mut connection = Connection::open(Protocol::Route)?;
    let links = connection.links()?;
    let mut segments = Vec::new();
    for address in connection.addresses()? {
        let is_network = address.net.prefix_len() < address.net.max_prefix_len();
        let is_link_local = matches!(address.net, IpNet::V6(net) if net.addr().is_unicast_link_local());
        let link = links.iter().find(|link| link.index == address.link);
        let Some((link, mac)) = link.and_then(|link| Some((link, link.mac?))) else { continue };
        if link.up && is_network && !is_link_local && !crate::node::is_cluster_link(&link.name) {
            segments.push(Segment { network: address.net, port: Port { link: link.index, mac } });
        }
    }
    Ok(segments)
}
