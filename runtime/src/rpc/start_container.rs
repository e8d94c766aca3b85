//! StartContainer.

use std::sync::Arc;

use oarlock_proto::cri;
use tonic::Status;

use crate::container;
use crate::core::Core;

pub(super) async fn start_container(
    core: &Arc<Core>,
    request: &cri::StartContainerRequest,
) -> Result<cri::StartContainerResponse, Status> {
    let container = core.index.container(&request.container_id)?;
    let key = format!("start container {}", container.id());
    let work = {
        let core = core.clone();
        async move { container::start(core, container).await.map(|()| String::new()).map_err(Status::from) }
    };
    core.joins.run(key, work).await?;
    Ok(cri::StartContainerResponse {})
}
