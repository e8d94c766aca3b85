//! Named cases of the planner.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use oarlock_probes::Outcome as ProbeOutcome;

use super::*;
use crate::model::{Container, Observed, RunState, Sandbox};

pub(super) fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).expect("a small number")
}

pub(super) fn view(spec: serde_json::Value) -> PodView {
    let pod: Pod = serde_json::from_value(
        serde_json::json!({"metadata": {"name": "p", "namespace": "n", "uid": "u"}, "spec": spec}),
    )
    .expect("a pod");
    PodView::of(&pod)
}

pub(super) fn sandbox(id: &str, attempt: u32, ready: bool) -> Sandbox {
    Sandbox {
        id: id.into(),
        attempt,
        ready,
        host_network: false,
        ips: vec!["10.42.0.2".to_owned()],
        created_at: at(i64::from(attempt)),
    }
}

pub(super) fn container(id: &str, name: &str, state: RunState) -> Container {
    let hash = crate::spec::hash::container_hash(&k8s_openapi::api::core::v1::Container {
        name: name.to_owned(),
        image: Some("i".to_owned()),
        ..Default::default()
    });
    Container {
        id: id.into(),
        sandbox: "s0".into(),
        name: name.to_owned(),
        restart_count: 0,
        state,
        created_at: at(1),
        started_at: Some(at(1)),
        finished_at: (state == RunState::Exited).then(|| at(10)),
        exit_code: 0,
        reason: String::new(),
        message: String::new(),
        hash,
        resources: String::new(),
        image: "i".to_owned(),
        image_id: "sha256:i".to_owned(),
        log_path: String::new(),
        user: None,
    }
}

/// A pod whose volumes and images are there, in one good sandbox, with these containers.
fn running_pod(spec: serde_json::Value, containers: Vec<Container>) -> State {
    let mut state = State::default();
    state.set_spec(view(spec));
    state.volumes_ready = true;
    let names: Vec<String> = state.spec.iter().flat_map(|spec| &spec.containers).map(|c| c.name.clone()).collect();
    for name in names {
        state.images.insert(name, ImageState::Ready { image_ref: "sha256:i".into() });
    }
    state.observe(1, Observed { sandboxes: vec![sandbox("s0", 0, true)], containers });
    state
}

fn two(policy: &str) -> serde_json::Value {
    serde_json::json!({"restartPolicy": policy, "terminationGracePeriodSeconds": 30,
        "initContainers": [{"name": "i1", "image": "i"}, {"name": "side", "image": "i", "restartPolicy": "Always"}],
        "containers": [{"name": "a", "image": "i"}, {"name": "b", "image": "i"}]})
}

fn starts(plan: &Plan) -> Vec<&str> {
    let start = |action: &'_ Action| matches!(action, Action::StartContainer { .. });
    plan.actions
        .iter()
        .filter(|action| start(action))
        .map(|action| match action {
            Action::StartContainer { name, .. } => name.as_str(),
            _ => "",
        })
        .collect()
}

fn kills(plan: &Plan) -> Vec<(&str, KillReason)> {
    plan.actions
        .iter()
        .filter_map(|action| match action {
            Action::KillContainer { name, why, .. } => Some((name.as_str(), *why)),
            _ => None,
        })
        .collect()
}

#[test]
fn a_new_pod_begins_with_volumes_sandbox_and_the_first_image_at_once() {
    let mut state = State::default();
    state.set_spec(view(two("Always")));
    assert_eq!(plan(&state, at(0)), Plan::default(), "nothing is done before the runtime was looked at");
    state.observe(1, Observed::default());
    let made = plan(&state, at(0));
    assert_eq!(
        made.actions,
        [
            Action::SetUpVolumes,
            Action::CreateSandbox { attempt: 0, stop: vec![] },
            Action::EnsureImage { container: "i1".into() }
        ]
    );
}

