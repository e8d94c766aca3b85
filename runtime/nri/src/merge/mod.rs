//! What several plugins' answers to one request come to: each sees what those before it asked for, none overrides another
//! unnoticed, and the runtime gets one answer.
//!
//! Pure. Owns no opinion on whether a container can have what is asked for.

mod create;
mod resources;
mod update;

pub(crate) use create::Creation;
pub(crate) use update::{Update, Updates};

/// What a key marked for removal names: a key that a plugin wants gone is preceded by a minus.
pub fn marked_for_removal(key: &str) -> Option<&str> {
    key.strip_prefix('-')
}

/// The key without the mark for removal, if it has one.
pub fn clear_marker(key: &str) -> &str {
    marked_for_removal(key).unwrap_or(key)
}

pub(crate) fn mark(key: &str) -> String {
    format!("-{key}")
}
