//! Work queues: keys wait here until they are reconciled. A key is queued once however often it is added, is never
//! worked on twice at the same time, and comes back later and later while it fails. Bounded by the number of keys.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::fmt::Display;
use std::future::Future;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::call::ApiError;

const FIRST_RETRY: Duration = Duration::from_millis(5);
const LONGEST_RETRY: Duration = Duration::from_secs(60);

struct State<K> {
    ready: VecDeque<K>,
    /// Wanted again: in `ready`, or to be put there when the present work on it is done.
    dirty: HashSet<K>,
    working: HashSet<K>,
    delayed: BTreeMap<(Instant, u64), K>,
    due: HashMap<K, (Instant, u64)>,
    failures: HashMap<K, u32>,
    sequence: u64,
}

/// A queue of keys for one owner task.
pub struct WorkQueue<K> {
    state: Mutex<State<K>>,
    changed: Notify,
}

impl<K> Default for WorkQueue<K> {
    fn default() -> Self {
        Self {
            state: Mutex::new(State {
                ready: VecDeque::new(),
                dirty: HashSet::new(),
                working: HashSet::new(),
                delayed: BTreeMap::new(),
                due: HashMap::new(),
                failures: HashMap::new(),
                sequence: 0,
            }),
            changed: Notify::new(),
        }
    }
}

impl<K: Clone + Eq + Hash> WorkQueue<K> {
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Wants `key` worked on as soon as possible.
    pub fn add(&self, key: K) {
        self.state.lock().add(key);
        self.changed.notify_one();
    }

    /// Wants `key` worked on in `delay`, or sooner if that was asked before.
    pub fn add_after(&self, key: K, delay: Duration) {
        if delay.is_zero() {
            return self.add(key);
        }
        let mut state = self.state.lock();
        let at = Instant::now() + delay;
        match state.due.get(&key) {
            Some((due, _)) if *due <= at => return,
            Some(slot) => {
                let slot = *slot;
                state.delayed.remove(&slot);
            }
            None => {}
        }
        state.sequence += 1;
        let slot = (at, state.sequence);
        state.delayed.insert(slot, key.clone());
        state.due.insert(key, slot);
        drop(state);
        self.changed.notify_one();
    }

    /// Wants `key` again after a failure: each failure in a row doubles the delay.
    pub fn retry(&self, key: K) -> Duration {
        let failures = {
            let mut state = self.state.lock();
            let failures = state.failures.entry(key.clone()).or_default();
            *failures = failures.saturating_add(1);
            *failures
        };
        let delay = FIRST_RETRY.saturating_mul(1 << (failures - 1).min(20)).min(LONGEST_RETRY);
        self.add_after(key, delay);
        delay
    }

    /// Work on `key` succeeded: its next failure starts with the shortest delay.
    pub fn forget(&self, key: &K) {
        self.state.lock().failures.remove(key);
    }

    /// The next key to work on; [`WorkQueue::done`] must follow. Cancel safe. For one caller at a time.
    pub async fn next(&self) -> K {
        loop {
            let wake_at = {
                let mut state = self.state.lock();
                state.promote(Instant::now());
                if let Some(key) = state.ready.pop_front() {
                    state.dirty.remove(&key);
                    state.working.insert(key.clone());
                    return key;
                }
                state.delayed.keys().next().map(|(at, _)| *at)
            };
            match wake_at {
                None => self.changed.notified().await,
                Some(at) => tokio::select! {
                    () = self.changed.notified() => {}
                    () = tokio::time::sleep_until(at) => {}
                },
            }
        }
    }

    /// Ends work on `key`; if it was added meanwhile, it is ready again.
    pub fn done(&self, key: &K) {
        let mut state = self.state.lock();
        state.working.remove(key);
        if state.dirty.contains(key) {
            state.ready.push_back(key.clone());
            drop(state);
            self.changed.notify_one();
        }
    }
}

