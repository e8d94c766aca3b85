//! The API server: Kubernetes' HTTP API over stored bytes.
//!
//! Owns the wire (TLS, HTTP, discovery, content negotiation, errors), who may do what (authentication, RBAC, the node
//! rules, admission), and the generic registry that reads, writes and watches every kind. It does not own what a kind
//! looks like (`oarlock-schema`, `oarlock-kinds`) nor how bytes are kept (`oarlock-store`).

mod config;

pub use config::Config;

use tokio_util::sync::CancellationToken;

/// Why the API server could not start or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not there yet.
    #[error("the API server is not built yet")]
    Unbuilt,
}

/// A Kubernetes API server.
pub struct ApiServer {}

impl ApiServer {
    /// Opens the store, reads certificates and keys and brings the built-in objects up to date.
    pub async fn new(_config: Config) -> Result<Self, Error> {
        Err(Error::Unbuilt)
    }

    /// A client that calls this server without a connection, authenticated as the given user.
    pub fn client(&self, _user: &str, _groups: &[&str]) -> kube::Client {
        unreachable!("new() never succeeds")
    }

    /// Serves until `shutdown` is cancelled.
    pub async fn run(self, _shutdown: CancellationToken) -> Result<(), Error> {
        Ok(())
    }
}
