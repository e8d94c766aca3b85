//! The configuration file: read, checked, and completed with defaults and flags into [`Settings`].
//!
//! One file, `/etc/oarlock/config.yaml` unless told otherwise; a missing default file means "all defaults"; an unknown or wrong
//! field is an error that names it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use oarlock_agent::KubeletConfiguration;
use oarlock_runtime::CgroupDriver;
use serde::Deserialize;

use crate::joined::Joined;
use crate::layout::Layout;
use crate::one_or_two::OneOrTwo;
use crate::runtime_config::{ImageCollectionFile, NriFile, TracingFile};

/// Where the configuration is looked for when no flag names a file.
pub(crate) const DEFAULT_FILE: &str = "/etc/oarlock/config.yaml";
/// kube tells of each failed watch as well, with every field of the answer.
const DEFAULT_LOG: &str = "info,kube_runtime=error";

/// The configuration file as written by a person. Every field may be left out.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct ConfigFile {
    /// Everything that outlives a restart.
    pub(crate) data_dir: Option<PathBuf>,
    /// The node's name; the host name by default.
    pub(crate) node_name: Option<String>,
    /// The node's address; that of the interface with the default route by default. In a dual-stack cluster one of each
    /// family with a comma between them.
    #[serde(rename = "nodeIP")]
    pub(crate) node_ip: Option<OneOrTwo<IpAddr>>,
    /// Labels put on the node when it registers.
    pub(crate) node_labels: BTreeMap<String, String>,
    /// The most pods that the node takes.
    pub(crate) max_pods: Option<u32>,
    /// Pod addresses of the cluster; for dual stack a network of each family, the primary one first, with a comma.
    #[serde(rename = "clusterCIDR")]
    pub(crate) cluster_cidr: Option<OneOrTwo<IpNet>>,
    /// Service addresses of the cluster, of the same families in the same order.
    #[serde(rename = "serviceCIDR")]
    pub(crate) service_cidr: Option<OneOrTwo<IpNet>>,
    /// The address that the cluster's DNS answers on; the tenth of `serviceCIDR` by default.
    #[serde(rename = "clusterDNS")]
    pub(crate) cluster_dns: Option<OneOrTwo<IpAddr>>,
    /// The DNS domain of the cluster.
    pub(crate) cluster_domain: Option<String>,
    /// Ports that NodePort Services get, as `low-high`.
    pub(crate) node_port_range: Option<String>,
    /// Networks of the node's addresses that node ports are served on; all but loopback by default.
    pub(crate) node_port_addresses: Vec<IpNet>,
    /// Networks that `externalIPs` of Services may be in; none by default.
    #[serde(rename = "externalIPsAllowed")]
    pub(crate) external_ips_allowed: Vec<IpNet>,
    /// Addresses for Services of type LoadBalancer, as networks and as ranges `first-last`; none are given by default.
    pub(crate) load_balancer_pools: Vec<String>,
    /// How packets get to pods of nodes that are not on the same segment: `auto` (WireGuard where both kernels have it, else
    /// VXLAN), `vxlan`, or `wireguard` (between all nodes, on the same segment too). `none` leaves pods to another network plugin: no routes,
    /// no tunnels and no CNI configuration of ours. The same on every node.
    pub(crate) node_tunnel: Option<String>,
    /// DNS domains that have resolvers of their own.
    pub(crate) stub_domains: BTreeMap<String, Vec<IpAddr>>,
    /// The port of the API server.
    pub(crate) api_port: Option<u16>,
    /// Where the API server listens; on every IPv4 address by default, `::` is every address.
    pub(crate) bind_address: Option<IpAddr>,
    /// The address that nodes and pods reach the API server at; the node's by default.
    pub(crate) advertise_address: Option<IpAddr>,
    /// Further names and addresses that the API server's certificate is good for.
    #[serde(rename = "tlsSANs")]
    pub(crate) tls_sans: Vec<String>,
    /// The port of the agent's HTTPS server.
    pub(crate) agent_port: Option<u16>,
    /// The port of netproxy's health server.
    pub(crate) proxy_health_port: Option<u16>,
    /// The port of netproxy's metrics, on loopback alone.
    pub(crate) proxy_metrics_port: Option<u16>,
    /// A directory of manifests, or one manifest, that the agent runs without the API.
    pub(crate) static_pod_dir: Option<PathBuf>,
    /// Fields of KubeletConfiguration, which win over what is set above.
    pub(crate) kubelet: Option<KubeletConfiguration>,
    /// Log filter, for example `info` or `info,oarlock_agent=debug`.
    pub(crate) log: Option<String>,
    /// Where CNI network configuration is.
    pub(crate) cni: CniFile,
    /// How registries are reached.
    pub(crate) registries: RegistriesFile,
    /// OCI runtimes by handler name, beside the built-in one.
    pub(crate) runtime_handlers: BTreeMap<String, PathBuf>,
    /// Who makes control groups: `cgroupfs` (the runtime itself, the default), `systemd` (as slices and scopes; for hosts with
    /// version 2), or `auto` (systemd where that works). The agent follows the runtime.
    pub(crate) cgroup_driver: Option<String>,
    /// Plugins of the Node Resource Interface.
    pub(crate) nri: NriFile,
    /// Where the runtime sends spans of its calls.
    pub(crate) tracing: Option<TracingFile>,
    /// When the runtime removes unused images by itself.
    pub(crate) image_collection: Option<ImageCollectionFile>,
}

