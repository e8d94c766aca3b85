//! The store: keys, bytes and revisions under the API server.
//!
//! Owns durability (SQLite), the revision counter, the in-memory multi-version view that serves every read, the
//! bounded event tail that watches resume from, and expiry. Knows nothing of Kubernetes: a value is bytes with at most
//! one hole in which the revision of the write is spelled out.

mod clock;
mod durable;
mod memory;
mod record;
mod resident;
mod sqlite;
mod view;
mod watch;
mod writer;

use std::sync::Arc;

use async_trait::async_trait;

pub use memory::MemoryStore;
pub use record::{Attachment, Record, Value};
pub use sqlite::{SqliteOptions, SqliteStore};
pub use view::{Event, EventKind, Page, Previous, Range};
pub use watch::Watch;

/// What a write requires of the key's present state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// Write whatever is there.
    Any,
    /// The key must not exist.
    Absent,
    /// The key must exist, last written at this revision.
    Revision(u64),
}

/// One write. A transaction is a list of them, all or none.
#[derive(Debug, Clone)]
pub enum Op {
    /// Writes a value; `ttl_seconds` makes it expire that long after the commit.
    Put { key: Arc<str>, value: Value, expect: Expect, ttl_seconds: Option<u32> },
    /// Removes a key. Removing an absent key with [`Expect::Any`] is a success without an event.
    Delete { key: Arc<str>, expect: Expect },
}

impl Op {
    /// The key this operation writes.
    pub fn key(&self) -> &Arc<str> {
        match self {
            Op::Put { key, .. } | Op::Delete { key, .. } => key,
        }
    }
}

/// What came of one operation of a committed transaction.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// The record as written.
    Written(Arc<Record>),
    /// The last state of the record, re-spelled with the revision of its deletion.
    Deleted(Arc<Record>),
    /// There was nothing to delete.
    Absent,
}

impl Outcome {
    /// The record written or deleted, if any.
    pub fn record(&self) -> Option<&Arc<Record>> {
        match self {
            Outcome::Written(record) | Outcome::Deleted(record) => Some(record),
            Outcome::Absent => None,
        }
    }
}

/// Why the store could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// An [`Expect`] did not hold; `current` is what is there instead.
    #[error("key {key} is not in the expected state")]
    Conflict { key: Arc<str>, current: Option<Arc<Record>> },
    /// The revision asked for is older than what is kept.
    #[error("revision {requested} is older than the oldest kept revision {oldest}")]
    Compacted { requested: u64, oldest: u64 },
    /// The revision asked for has not been reached.
    #[error("revision {requested} is ahead of the current revision {current}")]
    Future { requested: u64, current: u64 },
    /// The write could not be made durable; it did not happen and may be tried again.
    #[error("could not commit to {path}")]
    Commit {
        path: String,
        #[source]
        source: Arc<rusqlite::Error>,
    },
    /// The database could not be opened or read.
    #[error("could not {operation} {path}")]
    Open {
        operation: &'static str,
        path: String,
        #[source]
        source: rusqlite::Error,
    },
    /// The database file could not be created or made private.
    #[error("could not create {path}")]
    File {
        path: String,
        #[source]
        source: std::io::Error,
    },
    /// The writer thread could not be started.
    #[error("could not start the store writer thread")]
    Spawn {
        #[source]
        source: std::io::Error,
    },
    /// The database holds something this version cannot read.
    #[error("{path} is not a store this version reads: {detail}")]
    Format { path: String, detail: String },
    /// The store is shut down, or too many writes are waiting.
    #[error("the store is closed")]
    Closed,
}

impl StoreError {
    /// Whether the same call may succeed later.
    pub fn is_retryable(&self) -> bool {
        matches!(self, StoreError::Commit { .. } | StoreError::Future { .. })
    }

    /// A failed commit, told to one more of the writers it failed.
    fn again(&self) -> StoreError {
        match self {
            StoreError::Commit { path, source } => StoreError::Commit { path: path.clone(), source: source.clone() },
            _ => StoreError::Closed,
        }
    }
}

/// Keys, values, revisions. Reads are served from memory; a transaction returns once it is durable.
///
/// Keys are grouped in buckets by the text before their first `/`; ranges and watches never cross buckets.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// The revision of the last committed write.
    fn current_revision(&self) -> u64;
    /// The oldest revision a watch can resume from.
    fn oldest_revision(&self) -> u64;
    /// The present record of a key.
    fn get(&self, key: &str) -> Option<Arc<Record>>;
    /// The records whose keys begin with a prefix, in key order, now or as of a kept revision.
    fn range(&self, range: Range<'_>) -> Result<Page, StoreError>;
    /// How many records begin with a prefix now.
    fn count(&self, prefix: &str) -> usize;
    /// The revision of the last change in the prefix's bucket (or of the oldest kept one if there was none since).
    fn last_change(&self, prefix: &str) -> u64;
    /// Carries out all operations or none.
    async fn txn(&self, ops: Vec<Op>) -> Result<Vec<Outcome>, StoreError>;
    /// Events after `revision` of keys that begin with `prefix`.
    fn watch(&self, prefix: &str, revision: u64) -> Result<Watch, StoreError>;
    /// Forgets events up to and including `revision`.
    async fn compact(&self, revision: u64) -> Result<(), StoreError>;
}
