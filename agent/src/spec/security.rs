//! Security contexts of pods and containers as the runtime takes them. Pure.

use k8s_openapi::api::core::v1::{AppArmorProfile, Container, Pod, PodSecurityContext, SELinuxOptions, SeccompProfile};
use oarlock_proto::cri;

use crate::users::Range;

/// Hidden in /proc and /sys unless procMount is Unmasked.
const MASKED_PATHS: &[&str] = &[
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
const READ_ONLY_PATHS: &[&str] = &["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Who an image says its processes run as.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ImageUser {
    pub uid: Option<i64>,
    pub name: String,
}

fn pod_context(pod: &Pod) -> PodSecurityContext {
    pod.spec.as_ref().and_then(|spec| spec.security_context.clone()).unwrap_or_default()
}

fn wrap(value: Option<i64>) -> Option<cri::Int64Value> {
    value.map(|value| cri::Int64Value { value })
}

/// Whose namespaces a container is in beside those that the pod's own fields say.
#[derive(Clone, Copy, Default)]
pub(crate) struct Shares<'a> {
    /// The container whose processes it sees.
    pub target: Option<&'a str>,
    /// The pod's ids on the node, in a user namespace of its own.
    pub users: Option<Range>,
}

/// Which namespaces the pod shares, and with whom.
pub(crate) fn namespaces(pod: &Pod, container_target: Option<&str>, users: Option<Range>) -> cri::NamespaceOption {
    let spec = pod.spec.clone().unwrap_or_default();
    let on_node = |flag: Option<bool>| flag.unwrap_or(false);
    let pid = if container_target.is_some() {
        cri::NamespaceMode::Target
    } else if on_node(spec.host_pid) {
        cri::NamespaceMode::Node
    } else if on_node(spec.share_process_namespace) {
        cri::NamespaceMode::Pod
    } else {
        cri::NamespaceMode::Container
    };
    let shared = |flag| if on_node(flag) { cri::NamespaceMode::Node } else { cri::NamespaceMode::Pod };
    cri::NamespaceOption {
        network: shared(spec.host_network) as i32,
        ipc: shared(spec.host_ipc) as i32,
        pid: pid as i32,
        target_id: container_target.unwrap_or_default().to_owned(),
        userns_options: Some(user_namespace(users)),
    }
}

/// The pod's own user namespace, or the node's.
fn user_namespace(users: Option<Range>) -> cri::UserNamespace {
    match users {
        Some(range) => {
            cri::UserNamespace { mode: cri::NamespaceMode::Pod as i32, uids: range.mapping(), gids: range.mapping() }
        }
        None => cri::UserNamespace { mode: cri::NamespaceMode::Node as i32, ..Default::default() },
    }
}

fn groups_policy(context: &PodSecurityContext) -> i32 {
    match context.supplemental_groups_policy.as_deref() {
        Some("Strict") => cri::SupplementalGroupsPolicy::Strict as i32,
        _ => cri::SupplementalGroupsPolicy::Merge as i32,
    }
}

fn groups(context: &PodSecurityContext, extra: &[i64]) -> Vec<i64> {
    let mut groups = Vec::new();
    for group in context.fs_group.into_iter().chain(context.supplemental_groups.clone().unwrap_or_default()) {
        if !groups.contains(&group) {
            groups.push(group);
        }
    }
    groups.extend(extra.iter().copied());
    groups
}

fn selinux(options: Option<&SELinuxOptions>) -> Option<cri::SeLinuxOption> {
    options.cloned().map(|options| cri::SeLinuxOption {
        user: options.user.unwrap_or_default(),
        role: options.role.unwrap_or_default(),
        r#type: options.type_.unwrap_or_default(),
        level: options.level.unwrap_or_default(),
    })
}

/// Where Localhost seccomp profiles lie, and whether a container without a profile gets the runtime's.
#[derive(Clone, Copy)]
pub(crate) struct Profiles<'a> {
    pub root: &'a std::path::Path,
    pub by_default: bool,
}

