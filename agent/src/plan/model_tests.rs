//! The planner against a model of a runtime: actions end in any order, looks come late, containers die, probes fail, the
//! runtime fails calls, the agent restarts, the user deletes. What must hold is checked at every step.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use jiff::Timestamp;
use oarlock_probes::Outcome as ProbeOutcome;
use proptest::prelude::*;

use super::tests::{container, sandbox, view};
use super::*;
use crate::model::{Container, ContainerId, Observed, RunState};

/// One thing that happens.
#[derive(Debug, Clone)]
enum Step {
    /// The nth action under way comes to an end.
    Act(usize, Fate),
    /// The nth finished action's end reaches the worker.
    Report(usize),
    /// The runtime is looked at; the look reaches the worker later.
    Look,
    /// The nth look reaches the worker.
    Deliver(usize),
    /// The nth live container ends with this code.
    Exit(usize, i32),
    /// The sandbox dies.
    LoseSandbox,
    /// Liveness of the nth live container fails.
    Unhealthy(usize),
    /// The nth main container is given another size.
    Resize(usize, u16),
    /// The node needs the pod to end.
    Evict,
    /// Room is needed on the disk.
    Reclaim,
    /// Time passes.
    Sleep(u16),
    Delete,
    /// The agent is killed and starts again.
    Restart,
}

/// How an action goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Works,
    /// It works, and the look at its effect fails.
    WorksUnseen,
    /// It takes effect, and the answer is lost: it counts as failed.
    AnswerLost,
    Fails,
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![6 => Just(Fate::Works), 2 => Just(Fate::WorksUnseen), 1 => Just(Fate::AnswerLost), 1 => Just(Fate::Fails)]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0..4usize, fate()).prop_map(|(n, fate)| Step::Act(n, fate)),
        8 => (0..4usize).prop_map(Step::Report),
        4 => Just(Step::Look),
        4 => (0..4usize).prop_map(Step::Deliver),
        3 => (0..4usize, prop_oneof![Just(0), Just(1), Just(137)]).prop_map(|(n, code)| Step::Exit(n, code)),
        1 => Just(Step::LoseSandbox),
        1 => (0..4usize).prop_map(Step::Unhealthy),
        2 => (0..2usize, 1..4u16).prop_map(|(n, cpu)| Step::Resize(n, cpu)),
        1 => Just(Step::Evict),
        1 => Just(Step::Reclaim),
        4 => (0..400u16).prop_map(Step::Sleep),
        1 => Just(Step::Delete),
        1 => Just(Step::Restart),
    ]
}

fn pod() -> impl Strategy<Value = serde_json::Value> {
    let policies = prop_oneof![Just("Always"), Just("OnFailure"), Just("Never")];
    (policies, 0..3usize, 0..2usize, 1..3usize).prop_map(|(policy, inits, sidecars, mains)| {
        let mut init_list = Vec::new();
        init_list.extend((0..inits).map(|n| serde_json::json!({"name": format!("i{n}"), "image": "i"})));
        init_list.extend((0..sidecars).map(|n| {
            serde_json::json!({"name": format!("s{n}"), "image": "i", "restartPolicy": "Always",
                    "lifecycle": {"preStop": {"exec": {"command": ["x"]}}}})
        }));
        // The first is resized as it runs, the second restarts for it.
        let policy_of = |n| if n == 0 { "NotRequired" } else { "RestartContainer" };
        let main = |n| {
            serde_json::json!({"name": format!("m{n}"), "image": "i", "resources": {"requests": {"cpu": "1"}},
                "resizePolicy": [{"resourceName": "cpu", "restartPolicy": policy_of(n)}]})
        };
        let mains: Vec<_> = (0..mains).map(main).collect();
        serde_json::json!({"restartPolicy": policy, "initContainers": init_list, "containers": mains})
    })
}

/// An action whose effect has happened and whose end the worker has not heard of.
struct Finished {
    key: Key,
    outcome: Outcome,
    seen_from: u64,
    look: Option<(u64, Observed)>,
}

struct World {
    spec: serde_json::Value,
    state: State,
    now: Timestamp,
    truth: Observed,
    under_way: Vec<Action>,
    finished: Vec<Finished>,
    looks: VecDeque<(u64, Observed)>,
    ticket: u64,
    made: u32,
    deleted: bool,
    api_object: bool,
    forgotten: bool,
    evicted: bool,
    /// What each container has in its cgroup.
    sizes: BTreeMap<ContainerId, String>,
    /// How often each container was started.
    starts: BTreeMap<String, u32>,
    ended_codes: BTreeMap<String, i32>,
}

