//! What can go wrong with a volume, worded as the FailedMount event shows it.

use std::io;
use std::path::PathBuf;

use crate::source::SourceError;

/// Why a volume could not be set up, refreshed or removed.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    #[error("pod {pod:?} has no UID")]
    NoUid { pod: String },
    #[error("volume {volume:?} is of kind {kind}, which this node does not support")]
    Unsupported { volume: String, kind: String },
    #[error("volume mount refers to volume {volume:?}, which the pod does not have")]
    UnknownVolume { volume: String },
    #[error("{kind} \"{namespace}/{name}\" not found")]
    ObjectNotFound { kind: &'static str, namespace: String, name: String },
    #[error("references non-existent {kind} key: {key}")]
    KeyNotFound { kind: &'static str, key: String },
    #[error("fetch {kind} \"{namespace}/{name}\"")]
    Fetch {
        kind: &'static str,
        namespace: String,
        name: String,
        #[source]
        source: SourceError,
    },
    #[error("volume {volume:?}: {message}")]
    Invalid { volume: String, message: String },
    #[error("hostPath type check failed: {path} is not a {wanted}")]
    HostPathType { path: String, wanted: &'static str },
    #[error("{operation} {}", path.display())]
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
}

fn join(errors: &[VolumeError]) -> String {
    errors.iter().map(VolumeError::full_message).collect::<Vec<_>>().join("; ")
}

impl VolumeError {
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