fn seccomp(profile: Option<&SeccompProfile>, profiles: Profiles<'_>) -> cri::SecurityProfile {
    use cri::security_profile::ProfileType;
    let (kind, localhost_ref) = match profile.map(|profile| (profile.type_.as_str(), &profile.localhost_profile)) {
        Some(("RuntimeDefault", _)) => (ProfileType::RuntimeDefault, String::new()),
        Some(("Localhost", Some(name))) => {
            (ProfileType::Localhost, profiles.root.join(name).to_string_lossy().into_owned())
        }
        None if profiles.by_default => (ProfileType::RuntimeDefault, String::new()),
        _ => (ProfileType::Unconfined, String::new()),
    };
    cri::SecurityProfile { profile_type: kind as i32, localhost_ref }
}

fn apparmor(profile: Option<&AppArmorProfile>) -> Option<cri::SecurityProfile> {
    use cri::security_profile::ProfileType;
    let profile = profile?;
    let (kind, localhost_ref) = match profile.type_.as_str() {
        "Unconfined" => (ProfileType::Unconfined, String::new()),
        "Localhost" => (ProfileType::Localhost, profile.localhost_profile.clone().unwrap_or_default()),
        _ => (ProfileType::RuntimeDefault, String::new()),
    };
    Some(cri::SecurityProfile { profile_type: kind as i32, localhost_ref })
}

/// The sandbox's security context.
pub(crate) fn sandbox_context(pod: &Pod, users: Option<Range>) -> cri::LinuxSandboxSecurityContext {
    let context = pod_context(pod);
    let spec = pod.spec.clone().unwrap_or_default();
    let privileged = |c: &Container| c.security_context.as_ref().and_then(|s| s.privileged).unwrap_or(false);
    let any_privileged = spec.containers.iter().chain(spec.init_containers.iter().flatten()).any(privileged);
    cri::LinuxSandboxSecurityContext {
        namespace_options: Some(namespaces(pod, None, users)),
        selinux_options: selinux(context.se_linux_options.as_ref()),
        run_as_user: wrap(context.run_as_user),
        run_as_group: wrap(context.run_as_group),
        readonly_rootfs: false,
        supplemental_groups: groups(&context, &[]),
        supplemental_groups_policy: groups_policy(&context),
        privileged: any_privileged,
        // Nothing of the pod's own runs in the sandbox itself; the runtime's default fits it.
        seccomp: Some(cri::SecurityProfile::default()),
        apparmor: apparmor(context.app_armor_profile.as_ref()),
        ..Default::default()
    }
}

/// A container's security context. Err is a CreateContainerConfigError message.
pub(crate) fn container_context(
    pod: &Pod,
    container: &Container,
    image: &ImageUser,
    shares: Shares<'_>,
    profiles: Profiles<'_>,
) -> Result<cri::LinuxContainerSecurityContext, String> {
    let pod_level = pod_context(pod);
    let own = container.security_context.clone().unwrap_or_default();
    let run_as_user = own.run_as_user.or(pod_level.run_as_user);
    let run_as_group = own.run_as_group.or(pod_level.run_as_group);
    let non_root = own.run_as_non_root.or(pod_level.run_as_non_root).unwrap_or(false);
    if non_root {
        check_non_root(pod, container, run_as_user, image)?;
    }
    // Without a user of the pod's own, the image's decides; the runtime needs to be told either way.
    let (user, username) = match (run_as_user, image.uid, image.name.as_str()) {
        (Some(uid), _, _) => (Some(uid), String::new()),
        (None, Some(uid), _) => (Some(uid), String::new()),
        (None, None, name) => (None, name.to_owned()),
    };
    let privileged = own.privileged.unwrap_or(false);
    let unmasked = own.proc_mount.as_deref() == Some("Unmasked");
    let paths = |list: &[&str]| -> Vec<String> {
        if unmasked || privileged { Vec::new() } else { list.iter().map(|&path| path.to_owned()).collect() }
    };
    let capabilities = own.capabilities.unwrap_or_default();
    Ok(cri::LinuxContainerSecurityContext {
        capabilities: Some(cri::Capability {
            add_capabilities: capabilities.add.unwrap_or_default(),
            drop_capabilities: capabilities.drop.unwrap_or_default(),
            add_ambient_capabilities: Vec::new(),
        }),
        privileged,
        namespace_options: Some(namespaces(pod, shares.target, shares.users)),
        selinux_options: selinux(own.se_linux_options.as_ref().or(pod_level.se_linux_options.as_ref())),
        run_as_user: wrap(user),
        run_as_group: wrap(run_as_group),
        run_as_username: username,
        readonly_rootfs: own.read_only_root_filesystem.unwrap_or(false),
        supplemental_groups: groups(&pod_level, &[]),
        supplemental_groups_policy: groups_policy(&pod_level),
        no_new_privs: own.allow_privilege_escalation == Some(false),
        masked_paths: paths(MASKED_PATHS),
        readonly_paths: paths(READ_ONLY_PATHS),
        seccomp: Some(seccomp(own.seccomp_profile.as_ref().or(pod_level.seccomp_profile.as_ref()), profiles)),
        apparmor: apparmor(own.app_armor_profile.as_ref().or(pod_level.app_armor_profile.as_ref())),
        ..Default::default()
    })
}

