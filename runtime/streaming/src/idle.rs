//! Waiting until a session has been idle for too long, without a timer that is reset by every byte.

use std::time::Duration;

/// Completes once `idle` gives `limit` or more.
pub(crate) async fn expired(limit: Duration, idle: impl Fn() -> Duration) {
    loop {
        let idle = idle();
        if idle >= limit {
            return;
        }
        tokio::time::sleep(limit - idle).await;
    }
}
