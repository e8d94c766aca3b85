//! Growing delays: between restarts of a container, between image pulls, between attempts at anything else.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// A delay that doubles with each use and starts over after a calm time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Backoff {
    pub delay: Duration,
    pub updated_at: Timestamp,
}

/// First and longest delay between restarts and between pulls.
pub(crate) const INITIAL: Duration = Duration::from_secs(10);
pub(crate) const LONGEST: Duration = Duration::from_secs(300);

/// Longest delay between attempts at a step.
const LONGEST_RETRY: Duration = Duration::from_secs(10);

impl Backoff {
    /// When something that ended at `ended_at` may start again; None when it may at once.
    pub(crate) fn ready_at(&self, ended_at: Timestamp) -> Option<Timestamp> {
        (!self.expired(ended_at)).then(|| later(ended_at, self.delay))
    }

    /// The entry after one more start of what ended at `ended_at`.
    pub(crate) fn next(current: Option<Backoff>, ended_at: Timestamp, now: Timestamp, longest: Duration) -> Backoff {
        match current {
            Some(backoff) if !backoff.expired(ended_at) => {
                Backoff { delay: (backoff.delay * 2).min(longest), updated_at: now }
            }
            _ => Backoff { delay: INITIAL.min(longest), updated_at: now },
        }
    }

    /// A container that ran for twice the longest delay has earned a fresh start.
    fn expired(&self, ended_at: Timestamp) -> bool {
        ended_at > later(self.updated_at, LONGEST * 2)
    }
}

/// Whether `at` is still to come. What is further away than the `longest` delay was meant before the clock was set back, and
/// has come.
pub(crate) fn pending(at: Timestamp, now: Timestamp, longest: Duration) -> bool {
    at > now && at <= later(now, longest)
}

/// Attempts at a step that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Retry {
    pub failures: u32,
    pub at: Timestamp,
}

impl Retry {
    /// After one more failure: 0.5 s doubling up to 10 s.
    pub(crate) fn after(previous: Option<Retry>, now: Timestamp) -> Retry {
        let failures = previous.map_or(0, |retry| retry.failures) + 1;
        let delay = Duration::from_millis(500 << (failures - 1).min(5)).min(LONGEST_RETRY);
        Retry { failures, at: later(now, delay) }
    }

    /// Whether the next attempt has to wait.
    pub(crate) fn waits(&self, now: Timestamp) -> bool {
        pending(self.at, now, LONGEST_RETRY)
    }
}

/// `at + delay`, staying at the end of time rather than overflowing.
pub(crate) fn later(at: Timestamp, delay: Duration) -> Timestamp {
    at.saturating_add(delay).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).expect("a small number")
    }

    #[test]
    fn restarts_wait_ten_seconds_doubling_to_five_minutes() {
        let mut entry = None;
        let mut delays = Vec::new();
        let mut now = 0;
        for _ in 0..8 {
            let next = Backoff::next(entry, at(now), at(now), LONGEST);
            delays.push(next.delay.as_secs());
            now += i64::try_from(next.delay.as_secs()).unwrap();
            entry = Some(next);
        }
        assert_eq!(delays, [10, 20, 40, 80, 160, 300, 300, 300]);
    }

    #[test]
    fn a_clock_that_was_set_back_makes_nobody_wait_longer() {
        let retry = Retry::after(None, at(3600));
        assert!(retry.waits(at(3600)));
        assert!(!retry.waits(at(0)), "an hour ago");
        assert!(!retry.waits(at(3601)));
        assert!(pending(at(300), at(0), LONGEST) && !pending(at(301), at(0), LONGEST));
    }

    #[test]
    fn ten_calm_minutes_start_over() {
        let entry = Backoff { delay: Duration::from_secs(160), updated_at: at(0) };
        assert_eq!(entry.ready_at(at(600)), Some(at(760)));
        assert_eq!(entry.ready_at(at(601)), None);
        assert_eq!(Backoff::next(Some(entry), at(601), at(601), LONGEST).delay, INITIAL);
    }
}
