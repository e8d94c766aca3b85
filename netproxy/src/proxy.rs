//! The parts put together: watches → cluster state → jobs for the worker, DNS, node configuration.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hickory_proto::rr::Name;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::api::{Api, PostParams};
use oarlock_netlink::{Connection, Protocol as NetlinkProtocol};
use oarlock_nft::{Family, Netlink, NftError, Table};
use oarlock_supervise::{TaskError, Tasks};
use parking_lot::RwLock;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::cluster::Cluster;
use crate::config::Config;
use crate::conntrack::Scope;
use crate::dns::{DnsServer, Upstream, Zone};
use crate::health::{self, Status};
use crate::host::{self, SysctlError};
use crate::node::{self, Node};
use crate::plan::{self, Context};
use crate::rules::Settings;
use crate::service::ServiceName;
use crate::sync::Proxier;
use crate::watch as watches;
use crate::watch::{Event, Kind};
use crate::worker::{self, Job};

const EVENT_QUEUE: usize = 4096;
const EVENT_BATCH: usize = 4096;
const JOB_QUEUE: usize = 16;
const AUDIT_INTERVAL: Duration = Duration::from_secs(3);
const HOST_AUDIT_INTERVAL: Duration = Duration::from_secs(30);
const RETRY_INTERVAL: Duration = Duration::from_secs(2);
const DRAIN: Duration = Duration::from_secs(5);
const DNS_PORT: u16 = 53;
const DNS_NAMESPACE: &str = "kube-system";
const DNS_SERVICE: &str = "kube-dns";

