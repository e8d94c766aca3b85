//! Credentials for pulling images from programs on the node: the kubelet's credential provider plugins.
//!
//! Owns the configuration of plugins, asking them, and keeping their answers for as long as they allow. Does not pull, and does
//! not know pull secrets.

mod config;
mod kept;
mod matching;
mod plugin;
mod providers;

pub use config::ProvidersConfigError;
pub(crate) use providers::{Providers, Puller};