impl World {
    fn new(spec: serde_json::Value) -> Self {
        let mut state = State::default();
        state.set_spec(view(spec.clone()));
        Self {
            spec,
            state,
            now: Timestamp::from_second(1000).expect("a small number"),
            truth: Observed::default(),
            under_way: Vec::new(),
            finished: Vec::new(),
            looks: VecDeque::new(),
            ticket: 1,
            made: 0,
            deleted: false,
            api_object: true,
            forgotten: false,
            evicted: false,
            sizes: BTreeMap::new(),
            starts: BTreeMap::new(),
            ended_codes: BTreeMap::new(),
        }
    }

    fn look(&mut self) -> (u64, Observed) {
        self.ticket += 1;
        (self.ticket, self.truth.clone())
    }

    /// What the worker does after each event.
    fn advance(&mut self) -> Result<(), TestCaseError> {
        while self.advance_once()? {}
        Ok(())
    }

    /// True when something ended at once, so that there is more to plan.
    fn advance_once(&mut self) -> Result<bool, TestCaseError> {
        let mut again = false;
        self.state.settle(self.now);
        self.state.status_sent = true;
        let made = plan(&self.state, self.now);
        for action in made.actions {
            match action {
                Action::Forget => {
                    prop_assert!(self.truth.containers.is_empty() && self.truth.sandboxes.is_empty());
                    self.forgotten = true;
                }
                Action::Cancel(key) => self.state.cancel(&key),
                action => {
                    let key = action.key().expect("a key");
                    prop_assert!(
                        !self.under_way.iter().any(|other| other.key().as_ref() == Some(&key)),
                        "two actions for {key:?}"
                    );
                    self.judge_start(&action)?;
                    self.state.begin(&action, self.now);
                    if matches!(action, Action::EnsureImage { .. } | Action::SetUpVolumes)
                        && self.ticket.is_multiple_of(2)
                    {
                        let outcome = self.effect(&action)?;
                        self.state.finish(&key, outcome, 0, self.now);
                        again = true;
                    } else {
                        self.under_way.push(action);
                    }
                }
            }
        }
        Ok(again)
    }

    /// Starts must obey the restart policy, and none may come once the pod ends.
    fn judge_start(&self, action: &Action) -> Result<(), TestCaseError> {
        let Action::StartContainer { name, .. } = action else { return Ok(()) };
        prop_assert!(self.state.end.is_none(), "a start of {name} in a pod that ends");
        let view = self.state.spec.as_ref().and_then(|spec| spec.find(name)).expect("a container of the pod");
        if view.role == Role::Main
            && let Some(code) = self.ended_codes.get(name)
        {
            let latest = self.state.observed.as_ref().and_then(|observed| observed.latest(name));
            let count = latest.map_or(0, |record| record.restart_count);
            prop_assert!(self.state.runs_again(view, *code, count), "{name} ended with {code} and runs again");
        }
        Ok(())
    }

    fn act(&mut self, nth: usize, fate: Fate) -> Result<(), TestCaseError> {
        if self.under_way.is_empty() {
            return Ok(());
        }
        let action = self.under_way.remove(nth % self.under_way.len());
        let key = action.key().expect("a key");
        let failure = || Outcome::Failed { reason: "x".into(), message: "x".into() };
        let mut outcome = if fate == Fate::Fails { failure() } else { self.effect(&action)? };
        if fate == Fate::AnswerLost {
            outcome = failure();
        }
        let (ticket, observed) = self.look();
        let seen = matches!(key, Key::Sandbox | Key::Container(_)) && matches!(fate, Fate::Works | Fate::Fails);
        self.finished.push(Finished { key, outcome, seen_from: ticket, look: seen.then_some((ticket, observed)) });
        Ok(())
    }

