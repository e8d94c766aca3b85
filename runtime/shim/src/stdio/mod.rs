//! A container's standard input and output: pipes or a terminal, the log, and attached clients.

mod attach;
mod clock;
mod log;
mod pump;
mod writer;

pub(crate) use clock::now_nanos;
pub(crate) use log::Log;
pub(crate) use pump::{ContainerEnds, FLUSH_LIMIT, Stdio};
