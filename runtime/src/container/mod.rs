//! The life of a container, carried out: made, started, stopped, removed, and processes run in it.
//!
//! The phases are in `record`. Making a container prepares its root file system and its bundle; the engine is asked for
//! it when it is started, so that a program that cannot be run is an error of starting, as clients expect.

mod adjust;
mod bundle;
mod checkpoint;
mod create;
mod devices;
pub(crate) mod exec;
mod ids;
mod remove;
mod start;
mod stop;
mod update;
mod volumes;

pub(crate) use checkpoint::checkpoint;
pub(crate) use create::create;
pub(crate) use remove::{remove, undo};
pub(crate) use start::start;
pub(crate) use stop::{exited, is_running, start_interrupted, stop, unknown_to_shim};
pub(crate) use update::{limits as limits_of, update};

use std::sync::Arc;

use crate::core::Core;
use crate::error::Error;
use crate::record::{ContainerPhase, ContainerRecord};
use crate::state::{Container, Sandbox};

/// The words for a phase in messages.
pub(crate) fn phase_name(phase: ContainerPhase) -> &'static str {
    match phase {
        ContainerPhase::Creating => "being created",
        ContainerPhase::Created => "created, not started",
        ContainerPhase::Starting => "being started",
        ContainerPhase::Running => "running",
        ContainerPhase::Exited => "exited",
        ContainerPhase::Removing => "being removed",
    }
}

/// A container that runs, for operations that need it to.
pub(crate) fn running(core: &Core, id: &str, operation: &'static str) -> Result<(Arc<Container>, Arc<Sandbox>), Error> {
    let container = core.index.container(id)?;
    let record = container.record();
    if record.phase != ContainerPhase::Running {
        return Err(state_error(&record, operation));
    }
    let sandbox = core.index.sandbox(&record.sandbox_id)?;
    Ok((container, sandbox))
}

fn state_error(record: &ContainerRecord, operation: &'static str) -> Error {
    Error::State { what: "container", id: record.id.clone(), state: phase_name(record.phase), operation }
}
