//! Records in the interface's own shapes: statuses, list items, filters, events. Pure but for looking images up.

use std::collections::HashMap;
use std::sync::Arc;

use oarlock_proto::cri;

use crate::core::Core;
use crate::record::{ContainerPhase, ContainerRecord, SandboxPhase, SandboxRecord};
use crate::spec::signal;
use crate::state::{Container, Sandbox, now_nanos};

pub(crate) fn sandbox_state(phase: SandboxPhase) -> cri::PodSandboxState {
    match phase {
        SandboxPhase::Ready => cri::PodSandboxState::SandboxReady,
        _ => cri::PodSandboxState::SandboxNotready,
    }
}

/// A container that is being made shows as created only once it is; one being started as created still.
pub(crate) fn container_state(phase: ContainerPhase) -> cri::ContainerState {
    match phase {
        ContainerPhase::Creating | ContainerPhase::Created | ContainerPhase::Starting => {
            cri::ContainerState::ContainerCreated
        }
        ContainerPhase::Running => cri::ContainerState::ContainerRunning,
        ContainerPhase::Exited | ContainerPhase::Removing => cri::ContainerState::ContainerExited,
    }
}

pub(crate) fn sandbox_item(record: &SandboxRecord) -> cri::PodSandbox {
    cri::PodSandbox {
        id: record.id.clone(),
        metadata: record.config.metadata.clone(),
        state: sandbox_state(record.phase) as i32,
        created_at: record.created_at_nanos,
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
        runtime_handler: record.handler.clone(),
    }
}

pub(crate) fn sandbox_status(record: &SandboxRecord) -> cri::PodSandboxStatus {
    let mut ips = record.ips.iter();
    let options = record.config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let options = options.and_then(|context| context.namespace_options.clone()).unwrap_or_default();
    cri::PodSandboxStatus {
        id: record.id.clone(),
        metadata: record.config.metadata.clone(),
        state: sandbox_state(record.phase) as i32,
        created_at: record.created_at_nanos,
        network: Some(cri::PodSandboxNetworkStatus {
            ip: ips.next().cloned().unwrap_or_default(),
            additional_ips: ips.map(|ip| cri::PodIp { ip: ip.clone() }).collect(),
        }),
        linux: Some(cri::LinuxPodSandboxStatus { namespaces: Some(cri::Namespace { options: Some(options) }) }),
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
        runtime_handler: record.handler.clone(),
    }
}

pub(crate) fn container_item(record: &ContainerRecord) -> cri::Container {
    cri::Container {
        id: record.id.clone(),
        pod_sandbox_id: record.sandbox_id.clone(),
        metadata: record.config.metadata.clone(),
        image: record.config.image.clone(),
        image_ref: record.image_ref.clone(),
        state: container_state(record.phase) as i32,
        created_at: record.created_at_nanos,
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
        image_id: record.image_id.clone(),
    }
}

pub(crate) fn container_status(core: &Core, record: &ContainerRecord) -> cri::ContainerStatus {
    let exited = container_state(record.phase) == cri::ContainerState::ContainerExited;
    let user = cri::LinuxContainerUser {
        uid: record.identity.uid.into(),
        gid: record.identity.gid.into(),
        supplemental_groups: record.identity.groups.iter().map(|gid| i64::from(*gid)).collect(),
    };
    cri::ContainerStatus {
        id: record.id.clone(),
        metadata: record.config.metadata.clone(),
        state: container_state(record.phase) as i32,
        created_at: record.created_at_nanos,
        started_at: if record.phase == ContainerPhase::Starting { 0 } else { record.started_at_nanos },
        finished_at: if exited { record.finished_at_nanos } else { 0 },
        exit_code: if exited { record.exit_code } else { 0 },
        image: image_spec(core, record),
        image_ref: record.image_ref.clone(),
        reason: if exited { record.reason.clone() } else { String::new() },
        message: if exited { record.message.clone() } else { String::new() },
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
        mounts: record.config.mounts.clone(),
        log_path: record.log_path.clone().unwrap_or_default(),
        resources: Some(cri::ContainerResources { linux: Some(record.resources.clone()), windows: None }),
        image_id: record.image_id.clone(),
        user: Some(cri::ContainerUser { linux: Some(user) }),
        stop_signal: signal::to_cri(record.stop_signal),
    }
}

