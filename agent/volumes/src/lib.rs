//! The volumes of pods: emptyDir, hostPath, configMap, secret, downwardAPI and projected, and subPath mounts of them.
//!
//! Owns `<root>/<uid>/volumes` and `<root>/<uid>/volume-subpaths` in upstream's layout, the atomic publication of their
//! contents, and the ledger of mounts that lets a tear-down after a crash remove exactly what was made. Does not fetch API
//! objects itself (see [`ObjectSource`]) and does not know the container runtime.

mod atomic;
mod content;
mod downward;
mod error;
mod external;
mod hostpath;
mod layout;
mod ledger;
mod manager;
mod mounter;
mod ownership;
mod payload;
mod place;
mod plan;
mod removal;
mod source;
mod subpath;
mod tokens;

pub use error::VolumeError;
pub use external::External;
pub use manager::{Allocatable, PodFacts, VolumeManager, forces_read_only, give_to_group, is_mount_point};
pub use source::{IssuedToken, ObjectSource, SourceError, TokenOrder};
