//! The columns of Deployments, ReplicaSets, ControllerRevisions and PodDisruptionBudgets.

use super::{AGE, CONTAINERS, IMAGES, NAME, SELECTOR, age, column, joined, label_selector, name};
use crate::access::{boolean, integer, list, text};
use crate::kind::Column;
use jiff::Timestamp;
use serde_json::Value;

pub(crate) const DEPLOYMENT: &[Column] = &[
    NAME,
    column("Ready", "string", "Ready pods, of the desired number."),
    column("Up-to-date", "string", "Pods that run the current template."),
    column("Available", "string", "Pods that have been ready for long enough."),
    AGE,
    CONTAINERS,
    IMAGES,
    SELECTOR,
];

fn count(object: &Value, pointer: &str) -> Value {
    Value::from(integer(object, pointer).unwrap_or(0))
}

fn template_cells(object: &Value) -> [Value; 3] {
    [
        Value::from(joined(object, "/spec/template/spec/containers", "/name")),
        Value::from(joined(object, "/spec/template/spec/containers", "/image")),
        Value::from(label_selector(object.pointer("/spec/selector"))),
    ]
}

pub(crate) fn deployment(object: &Value, now: Timestamp) -> Vec<Value> {
    let desired = integer(object, "/spec/replicas").unwrap_or(0);
    let ready = integer(object, "/status/readyReplicas").unwrap_or(0);
    let mut cells = vec![
        name(object),
        Value::from(format!("{ready}/{desired}")),
        count(object, "/status/updatedReplicas"),
        count(object, "/status/availableReplicas"),
        age(object, now),
    ];
    cells.extend(template_cells(object));
    cells
}

pub(crate) const REPLICA_SET: &[Column] = &[
    NAME,
    column("Desired", "integer", "Pods that are wanted."),
    column("Current", "integer", "Pods that exist."),
    column("Ready", "integer", "Pods that are ready."),
    AGE,
    CONTAINERS,
    IMAGES,
    SELECTOR,
];

pub(crate) fn replica_set(object: &Value, now: Timestamp) -> Vec<Value> {
    let mut cells = vec![
        name(object),
        count(object, "/spec/replicas"),
        count(object, "/status/replicas"),
        count(object, "/status/readyReplicas"),
        age(object, now),
    ];
    cells.extend(template_cells(object));
    cells
}

pub(crate) const CONTROLLER_REVISION: &[Column] = &[
    NAME,
    column("Controller", "string", "Controller of the object."),
    column("Revision", "string", "Number of the revision."),
    AGE,
];

pub(crate) fn controller_revision(object: &Value, now: Timestamp) -> Vec<Value> {
    let owners = list(object, "/metadata/ownerReferences");
    let controller = owners.iter().find(|owner| boolean(owner, "/controller") == Some(true)).map(|owner| {
        let group = text(owner, "/apiVersion").rsplit_once('/').map_or("", |(group, _)| group);
        let kind = text(owner, "/kind").to_lowercase();
        let dot = if group.is_empty() { "" } else { "." };
        format!("{kind}{dot}{group}/{}", text(owner, "/name"))
    });
    vec![
        name(object),
        Value::from(controller.unwrap_or_else(|| "<none>".to_owned())),
        count(object, "/revision"),
        age(object, now),
    ]
}

pub(crate) const POD_DISRUPTION_BUDGET: &[Column] = &[
    NAME,
    column("Min Available", "string", "Pods that must stay available."),
    column("Max Unavailable", "string", "Pods that may be unavailable."),
    column("Allowed Disruptions", "integer", "Pods that may be evicted now."),
    AGE,
];

pub(crate) fn pod_disruption_budget(object: &Value, now: Timestamp) -> Vec<Value> {
    let amount = |pointer: &str| match object.pointer(pointer) {
        Some(Value::String(text)) => Value::from(text.as_str()),
        Some(Value::Number(number)) => Value::from(number.to_string()),
        _ => Value::from("N/A"),
    };
    vec![
        name(object),
        amount("/spec/minAvailable"),
        amount("/spec/maxUnavailable"),
        count(object, "/status/disruptionsAllowed"),
        age(object, now),
    ]
}
