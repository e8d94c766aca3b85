//! The API server: Kubernetes' HTTP API over stored bytes.
//!
//! Owns the wire (TLS, HTTP, discovery, content negotiation, errors), who may do what (authentication, RBAC, the node
//! rules, admission), and the generic registry that reads, writes and watches every kind. It does not own what a kind
//! looks like (`oarlock-schema`, `oarlock-kinds`) nor how bytes are kept (`oarlock-store`).
//!
//! ```text
//! connection ─▶ authn ─▶ authz ─▶ handler ─▶ registry ─▶ admission ─▶ strategy ─▶ store
//! in-process client ────▶ │                    └─▶ connect ─▶ kubelet
//! ```

mod admission;
mod authn;
mod authz;
mod body;
mod bootstrap;
mod bootstrap_tokens;
mod client;
mod config;
mod core;
mod discovery;
mod error;
mod handler;
mod kubelet;
mod metrics;
mod negotiate;
mod object;
mod registry;
mod request;
mod resource_metrics;
mod selector;
mod server;
mod serving_cert;
mod strategy;
mod table;
mod tokens;
mod user;
mod wire;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use oarlock_store::{SqliteOptions, SqliteStore, Store, StoreError};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

pub use config::Config;

use crate::core::Core;

/// Why the API server could not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The data directory could not be made.
    #[error("could not create {path}")]
    DataDir {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// The store could not be opened or written.
    #[error("the store is not usable")]
    Store {
        #[source]
        source: StoreError,
    },
    /// A certificate file could not be read.
    #[error("certificate {path} is not usable: {detail}")]
    Certificate { path: PathBuf, detail: String },
    /// A key file could not be read.
    #[error("key {path} is not usable: {detail}")]
    Key { path: PathBuf, detail: String },
    /// A certificate and its key or authority do not make a TLS configuration.
    #[error("TLS cannot be set up with {path}")]
    Tls {
        path: PathBuf,
        #[source]
        source: rustls::Error,
    },
    /// The address is taken or not ours.
    #[error("could not listen on {address}")]
    Listen {
        address: SocketAddr,
        #[source]
        source: std::io::Error,
    },
    /// The table of kinds lacks something the server itself needs.
    #[error("the table of kinds has no RBAC rows")]
    Kinds,
}

/// So many requests are worked on at once; more wait a little and are then asked to come back.
const MAX_REQUESTS: usize = 600;

/// A Kubernetes API server.
pub struct ApiServer {
    core: Arc<Core>,
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

impl ApiServer {
    /// Opens the store, reads certificates and keys, brings the built-in objects up to date and binds the port.
    /// With port 0 in `listen` the system chooses one, see [`ApiServer::local_addr`].
    pub async fn new(mut config: Config) -> Result<Self, Error> {
        let address = config.listen;
        let listen = |source| Error::Listen { address, source };
        let acceptor = server::tls(&config)?;
        let tokens = tokens::Tokens::load(&config.service_account_key_file, &config.service_account_issuer)?;
        let kubelets = kubelet::Kubelets::new(&config)?;
        let listener = oarlock_listen::tcp(address).and_then(TcpListener::from_std).map_err(listen)?;
        config.listen = listener.local_addr().map_err(listen)?;
        let store = open_store(&config).await?;
        bootstrap::bootstrap(&config, &*store).await?;
        let core = Core {
            discovery: discovery::Discovery::new(&config),
            config,
            store,
            tokens,
            rbac: authz::rbac::Rbac::new().ok_or(Error::Kinds)?,
            services: strategy::services::Allocator::default(),
            kubelets,
            metrics: metrics::Metrics::default(),
            resource_metrics: Default::default(),
            places: tokio::sync::Semaphore::new(MAX_REQUESTS),
            stopping: CancellationToken::new(),
        };
        Ok(ApiServer { core: Arc::new(core), listener, acceptor })
    }

    /// The address that is served.
    pub fn local_addr(&self) -> SocketAddr {
        self.core.config.listen
    }

    /// A client that calls this server without a connection, authenticated as the given user. Works as long as any
    /// clone of it lives, before, during and after `run`; it cannot upgrade connections (exec, port-forward).
    pub fn client(&self, user: &str, groups: &[&str]) -> kube::Client {
        client::client(self.core.clone(), user, groups)
    }

    /// Serves until `shutdown` is cancelled; then ends watches and lets requests under way finish.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), Error> {
        let ApiServer { core, listener, acceptor } = self;
        tracing::info!(address = %core.config.listen, "serving the API");
        server::serve(core, listener, acceptor, shutdown).await;
        tracing::info!("the API server has stopped");
        Ok(())
    }
}

async fn open_store(config: &Config) -> Result<Arc<dyn Store>, Error> {
    let directory = config.data_dir.clone();
    let opened = tokio::task::spawn_blocking(move || {
        std::fs::create_dir_all(&directory).map_err(|source| Error::DataDir { path: directory.clone(), source })?;
        let options = SqliteOptions::new(directory.join("store.db"));
        SqliteStore::open(options).map_err(|source| Error::Store { source })
    });
    match opened.await {
        Ok(store) => Ok(Arc::new(store?)),
        Err(_) => Err(Error::Store { source: StoreError::Closed }),
    }
}
