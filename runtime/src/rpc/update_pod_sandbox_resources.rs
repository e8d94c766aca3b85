//! UpdatePodSandboxResources: the limits of a pod's own control group belong to whoever made the group. What is told is put
//! on record, and applied where the group is ours.

use std::sync::Arc;

use oarlock_proto::cri;
use tonic::Status;

use crate::container::limits_of;
use crate::core::Core;
use crate::error::Error;
use crate::groups;
use crate::nri;
use crate::record::SandboxPhase;
use crate::spec::resources;
use crate::state::blocking;

pub(super) async fn update_pod_sandbox_resources(
    core: &Arc<Core>,
    request: cri::UpdatePodSandboxResourcesRequest,
) -> Result<cri::UpdatePodSandboxResourcesResponse, Status> {
    let sandbox = core.index.sandbox(&request.pod_sandbox_id)?;
    let record = sandbox.record();
    if record.phase != SandboxPhase::Ready {
        let id = record.id.clone();
        return Err(Error::State { what: "sandbox", id, state: "not ready", operation: "change its limits" }.into());
    }
    for part in [&request.overhead, &request.resources].into_iter().flatten() {
        resources::check(part, &core.host).map_err(Error::from)?;
    }
    nri::sandbox_updates(core, &sandbox, request.overhead.as_ref(), request.resources.as_ref()).await?;
    if let Some(update) = request.resources.as_ref().filter(|_| record.owns_cgroup_parent) {
        let (group, limits) = (record.cgroup_parent.clone(), limits_of(update, update, &core.host));
        blocking("a control group", move || groups::limit(&group, &limits)).await?;
    }
    sandbox
        .change(&core.records, move |record| {
            let linux = record.config.linux.get_or_insert_default();
            linux.overhead = request.overhead.or(linux.overhead.take());
            linux.resources = request.resources.or(linux.resources.take());
        })
        .await?;
    nri::sandbox_updated(core, &sandbox).await;
    Ok(cri::UpdatePodSandboxResourcesResponse {})
}
