//! Stand-ins for the two neighbours of the agent: an API server and a container runtime, both in this process.

#![allow(dead_code, reason = "each test program uses a part of it")]

pub mod api;
pub mod driver;
pub mod node;
pub mod plugin;
pub mod runtime;
