//! Stops and removes sandboxes. Every step is tried, whatever failed before it; what is gone already is as good.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use oarlock_failpoint::step;
use oarlock_netns::{Pins, remove_pinned};
use oarlock_proto::cri;
use oarlock_shim_api::{Shim, ShimError, read_shim_record};
use tracing::{Instrument, debug_span};

use super::{forget, network};
use crate::container;
use crate::core::Core;
use crate::error::Error;
use crate::groups;
use crate::mounts;
use crate::nri;
use crate::paths::SandboxPaths;
use crate::record::SandboxPhase;
use crate::state::{Sandbox, blocking};
use crate::view;

/// How long a shim may take to end its containers and itself before it is killed.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(30);

/// Stops a sandbox: its containers, its network, its namespaces. What is stopped already stays so.
pub(crate) async fn stop(core: Arc<Core>, sandbox: Arc<Sandbox>) -> Result<(), Error> {
    let _alone = sandbox.operation.write().await;
    stop_locked(&core, &sandbox).await
}

async fn stop_locked(core: &Arc<Core>, sandbox: &Arc<Sandbox>) -> Result<(), Error> {
    if matches!(sandbox.phase(), SandboxPhase::NotReady | SandboxPhase::Removing) {
        return Ok(());
    }
    sandbox.change(&core.records, |record| record.phase = SandboxPhase::Stopping).await?;
    let id = sandbox.id();
    let mut failures = stop_containers(core, &id).instrument(debug_span!("stop containers")).await;
    step("the sandbox's containers are stopped");
    nri::sandbox_stopped(core, sandbox).await;
    let left = tear_down(core, sandbox).await;
    failures.extend(left.network.into_iter().chain(left.local));
    if !failures.is_empty() {
        return Err(Error::Teardown { operation: format!("stop sandbox {id}"), failures });
    }
    sandbox.change(&core.records, |record| record.phase = SandboxPhase::NotReady).await?;
    tracing::info!(sandbox.id = %id, "sandbox stopped");
    view::publish_sandbox(core, sandbox, cri::ContainerEventType::ContainerStoppedEvent);
    Ok(())
}

async fn stop_containers(core: &Arc<Core>, sandbox_id: &str) -> Vec<String> {
    let containers = core.index.containers_of(sandbox_id);
    let stops = containers.iter().map(|one| container::stop(core.clone(), one.clone(), Duration::ZERO));
    join_all(stops).await.into_iter().filter_map(Result::err).map(|error| error.full_message()).collect()
}

/// Removes a sandbox and its containers, stopping what still runs.
pub(crate) async fn remove(core: Arc<Core>, sandbox: Arc<Sandbox>) -> Result<(), Error> {
    let _alone = sandbox.operation.write().await;
    let id = sandbox.id();
    if sandbox.phase() != SandboxPhase::Removing {
        stop_locked(&core, &sandbox).await?;
        sandbox.change(&core.records, |record| record.phase = SandboxPhase::Removing).await?;
    }
    let containers = core.index.containers_of(&id);
    let removals = containers.iter().map(|one| container::remove(core.clone(), one.clone()));
    let mut failures: Vec<String> =
        join_all(removals).await.into_iter().filter_map(Result::err).map(|error| error.full_message()).collect();
    failures.extend(
        clear_away(&core, &id, sandbox.record().owns_cgroup_parent.then(|| sandbox.record().cgroup_parent.clone()))
            .await,
    );
    if !failures.is_empty() {
        return Err(Error::Teardown { operation: format!("remove sandbox {id}"), failures });
    }
    nri::sandbox_removed(&core, &sandbox).await;
    forget(&core, &id).await?;
    view::publish_sandbox(&core, &sandbox, cri::ContainerEventType::ContainerDeletedEvent);
    core.index.remove_sandbox(&id);
    tracing::info!(sandbox.id = %id, "sandbox removed");
    Ok(())
}

/// What could not be taken down.
#[derive(Debug, Default)]
pub(super) struct Failures {
    /// CNI DEL. Its own record outlives the sandbox's, and collection tries again from there.
    pub(super) network: Option<String>,
    pub(super) local: Vec<String>,
}

