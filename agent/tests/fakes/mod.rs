//! Stand-ins for the two neighbours of the agent: an API server and a container runtime, both in this process.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::time::Duration;

pub mod api;
pub mod driver;
pub mod node;
pub mod plugin;
pub mod runtime;

/// Whether a condition comes to hold within a time that only a stuck agent exceeds. Looks often, and leaves the processor to
/// what is waited for.
pub async fn reached(mut condition: impl FnMut() -> bool) -> bool {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(40), waiting).await.is_ok()
}