/// The `cni` part of the configuration file.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct CniFile {
    pub(crate) conf_dir: Option<PathBuf>,
    pub(crate) bin_dirs: Vec<PathBuf>,
}

/// The `registries` part of the configuration file.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct RegistriesFile {
    /// Registry host to base URLs that are tried before it, and before what `hostsDirs` have for it.
    pub(crate) mirrors: BTreeMap<String, Vec<String>>,
    /// Directories with a `hosts.toml` for each registry, in containerd's form.
    pub(crate) hosts_dirs: Option<Vec<PathBuf>>,
    /// Hosts spoken to in plain HTTP beside loopback.
    pub(crate) plain_http: Vec<String>,
    /// PEM files of certificate authorities beside the system's.
    pub(crate) certificate_authorities: Vec<PathBuf>,
    /// A file of credentials in docker's form.
    pub(crate) credentials: Option<PathBuf>,
    /// Plugins of a kubelet that know credentials, for what pods pull.
    pub(crate) credential_providers: Option<CredentialProvidersFile>,
}

/// The `registries.credentialProviders` part of the configuration file.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct CredentialProvidersFile {
    /// A file with a CredentialProviderConfig.
    pub(crate) config: PathBuf,
    /// Where the programs are that it names.
    pub(crate) bin_dir: PathBuf,
}

/// The configuration with every default filled in.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) layout: Layout,
    pub(crate) node_name: String,
    pub(crate) node_ip: IpAddr,
    pub(crate) node_labels: BTreeMap<String, String>,
    pub(crate) max_pods: u32,
    pub(crate) cluster_cidr: IpNet,
    pub(crate) service_cidr: IpNet,
    pub(crate) cluster_dns: IpAddr,
    /// The other address family of a dual-stack cluster.
    pub(crate) secondary: Option<Secondary>,
    pub(crate) cluster_domain: String,
    pub(crate) node_port_range: (u16, u16),
    pub(crate) node_port_addresses: Vec<IpNet>,
    pub(crate) external_ips_allowed: Vec<IpNet>,
    pub(crate) load_balancer_pools: Vec<IpNet>,
    pub(crate) node_tunnel: oarlock_netproxy::Tunnel,
    pub(crate) stub_domains: BTreeMap<String, Vec<IpAddr>>,
    pub(crate) api_port: u16,
    pub(crate) bind_address: IpAddr,
    pub(crate) advertise_address: IpAddr,
    pub(crate) tls_sans: Vec<String>,
    /// The API server of the cluster that this machine has joined, as a URL; None where it has one of its own.
    pub(crate) joined: Option<String>,
    pub(crate) agent_port: u16,
    pub(crate) proxy_health_port: u16,
    pub(crate) proxy_metrics_port: u16,
    pub(crate) static_pod_dir: PathBuf,
    pub(crate) kubelet: KubeletConfiguration,
    /// Where the node's container runtime is asked: our own, or another that `kubelet.containerRuntimeEndpoint` names.
    pub(crate) runtime_socket: PathBuf,
    pub(crate) log: String,
    pub(crate) cni_conf_dir: PathBuf,
    pub(crate) cni_bin_dirs: Vec<PathBuf>,
    pub(crate) registries: RegistriesFile,
    pub(crate) runtime_handlers: BTreeMap<String, PathBuf>,
    pub(crate) cgroup_driver: CgroupDriver,
    pub(crate) nri: NriFile,
    pub(crate) image_collection: Option<ImageCollectionFile>,
    pub(crate) tracing: Option<TracingFile>,
}

