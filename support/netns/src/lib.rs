//! Linux namespaces as files: made on a fresh OS thread, pinned by a bind mount, entered on a fresh OS thread.
//!
//! A namespace belongs to a thread, and a thread of a daemon is shared by unrelated tasks, so nothing here changes
//! the namespace of a thread that has others beside it: [`run_in`], [`create_pinned`] and [`Pins::create`] start a thread of their own,
//! which ends with the call; [`visit_network`] does without one in a process of one thread. This is the only crate of the workspace that calls `setns` or `unshare` in a process with
//! several threads. User namespaces, which only a process of one thread can make, are made by a forked child.
//!
//! What it does not own: links, addresses and routes inside a network namespace (oarlock-netlink), and PID and mount
//! namespaces.

mod error;
mod loopback;
mod pin;
mod thread;
mod user;

pub use error::NetnsError;
pub use loopback::bring_loopback_up;
pub use pin::{PinOptions, Pins, create_pinned, is_pinned, remove_pinned};
pub use thread::{run_in, run_in_fd, run_in_new, tcp_connect_in, visit_network};
pub use user::{IdRange, UserMappings, user_namespace};

/// The result of every operation of this crate.
pub type Result<T, E = NetnsError> = std::result::Result<T, E>;
