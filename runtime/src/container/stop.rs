//! Stops containers, and puts their ends on record.

use std::sync::Arc;
use std::time::Duration;

use oarlock_failpoint::step;
use oarlock_proto::cri;
use oarlock_shim_api::{ExitRecord, Shim, read_exit_record};

use crate::core::Core;
use crate::error::Error;
use crate::groups;
use crate::nri;
use crate::record::{ContainerPhase, ContainerRecord};
use crate::state::{Container, blocking, now_nanos};
use crate::view;

/// How long a killed container may take to end.
const KILL_LIMIT: Duration = Duration::from_secs(15);
/// What is reported of a container whose end nobody saw.
const UNKNOWN_CODE: i32 = 255;
const UNKNOWN_REASON: &str = "Unknown";

/// Stops a container: its stop signal, then after `grace` the end of every process in it. One that does not run is
/// stopped already. A second call with a shorter grace period is not held up by the first.
pub(crate) async fn stop(core: Arc<Core>, container: Arc<Container>, grace: Duration) -> Result<(), Error> {
    end_within(&core, &container, grace).await?;
    // One that was never started has not ended yet; plugins hear of its end when it is removed.
    if container.phase() != ContainerPhase::Created {
        nri::container_stopped(&core, &container).await;
    }
    Ok(())
}

async fn end_within(core: &Arc<Core>, container: &Arc<Container>, grace: Duration) -> Result<(), Error> {
    if container.phase() == ContainerPhase::Starting {
        // Whoever starts it holds the lock until it runs or has failed.
        drop(container.operation.lock().await);
    }
    if container.phase() != ContainerPhase::Running {
        return Ok(());
    }
    let record = container.record();
    let id = record.id.clone();
    let shim = core.index.sandbox(&record.sandbox_id).ok().and_then(|sandbox| sandbox.shim());
    let Some(shim) = shim else {
        unknown_to_shim(core, container).await;
        return Ok(());
    };
    if !grace.is_zero() {
        signal(&shim, core, container, record.stop_signal, false).await?;
        step("the container has its stop signal");
        if tokio::time::timeout(grace, container.ended()).await.is_ok() {
            return Ok(());
        }
        tracing::info!(container.id = %id, ?grace, "container did not end in its grace period and is killed");
    }
    signal(&shim, core, container, libc::SIGKILL, true).await?;
    step("the container is killed");
    let limit = KILL_LIMIT;
    tokio::time::timeout(limit, container.ended())
        .await
        .map_err(|_| Error::TimedOut { operation: format!("killing container {id}"), limit })
}

async fn signal(
    shim: &Shim,
    core: &Arc<Core>,
    container: &Arc<Container>,
    signal: i32,
    all: bool,
) -> Result<(), Error> {
    let id = container.id();
    match shim.signal(&id, signal, all).await {
        Ok(()) => Ok(()),
        // It has ended: the event is on its way, unless the shim has forgotten the container altogether.
        Err(error) if error.is_not_found() => {
            if let Ok(state) = shim.state().await {
                match state.containers.iter().find(|known| known.id == id) {
                    Some(known) => {
                        if let Some(exit) = &known.exit {
                            exited(core, container, exit).await;
                        }
                    }
                    None => unknown_to_shim(core, container).await,
                }
            }
            Ok(())
        }
        Err(error) => Err(Error::Shim { operation: format!("signal container {id}"), source: error }),
    }
}

/// A container's first process has ended.
pub(crate) async fn exited(core: &Arc<Core>, container: &Arc<Container>, exit: &ExitRecord) {
    if !matches!(container.phase(), ContainerPhase::Starting | ContainerPhase::Running) {
        return;
    }
    let exit = *exit;
    end(core, container, move |record| {
        record.finished_at_nanos = exit.finished_at_nanos;
        record.exit_code = exit.exit_code;
        record.reason = match (exit.oom_killed, exit.exit_code) {
            (true, _) => "OOMKilled",
            (false, 0) => "Completed",
            (false, _) => "Error",
        }
        .to_owned();
    })
    .await;
    tracing::info!(container.id = %container.id(), exit_code = exit.exit_code, oom_killed = exit.oom_killed, "container exited");
    // Its group, and whatever it left running in a PID namespace it shared, go at once.
    let (core, container) = (core.clone(), container.clone());
    tokio::spawn(async move {
        if let Err(error) = delete_in_engine(&core, &container).await {
            let error = error.full_message();
            tracing::debug!(container.id = %container.id(), error, "exited container is left to its removal");
        }
    });
}

