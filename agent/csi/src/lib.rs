//! Persistent volumes and volumes of CSI drivers, on one node.
//!
//! Owns the drivers that have registered ([`Drivers`]), the way from a pod's claim to what a driver is asked for ([`resolve`],
//! pure), and mounting and unmounting with a ledger on disk from which a crash is made good ([`Storage`]). Does not attach
//! volumes to nodes, make them, or bind claims: it waits for those who do. Reads the API through [`Cluster`].

mod announce;
mod client;
mod cluster;
mod context;
mod drivers;
mod error;
mod ledger;
mod resolve;
mod storage;

pub use cluster::{Cluster, ClusterError, NodeDriver};
pub use drivers::Drivers;
pub use ledger::abandon;
pub use storage::{Storage, VolumeUse};
