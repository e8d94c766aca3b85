//! Keeps tasks and child processes alive together or ends them together.
//!
//! Owns three small things: [`Tasks`], a set of named tasks that fail as one; [`Child`], a supervised child process that is
//! started again with back-off; and the `sd_notify` readiness protocol in both directions. Knows nothing of what runs.

mod child;
mod notify;
mod tasks;

pub use child::{Child, ChildError, ChildState, RestartPolicy};
pub use notify::{NotifyError, NotifySocket, notify_ready};
pub use tasks::{TaskError, Tasks};
