//! Port-forward over SPDY: for each connection a data stream and an error stream, paired by `requestID`.
//!
//! A connection that fails says so on its error stream; the session and its other connections go on.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::backend::{Backend, StreamError};
use crate::idle;
use crate::spdy::{Role, Session, Stream};

/// A stream whose partner does not come within this is dropped.
const PAIRING_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes between a stream and the backend in each direction.
const PIPE_BYTES: usize = 64 * 1024;
/// Connections at one time.
const CONNECTION_LIMIT: usize = 256;

/// Streams that wait for their partner.
struct Half {
    data: Option<Stream>,
    error: Option<Stream>,
    since: Instant,
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Forward {
    pub sandbox_id: String,
    /// Empty allows every port.
    pub ports: Vec<u16>,
}

/// Serves one port-forward session over `io` until the client ends it.
pub(crate) async fn serve<IO: AsyncRead + AsyncWrite + Send + 'static>(
    io: IO,
    forward: Forward,
    backend: Arc<dyn Backend>,
    idle_limit: Duration,
) {
    let mut session = Session::start(io, Role::Server);
    let pulse = session.pulse();
    let mut halves: HashMap<String, Half> = HashMap::new();
    let mut connections = JoinSet::new();
    let mut sweep = tokio::time::interval(PAIRING_TIMEOUT / 2);
    loop {
        tokio::select! {
            stream = session.accept() => {
                let Some(stream) = stream else { break };
                let Some((data, error)) = pair(&mut halves, stream) else { continue };
                let (forward, backend) = (forward.clone(), backend.clone());
                if connections.len() >= CONNECTION_LIMIT {
                    connections.spawn(fail(error, "too many connections".to_string()));
                } else {
                    connections.spawn(connection(forward, backend, data, error));
                }
            }
            Some(_) = connections.join_next() => {}
            _ = sweep.tick() => halves.retain(|_, half| half.since.elapsed() < PAIRING_TIMEOUT),
            () = idle::expired(idle_limit, || pulse.idle()) => break,
        }
    }
    connections.shutdown().await;
    session.finish().await;
}

/// Puts a stream beside its partner; gives both when they are complete. What cannot be placed is dropped, which resets it.
fn pair(halves: &mut HashMap<String, Half>, stream: Stream) -> Option<(Stream, Stream)> {
    let kind = stream.headers.get("streamtype")?.to_string();
    let key = request_key(&stream, &kind)?;
    let known = halves.len();
    let half = halves.entry(key.clone()).or_insert_with(|| Half { data: None, error: None, since: Instant::now() });
    let place = if kind == "data" { &mut half.data } else { &mut half.error };
    if place.is_some() || known > CONNECTION_LIMIT {
        return None;
    }
    *place = Some(stream);
    if half.data.is_none() || half.error.is_none() {
        return None;
    }
    let half = halves.remove(&key)?;
    half.data.zip(half.error)
}

/// What pairs streams. Old clients send no requestID: they open the error stream first and the data stream next.
fn request_key(stream: &Stream, kind: &str) -> Option<String> {
    if !matches!(kind, "data" | "error") {
        return None;
    }
    let key = match stream.headers.get("requestid") {
        Some(id) if id.len() <= 64 => id.to_string(),
        Some(_) => return None,
        None if kind == "error" => stream.id.to_string(),
        None => stream.id.checked_sub(2)?.to_string(),
    };
    Some(key)
}

/// One forwarded connection.
async fn connection(forward: Forward, backend: Arc<dyn Backend>, data: Stream, error: Stream) {
    let port: Option<u16> = data.headers.get("port").and_then(|port| port.parse().ok()).filter(|port| *port > 0);
    let Some(port) = port.filter(|port| forward.ports.is_empty() || forward.ports.contains(port)) else {
        let asked = data.headers.get("port").unwrap_or_default();
        return fail(error, format!("invalid port {asked:?}")).await;
    };
    let result = relay(&*backend, &forward.sandbox_id, port, data).await;
    match result {
        Ok(()) => drop(error),
        Err(cause) => {
            let message = cause.full_message();
            fail(error, format!("error forwarding port {port} to pod {}: {message}", forward.sandbox_id)).await;
        }
    }
}

/// Copies both ways, each direction to its own end.
async fn relay(backend: &dyn Backend, sandbox_id: &str, port: u16, data: Stream) -> Result<(), StreamError> {
    let (near, far) = tokio::io::duplex(PIPE_BYTES);
    let (mut near_read, mut near_write) = tokio::io::split(near);
    let Stream { mut reader, mut writer, .. } = data;
    let upstream = async {
        let _ = tokio::io::copy(&mut reader, &mut near_write).await;
        let _ = near_write.shutdown().await;
        // The stream is kept: dropping the reader early would reset what still comes back.
        reader
    };
    let downstream = async {
        let _ = tokio::io::copy(&mut near_read, &mut writer).await;
        let _ = writer.shutdown().await;
    };
    let work = backend.port_forward(sandbox_id, port, far);
    tokio::pin!(upstream, downstream, work);
    let mut kept = None;
    let mut drained = false;
    loop {
        tokio::select! {
            result = &mut work => {
                // What the backend wrote before it ended still goes out.
                if result.is_ok() && !drained {
                    downstream.await;
                }
                return result;
            }
            reader = &mut upstream, if kept.is_none() => kept = Some(reader),
            () = &mut downstream, if !drained => drained = true,
        }
    }
}

async fn fail(mut error: Stream, message: String) {
    tracing::debug!(reason = %message, "a forwarded connection failed");
    let _ = error.writer.write_all(message.as_bytes()).await;
    let _ = error.writer.shutdown().await;
}
