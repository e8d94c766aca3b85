//! Makes containers.

use std::path::Path;
use std::sync::Arc;

use oarlock_proto::cri;

use super::remove::undo;
use super::{adjust, bundle, volumes};
use crate::core::Core;
use crate::error::Error;
use crate::nri;
use crate::record::{ContainerPhase, ContainerRecord, SandboxPhase, SandboxRecord, VERSION};
use crate::spec;
use crate::spec::image::Defaults;
use crate::spec::user::Identity;
use crate::state::{Container, new_id, now_nanos};
use crate::view;

/// Makes a container, or gives the one that exists with just this configuration.
pub(crate) async fn create(core: Arc<Core>, sandbox_id: String, config: cri::ContainerConfig) -> Result<String, Error> {
    let sandbox = core.index.sandbox(&sandbox_id)?;
    let _no_stop = sandbox.operation.read().await;
    let sandbox_record = sandbox.record();
    if sandbox_record.phase != SandboxPhase::Ready {
        let id = sandbox_record.id.clone();
        return Err(Error::State { what: "sandbox", id, state: "not ready", operation: "make a container in it" });
    }
    spec::container::check(&config, &core.host)?;
    let record = record_of(&core, &sandbox_record, config)?;
    let (id, name) = (record.id.clone(), record.name());
    core.moves.expect();
    let container = Container::new(record);
    if let Err(owner) = core.index.insert_container(container.clone()) {
        return existing(&core, &owner, &name, &container.record());
    }
    let made = make(&core, &container, &sandbox_record).await;
    match made {
        Ok(record) => {
            tracing::info!(container.id = %id, container.name = %record.metadata().name, sandbox.id = %record.sandbox_id, "container created");
            view::publish_container(&core, &container, cri::ContainerEventType::ContainerCreatedEvent);
            nri::container_created(&core, &container).await;
            Ok(id)
        }
        Err(error) => {
            tracing::warn!(container.id = %id, error = %error.full_message(), "container could not be made and is undone");
            nri::container_undone(&core, &container).await;
            undo(&core, &container).await;
            Err(error)
        }
    }
}

async fn make(
    core: &Arc<Core>,
    container: &Arc<Container>,
    sandbox: &Arc<SandboxRecord>,
) -> Result<Arc<ContainerRecord>, Error> {
    // The intent goes on record before anything is made.
    let record = container.change(&core.records, |_| {}).await?;
    // From here a plugin that comes is told of the container, or asked about it.
    let _held = core.plugins.hold().await;
    let plugins = core.plugins.count() > 0;
    let made = bundle::make(core, &record, sandbox, !plugins).await?;
    let identity = made.identity.clone();
    let changes = if plugins { adjust::adjust(core, container, sandbox, made).await? } else { None };
    container
        .change(&core.records, move |record| {
            record.identity = identity;
            record.phase = ContainerPhase::Created;
            if let Some(changes) = changes {
                record.cgroup = changes.cgroup;
                record.resources = changes.resources;
            }
        })
        .await
}

fn existing(core: &Core, owner: &str, name: &str, wanted: &ContainerRecord) -> Result<String, Error> {
    let taken = || Error::NameTaken { what: "container", name: name.to_owned(), id: owner.to_owned() };
    let record = core.index.container(owner).map_err(|_| taken())?.record();
    let same = record.config == wanted.config && record.phase == ContainerPhase::Created;
    if same { Ok(record.id.clone()) } else { Err(taken()) }
}

fn record_of(core: &Core, sandbox: &SandboxRecord, mut config: cri::ContainerConfig) -> Result<ContainerRecord, Error> {
    let reference = config.image.as_ref().map(|image| image.image.clone()).unwrap_or_default();
    let image = core.images.status(&reference).ok_or(Error::NoImage { reference })?;
    let defaults = Defaults::of(&image.config);
    volumes::resolve_images(core, &mut config.mounts)?;
    // Asked again when the bundle is made; asked here so that a refusal leaves nothing to undo.
    spec::image::command_line(&config, &defaults)?;
    spec::image::working_dir(&config, &defaults)?;
    let stop_signal = spec::signal::stop_signal(config.stop_signal, defaults.stop_signal.as_deref())?;
    let id = new_id();
    let log_path = match (sandbox.config.log_directory.as_str(), config.log_path.as_str()) {
        ("", _) | (_, "") => None,
        (directory, path) => Some(Path::new(directory).join(path).to_string_lossy().into_owned()),
    };
    Ok(ContainerRecord {
        version: VERSION,
        cgroup: spec::container::group(&sandbox.cgroup_parent, &id),
        id,
        sandbox_id: sandbox.id.clone(),
        created_at_nanos: now_nanos(),
        phase: ContainerPhase::Creating,
        resources: config.linux.as_ref().and_then(|linux| linux.resources.clone()).unwrap_or_default(),
        config,
        log_path,
        image_ref: image.repo_digests.first().cloned().unwrap_or_else(|| image.id.clone()),
        image_id: image.id,
        stop_signal,
        identity: Identity::default(),
        pid: 0,
        started_at_nanos: 0,
        finished_at_nanos: 0,
        exit_code: 0,
        reason: String::new(),
        message: String::new(),
    })
}