    fn effect(&mut self, action: &Action) -> Result<Outcome, TestCaseError> {
        match action {
            Action::EnsureImage { .. } => return Ok(Outcome::ImageReady { image_ref: "sha256:i".into() }),
            Action::CreateSandbox { attempt, stop } => {
                for old in &mut self.truth.sandboxes {
                    old.ready &= !stop.contains(&old.id);
                }
                prop_assert!(!self.truth.sandboxes.iter().any(|old| old.ready), "two ready sandboxes");
                self.made += 1;
                let id = format!("s{}", self.made);
                self.truth.sandboxes.insert(0, sandbox(&id, *attempt, true));
            }
            Action::StartContainer { name, restart_count } => {
                let live = self.truth.containers.iter().any(|c| c.name == *name && c.live());
                prop_assert!(!live, "two live instances of {name}");
                let Some(current) = self.truth.sandboxes.first().filter(|sandbox| sandbox.ready) else {
                    return Ok(Outcome::Failed { reason: "CreateContainerError".into(), message: "no sandbox".into() });
                };
                self.made += 1;
                let view = self.state.spec.as_ref().and_then(|spec| spec.find(name)).expect("a container of the pod");
                let made = Container {
                    sandbox: current.id.clone(),
                    resources: view.resources.clone(),
                    restart_count: *restart_count,
                    created_at: self.now,
                    started_at: Some(self.now),
                    ..container(&format!("c{}", self.made), name, RunState::Running)
                };
                self.sizes.insert(made.id.clone(), made.resources.clone());
                self.truth.containers.insert(0, made);
                *self.starts.entry(name.clone()).or_default() += 1;
            }
            Action::RunPreStop { id, .. } => {
                prop_assert!(self.state.end.is_some(), "a hook in a pod that runs on");
                prop_assert!(!self.state.pre_stopped.contains(id), "a hook is run twice");
            }
            Action::ResizeContainer { id, resources, .. } => {
                self.sizes.insert(id.clone(), resources.clone());
            }
            Action::KillContainer { id, .. } => {
                self.end(|container| container.id == *id, 137);
            }
            Action::RemoveContainer { id, .. } => {
                let live = self.truth.containers.iter().any(|c| c.id == *id && c.live());
                prop_assert!(!live, "a live container is removed");
                self.truth.containers.retain(|container| container.id != *id);
            }
            Action::StopSandbox { id } => {
                for old in self.truth.sandboxes.iter_mut().filter(|sandbox| sandbox.id == *id) {
                    old.ready = false;
                }
            }
            Action::RemoveSandbox { id } => self.truth.sandboxes.retain(|sandbox| sandbox.id != *id),
            Action::TearDownVolumes => {
                let live = self.truth.containers.iter().any(Container::live);
                prop_assert!(!live, "volumes are taken from a live container");
            }
            Action::FinishDeletion => {
                prop_assert!(self.deleted, "an object is deleted that nobody wanted deleted");
                let live = self.truth.containers.iter().any(Container::live);
                prop_assert!(!live, "the API object goes before its containers");
                self.api_object = false;
            }
            _ => {}
        }
        Ok(Outcome::Done)
    }

    fn end(&mut self, which: impl Fn(&Container) -> bool, code: i32) {
        for container in self.truth.containers.iter_mut().filter(|c| c.live() && which(c)) {
            container.state = RunState::Exited;
            container.exit_code = code;
            container.finished_at = Some(self.now);
            self.ended_codes.insert(container.name.clone(), code);
        }
    }

    fn report(&mut self, nth: usize) {
        if self.finished.is_empty() {
            return;
        }
        let done = self.finished.remove(nth % self.finished.len());
        self.state.finish(&done.key, done.outcome, done.seen_from, self.now);
        if let Some((ticket, observed)) = done.look {
            self.state.observe(ticket, observed);
        }
        if !self.api_object {
            self.state.gone = true;
            self.state.finish_with(Why::Deleted, Duration::from_secs(1), self.now);
        }
    }

    fn nth_live(&self, nth: usize) -> Option<crate::model::ContainerId> {
        let live: Vec<_> = self.truth.containers.iter().filter(|container| container.live()).collect();
        (!live.is_empty()).then(|| live[nth % live.len()].id.clone())
    }

    fn evict(&mut self) {
        self.evicted = true;
        let why = Why::Failed { reason: "Evicted".into(), message: "x".into() };
        self.state.finish_with(why, Duration::from_secs(1), self.now);
    }

    fn resize(&mut self, nth: usize, cpu: u16) {
        let mains = self.spec["containers"].as_array_mut().expect("containers");
        let nth = nth % mains.len();
        mains[nth]["resources"]["requests"]["cpu"] = cpu.to_string().into();
        self.state.set_spec(view(self.spec.clone()));
    }

    fn delete(&mut self) {
        self.deleted = true;
        self.state.deletion = Some(Duration::from_secs(30));
        self.state.finish_with(Why::Deleted, Duration::from_secs(30), self.now);
    }

