//! The columns of the remaining kinds.

use super::{AGE, NAME, age, column, name, or, wide};
use crate::access::{boolean, entries, integer, list, text};
use crate::kind::Column;
use jiff::Timestamp;
use serde_json::Value;

pub(crate) const NAMESPACE: &[Column] = &[NAME, column("Status", "string", "Active or Terminating."), AGE];

pub(crate) fn namespace(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![name(object), Value::from(text(object, "/status/phase")), age(object, now)]
}

pub(crate) const NODE: &[Column] = &[
    NAME,
    column("Status", "string", "Whether the node is ready and takes pods."),
    column("Roles", "string", "Roles from the node's labels."),
    AGE,
    column("Version", "string", "Version of the node's agent."),
    wide("Internal-IP", "Address inside the cluster."),
    wide("External-IP", "Address outside the cluster."),
    wide("OS-Image", "Operating system."),
    wide("Kernel-Version", "Kernel."),
    wide("Container-Runtime", "Container runtime."),
];

pub(crate) fn node(object: &Value, now: Timestamp) -> Vec<Value> {
    let address = |kind: &str| {
        let found = list(object, "/status/addresses").iter().find(|address| text(address, "/type") == kind);
        Value::from(found.map_or("<none>", |address| text(address, "/address")))
    };
    let info = |field: &str| Value::from(or(text(object, &format!("/status/nodeInfo/{field}")), "<unknown>"));
    vec![
        name(object),
        Value::from(node_status(object)),
        Value::from(node_roles(object)),
        age(object, now),
        Value::from(text(object, "/status/nodeInfo/kubeletVersion")),
        address("InternalIP"),
        address("ExternalIP"),
        info("osImage"),
        info("kernelVersion"),
        info("containerRuntimeVersion"),
    ]
}

fn node_status(object: &Value) -> String {
    let ready = list(object, "/status/conditions").iter().find(|condition| text(condition, "/type") == "Ready");
    let status = match ready.map(|condition| text(condition, "/status")) {
        Some("True") => "Ready",
        Some(_) => "NotReady",
        None => "Unknown",
    };
    let cordoned = boolean(object, "/spec/unschedulable") == Some(true);
    if cordoned { format!("{status},SchedulingDisabled") } else { status.to_owned() }
}

fn node_roles(object: &Value) -> String {
    let mut roles: Vec<&str> = entries(object, "/metadata/labels")
        .filter_map(|(key, value)| match key.strip_prefix("node-role.kubernetes.io/") {
            Some(role) => Some(role),
            None if key == "kubernetes.io/role" => value.as_str(),
            None => None,
        })
        .filter(|role| !role.is_empty())
        .collect();
    roles.sort_unstable();
    roles.dedup();
    or(&roles.join(","), "<none>").to_owned()
}

fn size(object: &Value, field: &str) -> usize {
    object.get(field).and_then(Value::as_object).map_or(0, serde_json::Map::len)
}

pub(crate) const CONFIG_MAP: &[Column] = &[NAME, column("Data", "string", "Number of entries."), AGE];

pub(crate) fn config_map(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![name(object), Value::from(size(object, "data") + size(object, "binaryData")), age(object, now)]
}

pub(crate) const SECRET: &[Column] =
    &[NAME, column("Type", "string", "What the secret is for."), column("Data", "string", "Number of entries."), AGE];

pub(crate) fn secret(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![name(object), Value::from(text(object, "/type")), Value::from(size(object, "data")), age(object, now)]
}

pub(crate) const SERVICE_ACCOUNT: &[Column] = &[NAME, column("Secrets", "string", "Number of secrets."), AGE];

pub(crate) fn service_account(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![name(object), Value::from(list(object, "/secrets").len()), age(object, now)]
}

pub(crate) const LEASE: &[Column] = &[NAME, column("Holder", "string", "Who holds the lease."), AGE];

pub(crate) fn lease(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![name(object), Value::from(text(object, "/spec/holderIdentity")), age(object, now)]
}

/// Roles and ClusterRoles.
pub(crate) const ROLE: &[Column] = &[NAME, column("Created At", "date", "When the object was created.")];

pub(crate) fn role(object: &Value, _now: Timestamp) -> Vec<Value> {
    vec![name(object), Value::from(text(object, "/metadata/creationTimestamp"))]
}

/// RoleBindings and ClusterRoleBindings.
pub(crate) const ROLE_BINDING: &[Column] = &[
    NAME,
    column("Role", "string", "Role that the binding gives."),
    AGE,
    wide("Users", "Users that get the role."),
    wide("Groups", "Groups that get the role."),
    wide("ServiceAccounts", "Service accounts that get the role."),
];

pub(crate) fn role_binding(object: &Value, now: Timestamp) -> Vec<Value> {
    let subjects = |kind: &str| {
        let named = |subject: &Value| match (kind, text(subject, "/namespace")) {
            ("ServiceAccount", namespace) => format!("{namespace}/{}", text(subject, "/name")),
            _ => text(subject, "/name").to_owned(),
        };
        let of_kind = list(object, "/subjects").iter().filter(|subject| text(subject, "/kind") == kind);
        Value::from(of_kind.map(named).collect::<Vec<_>>().join(", "))
    };
    vec![
        name(object),
        Value::from(format!("{}/{}", text(object, "/roleRef/kind"), text(object, "/roleRef/name"))),
        age(object, now),
        subjects("User"),
        subjects("Group"),
        subjects("ServiceAccount"),
    ]
}

pub(crate) const PRIORITY_CLASS: &[Column] = &[
    NAME,
    column("Value", "integer", "Priority of pods of the class."),
    column("Global-Default", "boolean", "Whether pods without a class get this one."),
    AGE,
    column("PreemptionPolicy", "string", "Whether pods of the class may preempt others."),
];

pub(crate) fn priority_class(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![
        name(object),
        Value::from(integer(object, "/value").unwrap_or(0)),
        Value::from(boolean(object, "/globalDefault").unwrap_or(false)),
        age(object, now),
        Value::from(text(object, "/preemptionPolicy")),
    ]
}

pub(crate) const RUNTIME_CLASS: &[Column] = &[NAME, column("Handler", "string", "Handler that runs the pods."), AGE];

pub(crate) fn runtime_class(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![name(object), Value::from(text(object, "/handler")), age(object, now)]
}
