//! RemovePodSandbox: a sandbox that does not exist is one that has been removed.

use std::sync::Arc;

use oarlock_proto::cri;
use tonic::Status;

use crate::core::Core;
use crate::error::Error;
use crate::sandbox;

pub(super) async fn remove_pod_sandbox(
    core: &Arc<Core>,
    request: cri::RemovePodSandboxRequest,
) -> Result<cri::RemovePodSandboxResponse, Status> {
    let sandbox = match core.index.sandbox(&request.pod_sandbox_id) {
        Err(Error::NotFound { .. }) => return Ok(cri::RemovePodSandboxResponse {}),
        other => other?,
    };
    let key = format!("remove sandbox {}", sandbox.id());
    let work = {
        let core = core.clone();
        async move { sandbox::remove(core, sandbox).await.map(|()| String::new()).map_err(Status::from) }
    };
    core.joins.run(key, work).await?;
    Ok(cri::RemovePodSandboxResponse {})
}
