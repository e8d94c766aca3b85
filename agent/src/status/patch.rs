//! The strategic merge patch that takes a pod's status in the API from one value to another. Pure.

use k8s_openapi::api::core::v1::PodStatus;
use serde_json::{Map, Value, json};

use super::conditions::{RESIZE_PENDING, RESIZING};

/// Fields that other components write, which a patch must not touch.
const FOREIGN: &[&str] =
    &["nominatedNodeName", "resourceClaimStatuses", "extendedResourceClaimStatus", "resize", "allocatedResources"];

/// The patch from `old` to `new`; None when there is nothing to tell. With a UID it applies to no other pod of the name.
pub(crate) fn status_patch(uid: Option<&str>, old: &PodStatus, new: &PodStatus) -> Option<Value> {
    let (old, new) = (object(old), object(new));
    let mut changes = Map::new();
    for (name, value) in &new {
        if FOREIGN.contains(&name.as_str()) || old.get(name) == Some(value) {
            continue;
        }
        let change = match name.as_str() {
            "conditions" => own_conditions(old.get(name), value),
            // Lists merged by address: replaced as a whole instead.
            "podIPs" | "hostIPs" if old.contains_key(name) => replaced(value),
            _ => Some(value.clone()),
        };
        if let Some(change) = change {
            changes.insert(name.clone(), change);
        }
    }
    for name in old.keys().filter(|name| !new.contains_key(*name) && !FOREIGN.contains(&name.as_str())) {
        changes.insert(name.clone(), Value::Null);
    }
    let metadata = uid.map_or(json!({}), |uid| json!({ "uid": uid }));
    (!changes.is_empty()).then(|| json!({ "metadata": metadata, "status": changes }))
}

fn object(status: &PodStatus) -> Map<String, Value> {
    match serde_json::to_value(status) {
        Ok(Value::Object(map)) => map,
        _ => Map::new(),
    }
}

/// Those of the agent's conditions that changed, with a null for each field that went.
fn own_conditions(old: Option<&Value>, new: &Value) -> Option<Value> {
    let before = |kind: &Value| old?.as_array()?.iter().find(|condition| condition["type"] == *kind);
    let mut changed = Vec::new();
    for condition in new.as_array()? {
        let kind = &condition["type"];
        let owned = kind.as_str().is_some_and(|k| super::conditions::OWNED.contains(&k) || k == "DisruptionTarget");
        let was = before(kind);
        if !owned || was == Some(condition) {
            continue;
        }
        let mut condition = condition.clone();
        if let (Some(map), Some(was)) = (condition.as_object_mut(), was.and_then(Value::as_object)) {
            for name in was.keys() {
                map.entry(name.clone()).or_insert(Value::Null);
            }
        }
        changed.push(condition);
    }
    let now = new.as_array()?;
    for was in old.and_then(Value::as_array).into_iter().flatten() {
        let kind = &was["type"];
        let passing = kind.as_str().is_some_and(|kind| [RESIZE_PENDING, RESIZING].contains(&kind));
        if passing && !now.iter().any(|condition| condition["type"] == *kind) {
            changed.push(json!({ "type": kind, "$patch": "delete" }));
        }
    }
    (!changed.is_empty()).then_some(Value::Array(changed))
}

fn replaced(value: &Value) -> Option<Value> {
    let mut list = vec![json!({ "$patch": "replace" })];
    list.extend(value.as_array()?.iter().cloned());
    Some(Value::Array(list))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(json: Value) -> PodStatus {
        serde_json::from_value(json).expect("a status")
    }

    #[test]
    fn nothing_new_is_no_patch() {
        let same = status(json!({"phase": "Running"}));
        assert_eq!(status_patch(Some("u"), &same, &same), None);
    }

    #[test]
    fn others_conditions_stay_out_and_lost_fields_become_null() {
        let old = status(json!({"phase": "Pending", "reason": "x", "conditions": [
            {"type": "Ready", "status": "False", "reason": "ContainersNotReady", "message": "m"},
            {"type": "example.org/gate", "status": "False"}]}));
        let new = status(json!({"phase": "Running", "conditions": [
            {"type": "Ready", "status": "True"}, {"type": "example.org/gate", "status": "True"}]}));
        let patch = status_patch(Some("u"), &old, &new).expect("a patch");
        assert_eq!(
            patch,
            json!({"metadata": {"uid": "u"}, "status": {"phase": "Running", "reason": null, "conditions": [
                {"type": "Ready", "status": "True", "reason": null, "message": null}]}})
        );
    }
}