fn check_non_root(pod: &Pod, container: &Container, run_as_user: Option<i64>, image: &ImageUser) -> Result<(), String> {
    let place = format!("(pod: \"{}\", container: {})", super::shown_name(pod), container.name);
    match (run_as_user, image.uid, image.name.as_str()) {
        (Some(0), _, _) => Err(format!("container's runAsUser breaks non-root policy {place}")),
        (Some(_), _, _) => Ok(()),
        (None, Some(0), _) => Err(format!("container has runAsNonRoot and image will run as root {place}")),
        (None, None, name) if !name.is_empty() => Err(format!(
            "container has runAsNonRoot and image has non-numeric user ({name}), cannot verify user is non-root {place}"
        )),
        (None, None, _) => Err(format!("container has runAsNonRoot and image will run as root {place}")),
        (None, Some(_), _) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn context(
        pod_context: serde_json::Value,
        own: serde_json::Value,
        image: ImageUser,
    ) -> Result<cri::LinuxContainerSecurityContext, String> {
        let pod: Pod =
            serde_json::from_value(serde_json::json!({"metadata": {"name": "p", "namespace": "n", "uid": "u"},
            "spec": {"securityContext": pod_context, "containers": [{"name": "c", "securityContext": own}]}}))
            .expect("a pod");
        let container = pod.spec.as_ref().unwrap().containers[0].clone();
        container_context(
            &pod,
            &container,
            &image,
            Shares::default(),
            Profiles { root: Path::new("/seccomp"), by_default: false },
        )
    }

    #[test]
    fn the_container_overrides_the_pod() {
        let made = context(
            serde_json::json!({"runAsUser": 1, "runAsGroup": 2, "fsGroup": 3, "supplementalGroups": [4, 3],
                               "seccompProfile": {"type": "RuntimeDefault"}}),
            serde_json::json!({"runAsUser": 9, "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
                               "capabilities": {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]},
                               "seccompProfile": {"type": "Localhost", "localhostProfile": "p.json"}}),
            ImageUser::default(),
        )
        .expect("a context");
        assert_eq!(made.run_as_user.map(|user| user.value), Some(9));
        assert_eq!(made.run_as_group.map(|group| group.value), Some(2));
        assert_eq!(made.supplemental_groups, [3, 4]);
        assert!(made.no_new_privs && made.readonly_rootfs);
        assert_eq!(made.seccomp.unwrap().localhost_ref, "/seccomp/p.json");
        assert!(made.masked_paths.contains(&"/proc/kcore".to_owned()));
    }

    #[test]
    fn non_root_is_checked_against_the_image() {
        let non_root = serde_json::json!({"runAsNonRoot": true});
        let none = serde_json::json!({});
        let root = ImageUser { uid: Some(0), name: String::new() };
        let named = ImageUser { uid: None, name: "www".into() };
        let plain = ImageUser { uid: Some(65532), name: String::new() };
        assert!(context(non_root.clone(), none.clone(), root).unwrap_err().contains("image will run as root"));
        assert!(context(non_root.clone(), none.clone(), named).unwrap_err().contains("non-numeric user (www)"));
        assert!(context(non_root.clone(), none, plain).is_ok());
        assert!(
            context(non_root, serde_json::json!({"runAsUser": 0}), ImageUser::default())
                .unwrap_err()
                .contains("breaks non-root policy")
        );
    }

    #[test]
    fn unmasked_proc_hides_nothing() {
        let made = context(serde_json::json!({}), serde_json::json!({"procMount": "Unmasked"}), ImageUser::default());
        assert!(made.expect("a context").masked_paths.is_empty());
    }
}
