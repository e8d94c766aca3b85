//! Waiting for a condition under a deadline.

use std::time::{Duration, Instant};

/// Asks `condition` until it answers `Some`, and fails the test with `what` when `timeout` has passed.
pub fn wait_for<T>(what: &str, timeout: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "gave up after {timeout:?} waiting for {what}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}
