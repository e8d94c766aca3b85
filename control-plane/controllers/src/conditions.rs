//! Conditions and status patches, alike for all kinds. Pure.

use k8s_openapi::api::apps::v1::{DeploymentCondition, ReplicaSetCondition};
use k8s_openapi::api::core::v1::NamespaceCondition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use serde::Serialize;
use serde_json::{Map, Value, json};

/// The parts that conditions of all kinds have.
pub(crate) trait Condition {
    fn new(type_: &str, status: bool, reason: &str, message: String, now: Timestamp) -> Self;
    fn type_(&self) -> &str;
    fn is(&self, status: bool, reason: &str) -> bool;
    fn message(&self) -> &str;
    /// Takes over the time of the last change of status from the condition it replaces, if the status is the same.
    fn continues(&mut self, old: &Self);
}

macro_rules! condition {
    ($name:ident { $($extra:ident),* }) => {
        impl Condition for $name {
            fn new(type_: &str, status: bool, reason: &str, message: String, now: Timestamp) -> Self {
                Self {
                    type_: type_.to_owned(),
                    status: status_text(status).to_owned(),
                    reason: Some(reason.to_owned()),
                    message: Some(message),
                    last_transition_time: Some(Time(now)),
                    $($extra: Some(Time(now)),)*
                }
            }
            fn type_(&self) -> &str {
                &self.type_
            }
            fn is(&self, status: bool, reason: &str) -> bool {
                self.status == status_text(status) && self.reason.as_deref() == Some(reason)
            }
            fn message(&self) -> &str {
                self.message.as_deref().unwrap_or_default()
            }
            fn continues(&mut self, old: &Self) {
                if self.status == old.status {
                    self.last_transition_time = old.last_transition_time.clone();
                }
            }
        }
    };
}

condition!(DeploymentCondition { last_update_time });
condition!(ReplicaSetCondition {});
condition!(NamespaceCondition {});

fn status_text(status: bool) -> &'static str {
    if status { "True" } else { "False" }
}

pub(crate) fn find<'a, C: Condition>(conditions: &'a [C], type_: &str) -> Option<&'a C> {
    conditions.iter().find(|condition| condition.type_() == type_)
}

pub(crate) fn remove<C: Condition>(conditions: &mut Vec<C>, type_: &str) {
    conditions.retain(|condition| condition.type_() != type_);
}

/// Sets a condition; one that says the same (status and reason) is left as it is.
pub(crate) fn set<C: Condition>(conditions: &mut Vec<C>, status: bool, reason: &str, condition: C) {
    if find(conditions, condition.type_()).is_some_and(|old| old.is(status, reason)) {
        return;
    }
    replace(conditions, condition);
}

/// Sets a condition even if it says the same, so that its update time is new.
pub(crate) fn replace<C: Condition>(conditions: &mut Vec<C>, mut condition: C) {
    if let Some(old) = find(conditions, condition.type_()) {
        condition.continues(old);
    }
    remove(conditions, condition.type_());
    conditions.push(condition);
}

/// A merge patch that turns status `old` into `new`, bound to the object's uid; `None` if they are equal.
pub(crate) fn status_patch<S: Serialize>(uid: Option<&str>, old: Option<&S>, new: &S) -> Option<Value> {
    let as_map = |status: &S| match serde_json::to_value(status) {
        Ok(Value::Object(map)) => map,
        _ => Map::new(),
    };
    let old = old.map(as_map).unwrap_or_default();
    let new = as_map(new);
    let mut changed = Map::new();
    for (field, value) in &new {
        if old.get(field) != Some(value) {
            changed.insert(field.clone(), value.clone());
        }
    }
    for field in old.keys().filter(|field| !new.contains_key(*field)) {
        changed.insert(field.clone(), Value::Null);
    }
    (!changed.is_empty()).then(|| json!({"metadata": {"uid": uid}, "status": changed}))
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::apps::v1::ReplicaSetStatus;

    #[test]
    fn a_status_patch_holds_only_what_changed_and_nulls_what_went() {
        let old = ReplicaSetStatus { replicas: 2, ready_replicas: Some(1), ..Default::default() };
        let new = ReplicaSetStatus { replicas: 2, available_replicas: Some(1), ..Default::default() };
        let patch = status_patch(Some("u"), Some(&old), &new).unwrap();
        assert_eq!(patch["status"], json!({"availableReplicas": 1, "readyReplicas": null}));
        assert_eq!(status_patch(Some("u"), Some(&new), &new), None);
    }

    #[test]
    fn transition_time_moves_only_with_the_status() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let make = |status, reason: &str, second| {
            DeploymentCondition::new("Progressing", status, reason, String::new(), at(second))
        };
        let mut conditions = vec![make(true, "A", 1)];
        set(&mut conditions, true, "B", make(true, "B", 2));
        assert_eq!(conditions[0].last_transition_time, Some(Time(at(1))));
        assert_eq!(conditions[0].last_update_time, Some(Time(at(2))));
        set(&mut conditions, true, "B", make(true, "B", 3));
        assert_eq!(conditions[0].last_update_time, Some(Time(at(2))), "the same again is not an update");
        set(&mut conditions, false, "C", make(false, "C", 4));
        assert_eq!(conditions[0].last_transition_time, Some(Time(at(4))));
    }
}
