//! ContainerStats.

use std::sync::Arc;

use oarlock_proto::cri;
use tonic::Status;

use crate::core::Core;
use crate::stats;

pub(super) async fn container_stats(
    core: &Arc<Core>,
    request: &cri::ContainerStatsRequest,
) -> Result<cri::ContainerStatsResponse, Status> {
    let container = core.index.container(&request.container_id)?;
    let stats = stats::containers(core, vec![container]).await?.pop();
    Ok(cri::ContainerStatsResponse { stats })
}
