//! What controllers and the scheduler stand on: shared informers, work queues, event recording, label selectors, resource
//! quantities, and the judgements that both make alike: which nodes a term chooses, which volumes suit a claim. It owns no
//! controller.

pub mod call;
pub mod events;
pub mod informer;
pub mod node_terms;
pub mod quantity;
pub mod queue;
pub mod selector;
pub mod volumes;

#[cfg(feature = "fake")]
pub mod fake;

pub use call::{ApiError, call, merge, merge_metadata, merge_status};
pub use events::{EventType, Recorder};
pub use informer::{Change, Informer, Key};
pub use queue::{Next, WorkQueue};
pub use selector::Selector;
