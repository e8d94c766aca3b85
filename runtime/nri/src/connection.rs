//! One socket to a plugin: calls in both directions at once. One task reads, one writes, and every call under way waits for
//! the answer to its own number.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use prost::Message as _;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_util::bytes::BytesMut;
use tokio_util::sync::CancellationToken;

use crate::error::CallError;
use crate::mux;
use crate::ttrpc::{self, Message, Request, Response, Status};

/// Messages waiting to be written.
const WRITE_QUEUE_MAX: usize = 64;
/// Calls of one plugin that are served at once.
const SERVED_AT_ONCE_MAX: usize = 8;

/// What a plugin may call.
#[async_trait]
pub(crate) trait Service: Send + Sync + 'static {
    /// Answers a call by its full name, `service/method`.
    async fn serve(&self, call: &str, payload: &[u8]) -> Result<Vec<u8>, Status>;
}

/// A status with no more than a code and a message.
pub(crate) fn status(code: i32, message: impl Into<String>) -> Status {
    Status { code, message: message.into() }
}

#[derive(Debug, Default)]
struct Pending {
    next: u32,
    waiting: HashMap<u32, oneshot::Sender<Response>>,
}

/// A connection. Cloned, it is the same one; it closes when told to, or when the plugin goes.
#[derive(Clone, Debug)]
pub(crate) struct Connection {
    pending: Arc<Mutex<Pending>>,
    writer: mpsc::Sender<Vec<u8>>,
    closed: CancellationToken,
}

impl Connection {
    /// Starts to read and write. Until it is closed `service` is kept.
    pub(crate) fn start(stream: UnixStream, service: Arc<dyn Service>) -> Connection {
        let (reader, socket) = stream.into_split();
        let (writer, queue) = mpsc::channel(WRITE_QUEUE_MAX);
        let pending = Arc::new(Mutex::new(Pending { next: 1, waiting: HashMap::new() }));
        let connection = Connection { pending, writer, closed: CancellationToken::new() };
        tokio::spawn(write_all(socket, queue, connection.closed.clone()));
        tokio::spawn(connection.clone().read_all(reader, service));
        connection
    }

    /// Calls the plugin.
    pub(crate) async fn call<A: prost::Message + Default>(
        &self,
        service: &str,
        method: &str,
        request: &impl prost::Message,
        limit: Duration,
    ) -> Result<A, CallError> {
        let envelope = Request {
            service: service.to_owned(),
            method: method.to_owned(),
            payload: request.encode_to_vec(),
            timeout_nano: i64::try_from(limit.as_nanos()).unwrap_or(i64::MAX),
            metadata: Vec::new(),
        };
        let bytes = envelope.encoded_len();
        if bytes > ttrpc::DATA_BYTES_MAX {
            return Err(CallError::TooLong { bytes });
        }
        let (stream, answer) = self.expect_answer();
        let message = mux::cut(mux::PLUGIN, &ttrpc::request(stream, &envelope));
        let exchange = async {
            self.writer.send(message).await.map_err(|_| CallError::Closed)?;
            answer.await.map_err(|_| CallError::Closed)
        };
        let outcome = tokio::select! {
            outcome = tokio::time::timeout(limit, exchange) => outcome.unwrap_or(Err(CallError::TimedOut { limit })),
            () = self.closed.cancelled() => Err(CallError::Closed),
        };
        self.pending.lock().waiting.remove(&stream);
        let response = outcome?;
        match response.status {
            Some(Status { code, message }) if code != 0 => Err(CallError::Status { code, message }),
            _ => A::decode(response.payload.as_slice()).map_err(CallError::Malformed),
        }
    }

    fn expect_answer(&self) -> (u32, oneshot::Receiver<Response>) {
        let (sender, receiver) = oneshot::channel();
        let mut pending = self.pending.lock();
        let stream = pending.next;
        // Whoever makes the connection's calls numbers them with odd numbers.
        pending.next = pending.next.wrapping_add(2);
        pending.waiting.insert(stream, sender);
        (stream, receiver)
    }

    pub(crate) fn close(&self) {
        self.closed.cancel();
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.is_cancelled()
    }

    /// Resolves once the connection is closed, by whomever.
    pub(crate) async fn closed(&self) {
        self.closed.cancelled().await;
    }