/// What a dual-stack cluster has beside the network of its primary family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Secondary {
    pub(crate) cluster_cidr: IpNet,
    pub(crate) service_cidr: IpNet,
    pub(crate) cluster_dns: IpAddr,
    /// The node's address of the family, if it has one.
    pub(crate) node_ip: Option<IpAddr>,
}

/// A configuration that cannot be used. Every case ends the process with exit code 64.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("cannot read the configuration file {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the configuration file {path} is not valid: {message}")]
    Parse { path: PathBuf, message: String },
    #[error("the configuration file {path} is larger than 1 MiB")]
    TooLarge { path: PathBuf },
    #[error("{field}: {problem}")]
    Field { field: &'static str, problem: String },
}

/// Flags that win over the file.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct ConfigFlags {
    /// Configuration file [default: /etc/oarlock/config.yaml, if it exists]
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Keep everything below this directory, sockets included
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// The node's name [default: the host name]
    #[arg(long, global = true, value_name = "NAME")]
    pub(crate) node_name: Option<String>,
    /// The node's address; for dual stack one of each family with a comma [default: that of the default route's link]
    #[arg(long, global = true, value_name = "ADDRESS")]
    pub(crate) node_ip: Option<OneOrTwo<IpAddr>>,
    /// Where the API server listens [default: every address of the cluster's families]
    #[arg(long, global = true, value_name = "ADDRESS")]
    pub(crate) bind_address: Option<IpAddr>,
    /// The address that nodes and pods reach the API server at [default: the node's]
    #[arg(long, global = true, value_name = "ADDRESS")]
    pub(crate) advertise_address: Option<IpAddr>,
    /// A further name or address that the API server's certificate is good for; may be given several times
    #[arg(long, global = true, value_name = "NAME")]
    pub(crate) tls_san: Vec<String>,
}

impl ConfigFlags {
    /// What was given wins over what the file says.
    fn apply(&self, file: &mut ConfigFile) {
        fn set<T: Clone>(field: &mut Option<T>, flag: &Option<T>) {
            if flag.is_some() {
                field.clone_from(flag);
            }
        }
        set(&mut file.node_name, &self.node_name);
        set(&mut file.node_ip, &self.node_ip);
        set(&mut file.bind_address, &self.bind_address);
        set(&mut file.advertise_address, &self.advertise_address);
        file.tls_sans.extend(self.tls_san.iter().cloned());
    }

    /// The flags that make a child read the same configuration.
    pub(crate) fn arguments(&self) -> Vec<OsString> {
        let mut arguments = Vec::new();
        let mut add = |flag: &str, value: Option<OsString>| {
            if let Some(value) = value {
                arguments.extend([OsString::from(flag), value]);
            }
        };
        add("--config", self.config.clone().map(Into::into));
        add("--data-dir", self.data_dir.clone().map(Into::into));
        add("--node-name", self.node_name.clone().map(Into::into));
        add("--node-ip", self.node_ip.as_ref().map(|address| address.to_string().into()));
        add("--bind-address", self.bind_address.map(|address| address.to_string().into()));
        add("--advertise-address", self.advertise_address.map(|address| address.to_string().into()));
        for name in &self.tls_san {
            add("--tls-san", Some(name.into()));
        }
        arguments
    }
}

