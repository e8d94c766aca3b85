//! PortForward: hands out a URL at which ports of the pod can be reached.

use std::sync::Arc;

use oarlock_proto::cri;
use tonic::Status;

use crate::core::Core;
use crate::error::Error;
use crate::record::SandboxPhase;

pub(super) fn port_forward(
    core: &Arc<Core>,
    request: &cri::PortForwardRequest,
) -> Result<cri::PortForwardResponse, Status> {
    let record = core.index.sandbox(&request.pod_sandbox_id)?.record();
    if record.phase != SandboxPhase::Ready {
        let id = record.id.clone();
        return Err(Error::State { what: "sandbox", id, state: "not ready", operation: "forward ports to it" }.into());
    }
    let port = |port: &i32| {
        let valid = u16::try_from(*port).ok().filter(|port| *port != 0);
        valid.ok_or_else(|| Error::Invalid(format!("port: {port} is not between 1 and 65535")))
    };
    let ports = request.port.iter().map(port).collect::<Result<Vec<u16>, Error>>()?;
    let url = core
        .streaming()?
        .port_forward_url(&record.id, ports)
        .map_err(|source| Error::Stream { operation: "prepare a port-forward", source })?;
    Ok(cri::PortForwardResponse { url })
}
