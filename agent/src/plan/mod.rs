//! What a pod needs next. Pure: no I/O, no clock; `(state, now) → actions`.
//!
//! ```text
//!             admitted                                        every container is done, deadline, eviction, deletion
//!  seen ──────────────▶ running ──────────────────────────────────────────────────────────────┐
//!   │                    volumes ∥ sandbox ∥ images                                           ▼
//!   │ rejected           init 1 → init 2 → … → main 1 → main 2 → …  (restarts with back-off)  ending
//!   ▼                    a lost sandbox: kill, stop, make the next one                         main and init containers are
//!  ending ◀───────────────────────────────────────────────────────────────────────────────    killed together, then sidecars
//!                                                                                              from the last to the first;
//!                                                                                              all preStop hooks at once
//!      ending ──no container lives──▶ sandboxes stopped ∥ volumes torn down ──▶ torn down
//!   torn down ──deletion asked, last status sent──▶ API object deleted
//!   torn down ──API object gone──▶ containers, sandboxes and cgroup removed ──▶ forgotten
//! ```
//!
//! `ending` is never left except towards `torn down`. At most one action for each [`Key`] is under way, and a key is free
//! again only once the runtime has been looked at after the action's end: so no container can be started twice.

mod backoff;
mod ending;
mod running;
mod state;
mod view;

#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod tests;

use std::time::Duration;

use jiff::Timestamp;

use crate::model::{ContainerId, SandboxId};

pub(crate) use backoff::{Backoff, later};
pub(crate) use state::{Busy, End, ImageState, Outcome, ProbeView, State, Why};
pub(crate) use view::{ContainerView, PodView, Role};

/// What an action is about. Two actions with the same key never overlap.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Key {
    Volumes,
    Sandbox,
    Cgroup,
    Deletion,
    Image(String),
    Container(String),
    Resize(String),
    Hook(String),
}

/// Why a container is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum KillReason {
    PodEnding,
    SandboxChanged,
    DefinitionChanged,
    Resized,
    LivenessProbe,
    StartupProbe,
    StateUnknown,
}

/// One step for the worker to take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    SetUpVolumes,
    /// Stop the sandboxes named, then make a new one.
    CreateSandbox {
        attempt: u32,
        stop: Vec<SandboxId>,
    },
    EnsureImage {
        container: String,
    },
    StartContainer {
        name: String,
        restart_count: u32,
    },
    KillContainer {
        id: ContainerId,
        name: String,
        deadline: Timestamp,
        why: KillReason,
        /// Its preStop hook has run.
        after_hook: bool,
    },
    /// Run the preStop hook of a container that is killed later.
    RunPreStop {
        id: ContainerId,
        name: String,
        deadline: Timestamp,
    },
    RemoveContainer {
        id: ContainerId,
        name: String,
    },
    /// Give a running container the resources that are allocated to it.
    ResizeContainer {
        id: ContainerId,
        name: String,
        resources: String,
        /// It should have them already; another agent may have left it on its way.
        confirm: bool,
    },
    StopSandbox {
        id: SandboxId,
    },
    RemoveSandbox {
        id: SandboxId,
    },
    TearDownVolumes,
    RemoveCgroup,
    /// Delete the API object, whose containers are gone.
    FinishDeletion,
    /// Nothing is left to do for this pod, ever.
    Forget,
    /// Make the action under way for the key end early.
    Cancel(Key),
}

impl Action {
    /// What the action is about; None for those that are not carried out in the background.
    pub(crate) fn key(&self) -> Option<Key> {
        Some(match self {
            Action::SetUpVolumes | Action::TearDownVolumes => Key::Volumes,
            Action::CreateSandbox { .. } | Action::StopSandbox { .. } | Action::RemoveSandbox { .. } => Key::Sandbox,
            Action::EnsureImage { container } => Key::Image(container.clone()),
            Action::StartContainer { name, .. }
            | Action::KillContainer { name, .. }
            | Action::RemoveContainer { name, .. } => Key::Container(name.clone()),
            Action::ResizeContainer { name, .. } => Key::Resize(name.clone()),
            Action::RunPreStop { name, .. } => Key::Hook(name.clone()),
            Action::RemoveCgroup => Key::Cgroup,
            Action::FinishDeletion => Key::Deletion,
            Action::Forget | Action::Cancel(_) => return None,
        })
    }
}

/// What to do now, and when to ask again if nothing happens before.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub actions: Vec<Action>,
    pub wake_at: Option<Timestamp>,
}

/// What the pod needs next.
pub(crate) fn plan(state: &State, now: Timestamp) -> Plan {
    let mut planner = Planner { state, now, plan: Plan::default() };
    match (&state.observed, &state.end, &state.spec) {
        (None, _, _) => {}
        (Some(observed), Some(end), _) => planner.ending(observed, end),
        (Some(observed), None, Some(spec)) => planner.running(observed, spec),
        (Some(_), None, None) => {}
    }
    planner.plan
}

/// A plan in the making.
struct Planner<'a> {
    state: &'a State,
    now: Timestamp,
    plan: Plan,
}

impl Planner<'_> {
    fn push(&mut self, action: Action) {
        self.plan.actions.push(action);
    }

    /// Asks to be called again at `at`.
    fn wake(&mut self, at: Timestamp) {
        self.plan.wake_at = Some(self.plan.wake_at.map_or(at, |earlier| earlier.min(at)));
    }

    /// Whether an action for `key` may begin now: none is under way or planned, its last effect has been seen, and it is
    /// not waiting after a failure.
    fn free(&mut self, key: &Key) -> bool {
        if self.state.occupied(key) || self.plan.actions.iter().any(|action| action.key().as_ref() == Some(key)) {
            return false;
        }
        match self.state.retry.get(key) {
            Some(retry) if retry.waits(self.now) => {
                let at = retry.at;
                self.wake(at);
                false
            }
            _ => true,
        }
    }

    /// Kills a container within `grace`, or hurries a kill under way that would take longer.
    fn kill(&mut self, container: &crate::model::Container, grace: Duration, why: KillReason) {
        let key = Key::Container(container.name.clone());
        let deadline = later(self.now, grace);
        if let Some(Busy { action: Action::KillContainer { deadline: current, .. }, cancelled: false }) =
            self.state.busy.get(&key)
        {
            if *current > later(deadline, Duration::from_secs(1)) {
                self.push(Action::Cancel(key));
            }
            return;
        }
        if self.free(&key) {
            let (id, name) = (container.id.clone(), container.name.clone());
            let after_hook = self.state.pre_stopped.contains(&id);
            self.push(Action::KillContainer { id, name, deadline, why, after_hook });
        }
    }
}
