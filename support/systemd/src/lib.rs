//! systemd over D-Bus: transient scopes and slices, their limits, and login1's shutdown locks.
//!
//! Owns: the wire, which method does what, and which property stands for which limit. Does not own: which units there should
//! be, and the files of their control groups, which `support/cgroup` writes.
//!
//! All calls block, and each has a time limit. It is a client of some hundred lines of its own, and not a crate such as zbus,
//! because it is also called in helpers of the shim, single-threaded processes in which no executor can run and whose size
//! counts.

mod connection;
mod error;
#[cfg(any(test, feature = "fake"))]
pub mod fake;
mod login;
mod manager;
mod properties;
#[cfg(test)]
mod tests;
mod wire;

pub use error::Error;
pub use login::{BUS_SOCKET, HangUp, Lock, Login};
pub use manager::{Scope, Systemd, is_running};
pub use properties::{Property, of_limits};
pub use wire::Value;
