//! Carrying out the planner's actions, one background task each. Every step may be repeated after a crash at any point.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod};
use kube::api::{Api, DeleteParams, Preconditions};
use oarlock_proto::cri;
use tokio_util::sync::CancellationToken;

use crate::error::chain;
use crate::hooks;
use crate::model::{ContainerId, Observed, PodUid, SandboxId};
use crate::plan::{Action, KillReason, Outcome};
use crate::recorder::Level;
use crate::shared::Shared;
use crate::spec::{self, dns, sandbox};
use crate::users::Range;

/// Volumes wait for API objects and mounts.
const VOLUMES: Duration = Duration::from_secs(120);
const CALL: Duration = Duration::from_secs(10);
/// Between SIGTERM and SIGKILL, however little grace there is; as upstream's.
const LEAST_GRACE: Duration = Duration::from_secs(2);

/// One action with all it needs.
pub(super) struct Job {
    pub shared: Arc<Shared>,
    pub pod: Arc<Pod>,
    pub uid: PodUid,
    pub observed: Observed,
    /// The image of the container to start.
    pub image: Option<String>,
    pub cancel: CancellationToken,
}

/// A failure with a container's waiting reason and a message.
pub(super) fn failed(reason: &str, message: impl Into<String>) -> Outcome {
    Outcome::Failed { reason: reason.to_owned(), message: message.into() }
}

impl Job {
    /// Each step is in a box of its own, so that waiting for a short one takes no room for the longest.
    pub(super) async fn perform(&self, action: Action) -> Outcome {
        match action {
            Action::SetUpVolumes => self.cancellable(self.set_up_volumes()).await,
            Action::CreateSandbox { attempt, stop } => Box::pin(self.create_sandbox(attempt, stop)).await,
            Action::EnsureImage { container } => self.cancellable(self.ensure_image(&container)).await,
            Action::StartContainer { name, restart_count } => {
                Box::pin(self.start_container(&name, restart_count)).await
            }
            Action::KillContainer { id, name, deadline, why, after_hook } => {
                self.cancellable(self.kill_container(&id, &name, deadline, (why, after_hook))).await
            }
            Action::RunPreStop { id, name, deadline } => {
                self.cancellable(self.run_pre_stop(&id, &name, deadline)).await
            }
            Action::RemoveContainer { id, name } => self.remove_container(&id, &name).await,
            Action::ResizeContainer { id, name, confirm, .. } => self.resize_container(&id, &name, confirm).await,
            Action::StopSandbox { id } => match self.shared.runtime.stop_sandbox(id.as_str()).await {
                Ok(()) => Outcome::Done,
                Err(error) => self.troubled("FailedKillPod", format!("error killing pod: {error}")),
            },
            Action::RemoveSandbox { id } => match self.shared.runtime.remove_sandbox(id.as_str()).await {
                Ok(()) => {
                    remove_empty(&self.shared.log_dir(&self.pod)).await;
                    Outcome::Done
                }
                Err(error) => failed("", error.to_string()),
            },
            Action::TearDownVolumes => Box::pin(self.tear_down_volumes()).await,
            Action::RemoveCgroup => self.remove_cgroup().await,
            Action::FinishDeletion => self.finish_deletion().await,
            Action::Forget | Action::Cancel(_) => Outcome::Done,
        }
    }

    fn cancellable(&self, step: impl Future<Output = Outcome> + Send) -> impl Future<Output = Outcome> + Send {
        let step = Box::pin(step);
        async move {
            tokio::select! {
                outcome = step => outcome,
                () = self.cancel.cancelled() => Outcome::Cancelled,
            }
        }
    }

    /// A failure that the user is told of.
    fn troubled(&self, reason: &'static str, message: String) -> Outcome {
        self.shared.recorder.pod(&self.pod, Level::Warning, reason, message.clone());
        failed(reason, message)
    }

    async fn set_up_volumes(&self) -> Outcome {
        let facts = self.shared.pod_facts(None);
        match tokio::time::timeout(VOLUMES, self.shared.volumes.set_up(&self.pod, &facts)).await {
            Ok(Ok(())) => Outcome::Done,
            Ok(Err(error)) => self.troubled("FailedMount", error.full_message()),
            Err(_) => self.troubled("FailedMount", "Unable to attach or mount volumes: timed out".to_owned()),
        }
    }

