//! The configuration of the proxy.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use ipnet::IpNet;

/// The cluster's network in one address family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// The addresses of all pods of all nodes.
    pub cluster_cidr: IpNet,
    pub service_cidr: IpNet,
    /// The cluster DNS address, one of `service_cidr`.
    pub cluster_dns: IpAddr,
    /// This node's address, if it has one of the family.
    pub node_ip: Option<IpAddr>,
}

impl Network {
    pub fn is_ipv4(&self) -> bool {
        self.service_cidr.addr().is_ipv4()
    }
}

/// How packets get to pods of nodes that are not on a segment of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Tunnel {
    /// By WireGuard where both nodes' kernels have it, else by VXLAN.
    #[default]
    Auto,
    Vxlan,
    /// By WireGuard only, to nodes of the same segment too: nothing between pods of two nodes is readable on the way.
    Wireguard,
    /// Another network plugin connects pods: no routes, no tunnels and no CNI configuration of ours.
    None,
}

/// What the proxy has to know about its node and cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    pub node_name: String,
    /// One network, or one of each family with the primary one first.
    pub networks: Vec<Network>,
    pub cluster_domain: String,
    /// First and last node port.
    pub node_port_range: (u16, u16),
    /// Networks of the node's addresses that node ports are served on; on all but loopback without any.
    pub node_port_addresses: Vec<IpNet>,
    /// Networks that external addresses of Services may be in; none are served without any, because whoever may make a
    /// Service could otherwise take any address.
    pub external_ips_allowed: Vec<IpNet>,
    /// Addresses for Services of type LoadBalancer, which the nodes announce on their links; none without any.
    pub balancer_pools: Vec<IpNet>,
    /// The `loadBalancerClass` that asks for them, beside no class at all.
    pub balancer_class: String,
    pub health_listen: SocketAddr,
    /// Where metrics are told: to whoever is on this host, without authentication.
    pub metrics_listen: SocketAddr,
    /// Where the CNI configuration is written, as `10-oarlock.conflist`, once the Node has a pod CIDR; nowhere without.
    pub cni_conf_dir: Option<PathBuf>,
    /// Where the CNI plugins keep which address is whose.
    pub cni_state_dir: PathBuf,
    /// How packets get to pods of other segments.
    pub tunnel: Tunnel,
    /// Where this node's WireGuard key is kept; without it there is none.
    pub wireguard_key: Option<PathBuf>,
    /// Where is kept what kernel settings were before they were changed; nowhere without.
    pub sysctl_record: Option<PathBuf>,
    /// The resolvers that other names than the cluster's are asked of.
    pub upstream_resolv_conf: PathBuf,
    /// Domains that have resolvers of their own, by name.
    pub stub_domains: Vec<(String, Vec<SocketAddr>)>,
    /// The nftables table, in family `ip`, `ip6` or both.
    pub table_name: String,
}

impl Config {
    /// This configuration with all of `told` that can change while a proxy runs, and the names of what differs beside that:
    /// the networks of a cluster, say, are what its pods have been given addresses of.
    pub(crate) fn with_changes_of(&self, told: &Config) -> (Config, Vec<&'static str>) {
        // Every field is named, so that of a new one it is said which of these it is. Those that are not looked at follow from
        // no setting, or from `dataDir` alone.
        let Config {
            node_name,
            networks,
            cluster_domain,
            node_port_range,
            node_port_addresses,
            external_ips_allowed,
            balancer_pools,
            balancer_class: _,
            health_listen,
            metrics_listen,
            cni_conf_dir,
            cni_state_dir,
            tunnel,
            wireguard_key: _,
            sysctl_record: _,
            upstream_resolv_conf: _,
            stub_domains,
            table_name: _,
        } = told;
        let changed = Config {
            node_port_range: *node_port_range,
            node_port_addresses: node_port_addresses.clone(),
            external_ips_allowed: external_ips_allowed.clone(),
            balancer_pools: balancer_pools.clone(),
            tunnel: *tunnel,
            stub_domains: stub_domains.clone(),
            ..self.clone()
        };
        let differs = [
            ("nodeName", self.node_name != *node_name),
            ("clusterCIDR, serviceCIDR, clusterDNS or nodeIP", self.networks != *networks),
            ("clusterDomain", self.cluster_domain != *cluster_domain),
            ("proxyHealthPort", self.health_listen != *health_listen),
            ("proxyMetricsPort", self.metrics_listen != *metrics_listen),
            ("cni.confDir", self.cni_conf_dir != *cni_conf_dir),
            ("dataDir", self.cni_state_dir != *cni_state_dir),
        ];
        (changed, differs.into_iter().filter(|(_, differs)| *differs).map(|(name, _)| name).collect())
    }
}

impl Default for Config {
    fn default() -> Self {
        let v4 = |a, b, prefix| IpNet::V4(ipnet::Ipv4Net::new_assert(Ipv4Addr::new(a, b, 0, 0), prefix));
        let network = Network {
            cluster_cidr: v4(10, 42, 16),
            service_cidr: v4(10, 43, 16),
            cluster_dns: Ipv4Addr::new(10, 43, 0, 10).into(),
            node_ip: None,
        };
        Config {
            node_name: String::new(),
            networks: vec![network],
            cluster_domain: "cluster.local".to_owned(),
            node_port_range: (30_000, 32_767),
            node_port_addresses: Vec::new(),
            external_ips_allowed: Vec::new(),
            balancer_pools: Vec::new(),
            balancer_class: String::new(),
            health_listen: (Ipv4Addr::UNSPECIFIED, 10_256).into(),
            metrics_listen: (Ipv4Addr::LOCALHOST, 10_249).into(),
            cni_conf_dir: None,
            cni_state_dir: "/var/lib/cni/networks".into(),
            tunnel: Tunnel::Auto,
            wireguard_key: None,
            sysctl_record: None,
            upstream_resolv_conf: "/etc/resolv.conf".into(),
            stub_domains: Vec::new(),
            table_name: "oarlock-netproxy".to_owned(),
        }
    }
}
