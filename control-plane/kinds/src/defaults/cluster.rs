//! Defaults of the remaining kinds: Namespace, Node, Secret, role bindings, PriorityClass.

use crate::access::{child, elements_mut, remove, set, set_default, set_default_text, text};
use base64::Engine;
use serde_json::{Value, json};

/// Every namespace carries its own name as a label.
pub(crate) fn namespace(object: &mut Value) {
    let name = text(object, "/metadata/name").to_owned();
    if name.is_empty() {
        return;
    }
    if let Some(labels) = child(object, "metadata").and_then(|metadata| child(metadata, "labels")) {
        set(labels, "kubernetes.io/metadata.name", name);
    }
}

pub(crate) fn node(object: &mut Value) {
    if let Some(spec) = object.get_mut("spec") {
        let single = text(spec, "/podCIDR").to_owned();
        let first = text(spec, "/podCIDRs/0").to_owned();
        if first.is_empty() && !single.is_empty() {
            set(spec, "podCIDRs", json!([single]));
        } else if single.is_empty() && !first.is_empty() {
            set(spec, "podCIDR", first);
        }
    }
    if let Some(status) = object.get_mut("status")
        && let Some(capacity) = status.get("capacity").cloned()
    {
        set_default(status, "allocatable", capacity);
    }
}

/// The type, and `stringData` written into `data`.
pub(crate) fn secret(object: &mut Value) {
    set_default_text(object, "type", "Opaque");
    let Some(Value::Object(plain)) = remove(object, "stringData") else { return };
    if plain.is_empty() {
        return;
    }
    let Some(data) = child(object, "data") else { return };
    for (key, value) in plain {
        let encoded = base64::engine::general_purpose::STANDARD.encode(value.as_str().unwrap_or_default());
        set(data, &key, encoded);
    }
}

const RBAC_GROUP: &str = "rbac.authorization.k8s.io";

/// RoleBindings and ClusterRoleBindings.
pub(crate) fn role_binding(object: &mut Value) {
    if let Some(reference) = child(object, "roleRef") {
        set_default_text(reference, "apiGroup", RBAC_GROUP);
    }
    for subject in elements_mut(object, "subjects") {
        if matches!(text(subject, "/kind"), "User" | "Group") {
            set_default_text(subject, "apiGroup", RBAC_GROUP);
        }
    }
}

pub(crate) fn priority_class(object: &mut Value) {
    set_default(object, "preemptionPolicy", "PreemptLowerPriority");
}
