//! What the API server is told at start. Every path and address comes in through here.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use ipnet::IpNet;

/// Settings of one API server.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where to serve HTTPS.
    pub listen: SocketAddr,
    /// The address clients inside the cluster reach this server at (endpoint of the `kubernetes` Service).
    pub advertise_address: IpAddr,
    /// Holds `store.db`.
    pub data_dir: PathBuf,
    /// Service addresses are taken from here.
    pub service_cidr: IpNet,
    /// Addresses of the other family, in a dual-stack cluster.
    pub second_service_cidr: Option<IpNet>,
    /// The address of the `kube-dns` Service, one of `service_cidr`; none makes no such Service.
    pub cluster_dns: Option<IpAddr>,
    /// Its address of the other family, one of `second_service_cidr`.
    pub second_cluster_dns: Option<IpAddr>,
    /// The cluster's DNS domain.
    pub cluster_domain: String,
    /// Node ports are taken from here, both ends included.
    pub node_port_range: (u16, u16),
    /// Serving certificate chain, PEM.
    pub cert_file: PathBuf,
    /// Serving key, PEM.
    pub key_file: PathBuf,
    /// Client certificates must be signed by one of these, PEM.
    pub client_ca_file: PathBuf,
    /// Signs service-account tokens: PKCS#8 PEM, EC P-256.
    pub service_account_key_file: PathBuf,
    /// Issuer of service-account tokens, and their default audience.
    pub service_account_issuer: String,
    /// Client certificate shown to kubelets, PEM.
    pub kubelet_client_cert_file: PathBuf,
    /// Its key, PEM.
    pub kubelet_client_key_file: PathBuf,
    /// Kubelet serving certificates must be signed by one of these, PEM.
    pub kubelet_ca_file: PathBuf,
    /// What every node of the cluster is told alike, for those that join to read; None publishes nothing.
    pub node_configuration: Option<String>,
    /// How long an Event is kept.
    pub event_ttl_seconds: u32,
}

impl Default for Config {
    fn default() -> Self {
        let data_dir = PathBuf::from("/var/lib/oarlock");
        let pki = data_dir.join("pki");
        Config {
            listen: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 6443)),
            advertise_address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            service_cidr: IpNet::V4(ipnet::Ipv4Net::new_assert(Ipv4Addr::new(10, 43, 0, 0), 16)),
            second_service_cidr: None,
            cluster_dns: None,
            second_cluster_dns: None,
            cluster_domain: "cluster.local".into(),
            node_port_range: (30000, 32767),
            cert_file: pki.join("apiserver.crt"),
            key_file: pki.join("apiserver.key"),
            client_ca_file: pki.join("ca.crt"),
            service_account_key_file: pki.join("service-account.key"),
            service_account_issuer: "https://kubernetes.default.svc.cluster.local".into(),
            kubelet_client_cert_file: pki.join("apiserver-kubelet-client.crt"),
            kubelet_client_key_file: pki.join("apiserver-kubelet-client.key"),
            kubelet_ca_file: pki.join("ca.crt"),
            node_configuration: None,
            event_ttl_seconds: 3600,
            data_dir,
        }
    }
}
