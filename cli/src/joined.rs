//! What all nodes of a cluster are told alike ([`ClusterFile`]), and what a machine that joined keeps of it ([`Joined`]).
//!
//! The server publishes the first; `oarlock join` writes the second into the data directory, and from then on every command on
//! that machine reads it over the configuration file.

use std::fs;
use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::config::{ConfigError, ConfigFile, Settings};
use crate::layout::Layout;
use crate::one_or_two::OneOrTwo;
use crate::pki;

/// The settings that must be the same on every node, by the names that they have in the configuration file. Fields that a later
/// server adds are not minded.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ClusterFile {
    #[serde(rename = "clusterCIDR")]
    cluster_cidr: OneOrTwo<IpNet>,
    #[serde(rename = "serviceCIDR")]
    service_cidr: OneOrTwo<IpNet>,
    #[serde(rename = "clusterDNS")]
    cluster_dns: OneOrTwo<IpAddr>,
    cluster_domain: String,
    node_port_range: String,
    node_tunnel: String,
    #[serde(rename = "externalIPsAllowed", default)]
    external_ips_allowed: Vec<IpNet>,
    #[serde(default)]
    load_balancer_pools: Vec<String>,
}

impl ClusterFile {
    /// As this server has it.
    pub(crate) fn of(settings: &Settings) -> Self {
        let second = settings.secondary.as_ref();
        let (low, high) = settings.node_port_range;
        let tunnel = match settings.node_tunnel {
            oarlock_netproxy::Tunnel::Auto => "auto",
            oarlock_netproxy::Tunnel::Vxlan => "vxlan",
            oarlock_netproxy::Tunnel::Wireguard => "wireguard",
            oarlock_netproxy::Tunnel::None => "none",
        };
        Self {
            cluster_cidr: OneOrTwo { first: settings.cluster_cidr, second: second.map(|second| second.cluster_cidr) },
            service_cidr: OneOrTwo { first: settings.service_cidr, second: second.map(|second| second.service_cidr) },
            cluster_dns: OneOrTwo { first: settings.cluster_dns, second: second.map(|second| second.cluster_dns) },
            cluster_domain: settings.cluster_domain.clone(),
            node_port_range: format!("{low}-{high}"),
            node_tunnel: tunnel.to_owned(),
            external_ips_allowed: settings.external_ips_allowed.clone(),
            load_balancer_pools: settings.load_balancer_pools.iter().map(ToString::to_string).collect(),
        }
    }
}

/// What a machine that joined a cluster keeps.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Joined {
    /// The API server, as a URL.
    pub(crate) server: String,
    /// As given when it joined, so that it is the same node the next time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) node_name: Option<String>,
    #[serde(rename = "nodeIP", skip_serializing_if = "Option::is_none")]
    pub(crate) node_ip: Option<OneOrTwo<IpAddr>>,
    pub(crate) cluster: ClusterFile,
}

impl ClusterFile {
    /// These settings with all of `told` that can change while a cluster runs, and the names of what differs beside that.
    pub(crate) fn with_changes_of(&self, told: &ClusterFile) -> (ClusterFile, Vec<&'static str>) {
        // Every field is named, so that of a new one it is said which of both it is.
        let ClusterFile {
            cluster_cidr,
            service_cidr,
            cluster_dns,
            cluster_domain,
            node_port_range,
            node_tunnel,
            external_ips_allowed,
            load_balancer_pools,
        } = told;
        let changed = ClusterFile {
            node_tunnel: node_tunnel.clone(),
            external_ips_allowed: external_ips_allowed.clone(),
            load_balancer_pools: load_balancer_pools.clone(),
            ..self.clone()
        };
        let differs = [
            ("clusterCIDR", self.cluster_cidr != *cluster_cidr),
            ("serviceCIDR", self.service_cidr != *service_cidr),
            ("clusterDNS", self.cluster_dns != *cluster_dns),
            ("clusterDomain", self.cluster_domain != *cluster_domain),
            ("nodePortRange", self.node_port_range != *node_port_range),
        ];
        (changed, differs.into_iter().filter(|(_, differs)| *differs).map(|(name, _)| name).collect())
    }

    /// The pools as networks.
    pub(crate) fn pools(&self) -> Vec<IpNet> {
        self.load_balancer_pools.iter().filter_map(|pool| pool.parse().ok()).collect()
    }
}