#[test]
fn init_containers_go_one_by_one_then_the_sidecar_then_the_main_ones_in_order() {
    let mut records = Vec::new();
    assert_eq!(starts(&plan(&running_pod(two("Always"), records.clone()), at(20))), ["i1"]);
    records.insert(0, container("c1", "i1", RunState::Running));
    assert!(starts(&plan(&running_pod(two("Always"), records.clone()), at(20))).is_empty());
    records[0] = container("c1", "i1", RunState::Exited);
    assert_eq!(starts(&plan(&running_pod(two("Always"), records.clone()), at(20))), ["side"]);
    records.insert(0, container("c2", "side", RunState::Running));
    let state = running_pod(two("Always"), records.clone());
    assert_eq!(starts(&plan(&state, at(20))), ["a"], "b waits until a was tried");
    records.insert(0, container("c3", "a", RunState::Running));
    assert_eq!(starts(&plan(&running_pod(two("Always"), records), at(20))), ["b"]);
}

#[test]
fn a_sidecar_with_a_startup_probe_holds_the_main_containers_back() {
    let spec = serde_json::json!({
        "initContainers": [{"name": "side", "image": "i", "restartPolicy": "Always",
                            "startupProbe": {"exec": {"command": ["x"]}}}],
        "containers": [{"name": "a", "image": "i"}]});
    let mut state = running_pod(spec, vec![container("c1", "side", RunState::Running)]);
    assert!(starts(&plan(&state, at(20))).is_empty());
    state.probes.insert("c1".into(), ProbeView { startup: Some(ProbeOutcome::Success), ..Default::default() });
    assert_eq!(starts(&plan(&state, at(20))), ["a"]);
}

#[test]
fn restarts_follow_the_policy_and_the_back_off() {
    let spec = |policy: &str| serde_json::json!({"restartPolicy": policy, "containers": [{"name": "a", "image": "i"}]});
    let ended = |code: i32| Container { exit_code: code, ..container("c1", "a", RunState::Exited) };
    for (policy, code, again) in
        [("Always", 0, true), ("Always", 1, true), ("OnFailure", 1, true), ("OnFailure", 0, false), ("Never", 1, false)]
    {
        let mut state = running_pod(spec(policy), vec![ended(code)]);
        state.settle(at(11));
        assert_eq!(state.end.is_none(), again, "{policy} {code}");
        assert_eq!(!starts(&plan(&state, at(11))).is_empty(), again, "{policy} {code}");
    }
    // The first restart comes at once; the second waits ten seconds from the end.
    let mut state = running_pod(spec("Always"), vec![ended(1)]);
    let action = Action::StartContainer { name: "a".into(), restart_count: 1 };
    assert_eq!(plan(&state, at(11)).actions, std::slice::from_ref(&action));
    state.begin(&action, at(11));
    state.finish(&action.key().unwrap(), Outcome::Done, 2, at(11));
    let again = Container { restart_count: 1, finished_at: Some(at(12)), ..ended(1) };
    let again = Container { id: "c2".into(), created_at: at(11), ..again };
    state.observe(2, Observed { sandboxes: vec![sandbox("s0", 0, true)], containers: vec![again, ended(1)] });
    state.images.insert("a".into(), ImageState::Ready { image_ref: "sha256:i".into() });
    let waiting = plan(&state, at(13));
    assert!(starts(&waiting).is_empty());
    assert_eq!(waiting.wake_at, Some(at(22)));
    assert_eq!(starts(&plan(&state, at(22))), ["a"]);
}

#[test]
fn an_exit_code_rule_beats_the_policy() {
    let spec = serde_json::json!({"restartPolicy": "Never", "containers": [{"name": "a", "image": "i",
        "restartPolicy": "Never", "restartPolicyRules": [
            {"action": "Restart", "exitCodes": {"operator": "In", "values": [42]}}]}]});
    for (code, again) in [(42, true), (1, false)] {
        let ended = Container { exit_code: code, ..container("c1", "a", RunState::Exited) };
        assert_eq!(!starts(&plan(&running_pod(spec.clone(), vec![ended]), at(20))).is_empty(), again, "{code}");
    }
}

