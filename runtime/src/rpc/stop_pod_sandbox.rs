//! StopPodSandbox: a sandbox that does not exist is one that has been stopped.

use std::sync::Arc;

use oarlock_proto::cri;
use tonic::Status;

use crate::core::Core;
use crate::error::Error;
use crate::sandbox;

pub(super) async fn stop_pod_sandbox(
    core: &Arc<Core>,
    request: cri::StopPodSandboxRequest,
) -> Result<cri::StopPodSandboxResponse, Status> {
    let sandbox = match core.index.sandbox(&request.pod_sandbox_id) {
        Err(Error::NotFound { .. }) => return Ok(cri::StopPodSandboxResponse {}),
        other => other?,
    };
    let key = format!("stop sandbox {}", sandbox.id());
    let work = {
        let core = core.clone();
        async move { sandbox::stop(core, sandbox).await.map(|()| String::new()).map_err(Status::from) }
    };
    core.joins.run(key, work).await?;
    Ok(cri::StopPodSandboxResponse {})
}
