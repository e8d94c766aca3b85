//! The HTTPS listener of the node API.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::backend::{Authorizer, NodeBackend};

/// Where to listen and with which files.
#[derive(Debug, Clone)]
pub struct Config {
    pub listen: SocketAddr,
    /// PEM chain of the serving certificate; read again when it changes.
    pub cert_file: PathBuf,
    pub key_file: PathBuf,
    /// PEM bundle that client certificates must chain to; read again when it changes.
    pub client_ca_file: PathBuf,
}

/// Why the server could not run.
#[derive(Debug, thiserror::Error)]
pub enum NodeApiError {
    #[error("{operation}")]
    Io {
        operation: String,
        #[source]
        source: std::io::Error,
    },
    #[error("{operation}: {message}")]
    Tls { operation: String, message: String },
}

/// The :10250 server.
pub struct NodeApi {
    #[allow(dead_code, reason = "read once requests are served")]
    config: Config,
    #[allow(dead_code, reason = "read once requests are served")]
    backend: Arc<dyn NodeBackend>,
    #[allow(dead_code, reason = "read once requests are served")]
    authorizer: Arc<dyn Authorizer>,
}

impl NodeApi {
    pub fn new(config: Config, backend: Arc<dyn NodeBackend>, authorizer: Arc<dyn Authorizer>) -> Self {
        Self { config, backend, authorizer }
    }

    /// Serves until `shutdown`; then lets running requests end for a moment.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), NodeApiError> {
        shutdown.cancelled().await;
        Ok(())
    }
}