impl Joined {
    /// What the data directory says; None on a machine that has not joined anything.
    pub(crate) fn read(layout: &Layout) -> Result<Option<Self>, ConfigError> {
        let path = layout.joined_file();
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(ConfigError::Read { path, source }),
        };
        let read = serde_yaml_ng::from_str(&text);
        read.map(Some).map_err(|error| ConfigError::Parse { path, message: error.to_string() })
    }

    /// Keeps it, whole or not at all.
    pub(crate) fn write(&self, layout: &Layout) -> anyhow::Result<()> {
        Ok(pki::write_private(&layout.joined_file(), &serde_yaml_ng::to_string(self)?)?)
    }

    /// The cluster's settings win over those of the machine's own file, and so does the name that it joined by.
    pub(crate) fn apply(&self, file: &mut ConfigFile) {
        let cluster = self.cluster.clone();
        file.cluster_cidr = Some(cluster.cluster_cidr);
        file.service_cidr = Some(cluster.service_cidr);
        file.cluster_dns = Some(cluster.cluster_dns);
        file.cluster_domain = Some(cluster.cluster_domain);
        file.node_port_range = Some(cluster.node_port_range);
        file.node_tunnel = Some(cluster.node_tunnel);
        file.external_ips_allowed = cluster.external_ips_allowed;
        file.load_balancer_pools = cluster.load_balancer_pools;
        if self.node_name.is_some() {
            file.node_name.clone_from(&self.node_name);
        }
        if self.node_ip.is_some() {
            file.node_ip.clone_from(&self.node_ip);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ConfigFlags;

    fn load(directory: &std::path::Path, text: &str) -> Settings {
        let path = directory.join("config.yaml");
        fs::write(&path, format!("dataDir: {}\n{text}", directory.display())).expect("write");
        Settings::load(&ConfigFlags { config: Some(path), ..ConfigFlags::default() }).expect("valid")
    }

    #[test]
    fn a_node_has_the_settings_of_the_cluster_that_it_joined() {
        let (server, node) = (tempfile::tempdir().expect("tempdir"), tempfile::tempdir().expect("tempdir"));
        let server = load(
            server.path(),
            "clusterCIDR: 10.52.0.0/16,fd52::/48\nserviceCIDR: 10.53.0.0/16,fd53::/112\nclusterDomain: sea.example\nnodeTunnel: vxlan\nnodeIP: 192.0.2.1\nloadBalancerPools: [198.51.100.4-198.51.100.9]\n",
        );
        let before = load(node.path(), "nodeName: own\nnodeIP: 192.0.2.2\n");
        assert_eq!(before.joined, None);
        let joined = Joined {
            server: "https://192.0.2.1:6443".to_owned(),
            node_name: Some("given".to_owned()),
            node_ip: None,
            cluster: ClusterFile::of(&server),
        };
        joined.write(&before.layout).expect("write");
        let after = load(node.path(), "nodeName: own\nnodeIP: 192.0.2.2\nclusterDomain: cluster.local\n");
        assert_eq!(after.server_url(), "https://192.0.2.1:6443");
        assert_eq!((after.node_name.as_str(), after.node_ip.to_string()), ("given", "192.0.2.2".to_owned()));
        assert_eq!((after.cluster_cidr, after.cluster_dns), (server.cluster_cidr, server.cluster_dns));
        assert_eq!(after.secondary.map(|second| second.service_cidr), Some("fd53::/112".parse().expect("network")));
        assert_eq!((after.cluster_domain.as_str(), after.node_tunnel), ("sea.example", server.node_tunnel));
        assert_eq!(after.load_balancer_pools, server.load_balancer_pools);
    }

    #[test]
    fn what_changes_is_taken_up_and_what_cannot_is_named() {
        let directory = tempfile::tempdir().expect("tempdir");
        let before = ClusterFile::of(&load(directory.path(), "nodeIP: 192.0.2.1\n"));
        let at_once = "nodeTunnel: vxlan\nexternalIPsAllowed: [198.51.100.0/24]\nloadBalancerPools: [203.0.113.0/29]\n";
        let wanted = ClusterFile::of(&load(directory.path(), &format!("nodeIP: 192.0.2.1\n{at_once}")));
        assert_eq!(before.with_changes_of(&wanted), (wanted.clone(), vec![]));
        let never = "clusterCIDR: 10.52.0.0/16\nserviceCIDR: 10.53.0.0/16\nclusterDNS: 10.53.0.9\n\
            clusterDomain: sea.example\nnodePortRange: 30000-30100\n";
        let told = ClusterFile::of(&load(directory.path(), &format!("nodeIP: 192.0.2.1\n{at_once}{never}")));
        let named = vec!["clusterCIDR", "serviceCIDR", "clusterDNS", "clusterDomain", "nodePortRange"];
        assert_eq!(before.with_changes_of(&told), (wanted, named));
    }

    #[test]
    fn what_this_machine_cannot_have_is_known_before_it_is_kept() {
        let directory = tempfile::tempdir().expect("tempdir");
        let server = load(directory.path(), "nodeIP: 192.0.2.1\n");
        let flags = ConfigFlags { config: Some(directory.path().join("config.yaml")), ..ConfigFlags::default() };
        let told = |pools: &[&str]| Joined {
            server: "https://192.0.2.9:6443".to_owned(),
            node_name: None,
            node_ip: None,
            cluster: ClusterFile {
                load_balancer_pools: pools.iter().map(|pool| (*pool).to_owned()).collect(),
                ..ClusterFile::of(&server)
            },
        };
        assert!(Settings::load_as(&flags, &told(&["198.51.100.1/32"])).is_ok());
        // The node's own address among those of Services.
        assert!(Settings::load_as(&flags, &told(&["192.0.2.1/32"])).is_err());
    }
}
