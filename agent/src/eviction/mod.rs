//! Keeping the node alive when memory, disk or process ids run short.
//!
//! `threshold` says what is configured, `judge` what follows from what was seen (pure), `rank` which pod goes first (pure),
//! `message` what its user reads (pure), `local_storage` which pods use more disk than they may (pure), `usage` looks at
//! machine and pods, `manager` is the loop that puts them together. Ending a pod is its worker's business.
//!
//! ```text
//!  every 10 s: look ─▶ judge ─▶ conditions of the node (kept for the transition period)
//!                        │
//!                        └─▶ thresholds met for their grace ─▶ dead containers, unused images ─▶ look again ─▶ end one pod
//! ```

mod judge;
mod local_storage;
mod manager;
mod message;
mod rank;
mod threshold;
mod usage;

pub use threshold::{Amount, EvictionConfig, EvictionConfigError, Signal, Threshold};

pub(crate) use judge::Pressure;
pub(crate) use manager::run;
pub(crate) use message::{REASON, pressed};
pub(crate) use rank::{CRITICAL_PRIORITY, is_critical};
pub(crate) use usage::{PodUsage, of_all};
