//! The listener and its one-time URLs.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_TYPE, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_PROTOCOL, UPGRADE};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::upgrade::Upgraded;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::backend::{AttachParams, Backend, ExecParams, StreamError};
use crate::command::Command;
use crate::negotiate::{self, ACCEPTED_PROTOCOLS, NegotiationError, STREAM_PROTOCOL, Upgrade};
use crate::port_forward::{self, Forward};
use crate::tokens::TokenTable;
use crate::{spdy_command, websocket};

/// Sessions at one time.
const CONNECTION_LIMIT: usize = 1024;
/// A session in which nothing passes for so long is ended.
const IDLE_LIMIT: Duration = Duration::from_secs(4 * 3600);
/// How long a client may take to send its request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long running sessions may take to end at shutdown.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// The CRI streaming server.
pub struct StreamingServer {
    address: SocketAddr,
    listener: TcpListener,
    backend: Arc<dyn Backend>,
    waiting: TokenTable<Task>,
    idle_limit: Duration,
}

/// What a token stands for.
#[derive(Debug)]
enum Task {
    Command(Command),
    Forward(Forward),
}

impl Task {
    fn word(&self) -> &'static str {
        match self {
            Task::Command(Command::Exec(_)) => "exec",
            Task::Command(Command::Attach(_)) => "attach",
            Task::Forward(_) => "portforward",
        }
    }
}

type Answer = Response<Full<Bytes>>;
/// What runs once the connection has been upgraded.
type AfterUpgrade = Box<dyn FnOnce(TokioIo<Upgraded>) -> futures::future::BoxFuture<'static, ()> + Send>;

impl StreamingServer {
    /// Binds the listener; nothing is served before [`StreamingServer::run`].
    pub async fn bind(addr: SocketAddr, backend: Arc<dyn Backend>) -> Result<Self, StreamError> {
        let listener = TcpListener::bind(addr)
            .await
            .map_err(|source| StreamError::Io { operation: "bind the streaming listener", source })?;
        let address = listener
            .local_addr()
            .map_err(|source| StreamError::Io { operation: "read the streaming listener's address", source })?;
        Ok(Self { address, listener, backend, waiting: TokenTable::new(), idle_limit: IDLE_LIMIT })
    }

    /// Where the server listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// A one-time URL for this exec, valid for a minute.
    pub fn exec_url(&self, params: ExecParams) -> Result<String, StreamError> {
        if params.command.is_empty() {
            return Err(StreamError::Invalid { message: "the command is empty".to_string() });
        }
        check_streams(params.tty, params.stdin, params.stdout, params.stderr)?;
        self.url(Task::Command(Command::Exec(params)))
    }

    /// A one-time URL for this attach, valid for a minute.
    pub fn attach_url(&self, params: AttachParams) -> Result<String, StreamError> {
        check_streams(params.tty, params.stdin, params.stdout, params.stderr)?;
        self.url(Task::Command(Command::Attach(params)))
    }

    /// A one-time URL for port-forwarding into this sandbox, valid for a minute. `ports` may be empty: all are allowed.
    pub fn port_forward_url(&self, sandbox_id: &str, ports: Vec<u16>) -> Result<String, StreamError> {
        self.url(Task::Forward(Forward { sandbox_id: sandbox_id.to_string(), ports }))
    }

    fn url(&self, task: Task) -> Result<String, StreamError> {
        let word = task.word();
        let token = self.waiting.put(task)?;
        Ok(format!("http://{}/{word}/{token}", self.address))
    }

