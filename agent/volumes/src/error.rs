//! What can go wrong with a volume, worded as the FailedMount event shows it.

use std::io;
use std::path::{Path, PathBuf};

use crate::source::SourceError;

/// Why a volume could not be set up, refreshed or removed.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    #[error("pod {pod:?} has no usable UID")]
    NoUid { pod: String },
    #[error("volume {volume:?} is of kind {kind}, which this node does not support")]
    Unsupported { volume: String, kind: String },
    #[error("volume {volume:?}: {problem}")]
    Medium { volume: String, problem: String },
    #[error("volume mount refers to volume {volume:?}, which the pod does not have")]
    UnknownVolume { volume: String },
    #[error("container {container:?} has no mount at {mount_path:?}")]
    UnknownMount { container: String, mount_path: String },
    #[error("{kind} {name:?} not found")]
    ObjectNotFound { kind: &'static str, namespace: String, name: String },
    #[error("references non-existent {kind} key: {key}")]
    KeyNotFound { kind: &'static str, key: String },
    #[error("failed to fetch {kind} \"{namespace}/{name}\"")]
    Fetch {
        kind: &'static str,
        namespace: String,
        name: String,
        #[source]
        source: SourceError,
    },
    #[error("failed to fetch token for service account \"{namespace}/{name}\"")]
    Token {
        namespace: String,
        name: String,
        #[source]
        source: SourceError,
    },
    #[error("{message}")]
    Invalid { message: String },
    /// A volume that comes from elsewhere is not to be had now.
    #[error("{message}")]
    Storage { message: String },
    #[error("hostPath type check failed: {path} is not a {wanted}")]
    HostPathType { path: String, wanted: &'static str },
    #[error("failed to prepare subPath {sub_path:?} of volume {volume:?}: {reason}")]
    SubPath { volume: String, sub_path: String, reason: String },
    #[error("refusing to delete across the mount point {}", path.display())]
    ForeignMount { path: PathBuf },
    #[error("failed to {operation} {}", path.display())]
    Io {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("MountVolume.SetUp failed for volume {volume:?}")]
    SetUp {
        volume: String,
        #[source]
        source: Box<VolumeError>,
    },
    #[error("{}", join(.0))]
    Several(Vec<VolumeError>),
    #[error("volume work was cut off while {operation}")]
    Interrupted { operation: &'static str },
}

fn join(errors: &[VolumeError]) -> String {
    errors.iter().map(VolumeError::full_message).collect::<Vec<_>>().join("; ")
}

impl VolumeError {
    pub(crate) fn io(operation: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        VolumeError::Io { operation, path: path.to_path_buf(), source: source.into() }
    }

    /// None for no errors, the error itself for one, all of them together otherwise.
    pub(crate) fn gather(mut errors: Vec<VolumeError>) -> Result<(), VolumeError> {
        match errors.len() {
            0 => Ok(()),
            1 => Err(errors.remove(0)),
            _ => Err(VolumeError::Several(errors)),
        }
    }

    /// Whether trying again without a change of the pod can help.
    pub fn is_retryable(&self) -> bool {
        match self {
            VolumeError::NoUid { .. }
            | VolumeError::Unsupported { .. }
            | VolumeError::Medium { .. }
            | VolumeError::UnknownVolume { .. }
            | VolumeError::UnknownMount { .. }
            | VolumeError::Invalid { .. } => false,
            VolumeError::SetUp { source, .. } => source.is_retryable(),
            VolumeError::Several(errors) => errors.iter().all(VolumeError::is_retryable),
            _ => true,
        }
    }

    /// The message with its chain of sources.
    pub fn full_message(&self) -> String {
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            text.push_str(" : ");
            text.push_str(&cause.to_string());
            source = cause.source();
        }
        text
    }
}