    async fn tear_down_volumes(&self) -> Outcome {
        let torn_down = tokio::time::timeout(VOLUMES, self.shared.volumes.tear_down(self.uid.as_str())).await;
        let dir = self.shared.pod_dir(self.uid.as_str());
        match torn_down {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return failed("", error.full_message()),
            Err(_) => return failed("", "tearing volumes down timed out"),
        }
        // What the agent itself put there: the hosts file and message files.
        for own in ["etc-hosts", "containers"] {
            let path = dir.join(own);
            let removed = match tokio::fs::symlink_metadata(&path).await {
                Ok(meta) if meta.is_dir() => tokio::fs::remove_dir_all(&path).await,
                Ok(_) => tokio::fs::remove_file(&path).await,
                Err(_) => Ok(()),
            };
            if let Err(error) = removed {
                return failed("", format!("remove {}: {error}", path.display()));
            }
        }
        let _ = tokio::fs::remove_dir(&dir).await;
        Outcome::Done
    }

    async fn remove_cgroup(&self) -> Outcome {
        let (cgroups, uid) = (self.shared.cgroups.load_full(), self.uid.clone());
        match tokio::task::spawn_blocking(move || cgroups.remove(uid.as_str())).await {
            Ok(Ok(())) => {
                // Nothing of the pod lives or is mounted any more.
                self.shared.users.release(self.uid.as_str());
                Outcome::Done
            }
            Ok(Err(error)) => {
                tracing::debug!(pod.uid = %self.uid, %error, "the pod's cgroup could not be removed yet");
                failed("", error.to_string())
            }
            Err(error) => failed("", error.to_string()),
        }
    }

    async fn create_sandbox(&self, attempt: u32, stop: Vec<SandboxId>) -> Outcome {
        let shared = &self.shared;
        if attempt > 0 {
            let message = "Pod sandbox changed, it will be killed and re-created.";
            shared.recorder.pod(&self.pod, Level::Normal, "SandboxChanged", message);
        }
        for id in stop {
            if let Err(error) = shared.runtime.stop_sandbox(id.as_str()).await {
                return self.troubled("FailedKillPod", format!("error killing pod: {error}"));
            }
        }
        let handler = match self.runtime_handler().await {
            Ok(handler) => handler,
            Err(message) => return self.troubled("FailedCreatePodSandBox", message),
        };
        let users = match self.users(&handler).await {
            Ok(users) => users,
            Err(error) => {
                return self.troubled("FailedCreatePodSandBox", format!("Failed to create pod sandbox: {error}"));
            }
        };
        let (cgroups, pod, logs) = (shared.cgroups.load_full(), self.pod.clone(), shared.log_dir(&self.pod));
        let prepared = tokio::task::spawn_blocking(move || {
            std::fs::create_dir_all(&logs).map_err(|error| format!("create {}: {error}", logs.display()))?;
            cgroups.create(&pod).map_err(|error| chain(&error))
        });
        match prepared.await {
            Ok(Ok(())) => {}
            Ok(Err(message)) => {
                return self
                    .troubled("FailedCreatePodContainer", format!("unable to ensure pod container exists: {message}"));
            }
            Err(error) => return failed("", error.to_string()),
        }
        if let Err(message) = spec::hosts::seen_host_name(&self.pod, &shared.config.cluster_domain) {
            return self.troubled("FailedCreatePodSandBox", format!("Failed to create pod sandbox: {message}"));
        }
        for message in self.dns().await.omitted {
            shared.recorder.pod(&self.pod, Level::Warning, "DNSConfigForming", message);
        }
        let config = self.sandbox_config(attempt, users).await;
        match shared.runtime.run_sandbox(config, handler).await {
            Ok(_) => Outcome::Done,
            Err(error) => self.troubled("FailedCreatePodSandBox", format!("Failed to create pod sandbox: {error}")),
        }
    }

    /// The pod's ids on the node, if it is to have a user namespace of its own.
    pub(super) async fn users(&self, handler: &str) -> Result<Option<Range>, String> {
        if !spec::wants_users(&self.pod) {
            return Ok(None);
        }
        let (users, uid) = (self.shared.users.clone(), self.uid.clone());
        if let Some(range) = users.of(uid.as_str()) {
            return Ok(Some(range));
        }
        let whose = match handler {
            "" => "runtime".to_owned(),
            name => format!("RuntimeClass handler {name:?}"),
        };
        let refused = format!("can't set `spec.hostUsers: false`, {whose} does not support user namespaces");
        let status = self.shared.runtime.status().await.map_err(|error| format!("{refused}: {error}"))?;
        let able = |known: &cri::RuntimeHandler| known.features.as_ref().is_some_and(|able| able.user_namespaces);
        if !status.runtime_handlers.iter().any(|known| known.name == handler && able(known)) {
            return Err(refused);
        }
        let taken = tokio::task::spawn_blocking(move || users.take(uid.as_str())).await;
        taken.map_err(|error| error.to_string())?.map(Some)
    }

