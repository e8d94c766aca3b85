//! PodSandboxStatus.

use std::collections::HashMap;
use std::sync::Arc;

use oarlock_cni::Attachment;
use oarlock_proto::cri;
use serde_json::json;
use tonic::Status;

use crate::core::Core;
use crate::record::{SandboxPhase, SandboxRecord};
use crate::state::now_nanos;
use crate::{sandbox, view};

pub(super) async fn pod_sandbox_status(
    core: &Arc<Core>,
    request: &cri::PodSandboxStatusRequest,
) -> Result<cri::PodSandboxStatusResponse, Status> {
    let record = core.index.sandbox(&request.pod_sandbox_id)?.record();
    Ok(cri::PodSandboxStatusResponse {
        status: Some(view::sandbox_status(&record)),
        info: if request.verbose { info(core, &record).await } else { HashMap::new() },
        containers_statuses: view::statuses_of(core, &record.id),
        timestamp: now_nanos(),
    })
}

async fn info(core: &Core, record: &SandboxRecord) -> HashMap<String, String> {
    let shim = core.index.sandbox(&record.id).ok().and_then(|sandbox| sandbox.shim());
    let pinned = sandbox::pinned(core, record);
    let attachment = sandbox::attachment(core, record);
    let network = core.cni.cached_result(&attachment);
    let info = json!({
        "pid": shim.as_ref().and_then(|shim| shim.record().pid_namespace_init).unwrap_or(0),
        "shimPid": shim.as_ref().map_or(0, |shim| shim.record().pid),
        "phase": record.phase,
        "runtimeHandler": record.handler,
        "hostname": record.hostname,
        "cgroupParent": record.cgroup_parent,
        "namespaces": { "net": pinned.net, "ipc": pinned.ipc, "uts": pinned.uts },
        "cniResult": network,
        "cniCheck": check_network(core, record, &attachment).await,
        "config": record.config,
    });
    HashMap::from([("info".to_owned(), info.to_string())])
}

/// What the plugins answer to CHECK for a sandbox in a network: null, or what is not as ADD left it.
async fn check_network(core: &Core, record: &SandboxRecord, attachment: &Attachment) -> Option<String> {
    if record.host_network || record.phase != SandboxPhase::Ready {
        return None;
    }
    match tokio::time::timeout(core.config.cni_timeout, core.cni.check(attachment)).await {
        Ok(checked) => checked.err().map(|error| crate::error::chain(&error)),
        Err(_) => Some("the plugins did not answer CHECK in time".to_owned()),
    }
}
