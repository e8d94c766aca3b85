//! User namespaces of pods: which range of the node's ids each pod has, kept with the pod so that it survives a restart.

mod pool;
mod ranges;

pub use pool::UsersError;
pub(crate) use pool::{Pool, Range, UNIT};
pub(crate) use ranges::{UserRanges, subordinate};
