//! One task a sandbox: hears from its shim what happens to containers and puts it on record.

use std::sync::Arc;
use std::time::Duration;

use oarlock_shim_api::{ContainerState, ContainerStatus, Event, Shim, ShimError};
use tokio::sync::broadcast;

use super::stop;
use crate::container;
use crate::core::Core;
use crate::record::SandboxPhase;
use crate::state::Sandbox;

/// A connection that broke is made again after this long each, then the shim counts as dead.
const RECONNECT_AFTER: [Duration; 3] = [Duration::from_millis(10), Duration::from_millis(200), Duration::from_secs(2)];

/// Starts the task. It ends with the sandbox's shim, or with the daemon.
pub(crate) fn watch(core: Arc<Core>, sandbox: Arc<Sandbox>) {
    let Some(shim) = sandbox.shim() else { return };
    let events = shim.subscribe();
    tokio::spawn(async move {
        tokio::select! {
            biased;
            () = core.shutdown.cancelled() => {}
            () = follow(&core, &sandbox, shim, events) => {}
        }
    });
}

async fn follow(core: &Arc<Core>, sandbox: &Arc<Sandbox>, mut shim: Shim, mut events: broadcast::Receiver<Event>) {
    loop {
        match events.recv().await {
            Ok(Event::Exited { id, record }) => {
                if let Ok(container) = core.index.container(&id) {
                    container::exited(core, &container, &record).await;
                }
            }
            Ok(Event::Oom { id }) => tracing::warn!(container.id = %id, "container ran out of memory"),
            Ok(Event::ExecExited { .. }) => {}
            Err(broadcast::error::RecvError::Lagged(_)) => {
                if let Err(error) = resynchronise(core, sandbox, &shim).await {
                    tracing::warn!(sandbox.id = %sandbox.id(), %error, "shim state could not be read");
                }
            }
            Ok(Event::Disconnected) | Err(broadcast::error::RecvError::Closed) => {
                // Without a shim on hand the sandbox is being taken down.
                if sandbox.shim().is_none() || sandbox.phase() != SandboxPhase::Ready {
                    return;
                }
                match reconnect(core, sandbox).await {
                    Some(again) => {
                        events = again.subscribe();
                        shim = again;
                        if let Err(error) = resynchronise(core, sandbox, &shim).await {
                            tracing::warn!(sandbox.id = %sandbox.id(), %error, "shim state could not be read");
                        }
                    }
                    None => return lose_shim(core, sandbox).await,
                }
            }
        }
    }
}

async fn reconnect(core: &Arc<Core>, sandbox: &Arc<Sandbox>) -> Option<Shim> {
    let state_dir = core.paths.sandbox(&sandbox.id()).shim();
    for pause in RECONNECT_AFTER {
        match Shim::connect(&state_dir).await {
            Ok(shim) => {
                sandbox.set_shim(Some(shim.clone()));
                return Some(shim);
            }
            Err(ShimError::NotRunning { .. }) => return None,
            Err(_) => tokio::time::sleep(pause).await,
        }
    }
    None
}

/// Brings records in line with what the shim says. Subscribe before, so that nothing falls between.
pub(crate) async fn resynchronise(core: &Arc<Core>, sandbox: &Arc<Sandbox>, shim: &Shim) -> Result<(), ShimError> {
    let state = shim.state().await?;
    for container in core.index.containers_of(&sandbox.id()) {
        let id = container.id();
        let known = state.containers.iter().find(|known| known.id == id);
        match known {
            Some(ContainerState { status: ContainerStatus::Stopped, exit: Some(record), .. }) => {
                container::exited(core, &container, record).await;
            }
            Some(ContainerState { status: ContainerStatus::Running | ContainerStatus::Paused, pid, .. }) => {
                container::is_running(core, &container, *pid).await;
            }
            Some(ContainerState { status: ContainerStatus::Created, .. }) => {
                container::start_interrupted(core, &container).await;
            }
            Some(ContainerState { status: ContainerStatus::Stopped, exit: None, .. }) | None => {
                container::unknown_to_shim(core, &container).await;
            }
        }
    }
    Ok(())
}

/// A shim that died took its hold on the pod with it: what it wrote before is believed, the rest is killed, and the
/// sandbox is not ready any more.
pub(crate) async fn lose_shim(core: &Arc<Core>, sandbox: &Arc<Sandbox>) {
    let id = sandbox.id();
    tracing::error!(sandbox.id = %id, "shim died; its sandbox is stopped");
    sandbox.set_shim(None);
    for container in core.index.containers_of(&id) {
        container::unknown_to_shim(core, &container).await;
    }
    if let Err(error) = stop(core.clone(), sandbox.clone()).await {
        tracing::error!(sandbox.id = %id, error = %error.full_message(), "sandbox of a dead shim could not be stopped");
    }
}
