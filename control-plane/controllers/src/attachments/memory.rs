//! What the caches do not say yet: attachments that are being made, and since when nodes are missing.

use std::collections::HashMap;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::plan::Volume;

/// How long a node's volumes stay attached when the node is gone: it may run on without the API.
const MISSING_FOR: Duration = Duration::from_secs(6 * 60);

/// An attachment that is being made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Promise {
    pub node: String,
    pub attachment: String,
}

/// Promises by driver and handle; only for volumes that one node alone may have.
pub(super) type Promises = HashMap<(String, String), Promise>;

#[derive(Default)]
pub(super) struct Memory {
    /// Whoever decides about attachments holds it from reading the cache until its promises are in.
    pub promises: Mutex<Promises>,
    missing: Mutex<HashMap<String, Instant>>,
}

impl Memory {
    pub(super) fn promise(promises: &mut Promises, volume: &Volume, node: &str) {
        if volume.exclusive {
            let promise = Promise { node: node.to_owned(), attachment: volume.attachment(node) };
            promises.insert((volume.driver.clone(), volume.handle.clone()), promise);
        }
    }

    /// The attachment is there for all to see, or will not be made.
    pub(super) fn settle(&self, attachment: &str) {
        self.promises.lock().retain(|_, promise| promise.attachment != attachment);
    }

    /// Attachments that were promised to the node and that it does not want any more.
    pub(super) fn stale(&self, node: &str, wanted: &[Volume]) -> Vec<String> {
        let promises = self.promises.lock();
        let own = promises.values().filter(|promise| promise.node == node).map(|promise| promise.attachment.clone());
        own.filter(|name| !wanted.iter().any(|volume| volume.attachment(node) == *name)).collect()
    }

    pub(super) fn is_here(&self, node: &str) {
        self.missing.lock().remove(node);
    }

    /// How long the node, missing now, is still waited for.
    pub(super) fn wait_for(&self, node: &str) -> Duration {
        let since = *self.missing.lock().entry(node.to_owned()).or_insert_with(Instant::now);
        MISSING_FOR.saturating_sub(since.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_missing_node_is_waited_for_until_it_is_back() {
        let memory = Memory::default();
        assert_eq!(memory.wait_for("n1"), MISSING_FOR);
        tokio::time::advance(Duration::from_secs(100)).await;
        assert_eq!(memory.wait_for("n1"), MISSING_FOR - Duration::from_secs(100));
        memory.is_here("n1");
        assert_eq!(memory.wait_for("n1"), MISSING_FOR);
        tokio::time::advance(MISSING_FOR).await;
        assert_eq!(memory.wait_for("n1"), Duration::ZERO);
    }
}
