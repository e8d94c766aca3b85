//! ListPodSandboxStats: of the sandboxes that are ready.

use std::sync::Arc;

use oarlock_proto::cri;
use tonic::Status;

use crate::core::Core;
use crate::stats;

pub(super) async fn list_pod_sandbox_stats(
    core: &Arc<Core>,
    filter: Option<&cri::PodSandboxStatsFilter>,
) -> Result<Vec<cri::PodSandboxStats>, Status> {
    Ok(stats::sandboxes(core, stats::filtered_sandboxes(core, filter)).await?)
}
