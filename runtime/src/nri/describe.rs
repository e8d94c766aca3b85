//! Pods and containers as plugins see them: records and specifications in the interface's own messages. Pure.

use std::collections::BTreeMap;
use std::path::Path;

use oarlock_nri::api;
use oarlock_proto::cri;
use oci_spec::runtime as oci;
use serde::Serialize;

use super::resources::{of_cri, of_oci};
use crate::record::{ContainerPhase, ContainerRecord, SandboxRecord};
use crate::spec::namespace::Pinned;

/// A pod. Namespaces that are gone are left out by whoever passes `pinned`.
pub(crate) fn pod(record: &SandboxRecord, pinned: &Pinned) -> api::PodSandbox {
    let metadata = record.metadata();
    let linux = record.config.linux.clone().unwrap_or_default();
    let namespaces = [("user", &pinned.user), ("network", &pinned.net), ("ipc", &pinned.ipc), ("uts", &pinned.uts)];
    let namespaces = namespaces.into_iter().filter_map(|(kind, path)| Some(namespace(kind, path.as_deref()?)));
    api::PodSandbox {
        id: record.id.clone(),
        name: metadata.name,
        uid: metadata.uid,
        namespace: metadata.namespace,
        labels: sorted(&record.config.labels),
        annotations: sorted(&record.config.annotations),
        runtime_handler: record.handler.clone(),
        linux: Some(api::LinuxPodSandbox {
            pod_overhead: linux.overhead.as_ref().map(of_cri),
            pod_resources: linux.resources.as_ref().map(of_cri),
            cgroup_parent: linux.cgroup_parent,
            cgroups_path: format!("/{}", record.cgroup_parent),
            namespaces: namespaces.collect(),
            resources: None,
        }),
        // No process of ours is the pod's.
        pid: 0,
        ips: record.ips.clone(),
    }
}

