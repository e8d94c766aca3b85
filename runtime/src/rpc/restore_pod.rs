//! RestorePod: refused, nothing in an archive is trusted.

use oarlock_proto::cri;
use tonic::Status;

use crate::error::Error;

pub(super) fn restore_pod() -> Result<cri::RestorePodResponse, Status> {
    Err(Error::Unimplemented("RestorePod: this runtime restores no checkpoints".to_owned()).into())
}
