//! The container runtime, as the agent calls it: CRI v1 over a unix socket, a timeout on every call.
//!
//! Owns the connection (it comes back by itself when the runtime does) and the translation of the runtime's messages into
//! the agent's own nouns. Decides nothing.

mod client;
mod observe;
mod operations;

pub(crate) use client::{CriError, Runtime};
pub(crate) use observe::{Found, found_pods};
