//! What can go wrong when the daemon talks to a shim.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::wire::{ErrorKind, RemoteError};
use crate::{RecordError, frame::FrameError};

/// A failed call to a shim.
#[derive(Debug, thiserror::Error)]
pub enum ShimError {
    /// No shim runs for this state directory.
    #[error("no shim runs for {}", state_dir.display())]
    NotRunning { state_dir: PathBuf },
    /// A shim runs there already.
    #[error("a shim already runs for {} (pid {pid})", state_dir.display())]
    AlreadyRunning { state_dir: PathBuf, pid: i32 },
    /// The shim could not be started.
    #[error("cannot start the shim {}", binary.display())]
    Spawn {
        binary: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The shim started but could not set itself up.
    #[error("the shim could not start: {message}")]
    Startup { message: String },
    /// A system call on the daemon's side failed.
    #[error("cannot {operation}")]
    Io {
        operation: &'static str,
        #[source]
        source: io::Error,
    },
    /// The frame could not be sent or understood.
    #[error("broken frame from or to the shim")]
    Frame(#[source] FrameError),
    /// A state file could not be used.
    #[error("shim state file")]
    Record(#[source] RecordError),
    /// The request cannot be written as JSON.
    #[error("cannot encode the request")]
    Encode(#[source] serde_json::Error),
    /// The shim went away before it replied.
    #[error("the shim disconnected")]
    Disconnected,
    /// No reply in time.
    #[error("the shim did not answer {operation} within {limit:?}")]
    TimedOut { operation: &'static str, limit: Duration },
    /// The reply is not one to that request.
    #[error("unexpected reply to {operation}")]
    Unexpected { operation: &'static str },
    /// The shim answered with a failure; its message is fit for users.
    #[error(transparent)]
    Refused(RemoteError),
}

impl ShimError {
    /// The shim's own classification, when it is the shim that refused.
    pub fn kind(&self) -> Option<ErrorKind> {
        match self {
            ShimError::Refused(remote) => Some(remote.kind),
            _ => None,
        }
    }

    /// Whether the container or exec named does not exist.
    pub fn is_not_found(&self) -> bool {
        self.kind() == Some(ErrorKind::NotFound)
    }
}
