//! Control groups by path, on version 1, hybrid and version 2 hosts: create, limit, attach, measure, freeze, kill,
//! remove. The host's layout is detected; nobody is asked.
//!
//! Owns: the files under the cgroup mounts. Does not own: which groups there should be, and what their limits are.
//!
//! A group is named by one relative path, such as `kubepods/burstable/pod1234/abcd`, which stands for the directory
//! of that name in every hierarchy (one on version 2; one a controller, the named `systemd` hierarchy and the
//! controller-less unified one on hybrid hosts).
//!
//! Everything here is plain file I/O, not a crate such as cgroups-rs: that one picks version 1 or 2 for the whole host
//! (so processes stay behind in a hybrid host's named and unified hierarchies), parses mountinfo for each group,
//! and cannot say which controllers a write was for when it fails; and this crate is also linked into a process
//! whose memory is counted in kilobytes.

mod error;
mod group;
mod layout;
mod limits;
mod moves;
mod oom;
mod path;
mod room;
mod stats;

pub use error::CgroupError;
pub use group::Cgroup;
pub use layout::{Layout, Version};
pub use limits::{Limits, weight_of_shares};
pub use moves::MoveLock;
pub use oom::OomWatch;
pub use path::{Unit, expand_slice, slice_name, translate};
pub use room::make_room;
pub use stats::Stats;