/// Why the proxy ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("cluster domain {domain:?} is not a domain name")]
    Domain { domain: String, source: hickory_proto::ProtoError },
    #[error("cannot prepare the node for forwarding")]
    Forwarding(#[source] SysctlError),
    #[error("cannot use nftables")]
    Nftables(#[source] NftError),
    #[error("netproxy")]
    Task(#[source] TaskError),
}

/// The Service proxy.
pub struct Netproxy {
    config: Config,
    client: kube::Client,
    status: Arc<Status>,
}

impl Netproxy {
    pub fn new(config: Config, client: kube::Client) -> Netproxy {
        Netproxy { config, client, status: Arc::default() }
    }

    /// Becomes true with the first commit: from then on Services work and names are answered.
    pub fn ready(&self) -> watch::Receiver<bool> {
        self.status.ready.subscribe()
    }

    /// Works until `shutdown`. The rules stay in the kernel, so that connections do not notice a restart;
    /// [`crate::remove_everything`] takes them away.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), Error> {
        let Netproxy { config, client, status } = self;
        let config = Arc::new(config);
        let is_ipv4 = config.service_cidr.addr().is_ipv4();
        let domain = parse_domain(&config.cluster_domain)?;
        host::enable_forwarding(is_ipv4).map_err(Error::Forwarding)?;
        let masquerade_bridged = !host::enable_bridge_filtering(is_ipv4);
        let settings = Settings {
            table: table(&config),
            cluster_cidr: config.cluster_cidr,
            service_cidr: config.service_cidr,
            dns_address: Some(config.cluster_dns),
            masquerade_bridged,
        };
        let kernel = Netlink::open().map_err(Error::Nftables)?;
        let cluster = Arc::new(RwLock::new(Cluster::default()));
        let (events_in, events) = mpsc::channel(EVENT_QUEUE);
        let (jobs_in, jobs) = mpsc::channel(JOB_QUEUE);
        let zone = Zone {
            domain,
            cluster_cidr: config.cluster_cidr,
            service_cidr: config.service_cidr,
            dns_address: config.cluster_dns,
        };
        let upstream = Upstream::new(&config.upstream_resolv_conf, config.cluster_dns);
        let dns = Arc::new(DnsServer::new(zone, cluster.clone(), upstream));

        let mut tasks = Tasks::new(shutdown.child_token());
        let token = tasks.token();
        tasks.spawn("service watch", infallible(watches::services(client.clone(), events_in.clone(), token.clone())));
        let own_node = config.node_name.clone();
        tasks.spawn(
            "slice watch",
            infallible(watches::slices(client.clone(), own_node, events_in.clone(), token.clone())),
        );
        tasks.spawn("node watch", infallible(watches::nodes(client.clone(), events_in, token.clone())));
        let proxier = Proxier::new(kernel, settings);
        let scope = Scope {
            service_cidr: config.service_cidr,
            cluster_cidr: config.cluster_cidr,
            dns_address: Some(config.cluster_dns),
            node_ports: config.node_port_range,
        };
        let worker_status = status.clone();
        let worker = tokio::task::spawn_blocking(move || worker::run(proxier, &scope, &worker_status, jobs));
        tasks.spawn("nftables worker", worker);
        let hub = Hub {
            config: config.clone(),
            context: Context { is_ipv4, dns_address: Some(config.cluster_dns) },
            cluster,
            status: status.clone(),
            jobs: jobs_in,
            nodes: HashMap::new(),
            listed: HashSet::new(),
            dirty: HashSet::new(),
        };
        tasks.spawn("hub", infallible(hub.run(events, token.clone())));
        tasks.spawn("cluster DNS", infallible(serve_dns(dns.clone(), config.cluster_dns, token.clone())));
        tasks.spawn("DNS Service", infallible(keep_dns_service(client, config.cluster_dns, token.clone())));
        tasks.spawn("health", health::run(config.health_listen, status, dns, token));
        tasks.join(DRAIN).await.map_err(Error::Task)
    }
}

pub fn table(config: &Config) -> Table {
    let family = if config.service_cidr.addr().is_ipv4() { Family::Ip } else { Family::Ip6 };
    Table::new(family, config.table_name.clone())
}

async fn infallible(task: impl Future<Output = ()>) -> Result<(), std::convert::Infallible> {
    task.await;
    Ok(())
}

fn parse_domain(domain: &str) -> Result<Name, Error> {
    let parsed = Name::from_ascii(domain.trim_end_matches('.'));
    let mut name = parsed.map_err(|source| Error::Domain { domain: domain.to_owned(), source })?;
    name.set_fqdn(true);
    Ok(name.to_lowercase())
}

/// The owner of the cluster's state.
struct Hub {
    config: Arc<Config>,
    context: Context,
    cluster: Arc<RwLock<Cluster>>,
    status: Arc<Status>,
    jobs: mpsc::Sender<Job>,
    nodes: HashMap<Arc<str>, Node>,
    listed: HashSet<Kind>,
    dirty: HashSet<ServiceName>,
}

impl Hub {
    async fn run(mut self, mut events: mpsc::Receiver<Event>, shutdown: CancellationToken) {
        let mut audit = tokio::time::interval(AUDIT_INTERVAL);
        let mut host_audit = tokio::time::interval(HOST_AUDIT_INTERVAL);
        let mut batch = Vec::with_capacity(EVENT_BATCH);
        let mut conflist_pending = false;
        loop {
            let nodes_changed = tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                count = events.recv_many(&mut batch, EVENT_BATCH) => {
                    if count == 0 {
                        return;
                    }
                    let nodes_changed = self.take(&mut batch);
                    if self.apply().await.is_err() {
                        return;
                    }
                    nodes_changed
                }
                _ = audit.tick() => {
                    // A full queue means that the worker is busy, and the next tick is soon.
                    let _ = self.jobs.try_send(Job::Audit);
                    conflist_pending
                }
                _ = host_audit.tick() => {
                    self.check_host().await;
                    true
                }
            };
            if nodes_changed && self.listed.contains(&Kind::Nodes) {
                conflist_pending = !self.sync_nodes().await;
            }
        }
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
                Event::Slice(name, slice) => cluster.set_slice(&name, slice, &mut self.dirty),
                Event::Node(name, node) => {
                    nodes_changed |= match node {
                        Some(node) => self.nodes.insert(name, node.clone()) != Some(node),
                        None => self.nodes.remove(&name).is_some(),
                    };
                }
                Event::Listed(kind) => {
                    self.listed.insert(kind);
                    nodes_changed |= kind == Kind::Nodes;
                }
            }
        }
        self.status.services.store(cluster.service_count() as u64, Ordering::Relaxed);
        nodes_changed
    }

    /// Plans what is dirty and hands it on. Nothing is planned before everything is known: a proxy that starts must not take
    /// away what it has not heard of yet.
    async fn apply(&mut self) -> Result<(), mpsc::error::SendError<Job>> {
        let complete = self.listed.contains(&Kind::Services) && self.listed.contains(&Kind::Slices);
        let started = self.status.queued_at.load(Ordering::Relaxed) != 0;
        if !complete || (started && self.dirty.is_empty()) {
            return Ok(());
        }
        let planned = {
            let cluster = self.cluster.read();
            let plan = |name: ServiceName| {
                let slices: Vec<_> = cluster.slices(&name).collect();
                let entries = cluster.service(&name).map(|service| plan::service(service, &slices, &self.context));
                (name, entries.unwrap_or_default())
            };
            self.dirty.drain().map(plan).collect::<Vec<_>>()
        };
        self.status.queued();
        self.jobs.send(Job::Apply(planned)).await?;
        Ok(())
    }

    /// The CNI configuration and the routes to other nodes; says whether all of it could be done.
    async fn sync_nodes(&self) -> bool {
        let config = self.config.clone();
        let own = self.nodes.get(config.node_name.as_str()).cloned();
        let mut others: Vec<(Arc<str>, Node)> = self
            .nodes
            .iter()
            .filter(|(name, _)| name.as_ref() != config.node_name)
            .map(|(a, b)| (a.clone(), b.clone()))
            .collect();
        others.sort_by(|a, b| a.0.cmp(&b.0));
        let others: Vec<Node> = others.into_iter().map(|(_, node)| node).collect();
        let work = move || {
            let mut complete = true;
            if let (Some(directory), Some(own)) = (&config.cni_conf_dir, own.filter(|own| !own.pod_cidrs.is_empty())) {
                let content = node::conflist(&own.pod_cidrs, config.cluster_cidr, &config.cni_state_dir);
                match node::write_conflist(directory, &content) {
                    Ok(true) => info!(pod_cidrs = ?own.pod_cidrs, "CNI configuration written"),
                    Ok(false) => {}
                    Err(error) => {
                        warn!(
                            error = &error as &dyn std::error::Error,
                            "CNI configuration cannot be written; trying again"
                        );
                        complete = false;
                    }
                }
            }
            match node::sync_routes(&others) {
                Ok(0) => {}
                Ok(changed) => info!(changed, "routes to other nodes changed"),
                Err(error) => {
                    warn!(
                        error = &error as &dyn std::error::Error,
                        "routes to other nodes cannot be set; trying again"
                    );
                    complete = false;
                }
            }
            complete
        };
        tokio::task::spawn_blocking(work).await.unwrap_or(false)
    }

    /// What others may have taken from the host meanwhile.
    async fn check_host(&self) {
        let (service_cidr, dns, node_ip) = (self.config.service_cidr, self.config.cluster_dns, self.config.node_ip);
        let work = move || {
            match node::ensure_service_route(service_cidr, node_ip) {
                Ok(true) => info!(%service_cidr, "route to Service addresses added"),
                Ok(false) => {}
                Err(error) => {
                    warn!(error = &error as &dyn std::error::Error, "route to Service addresses cannot be set")
                }
            }
            if let Err(error) = ensure_dns_address(dns) {
                warn!(error = &error as &dyn std::error::Error, "cluster DNS address cannot be set");
            }
            host::enable_forwarding(service_cidr.addr().is_ipv4())
        };
        match tokio::task::spawn_blocking(work).await {
            Ok(Err(error)) => warn!(error = &error as &dyn std::error::Error, "forwarding cannot be switched on"),
            _ => debug!("host checked"),
        }
    }
}

