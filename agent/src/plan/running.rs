//! The plan of a pod that is to run: volumes, sandbox, images, containers in order, restarts, clearing up. Pure.

use std::time::Duration;

use oarlock_probes::Outcome;

use super::{Action, ContainerView, ImageState, Key, KillReason, Planner, PodView, Role, backoff};
use crate::model::{Container, Observed, RunState, Sandbox};
use crate::resize::{self, Step};

/// How far a container that is to start has come.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Progress {
    /// A step of it is under way: those after it wait.
    UnderWay,
    /// It waits for a time to pass: those after it need not.
    Waiting,
}

impl Planner<'_> {
    pub(super) fn running(&mut self, observed: &Observed, spec: &PodView) {
        if let Some(deadline) = self.state.deadline() {
            self.wake(deadline);
        }
        if !self.state.volumes_ready && self.free(&Key::Volumes) {
            self.push(Action::SetUpVolumes);
        }
        let sandbox = observed.current_sandbox().filter(|sandbox| sandbox.usable());
        self.kill_strays(observed, spec, sandbox);
        if sandbox.is_none() {
            self.make_sandbox(observed);
        }
        if self.init_containers(observed, spec, sandbox) {
            self.main_containers(observed, spec, sandbox);
        }
        for ephemeral in spec.of_role(Role::Ephemeral) {
            if observed.latest(&ephemeral.name).is_none() {
                self.start(ephemeral, None, sandbox, true);
            }
        }
        self.clear_up(observed, sandbox);
    }

    /// Containers that live in a sandbox which is no longer the pod's.
    fn kill_strays(&mut self, observed: &Observed, spec: &PodView, sandbox: Option<&Sandbox>) {
        for container in observed.containers.iter().filter(|container| container.live()) {
            if sandbox.is_none_or(|sandbox| sandbox.id != container.sandbox) {
                self.kill(container, spec.grace, KillReason::SandboxChanged);
            }
        }
    }

    fn make_sandbox(&mut self, observed: &Observed) {
        if !self.state.nothing_lives() || !self.free(&Key::Sandbox) {
            return;
        }
        let attempt = observed.current_sandbox().map_or(0, |sandbox| sandbox.attempt + 1);
        let stop = observed
            .sandboxes
            .iter()
            .filter(|sandbox| !self.state.stopped_sandboxes.contains(&sandbox.id))
            .map(|sandbox| sandbox.id.clone())
            .collect();
        self.push(Action::CreateSandbox { attempt, stop });
    }

    /// Gives each init container and sidecar its turn; true once the main ones may start.
    fn init_containers(&mut self, observed: &Observed, spec: &PodView, sandbox: Option<&Sandbox>) -> bool {
        let record_in = |name: &str| sandbox.and_then(|sandbox| observed.latest_in(name, &sandbox.id));
        let initialised = spec.of_role(Role::Main).any(|main| record_in(&main.name).is_some());
        for init in spec.inits() {
            let done = match record_in(&init.name) {
                None if initialised && init.role == Role::Init => true,
                None => {
                    self.start(init, observed.latest(&init.name), sandbox, true);
                    false
                }
                Some(record) => self.init_container(init, record, spec, sandbox),
            };
            if !done && !initialised {
                return false;
            }
        }
        true
    }

    /// One init container or sidecar that has a record in the current sandbox; true when the next may follow.
    fn init_container(
        &mut self,
        init: &ContainerView,
        record: &Container,
        spec: &PodView,
        sandbox: Option<&Sandbox>,
    ) -> bool {
        match record.state {
            RunState::Created => {
                self.remove_leftover(record);
                false
            }
            RunState::Running | RunState::Unknown => {
                let killed = self.kill_if_unfit(init, record, spec);
                !killed && init.role == Role::Sidecar && self.state.started(&init.name, record)
            }
            RunState::Exited if init.role == Role::Init && record.exit_code == 0 => true,
            RunState::Exited => {
                if init.role == Role::Sidecar || init.restarts_after(record.exit_code) {
                    self.start(init, Some(record), sandbox, true);
                }
                false
            }
        }
    }

    /// Main containers in their order: one starts only after those before it have been tried.
    fn main_containers(&mut self, observed: &Observed, spec: &PodView, sandbox: Option<&Sandbox>) {
        let mut turn = true;
        for main in spec.of_role(Role::Main) {
            let record = observed.latest(&main.name);
            let progress = match record.map(|record| record.state) {
                Some(RunState::Created) => {
                    if let Some(record) = record {
                        self.remove_leftover(record);
                    }
                    Progress::UnderWay
                }
                Some(RunState::Running | RunState::Unknown) => {
                    if let (Some(record), Some(sandbox)) = (record, sandbox)
                        && record.sandbox == sandbox.id
                    {
                        self.kill_if_unfit(main, record, spec);
                    }
                    if self.state.starting(&main.name) { Progress::UnderWay } else { Progress::Waiting }
                }
                Some(RunState::Exited)
                    if record.is_some_and(|r| !self.state.runs_again(main, r.exit_code, r.restart_count)) =>
                {
                    continue;
                }
                Some(RunState::Exited) | None => self.start(main, record, sandbox, turn),
            };
            turn &= progress == Progress::Waiting;
        }
    }

    /// Takes the next step towards a container's start. `turn` says whether it is this container's turn to be created.
    fn start(
        &mut self,
        container: &ContainerView,
        record: Option<&Container>,
        sandbox: Option<&Sandbox>,
        turn: bool,
    ) -> Progress {
        let key = Key::Container(container.name.clone());
        if self.state.occupied(&key) {
            return Progress::UnderWay;
        }
        let ended = record.filter(|record| record.state == RunState::Exited);
        self.wake_when_shown_otherwise(container, ended);
        if let Some(at) = ended.and_then(|record| self.state.restart_at(record, self.now)) {
            self.wake(at);
            return Progress::Waiting;
        }
        if !self.free(&key) {
            return Progress::Waiting;
        }
        let image_key = Key::Image(container.name.clone());
        match self.state.images.get(&container.name) {
            None => {
                if self.free(&image_key) {
                    self.push(Action::EnsureImage { container: container.name.clone() });
                }
                Progress::UnderWay
            }
            Some(ImageState::Failed { at, retry_at, .. }) => {
                self.retry_image(container, *at, *retry_at);
                Progress::Waiting
            }
            Some(ImageState::Ready { .. }) => {
                if turn && sandbox.is_some() && self.state.volumes_ready && !self.state.occupied(&Key::Sandbox) {
                    let known = self.state.known_restarts.get(&container.name).copied();
                    let restart_count = record.map(|record| record.restart_count).max(known).map_or(0, |n| n + 1);
                    self.push(Action::StartContainer { name: container.name.clone(), restart_count });
                }
                Progress::UnderWay
            }
        }
    }

    /// A failed start shows its error for a moment, and then that it is waiting.
    fn wake_when_shown_otherwise(&mut self, container: &ContainerView, ended: Option<&Container>) {
        let Some(ended) = ended.filter(|_| self.state.start_errors.contains_key(&container.name)) else { return };
        let turns = crate::status::error_turns_at(ended.finished_at.unwrap_or(ended.created_at));
        if turns > self.now {
            self.wake(turns);
        }
    }

    /// Tries a failed image again when its time has come; asks to be woken when ErrImagePull becomes ImagePullBackOff.
    fn retry_image(&mut self, container: &ContainerView, at: jiff::Timestamp, retry_at: Option<jiff::Timestamp>) {
        let turns = crate::status::error_turns_at(at);
        if turns > self.now {
            self.wake(turns);
        }
        match retry_at {
            Some(retry_at) if backoff::pending(retry_at, self.now, backoff::LONGEST) => self.wake(retry_at),
            Some(_) if self.free(&Key::Image(container.name.clone())) => {
                self.push(Action::EnsureImage { container: container.name.clone() });
            }
            _ => {}
        }
    }

    /// Kills a running container whose definition changed or whose probes ask for it; true when it did.
    fn kill_if_unfit(&mut self, container: &ContainerView, record: &Container, spec: &PodView) -> bool {
        let probes = self.state.probes.get(&record.id).copied().unwrap_or_default();
        let (why, grace): (KillReason, Duration) = if record.state == RunState::Unknown {
            (KillReason::StateUnknown, spec.grace)
        } else if container.role != Role::Init && !record.hash.is_empty() && record.hash != container.hash {
            (KillReason::DefinitionChanged, spec.grace)
        } else if container.role != Role::Init && self.resize(container, record) {
            (KillReason::Resized, spec.grace)
        } else if probes.startup == Some(Outcome::Failure) {
            (KillReason::StartupProbe, container.startup_grace.unwrap_or(spec.grace))
        } else if probes.liveness == Some(Outcome::Failure) {
            (KillReason::LivenessProbe, container.liveness_grace.unwrap_or(spec.grace))
        } else {
            return false;
        };
        self.kill(record, grace.max(Duration::from_secs(1)), why);
        true
    }

    /// Brings a running container's resources to what is allocated; true when that takes a restart.
    fn resize(&mut self, container: &ContainerView, record: &Container) -> bool {
        let actuated = self.state.actuated(container, record).to_owned();
        match resize::step(&actuated, &container.resources, container.restarts_on) {
            Step::Restart => true,
            Step::Nothing if self.state.confirmed(container, record) => false,
            step => {
                if !self.state.starting(&container.name) && self.free(&Key::Resize(container.name.clone())) {
                    self.push(Action::ResizeContainer {
                        id: record.id.clone(),
                        name: container.name.clone(),
                        resources: container.resources.clone(),
                        confirm: step == Step::Nothing,
                    });
                }
                false
            }
        }
    }

    /// A container that was created and never started, left by a crash or a failed start.
    fn remove_leftover(&mut self, record: &Container) {
        if self.free(&Key::Container(record.name.clone())) {
            self.push(Action::RemoveContainer { id: record.id.clone(), name: record.name.clone() });
        }
    }

    /// Keeps the last ended container of each name for its logs, and removes older ones and empty old sandboxes.
    fn clear_up(&mut self, observed: &Observed, sandbox: Option<&Sandbox>) {
        let mut kept: Vec<&str> = Vec::new();
        for container in observed.containers.iter().filter(|container| container.state == RunState::Exited) {
            if !kept.contains(&container.name.as_str()) {
                kept.push(&container.name);
            } else if self.free(&Key::Container(container.name.clone())) {
                self.push(Action::RemoveContainer { id: container.id.clone(), name: container.name.clone() });
            }
        }
        let Some(sandbox) = sandbox else { return };
        for old in observed.sandboxes.iter().filter(|old| old.id != sandbox.id) {
            let empty = !observed.containers.iter().any(|container| container.sandbox == old.id);
            if !self.free(&Key::Sandbox) {
                return;
            }
            if old.ready {
                self.push(Action::StopSandbox { id: old.id.clone() });
            } else if empty {
                self.push(Action::RemoveSandbox { id: old.id.clone() });
            }
        }
    }
}
