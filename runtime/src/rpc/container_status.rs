//! ContainerStatus.

use std::collections::HashMap;
use std::sync::Arc;

use oarlock_proto::cri;
use serde_json::{Value, json};
use tonic::Status;

use crate::core::Core;
use crate::error::Error;
use crate::record::{ContainerPhase, ContainerRecord};
use crate::state::blocking;
use crate::view;

pub(super) async fn container_status(
    core: &Arc<Core>,
    request: &cri::ContainerStatusRequest,
) -> Result<cri::ContainerStatusResponse, Status> {
    let record = core.index.container(&request.container_id)?.record();
    if record.phase == ContainerPhase::Creating {
        return Err(Error::NotFound { what: "container", id: record.id.clone() }.into());
    }
    Ok(cri::ContainerStatusResponse {
        status: Some(view::container_status(core, &record)),
        info: if request.verbose { info(core, &record).await? } else { HashMap::new() },
    })
}

async fn info(core: &Arc<Core>, record: &Arc<ContainerRecord>) -> Result<HashMap<String, String>, Error> {
    let config = core.paths.bundle(&record.id).config();
    // Absent after a reboot.
    let spec = blocking("a bundle", move || Ok(std::fs::read(config).ok())).await?;
    let spec: Option<Value> = spec.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let info = json!({
        "sandboxID": record.sandbox_id,
        "pid": record.pid,
        "phase": record.phase,
        "removing": record.phase == ContainerPhase::Removing,
        "cgroup": record.cgroup,
        "runtimeSpec": spec,
        "config": record.config,
    });
    Ok(HashMap::from([("info".to_owned(), info.to_string())]))
}
