//! Named cases of pod statuses.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodCondition, PodStatus};
use oarlock_probes::Outcome as ProbeOutcome;

use super::{StatusFacts, pod_status};
use crate::model::{Container, Observed, RunState, Sandbox};
use crate::plan::{Action, ImageState, Key, KillReason, Outcome, PodView, ProbeView, State, Why};

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).expect("a small number")
}

fn pod(spec: serde_json::Value) -> Pod {
    serde_json::from_value(serde_json::json!({
        "metadata": {"name": "p", "namespace": "n", "uid": "u", "generation": 4}, "spec": spec}))
    .expect("a pod")
}

fn one() -> Pod {
    pod(serde_json::json!({"containers": [{"name": "a", "image": "i"}]}))
}

fn record(name: &str, state: RunState, exit_code: i32) -> Container {
    Container {
        id: format!("id-{name}").into(),
        sandbox: "s0".into(),
        name: name.to_owned(),
        restart_count: 2,
        state,
        created_at: at(5),
        started_at: Some(at(6)),
        finished_at: (state == RunState::Exited).then(|| at(10)),
        exit_code,
        reason: String::new(),
        message: String::new(),
        hash: String::new(),
        resources: String::new(),
        image: "i".to_owned(),
        image_id: "sha256:i".to_owned(),
        log_path: String::new(),
        user: None,
    }
}

fn state(pod: &Pod, containers: Vec<Container>) -> State {
    let mut state = State::default();
    state.set_spec(PodView::of(pod));
    state.started_at = Some(at(1));
    state.volumes_ready = true;
    let sandbox = Sandbox {
        id: "s0".into(),
        attempt: 0,
        ready: true,
        host_network: false,
        ips: vec!["10.42.0.7".to_owned()],
        created_at: at(2),
    };
    state.observe(1, Observed { sandboxes: vec![sandbox], containers });
    state
}

fn status_at(pod: &Pod, state: &State, last: &PodStatus, now: i64) -> PodStatus {
    let facts = StatusFacts { host_ips: &["192.0.2.1".to_owned()], id_scheme: "oarlock://", now: at(now) };
    pod_status(pod, state, last, &facts)
}

fn condition<'a>(status: &'a PodStatus, kind: &str) -> &'a PodCondition {
    status.conditions.iter().flatten().find(|condition| condition.type_ == kind).expect("the condition")
}

fn waiting(status: &PodStatus) -> (String, String) {
    let container = &status.container_statuses.as_ref().expect("containers")[0];
    let waiting = container.state.clone().and_then(|state| state.waiting).expect("a waiting container");
    (waiting.reason.unwrap_or_default(), waiting.message.unwrap_or_default())
}

#[test]
fn a_running_pod_is_ready_with_its_addresses() {
    let pod = one();
    let status = status_at(&pod, &state(&pod, vec![record("a", RunState::Running, 0)]), &PodStatus::default(), 20);
    assert_eq!(status.phase.as_deref(), Some("Running"));
    assert_eq!(status.pod_ip.as_deref(), Some("10.42.0.7"));
    assert_eq!(status.observed_generation, Some(4));
    for kind in ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"] {
        assert_eq!(condition(&status, kind).status, "True", "{kind}");
        assert_eq!(condition(&status, kind).observed_generation, Some(4));
    }
    let container = &status.container_statuses.as_ref().unwrap()[0];
    assert_eq!(container.container_id.as_deref(), Some("oarlock://id-a"));
    assert_eq!((container.ready, container.started, container.restart_count), (true, Some(true), 2));
}

#[test]
fn readiness_follows_the_probe_and_transition_times_stay_until_it_changes() {
    let pod = pod(serde_json::json!({"containers": [
        {"name": "a", "image": "i", "readinessProbe": {"tcpSocket": {"port": 1}}}]}));
    let mut state = state(&pod, vec![record("a", RunState::Running, 0)]);
    let first = status_at(&pod, &state, &PodStatus::default(), 20);
    let ready = condition(&first, "Ready");
    assert_eq!((ready.status.as_str(), ready.reason.as_deref()), ("False", Some("ContainersNotReady")));
    assert_eq!(ready.message.as_deref(), Some("containers with unready status: [a]"));
    let second = status_at(&pod, &state, &first, 30);
    assert_eq!(second, first, "nothing changed");
    state.probes.insert("id-a".into(), ProbeView { readiness: Some(ProbeOutcome::Success), ..Default::default() });
    let third = status_at(&pod, &state, &second, 40);
    assert_eq!(condition(&third, "Ready").last_transition_time.as_ref().map(|time| time.0), Some(at(40)));
    assert_eq!(condition(&third, "Initialized").last_transition_time.as_ref().map(|time| time.0), Some(at(20)));
}

