//! Keeps running containers on the processors that are theirs: when a container gets some for itself or gives them back, what all
//! others share changes with it.

use std::collections::HashMap;
use std::sync::Arc;

use oarlock_proto::cri;
use tokio_util::sync::CancellationToken;

use super::{Assignments, cpus_of};
use crate::model::{ContainerId, RunState};
use crate::shared::Shared;
use crate::spec;

/// Sets what differs from what was last set, until `shutdown`.
pub(crate) async fn keep_processors(shared: Arc<Shared>, shutdown: CancellationToken) {
    let assignments = &shared.assignments;
    let mut set: HashMap<ContainerId, String> = HashMap::new();
    loop {
        let wanted = wanted(&shared, assignments);
        set.retain(|id, _| wanted.contains_key(id));
        for (id, cpus) in wanted {
            if set.get(&id) == Some(&cpus) {
                continue;
            }
            let resources = cri::LinuxContainerResources { cpuset_cpus: cpus.clone(), ..Default::default() };
            match shared.runtime.update_resources(id.as_str(), resources).await {
                Ok(()) => drop(set.insert(id, cpus)),
                Err(error) if error.not_found() => {}
                Err(error) => tracing::debug!(container.id = %id, %error, "processors could not be set yet"),
            }
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = assignments.moved.notified() => {}
            () = tokio::time::sleep(assignments.config.reconcile_period) => {}
        }
    }
}

/// The processors of every running container.
fn wanted(shared: &Shared, assignments: &Assignments) -> HashMap<ContainerId, String> {
    let entries = shared.table.all();
    let current = assignments.current.lock();
    let mut wanted = HashMap::new();
    for entry in entries {
        let uid = spec::pod_uid(&entry.pod);
        for container in entry.observed.containers.iter().filter(|container| container.state == RunState::Running) {
            if let Some(cpus) = cpus_of(&current.pools, uid, &container.name).filter(|cpus| !cpus.is_empty()) {
                wanted.insert(container.id.clone(), cpus.to_string());
            }
        }
    }
    wanted
}
