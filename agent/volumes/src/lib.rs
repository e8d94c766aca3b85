//! The volumes of pods: emptyDir, hostPath, configMap, secret, downwardAPI and projected, and subPath mounts of them.
//!
//! Owns `<root>/<uid>/volumes` and `<root>/<uid>/volume-subpaths` in upstream's layout, the atomic publication of their
//! contents, and the ledger of mounts that lets a tear-down after a crash remove exactly what was made. Does not fetch API
//! objects itself (see [`ObjectSource`]) and does not know the container runtime.

mod error;
mod manager;
mod source;

pub use error::VolumeError;
pub use manager::{Allocatable, PodFacts, VolumeManager, forces_read_only};
pub use source::{IssuedToken, ObjectSource, SourceError, TokenOrder};