/// The image by its name where it has one, whatever the container was asked for by.
fn image_spec(core: &Core, record: &ContainerRecord) -> Option<cri::ImageSpec> {
    let mut spec = record.config.image.clone().unwrap_or_default();
    if let Some(tag) = core.images.status(&record.image_id).and_then(|image| image.repo_tags.first().cloned()) {
        spec.image = tag;
    }
    Some(spec)
}

/// Whether every label of the selector is there.
pub(crate) fn selected(labels: &HashMap<String, String>, selector: &HashMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// Sandboxes that a filter lets through; ones that are only being made do not exist yet.
pub(crate) fn sandboxes(core: &Core, filter: Option<&cri::PodSandboxFilter>) -> Vec<Arc<SandboxRecord>> {
    let none = cri::PodSandboxFilter::default();
    let filter = filter.unwrap_or(&none);
    let fits = |record: &Arc<SandboxRecord>| {
        record.phase != SandboxPhase::Creating
            && record.id.starts_with(&filter.id)
            && filter.state.as_ref().is_none_or(|state| state.state == sandbox_state(record.phase) as i32)
            && selected(&record.config.labels, &filter.label_selector)
    };
    core.index.sandboxes().iter().map(|sandbox| sandbox.record()).filter(fits).collect()
}

/// Containers that a filter lets through.
pub(crate) fn containers(core: &Core, filter: Option<&cri::ContainerFilter>) -> Vec<Arc<Container>> {
    let none = cri::ContainerFilter::default();
    let filter = filter.unwrap_or(&none);
    let fits = |container: &Arc<Container>| {
        let record = container.record();
        record.phase != ContainerPhase::Creating
            && record.id.starts_with(&filter.id)
            && record.sandbox_id.starts_with(&filter.pod_sandbox_id)
            && filter.state.as_ref().is_none_or(|state| state.state == container_state(record.phase) as i32)
            && selected(&record.config.labels, &filter.label_selector)
    };
    core.index.containers().into_iter().filter(fits).collect()
}

/// Tells listeners of a sandbox.
pub(crate) fn publish_sandbox(core: &Core, sandbox: &Arc<Sandbox>, kind: cri::ContainerEventType) {
    if core.events.has_listeners() {
        let record = sandbox.record();
        core.events.publish(event(core, &record.id, Some(&record), kind));
    }
}

/// Tells listeners of a container.
pub(crate) fn publish_container(core: &Core, container: &Arc<Container>, kind: cri::ContainerEventType) {
    if core.events.has_listeners() {
        let record = container.record();
        let sandbox = core.index.sandbox(&record.sandbox_id).ok().map(|sandbox| sandbox.record());
        core.events.publish(event(core, &record.id, sandbox.as_deref(), kind));
    }
}

fn event(
    core: &Core,
    id: &str,
    sandbox: Option<&SandboxRecord>,
    kind: cri::ContainerEventType,
) -> cri::ContainerEventResponse {
    cri::ContainerEventResponse {
        container_id: id.to_owned(),
        container_event_type: kind as i32,
        created_at: now_nanos(),
        pod_sandbox_status: sandbox.map(sandbox_status),
        containers_statuses: sandbox.map(|record| statuses_of(core, &record.id)).unwrap_or_default(),
    }
}

/// The statuses of all containers of a sandbox.
pub(crate) fn statuses_of(core: &Core, sandbox_id: &str) -> Vec<cri::ContainerStatus> {
    let containers = core.index.containers_of(sandbox_id);
    let records = containers.iter().map(|container| container.record());
    records
        .filter(|record| record.phase != ContainerPhase::Creating)
        .map(|record| container_status(core, &record))
        .collect()
}
