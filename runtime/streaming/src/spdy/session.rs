//! A SPDY/3.1 session over any byte stream: one task reads frames, one writes them.
//!
//! Bounds: frames and headers by `frame` and `headers`, streams by [`STREAM_LIMIT`], what a stream's reader may be behind by
//! its queue (a full one holds the whole session back), what may wait to be sent by [`OUT_QUEUE`]. A bad frame about one
//! stream resets that stream; only a broken framing ends the session.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard, PollSender};

use super::frame::{self, Control, Encoder, FrameError, HEAD_BYTES, Head, Out, Reset};
use super::headers::{HeaderReader, Headers};
use super::stream::{Stream, StreamReader, StreamWriter};
use super::window::Window;
use crate::chunks::{CHUNK_BYTES, ChunkReader, QUEUE_CHUNKS};

/// Streams open at one time.
const STREAM_LIMIT: usize = 1024;
/// Frames waiting to be sent.
const OUT_QUEUE: usize = 64;
/// Streams opened by the peer and not yet taken.
const INCOMING_QUEUE: usize = 16;
/// Frames are gathered up to this many bytes for one write.
const WRITE_BATCH_BYTES: usize = 64 * 1024;
/// Taken bytes are credited to the peer in steps of this.
const CREDIT_STEP_BYTES: u32 = 32 * 1024;
/// A ping as often as this finds out that the peer is gone.
const PING_PERIOD: Duration = Duration::from_secs(30);
/// After the last frame, the peer's remaining input is read for this long: closing with input unread would reset the
/// connection and could lose that last frame.
const LINGER: Duration = Duration::from_secs(2);

/// Which side of the session this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Server,
    #[cfg_attr(not(test), allow(dead_code, reason = "the tests' client"))]
    Client,
}

/// A running session. Dropping it ends it.
pub(crate) struct Session {
    incoming: mpsc::Receiver<Stream>,
    shared: Arc<Shared>,
    #[cfg_attr(not(test), allow(dead_code, reason = "only the tests' client opens streams"))]
    next_id: u32,
    _guard: DropGuard,
}

/// Tells whether a session lives.
pub(crate) struct Pulse {
    shared: Arc<Shared>,
}

impl Pulse {
    /// Completes when the peer is gone or the session ended. Cancel safe.
    pub async fn closed(&self) {
        self.shared.closed.cancelled().await;
    }

    /// For how long no data has passed.
    pub fn idle(&self) -> Duration {
        self.shared.active_at.lock().elapsed()
    }
}

/// What tasks and streams share.
pub(crate) struct Shared {
    streams: Mutex<HashMap<u32, Entry>>,
    out: mpsc::Sender<Out>,
    pub(super) window: Window,
    /// Nothing more is read or written.
    closed: CancellationToken,
    last_peer_id: AtomicU32,
    /// Bytes taken and not yet credited to the peer, by stream (0 is the session).
    credits: Mutex<HashMap<u32, u32>>,
    credited: Notify,
    active_at: Mutex<Instant>,
}

struct Entry {
    inbound: Option<mpsc::Sender<Bytes>>,
    window: Arc<Window>,
    peer_finished: bool,
    reader_gone: bool,
    writer_gone: bool,
}