impl Settings {
    /// Reads the file that the flags name, or the default one if it exists, and fills in defaults.
    pub(crate) fn load(flags: &ConfigFlags) -> Result<Settings, ConfigError> {
        let file = own_file(flags)?;
        let joined = Joined::read(&Layout::new(file.data_dir.clone()))?;
        Self::of(file, flags, joined.as_ref())
    }

    /// What the settings of this machine are once `joined` is kept.
    pub(crate) fn load_as(flags: &ConfigFlags, joined: &Joined) -> Result<Settings, ConfigError> {
        Self::of(own_file(flags)?, flags, Some(joined))
    }

    fn of(mut file: ConfigFile, flags: &ConfigFlags, joined: Option<&Joined>) -> Result<Settings, ConfigError> {
        if let Some(joined) = joined {
            joined.apply(&mut file);
        }
        flags.apply(&mut file);
        complete(file, joined.map(|joined| joined.server.clone()))
    }

    /// Whether the node's pods run in our own runtime, which is then ours to start and to stop.
    pub(crate) fn has_own_runtime(&self) -> bool {
        self.runtime_socket == self.layout.runtime_socket()
    }

    /// Every address of this machine, of the families that the cluster has: an IPv6 socket takes IPv4 connections too.
    pub(crate) fn any_address(&self) -> IpAddr {
        any_address(self.cluster_cidr, self.secondary.as_ref())
    }

    /// The API server as this machine reaches it: its own on loopback where it listens there.
    pub(crate) fn server_url(&self) -> String {
        let own = crate::commands::daemon::reached_at(SocketAddr::new(self.bind_address, self.api_port));
        self.joined.clone().unwrap_or_else(|| format!("https://{own}"))
    }
}

fn any_address(cluster_cidr: IpNet, secondary: Option<&Secondary>) -> IpAddr {
    let is_ipv6 = cluster_cidr.addr().is_ipv6() || secondary.is_some_and(|second| second.cluster_cidr.addr().is_ipv6());
    if is_ipv6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() }
}

/// The machine's own configuration file, and where its data are.
fn own_file(flags: &ConfigFlags) -> Result<ConfigFile, ConfigError> {
    let mut file = match &flags.config {
        Some(path) => read(path)?,
        None if Path::new(DEFAULT_FILE).exists() => read(Path::new(DEFAULT_FILE))?,
        None => ConfigFile::default(),
    };
    if flags.data_dir.is_some() {
        file.data_dir.clone_from(&flags.data_dir);
    }
    Ok(file)
}

fn read(path: &Path) -> Result<ConfigFile, ConfigError> {
    let failed = |source| ConfigError::Read { path: path.to_owned(), source };
    if fs::metadata(path).map_err(failed)?.len() > 1 << 20 {
        return Err(ConfigError::TooLarge { path: path.to_owned() });
    }
    let text = fs::read_to_string(path).map_err(failed)?;
    if text.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#')) {
        return Ok(ConfigFile::default());
    }
    serde_yaml_ng::from_str(&text)
        .map_err(|error| ConfigError::Parse { path: path.to_owned(), message: error.to_string() })
}

