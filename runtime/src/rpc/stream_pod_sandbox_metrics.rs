//! StreamPodSandboxMetrics: the whole list in messages of bounded size.

use std::sync::Arc;

use oarlock_proto::cri;
use tonic::Status;

use super::list_pod_sandbox_metrics::list_pod_sandbox_metrics;
use super::{Responses, chunks};
use crate::core::Core;

pub(super) async fn stream_pod_sandbox_metrics(
    core: &Arc<Core>,
) -> Result<Responses<cri::StreamPodSandboxMetricsResponse>, Status> {
    Ok(chunks(list_pod_sandbox_metrics(core).await?, |pod_sandbox_metrics| cri::StreamPodSandboxMetricsResponse {
        pod_sandbox_metrics,
    }))
}
