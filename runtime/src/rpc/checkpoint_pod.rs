//! CheckpointPod: refused, CRIU is not driven by this runtime.

use std::sync::Arc;

use oarlock_proto::cri;
use tonic::Status;

use crate::core::Core;
use crate::error::Error;

pub(super) fn checkpoint_pod(
    core: &Arc<Core>,
    request: &cri::CheckpointPodRequest,
) -> Result<cri::CheckpointPodResponse, Status> {
    core.index.sandbox(&request.pod_sandbox_id)?;
    Err(Error::Unimplemented("CheckpointPod: this runtime makes no checkpoints".to_owned()).into())
}
