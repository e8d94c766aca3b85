//! The node object: registration, status, conditions, lease.
//!
//! `status` is pure and says what the API is told, `capacity` and `identity` read the machine, `sync` does the talking.

pub(crate) mod capacity;
pub(crate) mod identity;
pub(crate) mod status;
pub(crate) mod sync;