fn namespace(kind: &str, path: &Path) -> api::LinuxNamespace {
    api::LinuxNamespace { r#type: kind.to_owned(), path: path.display().to_string() }
}

/// A container, as its record and its specification say. Without a specification its parts are empty.
pub(crate) fn container(record: &ContainerRecord, spec: Option<&oci::Spec>) -> api::Container {
    let process = spec.and_then(|spec| spec.process().as_ref());
    let mut annotations = sorted(&record.config.annotations);
    annotations.extend(spec.and_then(|spec| spec.annotations().clone()).unwrap_or_default());
    let ended = matches!(record.phase, ContainerPhase::Exited | ContainerPhase::Removing);
    api::Container {
        id: record.id.clone(),
        pod_sandbox_id: record.sandbox_id.clone(),
        name: record.metadata().name,
        state: state(record.phase) as i32,
        labels: sorted(&record.config.labels),
        annotations,
        args: process.and_then(|process| process.args().clone()).unwrap_or_default(),
        env: process.and_then(|process| process.env().clone()).unwrap_or_default(),
        mounts: spec.and_then(|spec| spec.mounts().as_ref()).into_iter().flatten().map(mount).collect(),
        hooks: spec.and_then(|spec| spec.hooks().as_ref()).map(hooks),
        linux: spec.map(|spec| linux(record, spec)),
        pid: u32::try_from(record.pid).unwrap_or(0),
        rlimits: process.and_then(|process| process.rlimits().as_ref()).into_iter().flatten().map(rlimit).collect(),
        created_at: record.created_at_nanos,
        started_at: record.started_at_nanos,
        finished_at: if ended { record.finished_at_nanos } else { 0 },
        exit_code: if ended { record.exit_code } else { 0 },
        status_reason: if ended { record.reason.clone() } else { String::new() },
        status_message: if ended { record.message.clone() } else { String::new() },
        cdi_devices: record
            .config
            .cdi_devices
            .iter()
            .map(|device| api::CdiDevice { name: device.name.clone() })
            .collect(),
        user: process.map(|process| api::User {
            uid: process.user().uid(),
            gid: process.user().gid(),
            additional_gids: process.user().additional_gids().clone().unwrap_or_default(),
        }),
        image: Some(image(record)),
    }
}

fn state(phase: ContainerPhase) -> api::ContainerState {
    match phase {
        ContainerPhase::Creating => api::ContainerState::ContainerUnknown,
        ContainerPhase::Created | ContainerPhase::Starting => api::ContainerState::ContainerCreated,
        ContainerPhase::Running => api::ContainerState::ContainerRunning,
        ContainerPhase::Exited | ContainerPhase::Removing => api::ContainerState::ContainerStopped,
    }
}

fn image(record: &ContainerRecord) -> api::Image {
    let spec = record.config.image.clone().unwrap_or_default();
    api::Image {
        name: if spec.user_specified_image.is_empty() { spec.image } else { spec.user_specified_image },
        digest: record.image_ref.rsplit_once('@').map(|(_, digest)| digest.to_owned()).unwrap_or_default(),
        config_digest: record.image_id.clone(),
    }
}

fn linux(record: &ContainerRecord, spec: &oci::Spec) -> api::LinuxContainer {
    let process = spec.process().as_ref();
    let score = process.and_then(|process| process.oom_score_adj());
    let common = api::LinuxContainer {
        oom_score_adj: score.map(|value| api::OptionalInt { value: value.into() }),
        io_priority: process.and_then(|process| process.io_priority().as_ref()).map(|wanted| api::LinuxIoPriority {
            class: api::IoPrioClass::from_str_name(&word(&wanted.class())).unwrap_or_default() as i32,
            priority: i32::try_from(wanted.priority()).unwrap_or_default(),
        }),
        seccomp_profile: seccomp_profile(record),
        ..api::LinuxContainer::default()
    };
    let Some(linux) = spec.linux() else { return common };
    let devices = linux.net_devices().iter().flatten();
    api::LinuxContainer {
        namespaces: linux
            .namespaces()
            .iter()
            .flatten()
            .map(|known| api::LinuxNamespace { r#type: word(&known.typ()), path: path(known.path()) })
            .collect(),
        devices: linux.devices().iter().flatten().map(device).collect(),
        resources: linux.resources().as_ref().map(of_oci),
        cgroups_path: path(linux.cgroups_path()),
        seccomp_policy: linux.seccomp().as_ref().map(seccomp),
        sysctl: linux.sysctl().clone().unwrap_or_default().into_iter().collect(),
        net_devices: devices
            .map(|(key, device)| (key.clone(), api::LinuxNetDevice { name: device.name().clone().unwrap_or_default() }))
            .collect(),
        ..common
    }
}

fn seccomp_profile(record: &ContainerRecord) -> Option<api::SecurityProfile> {
    let context = record.config.linux.as_ref()?.security_context.as_ref()?;
    let profile = context.seccomp.as_ref()?;
    let kind = match profile.profile_type() {
        cri::security_profile::ProfileType::RuntimeDefault => api::security_profile::ProfileType::RuntimeDefault,
        cri::security_profile::ProfileType::Unconfined => api::security_profile::ProfileType::Unconfined,
        cri::security_profile::ProfileType::Localhost => api::security_profile::ProfileType::Localhost,
    };
    Some(api::SecurityProfile { profile_type: kind as i32, localhost_ref: profile.localhost_ref.clone() })
}

fn seccomp(policy: &oci::LinuxSeccomp) -> api::LinuxSeccomp {
    let number = |value: Option<u32>| value.map(|value| api::OptionalUInt32 { value });
    let argument = |argument: &oci::LinuxSeccompArg| api::LinuxSeccompArg {
        index: u32::try_from(argument.index()).unwrap_or_default(),
        value: argument.value(),
        value_two: argument.value_two().unwrap_or_default(),
        op: word(&argument.op()),
    };
    api::LinuxSeccomp {
        default_action: word(&policy.default_action()),
        default_errno: number(policy.default_errno_ret()),
        architectures: policy.architectures().iter().flatten().map(word).collect(),
        flags: policy.flags().iter().flatten().map(word).collect(),
        listener_path: path(policy.listener_path()),
        listener_metadata: policy.listener_metadata().clone().unwrap_or_default(),
        syscalls: policy
            .syscalls()
            .iter()
            .flatten()
            .map(|call| api::LinuxSyscall {
                names: call.names().clone(),
                action: word(&call.action()),
                errno_ret: number(call.errno_ret()),
                args: call.args().iter().flatten().map(argument).collect(),
            })
            .collect(),
    }
}

fn mount(mount: &oci::Mount) -> api::Mount {
    api::Mount {
        destination: mount.destination().display().to_string(),
        r#type: mount.typ().clone().unwrap_or_default(),
        source: path(mount.source()),
        options: mount.options().clone().unwrap_or_default(),
    }
}

fn device(device: &oci::LinuxDevice) -> api::LinuxDevice {
    let number = |value: Option<u32>| value.map(|value| api::OptionalUInt32 { value });
    api::LinuxDevice {
        path: device.path().display().to_string(),
        r#type: device.typ().as_str().to_owned(),
        major: device.major(),
        minor: device.minor(),
        file_mode: device.file_mode().map(|value| api::OptionalFileMode { value }),
        uid: number(device.uid()),
        gid: number(device.gid()),
    }
}

#[allow(deprecated, reason = "plugins are shown every hook")]
fn hooks(hooks: &oci::Hooks) -> api::Hooks {
    let one = |hook: &oci::Hook| api::Hook {
        path: hook.path().display().to_string(),
        args: hook.args().clone().unwrap_or_default(),
        env: hook.env().clone().unwrap_or_default(),
        timeout: hook.timeout().map(|value| api::OptionalInt { value }),
    };
    let all = |list: &Option<Vec<oci::Hook>>| list.iter().flatten().map(one).collect();
    api::Hooks {
        prestart: all(hooks.prestart()),
        create_runtime: all(hooks.create_runtime()),
        create_container: all(hooks.create_container()),
        start_container: all(hooks.start_container()),
        poststart: all(hooks.poststart()),
        poststop: all(hooks.poststop()),
    }
}

fn rlimit(limit: &oci::PosixRlimit) -> api::PosixRlimit {
    api::PosixRlimit { r#type: word(&limit.typ()), hard: limit.hard(), soft: limit.soft() }
}

/// The word that a value of an enumeration has in a specification.
fn word(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        _ => String::new(),
    }
}

fn path(path: &Option<std::path::PathBuf>) -> String {
    path.as_ref().map(|path| path.display().to_string()).unwrap_or_default()
}

fn sorted(map: &std::collections::HashMap<String, String>) -> BTreeMap<String, String> {
    map.clone().into_iter().collect()
}
