//! Brings the world in line with the records at start: reconnects to living shims, believes exit records, finishes what
//! was being stopped or removed, undoes what was half made, and clears away what nothing knows of.
//!
//! What a record's phase means for a daemon that has just started:
//!
//! | phase | same boot | another boot |
//! |---|---|---|
//! | sandbox Creating | undone | undone |
//! | sandbox Ready | shim reconnected; without one stopped | stopped: its kernel objects are gone |
//! | sandbox Stopping, Removing | finished | finished |
//! | container Creating | undone | undone |
//! | container Starting, Running | as its shim, or its exit record, says | exited, reason Unknown |
//! | container Removing | finished | finished |

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use futures::future::join_all;
use oarlock_cni::ValidAttachment;
use oarlock_shim_api::{Shim, ShimError};

use crate::container;
use crate::core::Core;
use crate::error::Error;
use crate::mounts;
use crate::record::{ContainerPhase, ContainerRecord, Kind, SandboxPhase, SandboxRecord};
use crate::sandbox;
use crate::state::{Container, Sandbox, blocking};

/// Loads all records and takes every step they ask for. A step that fails is reported and left to the next start or to
/// the client's own retry; only unreadable directories keep the daemon from starting.
pub(crate) async fn reconcile(core: &Arc<Core>) -> Result<(), Error> {
    load(core).await?;
    join_all(core.index.sandboxes().into_iter().map(|sandbox| settle_sandbox(core, sandbox))).await;
    join_all(core.index.containers().into_iter().map(|container| settle_container(core, container))).await;
    clear_unknown(core).await?;
    Ok(())
}

async fn load(core: &Arc<Core>) -> Result<(), Error> {
    let records = core.records.clone();
    let (sandboxes, containers) = blocking("the records", move || {
        Ok((records.load::<SandboxRecord>(Kind::Sandbox)?, records.load::<ContainerRecord>(Kind::Container)?))
    })
    .await?;
    for record in sandboxes {
        let id = record.id.clone();
        if let Err(owner) = core.index.insert_sandbox(Sandbox::new(record)) {
            tracing::error!(sandbox.id = %id, %owner, "two sandboxes on record have one name; the second is cleared away");
        }
    }
    for record in containers {
        let id = record.id.clone();
        if let Err(owner) = core.index.insert_container(Container::new(record)) {
            tracing::error!(container.id = %id, %owner, "two containers on record have one name; the second is cleared away");
        }
    }
    Ok(())
}

async fn settle_sandbox(core: &Arc<Core>, sandbox: Arc<Sandbox>) {
    let record = sandbox.record();
    let same_boot = record.boot_id == core.boot_id;
    match record.phase {
        SandboxPhase::Creating => {
            tracing::info!(sandbox.id = %record.id, "half-made sandbox is undone");
            sandbox::undo(core, &sandbox).await;
        }
        SandboxPhase::Ready if same_boot => reconnect(core, &sandbox).await,
        SandboxPhase::Ready => {
            tracing::info!(sandbox.id = %record.id, "sandbox did not survive the reboot");
            report(&record.id, sandbox::stop(core.clone(), sandbox.clone()).await);
        }
        SandboxPhase::Stopping => {
            // Its containers are asked of the shim first, so that none of their ends is lost.
            if same_boot {
                connect(core, &sandbox).await;
            }
            report(&record.id, sandbox::stop(core.clone(), sandbox.clone()).await);
        }
        SandboxPhase::Removing => report(&record.id, sandbox::remove(core.clone(), sandbox.clone()).await),
        SandboxPhase::NotReady => {}
    }
}

fn report(id: &str, result: Result<(), Error>) {
    if let Err(error) = result {
        tracing::error!(sandbox.id = %id, error = %error.full_message(), "sandbox could not be brought in line with its record");
    }
}

async fn connect(core: &Arc<Core>, sandbox: &Arc<Sandbox>) -> bool {
    let id = sandbox.id();
    let state_dir = core.paths.sandbox(&id).shim();
    let limit = core.config.shim_timeout;
    let shim = match tokio::time::timeout(limit, Shim::connect(&state_dir)).await {
        Ok(Ok(shim)) => shim,
        Ok(Err(ShimError::NotRunning { .. })) => return false,
        Ok(Err(error)) => {
            tracing::error!(sandbox.id = %id, %error, "shim cannot be reached");
            return false;
        }
        Err(_) => return false,
    };
    sandbox.set_shim(Some(shim.clone()));
    // Events are watched before the state is read, so that nothing falls between.
    sandbox::watch(core.clone(), sandbox.clone());
    match sandbox::resynchronise(core, sandbox, &shim).await {
        Ok(()) => true,
        Err(error) => {
            tracing::error!(sandbox.id = %id, %error, "shim state could not be read");
            sandbox.set_shim(None);
            false
        }
    }
}

