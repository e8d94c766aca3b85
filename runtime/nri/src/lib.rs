//! The runtime's side of the Node Resource Interface: plugins connect or are launched, are told of the life of pods and
//! containers, and may adjust containers that are being made and update those that exist.
//!
//! Owns the wire (`mux`, `ttrpc`, `connection`), the plugins and their order (`plugin`, `launch`, `listen`, `relay`), and what
//! several plugins' answers come to together (`merge`, `owners`). Does not know what a pod is made of: the runtime describes
//! it in the interface's own messages ([`api`]), and carries out what the plugins ask for ([`Host`]).

mod config;
mod connection;
mod error;
mod event;
mod launch;
mod listen;
mod merge;
mod mux;
mod name;
mod owners;
mod plugin;
mod relay;
mod synchronize;
mod ttrpc;

/// The messages of the interface (protobuf package `nri.pkg.api.v1alpha1`).
pub mod api {
    #![allow(clippy::all, missing_docs, rust_2018_idioms)]
    include!(concat!(env!("OUT_DIR"), "/nri.pkg.api.v1alpha1.rs"));
}

pub use config::Config;
pub use error::Error;
pub use event::Event;
pub use merge::{clear_marker, marked_for_removal};
pub use relay::{Created, Host, Plugins, Updated};
