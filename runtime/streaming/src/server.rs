//! The listener and its one-time URLs.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::backend::{AttachParams, Backend, ExecParams, StreamError};

/// The CRI streaming server.
pub struct StreamingServer {
    address: SocketAddr,
    #[allow(dead_code, reason = "read once requests are served")]
    listener: TcpListener,
    #[allow(dead_code, reason = "read once requests are served")]
    backend: Arc<dyn Backend>,
}

impl StreamingServer {
    /// Binds the listener; nothing is served before [`StreamingServer::run`].
    pub async fn bind(addr: SocketAddr, backend: Arc<dyn Backend>) -> Result<Self, StreamError> {
        let listener = TcpListener::bind(addr)
            .await
            .map_err(|source| StreamError::Io { operation: "bind the streaming listener", source })?;
        let address = listener
            .local_addr()
            .map_err(|source| StreamError::Io { operation: "read the streaming listener's address", source })?;
        Ok(Self { address, listener, backend })
    }

    /// Where the server listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// A one-time URL for this exec, valid for a minute.
    pub fn exec_url(&self, params: ExecParams) -> Result<String, StreamError> {
        Err(StreamError::failed(format!("cannot exec in {} yet", params.container_id)))
    }

    /// A one-time URL for this attach, valid for a minute.
    pub fn attach_url(&self, params: AttachParams) -> Result<String, StreamError> {
        Err(StreamError::failed(format!("cannot attach to {} yet", params.container_id)))
    }

    /// A one-time URL for port-forwarding into this sandbox, valid for a minute. `ports` may be empty.
    pub fn port_forward_url(&self, sandbox_id: &str, ports: Vec<u16>) -> Result<String, StreamError> {
        Err(StreamError::failed(format!("cannot forward {ports:?} to {sandbox_id} yet")))
    }

    /// Serves until `shutdown`.
    pub async fn run(self: Arc<Self>, shutdown: CancellationToken) -> Result<(), StreamError> {
        shutdown.cancelled().await;
        Ok(())
    }
}