    async fn dns(&self) -> dns::Formed {
        let config = &self.shared.config;
        let text = tokio::fs::read_to_string(&config.resolv_conf).await.unwrap_or_default();
        let cluster = dns::ClusterDns { servers: &config.cluster_dns, domain: &config.cluster_domain };
        dns::dns_config(&self.pod, &dns::parse_resolv_conf(&text), &cluster)
    }

    pub(super) async fn sandbox_config(&self, attempt: u32, users: Option<Range>) -> cri::PodSandboxConfig {
        let config = &self.shared.config;
        sandbox::sandbox_config(
            &self.pod,
            sandbox::SandboxFacts {
                attempt,
                log_directory: self.shared.log_dir(&self.pod).to_string_lossy().into_owned(),
                dns: self.dns().await.config,
                cgroup_parent: self.shared.cgroups.load().parent(&self.pod),
                cluster_domain: &config.cluster_domain,
                users,
            },
        )
    }

    /// The runtime handler of the pod's class; empty for the default.
    pub(super) async fn runtime_handler(&self) -> Result<String, String> {
        let class = self.pod.spec.as_ref().and_then(|spec| spec.runtime_class_name.clone());
        let Some(class) = class.filter(|class| !class.is_empty()) else { return Ok(String::new()) };
        match self.shared.objects.runtime_handler(&class).await {
            Ok(Some(handler)) => Ok(handler),
            Ok(None) => Err(format!("RuntimeClass \"{class}\" not found")),
            Err(error) => Err(chain(&error)),
        }
    }

    async fn run_pre_stop(&self, id: &ContainerId, name: &str, deadline: Timestamp) -> Outcome {
        let left = Duration::try_from(deadline.duration_since(Timestamp::now())).unwrap_or_default();
        if let Some(container) = self.container(name) {
            self.pre_stop(&container, id, left).await;
        }
        Outcome::Done
    }

    /// `why` comes with whether the preStop hook has run.
    async fn kill_container(
        &self,
        id: &ContainerId,
        name: &str,
        deadline: Timestamp,
        why: (KillReason, bool),
    ) -> Outcome {
        let (why, after_hook) = why;
        let message = match why {
            KillReason::PodEnding => format!("Stopping container {name}"),
            KillReason::SandboxChanged => format!("Stopping container {name}"),
            KillReason::DefinitionChanged => format!("Container {name} definition changed, will be restarted"),
            KillReason::Resized => format!("Container {name} resize requires restart"),
            KillReason::LivenessProbe => format!("Container {name} failed liveness probe, will be restarted"),
            KillReason::StartupProbe => format!("Container {name} failed startup probe, will be restarted"),
            KillReason::StateUnknown => {
                format!("Container {name} is in unknown state, try killing it before restart")
            }
        };
        self.shared.recorder.container(&self.pod, name, Level::Normal, "Killing", message);
        let left = || Duration::try_from(deadline.duration_since(Timestamp::now())).unwrap_or_default();
        if let Some(container) = self.container(name).filter(|_| !after_hook) {
            self.pre_stop(&container, id, left()).await;
        }
        // A hook may have used the time up; the container still gets a moment after SIGTERM.
        let grace = left().max(LEAST_GRACE);
        let whole_seconds = Duration::from_secs_f64(grace.as_secs_f64().round());
        match self.shared.runtime.stop_container(id.as_str(), whole_seconds).await {
            Ok(()) => Outcome::Done,
            Err(error) => self.troubled("FailedKillPod", format!("error killing pod: {error}")),
        }
    }

