//! Plugins of the Node Resource Interface in the life of pods and containers: what they are told and asked, and when.
//!
//! Owns how pods and containers look to a plugin (`describe`, `resources`) and what the runtime does for plugins (`carrier`).
//! The plugins themselves, and how their answers come together, are in `oarlock-nri`; what an adjustment does to a
//! specification is in `spec::adjust`.
//!
//! Nobody who waits for a plugin's answer may hold a container's `operation`: updates that plugins ask for take it. While no
//! plugin is connected, all of this is one comparison.

mod carrier;
mod describe;
mod events;
mod resources;

pub(crate) use carrier::Carrier;
pub(crate) use events::{
    Told, adjust, container_created, container_exited, container_removed, container_started, container_starts,
    container_stopped, container_undone, container_updated, container_updates, sandbox_removed, sandbox_runs,
    sandbox_stopped, sandbox_updated, sandbox_updates,
};
pub(crate) use resources::{Further, to_cri};