fn ensure_dns_address(address: std::net::IpAddr) -> oarlock_netlink::Result<()> {
    Connection::open(NetlinkProtocol::Route)?.ensure_node_address(address)
}

/// Serves cluster DNS, and tries again when another program has the port.
async fn serve_dns(dns: Arc<DnsServer>, address: std::net::IpAddr, shutdown: CancellationToken) {
    while !shutdown.is_cancelled() {
        let prepared = tokio::task::spawn_blocking(move || ensure_dns_address(address)).await;
        if let Ok(Err(error)) = prepared {
            warn!(error = &error as &dyn std::error::Error, "cluster DNS address cannot be set; trying again");
        } else if let Err(error) = dns.clone().run((address, DNS_PORT).into(), shutdown.clone()).await {
            warn!(error = &error as &dyn std::error::Error, "cluster DNS cannot be served; trying again");
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY_INTERVAL) => {}
            () = shutdown.cancelled() => {}
        }
    }
}

/// Makes the DNS Service unless it exists; its selector lets an installed CoreDNS take over.
async fn keep_dns_service(client: kube::Client, address: std::net::IpAddr, shutdown: CancellationToken) {
    const FORBIDDEN: u16 = 403;
    const CONFLICT: u16 = 409;
    let api: Api<core::Service> = Api::namespaced(client, DNS_NAMESPACE);
    let mut told = false;
    loop {
        let outcome = async {
            let named = kube::api::ListParams::default().fields(&format!("metadata.name={DNS_SERVICE}"));
            match api.list(&named).await?.items.is_empty() {
                false => Ok(None),
                true => api.create(&PostParams::default(), &dns_service(address)).await.map(Some),
            }
        };
        match outcome.await {
            Ok(None) => break,
            Ok(Some(_)) => {
                info!(service = DNS_SERVICE, %address, "cluster DNS Service made");
                break;
            }
            Err(kube::Error::Api(status)) if status.code == CONFLICT => break,
            Err(error) => {
                let forbidden = matches!(&error, kube::Error::Api(status) if status.code == FORBIDDEN);
                if !std::mem::replace(&mut told, true) {
                    warn!(error = &error as &dyn std::error::Error, "cluster DNS Service cannot be made");
                }
                if forbidden {
                    break;
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY_INTERVAL) => {}
            () = shutdown.cancelled() => return,
        }
    }
    shutdown.cancelled().await;
}

fn dns_service(address: std::net::IpAddr) -> core::Service {
    let pairs = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    };
    let port = |name: &str, protocol: &str| core::ServicePort {
        name: Some(name.to_owned()),
        protocol: Some(protocol.to_owned()),
        port: i32::from(DNS_PORT),
        target_port: Some(IntOrString::Int(i32::from(DNS_PORT))),
        ..core::ServicePort::default()
    };
    core::Service {
        metadata: ObjectMeta {
            name: Some(DNS_SERVICE.to_owned()),
            namespace: Some(DNS_NAMESPACE.to_owned()),
            labels: Some(pairs(&[
                ("k8s-app", "kube-dns"),
                ("kubernetes.io/cluster-service", "true"),
                ("kubernetes.io/name", "CoreDNS"),
            ])),
            ..ObjectMeta::default()
        },
        spec: Some(core::ServiceSpec {
            selector: Some(pairs(&[("k8s-app", "kube-dns")])),
            cluster_ip: Some(address.to_string()),
            cluster_ips: Some(vec![address.to_string()]),
            ports: Some(vec![port("dns", "UDP"), port("dns-tcp", "TCP")]),
            ..core::ServiceSpec::default()
        }),
        status: None,
    }
}