impl Session {
    /// Starts the session's tasks.
    pub fn start<IO: AsyncRead + AsyncWrite + Send + 'static>(io: IO, role: Role) -> Session {
        let (out, out_receiver) = mpsc::channel(OUT_QUEUE);
        let (incoming_sender, incoming) = mpsc::channel(INCOMING_QUEUE);
        let closed = CancellationToken::new();
        let shared = Arc::new(Shared {
            streams: Mutex::default(),
            out,
            window: Window::new(),
            closed: closed.clone(),
            last_peer_id: AtomicU32::new(0),
            credits: Mutex::default(),
            credited: Notify::new(),
            active_at: Mutex::new(Instant::now()),
        });
        let (read, write) = tokio::io::split(io);
        let reader =
            Reader { io: read, shared: shared.clone(), incoming: incoming_sender, headers: HeaderReader::new(), role };
        tokio::spawn(reader.run());
        tokio::spawn(write_frames(write, out_receiver, shared.clone(), role));
        let next_id = if role == Role::Client { 1 } else { 2 };
        Session { incoming, shared, next_id, _guard: closed.drop_guard() }
    }

    /// The next stream that the peer opens; None when the session has ended. Cancel safe.
    pub async fn accept(&mut self) -> Option<Stream> {
        self.incoming.recv().await
    }

    /// A view of the session beside its streams.
    pub fn pulse(&self) -> Pulse {
        Pulse { shared: self.shared.clone() }
    }

    /// Sends what is queued, then GOAWAY, then closes.
    pub async fn finish(self) {
        let last = self.shared.last_peer_id.load(Ordering::Relaxed);
        if self.shared.out.send(Out::GoAway { last }).await.is_ok() {
            let _ = tokio::time::timeout(LINGER, self.shared.closed.cancelled()).await;
        }
    }

    /// Opens a stream.
    #[cfg(test)]
    pub async fn open(&mut self, headers: Headers) -> io::Result<Stream> {
        let id = self.next_id;
        self.next_id += 2;
        let stream = self.shared.add(id, headers.clone(), false).ok_or(io::ErrorKind::WouldBlock)?;
        let frame = Out::SynStream { id, fin: false, headers };
        self.shared.out.send(frame).await.map_err(|_| io::ErrorKind::BrokenPipe)?;
        Ok(stream)
    }
}

impl Shared {
    /// Makes the two ends of a stream; None when there are too many.
    fn add(self: &Arc<Self>, id: u32, headers: Headers, peer_finished: bool) -> Option<Stream> {
        let (inbound, chunks) = mpsc::channel(QUEUE_CHUNKS);
        let window = Arc::new(Window::new());
        let entry = Entry {
            inbound: (!peer_finished).then_some(inbound),
            window: window.clone(),
            peer_finished,
            reader_gone: false,
            writer_gone: false,
        };
        {
            let mut streams = self.streams.lock();
            if streams.len() >= STREAM_LIMIT {
                return None;
            }
            streams.insert(id, entry);
        }
        let reader = StreamReader { id, chunks: ChunkReader::new(chunks), shared: self.clone() };
        let out = PollSender::new(self.out.clone());
        let writer = StreamWriter { id, out, window, shared: self.clone(), finished: false };
        Some(Stream { id, headers, reader, writer })
    }

    pub(super) fn touch(&self) {
        *self.active_at.lock() = Instant::now();
    }

    /// Notes that bytes were taken; the writing task tells the peer in steps of [`CREDIT_STEP_BYTES`].
    pub(super) fn credit(&self, id: u32, bytes: u32) {
        let mut credits = self.credits.lock();
        let credit = credits.entry(id).or_default();
        *credit = credit.saturating_add(bytes);
        if *credit >= CREDIT_STEP_BYTES {
            self.credited.notify_one();
        }
    }

    /// The credits that are large enough to be told.
    fn take_credits(&self) -> Vec<Out> {
        let mut due = Vec::new();
        self.credits.lock().retain(|id, credit| {
            let keep = *credit < CREDIT_STEP_BYTES;
            if !keep {
                due.push(Out::WindowUpdate { id: *id, delta: *credit });
            }
            keep
        });
        due
    }

