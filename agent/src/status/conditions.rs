//! A pod's conditions. Pure.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod, PodCondition, PodStatus};

use super::whole_second;
use crate::model::RunState;
use crate::plan::{PodView, Role, State, Why};
use crate::resize::{self, Step};

/// The conditions that the agent owns; all others are left as they are.
pub(crate) const OWNED: &[&str] =
    &["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled", RESIZE_PENDING, RESIZING];

/// Conditions that go when what they say is over.
pub(crate) const RESIZE_PENDING: &str = "PodResizePending";
pub(crate) const RESIZING: &str = "PodResizeInProgress";

/// What a condition says, without its times.
struct Verdict {
    ok: bool,
    reason: Option<&'static str>,
    message: Option<String>,
}

impl Verdict {
    fn yes() -> Self {
        Self { ok: true, reason: None, message: None }
    }

    fn no(reason: &'static str, message: Option<String>) -> Self {
        Self { ok: false, reason: Some(reason), message }
    }
}

/// All conditions of the pod: the agent's own, then those of others as they were.
pub(super) fn conditions(
    pod: &Pod,
    view: &PodView,
    state: &State,
    last: &PodStatus,
    status: &PodStatus,
    now: Timestamp,
) -> Vec<PodCondition> {
    let containers = containers_ready(view, status);
    let ready = ready(pod, last, &containers);
    let verdicts = [
        ("PodReadyToStartContainers", network_ready(state)),
        ("Initialized", initialised(view, status)),
        ("Ready", ready),
        ("ContainersReady", containers),
    ];
    let before = |kind: &str| last.conditions.iter().flatten().find(|condition| condition.type_ == kind);
    let mut conditions: Vec<PodCondition> = Vec::new();
    for (kind, verdict) in verdicts {
        conditions.push(condition(kind, verdict, before(kind), pod.metadata.generation, now));
    }
    match before("PodScheduled") {
        Some(scheduled) => {
            conditions.push(PodCondition { observed_generation: pod.metadata.generation, ..scheduled.clone() })
        }
        None => conditions.push(condition("PodScheduled", Verdict::yes(), None, pod.metadata.generation, now)),
    }
    if let Some(Why::Failed { reason, message }) = state.end.as_ref().map(|end| &end.why)
        && matches!(reason.as_str(), "Evicted" | "Preempting" | "Terminated")
    {
        let verdict = Verdict { ok: true, reason: Some("TerminationByKubelet"), message: Some(message.clone()) };
        let kind = "DisruptionTarget";
        conditions.push(condition(kind, verdict, before(kind), pod.metadata.generation, now));
    }
    for (kind, verdict) in [(RESIZE_PENDING, resize_pending(state)), (RESIZING, resizing(view, state))] {
        if let Some(verdict) = verdict {
            conditions.push(condition(kind, verdict, before(kind), pod.metadata.generation, now));
        }
    }
    let own: Vec<String> = conditions.iter().map(|condition| condition.type_.clone()).collect();
    let foreign = last.conditions.iter().flatten().filter(|condition| {
        let over = [RESIZE_PENDING, RESIZING].contains(&condition.type_.as_str());
        !over && !own.contains(&condition.type_)
    });
    conditions.extend(foreign.cloned());
    conditions
}

/// The size asked for does not fit.
fn resize_pending(state: &State) -> Option<Verdict> {
    let pending = state.resize_pending.as_ref().filter(|_| state.end.is_none())?;
    Some(Verdict { ok: true, reason: Some(pending.reason), message: Some(pending.message.clone()) })
}

/// Some container does not run with what is allocated to it yet.
fn resizing(view: &PodView, state: &State) -> Option<Verdict> {
    let observed = state.observed.as_ref().filter(|_| state.end.is_none())?;
    let underway = view.containers.iter().any(|container| {
        let record = observed.latest(&container.name).filter(|record| record.state == RunState::Running);
        let of_kind = matches!(container.role, Role::Main | Role::Sidecar);
        of_kind
            && record.is_some_and(|record| {
                let actuated = state.actuated(container, record);
                resize::step(actuated, &container.resources, container.restarts_on) != Step::Nothing
            })
    });
    let error = state.resize_errors.values().next();
    underway.then(|| Verdict { ok: true, reason: error.map(|_| "Error"), message: error.cloned() })
}

