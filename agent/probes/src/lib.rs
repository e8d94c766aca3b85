//! Startup, readiness and liveness probes: exec, httpGet, tcpSocket and grpc.
//!
//! Owns when a probe runs, what it counts as, thresholds and start-up gating. Does not decide what follows from an outcome
//! (restart, readiness condition, event): that is the agent's, told through a channel of [`Update`].

mod action;
mod grpc;
mod http;
mod manager;
mod model;
mod standing;
mod tcp;
mod tls;
mod worker;

pub use http::{LifecycleGet, lifecycle_get};
pub use manager::ProbeManager;
pub use model::{ExecProbe, InitialOutcomes, Kind, Outcome, Target, Update};
