//! A container as the runtime is asked for it. Pure: environment, mounts and image come in resolved.

use std::collections::HashMap;

use k8s_openapi::api::core::v1::{Container, Pod};
use oarlock_proto::cri;

use super::expand::expand;
use super::{devices, hash, names, resources, sandbox, security};
use crate::assignment::Assigned;
use crate::users::Range;

/// What beside the pod a container needs to know.
pub(crate) struct ContainerFacts {
    pub restart_count: u32,
    /// What the runtime calls the image, and what the pod calls it.
    pub image_ref: String,
    pub image_user: security::ImageUser,
    pub env: Vec<(String, String)>,
    pub mounts: Vec<cri::Mount>,
    /// Volumes that are block devices.
    pub devices: Vec<cri::Device>,
    pub node: resources::NodeLimits,
    /// What the container has of the node for itself.
    pub assigned: Assigned,
    /// Containers without a seccomp profile get the runtime's.
    pub seccomp_default: bool,
    /// The container whose processes an ephemeral container sees.
    pub target: Option<String>,
    /// The pod's ids on the node, in a user namespace of its own.
    pub users: Option<Range>,
    pub seccomp_root: std::path::PathBuf,
    pub runtime_handler: String,
}

/// The container; Err is a CreateContainerConfigError message.
pub(crate) fn container_config(
    pod: &Pod,
    container: &Container,
    facts: ContainerFacts,
) -> Result<cri::ContainerConfig, String> {
    let lookup = |name: &str| facts.env.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone());
    let expanded = |list: &Option<Vec<String>>| -> Vec<String> {
        list.iter().flatten().map(|text| expand(text, lookup)).collect()
    };
    let profiles = security::Profiles { root: &facts.seccomp_root, by_default: facts.seccomp_default };
    let shares = security::Shares { target: facts.target.as_deref(), users: facts.users };
    let context = security::container_context(pod, container, &facts.image_user, shares, profiles)?;
    let mut limits = resources::linux_resources(pod, container, facts.node);
    limits.cpuset_cpus = facts.assigned.cpus.clone();
    limits.cpuset_mems = facts.assigned.memory_nodes.clone();
    let mut config = cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata { name: container.name.clone(), attempt: facts.restart_count }),
        image: Some(cri::ImageSpec {
            image: facts.image_ref.clone(),
            user_specified_image: container.image.clone().unwrap_or_default(),
            runtime_handler: facts.runtime_handler.clone(),
            ..Default::default()
        }),
        command: expanded(&container.command),
        args: expanded(&container.args),
        working_dir: container.working_dir.clone().unwrap_or_default(),
        envs: facts
            .env
            .iter()
            .map(|(key, value)| cri::KeyValue { key: key.clone(), value: value.clone().into() })
            .collect(),
        mounts: facts.mounts,
        devices: facts.devices,
        labels: labels(pod, container),
        annotations: annotations(pod, container, facts.restart_count),
        log_path: format!("{}/{}.log", container.name, facts.restart_count),
        stdin: container.stdin.unwrap_or(false),
        stdin_once: container.stdin_once.unwrap_or(false),
        tty: container.tty.unwrap_or(false),
        linux: Some(cri::LinuxContainerConfig { resources: Some(limits), security_context: Some(context) }),
        windows: None,
        cdi_devices: Vec::new(),
        stop_signal: stop_signal(container) as i32,
    };
    for answer in &facts.assigned.answers {
        devices::add(&mut config, answer);
    }
    // Files belong inside to whom they belong outside: a volume looks the same in every pod.
    for mount in &mut config.mounts {
        mount.uid_mappings = facts.users.map(Range::mapping).unwrap_or_default();
        mount.gid_mappings = facts.users.map(Range::mapping).unwrap_or_default();
    }
    Ok(config)
}

fn labels(pod: &Pod, container: &Container) -> HashMap<String, String> {
    let mut labels = sandbox::identity_labels(pod);
    labels.insert(names::CONTAINER_NAME.to_owned(), container.name.clone());
    labels
}

