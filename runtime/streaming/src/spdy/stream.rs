//! One SPDY stream as two halves: an `AsyncRead` and an `AsyncWrite`.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::PollSender;

use super::frame::Out;
use super::headers::Headers;
use super::session::Shared;
use super::window::Window;
use crate::chunks::{CHUNK_BYTES, ChunkReader};

/// A stream with its opening headers.
pub(crate) struct Stream {
    pub id: u32,
    pub headers: Headers,
    pub reader: StreamReader,
    pub writer: StreamWriter,
}

/// What the peer sends. Ends at its FIN, its reset, or the session's end.
pub(crate) struct StreamReader {
    pub(super) id: u32,
    pub(super) chunks: ChunkReader,
    pub(super) shared: Arc<Shared>,
}

impl AsyncRead for StreamReader {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.chunks).poll_read(cx, buf))?;
        let taken = buf.filled().len() - before;
        if taken > 0 {
            self.shared.credit(self.id, taken as u32);
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for StreamReader {
    fn drop(&mut self) {
        self.shared.reader_gone(self.id);
    }
}

/// What is sent to the peer. Shutting down or dropping sends FIN.
pub(crate) struct StreamWriter {
    pub(super) id: u32,
    pub(super) out: PollSender<Out>,
    pub(super) window: Arc<Window>,
    pub(super) shared: Arc<Shared>,
    pub(super) finished: bool,
}

impl AsyncWrite for StreamWriter {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        if self.finished {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        ready!(self.out.poll_reserve(cx)).map_err(|_| gone())?;
        let granted = ready!(self.window.poll_take(cx, data.len().min(CHUNK_BYTES)))?;
        let used = match self.shared.window.poll_take(cx, granted) {
            Poll::Ready(Ok(used)) => used,
            Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            Poll::Pending => {
                self.window.give_back(granted);
                return Poll::Pending;
            }
        };
        self.window.give_back(granted - used);
        let frame = Out::Data { id: self.id, fin: false, data: Bytes::copy_from_slice(&data[..used]) };
        self.out.send_item(frame).map_err(|_| gone())?;
        self.shared.touch();
        Poll::Ready(Ok(used))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.finished {
            return Poll::Ready(Ok(()));
        }
        ready!(self.out.poll_reserve(cx)).map_err(|_| gone())?;
        let frame = Out::Data { id: self.id, fin: true, data: Bytes::new() };
        self.out.send_item(frame).map_err(|_| gone())?;
        self.finished = true;
        Poll::Ready(Ok(()))
    }
}

fn gone() -> io::Error {
    io::ErrorKind::BrokenPipe.into()
}

impl Drop for StreamWriter {
    fn drop(&mut self) {
        // A reserved place in the queue must not keep the FIN out.
        self.out.abort_send();
        if !self.finished {
            self.shared.send_soon(Out::Data { id: self.id, fin: true, data: Bytes::new() });
        }
        self.shared.writer_gone(self.id);
    }
}