    async fn read_all(self, mut reader: OwnedReadHalf, service: Arc<dyn Service>) {
        let _close = self.closed.clone().drop_guard();
        let served = Arc::new(Semaphore::new(SERVED_AT_ONCE_MAX));
        let mut answers = BytesMut::new();
        let mut calls = BytesMut::new();
        loop {
            let piece = tokio::select! {
                piece = read_piece(&mut reader) => piece,
                () = self.closed.cancelled() => return,
            };
            let result = match piece {
                Ok(Some((mux::PLUGIN, data))) => self.take_answers(&mut answers, &data),
                Ok(Some((mux::RUNTIME, data))) => self.take_calls(&mut calls, &data, &service, &served),
                // Connections that nobody knows are nobody's.
                Ok(Some(_)) => Ok(()),
                Ok(None) => return,
                Err(error) => Err(error.to_string()),
            };
            if let Err(error) = result {
                tracing::warn!(error, "connection to an NRI plugin is closed");
                return;
            }
        }
    }

    fn take_answers(&self, buffer: &mut BytesMut, data: &[u8]) -> Result<(), String> {
        buffer.extend_from_slice(data);
        while let Some(message) = ttrpc::take(buffer).map_err(|error| error.to_string())? {
            let Message::Response { stream, response } = message else {
                return Err("a call came where answers are expected".to_owned());
            };
            // Nobody waits any more for an answer that comes late.
            if let Some(waiting) = self.pending.lock().waiting.remove(&stream) {
                let _ = waiting.send(response);
            }
        }
        Ok(())
    }

    fn take_calls(
        &self,
        buffer: &mut BytesMut,
        data: &[u8],
        service: &Arc<dyn Service>,
        served: &Arc<Semaphore>,
    ) -> Result<(), String> {
        buffer.extend_from_slice(data);
        while let Some(message) = ttrpc::take(buffer).map_err(|error| error.to_string())? {
            let Message::Request { stream, request } = message else {
                return Err("an answer came where calls are expected".to_owned());
            };
            let Ok(permit) = served.clone().try_acquire_owned() else {
                let refused = Err(status(ttrpc::RESOURCE_EXHAUSTED, "too many calls at once"));
                tokio::spawn(self.clone().answer(stream, refused));
                continue;
            };
            let (connection, service) = (self.clone(), service.clone());
            tokio::spawn(async move {
                let call = format!("{}/{}", request.service, request.method);
                let outcome = tokio::select! {
                    outcome = service.serve(&call, &request.payload) => outcome,
                    () = connection.closed.cancelled() => return,
                };
                connection.answer(stream, outcome).await;
                drop(permit);
            });
        }
        Ok(())
    }

    async fn answer(self, stream: u32, outcome: Result<Vec<u8>, Status>) {
        let response = match outcome {
            Ok(payload) => Response { status: None, payload },
            Err(status) => Response { status: Some(status), payload: Vec::new() },
        };
        let _ = self.writer.send(mux::cut(mux::RUNTIME, &ttrpc::response(stream, &response))).await;
    }
}

/// The next piece and its connection; None at the end.
async fn read_piece(reader: &mut OwnedReadHalf) -> std::io::Result<Option<(u32, Vec<u8>)>> {
    let mut header = [0; mux::HEADER_BYTES];
    match reader.read_exact(&mut header).await {
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    };
    let (connection, length) = mux::header(header);
    if length > mux::PIECE_BYTES_MAX {
        return Err(std::io::Error::other(format!("a piece of {length} bytes is longer than allowed")));
    }
    let mut data = vec![0; length];
    reader.read_exact(&mut data).await?;
    Ok(Some((connection, data)))
}

async fn write_all(mut socket: OwnedWriteHalf, mut queue: mpsc::Receiver<Vec<u8>>, closed: CancellationToken) {
    let _close = closed.clone().drop_guard();
    loop {
        let message = tokio::select! {
            message = queue.recv() => message,
            () = closed.cancelled() => None,
        };
        let Some(message) = message else { return };
        let written = tokio::select! {
            written = socket.write_all(&message) => written,
            () = closed.cancelled() => return,
        };
        if written.is_err() {
            return;
        }
    }
}
