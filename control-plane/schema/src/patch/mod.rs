//! The three patch flavours of the API: JSON patch (RFC 6902), merge patch (RFC 7386) and strategic merge.

mod json;
mod merge;
mod order;
mod strategic;

pub use json::json_patch;
pub use merge::merge_patch;
pub use strategic::strategic_merge;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PatchError {
    /// The patch itself is malformed (400 Bad Request).
    #[error("{0}")]
    Invalid(String),
    /// The patch is well-formed but does not apply to this object (422 Invalid), e.g. a failed `test`.
    #[error("{0}")]
    Unprocessable(String),
}

#[cfg(test)]
mod tests;
