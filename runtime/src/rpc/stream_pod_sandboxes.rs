//! StreamPodSandboxes: the whole list in messages of bounded size.

use std::sync::Arc;

use oarlock_proto::cri;

use super::list_pod_sandbox::list_pod_sandbox;
use super::{Responses, chunks};
use crate::core::Core;

pub(super) fn stream_pod_sandboxes(
    core: &Arc<Core>,
    filter: Option<&cri::PodSandboxFilter>,
) -> Responses<cri::StreamPodSandboxesResponse> {
    chunks(list_pod_sandbox(core, filter), |pod_sandboxes| cri::StreamPodSandboxesResponse { pod_sandboxes })
}
