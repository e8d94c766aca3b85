//! From a pod's specification to what the runtime is asked for. Pure: everything that must be fetched or read comes in as
//! an argument.

pub(crate) mod container;
pub(crate) mod devices;
pub(crate) mod dns;
pub(crate) mod env;
pub(crate) mod env_file;
pub(crate) mod expand;
pub(crate) mod hash;
pub(crate) mod hosts;
pub(crate) mod image;
pub(crate) mod resources;
pub(crate) mod sandbox;
pub(crate) mod security;

use k8s_openapi::api::core::v1::{Container, EphemeralContainer, Pod, PodSpec};

/// Label and annotation names that every kubelet puts on sandboxes and containers, so that one can follow another.
pub(crate) mod names {
    pub(crate) const POD_NAME: &str = "io.kubernetes.pod.name";
    pub(crate) const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
    pub(crate) const POD_UID: &str = "io.kubernetes.pod.uid";
    pub(crate) const CONTAINER_NAME: &str = "io.kubernetes.container.name";
    pub(crate) const HASH: &str = "io.kubernetes.container.hash";
    pub(crate) const RESTART_COUNT: &str = "io.kubernetes.container.restartCount";
    pub(crate) const TERMINATION_PATH: &str = "io.kubernetes.container.terminationMessagePath";
    pub(crate) const TERMINATION_POLICY: &str = "io.kubernetes.container.terminationMessagePolicy";
    pub(crate) const PRE_STOP: &str = "io.kubernetes.container.preStopHandler";
    /// The resources that a container was made with, as JSON.
    pub(crate) const RESOURCES: &str = "oarlock.io/container.resources";
    pub(crate) const PORTS: &str = "io.kubernetes.container.ports";
    pub(crate) const POD_DELETION_GRACE: &str = "io.kubernetes.pod.deletionGracePeriod";
    pub(crate) const POD_TERMINATION_GRACE: &str = "io.kubernetes.pod.terminationGracePeriod";
    /// Where a pod comes from: `api` or `file`.
    pub(crate) const CONFIG_SOURCE: &str = "kubernetes.io/config.source";
    pub(crate) const CONFIG_HASH: &str = "kubernetes.io/config.hash";
    pub(crate) const CONFIG_SEEN: &str = "kubernetes.io/config.seen";
    /// On a mirror pod: the hash of the manifest it mirrors.
    pub(crate) const CONFIG_MIRROR: &str = "kubernetes.io/config.mirror";
}

pub(crate) fn pod_name(pod: &Pod) -> &str {
    pod.metadata.name.as_deref().unwrap_or_default()
}

pub(crate) fn pod_namespace(pod: &Pod) -> &str {
    pod.metadata.namespace.as_deref().unwrap_or("default")
}

pub(crate) fn pod_uid(pod: &Pod) -> &str {
    pod.metadata.uid.as_deref().unwrap_or_default()
}

/// `name_namespace(uid)`, as messages show a pod.
pub(crate) fn shown_name(pod: &Pod) -> String {
    format!("{}_{}({})", pod_name(pod), pod_namespace(pod), pod_uid(pod))
}

pub(crate) fn host_network(pod: &Pod) -> bool {
    pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or(false)
}

/// Whether the pod came from a manifest on this node rather than from the API.
pub(crate) fn is_static(pod: &Pod) -> bool {
    annotation(pod, names::CONFIG_SOURCE).is_some_and(|source| source != "api")
}

/// Whether the pod is to have a user namespace of its own.
pub(crate) fn wants_users(pod: &Pod) -> bool {
    pod.spec.as_ref().and_then(|spec| spec.host_users) == Some(false)
}

/// Whether the object only mirrors a static pod.
pub(crate) fn is_mirror(pod: &Pod) -> bool {
    annotation(pod, names::CONFIG_MIRROR).is_some()
}

pub(crate) fn annotation<'a>(pod: &'a Pod, name: &str) -> Option<&'a str> {
    pod.metadata.annotations.as_ref().and_then(|all| all.get(name)).map(String::as_str)
}

/// The ephemeral container's fields that it shares with every other container.
pub(crate) fn ephemeral_as_container(ephemeral: &EphemeralContainer) -> Container {
    let of = ephemeral.clone();
    Container {
        args: of.args,
        command: of.command,
        env: of.env,
        env_from: of.env_from,
        image: of.image,
        image_pull_policy: of.image_pull_policy,
        name: of.name,
        resources: of.resources,
        security_context: of.security_context,
        stdin: of.stdin,
        stdin_once: of.stdin_once,
        termination_message_path: of.termination_message_path,
        termination_message_policy: of.termination_message_policy,
        tty: of.tty,
        volume_devices: of.volume_devices,
        volume_mounts: of.volume_mounts,
        working_dir: of.working_dir,
        ..Container::default()
    }
}

/// The container of that name, of whatever kind; with the JSON path that events name it by.
pub(crate) fn find_container(spec: &PodSpec, name: &str) -> Option<(Container, String)> {
    let init = spec.init_containers.iter().flatten().find(|c| c.name == name);
    if let Some(found) = init {
        return Some((found.clone(), format!("spec.initContainers{{{name}}}")));
    }
    if let Some(found) = spec.containers.iter().find(|c| c.name == name) {
        return Some((found.clone(), format!("spec.containers{{{name}}}")));
    }
    let ephemeral = spec.ephemeral_containers.iter().flatten().find(|c| c.name == name)?;
    Some((ephemeral_as_container(ephemeral), format!("spec.ephemeralContainers{{{name}}}")))
}