fn complete(file: ConfigFile, joined: Option<String>) -> Result<Settings, ConfigError> {
    let data_dir = file.data_dir;
    if let Some(directory) = &data_dir
        && !directory.is_absolute()
    {
        return Err(field("dataDir", format!("{} is not an absolute path", directory.display())));
    }
    let layout = Layout::new(data_dir);
    let one = |first| OneOrTwo { first, second: None };
    let cluster_cidrs = file.cluster_cidr.unwrap_or_else(|| one(net([10, 42, 0, 0], 16)));
    let service_cidrs = file.service_cidr.unwrap_or_else(|| one(net([10, 43, 0, 0], 16)));
    let (cluster_cidr, service_cidr) = (cluster_cidrs.first, service_cidrs.first);
    let asked_dns = file.cluster_dns;
    let cluster_dns = network_dns(cluster_cidr, service_cidr, asked_dns.as_ref().map(|asked| asked.first))?;
    let node_name = match file.node_name {
        Some(name) => name,
        None => host_name()?,
    };
    check_node_name(&node_name)?;
    let kubelet = file.kubelet.unwrap_or_default();
    // Found out now, so that a wrong field ends with the code for bad configuration.
    let mut agent = oarlock_agent::Config::new(node_name.clone(), Ipv4Addr::LOCALHOST.into());
    agent.runtime_endpoint = layout.runtime_socket();
    kubelet.apply(&mut agent).map_err(|error| field("kubelet", error.to_string()))?;
    let node_ip = match &file.node_ip {
        Some(asked) => asked.first,
        None => crate::host::default_address(cluster_cidr.addr().is_ipv4()),
    };
    let secondary = match (cluster_cidrs.second, service_cidrs.second) {
        (None, None) => None,
        (Some(cluster_cidr), Some(service_cidr)) => {
            if cluster_cidr.addr().is_ipv4() == cluster_cidrs.first.addr().is_ipv4() {
                return Err(field("clusterCIDR", "both networks are of one address family".to_owned()));
            }
            let is_ipv4 = cluster_cidr.addr().is_ipv4();
            let asked = asked_dns.and_then(|asked| asked.second);
            let node_ip = match file.node_ip {
                Some(asked) => asked.second,
                None => Some(crate::host::default_address(is_ipv4)).filter(|address| !address.is_loopback()),
            };
            Some(Secondary {
                cluster_cidr,
                service_cidr,
                cluster_dns: network_dns(cluster_cidr, service_cidr, asked)?,
                node_ip,
            })
        }
        _ => {
            return Err(field(
                "serviceCIDR",
                "a dual-stack cluster has two networks here and in clusterCIDR".to_owned(),
            ));
        }
    };
    let own: Vec<IpNet> = [cluster_cidr, service_cidr]
        .into_iter()
        .chain(secondary.iter().flat_map(|second| [second.cluster_cidr, second.service_cidr]))
        .chain([node_ip.into()])
        .collect();
    let any = any_address(cluster_cidr, secondary.as_ref());
    Ok(Settings {
        node_tunnel: match file.node_tunnel.as_deref().unwrap_or("auto") {
            "auto" => oarlock_netproxy::Tunnel::Auto,
            "vxlan" => oarlock_netproxy::Tunnel::Vxlan,
            "wireguard" => oarlock_netproxy::Tunnel::Wireguard,
            "none" => oarlock_netproxy::Tunnel::None,
            other => return Err(field("nodeTunnel", format!("{other:?} is none of auto, vxlan, wireguard, none"))),
        },
        load_balancer_pools: balancer_pools(&file.load_balancer_pools, &own)?,
        node_name,
        node_ip,
        node_labels: file.node_labels,
        max_pods: file.max_pods.unwrap_or(110),
        cluster_cidr,
        service_cidr,
        cluster_dns,
        secondary,
        cluster_domain: file.cluster_domain.unwrap_or_else(|| "cluster.local".to_owned()),
        node_port_range: port_range(file.node_port_range.as_deref().unwrap_or("30000-32767"))?,
        node_port_addresses: file.node_port_addresses,
        external_ips_allowed: file.external_ips_allowed,
        stub_domains: file.stub_domains,
        api_port: file.api_port.unwrap_or(6443),
        bind_address: file.bind_address.unwrap_or(any),
        advertise_address: file.advertise_address.unwrap_or(node_ip),
        tls_sans: checked_names(file.tls_sans)?,
        joined,
        agent_port: file.agent_port.unwrap_or(10250),
        proxy_health_port: file.proxy_health_port.unwrap_or(10256),
        proxy_metrics_port: file.proxy_metrics_port.unwrap_or(10249),
        static_pod_dir: file.static_pod_dir.unwrap_or_else(|| layout.static_pods()),
        kubelet,
        runtime_socket: agent.runtime_endpoint,
        log: file.log.unwrap_or_else(|| DEFAULT_LOG.to_owned()),
        cni_conf_dir: file.cni.conf_dir.unwrap_or_else(|| layout.cni_conf_dir()),
        cni_bin_dirs: if file.cni.bin_dirs.is_empty() { layout.cni_bin_dirs() } else { file.cni.bin_dirs },
        registries: file.registries,
        runtime_handlers: file.runtime_handlers,
        cgroup_driver: match file.cgroup_driver.as_deref() {
            None | Some("cgroupfs") => CgroupDriver::Cgroupfs,
            Some("systemd") => CgroupDriver::Systemd,
            Some("auto") => CgroupDriver::Auto,
            Some(other) => return Err(field("cgroupDriver", format!("{other:?} is none of cgroupfs, systemd, auto"))),
        },
        nri: file.nri,
        image_collection: file.image_collection,
        tracing: file.tracing,
        layout,
    })
}

