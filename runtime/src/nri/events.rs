//! The points of a pod's and a container's life at which plugins are told or asked.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use oarlock_nri::{Event, api};
use oarlock_proto::cri;
use oci_spec::runtime::Spec;

use super::Further;
use super::describe;
use super::resources::{of_cri, to_cri, to_further};
use crate::core::Core;
use crate::error::Error;
use crate::record::{ContainerRecord, SandboxRecord};
use crate::sandbox;
use crate::state::{Container, Sandbox, blocking};

/// What plugins have been told of one pod or container: its end comes to light in several places, and is told once.
#[derive(Debug, Default)]
pub(crate) struct Told {
    asked: AtomicBool,
    stopped: AtomicBool,
    removed: AtomicBool,
    /// Held while plugins are told of an end: what follows it is not to overtake it.
    telling: tokio::sync::Mutex<()>,
}

impl Told {
    /// Of something that may have ended before this daemon knew any plugin.
    pub(crate) fn of(ended: bool) -> Told {
        Told { stopped: AtomicBool::new(ended), ..Told::default() }
    }
}

/// A pod as plugins see it.
pub(super) fn pod_of(core: &Core, record: &SandboxRecord) -> api::PodSandbox {
    let mut pinned = sandbox::pinned(core, record);
    for path in [&mut pinned.user, &mut pinned.net, &mut pinned.ipc, &mut pinned.uts] {
        *path = path.take().filter(|path| path.exists());
    }
    describe::pod(record, &pinned)
}

/// A container as plugins see it, with its specification as it is on disk.
pub(super) async fn described(core: &Arc<Core>, record: &Arc<ContainerRecord>) -> api::Container {
    let path = core.paths.bundle(&record.id).config();
    // A container without one is on its way out.
    let spec = blocking("a bundle", move || Ok(Spec::load(path).ok())).await.ok().flatten();
    describe::container(record, spec.as_ref())
}

/// The container's pod. Of one that is gone its id is left.
fn pod_of_container(core: &Core, record: &ContainerRecord) -> api::PodSandbox {
    match core.index.sandbox(&record.sandbox_id) {
        Ok(sandbox) => pod_of(core, &sandbox.record()),
        Err(_) => api::PodSandbox { id: record.sandbox_id.clone(), ..api::PodSandbox::default() },
    }
}

fn nobody(core: &Core) -> bool {
    core.plugins.count() == 0
}

async fn tell_pod(core: &Arc<Core>, sandbox: &Sandbox, event: Event) -> Result<(), Error> {
    Ok(core.plugins.tell(event, pod_of(core, &sandbox.record()), None).await?)
}

async fn tell_container(core: &Arc<Core>, container: &Container, event: Event) -> Result<(), Error> {
    let record = container.record();
    let (pod, known) = (pod_of_container(core, &record), described(core, &record).await);
    Ok(core.plugins.tell(event, pod, Some(known)).await?)
}

/// What happened has happened: a plugin that objects is heard in the log.
fn note(what: &'static str, id: &str, result: Result<(), Error>) {
    if let Err(error) = result {
        tracing::error!(id, error = %error.full_message(), "NRI plugin objects to {what}");
    }
}

/// The sandbox is made and about to be ready; a plugin may refuse it.
pub(crate) async fn sandbox_runs(core: &Arc<Core>, sandbox: &Sandbox, ips: &[String]) -> Result<(), Error> {
    if nobody(core) {
        return Ok(());
    }
    let mut record = SandboxRecord::clone(&sandbox.record());
    record.ips = ips.to_vec();
    let pod = pod_of(core, &record);
    let result = core.plugins.tell(Event::RunPodSandbox, pod.clone(), None).await;
    if result.is_err() {
        for event in [Event::StopPodSandbox, Event::RemovePodSandbox] {
            note(
                "the end of a pod",
                &record.id,
                core.plugins.tell(event, pod.clone(), None).await.map_err(Error::from),
            );
        }
    }
    Ok(result?)
}

/// The sandbox's containers have ended, its network is still there.
pub(crate) async fn sandbox_stopped(core: &Arc<Core>, sandbox: &Sandbox) {
    if !nobody(core) && !sandbox.told.stopped.swap(true, Ordering::AcqRel) {
        note("the end of a pod", &sandbox.id(), tell_pod(core, sandbox, Event::StopPodSandbox).await);
    }
}

/// Nothing is left of the sandbox but its record.
pub(crate) async fn sandbox_removed(core: &Arc<Core>, sandbox: &Sandbox) {
    if !nobody(core) && !sandbox.told.removed.swap(true, Ordering::AcqRel) {
        note("the removal of a pod", &sandbox.id(), tell_pod(core, sandbox, Event::RemovePodSandbox).await);
    }
}