    async fn pre_stop(&self, container: &Container, id: &ContainerId, limit: Duration) {
        let handler = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.pre_stop.as_ref());
        let Some(handler) = handler.filter(|_| !limit.is_zero()) else { return };
        let hook = hooks::Hook { handler, container, container_id: id.as_str(), host: &self.pod_ip() };
        if let Err(message) = hooks::run(&self.shared.runtime, &hook, limit).await {
            let text = format!("PreStopHook failed: {message}");
            self.shared.recorder.container(&self.pod, &container.name, Level::Warning, "FailedPreStopHook", text);
        }
    }

    async fn remove_container(&self, id: &ContainerId, name: &str) -> Outcome {
        let record = self.observed.containers.iter().find(|container| container.id == *id);
        match self.shared.runtime.remove_container(id.as_str()).await {
            Ok(()) => {
                if let Some(link) = self.log_link(id, name) {
                    let _ = tokio::fs::remove_file(link).await;
                }
                if let Some(log) = record.map(|record| record.log_path.clone()).filter(|log| !log.is_empty()) {
                    remove_log(Path::new(&log)).await;
                }
                Outcome::Done
            }
            Err(error) => failed("", error.to_string()),
        }
    }

    /// The pod's cgroup may have to grow first or shrink last: it is set before, where the kernel lets it, and after.
    async fn resize_container(&self, id: &ContainerId, name: &str, confirm: bool) -> Outcome {
        let Some(container) = self.container(name) else { return failed("", "the container is gone") };
        let set_pod = || {
            let (cgroups, pod) = (self.shared.cgroups.load_full(), self.pod.clone());
            tokio::task::spawn_blocking(move || cgroups.create(&pod))
        };
        let _ = set_pod().await;
        let resources = spec::resources::linux_resources(&self.pod, &container, self.shared.node_limits());
        let recorder = &self.shared.recorder;
        if let Err(error) = self.shared.runtime.update_resources(id.as_str(), resources).await {
            if confirm && error.unimplemented() {
                return Outcome::Done;
            }
            let message = format!("failed to resize container {name}: {}", error.description());
            if !confirm {
                recorder.container(&self.pod, name, Level::Warning, "ResizeError", message.clone());
            }
            return failed("", message);
        }
        match set_pod().await {
            Ok(Ok(())) if confirm => Outcome::Done,
            Ok(Ok(())) => {
                recorder.pod(&self.pod, Level::Normal, "ResizeCompleted", format!("Container {name} was resized"));
                Outcome::Done
            }
            Ok(Err(error)) => failed("", chain(&error)),
            Err(error) => failed("", error.to_string()),
        }
    }

    async fn finish_deletion(&self) -> Outcome {
        let api: Api<Pod> = Api::namespaced(self.shared.client.clone(), spec::pod_namespace(&self.pod));
        let uid = Some(self.uid.to_string());
        let params = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions { uid, resource_version: None }),
            ..Default::default()
        };
        match tokio::time::timeout(CALL, api.delete(spec::pod_name(&self.pod), &params)).await {
            Ok(Ok(_)) => Outcome::Done,
            Ok(Err(kube::Error::Api(refusal))) if refusal.code == 404 || refusal.code == 409 => Outcome::Done,
            Ok(Err(error)) => failed("", error.to_string()),
            Err(_) => failed("", "deleting the pod timed out"),
        }
    }

    pub(super) fn container(&self, name: &str) -> Option<Container> {
        self.pod.spec.as_ref().and_then(|spec| spec::find_container(spec, name)).map(|(container, _)| container)
    }

    /// Addresses of the pod as its containers see them.
    pub(super) fn pod_ips(&self) -> Vec<String> {
        if spec::host_network(&self.pod) {
            return self.shared.host_ips();
        }
        self.observed.current_sandbox().map(|sandbox| sandbox.ips.clone()).unwrap_or_default()
    }

    pub(super) fn pod_ip(&self) -> String {
        self.pod_ips().first().cloned().unwrap_or_default()
    }

    /// `<pod>_<namespace>_<container>-<id>.log` among the container logs.
    pub(super) fn log_link(&self, id: &ContainerId, name: &str) -> Option<std::path::PathBuf> {
        let dir = self.shared.config.container_logs_dir.as_ref()?;
        let (pod, namespace) = (spec::pod_name(&self.pod), spec::pod_namespace(&self.pod));
        Some(dir.join(format!("{pod}_{namespace}_{name}-{id}.log")))
    }
}

/// Removes a container's log with its rotated parts; then its directories, if nothing else is in them.
async fn remove_log(log: &Path) {
    let Some(dir) = log.parent() else { return };
    let Some(name) = log.file_name().and_then(|name| name.to_str()) else { return };
    if let Ok(mut entries) = tokio::fs::read_dir(dir).await {
        while let Ok(Some(entry)) = entries.next_entry().await {
            if entry.file_name().to_str().is_some_and(|entry| entry.starts_with(name)) {
                let _ = tokio::fs::remove_file(entry.path()).await;
            }
        }
    }
    if tokio::fs::remove_dir(dir).await.is_ok()
        && let Some(pod_dir) = dir.parent()
    {
        let _ = tokio::fs::remove_dir(pod_dir).await;
    }
}

/// Removes a pod's log directory where no log is left in it.
async fn remove_empty(dir: &Path) {
    if let Ok(mut entries) = tokio::fs::read_dir(dir).await {
        while let Ok(Some(entry)) = entries.next_entry().await {
            let _ = tokio::fs::remove_dir(entry.path()).await;
        }
    }
    let _ = tokio::fs::remove_dir(dir).await;
}
