//! Adjustments of what is particular to Linux.

use std::path::Path;

use oarlock_cgroup::{Unit, translate};
use oarlock_nri::api::{self, LinuxContainerAdjustment, LinuxDeviceCgroup, MpolFlag, OptionalInt64};
use oarlock_nri::{clear_marker, marked_for_removal};
use oci_spec::runtime::{
    self as oci, Linux, LinuxDevice, LinuxDeviceBuilder, LinuxIntelRdt, LinuxMemoryPolicyBuilder,
    LinuxNamespaceBuilder, LinuxNamespaceType, LinuxNetDevice, LinuxSeccomp, Spec,
};
use serde_json::json;

use super::{named, parse, resources};
use crate::spec::device::{self, HostDevice};
use crate::spec::{HostFacts, SpecError};

/// The control group that plugins put the container into, without a leading slash: a path, or `slice:prefix:name` where
/// systemd makes groups.
pub(crate) fn cgroup(path: &str, host: &HostFacts) -> Result<String, SpecError> {
    let group = path.trim_matches('/');
    let field = || named("linux.cgroups_path");
    let plain = !group.contains(':');
    if plain == host.systemd_cgroups || (plain && Unit::at(group).is_some()) {
        let problem = match host.systemd_cgroups {
            true => "is not slice:prefix:name, and the cgroup driver is systemd",
            false => "names a systemd unit, and the cgroup driver is cgroupfs",
        };
        return Err(SpecError::invalid(field(), format!("{path:?} {problem}")));
    }
    if plain && (group.is_empty() || group.split('/').any(|part| part.is_empty() || part == "." || part == "..")) {
        return Err(SpecError::invalid(field(), format!("{path:?} is not a plain path")));
    }
    translate(group).map_err(|error| SpecError::invalid(field(), error.to_string()))
}

pub(super) fn adjust(spec: &mut Spec, wanted: &LinuxContainerAdjustment, host: &HostFacts) -> Result<(), SpecError> {
    let mut linux: Linux = spec.linux().clone().unwrap_or_default();
    devices(&mut linux, &wanted.devices)?;
    if let Some(wanted) = &wanted.resources {
        let mut target = linux.resources().clone().unwrap_or_default();
        resources::adjust(&mut target, wanted, host)?;
        linux.set_resources(Some(target));
        match wanted.rdt_class.as_ref().map(|class| class.value.as_str()) {
            None => {}
            Some("") => drop(linux.set_intel_rdt(None)),
            Some(class) => set_rdt(&mut linux, |rdt| {
                rdt.set_clos_id(Some(class.to_owned()));
            }),
        }
    }
    if let Some(policy) = &wanted.seccomp_policy {
        linux.set_seccomp(Some(seccomp(policy)?));
    }
    namespaces(&mut linux, &wanted.namespaces)?;
    sysctls(&mut linux, wanted);
    net_devices(&mut linux, wanted);
    if let Some(wanted) = &wanted.rdt {
        rdt(&mut linux, wanted);
    }
    if let Some(policy) = &wanted.memory_policy {
        memory_policy(&mut linux, policy)?;
    }
    spec.set_linux(Some(linux));
    Ok(())
}

/// Nodes found on the host, for devices that plugins named by reference.
pub(super) fn host_devices(spec: &mut Spec, found: &[HostDevice]) -> Result<(), SpecError> {
    let Some(linux) = spec.linux_mut().as_mut().filter(|_| !found.is_empty()) else { return Ok(()) };
    for (node, host) in device::nodes(found)?.into_iter().zip(found) {
        place(linux, node, &host.access)?;
    }
    Ok(())
}

fn devices(linux: &mut Linux, wanted: &[api::LinuxDevice]) -> Result<(), SpecError> {
    for device in wanted {
        if let Some(gone) = marked_for_removal(&device.path) {
            let mut known = linux.devices().clone().unwrap_or_default();
            known.retain(|known| known.path() != Path::new(gone));
            linux.set_devices(Some(known));
            continue;
        }
        let field = format!("linux.devices[{}]", device.path);
        if !device.path.starts_with('/') {
            return Err(SpecError::invalid(named(&field), "the path is not absolute"));
        }
        let mut builder = LinuxDeviceBuilder::default()
            .path(&device.path)
            .typ(parse::<oci::LinuxDeviceType>(&field, &device.r#type)?)
            .major(device.major)
            .minor(device.minor)
            .file_mode(device.file_mode.map_or(0o666, |mode| mode.value) & 0o7777)
            .uid(device.uid.map_or(0, |uid| uid.value))
            .gid(device.gid.map_or(0, |gid| gid.value));
        if device.r#type == "p" {
            builder = builder.major(0).minor(0);
        }
        let node = builder.build().map_err(|error| SpecError::invalid(named(&field), error.to_string()))?;
        place(linux, node, access(device))?;
    }
    Ok(())
}

/// As other runtimes have it: nodes of block devices may be made too.
fn access(device: &api::LinuxDevice) -> &'static str {
    if device.r#type == "b" { "rwm" } else { "rw" }
}

fn place(linux: &mut Linux, node: LinuxDevice, access: &str) -> Result<(), SpecError> {
    let rule = resources::rule(&LinuxDeviceCgroup {
        allow: true,
        r#type: node.typ().as_str().to_owned(),
        major: Some(OptionalInt64 { value: node.major() }),
        minor: Some(OptionalInt64 { value: node.minor() }),
        access: access.to_owned(),
    })?;
    let mut known = linux.devices().clone().unwrap_or_default();
    known.retain(|known| known.path() != node.path());
    known.push(node);
    linux.set_devices(Some(known));
    let mut target = linux.resources().clone().unwrap_or_default();
    let mut rules = target.devices().clone().unwrap_or_default();
    rules.push(rule);
    target.set_devices(Some(rules));
    linux.set_resources(Some(target));
    Ok(())
}