#[test]
fn a_failed_liveness_probe_kills_with_its_own_grace() {
    let spec = serde_json::json!({"terminationGracePeriodSeconds": 30, "containers": [{"name": "a", "image": "i",
        "livenessProbe": {"terminationGracePeriodSeconds": 3, "exec": {"command": ["x"]}}}]});
    let mut state = running_pod(spec, vec![container("c1", "a", RunState::Running)]);
    assert!(kills(&plan(&state, at(20))).is_empty());
    state.probes.insert("c1".into(), ProbeView { liveness: Some(ProbeOutcome::Failure), ..Default::default() });
    let made = plan(&state, at(20));
    assert!(matches!(made.actions[..], [Action::KillContainer { deadline, .. }] if deadline == at(23)), "{made:?}");
}

#[test]
fn a_changed_image_replaces_the_container() {
    let spec = serde_json::json!({"containers": [{"name": "a", "image": "j"}]});
    let state = running_pod(spec, vec![container("c1", "a", RunState::Running)]);
    assert_eq!(kills(&plan(&state, at(20))), [("a", KillReason::DefinitionChanged)]);
}

#[test]
fn a_replaced_container_runs_again_whatever_its_policy_and_at_once() {
    let spec = serde_json::json!({"restartPolicy": "Never", "containers": [{"name": "a", "image": "j"}]});
    let mut state = running_pod(spec, vec![container("c1", "a", RunState::Running)]);
    let kill = plan(&state, at(20)).actions.remove(0);
    state.begin(&kill, at(20));
    let key = kill.key().unwrap();
    let ended = Container { exit_code: 143, finished_at: Some(at(20)), ..container("c1", "a", RunState::Exited) };
    state.observe(20, Observed { sandboxes: vec![sandbox("s0", 0, true)], containers: vec![ended] });
    state.finish(&key, Outcome::Done, 20, at(20));
    state.settle(at(20));
    assert_eq!(state.end, None, "the pod is not over");
    assert_eq!(starts(&plan(&state, at(20))), ["a"]);
}

#[test]
fn a_lost_sandbox_is_replaced_after_its_containers_are_gone() {
    let spec = serde_json::json!({"containers": [{"name": "a", "image": "i"}]});
    let mut state = running_pod(spec, Vec::new());
    let dead =
        |state| Observed { sandboxes: vec![sandbox("s0", 0, false)], containers: vec![container("c1", "a", state)] };
    state.observe(2, dead(RunState::Running));
    assert_eq!(kills(&plan(&state, at(20))), [("a", KillReason::SandboxChanged)]);
    state.observe(3, dead(RunState::Exited));
    let made = plan(&state, at(20));
    assert!(made.actions.contains(&Action::CreateSandbox { attempt: 1, stop: vec!["s0".into()] }), "{made:?}");
    assert!(starts(&made).is_empty());
}