    /// Serves until `shutdown`.
    pub async fn run(self: Arc<Self>, shutdown: CancellationToken) -> Result<(), StreamError> {
        let permits = Arc::new(Semaphore::new(CONNECTION_LIMIT));
        let tasks = TaskTracker::new();
        loop {
            let accepted = tokio::select! {
                () = shutdown.cancelled() => break,
                accepted = self.listener.accept() => accepted,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(error = %error, "could not accept a streaming connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let Ok(permit) = permits.clone().try_acquire_owned() else {
                tracing::warn!("too many streaming connections, one was refused");
                continue;
            };
            let (server, end) = (self.clone(), shutdown.clone());
            tasks.spawn(async move {
                tokio::select! {
                    () = end.cancelled() => {}
                    () = server.connection(stream) => {}
                }
                drop(permit);
            });
        }
        tasks.close();
        let _ = tokio::time::timeout(DRAIN_TIMEOUT, tasks.wait()).await;
        Ok(())
    }

    /// One connection: one request, and what it is upgraded to.
    async fn connection(self: Arc<Self>, stream: TcpStream) {
        let _ = stream.set_nodelay(true);
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let sender = parking_lot::Mutex::new(Some(sender));
        let service = service_fn(|mut request: Request<Incoming>| {
            let answer = match self.answer(&request) {
                Ok((answer, after)) => {
                    if let Some(sender) = sender.lock().take() {
                        let _ = sender.send((hyper::upgrade::on(&mut request), after));
                    }
                    answer
                }
                Err(answer) => *answer,
            };
            async move { Ok::<_, Infallible>(answer) }
        });
        let served = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(REQUEST_TIMEOUT)
            .max_buf_size(64 * 1024)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades()
            .await;
        if let Err(error) = served {
            tracing::debug!(error = %error, "a streaming connection failed");
            return;
        }
        drop(sender);
        let Ok((upgrade, after)) = receiver.await else { return };
        match upgrade.await {
            Ok(upgraded) => after(TokioIo::new(upgraded)).await,
            Err(error) => tracing::debug!(error = %error, "a streaming upgrade failed"),
        }
    }

    /// The answer to a request, with what follows a 101.
    fn answer(&self, request: &Request<Incoming>) -> Result<(Answer, AfterUpgrade), Box<Answer>> {
        if !matches!(*request.method(), Method::GET | Method::POST) {
            return Err(Box::new(plain(StatusCode::METHOD_NOT_ALLOWED, "only GET and POST are served")));
        }
        let path = request.uri().path().trim_start_matches('/');
        let task = path.split_once('/').and_then(|(word, token)| {
            let task = self.waiting.take(token)?;
            (task.word() == word).then_some(task)
        });
        let Some(task) = task else {
            let message = "no such request: the URL is wrong, used or too old";
            return Err(Box::new(plain(StatusCode::NOT_FOUND, message)));
        };
        let headers = request.headers();
        let upgrade = negotiate::upgrade(headers).map_err(refusal)?;
        match (upgrade, task) {
            (Upgrade::Spdy, Task::Command(command)) => {
                let (version, name) = negotiate::spdy_command(headers).map_err(refusal)?;
                let (backend, idle) = (self.backend.clone(), self.idle_limit);
                let after: AfterUpgrade =
                    Box::new(move |io| Box::pin(spdy_command::serve(io, version, command, backend, idle)));
                Ok((spdy_accepted(name), after))
            }
            (Upgrade::Spdy, Task::Forward(forward)) => {
                let name = negotiate::spdy_port_forward(headers).map_err(refusal)?;
                let (backend, idle) = (self.backend.clone(), self.idle_limit);
                let after: AfterUpgrade = Box::new(move |io| Box::pin(port_forward::serve(io, forward, backend, idle)));
                Ok((spdy_accepted(name), after))
            }
            (Upgrade::WebSocket, Task::Command(command)) => {
                let key = negotiate::websocket_key(headers).map_err(refusal)?;
                let (version, encoding, name) = negotiate::websocket_command(headers).map_err(refusal)?;
                let (backend, idle) = (self.backend.clone(), self.idle_limit);
                let after: AfterUpgrade = Box::new(move |io| {
                    Box::pin(async move {
                        let socket = websocket::server(io).await;
                        websocket::serve_command(socket, version, encoding, command, backend, idle).await;
                    })
                });
                Ok((websocket_accepted(key, name), after))
            }
            (Upgrade::WebSocket, Task::Forward(forward)) => {
                let key = negotiate::websocket_key(headers).map_err(refusal)?;
                let name = negotiate::websocket_port_forward(headers).map_err(refusal)?;
                let (backend, idle) = (self.backend.clone(), self.idle_limit);
                let after: AfterUpgrade = Box::new(move |io| {
                    Box::pin(async move {
                        let bytes = websocket::MessageBytes::new(websocket::server(io).await);
                        port_forward::serve(bytes, forward, backend, idle).await;
                    })
                });
                Ok((websocket_accepted(key, Some(&name)), after))
            }
        }
    }
}

fn check_streams(tty: bool, stdin: bool, stdout: bool, stderr: bool) -> Result<(), StreamError> {
    if tty && stderr {
        return Err(StreamError::Invalid { message: "tty and stderr cannot both be true".to_string() });
    }
    if !stdin && !stdout && !stderr {
        return Err(StreamError::Invalid { message: "one of stdin, stdout or stderr must be set".to_string() });
    }
    Ok(())
}

fn plain(status: StatusCode, message: &str) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(format!("{message}\n"))));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    // A connection serves one request. An upgrade's answer must not say so: clients that look for `Connection: Upgrade`
    // alone would refuse it.
    answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    answer
}

fn refusal(error: NegotiationError) -> Box<Answer> {
    let status = match &error {
        NegotiationError::NoCommonProtocol { .. } => StatusCode::FORBIDDEN,
        _ => StatusCode::BAD_REQUEST,
    };
    let mut answer = plain(status, &error.to_string());
    if let NegotiationError::NoCommonProtocol { server, .. } = error {
        for name in server {
            answer.headers_mut().append(ACCEPTED_PROTOCOLS, HeaderValue::from_static(name));
        }
    }
    Box::new(answer)
}

fn switching(upgrade: &'static str) -> Answer {
    let mut answer = Response::new(Full::default());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    answer.headers_mut().insert(UPGRADE, HeaderValue::from_static(upgrade));
    answer
}

fn spdy_accepted(name: Option<&'static str>) -> Answer {
    let mut answer = switching("SPDY/3.1");
    if let Some(name) = name {
        answer.headers_mut().insert(STREAM_PROTOCOL, HeaderValue::from_static(name));
    }
    answer
}

fn websocket_accepted(key: &[u8], name: Option<&str>) -> Answer {
    let mut answer = switching("websocket");
    if let Ok(accept) = HeaderValue::from_str(&derive_accept_key(key)) {
        answer.headers_mut().insert(SEC_WEBSOCKET_ACCEPT, accept);
    }
    if let Some(Ok(name)) = name.map(HeaderValue::from_str) {
        answer.headers_mut().insert(SEC_WEBSOCKET_PROTOCOL, name);
    }
    answer
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
