//! StreamContainerStats: the whole list in messages of bounded size.

use std::sync::Arc;

use oarlock_proto::cri;
use tonic::Status;

use super::list_container_stats::list_container_stats;
use super::{Responses, chunks};
use crate::core::Core;

pub(super) async fn stream_container_stats(
    core: &Arc<Core>,
    filter: Option<&cri::ContainerStatsFilter>,
) -> Result<Responses<cri::StreamContainerStatsResponse>, Status> {
    Ok(chunks(list_container_stats(core, filter).await?, |container_stats| cri::StreamContainerStatsResponse {
        container_stats,
    }))
}