#[test]
fn deletion_kills_main_containers_then_sidecars_backwards_then_tears_down() {
    let spec = serde_json::json!({
        "initContainers": [{"name": "s1", "image": "i", "restartPolicy": "Always"},
                           {"name": "s2", "image": "i", "restartPolicy": "Always"}],
        "containers": [{"name": "a", "image": "i"}, {"name": "b", "image": "i"}]});
    let names = ["a", "b", "s1", "s2"];
    let records = |ended: &[&str]| -> Vec<Container> {
        let state = |name: &str| if ended.contains(&name) { RunState::Exited } else { RunState::Running };
        names.iter().map(|name| container(name, name, state(name))).collect()
    };
    let mut state = running_pod(spec, records(&[]));
    state.deletion = Some(Duration::from_secs(30));
    state.finish_with(Why::Deleted, Duration::from_secs(30), at(20));
    let steps: [(&[&str], &[&str]); 3] = [(&[], &["a", "b"]), (&["a", "b"], &["s2"]), (&["a", "b", "s2"], &["s1"])];
    for (ticket, (ended, killed)) in steps.into_iter().enumerate() {
        state.observe(
            2 + ticket as u64,
            Observed { sandboxes: vec![sandbox("s0", 0, true)], containers: records(ended) },
        );
        let made = plan(&state, at(20));
        assert_eq!(kills(&made).iter().map(|(name, _)| *name).collect::<Vec<_>>(), killed);
    }
    let all_gone = || Observed { sandboxes: vec![sandbox("s0", 0, true)], containers: records(&names) };
    state.observe(9, all_gone());
    assert_eq!(plan(&state, at(20)).actions, [Action::StopSandbox { id: "s0".into() }, Action::TearDownVolumes]);
    for action in plan(&state, at(20)).actions {
        state.begin(&action, at(20));
        state.finish(&action.key().unwrap(), Outcome::Done, 9, at(20));
    }
    assert_eq!(plan(&state, at(20)).actions, [Action::RemoveCgroup], "the last status comes before the deletion");
    state.status_sent = true;
    assert_eq!(plan(&state, at(20)).actions, [Action::RemoveCgroup], "nor does it before the cgroup is gone");
    state.cgroup_removed = true;
    assert_eq!(plan(&state, at(20)).actions, [Action::FinishDeletion]);
    state.gone = true;
    let made = plan(&state, at(20));
    assert_eq!(made.actions.len(), 4, "every container is removed: {made:?}");
    state.observe(10, Observed { sandboxes: vec![sandbox("s0", 0, false)], containers: vec![] });
    assert_eq!(plan(&state, at(20)).actions, [Action::RemoveSandbox { id: "s0".into() }]);
    state.observe(11, Observed::default());
    assert_eq!(plan(&state, at(20)).actions, [Action::Forget]);
}

#[test]
fn hooks_of_sidecars_run_at_once_and_their_signals_wait_for_their_turn() {
    let sidecar = |name: &str| {
        serde_json::json!({"name": name, "image": "i", "restartPolicy": "Always",
            "lifecycle": {"preStop": {"exec": {"command": ["x"]}}}})
    };
    let spec = serde_json::json!({"initContainers": [sidecar("s1"), sidecar("s2")],
        "containers": [{"name": "a", "image": "i"}]});
    let records = |main: RunState| {
        let side = |name: &str| container(name, name, RunState::Running);
        vec![container("a", "a", main), side("s1"), side("s2")]
    };
    let mut state = running_pod(spec, records(RunState::Running));
    state.finish_with(Why::Deleted, Duration::from_secs(30), at(20));
    let hooks = |plan: &Plan| -> Vec<String> {
        let hook = |action: &Action| match action {
            Action::RunPreStop { name, .. } => Some(name.clone()),
            _ => None,
        };
        plan.actions.iter().filter_map(hook).collect()
    };
    let made = plan(&state, at(20));
    assert_eq!((hooks(&made), kills(&made).len()), (vec!["s1".to_owned(), "s2".to_owned()], 1));
    for action in made.actions.iter().filter(|action| matches!(action, Action::RunPreStop { .. })) {
        state.begin(action, at(20));
    }
    state.observe(2, Observed { sandboxes: vec![sandbox("s0", 0, true)], containers: records(RunState::Exited) });
    assert_eq!(plan(&state, at(21)).actions, [], "the last sidecar's hook is not over");
    state.finish(&Key::Hook("s2".into()), Outcome::Done, 0, at(22));
    let made = plan(&state, at(22));
    assert!(matches!(&made.actions[..], [Action::KillContainer { name, after_hook: true, .. }] if name == "s2"));
    assert_eq!(made.wake_at, Some(at(50)));
    // When time is up, nobody waits for a turn.
    assert_eq!(kills(&plan(&state, at(50))).len(), 2);
    // A shorter grace cuts a hook off, which is not run again.
    state.finish_with(Why::Deleted, Duration::from_secs(0), at(23));
    assert!(plan(&state, at(23)).actions.contains(&Action::Cancel(Key::Hook("s1".into()))));
    state.finish(&Key::Hook("s1".into()), Outcome::Cancelled, 0, at(23));
    assert!(hooks(&plan(&state, at(23))).is_empty());
}

