//! The parts put together: watches → cluster state → jobs for the worker, DNS, node configuration.

use std::sync::Arc;
use std::time::Duration;

use hickory_proto::rr::Name;
use oarlock_nft::{Family as TableFamily, Netlink, NftError, Table};
use oarlock_supervise::{TaskError, Tasks};
use parking_lot::RwLock;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::announce::{self, Identity};
use crate::cluster::Cluster;
use crate::config::{Config, Network};
use crate::conntrack::Scope;
use crate::dns::{self, DnsServer, Sockets, StubDomains, Upstream, Zone};
use crate::health::{self, Audience, Status};
use crate::host::{self, SysctlError};
use crate::hub::{self, Hub, Outputs};
use crate::rules::Settings;
use crate::sync::Proxier;
use crate::watch as watches;
use crate::worker::{self, Family, Ground};
use crate::{balancer_health, dns_service, plugins, policy};

const EVENT_QUEUE: usize = 4096;
const JOB_QUEUE: usize = 16;
const RETRY_INTERVAL: Duration = Duration::from_secs(2);
const DRAIN: Duration = Duration::from_secs(5);
const DNS_PORT: u16 = 53;

/// Why the proxy ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("{domain:?} is not a domain name")]
    Domain { domain: String, source: hickory_proto::ProtoError },
    #[error("cannot prepare the node for forwarding")]
    Forwarding(#[source] SysctlError),
    #[error("a cluster has one network, or one of each address family")]
    Networks,
    #[error("cannot use nftables")]
    Nftables(#[source] NftError),
    #[error("netproxy")]
    Task(#[source] TaskError),
}

/// The Service proxy.
pub struct Netproxy {
    config: Config,
    client: kube::Client,
    node_client: Option<kube::Client>,
    changes: Option<watch::Receiver<Config>>,
    status: Arc<Status>,
}

impl Netproxy {
    pub fn new(config: Config, client: kube::Client) -> Netproxy {
        Netproxy { config, client, node_client: None, changes: None, status: Arc::default() }
    }

    /// What this node's own object is annotated with, where the other client may not do that.
    #[must_use]
    pub fn with_node_client(self, client: kube::Client) -> Netproxy {
        Netproxy { node_client: Some(client), ..self }
    }

    /// Goes by what is told there while it runs: every field that can change without another start, and the others are named
    /// in the log.
    #[must_use]
    pub fn with_changes(self, changes: watch::Receiver<Config>) -> Netproxy {
        Netproxy { changes: Some(changes), ..self }
    }

    /// Becomes true once Services and network policies have been written and cluster DNS is served: from then on Services work,
    /// names are answered, and pods are as isolated as they should be. Where another program has the port of cluster DNS, that
    /// is not waited for.
    pub fn ready(&self) -> watch::Receiver<bool> {
        self.status.ready.subscribe()
    }

    /// Works until `shutdown`. The rules stay in the kernel, so that connections do not notice a restart;
    /// [`crate::remove_everything`] takes them away.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), Error> {
        let Netproxy { config, client, node_client, changes, status } = self;
        let config = Arc::new(config);
        let domain = parse_domain(&config.cluster_domain)?;
        match config.networks.as_slice() {
            [_] => {}
            [one, other] if one.is_ipv4() != other.is_ipv4() => {}
            _ => return Err(Error::Networks),
        }
        host::raise_open_files();
        if let Err(error) = crate::withdraw_stale_configuration(&config) {
            warn!(error = &error as &dyn std::error::Error, "CNI configuration of before the boot may be used");
        }
        let made = config.networks.iter().map(|network| family(&config, network)).collect::<Result<Vec<_>, _>>()?;
        let (families, unseen): (Vec<_>, Vec<_>) = made.into_iter().unzip();
        let cluster = Arc::new(RwLock::new(Cluster::default()));
        let (events_in, events) = mpsc::channel(EVENT_QUEUE);
        let (jobs_in, jobs) = mpsc::channel(JOB_QUEUE);
        let (balancers_in, balancers) = watch::channel(Arc::default());
        let dns_addresses: Vec<_> = config.networks.iter().map(|network| network.cluster_dns).collect();
        let zone = Zone {
            domain,
            cluster_cidrs: config.networks.iter().map(|network| network.cluster_cidr).collect(),
            service_cidrs: config.networks.iter().map(|network| network.service_cidr).collect(),
            dns_addresses: dns_addresses.clone(),
        };
        let upstream =
            Arc::new(Upstream::new(&config.upstream_resolv_conf, dns_addresses.clone(), stub_domains(&config)?));
        let dns = Arc::new(DnsServer::new(zone, cluster.clone(), upstream.clone()));

        let mut tasks = Tasks::new(shutdown.child_token());
        let token = tasks.token();
        let ports =
            [("health", config.health_listen, Audience::Anybody), ("metrics", config.metrics_listen, Audience::Host)];
        status.will_listen(dns_addresses.len() + ports.len());
        tasks.spawn("service watch", infallible(watches::services(client.clone(), events_in.clone(), token.clone())));
        let own_node = config.node_name.clone();
        tasks.spawn(
            "slice watch",
            infallible(watches::slices(client.clone(), own_node, events_in.clone(), token.clone())),
        );
        tasks.spawn("node watch", infallible(watches::nodes(client.clone(), events_in, token.clone())));
        let worker_status = status.clone();
        let worker = tokio::task::spawn_blocking(move || worker::run(families, &worker_status, jobs));
        tasks.spawn("nftables worker", worker);
        let (cidrs_in, pod_cidrs) = watch::channel(None);
        let (enforced_in, enforced) = watch::channel(None);
        let policies = policy::Scope {
            node_name: config.node_name.clone(),
            families: config.networks.iter().map(Network::is_ipv4).collect(),
            pod_cidrs,
            enforced: enforced_in,
        };
        let policies = policy::run(client.clone(), policies, status.clone(), token.clone());
        tasks.spawn("network policies", policies);
        let (world_in, world) = watch::channel(Arc::default());
        let outputs = Outputs {
            cluster,
            status: status.clone(),
            jobs: jobs_in,
            balancers: balancers_in,
            pod_cidrs: cidrs_in,
            enforced,
            world: world_in,
            node_client: node_client.unwrap_or_else(|| client.clone()),
            upstream: upstream.clone(),
            unseen,
        };
        let identity = Identity {
            name: config.node_name.as_str().into(),
            addresses: config.networks.iter().filter_map(|network| network.node_ip).collect(),
        };
        let announcing = announce::run(identity, client.clone(), world, status.clone(), token.clone());
        tasks.spawn("balancer addresses", infallible(announcing));
        let hub = Hub::new(config.clone(), outputs);
        tasks.spawn("hub", infallible(hub.run(events, changes, token.clone())));
        for address in &dns_addresses {
            let serving = serve_dns(dns.clone(), *address, status.clone(), token.clone());
            tasks.spawn("cluster DNS", infallible(serving));
        }
        tasks.spawn("rules of plugins", infallible(plugins::keep(token.clone())));
        tasks.spawn("DNS loops", infallible(dns::watch_loops(upstream, token.clone())));
        tasks.spawn("DNS Service", infallible(dns_service::keep(client, dns_addresses, token.clone())));
        tasks.spawn("balancer health", infallible(balancer_health::run(balancers, status.clone(), token.clone())));
        for (name, listen, audience) in ports {
            let serving = health::run((listen, audience), status.clone(), dns.clone(), token.clone());
            tasks.spawn(name, infallible(serving));
        }
        tasks.join(DRAIN).await.map_err(Error::Task)
    }
}

pub fn table(config: &Config, is_ipv4: bool) -> Table {
    let family = if is_ipv4 { TableFamily::Ip } else { TableFamily::Ip6 };
    Table::new(family, config.table_name.clone())
}

/// What the fixed rules of one family depend on.
pub fn settings(config: &Config, network: &Network, masquerade_bridged: bool) -> Settings {
    let of_family = |net: &&ipnet::IpNet| net.addr().is_ipv4() == network.is_ipv4();
    Settings {
        table: table(config, network.is_ipv4()),
        cluster_cidr: network.cluster_cidr,
        service_cidr: network.service_cidr,
        dns_address: Some(network.cluster_dns),
        balancer_pools: config.balancer_pools.iter().filter(of_family).copied().collect(),
        node_port_addresses: (!config.node_port_addresses.is_empty())
            .then(|| config.node_port_addresses.iter().filter(of_family).copied().collect()),
        masquerade_bridged,
    }
}

/// Prepares the host for one family, and what keeps its table.
/// Says too whether bridged packets are out of its sight.
fn family(config: &Config, network: &Network) -> Result<(Family<Netlink>, bool), Error> {
    let is_ipv4 = network.is_ipv4();
    let record = config.sysctl_record.as_deref();
    host::enable_forwarding(is_ipv4, record).map_err(Error::Forwarding)?;
    let masquerade_bridged = !host::enable_bridge_filtering(is_ipv4, record);
    let kernel = Netlink::open().map_err(Error::Nftables)?;
    let settings = settings(config, network, masquerade_bridged);
    let family = Family::new(Proxier::new(kernel, settings, host::addresses), scope(config, network));
    Ok((family, masquerade_bridged))
}

/// What every family is to go by; `unseen` says of each whether bridged packets are out of sight.
pub fn grounds(config: &Config, unseen: &[bool]) -> Vec<Ground> {
    let ground = |(network, unseen): (&Network, &bool)| Ground {
        settings: settings(config, network, *unseen),
        scope: scope(config, network),
    };
    config.networks.iter().zip(unseen).map(ground).collect()
}

/// Which flows can be this proxy's.
fn scope(config: &Config, network: &Network) -> Scope {
    let of_family = |net: &&ipnet::IpNet| net.addr().is_ipv4() == network.is_ipv4();
    Scope {
        service_cidr: network.service_cidr,
        cluster_cidr: network.cluster_cidr,
        dns_address: Some(network.cluster_dns),
        node_ports: config.node_port_range,
        external: config.balancer_pools.iter().chain(&config.external_ips_allowed).filter(of_family).copied().collect(),
    }
}

async fn infallible(task: impl Future<Output = ()>) -> Result<(), std::convert::Infallible> {
    task.await;
    Ok(())
}

pub fn stub_domains(config: &Config) -> Result<StubDomains, Error> {
    config.stub_domains.iter().map(|(domain, servers)| Ok((parse_domain(domain)?, servers.clone()))).collect()
}

fn parse_domain(domain: &str) -> Result<Name, Error> {
    let parsed = Name::from_ascii(domain.trim_end_matches('.'));
    let mut name = parsed.map_err(|source| Error::Domain { domain: domain.to_owned(), source })?;
    name.set_fqdn(true);
    Ok(name.to_lowercase())
}

/// The sockets of the cluster DNS address, which this node is given; or a word in the log.
async fn listen_for_questions(address: std::net::IpAddr) -> Option<Sockets> {
    let prepared = tokio::task::spawn_blocking(move || hub::ensure_dns_address(address)).await;
    if let Ok(Err(error)) = prepared {
        warn!(error = &error as &dyn std::error::Error, "cluster DNS address cannot be set; trying again");
        return None;
    }
    let bound = Sockets::bind((address, DNS_PORT).into()).await;
    let said = |error| warn!(error = &error as &dyn std::error::Error, "cluster DNS cannot be served; trying again");
    bound.map_err(said).ok()
}

/// Serves cluster DNS, and tries again when another program has the port.
async fn serve_dns(dns: Arc<DnsServer>, address: std::net::IpAddr, status: Arc<Status>, shutdown: CancellationToken) {
    let mut is_first = true;
    while !shutdown.is_cancelled() {
        let sockets = listen_for_questions(address).await;
        if std::mem::take(&mut is_first) {
            status.tried_to_listen();
        }
        if let Some(sockets) = sockets {
            dns.clone().run(sockets, shutdown.clone()).await;
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY_INTERVAL) => {}
            () = shutdown.cancelled() => {}
        }
    }
}
