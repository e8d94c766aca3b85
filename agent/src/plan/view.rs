//! What the planner needs of a pod's specification, taken out of the API object once for each change.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Pod};

use crate::resize::{self, RestartsOn};
use crate::spec::hash::container_hash;

/// What a container is in its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Runs to its end before the next one.
    Init,
    /// An init container that stays (restartPolicy Always).
    Sidecar,
    Main,
    Ephemeral,
}

/// When a container that has ended runs again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RestartPolicy {
    Always,
    OnFailure,
    Never,
}

/// An exit-code rule that restarts a container whatever its policy says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RestartRule {
    /// Restart when the code is among `codes`; otherwise when it is not.
    pub among: bool,
    pub codes: Vec<i32>,
}

/// One container of the pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ContainerView {
    pub name: String,
    pub role: Role,
    pub restart: RestartPolicy,
    pub rules: Vec<RestartRule>,
    pub image: String,
    pub hash: String,
    /// Allocated resources, as text; and which changes of them need a restart.
    pub resources: String,
    pub restarts_on: RestartsOn,
    /// Whether it has an amount that can change while it runs.
    pub sized: bool,
    pub startup_probe: bool,
    pub readiness_probe: bool,
    pub pre_stop: bool,
    /// terminationGracePeriodSeconds of the liveness and startup probes.
    pub liveness_grace: Option<Duration>,
    pub startup_grace: Option<Duration>,
}

impl ContainerView {
    /// Whether it runs again after ending with that code.
    pub(crate) fn restarts_after(&self, exit_code: i32) -> bool {
        if self.rules.iter().any(|rule| rule.codes.contains(&exit_code) == rule.among) {
            return true;
        }
        match self.restart {
            RestartPolicy::Always => true,
            RestartPolicy::OnFailure => exit_code != 0,
            RestartPolicy::Never => false,
        }
    }
}

/// A pod's specification as the planner sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodView {
    /// `name_namespace(uid)`, as back-off messages show it.
    pub shown_name: String,
    /// Init containers in order, then the main ones in order, then ephemeral ones.
    pub containers: Vec<ContainerView>,
    pub host_network: bool,
    pub grace: Duration,
    pub active_deadline: Option<Duration>,
    /// Whether the specification may have been changed since the pod was made.
    pub changed: bool,
}

impl PodView {
    pub(crate) fn of(pod: &Pod) -> Self {
        let spec = pod.spec.clone().unwrap_or_default();
        let pod_policy = match spec.restart_policy.as_deref() {
            Some("Never") => RestartPolicy::Never,
            Some("OnFailure") => RestartPolicy::OnFailure,
            _ => RestartPolicy::Always,
        };
        let mut containers = Vec::new();
        for container in spec.init_containers.iter().flatten() {
            let sidecar = container.restart_policy.as_deref() == Some("Always");
            // An init container that succeeded never runs again in the same sandbox, whatever the pod's policy.
            let fallback =
                if pod_policy == RestartPolicy::Never { RestartPolicy::Never } else { RestartPolicy::OnFailure };
            let role = if sidecar { Role::Sidecar } else { Role::Init };
            containers.push(view(container, role, fallback));
        }
        for container in &spec.containers {
            containers.push(view(container, Role::Main, pod_policy));
        }
        for ephemeral in spec.ephemeral_containers.iter().flatten() {
            let container = crate::spec::ephemeral_as_container(ephemeral);
            containers.push(view(&container, Role::Ephemeral, RestartPolicy::Never));
        }
        Self {
            shown_name: crate::spec::shown_name(pod),
            containers,
            host_network: spec.host_network.unwrap_or(false),
            grace: seconds(spec.termination_grace_period_seconds.unwrap_or(30)),
            active_deadline: spec.active_deadline_seconds.map(seconds),
            changed: pod.metadata.generation.is_none_or(|generation| generation > 1),
        }
    }

    pub(crate) fn find(&self, name: &str) -> Option<&ContainerView> {
        self.containers.iter().find(|container| container.name == name)
    }

    pub(crate) fn of_role(&self, role: Role) -> impl DoubleEndedIterator<Item = &ContainerView> {
        self.containers.iter().filter(move |container| container.role == role)
    }

    /// Init containers and sidecars, in order.
    pub(crate) fn inits(&self) -> impl DoubleEndedIterator<Item = &ContainerView> {
        self.containers.iter().filter(|container| matches!(container.role, Role::Init | Role::Sidecar))
    }
}

fn seconds(value: i64) -> Duration {
    Duration::from_secs(u64::try_from(value).unwrap_or(0))
}

fn view(container: &Container, role: Role, fallback: RestartPolicy) -> ContainerView {
    let restart = match container.restart_policy.as_deref() {
        Some("Always") => RestartPolicy::Always,
        Some("OnFailure") => RestartPolicy::OnFailure,
        Some("Never") => RestartPolicy::Never,
        _ => fallback,
    };
    let rules = container.restart_policy_rules.iter().flatten().filter(|rule| rule.action == "Restart");
    let rules = rules
        .filter_map(|rule| rule.exit_codes.as_ref())
        .map(|codes| RestartRule { among: codes.operator == "In", codes: codes.values.clone().unwrap_or_default() });
    let probe_grace = |probe: &Option<k8s_openapi::api::core::v1::Probe>| {
        probe.as_ref().and_then(|probe| probe.termination_grace_period_seconds).map(seconds)
    };
    ContainerView {
        name: container.name.clone(),
        role,
        restart,
        rules: rules.collect(),
        image: container.image.clone().unwrap_or_default(),
        hash: container_hash(container),
        resources: resize::as_json(container),
        restarts_on: RestartsOn::of(container),
        sized: resize::is_sized(container),
        startup_probe: container.startup_probe.is_some(),
        readiness_probe: container.readiness_probe.is_some(),
        pre_stop: container.lifecycle.as_ref().is_some_and(|lifecycle| lifecycle.pre_stop.is_some()),
        liveness_grace: probe_grace(&container.liveness_probe),
        startup_grace: probe_grace(&container.startup_probe),
    }
}
