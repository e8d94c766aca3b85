//! What a ReplicaSet has asked of the API and not yet seen in its cache. While something is expected, the number of
//! pods in the cache is not to be trusted, and nothing is created or deleted.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use oarlock_machinery::Key;
use parking_lot::Mutex;
use tokio::time::Instant;

/// An expectation that is not met by then was about something that will never come.
const EXPIRY: Duration = Duration::from_secs(300);

struct Expected {
    creations: usize,
    deletions: HashSet<String>,
    since: Instant,
}

#[derive(Default)]
pub(super) struct Expectations {
    by_set: Mutex<HashMap<Key, Expected>>,
}

impl Expectations {
    /// To be called before the first of `count` creations is sent.
    pub fn expect_creations(&self, set: &Key, count: usize) {
        self.with(set, |expected| expected.creations += count);
    }

    /// To be called before the deletions are sent.
    pub fn expect_deletions(&self, set: &Key, uids: impl IntoIterator<Item = String>) {
        self.with(set, |expected| expected.deletions.extend(uids));
    }

    fn with(&self, set: &Key, change: impl FnOnce(&mut Expected)) {
        let mut all = self.by_set.lock();
        let fresh = || Expected { creations: 0, deletions: HashSet::new(), since: Instant::now() };
        let expected = all.entry(set.clone()).or_insert_with(fresh);
        change(expected);
        expected.since = Instant::now();
    }

    /// A pod of the set appeared, or its creation failed.
    pub fn created(&self, set: &Key) {
        self.settle(set, |expected| expected.creations = expected.creations.saturating_sub(1));
    }

    /// Creations that were announced and then not sent.
    pub fn creations_skipped(&self, set: &Key, count: usize) {
        self.settle(set, |expected| expected.creations = expected.creations.saturating_sub(count));
    }

    /// A pod of the set is gone or going, or its deletion failed.
    pub fn deleted(&self, set: &Key, uid: &str) {
        self.settle(set, |expected| {
            expected.deletions.remove(uid);
        });
    }

    fn settle(&self, set: &Key, change: impl FnOnce(&mut Expected)) {
        let mut all = self.by_set.lock();
        if let Some(expected) = all.get_mut(set) {
            change(expected);
            if expected.creations == 0 && expected.deletions.is_empty() {
                all.remove(set);
            }
        }
    }

    pub fn forget(&self, set: &Key) {
        self.by_set.lock().remove(set);
    }

    /// Whether the cache has caught up with what was asked.
    pub fn are_met(&self, set: &Key) -> bool {
        self.by_set.lock().get(set).is_none_or(|expected| expected.since.elapsed() > EXPIRY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn met_when_every_request_was_seen_or_failed_or_too_old() {
        let expectations = Expectations::default();
        let set = Key::new("ns", "set");
        assert!(expectations.are_met(&set));
        expectations.expect_creations(&set, 3);
        expectations.created(&set);
        expectations.creations_skipped(&set, 1);
        assert!(!expectations.are_met(&set));
        expectations.created(&set);
        assert!(expectations.are_met(&set));

        expectations.expect_deletions(&set, ["a".to_owned(), "b".to_owned()]);
        expectations.deleted(&set, "a");
        expectations.deleted(&set, "a");
        assert!(!expectations.are_met(&set));
        tokio::time::advance(EXPIRY * 2).await;
        assert!(expectations.are_met(&set));
    }
}
