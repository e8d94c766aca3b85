//! Resizing a running pod in place: whether the node has room, and what a container needs to get there. Pure.
//!
//! Three versions of a container's resources exist. *Desired* is what the API object says. *Allocated* is what the node has
//! agreed to; everything in the agent works with a pod whose resources are the allocated ones. *Actuated* is what the container
//! runs with. A desired size that does not fit leaves the pod as it is, with a PodResizePending condition.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, ContainerStatus, Pod, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::admission;
use crate::node::capacity::Capacity;
use crate::spec;
use crate::spec::resources::{milli_value, pod_requests, value};

/// Why a resize waits: reason and message of the PodResizePending condition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pending {
    pub reason: &'static str,
    pub message: String,
}

/// The containers whose resources can change: main ones, and init containers that stay.
fn resizable(pod: &Pod) -> impl Iterator<Item = &Container> {
    pod.spec.iter().flat_map(|spec| {
        let sidecars = spec.init_containers.iter().flatten().filter(|c| c.restart_policy.as_deref() == Some("Always"));
        sidecars.chain(&spec.containers)
    })
}

/// Resources by container.
type Resources = BTreeMap<String, ResourceRequirements>;

fn resources_of(pod: &Pod) -> Resources {
    resizable(pod).map(|c| (c.name.clone(), c.resources.clone().unwrap_or_default())).collect()
}

/// Whether two versions of a pod ask for different amounts.
pub(crate) fn differs(a: &Pod, b: &Pod) -> bool {
    let sizes =
        |pod: &Pod| resizable(pod).map(|c| (c.name.clone(), Sizes::of(c.resources.as_ref()))).collect::<Vec<_>>();
    sizes(a) != sizes(b)
}

/// The desired pod with the resources of the allocated one.
pub(crate) fn with_resources_of(desired: &Pod, allocated: &Pod) -> Pod {
    put(desired, &resources_of(allocated))
}

fn put(pod: &Pod, resources: &Resources) -> Pod {
    let mut pod = pod.clone();
    if let Some(spec) = &mut pod.spec {
        for container in spec.containers.iter_mut().chain(spec.init_containers.iter_mut().flatten()) {
            if let Some(known) = resources.get(&container.name) {
                container.resources = Some(known.clone());
            }
        }
    }
    pod
}

/// The pod as it was allocated when the agent last told the API.
pub(crate) fn as_last_told(pod: &Pod) -> Pod {
    let status = pod.status.clone().unwrap_or_default();
    let statuses = [status.container_statuses, status.init_container_statuses];
    let told: BTreeMap<String, ContainerStatus> =
        statuses.into_iter().flatten().flatten().map(|status| (status.name.clone(), status)).collect();
    let mut resources = resources_of(pod);
    for (name, own) in &mut resources {
        let Some(status) = told.get(name) else { continue };
        for (resource, amount) in status.allocated_resources.iter().flatten() {
            if let Some(request) = own.requests.as_mut().and_then(|requests| requests.get_mut(resource)) {
                *request = amount.clone();
            }
        }
        let limits = status.resources.as_ref().and_then(|resources| resources.limits.as_ref());
        for (resource, amount) in limits.into_iter().flatten() {
            if let Some(limit) = own.limits.as_mut().and_then(|limits| limits.get_mut(resource)) {
                *limit = amount.clone();
            }
        }
    }
    put(pod, &resources)
}

/// Whether the node has room for what the pod wants now, beside `others`.
pub(crate) fn judge(desired: &Pod, capacity: &Capacity, others: &[&Pod]) -> Result<(), Pending> {
    let wanted = pod_requests(desired);
    for (name, unit) in [("memory", 1000), ("cpu", 1)] {
        let asked = wanted.get(name).copied().unwrap_or(0);
        let Some(total) = capacity.allocatable.get(name).copied().filter(|total| asked > *total) else { continue };
        let message = format!(
            "Node didn't have enough capacity: {name}, requested: {}, capacity: {}",
            asked / unit,
            total / unit
        );
        return Err(Pending { reason: "Infeasible", message });
    }
    if spec::is_static(desired) {
        let message = "In-place resize of static pods is not supported".to_owned();
        return Err(Pending { reason: "Infeasible", message });
    }
    admission::resources_free(desired, capacity, others)
        .map_err(|refusal| Pending { reason: "Deferred", message: refusal.message })
}

/// CPU in thousandths and memory in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Sizes {
    cpu: (Option<i64>, Option<i64>),
    memory: (Option<i64>, Option<i64>),
}

impl Sizes {
    fn of(resources: Option<&ResourceRequirements>) -> Sizes {
        let both = |name: &str, of: fn(&Quantity) -> i64| {
            let get = |list: Option<&BTreeMap<String, Quantity>>| list.and_then(|list| list.get(name)).map(of);
            (get(resources.and_then(|r| r.requests.as_ref())), get(resources.and_then(|r| r.limits.as_ref())))
        };
        Sizes { cpu: both("cpu", milli_value), memory: both("memory", value) }
    }

