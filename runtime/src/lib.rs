//! The CRI runtime daemon: sandboxes, containers and images behind `runtime.v1` on a unix socket.
//!
//! State lives on disk as intent first (`record`); the in-memory index (`state`) is rebuilt from it at start, and
//! `reconcile` replays or undoes what a crash left. `spec` decides what a container looks like and does no I/O;
//! `sandbox` and `container` carry decisions out; `rpc` has one file a call. This crate makes no container itself:
//! it asks the pod's shim. It never calls setns: it asks `oarlock-netns`.

mod apparmor;
mod backend;
mod cdi;
mod config;
mod container;
mod core;
mod daemon;
mod error;
mod events;
mod fdio;
mod groups;
mod host;
mod idmap;
mod joins;
mod metrics;
mod mounts;
mod moves;
mod network_status;
mod nri;
mod paths;
mod prometheus;
mod reconcile;
mod record;
mod rpc;
mod sandbox;
mod serve;
mod spec;
mod state;
mod stats;
mod view;

pub use config::{CgroupDriver, Config, Registries};
pub use daemon::{Runtime, give_up_run_directory};
pub use error::Error;
pub use mounts::all_mount_points;
pub use oarlock_images::Thresholds as ImageThresholds;
pub use oarlock_nri::Config as PluginConfig;
