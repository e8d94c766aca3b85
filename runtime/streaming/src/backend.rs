//! What the streaming server asks of the runtime: the [`Backend`] trait and the plain values that pass through it.
//!
//! Owns no sockets and no protocol; those are in `server`, `spdy` and `websocket`.

use std::io;

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream};
use tokio::sync::mpsc;

/// A readable end handed to the backend (the client's stdin).
pub type BoxRead = Box<dyn AsyncRead + Send + Unpin>;
/// A writable end handed to the backend (the client's stdout or stderr).
pub type BoxWrite = Box<dyn AsyncWrite + Send + Unpin>;

/// One exec, as asked for by CRI `Exec`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecParams {
    pub container_id: String,
    pub command: Vec<String>,
    pub tty: bool,
    pub stdin: bool,
    pub stdout: bool,
    /// Never true together with `tty`.
    pub stderr: bool,
}

/// One attach, as asked for by CRI `Attach`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachParams {
    pub container_id: String,
    pub tty: bool,
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
}

/// The client's terminal, in character cells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TerminalSize {
    pub width: u16,
    pub height: u16,
}

/// The client's streams. Absent ones were not asked for.
///
/// Reading `stdin` to its end means that the client closed it. Dropping a writer closes that direction towards the client.
/// A client that goes away ends `stdin`, makes writes fail with `BrokenPipe`, and the backend's future is dropped.
pub struct Io {
    pub stdin: Option<BoxRead>,
    pub stdout: Option<BoxWrite>,
    pub stderr: Option<BoxWrite>,
    /// Terminal sizes; closed when the client has no resize channel or is gone.
    pub resize: mpsc::Receiver<TerminalSize>,
}

/// What can go wrong with a stream, as the client is told it.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    #[error("{what} not found")]
    NotFound { what: String },
    #[error("invalid request: {message}")]
    Invalid { message: String },
    #[error("{message}")]
    Failed { message: String },
    #[error("too many streaming requests waiting to be picked up")]
    TooManyRequests,
    #[error("{operation}")]
    Io {
        operation: &'static str,
        #[source]
        source: io::Error,
    },
}

impl StreamError {
    /// An error that is nothing but its message.
    pub fn failed(message: impl Into<String>) -> Self {
        StreamError::Failed { message: message.into() }
    }

    /// The message with its chain of sources, as sent to clients.
    pub fn full_message(&self) -> String {
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            source = cause.source();
        }
        text
    }
}

/// Carries out what the clients of the streaming server ask for.
///
/// Every future may be dropped at any await point when the client goes away.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// Runs a command; gives its exit code when it ended.
    async fn exec(&self, params: ExecParams, io: Io) -> Result<i32, StreamError>;
    /// Connects to the container's own stdio until that ends or the client goes away.
    async fn attach(&self, params: AttachParams, io: Io) -> Result<(), StreamError>;
    /// Connects `stream` to the port inside the sandbox's network namespace until both directions have ended.
    async fn port_forward(&self, sandbox_id: &str, port: u16, stream: DuplexStream) -> Result<(), StreamError>;
}
