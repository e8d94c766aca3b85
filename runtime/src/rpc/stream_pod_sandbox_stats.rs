//! StreamPodSandboxStats: the whole list in messages of bounded size.

use std::sync::Arc;

use oarlock_proto::cri;
use tonic::Status;

use super::list_pod_sandbox_stats::list_pod_sandbox_stats;
use super::{Responses, chunks};
use crate::core::Core;

pub(super) async fn stream_pod_sandbox_stats(
    core: &Arc<Core>,
    filter: Option<&cri::PodSandboxStatsFilter>,
) -> Result<Responses<cri::StreamPodSandboxStatsResponse>, Status> {
    Ok(chunks(list_pod_sandbox_stats(core, filter).await?, |pod_sandbox_stats| cri::StreamPodSandboxStatsResponse {
        pod_sandbox_stats,
    }))
}
