//! Looking at a pod in the runtime: its sandboxes and containers, in the agent's nouns.

use std::collections::HashMap;
use std::path::Path;

use jiff::Timestamp;
use oarlock_proto::cri;

use super::{CriError, Runtime};
use crate::model::{Container, ContainerId, Observed, PodUid, RunState, Sandbox, SandboxId};
use crate::spec::names;
use crate::termination;

/// Who a pod found in the runtime is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub uid: PodUid,
    pub name: String,
    pub namespace: String,
}

/// Every pod that has a sandbox or a container.
pub(crate) async fn found_pods(runtime: &Runtime) -> Result<Vec<Found>, CriError> {
    let mut found: HashMap<PodUid, Found> = HashMap::new();
    let sandboxes = runtime.list_sandboxes(None).await?;
    let containers = runtime.list_containers(None).await?;
    let labels = sandboxes.iter().map(|item| &item.labels).chain(containers.iter().map(|item| &item.labels));
    for labels in labels {
        let text = |name: &str| labels.get(name).cloned().unwrap_or_default();
        let uid = text(names::POD_UID);
        if uid.is_empty() {
            continue;
        }
        let uid = PodUid::from(uid);
        let pod = Found { uid: uid.clone(), name: text(names::POD_NAME), namespace: text(names::POD_NAMESPACE) };
        found.entry(uid).or_insert(pod);
    }
    Ok(found.into_values().collect())
}

impl Runtime {
    /// Looks at one pod. `known` spares a call for containers that had ended already.
    pub(crate) async fn observe(&self, uid: &PodUid, known: Option<&Observed>) -> Result<Observed, CriError> {
        let label_selector = HashMap::from([(names::POD_UID.to_owned(), uid.to_string())]);
        let sandbox_filter = cri::PodSandboxFilter { label_selector: label_selector.clone(), ..Default::default() };
        let container_filter = cri::ContainerFilter { label_selector, ..Default::default() };
        let (sandboxes, containers) =
            tokio::try_join!(self.list_sandboxes(Some(sandbox_filter)), self.list_containers(Some(container_filter)),)?;
        let statuses = futures::future::join_all(sandboxes.iter().map(|item| self.sandbox_status(&item.id)));
        let details = futures::future::join_all(containers.iter().map(|item| self.container(item, known)));
        let (statuses, details) = tokio::join!(statuses, details);
        let mut observed = Observed::default();
        for (item, status) in sandboxes.iter().zip(statuses) {
            match status {
                Ok(status) => observed.sandboxes.push(sandbox(item, &status)),
                Err(error) if error.not_found() => {}
                Err(error) => return Err(error),
            }
        }
        for detail in details {
            match detail {
                Ok(container) => observed.containers.push(container),
                Err(error) if error.not_found() => {}
                Err(error) => return Err(error),
            }
        }
        observed.sandboxes.sort_by_key(|sandbox| std::cmp::Reverse((sandbox.created_at, sandbox.attempt)));
        observed.containers.sort_by_key(|container| std::cmp::Reverse((container.created_at, container.restart_count)));
        Ok(observed)
    }

    async fn container(&self, item: &cri::Container, known: Option<&Observed>) -> Result<Container, CriError> {
        let before = known.and_then(|known| known.containers.iter().find(|c| c.id.as_str() == item.id));
        if let Some(before) = before.filter(|before| before.state == RunState::Exited) {
            return Ok(before.clone());
        }
        let status = self.container_status(&item.id).await?;
        let mut container = container(&status, &item.pod_sandbox_id);
        if container.state == RunState::Exited {
            container.message = termination_message(&status).await.unwrap_or(container.message);
        }
        Ok(container)
    }
}

fn sandbox(item: &cri::PodSandbox, status: &cri::PodSandboxStatus) -> Sandbox {
    let network = status.linux.as_ref().and_then(|linux| linux.namespaces.as_ref()).and_then(|n| n.options.as_ref());
    let mut ips = Vec::new();
    if let Some(addresses) = status.network.as_ref().filter(|network| !network.ip.is_empty()) {
        ips.push(addresses.ip.clone());
        ips.extend(addresses.additional_ips.iter().map(|address| address.ip.clone()));
    }
    Sandbox {
        id: SandboxId::from(item.id.as_str()),
        attempt: status.metadata.as_ref().map_or(0, |metadata| metadata.attempt),
        ready: status.state == cri::PodSandboxState::SandboxReady as i32,
        host_network: network.is_some_and(|options| options.network == cri::NamespaceMode::Node as i32),
        ips,
        created_at: nanos(status.created_at).unwrap_or(Timestamp::UNIX_EPOCH),
    }
}

fn container(status: &cri::ContainerStatus, sandbox: &str) -> Container {
    let metadata = status.metadata.clone().unwrap_or_default();
    let annotation = |name: &str| status.annotations.get(name).cloned().unwrap_or_default();
    let state = match cri::ContainerState::try_from(status.state) {
        Ok(cri::ContainerState::ContainerCreated) => RunState::Created,
        Ok(cri::ContainerState::ContainerRunning) => RunState::Running,
        Ok(cri::ContainerState::ContainerExited) => RunState::Exited,
        _ => RunState::Unknown,
    };
    let spec = status.image.clone().unwrap_or_default();
    let image = if spec.user_specified_image.is_empty() { spec.image } else { spec.user_specified_image };
    let image_id = if status.image_id.is_empty() { &status.image_ref } else { &status.image_id };
    let user = status.user.as_ref().and_then(|user| user.linux.as_ref());
    Container {
        id: ContainerId::from(status.id.as_str()),
        sandbox: SandboxId::from(sandbox),
        name: status.labels.get(names::CONTAINER_NAME).cloned().unwrap_or(metadata.name),
        restart_count: annotation(names::RESTART_COUNT).parse().unwrap_or(metadata.attempt),
        state,
        created_at: nanos(status.created_at).unwrap_or(Timestamp::UNIX_EPOCH),
        started_at: nanos(status.started_at),
        finished_at: nanos(status.finished_at),
        exit_code: status.exit_code,
        reason: status.reason.clone(),
        message: status.message.clone(),
        hash: annotation(names::HASH),
        resources: annotation(names::RESOURCES),
        image,
        image_id: image_ref_shown(&status.image_ref, image_id),
        log_path: status.log_path.clone(),
        user: user.map(|user| (user.uid, user.gid, user.supplemental_groups.clone())),
    }
}

/// A digest reference where the runtime gives one, else the id.
fn image_ref_shown(image_ref: &str, image_id: &str) -> String {
    if image_ref.is_empty() { image_id.to_owned() } else { image_ref.to_owned() }
}

fn nanos(value: i64) -> Option<Timestamp> {
    (value > 0).then(|| Timestamp::from_nanosecond(i128::from(value)).ok()).flatten()
}

/// What the container left behind in its message file, or in its log where it asked for that.
async fn termination_message(status: &cri::ContainerStatus) -> Option<String> {
    let annotation = |name: &str| status.annotations.get(name).cloned().unwrap_or_default();
    let inside = annotation(names::TERMINATION_PATH);
    let mount = status.mounts.iter().find(|mount| mount.container_path == inside)?;
    let fall_back = annotation(names::TERMINATION_POLICY) == "FallbackToLogsOnError" && status.exit_code != 0;
    let file = Path::new(&mount.host_path).to_owned();
    let log = fall_back.then(|| Path::new(&status.log_path).to_owned());
    let read = tokio::task::spawn_blocking(move || termination::read_message(&file, log.as_deref()));
    read.await.ok().flatten()
}
