//! One file a command.

pub(crate) mod agent;
mod children;
pub(crate) mod daemon;
pub(crate) mod demo;
mod discovery;
pub(crate) mod doctor;
mod firewall;
pub(crate) mod images;
pub(crate) mod join;
mod machine;
pub(crate) mod netproxy;
mod node_identity;
mod progress;
mod reasons;
pub(crate) mod reset;
pub(crate) mod runtime;
pub(crate) mod server;
pub(crate) mod stop;
pub(crate) mod token;
pub(crate) mod up;