    /// Sends without waiting here; frames of a destructor are few.
    pub(super) fn send_soon(&self, frame: Out) {
        if let Err(mpsc::error::TrySendError::Full(frame)) = self.out.try_send(frame) {
            let out = self.out.clone();
            if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                runtime.spawn(async move { out.send(frame).await });
            }
        }
    }

    pub(super) fn reader_gone(&self, id: u32) {
        self.release(id, |entry| {
            entry.reader_gone = true;
            entry.inbound = None;
        });
    }

    pub(super) fn writer_gone(&self, id: u32) {
        self.release(id, |entry| entry.writer_gone = true);
    }

    /// Notes that one of our halves is gone; a stream without halves is forgotten, and the peer is told to stop.
    fn release(&self, id: u32, note: impl FnOnce(&mut Entry)) {
        let reset = {
            let mut streams = self.streams.lock();
            let Some(entry) = streams.get_mut(&id) else { return };
            note(entry);
            if !(entry.reader_gone && entry.writer_gone) {
                return;
            }
            let peer_finished = entry.peer_finished;
            streams.remove(&id);
            self.credits.lock().remove(&id);
            !peer_finished
        };
        if reset {
            self.send_soon(Out::Reset { id, why: Reset::Cancel });
        }
    }

    /// Ends every stream; their halves see it.
    fn end_all(&self) {
        self.closed.cancel();
        self.window.close();
        for (_, entry) in self.streams.lock().drain() {
            entry.window.close();
        }
    }
}

/// Why reading ended.
#[derive(Debug, thiserror::Error)]
enum ReadEnd {
    #[error("the peer closed the connection")]
    Closed,
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    #[error("the peer broke the protocol: {0}")]
    Protocol(#[from] FrameError),
}

struct Reader<IO> {
    io: ReadHalf<IO>,
    shared: Arc<Shared>,
    incoming: mpsc::Sender<Stream>,
    headers: HeaderReader,
    role: Role,
}

impl<IO: AsyncRead + AsyncWrite + Send + 'static> Reader<IO> {
    async fn run(mut self) {
        let closed = self.shared.closed.clone();
        let end = tokio::select! {
            biased;
            () = closed.cancelled() => None,
            end = self.read_all() => Some(end),
        };
        self.shared.end_all();
        match end {
            Some(end) => tracing::debug!(reason = %end, "spdy session ended"),
            None => {
                let mut sink = tokio::io::sink();
                let _ = tokio::time::timeout(LINGER, tokio::io::copy(&mut self.io, &mut sink)).await;
            }
        }
    }

    async fn read_all(&mut self) -> ReadEnd {
        loop {
            if let Err(end) = self.read_frame().await {
                return end;
            }
        }
    }

    async fn read_frame(&mut self) -> Result<(), ReadEnd> {
        let mut head = [0; HEAD_BYTES];
        match self.io.read_exact(&mut head).await {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(ReadEnd::Closed),
            Err(error) => return Err(error.into()),
        }
        match frame::parse_head(head)? {
            Head::Data { id, fin, length } => self.data(id, fin, length as usize).await,
            Head::Control { kind, flags, length } => {
                let mut payload = vec![0; length as usize];
                self.io.read_exact(&mut payload).await?;
                let control = frame::parse_control(kind, flags, &payload, &mut self.headers)?;
                self.control(control).await
            }
        }
    }

    /// Passes a data frame on in pieces; pieces that nobody wants are read and dropped.
    async fn data(&mut self, id: u32, fin: bool, length: usize) -> Result<(), ReadEnd> {
        self.shared.touch();
        let known = self.shared.streams.lock().get(&id).map(|entry| entry.inbound.clone());
        let mut target = known.clone().flatten();
        let mut left = length;
        while left > 0 {
            let mut piece = BytesMut::with_capacity(left.min(CHUNK_BYTES));
            if (&mut self.io).take(left.min(CHUNK_BYTES) as u64).read_buf(&mut piece).await? == 0 {
                return Err(ReadEnd::Closed);
            }
            left -= piece.len();
            if let Some(sender) = &target
                && sender.send(piece.freeze()).await.is_err()
            {
                target = None;
            }
        }
        if known.is_none() {
            return self.send(Out::Reset { id, why: Reset::InvalidStream }).await;
        }
        if fin {
            self.peer_finished(id);
        }
        if length > 0 {
            self.shared.credit(0, length as u32);
        }
        Ok(())
    }

    fn peer_finished(&self, id: u32) {
        if let Some(entry) = self.shared.streams.lock().get_mut(&id) {
            entry.peer_finished = true;
            entry.inbound = None;
        }
    }

