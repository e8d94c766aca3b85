//! ReopenContainerLog: after a rotation moved the file.

use std::sync::Arc;

use oarlock_proto::cri;
use tonic::Status;

use crate::container;
use crate::core::Core;
use crate::error::Error;

pub(super) async fn reopen_container_log(
    core: &Arc<Core>,
    request: &cri::ReopenContainerLogRequest,
) -> Result<cri::ReopenContainerLogResponse, Status> {
    let (container, sandbox) = container::running(core, &request.container_id, "reopen its log")?;
    let shim = sandbox.living_shim("reopen a log")?;
    let id = container.id();
    shim.reopen_log(&id).await.map_err(Error::shim(format!("reopen the log of container {id}")))?;
    Ok(cri::ReopenContainerLogResponse {})
}
