//! Security contexts of pods and containers.

use super::volume::descending_path;
use super::{Errors, check_range, field, is_set, part};
use crate::FieldError;
use crate::access::{boolean, integer, list};
use serde_json::Value;
use std::collections::HashSet;

const MOST_ID: i64 = i32::MAX as i64;

pub(super) fn pod(errors: &mut Errors, spec: &Value, path: &str) {
    let context = part(spec, "securityContext");
    let in_context = format!("{path}.securityContext");
    for name in ["fsGroup", "runAsUser", "runAsGroup"] {
        check_range(errors, format!("{in_context}.{name}"), integer(context, &format!("/{name}")), 0, MOST_ID);
    }
    for (index, group) in list(context, "/supplementalGroups").iter().enumerate() {
        check_range(errors, format!("{in_context}.supplementalGroups[{index}]"), group.as_i64(), 0, MOST_ID);
    }
    if boolean(spec, "/shareProcessNamespace") == Some(true) && boolean(spec, "/hostPID") == Some(true) {
        let detail = "ShareProcessNamespace and HostPID cannot both be enabled";
        errors.invalid(format!("{in_context}.shareProcessNamespace"), true, detail);
    }
    sysctls(errors, context, &in_context);
    for (name, supported) in [
        ("fsGroupChangePolicy", &["Always", "OnRootMismatch"]),
        ("supplementalGroupsPolicy", &["Merge", "Strict"]),
        ("seLinuxChangePolicy", &["MountOption", "Recursive"]),
    ] {
        let value = field(context, name);
        if is_set(context, name) && !supported.contains(&value) {
            errors.not_supported(format!("{in_context}.{name}"), value, supported);
        }
    }
    seccomp(errors, part(context, "seccompProfile"), &format!("{in_context}.seccompProfile"));
    apparmor(errors, part(context, "appArmorProfile"), &format!("{in_context}.appArmorProfile"));
    if boolean(spec, "/hostUsers") == Some(false) {
        for (name, shown) in [("hostNetwork", "hostNetwork"), ("hostPID", "HostPID"), ("hostIPC", "HostIPC")] {
            if boolean(spec, &format!("/{name}")) == Some(true) {
                errors.forbidden(format!("{path}.{shown}"), "when `pod.Spec.HostUsers` is false");
            }
        }
    }
}

fn sysctls(errors: &mut Errors, context: &Value, path: &str) {
    let mut seen = HashSet::new();
    for (index, sysctl) in list(context, "/sysctls").iter().enumerate() {
        let path = format!("{path}.sysctls[{index}].name");
        let name = field(sysctl, "name");
        if name.is_empty() {
            errors.required(path);
        } else if !is_sysctl(name) {
            let detail = "must have at most 253 characters and match regex \
                ^([a-z0-9]([-_a-z0-9]*[a-z0-9])?[\\./])*[a-z0-9]([-_a-z0-9]*[a-z0-9])?$";
            errors.invalid(path, name, detail);
        } else if !seen.insert(name) {
            errors.duplicate(path, name);
        }
    }
}

fn is_sysctl(name: &str) -> bool {
    let edge = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let segment = |segment: &str| {
        let bytes = segment.as_bytes();
        bytes.first().is_some_and(edge)
            && bytes.last().is_some_and(edge)
            && bytes.iter().all(|byte| edge(byte) || b"-_".contains(byte))
    };
    name.len() <= 253 && name.split(['.', '/']).all(segment)
}

pub(super) fn container(errors: &mut Errors, context: &Value, spec: &Value, path: &str) {
    if context.is_null() {
        return;
    }
    for name in ["runAsUser", "runAsGroup"] {
        check_range(errors, format!("{path}.{name}"), integer(context, &format!("/{name}")), 0, MOST_ID);
    }
    let proc_mount = field(context, "procMount");
    if is_set(context, "procMount") && !matches!(proc_mount, "Default" | "Unmasked") {
        errors.not_supported(format!("{path}.procMount"), proc_mount, &["Default", "Unmasked"]);
    }
    if proc_mount == "Unmasked" && boolean(spec, "/hostUsers") != Some(false) {
        errors.invalid(format!("{path}.procMount"), proc_mount, "`hostUsers` must be false to use `Unmasked`");
    }
    seccomp(errors, part(context, "seccompProfile"), &format!("{path}.seccompProfile"));
    apparmor(errors, part(context, "appArmorProfile"), &format!("{path}.appArmorProfile"));
    if boolean(context, "/allowPrivilegeEscalation") == Some(false) {
        if boolean(context, "/privileged") == Some(true) {
            let detail = "cannot set `allowPrivilegeEscalation` to false and `privileged` to true";
            errors.invalid(path, context.clone(), detail);
        }
        if list(context, "/capabilities/add").iter().any(|capability| capability == "CAP_SYS_ADMIN") {
            let detail = "cannot set `allowPrivilegeEscalation` to false and `capabilities.Add` CAP_SYS_ADMIN";
            errors.invalid(path, context.clone(), detail);
        }
    }
}

const PROFILES: &[&str] = &["Localhost", "RuntimeDefault", "Unconfined"];

fn seccomp(errors: &mut Errors, profile: &Value, path: &str) {
    if profile.is_null() {
        return;
    }
    let kind = field(profile, "type");
    if kind.is_empty() {
        errors.required_as(format!("{path}.type"), "type is required when seccompProfile is set");
    } else if !PROFILES.contains(&kind) {
        errors.not_supported(format!("{path}.type"), kind, PROFILES);
    }
    let path = format!("{path}.localhostProfile");
    match (kind == "Localhost", is_set(profile, "localhostProfile")) {
        (true, true) => descending_path(errors, field(profile, "localhostProfile"), &path),
        (true, false) => errors.required_as(path, "must be set when seccomp type is Localhost"),
        (false, true) => errors.invalid(path, profile.clone(), "can only be set when seccomp type is Localhost"),
        (false, false) => {}
    }
}

fn apparmor(errors: &mut Errors, profile: &Value, path: &str) {
    if profile.is_null() {
        return;
    }
    let (kind, local) = (field(profile, "type"), field(profile, "localhostProfile"));
    let in_local = format!("{path}.localhostProfile");
    match kind {
        "Localhost" if local.trim().is_empty() => {
            errors.required_as(in_local, "must be set when AppArmor type is Localhost");
        }
        "Localhost" if local.trim() != local => {
            errors.invalid(in_local, local, "must not be padded with whitespace");
        }
        "Localhost" if local.len() > 4095 => errors.push(FieldError::too_long(in_local, 4095)),
        "Localhost" => {}
        "RuntimeDefault" | "Unconfined" if is_set(profile, "localhostProfile") => {
            errors.invalid(in_local, local, "can only be set when AppArmor type is Localhost");
        }
        "RuntimeDefault" | "Unconfined" => {}
        "" => errors.required_as(format!("{path}.type"), "type is required when appArmorProfile is set"),
        _ => errors.not_supported(format!("{path}.type"), kind, PROFILES),
    }
}