async fn reconnect(core: &Arc<Core>, sandbox: &Arc<Sandbox>) {
    if !connect(core, sandbox).await {
        sandbox::lose_shim(core, sandbox).await;
    }
}

async fn settle_container(core: &Arc<Core>, container: Arc<Container>) {
    let record = container.record();
    let orphan = core.index.sandbox(&record.sandbox_id).is_err();
    match record.phase {
        ContainerPhase::Creating => {
            tracing::info!(container.id = %record.id, "half-made container is undone");
            container::undo(core, &container).await;
        }
        ContainerPhase::Removing => remove(core, container).await,
        _ if orphan => remove(core, container).await,
        // Without a shim that would have told otherwise by now, it does not run.
        ContainerPhase::Starting | ContainerPhase::Running => {
            let shim = core.index.sandbox(&record.sandbox_id).ok().and_then(|sandbox| sandbox.shim());
            if shim.is_none() {
                container::unknown_to_shim(core, &container).await;
            }
        }
        ContainerPhase::Created | ContainerPhase::Exited => {}
    }
}

async fn remove(core: &Arc<Core>, container: Arc<Container>) {
    let id = container.id();
    if let Err(error) = container::remove(core.clone(), container).await {
        tracing::error!(container.id = %id, error = %error.full_message(), "container could not be removed");
    }
}

/// Clears away directories, mounts, pins and layers whose ids no record has.
async fn clear_unknown(core: &Arc<Core>) -> Result<(), Error> {
    let sandboxes: HashSet<String> = core.index.sandboxes().iter().map(|sandbox| sandbox.id()).collect();
    let containers: HashSet<String> = core.index.containers().iter().map(|container| container.id()).collect();
    let checkpoints = core.paths.checkpoints();
    if let Err(error) = blocking("clearing away", move || mounts::remove_tree(&checkpoints)).await {
        tracing::error!(error = %error.full_message(), "unfinished checkpoints could not be cleared away");
    }
    for id in names_in(&core.paths.sandboxes())?.into_iter().filter(|id| !sandboxes.contains(id)) {
        tracing::info!(sandbox.id = %id, "what a sandbox left behind is cleared away");
        // A shim may still run there; it is ended by its own state directory.
        if let Ok(shim) = Shim::connect(&core.paths.sandbox(&id).shim()).await {
            let _ = shim.shutdown().await;
        }
        for failure in sandbox::clear_away(core, &id, None).await {
            tracing::error!(sandbox.id = %id, failure, "what a sandbox left behind could not be cleared away");
        }
    }
    let left: Vec<_> = [core.paths.containers(), core.paths.volumes()]
        .iter()
        .map(|directory| {
            Ok(names_in(directory)?.into_iter().map(|id| (id.clone(), directory.join(id))).collect::<Vec<_>>())
        })
        .collect::<Result<Vec<_>, Error>>()?
        .concat();
    let unknown: Vec<_> = left.into_iter().filter(|(id, _)| !containers.contains(id)).collect();
    blocking("clearing away", move || {
        for (id, path) in unknown {
            tracing::info!(container.id = %id, path = %path.display(), "what a container left behind is cleared away");
            if let Err(error) = mounts::remove_tree(&path) {
                tracing::error!(container.id = %id, error = %error.full_message(), "what a container left behind could not be cleared away");
            }
        }
        Ok(())
    })
    .await?;
    for key in core.images.rootfs_keys() {
        let owner = key.split_once("-image-").map_or(key.as_str(), |(owner, _)| owner);
        if !containers.contains(owner)
            && let Err(error) = core.images.release_rootfs(&key).await
        {
            tracing::error!(container.id = %owner, %error, "a forgotten layer could not be removed");
        }
    }
    Ok(())
}

fn names_in(directory: &Path) -> Result<Vec<String>, Error> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(Error::io("list", directory))?,
    };
    Ok(entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
}

/// Lets CNI free what belongs to no sandbox. Failures are reported: plugins may be missing at this point.
pub(crate) async fn collect_network(core: &Arc<Core>) {
    let _alone = core.network_gate.write().await;
    let attached = |phase| matches!(phase, SandboxPhase::Creating | SandboxPhase::Ready | SandboxPhase::Stopping);
    let records = core.index.sandboxes().into_iter().map(|sandbox| sandbox.record());
    let valid: Vec<ValidAttachment> = records
        .filter(|record| attached(record.phase) && !record.host_network)
        .map(|record| {
            let attachment = sandbox::attachment(core, &record);
            ValidAttachment { container_id: attachment.container_id, ifname: attachment.ifname }
        })
        .collect();
    if let Err(error) = core.cni.gc(&valid).await {
        tracing::warn!(%error, "CNI garbage collection failed");
    }
}
