//! RemoveContainer: a container that does not exist has been removed; one that runs is killed.

use std::sync::Arc;

use oarlock_proto::cri;
use tonic::Status;

use crate::container;
use crate::core::Core;
use crate::error::Error;

pub(super) async fn remove_container(
    core: &Arc<Core>,
    request: &cri::RemoveContainerRequest,
) -> Result<cri::RemoveContainerResponse, Status> {
    let container = match core.index.container(&request.container_id) {
        Err(Error::NotFound { .. }) => return Ok(cri::RemoveContainerResponse {}),
        other => other?,
    };
    let key = format!("remove container {}", container.id());
    let work = {
        let core = core.clone();
        async move { container::remove(core, container).await.map(|()| String::new()).map_err(Status::from) }
    };
    core.joins.run(key, work).await?;
    Ok(cri::RemoveContainerResponse {})
}
