//! What may change of a Pod once it exists: little.

use super::metadata::object_meta_update;
use super::pod::metadata_and_spec;
use super::{Errors, affinity, field, is_set, names, net, part};
use crate::FieldError;
use crate::access::{entries, equal, integer, list, remove, set};
use serde_json::Value;

const UPDATABLE: &str = "`spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,\
    `spec.tolerations` (only additions to existing tolerations),\
    `spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)";

pub(crate) fn pod_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    metadata_and_spec(&mut errors, new);
    mirror_annotation(&mut errors, new, old);
    let (new, old) = (part(new, "spec"), part(old, "spec"));
    for name in ["containers", "initContainers"] {
        if list(new, &format!("/{name}")).len() != list(old, &format!("/{name}")).len() {
            errors.forbidden(format!("spec.{name}"), "pod updates may not add or remove containers");
            return errors.0;
        }
    }
    deadline(&mut errors, new, old);
    only_added_tolerations(&mut errors, new, old);
    only_deleted_gates(&mut errors, new, old);
    if equal(Some(new), Some(old)) {
        return errors.0;
    }
    let mut masked = new.clone();
    mask_updatable(&mut masked, old);
    if !list(old, "/schedulingGates").is_empty() {
        mask_gated(&mut errors, &mut masked, old);
    }
    if !equal(Some(&masked), Some(old)) {
        let detail = format!("pod updates may not change fields other than {UPDATABLE}\n{}", difference(old, &masked));
        errors.forbidden("spec", detail);
    }
    errors.0
}

fn mirror_annotation(errors: &mut Errors, new: &Value, old: &Value) {
    const MIRROR: &str = "kubernetes.io/config.mirror";
    let mirror = |pod: &Value| pod.pointer("/metadata/annotations").and_then(|all| all.get(MIRROR)).cloned();
    let detail = match (mirror(new), mirror(old)) {
        (new, old) if new == old => return,
        (_, Some(_)) => "may not remove or update mirror pod annotation",
        _ => "may not add mirror pod annotation",
    };
    errors.forbidden(format!("metadata.annotations[{MIRROR}]"), detail);
}

fn deadline(errors: &mut Errors, new: &Value, old: &Value) {
    let path = "spec.activeDeadlineSeconds";
    let seconds = |spec: &Value| integer(spec, "/activeDeadlineSeconds");
    match (seconds(new), seconds(old)) {
        (Some(new), Some(old)) if new > old => {
            errors.invalid(path, new, "must be less than or equal to previous value");
        }
        (None, Some(_)) => errors.invalid(path, Value::Null, "must not update from a positive integer to nil value"),
        _ => {}
    }
}

fn only_added_tolerations(errors: &mut Errors, new: &Value, old: &Value) {
    let without_seconds = |toleration: &Value| {
        let mut toleration = toleration.clone();
        remove(&mut toleration, "tolerationSeconds");
        toleration
    };
    let kept: Vec<Value> = list(new, "/tolerations").iter().map(without_seconds).collect();
    if list(old, "/tolerations").iter().any(|toleration| !kept.contains(&without_seconds(toleration))) {
        let detail = "existing toleration can not be modified except its tolerationSeconds";
        errors.forbidden("spec.tolerations", detail);
        return;
    }
    affinity::tolerations(errors, list(new, "/tolerations"), "spec.tolerations");
}

fn only_deleted_gates(errors: &mut Errors, new: &Value, old: &Value) {
    let had = |name: &str| list(old, "/schedulingGates").iter().any(|gate| field(gate, "name") == name);
    for (index, gate) in list(new, "/schedulingGates").iter().enumerate() {
        let name = field(gate, "name");
        if !had(name) {
            let detail = format!("only deletion is allowed, but found new scheduling gate '{name}'");
            errors.forbidden(format!("spec.schedulingGates[{index}].name"), detail);
        }
    }
}

fn copy(masked: &mut Value, old: &Value, name: &str) {
    crate::access::keep(masked, old, name);
}

/// Puts back what an update may change, so that the rest can be compared.
fn mask_updatable(masked: &mut Value, old: &Value) {
    for containers in ["containers", "initContainers"] {
        let before: Vec<Value> = list(old, &format!("/{containers}")).to_vec();
        for (container, before) in crate::access::elements_mut(masked, containers).zip(&before) {
            copy(container, before, "image");
        }
    }
    for name in ["activeDeadlineSeconds", "schedulingGates", "tolerations"] {
        copy(masked, old, name);
    }
    let was_negative = integer(old, "/terminationGracePeriodSeconds").is_some_and(|seconds| seconds < 0);
    if was_negative && integer(masked, "/terminationGracePeriodSeconds") == Some(1) {
        copy(masked, old, "terminationGracePeriodSeconds");
    }
}

/// A gated pod may still be narrowed down: more node selectors, stricter node affinity.
fn mask_gated(errors: &mut Errors, masked: &mut Value, old: &Value) {
    let lost = entries(old, "/nodeSelector")
        .any(|(key, value)| masked.get("nodeSelector").and_then(|labels| labels.get(key)) != Some(value));
    if lost {
        let detail = "only additions to spec.nodeSelector are allowed (no mutations or deletions)";
        errors.invalid("spec.nodeSelector", part(masked, "nodeSelector").clone(), detail);
    }
    copy(masked, old, "nodeSelector");
    match old.pointer("/affinity/nodeAffinity") {
        Some(before) => {
            if let Some(affinity) = crate::access::child(masked, "affinity") {
                set(affinity, "nodeAffinity", before.clone());
            }
        }
        None => {
            if let Some(affinity) = masked.get_mut("affinity") {
                remove(affinity, "nodeAffinity");
                if affinity.as_object().is_some_and(serde_json::Map::is_empty) {
                    remove(masked, "affinity");
                }
            }
        }
    }
}

