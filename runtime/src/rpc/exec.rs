//! Exec: hands out a URL at which the command can be run.

use std::sync::Arc;

use oarlock_proto::cri;
use tonic::Status;

use crate::container;
use crate::core::Core;
use crate::error::Error;

pub(super) fn exec(core: &Arc<Core>, request: cri::ExecRequest) -> Result<cri::ExecResponse, Status> {
    let (container, _) = container::running(core, &request.container_id, "execute in it")?;
    if request.cmd.is_empty() {
        return Err(Error::Invalid("cmd: no command to execute".to_owned()).into());
    }
    if request.tty && request.stderr {
        return Err(Error::Invalid("tty and stderr cannot both be true: a terminal has one output".to_owned()).into());
    }
    if !(request.stdin || request.stdout || request.stderr) {
        return Err(Error::Invalid("one of stdin, stdout and stderr must be set".to_owned()).into());
    }
    let params = oarlock_streaming::ExecParams {
        container_id: container.id(),
        command: request.cmd,
        tty: request.tty,
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
    };
    let url =
        core.streaming()?.exec_url(params).map_err(|source| Error::Stream { operation: "prepare an exec", source })?;
    Ok(cri::ExecResponse { url })
}
