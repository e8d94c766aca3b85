//! Field ownership: `metadata.managedFields`, server-side apply with conflicts, and tracking of plain updates.
//!
//! ```text
//! apply:  live + applied ── merge ──▶ merged ── prune what only this manager owned and no longer applies ──▶ new
//!         compare(live, new) ∩ what others own = conflicts; with force the others lose those fields
//! update: compare(old, new): the writer gains what it added or changed, everybody loses what was removed
//! ```

mod apply;
mod compare;
mod entries;
mod form;
mod last_applied;
mod merge;
mod set;
mod track;

pub use apply::{ApplyInput, apply};
pub use track::{UpdateInput, track_update};

/// One field that another manager owns with a different value.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Conflict {
    /// As clients read it: `"kubectl" using apps/v1`, `"x" with subresource "status"`.
    pub manager: String,
    /// As clients read it: `.spec.replicas`, `.spec.containers[name="a"].image`.
    pub field: String,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ApplyError {
    /// 409 Conflict, one cause of type `FieldManagerConflict` for each item (message `conflict with <manager>`).
    #[error("{}", conflict_message(.0))]
    Conflicts(Vec<Conflict>),
    /// 400 Bad Request.
    #[error("{0}")]
    Invalid(String),
}

fn conflict_message(conflicts: &[Conflict]) -> String {
    if let [only] = conflicts {
        return format!("Apply failed with 1 conflict: conflict with {}: {}", only.manager, only.field);
    }
    let mut lines = Vec::new();
    let mut manager = None;
    for conflict in conflicts {
        if manager != Some(&conflict.manager) {
            lines.push(format!("conflicts with {}:", conflict.manager));
            manager = Some(&conflict.manager);
        }
        lines.push(format!("- {}", conflict.field));
    }
    format!("Apply failed with {} conflicts: {}", conflicts.len(), lines.join("\n"))
}

#[cfg(test)]
mod tests;
