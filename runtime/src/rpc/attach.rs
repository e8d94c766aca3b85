//! Attach: hands out a URL at which the container's own streams can be joined.

use std::sync::Arc;

use oarlock_proto::cri;
use tonic::Status;

use crate::container;
use crate::core::Core;
use crate::error::Error;

pub(super) fn attach(core: &Arc<Core>, request: &cri::AttachRequest) -> Result<cri::AttachResponse, Status> {
    let (container, _) = container::running(core, &request.container_id, "attach to it")?;
    if request.tty && request.stderr {
        return Err(Error::Invalid("tty and stderr cannot both be true: a terminal has one output".to_owned()).into());
    }
    if !(request.stdin || request.stdout || request.stderr) {
        return Err(Error::Invalid("one of stdin, stdout and stderr must be set".to_owned()).into());
    }
    let params = oarlock_streaming::AttachParams {
        container_id: container.id(),
        tty: request.tty,
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
    };
    let url = core
        .streaming()?
        .attach_url(params)
        .map_err(|source| Error::Stream { operation: "prepare an attach", source })?;
    Ok(cri::AttachResponse { url })
}
