//! A watch: a cursor over a bucket's event tail.
//!
//! Nothing is queued for a watcher, so a slow one costs nothing; one that falls off the tail is told so.

use std::sync::Arc;

use tokio::sync::watch::Receiver;

use crate::StoreError;
use crate::view::Event;
use crate::writer::Shared;

/// Follows the events under a prefix.
pub struct Watch {
    pub(crate) shared: Arc<Shared>,
    pub(crate) prefix: Box<str>,
    pub(crate) cursor: u64,
    pub(crate) changed: Receiver<u64>,
}

impl Watch {
    /// The revision up to which every event has been returned.
    pub fn revision(&self) -> u64 {
        self.cursor
    }

    /// The events there are now, at most `limit`, without waiting; may be none.
    pub fn poll_now(&mut self, limit: usize) -> Result<Vec<Arc<Event>>, StoreError> {
        self.changed.borrow_and_update();
        let (events, cursor) = self.shared.view.read().events(&self.prefix, self.cursor, limit)?;
        self.cursor = cursor;
        Ok(events)
    }

    /// Waits for events and returns at least one, at most `limit`. Cancel safe.
    pub async fn next(&mut self, limit: usize) -> Result<Vec<Arc<Event>>, StoreError> {
        loop {
            let events = self.poll_now(limit)?;
            if !events.is_empty() {
                return Ok(events);
            }
            self.changed.changed().await.map_err(|_| StoreError::Closed)?;
        }
    }
}
