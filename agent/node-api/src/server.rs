//! The HTTPS listener of the node API: accepts, authenticates, authorizes, and hands requests to `handlers`.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::header::AUTHORIZATION;
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::answer::{Answer, text};
use crate::backend::{Authorizer, NodeBackend, User};
use crate::handlers::Handlers;
use crate::permission;
use crate::tls::{ReloadingTls, user_of};

/// Connections at one time.
const CONNECTION_LIMIT: usize = 1024;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long requests may take to end at shutdown.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// Where to listen and with which files.
#[derive(Debug, Clone)]
pub struct Config {
    pub listen: SocketAddr,
    /// PEM chain of the serving certificate; read again when it changes.
    pub cert_file: PathBuf,
    pub key_file: PathBuf,
    /// PEM bundle that client certificates must chain to; read again when it changes.
    pub client_ca_file: PathBuf,
    /// Whether logs and sessions in containers are served.
    pub debugging: bool,
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
    config: Config,
    backend: Arc<dyn NodeBackend>,
    authorizer: Arc<dyn Authorizer>,
}

impl NodeApi {
    pub fn new(config: Config, backend: Arc<dyn NodeBackend>, authorizer: Arc<dyn Authorizer>) -> Self {
        Self { config, backend, authorizer }
    }

    /// Serves until `shutdown`; then running requests are ended.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), NodeApiError> {
        let listener = oarlock_listen::tcp(self.config.listen).and_then(TcpListener::from_std).map_err(|source| {
            NodeApiError::Io { operation: format!("bind the node API to {}", self.config.listen), source }
        })?;
        self.serve(listener, shutdown).await
    }

    pub(crate) async fn serve(self, listener: TcpListener, shutdown: CancellationToken) -> Result<(), NodeApiError> {
        let mut tls = ReloadingTls::load(&self.config)?;
        let debugging = self.config.debugging;
        let permits = Arc::new(Semaphore::new(CONNECTION_LIMIT));
        let tasks = TaskTracker::new();
        let gate = Arc::new(Gate {
            authorizer: self.authorizer,
            handlers: Handlers::new(self.backend, tasks.clone(), shutdown.clone(), debugging),
        });
        loop {
            let accepted = tokio::select! {
                () = shutdown.cancelled() => break,
                accepted = listener.accept() => accepted,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(error = %error, "could not accept a connection to the node API");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let Ok(permit) = permits.clone().try_acquire_owned() else {
                tracing::warn!("too many connections to the node API, one was refused");
                continue;
            };
            let acceptor = TlsAcceptor::from(tls.current());
            let (gate, end) = (gate.clone(), shutdown.clone());
            tasks.spawn(async move {
                tokio::select! {
                    () = end.cancelled() => {}
                    () = gate.connection(stream, acceptor) => {}
                }
                drop(permit);
            });
        }
        tasks.close();
        let _ = tokio::time::timeout(DRAIN_TIMEOUT, tasks.wait()).await;
        Ok(())
    }
}

/// Lets in who may.
struct Gate {
    authorizer: Arc<dyn Authorizer>,
    handlers: Handlers,
}

impl Gate {
    async fn connection(self: Arc<Self>, stream: TcpStream, acceptor: TlsAcceptor) {
        let _ = stream.set_nodelay(true);
        // A client that vanished without a word is found out.
        let _ = setsockopt(&stream, sockopt::KeepAlive, &true);
        let _ = setsockopt(&stream, sockopt::TcpKeepIdle, &60);
        let stream = match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                tracing::debug!(error = %error, "a TLS handshake with the node API failed");
                return;
            }
            Err(_) => return,
        };
        let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let user = certificate.and_then(user_of);
        let service = service_fn(|request: Request<Incoming>| {
            let (gate, user) = (self.clone(), user.clone());
            async move { Ok::<_, Infallible>(gate.answer(request, user).await) }
        });
        let served = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .max_buf_size(64 * 1024)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades()
            .await;
        if let Err(error) = served {
            tracing::debug!(error = %error, "a connection to the node API failed");
        }
    }

    async fn answer(&self, request: Request<Incoming>, certified: Option<User>) -> Response<Answer> {
        let user = match certified {
            Some(user) => Some(user),
            None => match bearer(&request) {
                Some(token) => self.authorizer.authenticate_token(token).await,
                None => None,
            },
        };
        let Some(user) = user else {
            return text(StatusCode::UNAUTHORIZED, "Unauthorized");
        };
        let needed = permission::needed(request.method(), request.uri().path());
        for subresource in &needed.subresources {
            if self.authorizer.authorize(&user, needed.verb, subresource).await {
                return self.handlers.handle(request).await;
            }
        }
        tracing::debug!(user = %user.name, verb = needed.verb, path = request.uri().path(), "forbidden");
        let message = format!(
            "Forbidden (user={}, verb={}, resource=nodes, subresource(s)=[{}])",
            user.name,
            needed.verb,
            needed.subresources.join(" ")
        );
        text(StatusCode::FORBIDDEN, &message)
    }
}

fn bearer(request: &Request<Incoming>) -> Option<&str> {
    let value = request.headers().get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    Some(token.trim()).filter(|token| scheme.eq_ignore_ascii_case("bearer") && !token.is_empty())
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
