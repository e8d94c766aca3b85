//! CreateContainer: a retry joins the first attempt; one after success gives the same container.

use std::sync::Arc;

use oarlock_proto::cri;
use tonic::Status;

use crate::container;
use crate::core::Core;
use crate::error::Error;
use crate::record::container_name;

pub(super) async fn create_container(
    core: &Arc<Core>,
    request: cri::CreateContainerRequest,
) -> Result<cri::CreateContainerResponse, Status> {
    let config = request.config.ok_or_else(|| Error::Invalid("config is required".to_owned()))?;
    let metadata = config.metadata.clone().ok_or_else(|| Error::Invalid("config.metadata is required".to_owned()))?;
    let sandbox_id = core.index.sandbox(&request.pod_sandbox_id)?.id();
    let key = format!("create container {}", container_name(&sandbox_id, &metadata));
    let work = {
        let core = core.clone();
        async move { container::create(core, sandbox_id, config).await.map_err(Status::from) }
    };
    let container_id = core.joins.run(key, work).await?;
    Ok(cri::CreateContainerResponse { container_id })
}
