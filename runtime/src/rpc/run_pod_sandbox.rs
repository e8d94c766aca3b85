//! RunPodSandbox: a retry joins the first attempt; one after success gives the same sandbox.

use std::sync::Arc;

use oarlock_proto::cri;
use tonic::Status;

use crate::core::Core;
use crate::error::Error;
use crate::record::sandbox_name;
use crate::sandbox;

pub(super) async fn run_pod_sandbox(
    core: &Arc<Core>,
    request: cri::RunPodSandboxRequest,
) -> Result<cri::RunPodSandboxResponse, Status> {
    let config = request.config.ok_or_else(|| Error::Invalid("config is required".to_owned()))?;
    let metadata = config.metadata.clone().ok_or_else(|| Error::Invalid("config.metadata is required".to_owned()))?;
    let key = format!("run sandbox {}", sandbox_name(&metadata));
    let work = {
        let core = core.clone();
        async move { sandbox::run(core, config, request.runtime_handler).await.map_err(Status::from) }
    };
    let pod_sandbox_id = core.joins.run(key, work).await?;
    Ok(cri::RunPodSandboxResponse { pod_sandbox_id })
}
