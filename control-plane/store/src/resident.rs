//! What every store with its present state in memory answers in the same way, whatever outlives it.

use std::sync::Arc;

use async_trait::async_trait;

use crate::writer::Engine;
use crate::{Op, Outcome, Page, Range, Record, Store, StoreError, Watch};

/// A store whose present state is in memory, served by an [`Engine`]; the backends differ in what outlives them.
pub(crate) trait Resident: Send + Sync + 'static {
    fn engine(&self) -> &Engine;
}

#[async_trait]
impl<T: Resident> Store for T {
    fn current_revision(&self) -> u64 {
        self.engine().shared.view.read().revision
    }

    fn oldest_revision(&self) -> u64 {
        self.engine().shared.view.read().oldest_revision()
    }

    fn get(&self, key: &str) -> Option<Arc<Record>> {
        self.engine().shared.view.read().get(key).cloned()
    }

    fn range(&self, range: Range<'_>) -> Result<Page, StoreError> {
        self.engine().range(range)
    }

    fn count(&self, prefix: &str) -> usize {
        self.engine().shared.view.read().count(prefix)
    }

    fn last_change(&self, prefix: &str) -> u64 {
        self.engine().shared.view.read().last_change(prefix)
    }

    async fn txn(&self, ops: Vec<Op>) -> Result<Vec<Outcome>, StoreError> {
        self.engine().txn(ops).await
    }

    fn watch(&self, prefix: &str, revision: u64) -> Result<Watch, StoreError> {
        self.engine().watch(prefix, revision)
    }

    async fn compact(&self, revision: u64) -> Result<(), StoreError> {
        self.engine().compact(revision).await
    }
}