    fn of_json(json: &str) -> Sizes {
        let resources: Option<ResourceRequirements> = serde_json::from_str(json).ok();
        Sizes::of(resources.as_ref())
    }
}

/// A container's resources as text that two versions can be compared by.
pub(crate) fn as_json(container: &Container) -> String {
    let resources = container.resources.clone().unwrap_or_default();
    let kept = ResourceRequirements { claims: None, ..resources };
    serde_json::to_string(&kept).unwrap_or_default()
}

/// Which changes restart a container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct RestartsOn {
    pub cpu: bool,
    pub memory: bool,
}

impl RestartsOn {
    pub(crate) fn of(container: &Container) -> Self {
        let restarts = |name: &str| {
            let mut policies = container.resize_policy.iter().flatten();
            policies.any(|policy| policy.resource_name == name && policy.restart_policy == "RestartContainer")
        };
        Self { cpu: restarts("cpu"), memory: restarts("memory") }
    }
}

/// Whether the container has an amount of CPU or memory that changes without a restart.
pub(crate) fn is_sized(container: &Container) -> bool {
    let (sizes, restarts) = (Sizes::of(container.resources.as_ref()), RestartsOn::of(container));
    (sizes.cpu != (None, None) && !restarts.cpu) || (sizes.memory != (None, None) && !restarts.memory)
}

/// What a running container needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    Nothing,
    Update,
    Restart,
}

/// The way from the resources that a container runs with to those it is to have.
pub(crate) fn step(actuated: &str, allocated: &str, restarts: RestartsOn) -> Step {
    if actuated == allocated {
        return Step::Nothing;
    }
    let (from, to) = (Sizes::of_json(actuated), Sizes::of_json(allocated));
    if from == to {
        Step::Nothing
    } else if (restarts.cpu && from.cpu != to.cpu) || (restarts.memory && from.memory != to.memory) {
        Step::Restart
    } else {
        Step::Update
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(cpu: &str, memory: &str) -> Pod {
        serde_json::from_value(serde_json::json!({"metadata": {"name": "p", "uid": cpu}, "spec": {"containers": [
            {"name": "c", "resources": {"requests": {"cpu": cpu, "memory": memory}, "limits": {"cpu": "8"}}}]}}))
        .expect("a pod")
    }

    fn room() -> Capacity {
        let allocatable = BTreeMap::from([
            ("cpu".to_owned(), 1000),
            ("memory".to_owned(), (1 << 30) * 1000),
            ("pods".to_owned(), 9000),
        ]);
        Capacity { capacity: allocatable.clone(), allocatable }
    }

    #[test]
    fn what_can_never_fit_and_what_does_not_fit_now_are_told_apart() {
        assert_eq!(judge(&pod("900m", "1Mi"), &room(), &[]), Ok(()));
        let never = judge(&pod("2", "1Mi"), &room(), &[]).unwrap_err();
        assert_eq!(never.reason, "Infeasible");
        assert_eq!(never.message, "Node didn't have enough capacity: cpu, requested: 2000, capacity: 1000");
        let later = judge(&pod("900m", "1Mi"), &room(), &[&pod("500m", "1Mi")]).unwrap_err();
        assert_eq!(later.reason, "Deferred");
        assert_eq!(later.message, "Node didn't have enough resource: cpu, requested: 900, used: 500, capacity: 1000");
    }

    #[test]
    fn the_policy_decides_between_an_update_and_a_restart() {
        let json = |pod: &Pod| as_json(&pod.spec.as_ref().unwrap().containers[0]);
        let (small, large) = (json(&pod("100m", "1Mi")), json(&pod("200m", "1Mi")));
        let on_memory = RestartsOn { cpu: false, memory: true };
        assert_eq!(step(&small, &large, on_memory), Step::Update);
        assert_eq!(step(&small, &json(&pod("100m", "2Mi")), on_memory), Step::Restart);
        assert_eq!(
            step(&small, &json(&pod("0.1", "1Mi")), on_memory),
            Step::Nothing,
            "written otherwise, the same amount"
        );
    }

    #[test]
    fn a_pod_is_taken_up_with_what_was_last_allocated() {
        let mut desired = pod("900m", "64Mi");
        desired.status =
            serde_json::from_value(serde_json::json!({"containerStatuses": [{"name": "c", "image": "", "imageID": "",
            "ready": true, "restartCount": 0, "allocatedResources": {"cpu": "100m", "memory": "64Mi"},
            "resources": {"limits": {"cpu": "4"}}}]}))
            .expect("a status");
        let allocated = as_last_told(&desired);
        assert!(differs(&desired, &allocated));
        let resources = allocated.spec.as_ref().unwrap().containers[0].resources.clone().unwrap();
        assert_eq!((&*resources.requests.unwrap()["cpu"].0, &*resources.limits.unwrap()["cpu"].0), ("100m", "4"));
        assert!(!differs(&with_resources_of(&desired, &allocated), &allocated));
    }
}
