//! The controllers: they watch the cluster's objects and bring what is closer to what was asked for.
//! Owns no storage and no HTTP: everything goes through a `kube::Client`.

use ipnet::IpNet;
use tokio_util::sync::CancellationToken;

/// What the controllers need to know beside what the API tells them.
#[derive(Clone, Debug)]
pub struct Config {
    /// Pod addresses of the whole cluster; each node gets a slice of it.
    pub cluster_cidr: IpNet,
    /// Prefix length of a node's slice (24 for IPv4 by default).
    pub node_cidr_mask: u8,
    /// PEM of the cluster's CA, published as `kube-root-ca.crt` in each namespace.
    pub root_ca_pem: String,
}

/// Why the controllers stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A task that should run for ever ended.
    #[error("controller task {task} ended unexpectedly")]
    TaskEnded { task: &'static str },
}

/// All controllers over one client.
pub struct Controllers {
    _client: kube::Client,
    _config: Config,
}

impl Controllers {
    pub fn new(client: kube::Client, config: Config) -> Self {
        Self { _client: client, _config: config }
    }

    /// Runs until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), Error> {
        shutdown.cancelled().await;
        Ok(())
    }
}
