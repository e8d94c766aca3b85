//! Why a volume could not be had, worded as events show it.

use std::path::PathBuf;

use oarlock_volumes::VolumeError;

use crate::cluster::ClusterError;

#[derive(Debug, thiserror::Error)]
pub(crate) enum CsiError {
    #[error("driver name {driver} not found in the list of registered CSI drivers")]
    NoDriver { driver: String },
    #[error("rpc error: code = {} desc = {}", code(.status), .status.message())]
    Status { status: Box<tonic::Status> },
    #[error("rpc error: code = DeadlineExceeded desc = {call} took longer than {seconds} s")]
    Timeout { call: &'static str, seconds: u64 },
    #[error("error processing PVC {namespace}/{name}: {problem}")]
    Claim { namespace: String, name: String, problem: String },
    #[error("{0}")]
    Refused(String),
    #[error("{operation} {}: {source}", path.display())]
    Io { operation: &'static str, path: PathBuf, source: std::io::Error },
    #[error("{0}")]
    Cluster(#[from] ClusterError),
    #[error("{}", .0.full_message())]
    Volume(Box<VolumeError>),
}

fn code(status: &tonic::Status) -> String {
    match status.code() {
        tonic::Code::Cancelled => "Canceled".to_owned(),
        code => format!("{code:?}"),
    }
}

impl CsiError {
    pub(crate) fn io(operation: &'static str, path: &std::path::Path, source: impl Into<std::io::Error>) -> Self {
        CsiError::Io { operation, path: path.to_owned(), source: source.into() }
    }

    /// The volume is not there, which is as good as unmounted.
    pub(crate) fn not_found(&self) -> bool {
        matches!(self, CsiError::Status { status } if status.code() == tonic::Code::NotFound)
    }
}

impl From<CsiError> for VolumeError {
    fn from(error: CsiError) -> Self {
        VolumeError::Storage { message: error.to_string() }
    }
}