fn seccomp(policy: &api::LinuxSeccomp) -> Result<LinuxSeccomp, SpecError> {
    let argument = |argument: &api::LinuxSeccompArg| {
        json!({
            "index": argument.index, "value": argument.value, "valueTwo": argument.value_two, "op": argument.op,
        })
    };
    let calls: Vec<_> = policy
        .syscalls
        .iter()
        .map(|call| {
            json!({
                "names": call.names, "action": call.action, "errnoRet": call.errno_ret.map(|value| value.value),
                "args": call.args.iter().map(argument).collect::<Vec<_>>(),
            })
        })
        .collect();
    let mut document = json!({
        "defaultAction": policy.default_action, "defaultErrnoRet": policy.default_errno.map(|value| value.value),
        "architectures": policy.architectures, "flags": policy.flags, "syscalls": calls,
    });
    if !policy.listener_path.is_empty() {
        document["listenerPath"] = json!(policy.listener_path);
        document["listenerMetadata"] = json!(policy.listener_metadata);
    }
    serde_json::from_value(document)
        .map_err(|error| SpecError::invalid(named("linux.seccomp_policy"), error.to_string()))
}

fn namespaces(linux: &mut Linux, wanted: &[api::LinuxNamespace]) -> Result<(), SpecError> {
    for namespace in wanted {
        let kind: LinuxNamespaceType = parse("linux.namespaces", clear_marker(&namespace.r#type))?;
        if matches!(kind, LinuxNamespaceType::Mount | LinuxNamespaceType::User) {
            let reason = "it is what the container is made of";
            return Err(SpecError::unsupported(named(&format!("linux.namespaces[{}]", namespace.r#type)), reason));
        }
        let mut known = linux.namespaces().clone().unwrap_or_default();
        let place = known.iter().position(|known| known.typ() == kind);
        if marked_for_removal(&namespace.r#type).is_some() {
            known.retain(|known| known.typ() != kind);
            linux.set_namespaces(Some(known));
            continue;
        }
        let mut builder = LinuxNamespaceBuilder::default().typ(kind);
        if !namespace.path.is_empty() {
            builder = builder.path(&namespace.path);
        }
        let new = builder.build().map_err(|error| SpecError::invalid(named("linux.namespaces"), error.to_string()))?;
        match place {
            Some(place) => known[place] = new,
            None => known.push(new),
        }
        linux.set_namespaces(Some(known));
    }
    Ok(())
}

fn sysctls(linux: &mut Linux, wanted: &LinuxContainerAdjustment) {
    if wanted.sysctl.is_empty() {
        return;
    }
    let mut sysctls = linux.sysctl().clone().unwrap_or_default();
    for (key, value) in &wanted.sysctl {
        match marked_for_removal(key) {
            Some(gone) => drop(sysctls.remove(gone)),
            None => drop(sysctls.insert(key.clone(), value.clone())),
        }
    }
    linux.set_sysctl(Some(sysctls));
}

fn net_devices(linux: &mut Linux, wanted: &LinuxContainerAdjustment) {
    if wanted.net_devices.is_empty() {
        return;
    }
    let mut devices = linux.net_devices().clone().unwrap_or_default();
    for (key, device) in &wanted.net_devices {
        match marked_for_removal(key) {
            Some(gone) => drop(devices.remove(gone)),
            None => {
                let mut new = LinuxNetDevice::default();
                new.set_name(Some(device.name.clone()).filter(|name| !name.is_empty()));
                devices.insert(key.clone(), new);
            }
        }
    }
    linux.set_net_devices(Some(devices));
}

fn set_rdt(linux: &mut Linux, change: impl FnOnce(&mut LinuxIntelRdt)) {
    let mut rdt = linux.intel_rdt().clone().unwrap_or_default();
    change(&mut rdt);
    linux.set_intel_rdt(Some(rdt));
}

fn rdt(linux: &mut Linux, wanted: &api::LinuxRdt) {
    if wanted.remove {
        linux.set_intel_rdt(None);
    }
    if let Some(class) = &wanted.clos_id {
        set_rdt(linux, |rdt| {
            rdt.set_clos_id(Some(class.value.clone()));
        });
    }
    if let Some(schemata) = &wanted.schemata {
        set_rdt(linux, |rdt| {
            rdt.set_schemata(Some(schemata.value.clone()));
        });
    }
    if let Some(monitoring) = &wanted.enable_monitoring {
        set_rdt(linux, |rdt| {
            rdt.set_enable_monitoring(Some(monitoring.value));
        });
    }
}

fn memory_policy(linux: &mut Linux, wanted: &api::LinuxMemoryPolicy) -> Result<(), SpecError> {
    let field = "linux.memory_policy";
    let flag = |flag: &i32| {
        let known = MpolFlag::try_from(*flag)
            .map_err(|_| SpecError::invalid(named(field), format!("flag {flag} is not known")))?;
        parse::<oci::MemoryPolicyFlagType>(field, known.as_str_name())
    };
    let mut builder = LinuxMemoryPolicyBuilder::default()
        .mode(parse::<oci::MemoryPolicyModeType>(field, wanted.mode().as_str_name())?);
    if !wanted.nodes.is_empty() {
        builder = builder.nodes(wanted.nodes.clone());
    }
    if !wanted.flags.is_empty() {
        builder = builder.flags(wanted.flags.iter().map(flag).collect::<Result<Vec<_>, _>>()?);
    }
    let policy = builder.build().map_err(|error| SpecError::invalid(named(field), error.to_string()))?;
    linux.set_memory_policy(Some(policy));
    Ok(())
}
