//! Exec and attach over WebSocket: one task reads messages into channels, one writes messages.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_util::sync::{CancellationToken, PollSender};

use super::message::{ERROR, Incoming, RESIZE, STDERR, STDIN, STDOUT, decode, encode};
use crate::backend::{Backend, BoxRead, BoxWrite, Io};
use crate::chunks::{CHUNK_BYTES, ChunkReader, QUEUE_CHUNKS};
use crate::command::{Command, sizes_from};
use crate::idle;
use crate::negotiate::Encoding;
use crate::status::{Ending, Version};

/// Messages waiting to be sent.
const OUT_QUEUE: usize = 16;
/// A ping as often as this finds out that the client is gone.
const PING_PERIOD: Duration = Duration::from_secs(30);
/// After the close frame, the client's remaining messages are read for this long.
const LINGER: Duration = Duration::from_secs(2);

/// Serves one exec or attach over the socket to its end.
pub(crate) async fn serve<IO: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    socket: WebSocketStream<IO>,
    version: Version,
    encoding: Encoding,
    command: Command,
    backend: Arc<dyn Backend>,
    idle_limit: Duration,
) {
    let (sink, stream) = socket.split();
    let (out, frames) = mpsc::channel(OUT_QUEUE);
    let link = Arc::new(Link { gone: CancellationToken::new(), active_at: Mutex::new(Instant::now()) });
    let _ends_tasks = link.gone.clone().drop_guard();
    let wanted = command.streams();
    let (stdin_sender, stdin) = channel(wanted.stdin);
    let (resize_sender, resize) = channel(wanted.tty);
    let reader =
        Reader { stream, encoding, closes: version >= Version::V5, stdin: stdin_sender, resize: resize_sender };
    let reading = tokio::spawn(reader.run(link.clone()));
    let writing = tokio::spawn(write_messages(sink, frames, link.gone.clone()));
    let writer = |channel| {
        Box::new(Writer { channel, encoding, out: PollSender::new(out.clone()), link: link.clone() }) as BoxWrite
    };
    // An empty message tells the client that the command is about to run.
    let first = if wanted.stdout {
        STDOUT
    } else if wanted.stderr {
        STDERR
    } else {
        ERROR
    };
    let _ = out.send(encode(first, b"", encoding)).await;
    let io = Io {
        stdin: stdin.map(|reader| Box::new(reader) as BoxRead),
        stdout: wanted.stdout.then(|| writer(STDOUT)),
        stderr: wanted.stderr.then(|| writer(STDERR)),
        resize: sizes_from(resize),
    };
    let ending = tokio::select! {
        ending = command.run(backend, io) => ending,
        () = link.gone.cancelled() => return,
        () = idle::expired(idle_limit, || link.active_at.lock().elapsed()) => {
            Ending::Failed("the session was idle for too long".into())
        }
    };
    let status = ending.render(version);
    if !status.is_empty() {
        let _ = out.send(encode(ERROR, &status, encoding)).await;
    }
    let close = CloseFrame { code: CloseCode::Normal, reason: Default::default() };
    let _ = out.send(Message::Close(Some(close))).await;
    drop(out);
    let _ = tokio::time::timeout(LINGER, async { (writing.await, reading.await) }).await;
}

/// What the tasks of one socket share.
struct Link {
    /// Nothing more is read or written.
    gone: CancellationToken,
    active_at: Mutex<Instant>,
}

impl Link {
    fn touch(&self) {
        *self.active_at.lock() = Instant::now();
    }
}

fn channel(wanted: bool) -> (Option<mpsc::Sender<Bytes>>, Option<ChunkReader>) {
    if !wanted {
        return (None, None);
    }
    let (sender, receiver) = mpsc::channel(QUEUE_CHUNKS);
    (Some(sender), Some(ChunkReader::new(receiver)))
}

struct Reader<IO> {
    stream: SplitStream<WebSocketStream<IO>>,
    encoding: Encoding,
    closes: bool,
    stdin: Option<mpsc::Sender<Bytes>>,
    resize: Option<mpsc::Sender<Bytes>>,
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Reader<IO> {
    async fn run(mut self, link: Arc<Link>) {
        let gone = link.gone.clone();
        tokio::select! {
            () = gone.cancelled() => {}
            () = self.read_all(&link) => {}
        }
        link.gone.cancel();
    }

    async fn read_all(&mut self, link: &Link) {
        while let Some(Ok(message)) = self.stream.next().await {
            let payload = match message {
                Message::Binary(payload) => payload,
                Message::Text(payload) => payload.into(),
                Message::Close(_) => return,
                _ => continue,
            };
            link.touch();
            match decode(payload, self.encoding, self.closes) {
                Incoming::Data(STDIN, data) => pass(&mut self.stdin, data).await,
                Incoming::Data(RESIZE, data) => pass(&mut self.resize, data).await,
                Incoming::CloseChannel(STDIN) => self.stdin = None,
                Incoming::CloseChannel(RESIZE) => self.resize = None,
                Incoming::Data(..) | Incoming::CloseChannel(_) => {}
                Incoming::Bad => return,
            }
        }
    }
}

/// Hands data to a channel in pieces; a channel whose reader is gone drops it.
async fn pass(channel: &mut Option<mpsc::Sender<Bytes>>, mut data: Bytes) {
    while let Some(sender) = channel
        && !data.is_empty()
    {
        let piece = data.split_to(data.len().min(CHUNK_BYTES));
        if sender.send(piece).await.is_err() {
            *channel = None;
        }
    }
}

/// Writes queued messages until a close frame has gone out or the link is gone.
async fn write_messages<IO: AsyncRead + AsyncWrite + Unpin>(
    mut sink: SplitSink<WebSocketStream<IO>, Message>,
    mut messages: mpsc::Receiver<Message>,
    gone: CancellationToken,
) {
    let work = async {
        loop {
            let message = match tokio::time::timeout(PING_PERIOD, messages.recv()).await {
                Ok(Some(message)) => message,
                Ok(None) => return,
                Err(_) => Message::Ping(Bytes::new()),
            };
            let last = message.is_close();
            if sink.send(message).await.is_err() {
                gone.cancel();
                return;
            }
            if last {
                return;
            }
        }
    };
    tokio::select! {
        () = gone.cancelled() => {}
        () = work => {}
    }
}

/// One of the channels towards the client.
struct Writer {
    channel: u8,
    encoding: Encoding,
    out: PollSender<Message>,
    link: Arc<Link>,
}

impl AsyncWrite for Writer {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let broken = || io::Error::from(io::ErrorKind::BrokenPipe);
        ready!(self.out.poll_reserve(cx)).map_err(|_| broken())?;
        let length = data.len().min(CHUNK_BYTES);
        let message = encode(self.channel, &data[..length], self.encoding);
        self.out.send_item(message).map_err(|_| broken())?;
        self.link.touch();
        Poll::Ready(Ok(length))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.out.close();
        Poll::Ready(Ok(()))
    }
}