impl<K: Clone + Eq + Hash> State<K> {
    fn add(&mut self, key: K) {
        if !self.dirty.insert(key.clone()) || self.working.contains(&key) {
            return;
        }
        self.ready.push_back(key);
    }

    fn promote(&mut self, now: Instant) {
        while let Some(entry) = self.delayed.first_entry() {
            if entry.key().0 > now {
                break;
            }
            let key = entry.remove();
            self.due.remove(&key);
            self.add(key);
        }
    }
}

/// What a reconcile wants next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing until something changes.
    Done,
    /// Another look after this time, for what no event will announce.
    After(Duration),
}

/// Works the queue off in the calling task, `concurrency` keys at once, until `shutdown`.
pub async fn work<K, F, Fut>(
    controller: &'static str,
    queue: Arc<WorkQueue<K>>,
    concurrency: usize,
    shutdown: CancellationToken,
    reconcile: F,
) where
    K: Clone + Eq + Hash + Display + Send,
    F: Fn(K) -> Fut + Send,
    Fut: Future<Output = Result<Next, ApiError>> + Send,
{
    let mut running = FuturesUnordered::new();
    loop {
        let start = |key: K| {
            let reconciling = reconcile(key.clone());
            async move { (key, reconciling.await) }
        };
        tokio::select! {
            () = shutdown.cancelled() => return,
            key = queue.next(), if running.len() < concurrency => running.push(start(key)),
            Some((key, outcome)) = running.next() => {
                match outcome {
                    Ok(next) => {
                        queue.forget(&key);
                        if let Next::After(delay) = next {
                            queue.add_after(key.clone(), delay);
                        }
                    }
                    Err(error) => {
                        let delay = queue.retry(key.clone());
                        report(controller, &key, &error, delay);
                    }
                }
                queue.done(&key);
            }
        }
    }
}

fn report<K: Display>(controller: &'static str, key: &K, error: &ApiError, delay: Duration) {
    if error.is_conflict() || error.is_not_found() || error.is_namespace_terminating() {
        tracing::debug!(controller, %key, error = %error.user_message(), ?delay, "retrying");
    } else {
        tracing::warn!(controller, %key, %error, cause = %error.user_message(), ?delay, "retrying");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_key_is_queued_once_and_comes_back_when_added_during_work() {
        let queue = WorkQueue::<&str>::default();
        queue.add("a");
        queue.add("a");
        queue.add("b");
        assert_eq!(queue.next().await, "a");
        queue.add("a");
        assert_eq!(queue.next().await, "b");
        assert!(futures::poll!(Box::pin(queue.next())).is_pending(), "a is still being worked on");
        queue.done(&"a");
        assert_eq!(queue.next().await, "a");
    }

    #[tokio::test(start_paused = true)]
    async fn failures_wait_longer_each_time_until_forgotten() {
        let queue = WorkQueue::<u8>::default();
        let mut delays = Vec::new();
        for _ in 0..3 {
            delays.push(queue.retry(1));
            let key = queue.next().await;
            queue.done(&key);
        }
        assert_eq!(delays, [5, 10, 20].map(Duration::from_millis));
        queue.forget(&1);
        assert_eq!(queue.retry(1), FIRST_RETRY);
        for _ in 0..40 {
            queue.retry(2);
        }
        assert_eq!(queue.retry(2), LONGEST_RETRY);
    }

    #[tokio::test(start_paused = true)]
    async fn the_sooner_of_two_delays_wins() {
        let queue = WorkQueue::<u8>::default();
        let start = Instant::now();
        queue.add_after(1, Duration::from_secs(10));
        queue.add_after(1, Duration::from_secs(3));
        queue.add_after(1, Duration::from_secs(7));
        queue.next().await;
        assert_eq!(start.elapsed().as_secs(), 3);
        queue.done(&1);
        assert!(futures::poll!(Box::pin(queue.next())).is_pending());
    }
}