/// Has the engine forget a container and end what is left of it. May be repeated; without a shim there is nothing to do.
pub(super) async fn delete_in_engine(core: &Core, container: &Container) -> Result<(), Error> {
    let _alone = container.deletion.lock().await;
    let record = container.record();
    let shim = core.index.sandbox(&record.sandbox_id).ok().and_then(|sandbox| sandbox.shim());
    match shim {
        Some(shim) => shim.delete(&record.id).await.map_err(Error::shim(format!("delete container {}", record.id))),
        None => Ok(()),
    }
}

async fn end(core: &Arc<Core>, container: &Arc<Container>, how: impl FnOnce(&mut ContainerRecord) + Send + 'static) {
    let noted = container
        .note(&core.records, move |record| {
            // The first to tell of the end is the one believed.
            if matches!(record.phase, ContainerPhase::Starting | ContainerPhase::Running) {
                how(record);
                record.phase = ContainerPhase::Exited;
                record.pid = 0;
            }
        })
        .await;
    match noted {
        Ok(_) => {
            view::publish_container(core, container, cri::ContainerEventType::ContainerStoppedEvent);
            nri::container_exited(core, container);
        }
        Err(error) => {
            tracing::error!(container.id = %container.id(), error = %error.full_message(), "a container's end is lost");
        }
    }
}

/// The shim says that the container runs, which the record may not know yet.
pub(crate) async fn is_running(core: &Arc<Core>, container: &Arc<Container>, pid: i32) {
    if container.phase() != ContainerPhase::Starting {
        return;
    }
    let noted = container
        .note(&core.records, move |record| {
            record.phase = ContainerPhase::Running;
            record.pid = pid;
        })
        .await;
    if noted.is_ok() {
        view::publish_container(core, container, cri::ContainerEventType::ContainerStartedEvent);
    }
}

/// A start was cut off between the engine's two steps: the client will ask again.
pub(crate) async fn start_interrupted(core: &Arc<Core>, container: &Arc<Container>) {
    let Ok(_alone) = container.operation.try_lock() else { return };
    if container.phase() != ContainerPhase::Starting {
        return;
    }
    if let Err(error) = delete_in_engine(core, container).await {
        let error = error.full_message();
        tracing::warn!(container.id = %container.id(), error, "half-started container could not be deleted");
    }
    back_to_created(core, container).await;
}

async fn back_to_created(core: &Arc<Core>, container: &Arc<Container>) {
    let reset = |record: &mut ContainerRecord| {
        record.phase = ContainerPhase::Created;
        record.started_at_nanos = 0;
    };
    if let Err(error) = container.change(&core.records, reset).await {
        tracing::error!(container.id = %container.id(), error = %error.full_message(), "container state could not be put on record");
    }
}

/// The shim is gone, or does not know the container: what it wrote is believed, otherwise the container is ended.
pub(crate) async fn unknown_to_shim(core: &Arc<Core>, container: &Arc<Container>) {
    let record = container.record();
    if !matches!(record.phase, ContainerPhase::Starting | ContainerPhase::Running) {
        return;
    }
    let state_dir = core.paths.sandbox(&record.sandbox_id).shim();
    if let Ok(Some(exit)) = read_exit_record(&state_dir, &record.id) {
        return exited(core, container, &exit).await;
    }
    if record.phase == ContainerPhase::Starting {
        // A start under way in this daemon ends by itself.
        if container.operation.try_lock().is_ok() {
            back_to_created(core, container).await;
        }
        return;
    }
    let group = record.cgroup.clone();
    if let Err(error) = blocking("a control group", move || groups::remove(&group)).await {
        tracing::warn!(container.id = %record.id, error = %error.full_message(), "what is left of a container could not be killed");
    }
    let finished_at = now_nanos();
    end(core, container, move |record| {
        record.finished_at_nanos = finished_at;
        record.exit_code = UNKNOWN_CODE;
        record.reason = UNKNOWN_REASON.to_owned();
        record.message = "the container's shim died before it could tell how the container ended".to_owned();
    })
    .await;
}
