//! One file a command.

pub(crate) mod agent;
pub(crate) mod daemon;
pub(crate) mod demo;
pub(crate) mod doctor;
mod firewall;
pub(crate) mod images;
pub(crate) mod netproxy;
mod progress;
pub(crate) mod reset;
pub(crate) mod runtime;
pub(crate) mod server;
pub(crate) mod stop;
pub(crate) mod up;