/// The top-level fields of the spec that differ, before and after.
fn difference(old: &Value, new: &Value) -> String {
    let mut names: Vec<&String> = [old, new].iter().flat_map(|spec| entries(spec, "").map(|(name, _)| name)).collect();
    names.sort();
    names.dedup();
    let mut lines = String::new();
    for name in names {
        let (before, after) = (old.get(name), new.get(name));
        if equal(before, after) {
            continue;
        }
        for (sign, value) in [("-", before), ("+", after)] {
            if let Some(value) = value {
                lines.push_str(&format!("{sign} {name}: {value}\n"));
            }
        }
    }
    lines
}

pub(crate) fn pod_status_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    let (status, before) = (part(new, "status"), part(old, "status"));
    for (index, condition) in list(status, "/conditions").iter().enumerate() {
        let kind = field(condition, "type");
        errors.each(&format!("status.conditions[{index}].type"), kind, names::qualified_name(kind));
    }
    let nominated = field(status, "nominatedNodeName");
    if !nominated.is_empty() && nominated != field(before, "nominatedNodeName") {
        errors.each("status.nominatedNodeName", nominated, names::dns_subdomain(nominated));
    }
    if !field(before, "qosClass").is_empty() {
        errors.immutable("status.qosClass", status.get("qosClass"), before.get("qosClass"));
    }
    let spec = part(old, "spec");
    terminated_stays(&mut errors, status, before, "containerStatuses", |name, code| runs_again(spec, name, code));
    terminated_stays(&mut errors, status, before, "ephemeralContainerStatuses", |_, _| false);
    for name in ["podIPs", "hostIPs"] {
        for (index, address) in list(status, &format!("/{name}")).iter().enumerate() {
            net::ip(&mut errors, &format!("status.{name}[{index}]"), field(address, "ip"));
        }
    }
    errors.0
}

/// A container that ended and may not be restarted stays ended.
fn terminated_stays(
    errors: &mut Errors,
    status: &Value,
    before: &Value,
    field_name: &str,
    runs_again: impl Fn(&str, i64) -> bool,
) {
    for (index, old) in list(before, &format!("/{field_name}")).iter().enumerate() {
        let name = field(old, "name");
        let Some(ended) = old.pointer("/state/terminated") else { continue };
        if runs_again(name, integer(ended, "/exitCode").unwrap_or(0)) {
            continue;
        }
        let same = |status: &&Value| field(status, "name") == name;
        let now = list(status, &format!("/{field_name}")).iter().find(same);
        if now.is_some_and(|now| !is_set(part(now, "state"), "terminated")) {
            let path = format!("status.{field_name}[{index}].state");
            errors.forbidden(path, "may not be transitioned to non-terminated state");
        }
    }
}

/// Whether a container that ended with `code` may run again: by the first of its rules that fits, by its own policy, or by
/// its pod's. A rule that restarts all containers lets each of them run again, whatever its own policy says.
fn runs_again(spec: &Value, name: &str, code: i64) -> bool {
    fn rules(container: &Value) -> std::slice::Iter<'_, Value> {
        list(container, "/restartPolicyRules").iter()
    }
    let containers = || list(spec, "/containers").iter();
    let all = |container: &Value| rules(container).any(|rule| field(rule, "action") == "RestartAllContainers");
    if containers().chain(list(spec, "/initContainers")).any(all) {
        return true;
    }
    let container = containers().find(|container| field(container, "name") == name).unwrap_or(&Value::Null);
    let own = field(container, "restartPolicy");
    let fits = |rule: &&Value| {
        let listed = list(rule, "/exitCodes/values").iter().any(|value| value.as_i64() == Some(code));
        match field(part(rule, "exitCodes"), "operator") {
            "In" => listed,
            "NotIn" => !listed,
            _ => false,
        }
    };
    if !own.is_empty() && rules(container).find(fits).is_some_and(|rule| field(rule, "action") == "Restart") {
        return true;
    }
    match if own.is_empty() { field(spec, "restartPolicy") } else { own } {
        "Never" => false,
        "OnFailure" => code != 0,
        _ => true,
    }
}

/// An update through the `ephemeralcontainers` subresource: containers may be added, never changed or removed.
pub fn pod_ephemeral_containers_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    metadata_and_spec(&mut errors, new);
    let path = "spec.ephemeralContainers";
    let after = list(new, "/spec/ephemeralContainers");
    for before in list(old, "/spec/ephemeralContainers") {
        let name = field(before, "name");
        match after.iter().find(|container| field(container, "name") == name) {
            None => errors.forbidden(path, format!("existing ephemeral containers {name:?} may not be removed\n")),
            Some(container) if !equal(Some(container), Some(before)) => {
                let detail = format!("existing ephemeral containers {name:?} may not be changed\n");
                errors.forbidden(path, detail);
            }
            Some(_) => {}
        }
    }
    errors.0
}
