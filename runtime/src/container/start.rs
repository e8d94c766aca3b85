//! Starts containers.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use oarlock_failpoint::step;
use oarlock_proto::cri;
use oarlock_shim_api::{CreateRequest, ErrorKind, Shim, ShimError};
use tracing::{Instrument, debug_span};

use super::state_error;
use super::stop::delete_in_engine;
use crate::core::Core;
use crate::error::Error;
use crate::nri;
use crate::record::{ContainerPhase, ContainerRecord};
use crate::state::{Container, blocking, now_nanos};
use crate::view;

/// What clients of other runtimes see of a container whose program could not be run.
const START_ERROR_CODE: i32 = 128;
const START_ERROR_REASON: &str = "StartError";

/// Starts a container. One that runs already is left as it is.
pub(crate) async fn start(core: Arc<Core>, container: Arc<Container>) -> Result<(), Error> {
    let sandbox = core.index.sandbox(&container.record().sandbox_id)?;
    let _no_stop = sandbox.operation.read().await;
    let held = core.plugins.hold().await;
    // Asked before the container is locked: updates that plugins ask for wait for that.
    let asked = match container.phase() {
        ContainerPhase::Created => nri::container_starts(&core, &container).await,
        _ => Ok(()),
    };
    let alone = container.operation.lock().await;
    let record = container.record();
    match record.phase {
        ContainerPhase::Created => {}
        ContainerPhase::Running => return Ok(()),
        _ => return Err(state_error(&record, "start it")),
    }
    if let Err(error) = asked {
        fail(&core, &container, &error).await;
        drop((alone, held));
        nri::container_stopped(&core, &container).await;
        return Err(error);
    }
    let shim = sandbox.living_shim("start a container in it")?;
    let oci_runtime = core.handler(&sandbox.record().handler)?;
    let started_at = now_nanos();
    container
        .change(&core.records, move |record| {
            record.phase = ContainerPhase::Starting;
            record.started_at_nanos = started_at;
        })
        .await?;
    match in_engine(&core, &record, &shim, oci_runtime).await {
        Ok(pid) => {
            container
                .note(&core.records, move |record| {
                    record.pid = pid;
                    // It may have ended already.
                    if record.phase == ContainerPhase::Starting {
                        record.phase = ContainerPhase::Running;
                    }
                })
                .await?;
            tracing::info!(container.id = %record.id, container.name = %record.metadata().name, "container started");
            view::publish_container(&core, &container, cri::ContainerEventType::ContainerStartedEvent);
            drop((alone, held));
            nri::container_started(&core, &container).await;
            Ok(())
        }
        Err(error) => {
            fail(&core, &container, &error).await;
            drop((alone, held));
            nri::container_stopped(&core, &container).await;
            Err(error)
        }
    }
}

async fn in_engine(
    core: &Arc<Core>,
    record: &ContainerRecord,
    shim: &Shim,
    oci_runtime: Option<std::path::PathBuf>,
) -> Result<i32, Error> {
    if let Some(directory) = record.log_path.as_deref().and_then(|path| Path::new(path).parent()) {
        let directory = directory.to_owned();
        blocking("the log directory", move || fs::create_dir_all(&directory).map_err(Error::io("create", &directory)))
            .await?;
    }
    let request = CreateRequest {
        container_id: record.id.clone(),
        bundle: core.paths.bundle(&record.id).root,
        log_path: record.log_path.clone().map(Into::into),
        tty: record.config.tty,
        stdin: record.config.stdin,
        stdin_once: record.config.stdin_once,
        oci_runtime,
    };
    let limit = core.config.shim_timeout;
    let engine = async {
        let created = shim.create(request).instrument(debug_span!("engine creates")).await?;
        tracing::debug!(container.id = %record.id, container.secluded = created.secluded, "container made");
        step("the engine has made the container");
        shim.start(&record.id).instrument(debug_span!("engine starts")).await?;
        step("the engine has started the container");
        Ok(created.pid)
    };
    match tokio::time::timeout(limit, engine).await {
        Ok(result) => result.map_err(|error| of_engine(&record.id, error)),
        Err(_) => Err(Error::TimedOut { operation: format!("starting container {}", record.id), limit }),
    }
}

/// A program that cannot be run is the user's own matter and is told in the words they know.
fn of_engine(id: &str, error: ShimError) -> Error {
    match (&error, error.kind()) {
        (ShimError::Refused(remote), Some(ErrorKind::ExecutableNotFound | ErrorKind::NotExecutable)) => {
            Error::Program { id: id.to_owned(), message: remote.message.clone() }
        }
        _ => Error::Shim { operation: format!("start container {id}"), source: error },
    }
}

async fn fail(core: &Arc<Core>, container: &Arc<Container>, error: &Error) {
    let id = container.id();
    if let Err(left) = delete_in_engine(core, container).await {
        let error = left.full_message();
        tracing::warn!(container.id = %id, error, "what the engine made of a failed start could not be deleted");
    }
    let message = error.full_message();
    tracing::warn!(container.id = %id, error = %message, "container could not be started");
    let finished_at = now_nanos();
    let noted = container
        .note(&core.records, move |record| {
            record.phase = ContainerPhase::Exited;
            record.finished_at_nanos = finished_at;
            record.exit_code = START_ERROR_CODE;
            record.reason = START_ERROR_REASON.to_owned();
            record.message = message;
        })
        .await;
    if noted.is_ok() {
        view::publish_container(core, container, cri::ContainerEventType::ContainerStoppedEvent);
    }
}
