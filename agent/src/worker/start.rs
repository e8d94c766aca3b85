//! Starting a container: environment, mounts, create, start, postStart hook.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, VolumeDevice};
use oarlock_proto::cri;

use super::actions::{Job, failed};
use crate::error::chain;
use crate::model::ContainerId;
use crate::plan::Outcome;
use crate::recorder::Level;
use crate::spec::container::{ContainerFacts, container_config, propagation};
use crate::spec::env::{Sources, environment, file_references, references, service_variables};
use crate::spec::env_file;
use crate::spec::expand::expand;
use crate::spec::security::ImageUser;
use crate::{hooks, spec};

/// A postStart hook has no limit of its own; this one ends it when the pod's grace period would seem endless.
const POST_START: Duration = Duration::from_secs(3600);

/// A start that failed: a container's waiting reason and a message.
type Failure = (&'static str, String);

impl Job {
    pub(super) async fn start_container(&self, name: &str, restart_count: u32) -> Outcome {
        let Some(container) = self.container(name) else { return failed("", "the container is gone") };
        match self.try_start(&container, restart_count).await {
            Ok(()) => Outcome::Done,
            Err(_) if self.cancel.is_cancelled() => Outcome::Cancelled,
            Err((reason, message)) => {
                let text = format!("Error: {message}");
                self.shared.recorder.container(&self.pod, name, Level::Warning, "Failed", text);
                failed(reason, message)
            }
        }
    }

    async fn try_start(&self, container: &Container, restart_count: u32) -> Result<(), Failure> {
        let shared = &self.shared;
        let sandbox = self.observed.current_sandbox().ok_or(("CreateContainerError", "no sandbox".to_owned()))?;
        let image_ref = self.image.clone().ok_or(("CreateContainerError", "no image".to_owned()))?;
        let config_error = |message: String| ("CreateContainerConfigError", message);
        let assigned = shared.assignments.prepare(self.uid.as_str(), &container.name).await.map_err(config_error)?;
        let users = shared.users.of(self.uid.as_str());
        if users.is_none() && spec::wants_users(&self.pod) {
            return Err(config_error("the pod's user namespace is not known any more".to_owned()));
        }
        let (env, image_user, sandbox_config, handler) = tokio::join!(
            self.environment(container),
            self.image_user(&image_ref),
            self.sandbox_config(sandbox.attempt, users),
            self.runtime_handler(),
        );
        let env = env.map_err(config_error)?;
        let mounts = self.mounts(container, &env).await.map_err(config_error)?;
        let facts = ContainerFacts {
            restart_count,
            image_ref,
            image_user: image_user.map_err(config_error)?,
            env,
            mounts,
            devices: self.block_devices(container).map_err(config_error)?,
            node: shared.node_limits(),
            assigned,
            seccomp_default: shared.config.seccomp_default,
            target: self.target(&container.name),
            users,
            seccomp_root: shared.config.data_dir.join("seccomp"),
            runtime_handler: handler.map_err(config_error)?,
        };
        let config = container_config(&self.pod, container, facts).map_err(config_error)?;
        let log_dir = shared.log_dir(&self.pod).join(&container.name);
        tokio::fs::create_dir_all(&log_dir)
            .await
            .map_err(|error| ("CreateContainerError", format!("create {}: {error}", log_dir.display())))?;
        if self.cancel.is_cancelled() {
            return Err(("CreateContainerError", "the pod is ending".to_owned()));
        }
        if restart_count > 0 {
            // It may have been restarted to become larger, and has to fit into the pod's group. Where that is to become smaller
            // and cannot yet, the next one that starts brings it there.
            let latest = shared.table.get(&self.uid).map(|entry| entry.pod);
            let (cgroups, pod) = (shared.cgroups.load_full(), latest.unwrap_or_else(|| self.pod.clone()));
            let _ = tokio::task::spawn_blocking(move || cgroups.create(&pod)).await;
        }
        let log = log_dir.join(format!("{restart_count}.log"));
        let created = shared.runtime.create_container(sandbox.id.as_str(), config, sandbox_config).await;
        let id = ContainerId::from(created.map_err(|error| ("CreateContainerError", error.description()))?);
        let told = format!("Created container: {}", container.name);
        shared.recorder.container(&self.pod, &container.name, Level::Normal, "Created", told);
        shared
            .runtime
            .start_container(id.as_str())
            .await
            .map_err(|error| ("RunContainerError", error.description()))?;
        let told = format!("Started container {}", container.name);
        shared.recorder.container(&self.pod, &container.name, Level::Normal, "Started", told);
        self.link_log(&id, &container.name, &log).await;
        self.post_start(container, &id).await
    }

    async fn post_start(&self, container: &Container, id: &ContainerId) -> Result<(), Failure> {
        let handler = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.post_start.as_ref());
        let Some(handler) = handler else { return Ok(()) };
        let hook = hooks::Hook { handler, container, container_id: id.as_str(), host: &self.pod_ip() };
        let result = tokio::select! {
            result = hooks::run(&self.shared.runtime, &hook, POST_START) => result,
            () = self.cancel.cancelled() => return Ok(()),
        };
        let Err(message) = result else { return Ok(()) };
        let recorder = &self.shared.recorder;
        let text = format!("PostStartHook failed: {message}");
        recorder.container(&self.pod, &container.name, Level::Warning, "FailedPostStartHook", text.clone());
        let told = format!("FailedPostStartHook for container {}", container.name);
        recorder.container(&self.pod, &container.name, Level::Normal, "Killing", told);
        let grace = self.pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds).unwrap_or(30);
        let grace = Duration::from_secs(u64::try_from(grace).unwrap_or(0));
        let _ = self.shared.runtime.stop_container(id.as_str(), grace).await;
        Err(("PostStartHookError", text))
    }

    /// A symbolic link by which log collectors find the log.
    async fn link_log(&self, id: &ContainerId, name: &str, log: &Path) {
        let Some(link) = self.log_link(id, name) else { return };
        if let Some(dir) = link.parent() {
            let _ = tokio::fs::create_dir_all(dir).await;
        }
        if let Err(error) = tokio::fs::symlink(log, &link).await
            && error.kind() != std::io::ErrorKind::AlreadyExists
        {
            tracing::debug!(container.id = %id, %error, "the log could not be linked");
        }
    }

    async fn image_user(&self, image_ref: &str) -> Result<ImageUser, String> {
        let image = self.shared.runtime.image_status(image_ref).await.map_err(|error| error.to_string())?;
        let image = image.ok_or_else(|| format!("image {image_ref:?} is not there any more"))?;
        Ok(ImageUser { uid: image.uid.map(|uid| uid.value), name: image.username })
    }

    /// The container whose processes an ephemeral container is to see.
    fn target(&self, name: &str) -> Option<String> {
        let mut ephemerals = self.pod.spec.as_ref()?.ephemeral_containers.as_ref()?.iter();
        let target = ephemerals.find(|container| container.name == name)?.target_container_name.clone()?;
        let record = self.observed.latest(&target).filter(|record| record.live())?;
        Some(record.id.to_string())
    }

    async fn environment(&self, container: &Container) -> Result<Vec<(String, String)>, String> {
        let shared = &self.shared;
        let namespace = spec::pod_namespace(&self.pod);
        let spec = self.pod.spec.clone().unwrap_or_default();
        let (maps, secrets) = references(container);
        let mut config_maps = BTreeMap::new();
        for name in maps {
            let found = shared.objects.fetch_config_map(namespace, &name).await.map_err(|error| chain(&error))?;
            config_maps.insert(name, found);
        }
        let mut found_secrets = BTreeMap::new();
        for name in secrets {
            let found = shared.objects.fetch_secret(namespace, &name).await.map_err(|error| chain(&error))?;
            found_secrets.insert(name, found);
        }
        let services = if spec::is_static(&self.pod) {
            Vec::new()
        } else {
            let all = shared.objects.services().await;
            let all = all.ok_or("services have not yet been read at least once, cannot construct envvars")?;
            service_variables(&all, namespace, spec.enable_service_links.unwrap_or(true))
        };
        let mut env_files = BTreeMap::new();
        for (volume, path) in file_references(container) {
            let read = shared.volumes.read_file(&self.pod, &volume, &path, env_file::MAX_BYTES).await;
            let read = read.map_err(|error| error.full_message());
            let parsed = read.and_then(|bytes| match bytes {
                Some(bytes) => env_file::parse(&String::from_utf8_lossy(&bytes)).map(Some),
                None => Ok(None),
            });
            env_files.insert((volume, path), parsed);
        }
        let pod_ips = self.pod_ips();
        let sources = Sources {
            pod_ips: &pod_ips,
            host_ips: &shared.host_ips(),
            node_name: &shared.config.node_name,
            service_account: spec.service_account_name.as_deref().unwrap_or_default(),
            config_maps,
            secrets: found_secrets,
            env_files,
            services,
            allocatable: shared.capacity.allocatable.clone(),
        };
        environment(&self.pod, container, &sources)
    }

    async fn mounts(&self, container: &Container, env: &[(String, String)]) -> Result<Vec<cri::Mount>, String> {
        let mut mounts = Vec::new();
        for mount in container.volume_mounts.iter().flatten() {
            let mut wanted = mount.clone();
            if let Some(expression) = wanted.sub_path_expr.take().filter(|text| !text.is_empty()) {
                let known = |name: &str| env.iter().find(|(n, _)| n == name).map(|(_, value)| value.clone());
                wanted.sub_path = Some(expand(&expression, known));
            }
            if let Some(image) = spec::image::image_volume(&self.pod, &mount.name) {
                mounts.push(self.image_mount(image, &wanted).await?);
                continue;
            }
            let host_path = self.shared.volumes.host_path(&self.pod, &container.name, &wanted).await;
            let host_path = host_path.map_err(|error| error.full_message())?;
            let read_only = mount.read_only.unwrap_or(false) || self.shared.volumes.read_only(&self.pod, mount);
            let recursive = matches!(mount.recursive_read_only.as_deref(), Some("Enabled" | "IfPossible"));
            mounts.push(cri::Mount {
                container_path: absolute(&mount.mount_path),
                host_path: text(&host_path),
                readonly: read_only,
                propagation: propagation(mount.mount_propagation.as_deref()) as i32,
                recursive_read_only: read_only && recursive,
                ..Default::default()
            });
        }
        let taken = |mounts: &[cri::Mount], path: &str| mounts.iter().any(|mount| mount.container_path == path);
        if !taken(&mounts, "/etc/hosts") {
            mounts.push(self.hosts_mount(container).await?);
        }
        let message_path = container.termination_message_path.as_deref().unwrap_or("/dev/termination-log");
        if !message_path.is_empty() && !taken(&mounts, message_path) {
            mounts.push(self.message_mount(container, message_path).await?);
        }
        Ok(mounts)
    }

    /// The container's volumeDevices.
    fn block_devices(&self, container: &Container) -> Result<Vec<cri::Device>, String> {
        let wanted = container.volume_devices.iter().flatten();
        let one = |device: &VolumeDevice| {
            let found = self.shared.volumes.device(&self.pod, &device.name);
            let (path, read_only) = found.map_err(|error| error.full_message())?;
            Ok(cri::Device {
                container_path: device.device_path.clone(),
                host_path: text(&path),
                permissions: if read_only { "r" } else { "mrw" }.to_owned(),
            })
        };
        wanted.map(one).collect()
    }

    /// The pod's hosts file, the agent's own, made anew for each container start.
    async fn hosts_mount(&self, container: &Container) -> Result<cri::Mount, String> {
        let dir = self.shared.pod_dir(self.uid.as_str());
        let path = dir.join("etc-hosts");
        let node_hosts = match spec::host_network(&self.pod) {
            true => tokio::fs::read_to_string("/etc/hosts").await.unwrap_or_default(),
            false => String::new(),
        };
        let domain = &self.shared.config.cluster_domain;
        let content = spec::hosts::hosts_file(&self.pod, &self.pod_ips(), domain, &node_hosts);
        write_shared(&dir, &path, content.as_bytes(), 0o644)
            .await
            .map_err(|error| format!("write {}: {error}", path.display()))?;
        let context = container.security_context.as_ref();
        let readonly = context.and_then(|context| context.read_only_root_filesystem).unwrap_or(false);
        Ok(cri::Mount {
            container_path: "/etc/hosts".to_owned(),
            host_path: text(&path),
            readonly,
            ..Default::default()
        })
    }

    /// A fresh file for the container's last words.
    async fn message_mount(&self, container: &Container, inside: &str) -> Result<cri::Mount, String> {
        let dir = self.shared.pod_dir(self.uid.as_str()).join("containers").join(&container.name);
        let path = dir.join(format!("{:08x}", rand::random::<u32>()));
        write_shared(&dir, &path, b"", 0o666).await.map_err(|error| format!("write {}: {error}", path.display()))?;
        Ok(cri::Mount { container_path: inside.to_owned(), host_path: text(&path), ..Default::default() })
    }
}

/// Writes a file that is mounted into containers; written in place, since a mount shows the file and not its name.
async fn write_shared(dir: &Path, path: &Path, content: &[u8], mode: u32) -> std::io::Result<()> {
    tokio::fs::create_dir_all(dir).await?;
    tokio::fs::write(path, content).await?;
    tokio::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).await
}

pub(super) fn absolute(path: &str) -> String {
    if path.starts_with('/') { path.to_owned() } else { format!("/{path}") }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
