//! ListContainerStats: of the containers that run.

use std::sync::Arc;

use oarlock_proto::cri;
use tonic::Status;

use crate::core::Core;
use crate::stats;

pub(super) async fn list_container_stats(
    core: &Arc<Core>,
    filter: Option<&cri::ContainerStatsFilter>,
) -> Result<Vec<cri::ContainerStats>, Status> {
    Ok(stats::containers(core, stats::filtered_containers(core, filter)).await?)
}