/// The address of cluster DNS in a family's network, once that is found to be sound.
fn network_dns(cluster_cidr: IpNet, service_cidr: IpNet, asked: Option<IpAddr>) -> Result<IpAddr, ConfigError> {
    if cluster_cidr.addr().is_ipv4() != service_cidr.addr().is_ipv4() {
        return Err(field("serviceCIDR", format!("{service_cidr} is not of the family of clusterCIDR {cluster_cidr}")));
    }
    if cluster_cidr.contains(&service_cidr) || service_cidr.contains(&cluster_cidr) {
        return Err(field("serviceCIDR", format!("{service_cidr} overlaps clusterCIDR {cluster_cidr}")));
    }
    // Upstream's bound: what is allocated from has to be counted.
    if service_cidr.max_prefix_len() - service_cidr.prefix_len() > 20 {
        let largest = service_cidr.max_prefix_len() - 20;
        return Err(field("serviceCIDR", format!("{service_cidr} is larger than /{largest}")));
    }
    match asked {
        Some(address) if service_cidr.contains(&address) => Ok(address),
        Some(address) => Err(field("clusterDNS", format!("{address} is not in serviceCIDR {service_cidr}"))),
        None => tenth_address(service_cidr)
            .ok_or_else(|| field("serviceCIDR", format!("{service_cidr} has fewer than ten addresses"))),
    }
}

/// The tenth address of a network.
fn tenth_address(net: IpNet) -> Option<IpAddr> {
    let address = match net.network() {
        IpAddr::V4(network) => IpAddr::V4(u32::from(network).checked_add(10)?.into()),
        IpAddr::V6(network) => IpAddr::V6(u128::from(network).checked_add(10)?.into()),
    };
    Some(address).filter(|address| net.contains(address))
}

fn field(field: &'static str, problem: String) -> ConfigError {
    ConfigError::Field { field, problem }
}

fn net(octets: [u8; 4], prefix: u8) -> IpNet {
    IpNet::new_assert(IpAddr::V4(Ipv4Addr::from(octets)), prefix)
}

fn host_name() -> Result<String, ConfigError> {
    nix::unistd::gethostname()
        .map(|name| name.to_string_lossy().to_lowercase())
        .map_err(|error| field("nodeName", format!("the host name cannot be read: {error}")))
}

/// Names that a certificate can carry; a wildcard may stand for the first label.
fn checked_names(names: Vec<String>) -> Result<Vec<String>, ConfigError> {
    let good = |name: &String| {
        let plain = name.strip_prefix("*.").unwrap_or(name);
        name.parse::<IpAddr>().is_ok() || check_node_name(plain).is_ok()
    };
    match names.iter().find(|name| !good(name)) {
        Some(name) => Err(field("tlsSANs", format!("{name:?} is neither an address nor a DNS name"))),
        None => Ok(names),
    }
}

