//! PodSandboxStats.

use std::sync::Arc;

use oarlock_proto::cri;
use tonic::Status;

use crate::core::Core;
use crate::stats;

pub(super) async fn pod_sandbox_stats(
    core: &Arc<Core>,
    request: &cri::PodSandboxStatsRequest,
) -> Result<cri::PodSandboxStatsResponse, Status> {
    let record = core.index.sandbox(&request.pod_sandbox_id)?.record();
    let stats = stats::sandboxes(core, vec![record]).await?.pop();
    Ok(cri::PodSandboxStatsResponse { stats })
}
