//! Keeps moves of processes between control groups quick while a container is about to be started.
//!
//! The engine moves each container's first process, and that would wait longer than everything else that a start does (design
//! page 17). Who makes a sandbox or a container says that a start is near; a thread then takes the kernel's lock again
//! and again until the time is over, and ends.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use oarlock_cgroup::MoveLock;

/// How long after a sandbox or a container is made its start counts as near.
const NEAR: Duration = Duration::from_millis(100);
/// Shorter than any grace period.
const INTERVAL: Duration = Duration::from_millis(3);

/// Until when moves are kept quick.
#[derive(Clone, Debug, Default)]
pub(crate) struct Moves {
    /// None: no thread is at work.
    until: Arc<Mutex<Option<Instant>>>,
}

impl Moves {
    /// Says that a container will be started within a moment. Does not wait.
    pub(crate) fn expect(&self) {
        let until = Instant::now() + NEAR;
        let mut current = self.until.lock().unwrap_or_else(PoisonError::into_inner);
        if current.replace(until).is_none() {
            let moves = self.clone();
            tokio::task::spawn_blocking(move || moves.keep());
        }
    }

    fn keep(&self) {
        let lock = MoveLock::of_caller();
        while !self.is_over() {
            // Without the lock moves are as slow as they are; nothing else depends on it.
            if lock.as_ref().is_none_or(|lock| lock.touch().is_err()) {
                self.until.lock().unwrap_or_else(PoisonError::into_inner).take();
                return;
            }
            std::thread::sleep(INTERVAL);
        }
    }

    /// Whether the time is over; from then on the next who expects a start begins anew.
    fn is_over(&self) -> bool {
        let mut until = self.until.lock().unwrap_or_else(PoisonError::into_inner);
        let over = until.is_none_or(|until| until <= Instant::now());
        if over {
            until.take();
        }
        over
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_ends_by_itself_and_begins_anew() {
        let moves = Moves::default();
        for _ in 0..2 {
            *moves.until.lock().unwrap() = Some(Instant::now() + Duration::from_millis(10));
            moves.keep();
            assert!(moves.until.lock().unwrap().is_none());
        }
    }
}
