//! The life of a sandbox, carried out: made, watched, stopped, removed.
//!
//! The phases are in `record`. Each step can be repeated: after a crash `reconcile` calls the same functions again.

mod loopback;
mod make;
mod network;
mod stop;
mod watch;

use std::sync::Arc;

use oarlock_failpoint::step;
use oarlock_proto::cri;

use crate::core::Core;
use crate::error::Error;
use crate::nri;
use crate::record::{Kind, SandboxPhase, SandboxRecord, VERSION};
use crate::spec;
use crate::spec::mount::SandboxFiles;
use crate::spec::namespace::Pinned;
use crate::state::{Sandbox, blocking, new_id, now_nanos};
use crate::view;

pub(crate) use network::attachment;
use stop::tear_down;
pub(crate) use stop::{clear_away, remove, stop};
pub(crate) use watch::{lose_shim, resynchronise, watch};

/// Makes a sandbox, or gives the one that exists with just this configuration.
pub(crate) async fn run(core: Arc<Core>, config: cri::PodSandboxConfig, handler: String) -> Result<String, Error> {
    core.handler(&handler)?;
    let id = new_id();
    let decision = spec::sandbox::decide(&config, &id, &core.config.cgroup_root, &core.host)?;
    let record = SandboxRecord {
        version: VERSION,
        id: id.clone(),
        boot_id: core.boot_id.clone(),
        created_at_nanos: now_nanos(),
        handler,
        config,
        hostname: decision.hostname.clone(),
        cgroup_parent: decision.cgroup_parent.clone(),
        owns_cgroup_parent: decision.owns_cgroup_parent,
        host_network: decision.modes.host_network,
        host_ipc: decision.modes.host_ipc,
        host_pid: decision.modes.host_pid,
        shared_pid: decision.modes.shared_pid,
        user: decision.modes.user,
        phase: SandboxPhase::Creating,
        network: String::new(),
        ips: Vec::new(),
    };
    let name = record.name();
    let sandbox = Sandbox::new(record);
    if let Err(owner) = core.index.insert_sandbox(sandbox.clone()) {
        return existing(&core, &owner, &name, &sandbox.record());
    }
    match bring_up(&core, &sandbox, &decision).await {
        Ok(()) => {
            tracing::info!(sandbox.id = %id, sandbox.name = %name, "sandbox ready");
            watch(core.clone(), sandbox.clone());
            view::publish_sandbox(&core, &sandbox, cri::ContainerEventType::ContainerCreatedEvent);
            view::publish_sandbox(&core, &sandbox, cri::ContainerEventType::ContainerStartedEvent);
            Ok(id)
        }
        Err(error) => {
            tracing::warn!(sandbox.id = %id, error = %error.full_message(), "sandbox could not be made and is undone");
            undo(&core, &sandbox).await;
            Err(error)
        }
    }
}

/// A sandbox that is ready and was made of the same configuration is what a repeated call is after.
fn existing(core: &Core, owner: &str, name: &str, wanted: &SandboxRecord) -> Result<String, Error> {
    let taken = || Error::NameTaken { what: "sandbox", name: name.to_owned(), id: owner.to_owned() };
    let record = core.index.sandbox(owner).map_err(|_| taken())?.record();
    let same = record.config == wanted.config && record.handler == wanted.handler;
    if same && record.phase == SandboxPhase::Ready { Ok(record.id.clone()) } else { Err(taken()) }
}

async fn bring_up(core: &Arc<Core>, sandbox: &Arc<Sandbox>, decision: &spec::sandbox::Decision) -> Result<(), Error> {
    // The intent goes on record before anything is made.
    sandbox.change(&core.records, |_| {}).await?;
    let joined = make::make(core, sandbox, decision).await?;
    loopback::forward(sandbox, &decision.port_mappings, &joined.ips).await;
    step("host ports are forwarded");
    // What plugins are told of, they are told from now on.
    let _held = core.plugins.hold().await;
    nri::sandbox_runs(core, sandbox, &joined.ips).await?;
    step("plugins know of the sandbox");
    sandbox
        .change(&core.records, move |record| {
            record.phase = SandboxPhase::Ready;
            record.network = joined.network;
            record.ips = joined.ips;
        })
        .await
        .map(drop)
}

/// Takes away a sandbox that never became ready. Failures leave the record, so that the next start tries again.
pub(crate) async fn undo(core: &Arc<Core>, sandbox: &Arc<Sandbox>) {
    let id = sandbox.id();
    let left = tear_down(core, sandbox).await;
    if let Some(error) = left.network {
        tracing::warn!(sandbox.id = %id, error, "network could not be detached; collection tries again");
    }
    let forgotten = match left.local.is_empty() {
        true => forget(core, &id).await,
        false => Err(Error::Teardown { operation: format!("undo sandbox {id}"), failures: left.local }),
    };
    if let Err(error) = forgotten {
        tracing::error!(sandbox.id = %id, error = %error.full_message(), "sandbox could not be undone; the next start tries again");
    }
    core.index.remove_sandbox(&id);
}

/// Drops the record.
async fn forget(core: &Arc<Core>, id: &str) -> Result<(), Error> {
    let (records, id) = (core.records.clone(), id.to_owned());
    blocking("a record", move || Ok(records.remove(Kind::Sandbox, &id)?)).await
}

/// The namespaces that a sandbox's containers join.
pub(crate) fn pinned(core: &Core, record: &SandboxRecord) -> Pinned {
    let directory = core.paths.sandbox(&record.id).namespaces();
    Pinned {
        user: record.user.map(|_| directory.join("user")),
        net: (!record.host_network).then(|| directory.join("net")),
        ipc: (!record.host_ipc).then(|| directory.join("ipc")),
        uts: (!record.host_network).then(|| directory.join("uts")),
    }
}

/// The files that a sandbox's containers see.
pub(crate) fn files(core: &Core, record: &SandboxRecord) -> SandboxFiles {
    let paths = core.paths.sandbox(&record.id);
    SandboxFiles {
        resolv_conf: Some(paths.resolv_conf()),
        hostname: Some(paths.hostname()),
        shm: Some(if record.host_ipc { "/dev/shm".into() } else { paths.shm() }),
    }
}
