//! What privileged and end-to-end tests stand on: the built binaries, fresh namespaces, waiters with deadlines, and a
//! snapshot of host state that shows what a test left behind.

mod binaries;
mod namespaces;
mod snapshot;
mod wait;

pub use binaries::{ON_ANY_DISK, bin_dir, binary, image_archive, is_lab};
pub use namespaces::{NODE_ADDRESS, become_node, in_fresh_namespaces, require_root};
pub use snapshot::Snapshot;
pub use wait::wait_for;