/// The sandbox's resources are about to change; a plugin may refuse it.
pub(crate) async fn sandbox_updates(
    core: &Arc<Core>,
    sandbox: &Sandbox,
    overhead: Option<&cri::LinuxContainerResources>,
    resources: Option<&cri::LinuxContainerResources>,
) -> Result<(), Error> {
    if nobody(core) {
        return Ok(());
    }
    let request = api::UpdatePodSandboxRequest {
        pod: Some(pod_of(core, &sandbox.record())),
        overhead_linux_resources: overhead.map(of_cri),
        linux_resources: resources.map(of_cri),
    };
    Ok(core.plugins.update_pod(request).await?)
}

pub(crate) async fn sandbox_updated(core: &Arc<Core>, sandbox: &Sandbox) {
    if !nobody(core) {
        note("the update of a pod", &sandbox.id(), tell_pod(core, sandbox, Event::PostUpdatePodSandbox).await);
    }
}

/// Asks what plugins want of a container that is being made.
pub(crate) async fn adjust(
    core: &Arc<Core>,
    container: &Container,
    sandbox: &SandboxRecord,
    spec: &Spec,
) -> Result<api::ContainerAdjustment, Error> {
    container.told.asked.store(true, Ordering::Release);
    let known = describe::container(&container.record(), Some(spec));
    Ok(core.plugins.create_container(pod_of(core, sandbox), known).await?)
}

/// A container that plugins were asked about does not come to be.
pub(crate) async fn container_undone(core: &Arc<Core>, container: &Container) {
    if container.told.asked.load(Ordering::Acquire) {
        container_removed(core, container).await;
    }
}

pub(crate) async fn container_created(core: &Arc<Core>, container: &Container) {
    if !nobody(core) {
        note(
            "the making of a container",
            &container.id(),
            tell_container(core, container, Event::PostCreateContainer).await,
        );
    }
}

/// The container is about to start; a plugin may refuse it.
pub(crate) async fn container_starts(core: &Arc<Core>, container: &Container) -> Result<(), Error> {
    if nobody(core) {
        return Ok(());
    }
    tell_container(core, container, Event::StartContainer).await
}

pub(crate) async fn container_started(core: &Arc<Core>, container: &Container) {
    if !nobody(core) {
        note(
            "the start of a container",
            &container.id(),
            tell_container(core, container, Event::PostStartContainer).await,
        );
    }
}

/// The container's limits are about to change. A plugin may refuse it; what is to change is `update` with what plugins
/// changed of it, and what they set that CRI has no word for.
pub(crate) async fn container_updates(
    core: &Arc<Core>,
    container: &Container,
    update: &cri::LinuxContainerResources,
) -> Result<(cri::LinuxContainerResources, Further), Error> {
    if nobody(core) {
        return Ok((update.clone(), Further::default()));
    }
    let record = container.record();
    let request = api::UpdateContainerRequest {
        pod: Some(pod_of_container(core, &record)),
        container: Some(described(core, &record).await),
        linux_resources: Some(of_cri(update)),
    };
    match core.plugins.update_container(request).await? {
        Some(changed) => Ok((crate::spec::resources::updated(update, &to_cri(&changed)), to_further(&changed)?)),
        None => Ok((update.clone(), Further::default())),
    }
}

pub(crate) async fn container_updated(core: &Arc<Core>, container: &Container) {
    if !nobody(core) {
        note(
            "the update of a container",
            &container.id(),
            tell_container(core, container, Event::PostUpdateContainer).await,
        );
    }
}

/// The container has ended. Returns once plugins know.
pub(crate) async fn container_stopped(core: &Arc<Core>, container: &Container) {
    if nobody(core) {
        return;
    }
    let _in_order = container.told.telling.lock().await;
    if container.told.stopped.swap(true, Ordering::AcqRel) {
        return;
    }
    let record = container.record();
    let (pod, known) = (pod_of_container(core, &record), described(core, &record).await);
    let result = core.plugins.stop_container(pod, known).await.map_err(Error::from);
    note("the end of a container", &record.id, result);
}

/// As [`container_stopped`], for whoever has no time to wait.
pub(crate) fn container_exited(core: &Arc<Core>, container: &Arc<Container>) {
    if nobody(core) {
        // Who comes later is not told of what ended before.
        container.told.stopped.store(true, Ordering::Release);
        return;
    }
    let (core, container) = (core.clone(), container.clone());
    tokio::spawn(async move { container_stopped(&core, &container).await });
}

/// The container is about to be taken away.
pub(crate) async fn container_removed(core: &Arc<Core>, container: &Container) {
    if nobody(core) {
        return;
    }
    container_stopped(core, container).await;
    if !container.told.removed.swap(true, Ordering::AcqRel) {
        let told = tell_container(core, container, Event::RemoveContainer).await;
        note("the removal of a container", &container.id(), told);
    }
}
