//! CheckpointContainer: refused, CRIU is not driven by this runtime.

use std::sync::Arc;

use oarlock_proto::cri;
use tonic::Status;

use crate::core::Core;
use crate::error::Error;

pub(super) fn checkpoint_container(
    core: &Arc<Core>,
    request: &cri::CheckpointContainerRequest,
) -> Result<cri::CheckpointContainerResponse, Status> {
    core.index.container(&request.container_id)?;
    Err(Error::Unimplemented("CheckpointContainer: this runtime makes no checkpoints".to_owned()).into())
}
