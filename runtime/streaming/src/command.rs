//! Exec and attach, whatever the protocol: the backend is run with the client's streams until it ends or the client is gone.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::mpsc;

use crate::backend::{AttachParams, Backend, ExecParams, Io, TerminalSize};
use crate::status::Ending;

/// Unread bytes of a resize channel that make up no size.
const RESIZE_BUFFER_BYTES: usize = 1024;
/// Terminal sizes waiting for the backend.
const RESIZE_QUEUE: usize = 4;
/// How long a client may take to open all its streams.
pub(crate) const STREAM_CREATION_TIMEOUT: Duration = Duration::from_secs(30);

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Command {
    Exec(ExecParams),
    Attach(AttachParams),
}

impl Command {
    pub fn streams(&self) -> Wanted {
        match self {
            Command::Exec(p) => Wanted { stdin: p.stdin, stdout: p.stdout, stderr: p.stderr && !p.tty, tty: p.tty },
            Command::Attach(p) => Wanted { stdin: p.stdin, stdout: p.stdout, stderr: p.stderr && !p.tty, tty: p.tty },
        }
    }

    /// Runs to the end.
    pub async fn run(self, backend: Arc<dyn Backend>, io: Io) -> Ending {
        match self {
            Command::Exec(params) => match backend.exec(params, io).await {
                Ok(0) => Ending::Success,
                Ok(code) => Ending::ExitCode(code),
                Err(error) => Ending::Failed(format!("error executing command in container: {}", error.full_message())),
            },
            Command::Attach(params) => match backend.attach(params, io).await {
                Ok(()) => Ending::Success,
                Err(error) => Ending::Failed(format!("error attaching to container: {}", error.full_message())),
            },
        }
    }
}

/// Which streams the client is to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub tty: bool,
}

/// Reads terminal sizes off a channel until it ends or says something else.
pub(crate) async fn read_sizes(mut channel: impl AsyncRead + Unpin, sizes: mpsc::Sender<TerminalSize>) {
    let mut buffer = Vec::new();
    loop {
        if buffer.len() >= RESIZE_BUFFER_BYTES {
            return;
        }
        let room = (RESIZE_BUFFER_BYTES - buffer.len()) as u64;
        match (&mut channel).take(room).read_buf(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let mut used = 0;
        let mut values = serde_json::Deserializer::from_slice(&buffer).into_iter::<Size>();
        let mut found = Vec::new();
        for value in values.by_ref() {
            match value {
                Ok(size) => found.push(TerminalSize { width: size.width, height: size.height }),
                Err(error) if error.is_eof() => break,
                Err(_) => return,
            }
        }
        used += values.byte_offset();
        buffer.drain(..used.min(buffer.len()));
        for size in found {
            if sizes.send(size).await.is_err() {
                return;
            }
        }
    }
}

#[derive(serde::Deserialize)]
struct Size {
    #[serde(rename = "Width")]
    width: u16,
    #[serde(rename = "Height")]
    height: u16,
}

/// The sizes' receiver, fed from `channel` by a task that ends with it. Without a channel it is closed.
pub(crate) fn sizes_from(channel: Option<impl AsyncRead + Unpin + Send + 'static>) -> mpsc::Receiver<TerminalSize> {
    let (sender, receiver) = mpsc::channel(RESIZE_QUEUE);
    if let Some(channel) = channel {
        tokio::spawn(async move {
            let gone = sender.clone();
            tokio::select! {
                () = read_sizes(channel, sender) => {}
                () = gone.closed() => {}
            }
        });
    }
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn sizes_are_read_however_they_are_cut() {
        let (sender, mut receiver) = mpsc::channel(8);
        let text = b"{\"Width\":80,\"Height\":24}\n{\"Width\":132,\"Height\":50}";
        let mut builder = tokio_test_io(text, 7);
        read_sizes(&mut builder, sender).await;
        assert_eq!(receiver.recv().await, Some(TerminalSize { width: 80, height: 24 }));
        assert_eq!(receiver.recv().await, Some(TerminalSize { width: 132, height: 50 }));
        assert_eq!(receiver.recv().await, None);
    }

    #[tokio::test]
    async fn nonsense_ends_the_channel() {
        for text in [&b"nonsense"[..], &[b'{'; 4096], b"{\"Width\":-1,\"Height\":24}"] {
            let (sender, mut receiver) = mpsc::channel(8);
            read_sizes(text, sender).await;
            assert_eq!(receiver.recv().await, None);
        }
    }

    /// A reader that gives at most `step` bytes at a time.
    fn tokio_test_io(text: &'static [u8], step: u64) -> impl AsyncRead + Unpin {
        struct Steps(&'static [u8], usize);
        impl AsyncRead for Steps {
            fn poll_read(
                mut self: std::pin::Pin<&mut Self>,
                _: &mut std::task::Context<'_>,
                buf: &mut tokio::io::ReadBuf<'_>,
            ) -> std::task::Poll<std::io::Result<()>> {
                let length = self.1.min(self.0.len()).min(buf.remaining());
                let (now, later) = self.0.split_at(length);
                buf.put_slice(now);
                self.0 = later;
                std::task::Poll::Ready(Ok(()))
            }
        }
        Steps(text, step as usize)
    }
}