    /// The agent dies: actions under way are cut off before or after their effect, all it knew is lost.
    fn restart(&mut self) -> Result<(), TestCaseError> {
        for action in std::mem::take(&mut self.under_way) {
            if self.ticket.is_multiple_of(2) {
                self.effect(&action)?;
            }
            self.ticket += 1;
        }
        self.finished.clear();
        self.looks.clear();
        self.ticket = 1;
        self.state = State::default();
        self.state.set_spec(view(self.spec.clone()));
        // The pod's status said so.
        if self.evicted {
            self.evict();
        }
        if self.deleted {
            self.delete();
        }
        if !self.api_object {
            self.state.gone = true;
            self.state.finish_with(Why::Deleted, Duration::from_secs(1), self.now);
        }
        Ok(())
    }

    fn take(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match step {
            Step::Act(nth, fate) => self.act(*nth, *fate)?,
            Step::Report(nth) => self.report(*nth),
            Step::Look => {
                let look = self.look();
                self.looks.push_back(look);
            }
            Step::Deliver(nth) => {
                if !self.looks.is_empty() {
                    let at = nth % self.looks.len();
                    if let Some((ticket, observed)) = self.looks.remove(at) {
                        self.state.observe(ticket, observed);
                    }
                }
            }
            Step::Exit(nth, code) => {
                if let Some(id) = self.nth_live(*nth) {
                    self.end(|container| container.id == id, *code);
                }
            }
            Step::LoseSandbox => {
                for sandbox in &mut self.truth.sandboxes {
                    sandbox.ready = false;
                }
            }
            Step::Unhealthy(nth) => {
                if let Some(id) = self.nth_live(*nth) {
                    self.state.probes.entry(id).or_default().liveness = Some(ProbeOutcome::Failure);
                }
            }
            Step::Sleep(seconds) => self.now = later(self.now, Duration::from_secs(u64::from(*seconds))),
            Step::Resize(nth, cpu) => self.resize(*nth, *cpu),
            Step::Evict => self.evict(),
            Step::Reclaim => self.state.reclaim |= self.state.end.is_some(),
            Step::Delete => self.delete(),
            Step::Restart => self.restart()?,
        }
        self.advance()
    }

    /// Everything works from now on and nothing new happens: where does the pod end up?
    fn calm_down(&mut self) -> Result<(), TestCaseError> {
        for _ in 0..400 {
            if self.forgotten {
                return Ok(());
            }
            self.act(0, Fate::Works)?;
            self.report(0);
            let (ticket, observed) = self.look();
            self.state.observe(ticket, observed);
            self.now = later(self.now, Duration::from_secs(60));
            self.advance()?;
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_the_rules_hold_and_a_deleted_pod_leaves_nothing(
        spec in pod(),
        steps in prop::collection::vec(step(), 1..80),
    ) {
        let mut world = World::new(spec);
        for step in &steps {
            world.take(step)?;
            if world.forgotten {
                return Ok(());
            }
        }
        world.delete();
        world.advance()?;
        world.calm_down()?;
        prop_assert!(world.forgotten, "the pod is never forgotten: {:?} {:?}", world.state, world.truth);
        prop_assert!(world.truth.containers.is_empty() && world.truth.sandboxes.is_empty());
        prop_assert!(!world.api_object);
    }

    #[test]
    fn left_alone_a_pod_that_restarts_always_gets_all_its_containers_running(
        spec in pod(),
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let mut spec = spec;
        spec["restartPolicy"] = "Always".into();
        spec["initContainers"].as_array_mut().unwrap().retain(|init| init["restartPolicy"] == "Always");
        let mut world = World::new(spec);
        for step in steps.iter().filter(|step| !matches!(step, Step::Delete | Step::Evict)) {
            world.take(step)?;
        }
        world.calm_down()?;
        let spec = world.state.spec.clone().expect("a pod");
        for container in &spec.containers {
            let live = world.truth.containers.iter().filter(|c| c.name == container.name && c.live()).count();
            prop_assert_eq!(live, 1, "{} is not running: {:?}", container.name, world.truth);
            let running = world.truth.containers.iter().find(|c| c.name == container.name && c.live()).expect("running");
            prop_assert_eq!(&world.sizes[&running.id], &container.resources, "{} has another size", container.name);
        }
        prop_assert_eq!(world.truth.sandboxes.iter().filter(|sandbox| sandbox.ready).count(), 1);
    }
}
