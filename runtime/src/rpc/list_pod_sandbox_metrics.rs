//! ListPodSandboxMetrics: of the sandboxes that are ready.

use std::sync::Arc;

use oarlock_proto::cri;
use tonic::Status;

use crate::core::Core;
use crate::metrics;

pub(super) async fn list_pod_sandbox_metrics(core: &Arc<Core>) -> Result<Vec<cri::PodSandboxMetrics>, Status> {
    Ok(metrics::collect(core).await?)
}