#[test]
fn a_shorter_grace_hurries_a_kill_under_way() {
    let spec = serde_json::json!({"containers": [{"name": "a", "image": "i"}]});
    let mut state = running_pod(spec, vec![container("c1", "a", RunState::Running)]);
    state.finish_with(Why::Deleted, Duration::from_secs(600), at(20));
    for action in plan(&state, at(20)).actions {
        state.begin(&action, at(20));
    }
    assert_eq!(plan(&state, at(21)).actions, []);
    state.finish_with(Why::Deleted, Duration::from_secs(0), at(22));
    assert_eq!(plan(&state, at(22)).actions, [Action::Cancel(Key::Container("a".into()))]);
}

#[test]
fn the_deadline_ends_a_pod_that_runs() {
    let spec = serde_json::json!({"activeDeadlineSeconds": 60, "containers": [{"name": "a", "image": "i"}]});
    let mut state = running_pod(spec, vec![container("c1", "a", RunState::Running)]);
    state.started_at = Some(at(100));
    state.settle(at(159));
    assert_eq!(plan(&state, at(159)).wake_at, Some(at(160)));
    state.settle(at(160));
    assert_eq!(kills(&plan(&state, at(160))), [("a", KillReason::PodEnding)]);
}

#[test]
fn a_failed_pull_waits_ten_seconds_and_then_twice_as_long() {
    let spec = serde_json::json!({"containers": [{"name": "a", "image": "i"}]});
    let mut state = running_pod(spec, Vec::new());
    state.images.clear();
    let action = Action::EnsureImage { container: "a".into() };
    let mut now = 0;
    for wait in [10, 20, 40] {
        assert_eq!(plan(&state, at(now)).actions, std::slice::from_ref(&action));
        state.begin(&action, at(now));
        let outcome = Outcome::Failed { reason: "ErrImagePull".into(), message: "no".into() };
        state.finish(&action.key().unwrap(), outcome, 0, at(now));
        assert_eq!(plan(&state, at(now)).wake_at, Some(at(now + 2)), "to show ImagePullBackOff");
        assert_eq!(plan(&state, at(now + 2)).wake_at, Some(at(now + wait)));
        now += wait;
    }
}

#[test]
fn the_last_ended_container_is_kept_for_its_log_and_older_ones_go() {
    let spec = serde_json::json!({"containers": [{"name": "a", "image": "i"}]});
    let older = container("c1", "a", RunState::Exited);
    let last = Container { created_at: at(5), ..container("c2", "a", RunState::Exited) };
    let live = Container { created_at: at(9), ..container("c3", "a", RunState::Running) };
    let state = running_pod(spec, vec![live, last, older]);
    assert_eq!(plan(&state, at(20)).actions, [Action::RemoveContainer { id: "c1".into(), name: "a".into() }]);
}

#[test]
fn nothing_is_decided_about_a_container_before_its_last_action_was_seen() {
    let spec = serde_json::json!({"containers": [{"name": "a", "image": "i"}]});
    let mut state = running_pod(spec, Vec::new());
    let action = Action::StartContainer { name: "a".into(), restart_count: 0 };
    assert_eq!(plan(&state, at(1)).actions, std::slice::from_ref(&action));
    state.begin(&action, at(1));
    state.finish(&action.key().unwrap(), Outcome::Done, 7, at(1));
    state.images.insert("a".into(), ImageState::Ready { image_ref: "sha256:i".into() });
    let stale = Observed { sandboxes: vec![sandbox("s0", 0, true)], containers: vec![] };
    state.observe(6, stale);
    assert_eq!(plan(&state, at(1)).actions, [], "an older look does not show the new container");
}

#[test]
fn a_container_that_ended_before_the_clock_was_set_back_runs_again() {
    let spec = serde_json::json!({"containers": [{"name": "a", "image": "i"}]});
    let ended = |second| Container { finished_at: Some(at(second)), ..container("c1", "a", RunState::Exited) };
    let mut state = running_pod(spec, vec![ended(7200)]);
    state.backoff.insert("a".to_owned(), Backoff { delay: Duration::from_secs(40), updated_at: at(7100) });
    assert!(starts(&plan(&state, at(7201))).is_empty());
    assert_eq!(starts(&plan(&state, at(3600))), ["a"], "not after an hour and 40 seconds");
}