/// A node's name is a DNS subdomain (RFC 1123).
fn check_node_name(name: &str) -> Result<(), ConfigError> {
    let label_ok = |label: &str| {
        !label.is_empty()
            && label.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if name.len() <= 253 && name.split('.').all(label_ok) {
        return Ok(());
    }
    Err(field("nodeName", format!("{name:?} is not a DNS subdomain (lower case letters, digits, '-' and '.')")))
}

/// Pools as networks. None may hold addresses that are somebody's already.
fn balancer_pools(texts: &[String], taken: &[IpNet]) -> Result<Vec<IpNet>, ConfigError> {
    let mut pools = Vec::new();
    for text in texts {
        let wrong = |problem: &str| field("loadBalancerPools", format!("{text:?} {problem}"));
        let parsed = match text.split_once('-') {
            None => text.trim().parse().ok().map(|net: IpNet| vec![net.trunc()]),
            Some((first, last)) => match (first.trim().parse(), last.trim().parse()) {
                (Ok(IpAddr::V4(first)), Ok(IpAddr::V4(last))) if first <= last => {
                    Some(ipnet::Ipv4Subnets::new(first, last, 0).map(IpNet::from).collect())
                }
                (Ok(IpAddr::V6(first)), Ok(IpAddr::V6(last))) if first <= last => {
                    Some(ipnet::Ipv6Subnets::new(first, last, 0).map(IpNet::from).collect())
                }
                _ => None,
            },
        };
        let nets = parsed.ok_or_else(|| wrong("is neither a network nor a range such as 192.0.2.10-192.0.2.20"))?;
        for net in &nets {
            if let Some(other) = taken.iter().find(|other| net.contains(*other) || other.contains(net)) {
                return Err(wrong(&format!("overlaps {other}, which is in use")));
            }
        }
        pools.extend(nets);
    }
    Ok(IpNet::aggregate(&pools))
}

fn port_range(text: &str) -> Result<(u16, u16), ConfigError> {
    let parsed =
        text.split_once('-').and_then(|(low, high)| Some((low.trim().parse().ok()?, high.trim().parse().ok()?)));
    match parsed {
        Some((low, high)) if low > 0 && low <= high => Ok((low, high)),
        _ => Err(field("nodePortRange", format!("{text:?} is not a range such as 30000-32767"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Settings, ConfigError> {
        let directory = tempfile::tempdir().expect("tempdir");
        let path = directory.path().join("config.yaml");
        fs::write(&path, text).expect("write");
        Settings::load(&ConfigFlags { config: Some(path), ..ConfigFlags::default() })
    }

    #[test]
    fn an_empty_file_means_defaults() {
        let settings = parse("# nothing\n").expect("valid");
        assert_eq!(settings.cluster_dns.to_string(), "10.43.0.10");
        assert_eq!(settings.layout.data_dir(), Path::new("/var/lib/oarlock"));
        assert_eq!(settings.api_port, 6443);
    }

    #[test]
    fn an_unknown_key_is_named() {
        let error = parse("dataDir: /tmp/x\nnodePorts: 3\n").expect_err("unknown key");
        assert!(error.to_string().contains("nodePorts"), "{error}");
    }

    #[test]
    fn values_are_checked_together() {
        let cases = [
            ("serviceCIDR: 10.42.0.0/24", "overlaps"),
            ("serviceCidr: 10.43.0.0/16", "unknown field"),
            ("clusterDNS: 10.44.0.10", "not in serviceCIDR"),
            ("nodePortRange: 9-3", "nodePortRange"),
            ("nodeTunnel: ipsec", "none of auto"),
            ("cgroupDriver: openrc", "\"openrc\" is none of cgroupfs, systemd, auto"),
            ("loadBalancerPools: [192.0.2.9-192.0.2.3]", "neither a network nor a range"),
            ("loadBalancerPools: [192.0.2.9]", "neither a network nor a range"),
            ("loadBalancerPools: [10.43.7.0/24]", "overlaps 10.43.0.0/16"),
            ("nodeName: Bad_Name", "nodeName"),
            ("dataDir: relative", "absolute"),
            ("maxPods: many", "maxPods"),
            ("tlsSANs: [\"https://x\"]", "neither an address nor a DNS name"),
            ("advertiseAddress: here", "advertiseAddress"),
            ("kubelet: {evictionHrad: {}}", "evictionHrad"),
            ("kubelet: {evictionHard: {memory: 1Gi}}", "kubelet: unknown eviction signal memory"),
            ("kubelet: {staticPodURL: x}", "staticPodURL: this agent does not implement"),
        ];
        for (text, expected) in cases {
            let error = parse(text).expect_err(text);
            assert!(error.to_string().contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn pools_are_networks_and_ranges() {
        let text = "nodeIP: 198.51.100.1\nloadBalancerPools: [192.0.2.10 - 192.0.2.12, \"2001:db8::/120\"]\n";
        let pools: Vec<String> =
            parse(text).expect("valid").load_balancer_pools.iter().map(ToString::to_string).collect();
        assert_eq!(pools, ["192.0.2.10/31", "192.0.2.12/32", "2001:db8::/120"]);
    }

    #[test]
    fn two_networks_make_a_dual_stack_cluster() {
        let text = "clusterCIDR: 10.42.0.0/16,fd42::/48\nserviceCIDR: 10.43.0.0/16, fd43::/112\nnodeIP: 192.0.2.2,2001:db8::2\n";
        let secondary = parse(text).expect("valid").secondary.expect("two families");
        assert_eq!(secondary.cluster_dns.to_string(), "fd43::a");
        let both = parse(text).expect("valid");
        assert_eq!((both.bind_address.to_string(), both.server_url()), ("::".into(), "https://[::1]:6443".into()));
        assert_eq!(secondary.node_ip, Some("2001:db8::2".parse().expect("address")));
        assert_eq!(
            parse("clusterCIDR: fd42::/48\nserviceCIDR: fd43::/112\n").expect("valid").cluster_dns.to_string(),
            "fd43::a"
        );
        let cases = [
            ("clusterCIDR: 10.42.0.0/16,fd42::/48", "two networks"),
            ("clusterCIDR: 10.42.0.0/16,10.44.0.0/16\nserviceCIDR: 10.43.0.0/16,10.45.0.0/16", "one address family"),
            ("clusterCIDR: fd42::/48", "not of the family"),
            ("clusterCIDR: fd42::/48\nserviceCIDR: fd43::/64", "larger than /108"),
            ("clusterCIDR: 10.42.0.0/16,nonsense", "nonsense"),
        ];
        for (text, expected) in cases {
            let error = parse(text).expect_err(text);
            assert!(error.to_string().contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn flags_win_and_children_are_told_the_same() {
        use clap::Parser;
        #[derive(Parser)]
        struct Command {
            #[command(flatten)]
            flags: ConfigFlags,
        }
        let directory = tempfile::tempdir().expect("tempdir");
        let path = directory.path().join("config.yaml");
        fs::write(&path, "nodeName: file\nnodeIP: 192.0.2.1\ntlsSANs: [one.example]\n").expect("write");
        let given = ["oarlock", "--config", &path.to_string_lossy(), "--node-name=flag", "--bind-address=192.0.2.9"]
            .map(str::to_owned)
            .into_iter()
            .chain(["--tls-san=192.0.2.7".to_owned(), "--node-ip=192.0.2.2,2001:db8::2".to_owned()]);
        let flags = Command::parse_from(given).flags;
        let again = [OsString::from("oarlock")].into_iter().chain(flags.arguments());
        for flags in [Command::parse_from(again).flags, flags] {
            let settings = Settings::load(&flags).expect("valid");
            assert_eq!((settings.node_name.as_str(), settings.node_ip.to_string()), ("flag", "192.0.2.2".to_owned()));
            assert_eq!(settings.server_url(), "https://192.0.2.9:6443");
            assert_eq!(settings.advertise_address.to_string(), "192.0.2.2");
            assert_eq!(settings.tls_sans, ["one.example", "192.0.2.7"]);
        }
    }

    #[test]
    fn the_node_can_have_another_runtime() {
        assert!(parse("dataDir: /srv/one\n").expect("valid").has_own_runtime());
        let other = "dataDir: /srv/one\nkubelet: {containerRuntimeEndpoint: \"unix:///run/other.sock\"}\n";
        let settings = parse(other).expect("valid");
        assert!(!settings.has_own_runtime());
        assert_eq!(settings.runtime_socket, Path::new("/run/other.sock"));
    }

    #[test]
    fn a_data_dir_moves_everything() {
        let settings = parse("dataDir: /srv/one\n").expect("valid");
        for path in [settings.layout.run_dir(), settings.cni_conf_dir.clone(), settings.layout.admin_kubeconfig()] {
            assert!(path.starts_with("/srv/one"), "{}", path.display());
        }
    }
}
