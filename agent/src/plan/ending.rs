//! The plan of a pod that ends: kill, stop, tear down, delete, forget. Pure.

use std::time::Duration;

use super::{Action, Busy, End, Key, KillReason, Planner, Role, later};
use crate::model::{Container, Observed, RunState};

impl Planner<'_> {
    pub(super) fn ending(&mut self, observed: &Observed, end: &End) {
        self.cancel_starts();
        self.kill_in_order(observed, end);
        if !self.state.nothing_lives() || !self.plan.actions.is_empty() {
            return;
        }
        let running = observed.sandboxes.iter().find(|sandbox| !self.state.stopped_sandboxes.contains(&sandbox.id));
        if let Some(sandbox) = running
            && self.free(&Key::Sandbox)
        {
            self.push(Action::StopSandbox { id: sandbox.id.clone() });
        }
        if !self.state.volumes_torn_down && self.free(&Key::Volumes) {
            self.push(Action::TearDownVolumes);
        }
        if !self.state.torn_down() {
            return;
        }
        if !self.state.cgroup_removed && self.free(&Key::Cgroup) {
            self.push(Action::RemoveCgroup);
        }
        if self.state.gone || self.state.reclaim {
            self.remove_everything(observed);
        }
        // As upstream: who sees the pod gone may count on its cgroup, and its user ids, being free.
        if !self.state.gone
            && self.state.cgroup_removed
            && self.state.deletion.is_some()
            && self.state.status_sent
            && !self.state.deletion_finished
            && self.free(&Key::Deletion)
        {
            self.push(Action::FinishDeletion);
        }
    }

    /// Pulls, starts and half-made volumes are of no use any more.
    fn cancel_starts(&mut self) {
        let useless = self.state.busy.iter().filter(|(_, busy)| !busy.cancelled).filter(|(_, busy)| {
            matches!(busy.action, Action::EnsureImage { .. } | Action::StartContainer { .. } | Action::SetUpVolumes)
        });
        let keys: Vec<Key> = useless.map(|(key, _)| key.clone()).collect();
        for key in keys {
            self.push(Action::Cancel(key));
        }
    }

    /// Main, init and ephemeral containers at once; then sidecars, the last one first, or all when the grace time is over. Their
    /// hooks run from the beginning, as upstream's kubelet has it.
    fn kill_in_order(&mut self, observed: &Observed, end: &End) {
        let grace = end.remaining(self.now);
        let role = |container: &Container| {
            let view = self.state.spec.as_ref().and_then(|spec| spec.find(&container.name));
            view.map_or(Role::Main, |view| view.role)
        };
        let live: Vec<(&Container, Role)> =
            observed.containers.iter().filter(|c| c.live()).map(|c| (c, role(c))).collect();
        let mut sidecars: Vec<&Container> = Vec::new();
        for (container, role) in &live {
            if *role == Role::Sidecar {
                sidecars.push(container);
            } else {
                self.kill(container, grace, KillReason::PodEnding);
            }
        }
        self.hooks_of(&sidecars, end);
        let others_live = sidecars.len() < live.len();
        if end.deadline() <= self.now {
            for sidecar in sidecars {
                self.kill(sidecar, grace, KillReason::PodEnding);
            }
            return;
        }
        if !sidecars.is_empty() {
            self.wake(end.deadline());
        }
        if others_live {
            return;
        }
        let order: Vec<&str> = self.state.spec.iter().flat_map(|spec| spec.inits()).map(|c| c.name.as_str()).collect();
        let place = |container: &Container| order.iter().position(|name| *name == container.name);
        if let Some(last) = sidecars.into_iter().max_by_key(|container| place(container))
            && !self.state.occupied(&Key::Hook(last.name.clone()))
            && !self.plan.actions.iter().any(|action| action.key() == Some(Key::Hook(last.name.clone())))
        {
            self.kill(last, grace, KillReason::PodEnding);
        }
        let created = observed.containers.iter().filter(|container| container.state == RunState::Created);
        for container in created {
            if self.free(&Key::Container(container.name.clone())) {
                self.push(Action::RemoveContainer { id: container.id.clone(), name: container.name.clone() });
            }
        }
    }

    /// Has the preStop hooks of running sidecars run, each once; hurries one that would take longer than there is time.
    fn hooks_of(&mut self, sidecars: &[&Container], end: &End) {
        let deadline = later(self.now, end.remaining(self.now));
        for sidecar in sidecars {
            let view = self.state.spec.as_ref().and_then(|spec| spec.find(&sidecar.name));
            if !view.is_some_and(|view| view.pre_stop) || sidecar.state != RunState::Running {
                continue;
            }
            let key = Key::Hook(sidecar.name.clone());
            if let Some(Busy { action: Action::RunPreStop { deadline: current, .. }, cancelled: false }) =
                self.state.busy.get(&key)
            {
                if *current > later(deadline, Duration::from_secs(1)) {
                    self.push(Action::Cancel(key));
                }
                continue;
            }
            if !self.state.pre_stopped.contains(&sidecar.id) && end.deadline() > self.now && self.free(&key) {
                self.push(Action::RunPreStop { id: sidecar.id.clone(), name: sidecar.name.clone(), deadline });
            }
        }
    }

    /// The pod is known to nobody: removes containers, then sandboxes, then forgets it.
    fn remove_everything(&mut self, observed: &Observed) {
        for container in &observed.containers {
            if self.free(&Key::Container(container.name.clone())) {
                self.push(Action::RemoveContainer { id: container.id.clone(), name: container.name.clone() });
            }
        }
        if !observed.containers.is_empty() {
            return;
        }
        if let Some(sandbox) = observed.sandboxes.first() {
            if self.free(&Key::Sandbox) {
                self.push(Action::RemoveSandbox { id: sandbox.id.clone() });
            }
        } else if self.state.gone && self.state.busy.is_empty() && self.state.cgroup_removed {
            self.push(Action::Forget);
        }
    }
}
