//! The language between the runtime daemon and a pod's shim.
//!
//! Owns: the message types, the frame codec (SEQPACKET with descriptors by SCM_RIGHTS), the files in a shim's
//! state directory (`shim.json`, `shim.sock`, `containers/<id>/exit.json`), and the daemon's asynchronous client.
//! Does not own: what the shim does with a request (`oarlock-shim`), or anything of Kubernetes.
//!
//! ```text
//! daemon                                                            shim (one per pod)
//!   │  {"id":7,"request":{"exec":{...}}}               ──────────▶  │
//!   │  {"reply":{"id":7,"outcome":{"ok":...}}} + fds    ◀──────────  │   replies come in any order
//!   │  {"event":{"exited":{...}}}                       ◀──────────  │   pushed, never asked for
//! ```
//!
//! A shim outlives the daemon: after a restart the daemon calls [`Shim::connect`], reads [`Shim::state`] for what
//! happened meanwhile and goes on with [`Shim::subscribe`].

#[cfg(feature = "client")]
mod client;
#[cfg(feature = "client")]
mod error;
pub mod frame;
mod record;
#[cfg(feature = "client")]
mod spawn;
pub mod wire;

#[cfg(feature = "client")]
pub use client::{AttachReply, ExecReply, ExecRequest, Shim};
#[cfg(feature = "client")]
pub use error::ShimError;
pub use record::{ExitRecord, RecordError, ShimRecord, process_start_time, read_exit_record, read_shim_record};
pub use record::{container_dir, exit_record_path, shim_record_path, socket_path, write_atomically};
#[cfg(feature = "client")]
pub use spawn::SpawnOptions;
pub use wire::{ContainerState, ContainerStatus, CreateReply, CreateRequest, ErrorKind, Event, RemoteError, ShimState};
