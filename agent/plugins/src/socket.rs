//! gRPC over unix sockets, both ends: a client's channel, and serving one service without a router.

use std::convert::Infallible;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::transport::{Channel, Endpoint};
use tower::Service;

const CONNECT: Duration = Duration::from_secs(10);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Connections at one time.
const CONNECTIONS: usize = 128;

/// A channel to the socket; connects when first used, and again when the other side came back.
pub fn channel(socket: &Path) -> Channel {
    let socket: PathBuf = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://localhost").connect_timeout(CONNECT).connect_with_connector_lazy(connector)
}

/// Listens at `path`, in the place of whatever socket was there; only root may connect.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => std::fs::remove_file(path)?,
        Ok(_) => return Err(io::Error::new(io::ErrorKind::AlreadyExists, "it is there and no socket")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves `service` until `shutdown`; requests under way are cut off then.
pub async fn serve<S>(listener: UnixListener, service: S, shutdown: CancellationToken)
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    let turns = std::sync::Arc::new(tokio::sync::Semaphore::new(CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a connection to a plugin socket could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(turn) = turns.clone().try_acquire_owned() else { continue };
        let (service, end) = (service.clone(), shutdown.clone());
        tokio::spawn(async move {
            let answer = service_fn(move |request: http::Request<Incoming>| {
                let mut service = service.clone();
                async move { service.call(request.map(Body::new)).await }
            });
            let mut builder = http2::Builder::new(TokioExecutor::new());
            let connection = builder.timer(TokioTimer::new()).serve_connection(TokioIo::new(stream), answer);
            tokio::select! {
                _ = connection => {}
                () = end.cancelled() => {}
            }
            drop(turn);
        });
    }
}

/// A status as gRPC shows it.
pub(crate) fn shown(status: &tonic::Status) -> String {
    let code = match status.code() {
        tonic::Code::Cancelled => "Canceled".to_owned(),
        code => format!("{code:?}"),
    };
    format!("rpc error: code = {code} desc = {}", status.message())
}
