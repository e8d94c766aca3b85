//! Stand-ins for the two neighbours of the agent: an API server and a container runtime, both in this process.

pub mod api;
pub mod runtime;
