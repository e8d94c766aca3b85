//! What can go wrong with images. Messages reach users through pod events, so they name the image.

use std::io;
use std::path::PathBuf;

use crate::ReferenceError;

/// A failed operation on the image store.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The reference cannot be parsed.
    #[error("invalid image reference {reference:?}")]
    Reference {
        reference: String,
        #[source]
        source: ReferenceError,
    },
    /// The registry has no such image, or the store has none.
    #[error("image {reference} not found")]
    NotFound { reference: String },
    /// The registry wants other credentials, or the image does not exist for these.
    #[error("access to image {reference} denied: {message}")]
    Denied { reference: String, message: String },
    /// The registry could not be reached or failed.
    #[error("cannot pull image {reference}: {message}")]
    Registry { reference: String, message: String },
    /// A file that says how registries are reached is wrong.
    #[error("{}: {field}: {problem}", file.display())]
    Configuration { file: PathBuf, field: String, problem: String },
    /// No manifest for this machine.
    #[error("image {reference} has no variant for {platform}")]
    NoPlatform { reference: String, platform: String },
    /// Content does not have the digest it was asked by.
    #[error("content of {expected} has digest {actual}")]
    DigestMismatch { expected: String, actual: String },
    /// Something in the image is broken or forbidden.
    #[error("image is damaged: {what}")]
    Damaged { what: String },
    /// The archive is neither an OCI layout nor a docker archive.
    #[error("{} is not an image archive: {what}", path.display())]
    NotAnArchive { path: PathBuf, what: String },
    /// Unpacking hit a limit that guards against archive bombs.
    #[error("layer exceeds the limit on {what}")]
    LimitExceeded { what: &'static str },
    /// An archive entry would reach outside the layer or is otherwise refused.
    #[error("layer entry {entry:?} refused: {why}")]
    HostileEntry { entry: String, why: &'static str },
    /// The image is pinned.
    #[error("image {reference} is pinned")]
    Pinned { reference: String },
    /// A file of the store could not be used.
    #[error("cannot {operation} {}", path.display())]
    Io {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The call this one waited for failed.
    #[error("{0}")]
    Shared(std::sync::Arc<ImageError>),
    /// The work was cancelled by shutdown.
    #[error("image work was cancelled")]
    Cancelled,
}

impl ImageError {
    /// Whether the same call may succeed later without anybody changing anything.
    pub fn is_retryable(&self) -> bool {
        match self {
            ImageError::Registry { .. } | ImageError::Io { .. } | ImageError::DigestMismatch { .. } => true,
            ImageError::Shared(inner) => inner.is_retryable(),
            _ => false,
        }
    }

    /// Whether there is no such image.
    pub fn is_not_found(&self) -> bool {
        match self {
            ImageError::NotFound { .. } => true,
            ImageError::Shared(inner) => inner.is_not_found(),
            _ => false,
        }
    }

    pub(crate) fn io(operation: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> ImageError {
        let path = path.into();
        move |source| ImageError::Io { operation, path, source }
    }
}
