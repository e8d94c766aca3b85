//! What the API is told of a pod. Pure: `(pod, planner's state, last status, now) → status`.
//!
//! `containers` makes the containers' part, `conditions` the conditions, this file phase and the rest, `patch` the patch
//! that takes the API from what it has to what it should have.

mod conditions;
mod containers;
pub(crate) mod patch;

#[cfg(test)]
mod tests;

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerStatus, HostIP, Pod, PodIP, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::plan::{PodView, Role, State, Why};
use crate::spec;

/// For this long a failure shows as such; then as ImagePullBackOff or CrashLoopBackOff.
const ERROR_SHOWN: Duration = Duration::from_secs(2);

/// When the waiting reason of what failed at `at` becomes ImagePullBackOff or CrashLoopBackOff.
pub(crate) fn error_turns_at(at: Timestamp) -> Timestamp {
    crate::plan::later(at, ERROR_SHOWN)
}

/// What beside the pod and the planner's state a status shows.
pub(crate) struct StatusFacts<'a> {
    /// The node's addresses, the primary one first.
    pub host_ips: &'a [String],
    /// `<runtime>://`, before container ids.
    pub id_scheme: &'a str,
    pub now: Timestamp,
}

/// The status of a pod. `last` is what the API was last known to have; nothing regresses from it.
pub(crate) fn pod_status(pod: &Pod, state: &State, last: &PodStatus, facts: &StatusFacts<'_>) -> PodStatus {
    let view = state.spec.clone().unwrap_or_else(|| PodView::of(pod));
    let mut status = PodStatus {
        observed_generation: pod.metadata.generation,
        start_time: last.start_time.clone().or(state.started_at.map(whole_second)),
        host_ip: facts.host_ips.first().cloned(),
        host_ips: Some(facts.host_ips.iter().map(|ip| HostIP { ip: ip.clone() }).collect()),
        qos_class: Some(spec::resources::qos_of(pod).as_str().to_owned()),
        ..Default::default()
    };
    let made = containers::Containers { view: &view, state, last, facts };
    let (inits, mains, ephemerals) = (made.of_inits(), made.of(Role::Main), made.of(Role::Ephemeral));
    status.phase = Some(phase(&view, state, last, &inits, &mains).to_owned());
    status.init_container_statuses = (!inits.is_empty()).then_some(inits);
    status.container_statuses = (!mains.is_empty()).then_some(mains);
    status.ephemeral_container_statuses = (!ephemerals.is_empty()).then_some(ephemerals);
    if let Some(Why::Failed { reason, message }) = state.end.as_ref().map(|end| &end.why) {
        status.reason = Some(reason.clone());
        status.message = Some(message.clone());
    } else if matches!(last.phase.as_deref(), Some("Failed" | "Succeeded")) {
        status.reason = last.reason.clone();
        status.message = last.message.clone();
    }
    add_addresses(&mut status, state, last, facts);
    status.conditions = Some(conditions::conditions(pod, &view, state, last, &status, facts.now));
    keep_foreign(&mut status, last);
    status
}

/// The pod's addresses: the node's with host network, else the current sandbox's, else the last known.
fn add_addresses(status: &mut PodStatus, state: &State, last: &PodStatus, facts: &StatusFacts<'_>) {
    let host_network = state.spec.as_ref().is_some_and(|spec| spec.host_network);
    let sandbox = state.observed.as_ref().and_then(|observed| observed.current_sandbox());
    let ips: Vec<String> = match sandbox {
        Some(_) if host_network => facts.host_ips.to_vec(),
        Some(sandbox) if sandbox.ready && !sandbox.ips.is_empty() => sandbox.ips.clone(),
        _ => last.pod_ips.iter().flatten().map(|ip| ip.ip.clone()).collect(),
    };
    status.pod_ip = ips.first().cloned();
    status.pod_ips = (!ips.is_empty()).then(|| ips.into_iter().map(|ip| PodIP { ip }).collect());
}

/// Fields that others write.
fn keep_foreign(status: &mut PodStatus, last: &PodStatus) {
    status.nominated_node_name = last.nominated_node_name.clone();
    status.resource_claim_statuses = last.resource_claim_statuses.clone();
    status.extended_resource_claim_status = last.extended_resource_claim_status.clone();
}

/// The API's times have whole seconds.
fn whole_second(at: Timestamp) -> Time {
    Time(Timestamp::from_second(at.as_second()).unwrap_or(at))
}

/// The phase; a terminal one is told only once nothing lives any more, and never taken back.
fn phase(
    view: &PodView,
    state: &State,
    last: &PodStatus,
    inits: &[ContainerStatus],
    mains: &[ContainerStatus],
) -> &'static str {
    match last.phase.as_deref() {
        Some("Failed") => return "Failed",
        Some("Succeeded") => return "Succeeded",
        _ => {}
    }
    let before = match last.phase.as_deref() {
        Some("Running") => "Running",
        _ => "Pending",
    };
    let computed = computed_phase(view, state, inits, mains);
    let terminal = matches!(computed, "Failed" | "Succeeded");
    let ran = mains.iter().chain(inits).any(|status| status.container_id.is_some());
    if terminal && !state.nothing_lives() && ran {
        return if mains.iter().any(|status| status.container_id.is_some()) { "Running" } else { before };
    }
    computed
}

fn computed_phase(view: &PodView, state: &State, inits: &[ContainerStatus], mains: &[ContainerStatus]) -> &'static str {
    if matches!(state.end.as_ref().map(|end| &end.why), Some(Why::Failed { .. })) {
        return "Failed";
    }
    let ending = state.end.is_some();
    let exit = |status: &ContainerStatus| {
        let of = |state: &Option<k8s_openapi::api::core::v1::ContainerState>| {
            state.as_ref().and_then(|state| state.terminated.as_ref()).map(|terminated| terminated.exit_code)
        };
        of(&status.state).or_else(|| of(&status.last_state))
    };
    let running = |status: &ContainerStatus| status.state.as_ref().is_some_and(|state| state.running.is_some());
    let initialised = mains.iter().any(|status| running(status) || exit(status).is_some());
    for status in inits {
        let Some(init) = view.find(&status.name).filter(|init| init.role == Role::Init) else { continue };
        let failed = exit(status).is_some_and(|code| code != 0 && !init.restarts_after(code));
        if failed && status.state.as_ref().is_some_and(|state| state.terminated.is_some()) {
            return "Failed";
        }
    }
    let inits_pending = inits.iter().any(|status| match view.find(&status.name).map(|init| init.role) {
        Some(Role::Sidecar) => !status.started.unwrap_or(false),
        _ => !status.ready,
    });
    if inits_pending && !initialised {
        // A pod that is ended before its containers ran has not succeeded.
        return if ending && state.torn_down() { "Failed" } else { "Pending" };
    }
    let stopped = mains.iter().filter(|status| !running(status) && exit(status).is_some()).count();
    let succeeded = mains.iter().filter(|status| !running(status) && exit(status) == Some(0)).count();
    let waiting = mains.iter().filter(|status| !running(status) && exit(status).is_none()).count();
    if waiting > 0 {
        return if ending && state.torn_down() { "Failed" } else { "Pending" };
    }
    if stopped < mains.len() {
        return "Running";
    }
    let again = |status: &&ContainerStatus| {
        let code = exit(status).unwrap_or(0);
        view.find(&status.name)
            .is_some_and(|main| state.runs_again(main, code, u32::try_from(status.restart_count).unwrap_or(0)))
    };
    if !ending && mains.iter().any(|status| again(&status)) {
        return "Running";
    }
    if succeeded == mains.len() { "Succeeded" } else { "Failed" }
}