/// Takes down what a sandbox has in the kernel: shim, network, namespaces, mounts. Gives every failure.
pub(super) async fn tear_down(core: &Arc<Core>, sandbox: &Arc<Sandbox>) -> Failures {
    let record = sandbox.record();
    let held = sandbox.shim();
    // Nobody is to take the coming end of the connection for an accident.
    sandbox.set_shim(None);
    let group = record.owns_cgroup_parent.then(|| record.cgroup_parent.clone());
    let ended = async {
        let shim = end_shim(core, &record.id, held).instrument(debug_span!("end shim")).await;
        step("the shim has ended");
        shim.err().map(|error| error.full_message())
    };
    let (local, network) = if network::is_own(&record) {
        let unpinned =
            unpin(core, &record.id).instrument(debug_span!("unpin")).await.err().map(|error| error.full_message());
        step("the network namespace is gone");
        let local = async {
            let mut local: Vec<String> = unpinned.into_iter().chain(ended.await).collect();
            local.extend(clear_away(core, &record.id, group).await);
            local
        };
        tokio::join!(local, network::detach(core, &record).instrument(debug_span!("network")))
    } else {
        let detached = network::detach(core, &record).instrument(debug_span!("network"));
        let (ended, network) = tokio::join!(ended, detached);
        let mut local: Vec<String> = ended.into_iter().collect();
        local.extend(clear_away(core, &record.id, group).await);
        (local, network)
    };
    step("the sandbox is taken down");
    Failures { network: network.err().map(|error| error.full_message()), local }
}

async fn unpin(core: &Arc<Core>, id: &str) -> Result<(), Error> {
    let (directory, sandbox) = (core.paths.sandbox(id).namespaces(), id.to_owned());
    blocking("namespaces", move || {
        Pins::remove(&directory).map_err(|source| Error::Namespaces { sandbox, operation: "remove", source })
    })
    .await
}

/// Ends a sandbox's shim and with it every process of the pod.
async fn end_shim(core: &Arc<Core>, id: &str, held: Option<Shim>) -> Result<(), Error> {
    let state_dir = core.paths.sandbox(id).shim();
    let failed = |operation: &str| Error::shim(format!("{operation} the shim of sandbox {id}"));
    let shim = match held {
        Some(shim) if shim.is_connected() => Some(shim),
        _ => match Shim::connect(&state_dir).await {
            Ok(shim) => Some(shim),
            Err(ShimError::NotRunning { .. }) => None,
            Err(error) => return Err(failed("reach")(error)),
        },
    };
    let Some(shim) = shim else { return Ok(()) };
    match tokio::time::timeout(SHUTDOWN_LIMIT, shim.shutdown()).await {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(error)) => tracing::warn!(sandbox.id = %id, %error, "shim did not shut down and is killed"),
        Err(_) => tracing::warn!(sandbox.id = %id, "shim did not shut down in time and is killed"),
    }
    // The record names the process by pid and start time, so a pid given to somebody else since is left alone.
    match read_shim_record(&state_dir) {
        Ok(Some(record)) if record.is_alive() => {
            let _ = kill(Pid::from_raw(record.pid), Signal::SIGKILL);
        }
        _ => {}
    }
    Ok(())
}

/// Removes what follows from a sandbox's id alone: pins, mounts, directory, and its own control group. Works without a
/// record, for what a crash left.
pub(crate) async fn clear_away(core: &Arc<Core>, id: &str, group: Option<String>) -> Vec<String> {
    let (paths, id) = (core.paths.sandbox(id), id.to_owned());
    // Both wait for the kernel, not for one another.
    let (mounts, group) = tokio::join!(
        blocking("clearing away", move || Ok(clear_mounts(&paths, &id))).instrument(debug_span!("mounts")),
        blocking("clearing away", move || group.as_deref().map_or(Ok(()), groups::remove))
            .instrument(debug_span!("cgroup"))
    );
    let mut failures = mounts.unwrap_or_else(|error| vec![error.full_message()]);
    failures.extend(group.err().map(|error| error.full_message()));
    failures
}

fn clear_mounts(paths: &SandboxPaths, id: &str) -> Vec<String> {
    let unpin = |source| Error::Namespaces { sandbox: id.to_owned(), operation: "remove", source };
    step("before mounts are cleared away");
    let steps = [
        Pins::remove(&paths.namespaces()).map_err(unpin),
        remove_pinned(&paths.pid_namespace()).map_err(unpin),
        mounts::remove_own_tree(&paths.root),
    ];
    steps.into_iter().filter_map(Result::err).map(|error| error.full_message()).collect()
}