fn annotations(pod: &Pod, container: &Container, restart_count: u32) -> HashMap<String, String> {
    let mut annotations = HashMap::from([
        (names::HASH.to_owned(), hash::container_hash(container)),
        (names::RESTART_COUNT.to_owned(), restart_count.to_string()),
        (names::TERMINATION_PATH.to_owned(), container.termination_message_path.clone().unwrap_or_default()),
        (names::TERMINATION_POLICY.to_owned(), container.termination_message_policy.clone().unwrap_or_default()),
    ]);
    if container.resources.is_some() {
        annotations.insert(names::RESOURCES.to_owned(), crate::resize::as_json(container));
    }
    if let Some(grace) = pod.metadata.deletion_grace_period_seconds {
        annotations.insert(names::POD_DELETION_GRACE.to_owned(), grace.to_string());
    }
    if let Some(grace) = pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds) {
        annotations.insert(names::POD_TERMINATION_GRACE.to_owned(), grace.to_string());
    }
    let pre_stop = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.pre_stop.as_ref());
    if let Some(json) = pre_stop.and_then(|handler| serde_json::to_string(handler).ok()) {
        annotations.insert(names::PRE_STOP.to_owned(), json);
    }
    if let Some(json) = container.ports.as_ref().and_then(|ports| serde_json::to_string(ports).ok()) {
        annotations.insert(names::PORTS.to_owned(), json);
    }
    annotations
}

/// lifecycle.stopSignal by CRI's name for it.
fn stop_signal(container: &Container) -> cri::Signal {
    let name = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.stop_signal.as_deref());
    let wanted = name.map(|name| format!("SIGNAL_{}", name.replace('+', "PLUS").replace('-', "MINUS")));
    wanted.and_then(|name| cri::Signal::from_str_name(&name)).unwrap_or(cri::Signal::RuntimeDefault)
}

/// A mount's propagation.
pub(crate) fn propagation(mode: Option<&str>) -> cri::MountPropagation {
    match mode {
        Some("HostToContainer") => cri::MountPropagation::PropagationHostToContainer,
        Some("Bidirectional") => cri::MountPropagation::PropagationBidirectional,
        _ => cri::MountPropagation::PropagationPrivate,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_expand_and_the_identity_is_upstreams() {
        let pod: Pod = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "p", "namespace": "n", "uid": "u"},
            "spec": {"terminationGracePeriodSeconds": 5, "containers": [
                {"name": "c", "image": "i", "args": ["--x=$(A)"], "lifecycle": {"stopSignal": "SIGRTMIN+3"}}]},
        }))
        .expect("a pod");
        let container = &pod.spec.as_ref().unwrap().containers[0];
        let facts = ContainerFacts {
            restart_count: 3,
            image_ref: "sha256:1".into(),
            image_user: Default::default(),
            env: vec![("A".into(), "1".into())],
            mounts: Vec::new(),
            devices: Vec::new(),
            node: resources::NodeLimits {
                memory_bytes: 1 << 30,
                cpu_period_us: Some(100_000),
                swap: Default::default(),
            },
            assigned: Assigned::default(),
            seccomp_default: false,
            target: None,
            users: None,
            seccomp_root: "/s".into(),
            runtime_handler: String::new(),
        };
        let config = container_config(&pod, container, facts).expect("a configuration");
        assert_eq!(config.args, ["--x=1"]);
        assert_eq!(config.log_path, "c/3.log");
        assert_eq!(config.labels["io.kubernetes.container.name"], "c");
        assert_eq!(config.annotations["io.kubernetes.container.restartCount"], "3");
        assert_eq!(config.annotations["io.kubernetes.pod.terminationGracePeriod"], "5");
        assert_eq!(config.stop_signal, cri::Signal::Sigrtminplus3 as i32);
    }
}
