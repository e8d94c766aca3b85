//! What controllers and the scheduler stand on: shared informers, work queues, event recording, label selectors and
//! resource quantities. It owns no controller and decides nothing about any kind.

pub mod call;
pub mod events;
pub mod informer;
pub mod quantity;
pub mod queue;
pub mod selector;

#[cfg(feature = "fake")]
pub mod fake;

pub use call::{ApiError, call, merge, merge_metadata, merge_status};
pub use events::{EventType, Recorder};
pub use informer::{Change, Informer, Key};
pub use queue::{Next, WorkQueue};
pub use selector::Selector;
