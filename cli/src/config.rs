//! The configuration file: read, checked, and completed with defaults and flags into [`Settings`].
//!
//! One file, `/etc/oarlock/config.yaml` unless told otherwise; a missing default file means "all defaults"; an unknown or wrong
//! field is an error that names it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use oarlock_agent::KubeletConfiguration;
use serde::Deserialize;

use crate::layout::Layout;

/// Where the configuration is looked for when no flag names a file.
pub(crate) const DEFAULT_FILE: &str = "/etc/oarlock/config.yaml";

/// The configuration file as written by a person. Every field may be left out.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct ConfigFile {
    /// Everything that outlives a restart.
    pub(crate) data_dir: Option<PathBuf>,
    /// The node's name; the host name by default.
    pub(crate) node_name: Option<String>,
    /// The node's address; that of the interface with the default route by default.
    #[serde(rename = "nodeIP")]
    pub(crate) node_ip: Option<IpAddr>,
    /// Labels put on the node when it registers.
    pub(crate) node_labels: BTreeMap<String, String>,
    /// The most pods that the node takes.
    pub(crate) max_pods: Option<u32>,
    /// Pod addresses of the cluster.
    #[serde(rename = "clusterCIDR")]
    pub(crate) cluster_cidr: Option<IpNet>,
    /// Service addresses of the cluster.
    #[serde(rename = "serviceCIDR")]
    pub(crate) service_cidr: Option<IpNet>,
    /// The address that the cluster's DNS answers on; the tenth of `serviceCIDR` by default.
    #[serde(rename = "clusterDNS")]
    pub(crate) cluster_dns: Option<IpAddr>,
    /// The DNS domain of the cluster.
    pub(crate) cluster_domain: Option<String>,
    /// Ports that NodePort Services get, as `low-high`.
    pub(crate) node_port_range: Option<String>,
    /// The port of the API server.
    pub(crate) api_port: Option<u16>,
    /// The port of the agent's HTTPS server.
    pub(crate) agent_port: Option<u16>,
    /// The port of netproxy's health server.
    pub(crate) proxy_health_port: Option<u16>,
    /// A directory of manifests that the agent runs without the API.
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
    /// Registry host to base URLs that are tried before it.
    pub(crate) mirrors: BTreeMap<String, Vec<String>>,
    /// Hosts spoken to in plain HTTP beside loopback.
    pub(crate) plain_http: Vec<String>,
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
    pub(crate) cluster_domain: String,
    pub(crate) node_port_range: (u16, u16),
    pub(crate) api_port: u16,
    pub(crate) agent_port: u16,
    pub(crate) proxy_health_port: u16,
    pub(crate) static_pod_dir: PathBuf,
    pub(crate) kubelet: KubeletConfiguration,
    pub(crate) log: String,
    pub(crate) cni_conf_dir: PathBuf,
    pub(crate) cni_bin_dirs: Vec<PathBuf>,
    pub(crate) registries: RegistriesFile,
    pub(crate) runtime_handlers: BTreeMap<String, PathBuf>,
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
}

impl Settings {
    /// Reads the file that the flags name, or the default one if it exists, and fills in defaults.
    pub(crate) fn load(flags: &ConfigFlags) -> Result<Settings, ConfigError> {
        let file = match &flags.config {
            Some(path) => read(path)?,
            None if Path::new(DEFAULT_FILE).exists() => read(Path::new(DEFAULT_FILE))?,
            None => ConfigFile::default(),
        };
        complete(file, flags.data_dir.clone())
    }
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

fn complete(file: ConfigFile, data_dir_flag: Option<PathBuf>) -> Result<Settings, ConfigError> {
    let data_dir = data_dir_flag.or(file.data_dir);
    if let Some(directory) = &data_dir
        && !directory.is_absolute()
    {
        return Err(field("dataDir", format!("{} is not an absolute path", directory.display())));
    }
    let layout = Layout::new(data_dir);
    let cluster_cidr = file.cluster_cidr.unwrap_or_else(|| net([10, 42, 0, 0], 16));
    let service_cidr = file.service_cidr.unwrap_or_else(|| net([10, 43, 0, 0], 16));
    if cluster_cidr.contains(&service_cidr) || service_cidr.contains(&cluster_cidr) {
        return Err(field("serviceCIDR", format!("{service_cidr} overlaps clusterCIDR {cluster_cidr}")));
    }
    let cluster_dns = match file.cluster_dns {
        Some(address) if service_cidr.contains(&address) => address,
        Some(address) => return Err(field("clusterDNS", format!("{address} is not in serviceCIDR {service_cidr}"))),
        None => service_cidr
            .hosts()
            .nth(9)
            .ok_or_else(|| field("serviceCIDR", format!("{service_cidr} has fewer than ten addresses")))?,
    };
    let node_name = match file.node_name {
        Some(name) => name,
        None => host_name()?,
    };
    check_node_name(&node_name)?;
    let kubelet = file.kubelet.unwrap_or_default();
    // Found out now, so that a wrong field ends with the code for bad configuration.
    kubelet
        .apply(&mut oarlock_agent::Config::new(node_name.clone(), Ipv4Addr::LOCALHOST.into()))
        .map_err(|error| field("kubelet", error.to_string()))?;
    let node_ip = match file.node_ip {
        Some(address) => address,
        None => crate::host::default_address(),
    };
    Ok(Settings {
        node_name,
        node_ip,
        node_labels: file.node_labels,
        max_pods: file.max_pods.unwrap_or(110),
        cluster_cidr,
        service_cidr,
        cluster_dns,
        cluster_domain: file.cluster_domain.unwrap_or_else(|| "cluster.local".to_owned()),
        node_port_range: port_range(file.node_port_range.as_deref().unwrap_or("30000-32767"))?,
        api_port: file.api_port.unwrap_or(6443),
        agent_port: file.agent_port.unwrap_or(10250),
        proxy_health_port: file.proxy_health_port.unwrap_or(10256),
        static_pod_dir: file.static_pod_dir.unwrap_or_else(|| layout.static_pods()),
        kubelet,
        log: file.log.unwrap_or_else(|| "info".to_owned()),
        cni_conf_dir: file.cni.conf_dir.unwrap_or_else(|| layout.cni_conf_dir()),
        cni_bin_dirs: if file.cni.bin_dirs.is_empty() { layout.cni_bin_dirs() } else { file.cni.bin_dirs },
        registries: file.registries,
        runtime_handlers: file.runtime_handlers,
        layout,
    })
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
        Settings::load(&ConfigFlags { config: Some(path), data_dir: None })
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
            ("nodeName: Bad_Name", "nodeName"),
            ("dataDir: relative", "absolute"),
            ("maxPods: many", "maxPods"),
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
    fn a_data_dir_moves_everything() {
        let settings = parse("dataDir: /srv/one\n").expect("valid");
        for path in [settings.layout.run_dir(), settings.cni_conf_dir.clone(), settings.layout.admin_kubeconfig()] {
            assert!(path.starts_with("/srv/one"), "{}", path.display());
        }
    }
}
