//! StopContainer: a container that does not exist has been stopped.

use std::sync::Arc;
use std::time::Duration;

use oarlock_proto::cri;
use tonic::Status;

use crate::container;
use crate::core::Core;
use crate::error::Error;

/// Longest grace period taken; what asks for more means "for ever".
const GRACE_SECONDS_MAX: u64 = 365 * 24 * 3600;

pub(super) async fn stop_container(
    core: &Arc<Core>,
    request: &cri::StopContainerRequest,
) -> Result<cri::StopContainerResponse, Status> {
    let container = match core.index.container(&request.container_id) {
        Err(Error::NotFound { .. }) => return Ok(cri::StopContainerResponse {}),
        other => other?,
    };
    let seconds = u64::try_from(request.timeout).unwrap_or(0).min(GRACE_SECONDS_MAX);
    // A call with another grace period is another call: the shorter one counts.
    let key = format!("stop container {} within {seconds}", container.id());
    let work = {
        let core = core.clone();
        let grace = Duration::from_secs(seconds);
        async move { container::stop(core, container, grace).await.map(|()| String::new()).map_err(Status::from) }
    };
    core.joins.run(key, work).await?;
    Ok(cri::StopContainerResponse {})
}
