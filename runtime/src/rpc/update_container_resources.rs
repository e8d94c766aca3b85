//! UpdateContainerResources.

use std::sync::Arc;

use oarlock_proto::cri;
use tonic::Status;

use crate::container;
use crate::core::Core;
use crate::error::Error;
use crate::nri;

pub(super) async fn update_container_resources(
    core: &Arc<Core>,
    request: &cri::UpdateContainerResourcesRequest,
) -> Result<cri::UpdateContainerResourcesResponse, Status> {
    if request.windows.is_some() {
        return Err(Error::Invalid("windows: this is Linux".to_owned()).into());
    }
    let container = core.index.container(&request.container_id)?;
    if let Some(update) = &request.linux {
        let (update, further) = nri::container_updates(core, &container, update).await?;
        container::update(core, &container, &update, further).await?;
        nri::container_updated(core, &container).await;
    }
    Ok(cri::UpdateContainerResourcesResponse {})
}
