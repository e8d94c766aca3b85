//! The CRI streaming server: exec, attach and port-forward over SPDY/3.1 and WebSocket.
//!
//! Owns the HTTP listener, the one-time URLs that CRI's Exec, Attach and PortForward hand out, both wire protocols and their
//! bounds. Does not know containers: what a stream is connected to is decided by a [`Backend`].

mod backend;
mod chunks;
mod command;
mod idle;
mod negotiate;
mod port_forward;
mod server;
mod spdy;
mod spdy_command;
mod status;
mod tokens;
mod websocket;

pub use backend::{AttachParams, Backend, BoxRead, BoxWrite, ExecParams, Io, StreamError, TerminalSize};
pub use server::StreamingServer;
