//! What the writer thread needs of a disk.

use std::sync::Arc;

use crate::StoreError;
use crate::view::Event;

/// Keeps committed events. Called from the writer thread only.
pub(crate) trait Durable: Send + 'static {
    /// Makes the events durable, all or none.
    fn commit(&mut self, events: &[Arc<Event>]) -> Result<(), StoreError>;
    /// Forgets what only watches before `floor` would need.
    fn forget(&mut self, floor: u64) -> Result<(), StoreError>;
    /// Called once when the store closes.
    fn close(&mut self) {}
}

/// Keeps nothing.
pub(crate) struct Volatile;

impl Durable for Volatile {
    fn commit(&mut self, _events: &[Arc<Event>]) -> Result<(), StoreError> {
        Ok(())
    }

    fn forget(&mut self, _floor: u64) -> Result<(), StoreError> {
        Ok(())
    }
}
