//! The containers' part of a pod's status. Pure.

use k8s_openapi::api::core::v1::{
    ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting, ContainerStatus,
    ContainerUser, LinuxContainerUser, PodStatus, ResourceRequirements,
};

use super::{StatusFacts, error_turns_at, whole_second};
use crate::model::{Container, RunState};
use crate::plan::{ContainerView, ImageState, PodView, Role, State, Why};

/// Makes the statuses of one pod's containers.
pub(super) struct Containers<'a> {
    pub view: &'a PodView,
    pub state: &'a State,
    pub last: &'a PodStatus,
    pub facts: &'a StatusFacts<'a>,
}

impl Containers<'_> {
    pub(super) fn of_inits(&self) -> Vec<ContainerStatus> {
        self.view.inits().map(|container| self.status(container)).collect()
    }

    pub(super) fn of(&self, role: Role) -> Vec<ContainerStatus> {
        self.view.of_role(role).map(|container| self.status(container)).collect()
    }

    fn status(&self, container: &ContainerView) -> ContainerStatus {
        let last = self.last_status(&container.name);
        let observed = self.state.observed.as_ref();
        let record = observed.and_then(|observed| observed.latest(&container.name));
        let mut status = ContainerStatus { name: container.name.clone(), ..Default::default() };
        let Some(record) = record.filter(|record| self.shown(container, record)) else {
            self.without_record(container, last, &mut status);
            return status;
        };
        status.container_id = Some(self.id(record));
        status.image = record.image.clone();
        status.image_id = record.image_id.clone();
        status.restart_count = i32::try_from(record.restart_count).unwrap_or(i32::MAX);
        self.resources(container, record, &mut status);
        status.user = record.user.clone().map(|(uid, gid, groups)| ContainerUser {
            linux: Some(LinuxContainerUser { uid, gid, supplemental_groups: (!groups.is_empty()).then_some(groups) }),
        });
        let state = self.container_state(container, record);
        let previous = observed.and_then(|observed| observed.last_ended(&container.name, Some(&record.id)));
        status.last_state = match (&state.waiting, previous) {
            (Some(_), _) if record.state == RunState::Exited => Some(ended(self.terminated(record))),
            (_, Some(previous)) => Some(ended(self.terminated(previous))),
            (_, None) => last.and_then(|last| self.carried_last_state(last, record)),
        };
        status.started = Some(self.state.started(&container.name, record));
        status.ready = match container.role {
            Role::Init => record.state == RunState::Exited && record.exit_code == 0,
            Role::Ephemeral => false,
            Role::Main | Role::Sidecar => self.state.ready(&container.name, record),
        };
        status.state = Some(state);
        status
    }

    /// What is allocated to it and what it runs with.
    fn resources(&self, container: &ContainerView, record: &Container, status: &mut ContainerStatus) {
        if !matches!(container.role, Role::Main | Role::Sidecar) {
            return;
        }
        let read = |json: &str| serde_json::from_str::<ResourceRequirements>(json).ok();
        let own = |r: &ResourceRequirements| r.requests.is_some() || r.limits.is_some();
        status.allocated_resources = read(&container.resources).and_then(|resources| resources.requests);
        let actuated = self.state.actuated(container, record);
        status.resources = read(actuated).filter(own).filter(|_| record.state == RunState::Running);
    }

    /// A container that is just being made shows as waiting until its start is over.
    fn shown(&self, container: &ContainerView, record: &Container) -> bool {
        record.state != RunState::Created && !(self.state.starting(&container.name) && record.live())
    }

    fn container_state(&self, container: &ContainerView, record: &Container) -> ContainerState {
        match record.state {
            RunState::Running => ContainerState {
                running: Some(ContainerStateRunning { started_at: record.started_at.map(whole_second) }),
                ..Default::default()
            },
            RunState::Exited => match self.waits_after_exit(container, record) {
                Some((reason, message)) => waiting(&reason, &message),
                None => ended(self.terminated(record)),
            },
            RunState::Created | RunState::Unknown => waiting("ContainerCreating", ""),
        }
    }

    /// Why an ended container that is to run again does not run yet.
    fn waits_after_exit(&self, container: &ContainerView, record: &Container) -> Option<(String, String)> {
        let again = match container.role {
            Role::Sidecar => true,
            Role::Init if record.exit_code == 0 => false,
            _ => self.state.runs_again(container, record.exit_code, record.restart_count),
        };
        if !again || self.state.end.is_some() {
            return None;
        }
        let made = self.makes_way(container, record).then(|| ("ContainerCreating".to_owned(), String::new()));
        // One that starts waits no more.
        if self.state.starting(&container.name) {
            return made;
        }
        if self.state.restart_at(record, self.facts.now).is_some() {
            if let Some(error) = self.start_error_shown(container, record) {
                return Some(error);
            }
            let delay = self.state.backoff.get(&container.name).map_or(0, |backoff| backoff.delay.as_secs());
            let message = format!(
                "back-off {} restarting failed container={} pod={}",
                go_duration(delay),
                container.name,
                self.view.shown_name
            );
            return Some(("CrashLoopBackOff".to_owned(), message));
        }
        let trouble = self.image_trouble(container).or_else(|| self.state.start_errors.get(&container.name).cloned());
        trouble.or(made)
    }

    /// Whether an ended container was ended for its new definition although its policy lets it run only once. It is not
    /// shown as ended: the API would refuse that such a container runs again.
    fn makes_way(&self, container: &ContainerView, record: &Container) -> bool {
        self.state.end.is_none()
            && self.state.runs_again(container, record.exit_code, record.restart_count)
            && !container.restarts_after(record.exit_code)
    }

    /// A container that never got going shows its error first and then takes turns with CrashLoopBackOff.
    fn start_error_shown(&self, container: &ContainerView, record: &Container) -> Option<(String, String)> {
        let ended_at = record.finished_at.unwrap_or(record.created_at);
        let error = self.state.start_errors.get(&container.name)?;
        (error_turns_at(ended_at) > self.facts.now).then(|| error.clone())
    }

    fn image_trouble(&self, container: &ContainerView) -> Option<(String, String)> {
        let Some(ImageState::Failed { reason, message, at, .. }) = self.state.images.get(&container.name) else {
            return None;
        };
        if reason == "ErrImagePull" && error_turns_at(*at) <= self.facts.now {
            let message = format!("Back-off pulling image \"{}\": ErrImagePull: {message}", container.image);
            return Some(("ImagePullBackOff".to_owned(), message));
        }
        Some((reason.clone(), message.clone()))
    }

    /// A container that the runtime does not have (any more, or yet).
    fn without_record(&self, container: &ContainerView, last: Option<&ContainerStatus>, status: &mut ContainerStatus) {
        let observed = self.state.observed.as_ref();
        status.image = last.map(|last| last.image.clone()).unwrap_or_default();
        status.started = Some(false);
        let previous = observed.and_then(|observed| observed.last_ended(&container.name, None));
        if let Some(previous) = previous {
            // A restart under way: the last end shows until the new container runs.
            status.container_id = Some(self.id(previous));
            status.image = previous.image.clone();
            status.image_id = previous.image_id.clone();
            status.restart_count = i32::try_from(previous.restart_count).unwrap_or(i32::MAX);
            let end = ended(self.terminated(previous));
            if self.makes_way(container, previous) {
                status.state = Some(waiting("ContainerCreating", ""));
                status.last_state = Some(end);
            } else {
                status.state = Some(end);
                status.last_state = last.and_then(|last| last.last_state.clone());
            }
            return;
        }
        let was = last.and_then(|last| last.state.as_ref());
        let over = self.state.end.is_some() && !self.state.starting(&container.name);
        if let Some(last) = last.filter(|last| last.container_id.is_some()) {
            status.restart_count = last.restart_count;
            status.last_state = last.last_state.clone();
            let terminated = was.and_then(|state| state.terminated.clone());
            if over || terminated.is_some() {
                status.container_id = last.container_id.clone();
                status.image_id = last.image_id.clone();
                status.ready = container.role == Role::Init && terminated.as_ref().is_some_and(|t| t.exit_code == 0);
                status.state = Some(ended(terminated.unwrap_or_else(|| self.lost(last))));
                return;
            }
        }
        let has_inits = self.view.inits().next().is_some();
        let default = if has_inits { "PodInitializing" } else { "ContainerCreating" };
        let trouble = self.image_trouble(container).or_else(|| self.state.start_errors.get(&container.name).cloned());
        let (reason, message) = trouble.unwrap_or_else(|| (default.to_owned(), String::new()));
        let refused = matches!(self.state.end.as_ref().map(|end| &end.why), Some(Why::Failed { .. }));
        if refused && last.is_none() {
            status.started = None;
        }
        status.state = Some(waiting(&reason, &message));
    }

    /// A container that the API knows as running and the runtime does not know at all.
    fn lost(&self, last: &ContainerStatus) -> ContainerStateTerminated {
        ContainerStateTerminated {
            exit_code: 137,
            reason: Some("ContainerStatusUnknown".to_owned()),
            message: Some("The container could not be located when the pod was terminated".to_owned()),
            container_id: last.container_id.clone(),
            ..Default::default()
        }
    }

    /// The last state that the API had, while the same container lives; its state, once another took its place.
    fn carried_last_state(&self, last: &ContainerStatus, record: &Container) -> Option<ContainerState> {
        if last.container_id.as_deref() == Some(&self.id(record)) {
            return last.last_state.clone();
        }
        let terminated = last.state.as_ref().and_then(|state| state.terminated.clone());
        terminated.map(ended).or_else(|| last.last_state.clone())
    }

    fn terminated(&self, record: &Container) -> ContainerStateTerminated {
        let reason = match (record.reason.as_str(), record.exit_code) {
            ("", 0) => "Completed",
            ("", _) => "Error",
            (reason, _) => reason,
        };
        ContainerStateTerminated {
            container_id: Some(self.id(record)),
            exit_code: record.exit_code,
            reason: Some(reason.to_owned()),
            message: Some(record.message.clone()).filter(|message| !message.is_empty()),
            started_at: Some(whole_second(record.started_at.unwrap_or(record.created_at))),
            finished_at: record.finished_at.map(whole_second),
            signal: None,
        }
    }

    fn id(&self, record: &Container) -> String {
        format!("{}{}", self.facts.id_scheme, record.id)
    }

    fn last_status(&self, name: &str) -> Option<&ContainerStatus> {
        let lists = [
            &self.last.container_statuses,
            &self.last.init_container_statuses,
            &self.last.ephemeral_container_statuses,
        ];
        lists.into_iter().flatten().flatten().find(|status| status.name == name)
    }
}

fn waiting(reason: &str, message: &str) -> ContainerState {
    ContainerState {
        waiting: Some(ContainerStateWaiting {
            reason: Some(reason.to_owned()),
            message: Some(message.to_owned()).filter(|message| !message.is_empty()),
        }),
        ..Default::default()
    }
}

fn ended(terminated: ContainerStateTerminated) -> ContainerState {
    ContainerState { terminated: Some(terminated), ..Default::default() }
}

/// Seconds as Go prints a duration: `10s`, `2m40s`, `5m0s`.
fn go_duration(seconds: u64) -> String {
    if seconds < 60 { format!("{seconds}s") } else { format!("{}m{}s", seconds / 60, seconds % 60) }
}
