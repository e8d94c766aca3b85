//! Making and removing containers. Everything here runs in helper children.
//!
//! `create` is the only module that names libcontainer; starting, freezing, killing and deleting need only the
//! notify socket and the cgroup, and so never go through it.

mod adapt;
mod create;
mod devices;
mod executor;
mod external;
mod propagation;
mod remove;
mod scope;
mod seclude;

pub(crate) use create::{CreateJob, create, start_with_hooks};
pub(crate) use external::External;
pub(crate) use remove::{RemoveJob, remove, set_frozen, signal_all, sweep};

use std::io;
use std::path::{Path, PathBuf};

use oarlock_shim_api::{ErrorKind, RemoteError};

/// The socket on which a created container waits for its start.
pub(crate) fn notify_socket(container_root: &Path, container_id: &str) -> PathBuf {
    container_root.join(container_id).join("notify.sock")
}

/// Where the shim keeps the specification as it was given to the engine.
pub(crate) fn adapted_bundle(state_dir: &Path, container_id: &str) -> PathBuf {
    oarlock_shim_api::container_dir(state_dir, container_id)
}

/// An error with its causes, as one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

pub(crate) fn failed(operation: &str, error: &dyn std::error::Error) -> RemoteError {
    RemoteError::new(ErrorKind::Engine, format!("cannot {operation}: {}", chain(error)))
}

pub(crate) fn io_failed(operation: &str) -> impl FnOnce(io::Error) -> RemoteError {
    move |error| failed(operation, &error)
}