#[test]
fn readiness_gates_need_their_conditions() {
    let pod = pod(serde_json::json!({"readinessGates": [{"conditionType": "x/y"}],
        "containers": [{"name": "a", "image": "i"}]}));
    let state = state(&pod, vec![record("a", RunState::Running, 0)]);
    let status = status_at(&pod, &state, &PodStatus::default(), 20);
    assert_eq!(condition(&status, "ContainersReady").status, "True");
    assert_eq!(
        condition(&status, "Ready").message.as_deref(),
        Some("corresponding condition of pod readiness gate \"x/y\" does not exist.")
    );
    let gate = PodCondition { type_: "x/y".into(), status: "True".into(), ..Default::default() };
    let last = PodStatus { conditions: Some(vec![gate]), ..Default::default() };
    let status = status_at(&pod, &state, &last, 20);
    assert_eq!(condition(&status, "Ready").status, "True");
    assert_eq!(condition(&status, "x/y").status, "True", "others' conditions stay");
}

#[test]
fn waiting_containers_say_why() {
    let plain = one();
    let mut none = state(&plain, Vec::new());
    assert_eq!(waiting(&status_at(&plain, &none, &PodStatus::default(), 20)).0, "ContainerCreating");
    none.images.insert(
        "a".into(),
        ImageState::Failed { reason: "ErrImagePull".into(), message: "no such".into(), at: at(20), retry_at: None },
    );
    let first = status_at(&plain, &none, &PodStatus::default(), 21);
    assert_eq!(waiting(&first), ("ErrImagePull".to_owned(), "no such".to_owned()));
    let later = status_at(&plain, &none, &PodStatus::default(), 22);
    assert_eq!(
        waiting(&later),
        ("ImagePullBackOff".to_owned(), "Back-off pulling image \"i\": ErrImagePull: no such".to_owned())
    );
    let with_init = pod(serde_json::json!({"initContainers": [{"name": "z", "image": "i"}],
        "containers": [{"name": "a", "image": "i"}]}));
    let status = status_at(&with_init, &state(&with_init, Vec::new()), &PodStatus::default(), 20);
    assert_eq!(waiting(&status).0, "PodInitializing");
    let initialized = condition(&status, "Initialized");
    assert_eq!(initialized.message.as_deref(), Some("containers with incomplete status: [z]"));
}

#[test]
fn a_crash_loop_shows_the_delay_and_the_last_end() {
    let pod = one();
    let mut state = state(&pod, vec![record("a", RunState::Exited, 3)]);
    let start = Action::StartContainer { name: "a".into(), restart_count: 3 };
    state.begin(&start, at(11));
    state.finish(&Key::Container("a".into()), Outcome::Cancelled, 0, at(11));
    let status = status_at(&pod, &state, &PodStatus::default(), 15);
    assert_eq!(
        waiting(&status),
        ("CrashLoopBackOff".to_owned(), "back-off 10s restarting failed container=a pod=p_n(u)".to_owned())
    );
    let last = status.container_statuses.as_ref().unwrap()[0].last_state.clone().and_then(|s| s.terminated);
    assert_eq!(last.map(|ended| (ended.exit_code, ended.reason)), Some((3, Some("Error".to_owned()))));
    assert_eq!(status.phase.as_deref(), Some("Running"));
}

