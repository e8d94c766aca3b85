//! PodDisruptionBudgets.

use super::metadata::{label_selector, object_meta, object_meta_update};
use super::workload::{amount, at_most_all};
use super::{Errors, field, is_set, names, part};
use crate::FieldError;
use serde_json::Value;

pub(crate) fn pod_disruption_budget(object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta(&mut errors, object, true, names::dns_subdomain);
    budget(&mut errors, object);
    errors.0
}

pub(crate) fn pod_disruption_budget_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    budget(&mut errors, new);
    errors.0
}

fn budget(errors: &mut Errors, object: &Value) {
    let spec = part(object, "spec");
    if is_set(spec, "minAvailable") && is_set(spec, "maxUnavailable") {
        errors.invalid("spec", spec.clone(), "minAvailable and maxUnavailable cannot be both set");
    }
    for name in ["minAvailable", "maxUnavailable"] {
        if is_set(spec, name) {
            amount(errors, part(spec, name), &format!("spec.{name}"));
            at_most_all(errors, part(spec, name), &format!("spec.{name}"));
        }
    }
    label_selector(errors, part(spec, "selector"), "spec.selector");
    let policy = field(spec, "unhealthyPodEvictionPolicy");
    if is_set(spec, "unhealthyPodEvictionPolicy") && !matches!(policy, "AlwaysAllow" | "IfHealthyBudget") {
        let supported = &["AlwaysAllow", "IfHealthyBudget"];
        errors.not_supported("spec.unhealthyPodEvictionPolicy", policy, supported);
    }
}
