//! CheckpointContainer: a retry joins the first attempt.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use oarlock_proto::cri;
use tonic::Status;

use crate::container;
use crate::core::Core;

pub(super) async fn checkpoint_container(
    core: &Arc<Core>,
    request: cri::CheckpointContainerRequest,
) -> Result<cri::CheckpointContainerResponse, Status> {
    let id = core.index.container(&request.container_id)?.id();
    let location = PathBuf::from(&request.location);
    let limit = u64::try_from(request.timeout).ok().filter(|seconds| *seconds > 0).map(Duration::from_secs);
    let key = format!("checkpoint container {id} to {}", location.display());
    let work = {
        let core = core.clone();
        async move {
            let made = container::checkpoint(core, &id, &location, limit).await;
            made.map(|()| String::new()).map_err(Status::from)
        }
    };
    core.joins.run(key, work).await?;
    Ok(cri::CheckpointContainerResponse {})
}