    async fn control(&mut self, control: Control) -> Result<(), ReadEnd> {
        match control {
            Control::SynStream { id, fin, headers } => self.opened(id, fin, headers).await,
            Control::SynReply { id, fin } | Control::Headers { id, fin } => {
                if fin {
                    self.peer_finished(id);
                }
                Ok(())
            }
            Control::Reset { id } => {
                if let Some(entry) = self.shared.streams.lock().remove(&id) {
                    entry.window.close();
                }
                Ok(())
            }
            // Odd pings are the client's, even ones the server's; an answer to our own is not answered again.
            Control::Ping { id } if (id % 2 == 1) == (self.role == Role::Server) => self.send(Out::Ping { id }).await,
            Control::GoAway => Err(ReadEnd::Closed),
            Control::WindowUpdate { id: 0, delta } => {
                self.shared.window.update(delta);
                Ok(())
            }
            Control::WindowUpdate { id, delta } => {
                if let Some(entry) = self.shared.streams.lock().get(&id) {
                    entry.window.update(delta);
                }
                Ok(())
            }
            Control::Ping { .. } | Control::Other => Ok(()),
        }
    }

    async fn opened(&mut self, id: u32, fin: bool, headers: Headers) -> Result<(), ReadEnd> {
        let expected = if self.role == Role::Server { 1 } else { 0 };
        let last = self.shared.last_peer_id.load(Ordering::Relaxed);
        if id == 0 || id % 2 != expected {
            return self.send(Out::Reset { id, why: Reset::Protocol }).await;
        }
        if self.shared.streams.lock().contains_key(&id) {
            return self.send(Out::Reset { id, why: Reset::InUse }).await;
        }
        if id <= last {
            return self.send(Out::Reset { id, why: Reset::Protocol }).await;
        }
        self.shared.last_peer_id.store(id, Ordering::Relaxed);
        let Some(stream) = self.shared.add(id, headers, fin) else {
            return self.send(Out::Reset { id, why: Reset::Refused }).await;
        };
        self.send(Out::SynReply { id }).await?;
        // Nobody takes streams any more: dropping it resets it.
        let _ = self.incoming.send(stream).await;
        Ok(())
    }

    async fn send(&mut self, frame: Out) -> Result<(), ReadEnd> {
        self.shared.out.send(frame).await.map_err(|_| ReadEnd::Closed)
    }
}

/// Writes queued frames, several to a write, until GOAWAY has been written or the session ends.
async fn write_frames<IO: AsyncRead + AsyncWrite + Send + 'static>(
    mut io: WriteHalf<IO>,
    mut frames: mpsc::Receiver<Out>,
    shared: Arc<Shared>,
    role: Role,
) {
    let closed = shared.closed.clone();
    let work = async {
        let mut encoder = Encoder::new();
        let mut buffer = BytesMut::with_capacity(WRITE_BATCH_BYTES);
        let mut ping_id = if role == Role::Server { 2u32 } else { 1 };
        loop {
            let mut next = tokio::select! {
                frame = frames.recv() => match frame {
                    Some(frame) => Some(frame),
                    None => return Ok(()),
                },
                () = shared.credited.notified() => None,
                () = tokio::time::sleep(PING_PERIOD) => {
                    ping_id = ping_id.wrapping_add(2);
                    Some(Out::Ping { id: ping_id })
                }
            };
            for credit in shared.take_credits() {
                encoder.encode(credit, &mut buffer);
            }
            let mut last = false;
            while let Some(frame) = next {
                last = matches!(frame, Out::GoAway { .. });
                encoder.encode(frame, &mut buffer);
                next = if last || buffer.len() >= WRITE_BATCH_BYTES { None } else { frames.try_recv().ok() };
            }
            io.write_all_buf(&mut buffer).await?;
            io.flush().await?;
            if last {
                return io.shutdown().await;
            }
        }
    };
    let result: Option<io::Result<()>> = tokio::select! {
        biased;
        () = closed.cancelled() => None,
        result = work => Some(result),
    };
    if let Some(Err(error)) = result {
        tracing::debug!(error = %error, "spdy session can no longer be written to");
    }
    closed.cancel();
}
