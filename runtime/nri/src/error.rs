//! What can go wrong between the runtime and its plugins.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why an answer could not be had, or cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The plugin answered with an error, which is meant for whoever made the request of the runtime.
    #[error("plugin {plugin:?} refused {call}: {message}")]
    Refused { plugin: String, call: &'static str, message: String },
    /// Two plugins want one thing of one container.
    #[error("plugins {plugin:?} and {other:?} both tried to set {what}")]
    Conflict { plugin: String, other: String, what: String },
    /// A plugin asks for something that makes no sense.
    #[error("plugin {plugin:?} {problem}")]
    Answer { plugin: String, problem: String },
    #[error("validator plugin {plugin} failed: {message}")]
    Validator { plugin: String, message: String },
    #[error("validator {plugin:?} rejected container adjustment, reason: {reason}")]
    Rejected { plugin: String, reason: String },
    #[error("cannot {operation} {}", path.display())]
    Io {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// Somebody else, such as another runtime, serves the socket.
    #[error("{} is served by another process", path.display())]
    SocketTaken { path: PathBuf },
    #[error("plugin did not register within {limit:?}")]
    NotRegistered { limit: Duration },
    #[error("plugin name {name:?}: {problem}")]
    Name { name: String, problem: &'static str },
    #[error("{call} of plugin {plugin:?} failed")]
    Call {
        plugin: String,
        call: &'static str,
        #[source]
        source: CallError,
    },
}

/// Why one call over a connection failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    #[error("the connection is closed")]
    Closed,
    #[error("no answer within {limit:?}")]
    TimedOut { limit: Duration },
    #[error("the message of {bytes} bytes is longer than the protocol allows")]
    TooLong { bytes: usize },
    #[error("the answer cannot be read")]
    Malformed(#[source] prost::DecodeError),
    #[error("{message}")]
    Status { code: i32, message: String },
}

impl CallError {
    /// Whether the plugin cannot be worked with any more. An error that it answered with is its good right.
    pub(crate) fn is_fatal(&self) -> bool {
        matches!(self, CallError::Closed | CallError::TimedOut { .. } | CallError::Malformed(_))
    }
}

/// The message with all its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