fn condition(
    kind: &str,
    verdict: Verdict,
    before: Option<&PodCondition>,
    generation: Option<i64>,
    now: Timestamp,
) -> PodCondition {
    let status = if verdict.ok { "True" } else { "False" };
    let unchanged = before.filter(|before| before.status == status).and_then(|b| b.last_transition_time.clone());
    PodCondition {
        type_: kind.to_owned(),
        status: status.to_owned(),
        reason: verdict.reason.map(str::to_owned),
        message: verdict.message,
        last_transition_time: Some(unchanged.unwrap_or_else(|| whole_second(now))),
        last_probe_time: None,
        observed_generation: generation,
    }
}

/// The sandbox has its network and the volumes are there. Volumes are made beside the sandbox here; to clients one follows
/// the other. A container shows that both were there, also to an agent that has just started.
fn network_ready(state: &State) -> Verdict {
    let observed = state.observed.as_ref();
    let ok =
        observed.and_then(|observed| Some((observed, observed.current_sandbox()?))).is_some_and(|(all, sandbox)| {
            let used = all.containers.iter().any(|container| container.sandbox == sandbox.id);
            sandbox.usable() && (state.volumes_ready || used || state.end.is_some())
        });
    Verdict { ok, reason: None, message: None }
}

fn statuses(list: &Option<Vec<ContainerStatus>>) -> &[ContainerStatus] {
    list.as_deref().unwrap_or_default()
}

fn initialised(view: &PodView, status: &PodStatus) -> Verdict {
    let inits = statuses(&status.init_container_statuses);
    if status.phase.as_deref() == Some("Succeeded") {
        return Verdict { ok: true, reason: Some("PodCompleted"), message: None };
    }
    let mains_ran = statuses(&status.container_statuses).iter().any(|status| status.container_id.is_some());
    let open: Vec<&str> = inits
        .iter()
        .filter(|status| match view.find(&status.name).map(|init| init.role) {
            Some(Role::Sidecar) => !status.started.unwrap_or(false) && !mains_ran,
            _ => !status.ready && !mains_ran,
        })
        .map(|status| status.name.as_str())
        .collect();
    if open.is_empty() {
        return Verdict::yes();
    }
    let message = format!("containers with incomplete status: [{}]", open.join(" "));
    Verdict::no("ContainersNotInitialized", Some(message))
}

fn containers_ready(view: &PodView, status: &PodStatus) -> Verdict {
    match status.phase.as_deref() {
        Some("Succeeded") => return Verdict::no("PodCompleted", None),
        Some("Failed") => return Verdict::no("PodFailed", None),
        _ => {}
    }
    let sidecars = statuses(&status.init_container_statuses)
        .iter()
        .filter(|status| view.find(&status.name).is_some_and(|container| container.role == Role::Sidecar));
    let all = sidecars.chain(statuses(&status.container_statuses));
    let open: Vec<&str> = all.filter(|status| !status.ready).map(|status| status.name.as_str()).collect();
    if open.is_empty() {
        return Verdict::yes();
    }
    Verdict::no("ContainersNotReady", Some(format!("containers with unready status: [{}]", open.join(" "))))
}

fn ready(pod: &Pod, last: &PodStatus, containers: &Verdict) -> Verdict {
    if !containers.ok {
        return Verdict { ok: false, reason: containers.reason, message: containers.message.clone() };
    }
    let gates = pod.spec.as_ref().and_then(|spec| spec.readiness_gates.clone()).unwrap_or_default();
    let mut messages = Vec::new();
    for gate in gates {
        let kind = &gate.condition_type;
        match last.conditions.iter().flatten().find(|condition| condition.type_ == *kind) {
            None => messages.push(format!("corresponding condition of pod readiness gate \"{kind}\" does not exist.")),
            Some(condition) if condition.status != "True" => messages
                .push(format!("the status of pod readiness gate \"{kind}\" is not \"True\", but {}", condition.status)),
            Some(_) => {}
        }
    }
    if messages.is_empty() {
        return Verdict::yes();
    }
    Verdict::no("ReadinessGatesNotReady", Some(messages.join(", ")))
}