#[test]
fn a_terminal_phase_waits_for_the_last_container_and_never_goes_back() {
    let pod = pod(serde_json::json!({"restartPolicy": "Never",
        "initContainers": [{"name": "side", "image": "i", "restartPolicy": "Always"}],
        "containers": [{"name": "a", "image": "i"}]}));
    let records = |side| vec![record("a", RunState::Exited, 0), record("side", side, 0)];
    let mut ending = state(&pod, records(RunState::Running));
    ending.settle(at(20));
    assert_eq!(ending.end.as_ref().map(|end| &end.why), Some(&Why::Completed));
    assert_eq!(status_at(&pod, &ending, &PodStatus::default(), 20).phase.as_deref(), Some("Running"));
    let mut ended = state(&pod, records(RunState::Exited));
    ended.settle(at(21));
    let status = status_at(&pod, &ended, &PodStatus::default(), 21);
    assert_eq!(status.phase.as_deref(), Some("Succeeded"));
    assert_eq!(condition(&status, "Ready").reason.as_deref(), Some("PodCompleted"));
    let forgotten = state(&pod, Vec::new());
    assert_eq!(status_at(&pod, &forgotten, &status, 30).phase.as_deref(), Some("Succeeded"));
}

#[test]
fn a_refused_pod_fails_with_reason_and_message() {
    let pod = one();
    let mut state = state(&pod, Vec::new());
    let why = Why::Failed { reason: "OutOfcpu".into(), message: "m".into() };
    state.finish_with(why, Duration::from_secs(1), at(20));
    let status = status_at(&pod, &state, &PodStatus::default(), 20);
    assert_eq!(
        (status.phase.as_deref(), status.reason.as_deref(), status.message.as_deref()),
        (Some("Failed"), Some("OutOfcpu"), Some("m"))
    );
}

#[test]
fn a_container_that_is_starting_is_not_running_yet() {
    let pod = one();
    let mut state = state(&pod, Vec::new());
    state.begin(&Action::StartContainer { name: "a".into(), restart_count: 0 }, at(3));
    let observed = state.observed.clone().unwrap_or_default();
    state.observe(5, Observed { containers: vec![record("a", RunState::Running, 0)], ..observed });
    let status = status_at(&pod, &state, &PodStatus::default(), 20);
    assert_eq!(waiting(&status).0, "ContainerCreating", "its postStart hook may still run");
    assert_eq!(status.phase.as_deref(), Some("Pending"));
}

/// The API refuses that a container that may run once, and ended, runs again: one that makes way is never shown as ended.
#[test]
fn a_container_that_makes_way_waits_for_its_successor_whatever_its_policy() {
    let pod = pod(serde_json::json!({"restartPolicy": "Never", "containers": [{"name": "a", "image": "i"}]}));
    let mut state = state(&pod, vec![record("a", RunState::Running, 0)]);
    let before = status_at(&pod, &state, &PodStatus::default(), 20);
    let kill = Action::KillContainer {
        id: "id-a".into(),
        name: "a".to_owned(),
        why: KillReason::DefinitionChanged,
        deadline: at(50),
        after_hook: false,
    };
    state.begin(&kill, at(20));
    let sandboxes = state.observed.clone().unwrap().sandboxes;
    let ended = record("a", RunState::Exited, 143);
    state.observe(9, Observed { sandboxes: sandboxes.clone(), containers: vec![ended.clone()] });
    state.finish(&Key::Container("a".to_owned()), Outcome::Done, 9, at(20));
    let shown = |state: &State| waiting(&status_at(&pod, state, &before, 21)).0;
    assert_eq!(shown(&state), "ContainerCreating");
    state.begin(&Action::StartContainer { name: "a".to_owned(), restart_count: 3 }, at(20));
    assert_eq!(shown(&state), "ContainerCreating", "while it starts");
    let made = Container { id: "id-b".into(), restart_count: 3, ..record("a", RunState::Created, 0) };
    for (ticket, containers) in [vec![ended.clone()], vec![ended, made]].into_iter().enumerate() {
        state.observe(10 + ticket as u64, Observed { sandboxes: sandboxes.clone(), containers });
        let status = status_at(&pod, &state, &before, 21);
        assert_eq!((waiting(&status).0.as_str(), status.phase.as_deref()), ("ContainerCreating", Some("Running")));
        let last = status.container_statuses.unwrap()[0].last_state.clone().and_then(|last| last.terminated);
        assert_eq!(last.map(|last| last.exit_code), Some(143));
    }
    state.finish_with(Why::Deleted, Duration::from_secs(1), at(22));
    let status = status_at(&pod, &state, &before, 23);
    let shown = status.container_statuses.unwrap()[0].state.clone();
    assert_eq!(shown.and_then(|state| state.terminated).map(|ended| ended.exit_code), Some(143));
}
