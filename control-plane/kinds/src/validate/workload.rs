//! Deployments, ReplicaSets and ControllerRevisions.

use super::metadata::{is_empty_selector, label_selector, object_meta, object_meta_update, selects};
use super::{Errors, IMMUTABLE, field, is_set, names, part, pod};
use crate::FieldError;
use crate::access::{equal, integer};
use serde_json::Value;

pub(crate) fn deployment(object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta(&mut errors, object, true, names::dns_subdomain);
    deployment_spec(&mut errors, object);
    errors.0
}

pub(crate) fn deployment_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    deployment_spec(&mut errors, new);
    selector_stays(&mut errors, new, old);
    errors.0
}

fn selector_stays(errors: &mut Errors, new: &Value, old: &Value) {
    if !equal(new.pointer("/spec/selector"), old.pointer("/spec/selector")) {
        let selector = new.pointer("/spec/selector").cloned().unwrap_or_default();
        errors.invalid("spec.selector", selector, IMMUTABLE);
    }
}

fn deployment_spec(errors: &mut Errors, object: &Value) {
    let spec = part(object, "spec");
    errors.not_negative("spec.replicas".to_owned(), integer(spec, "/replicas"));
    selector_and_template(errors, spec, "deployment");
    strategy(errors, part(spec, "strategy"));
    let ready = integer(spec, "/minReadySeconds").unwrap_or(0);
    errors.not_negative("spec.minReadySeconds".to_owned(), Some(ready));
    errors.not_negative("spec.revisionHistoryLimit".to_owned(), integer(spec, "/revisionHistoryLimit"));
    if let Some(deadline) = integer(spec, "/progressDeadlineSeconds") {
        errors.not_negative("spec.progressDeadlineSeconds".to_owned(), Some(deadline));
        if deadline <= ready {
            errors.invalid("spec.progressDeadlineSeconds", deadline, "must be greater than minReadySeconds");
        }
    }
}

fn selector_and_template(errors: &mut Errors, spec: &Value, kind: &str) {
    let selector = part(spec, "selector");
    if selector.is_null() {
        errors.required("spec.selector");
    } else {
        label_selector(errors, selector, "spec.selector");
        if is_empty_selector(selector) {
            errors.invalid("spec.selector", selector.clone(), format!("empty selector is invalid for {kind}"));
        }
    }
    let template = part(spec, "template");
    let labels = template.pointer("/metadata/labels").unwrap_or(&Value::Null);
    if !selector.is_null() && !is_empty_selector(selector) && !selects(selector, labels) {
        let labels = if labels.is_null() { serde_json::json!({}) } else { labels.clone() };
        errors.invalid("spec.template.metadata.labels", labels, "`selector` does not match template `labels`");
    }
    pod::template(errors, template, "spec.template");
    let policy = field(part(template, "spec"), "restartPolicy");
    if !matches!(policy, "Always" | "") {
        errors.not_supported("spec.template.spec.restartPolicy", policy, &["Always"]);
    }
    if is_set(part(template, "spec"), "activeDeadlineSeconds") {
        let detail = "activeDeadlineSeconds in ReplicaSet is not Supported";
        errors.forbidden("spec.template.spec.activeDeadlineSeconds", detail);
    }
}

fn strategy(errors: &mut Errors, strategy: &Value) {
    let path = "spec.strategy";
    match field(strategy, "type") {
        "Recreate" if is_set(strategy, "rollingUpdate") => {
            let detail = "may not be specified when strategy `type` is 'Recreate'";
            errors.forbidden(format!("{path}.rollingUpdate"), detail);
        }
        "Recreate" => {}
        "RollingUpdate" => {
            let rolling = part(strategy, "rollingUpdate");
            let path = format!("{path}.rollingUpdate");
            if rolling.is_null() {
                errors.required_as(path, "this should be defaulted and never be nil");
                return;
            }
            for name in ["maxUnavailable", "maxSurge"] {
                amount(errors, part(rolling, name), &format!("{path}.{name}"));
            }
            let is_zero = |name: &str| match part(rolling, name) {
                Value::String(text) => text.trim_end_matches('%').parse() == Ok(0),
                other => other.as_i64() == Some(0),
            };
            let unavailable = part(rolling, "maxUnavailable");
            if is_zero("maxUnavailable") && is_zero("maxSurge") {
                let detail = "may not be 0 when `maxSurge` is 0";
                errors.invalid(format!("{path}.maxUnavailable"), unavailable.clone(), detail);
            }
            at_most_all(errors, unavailable, &format!("{path}.maxUnavailable"));
        }
        _ => errors.not_supported(path, strategy.clone(), &["Recreate", "RollingUpdate"]),
    }
}

/// A number that is not negative, or a percentage.
pub(super) fn amount(errors: &mut Errors, value: &Value, path: &str) {
    match value {
        Value::String(text) => errors.each(path, text, names::percent(text)),
        other => errors.not_negative(path.to_owned(), other.as_i64()),
    }
}

pub(super) fn at_most_all(errors: &mut Errors, value: &Value, path: &str) {
    let percent = value.as_str().and_then(|text| text.strip_suffix('%')).and_then(|digits| digits.parse::<i64>().ok());
    if percent.is_some_and(|percent| percent > 100) {
        errors.invalid(path, value.clone(), "must not be greater than 100%");
    }
}

const STATUS_COUNTS: &[&str] = &[
    "replicas",
    "updatedReplicas",
    "readyReplicas",
    "availableReplicas",
    "unavailableReplicas",
    "fullyLabeledReplicas",
    "observedGeneration",
];

/// Status of Deployments and ReplicaSets: counts that are not negative and within the whole.
pub(crate) fn replicas_status_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    let status = part(new, "status");
    let count = |name: &str| integer(status, &format!("/{name}")).unwrap_or(0);
    for name in STATUS_COUNTS {
        errors.not_negative(format!("status.{name}"), Some(count(name)));
    }
    for name in ["updatedReplicas", "fullyLabeledReplicas", "readyReplicas", "availableReplicas"] {
        if count(name) > count("replicas") {
            errors.invalid(format!("status.{name}"), count(name), "cannot be greater than status.replicas");
        }
    }
    if count("availableReplicas") > count("readyReplicas") {
        let detail = "cannot be greater than readyReplicas";
        errors.invalid("status.availableReplicas", count("availableReplicas"), detail);
    }
    errors.0
}

pub(crate) fn replica_set(object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta(&mut errors, object, true, names::dns_subdomain);
    replica_set_spec(&mut errors, object);
    errors.0
}

pub(crate) fn replica_set_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    replica_set_spec(&mut errors, new);
    selector_stays(&mut errors, new, old);
    errors.0
}

fn replica_set_spec(errors: &mut Errors, object: &Value) {
    let spec = part(object, "spec");
    errors.not_negative("spec.replicas".to_owned(), integer(spec, "/replicas"));
    errors.not_negative("spec.minReadySeconds".to_owned(), integer(spec, "/minReadySeconds"));
    selector_and_template(errors, spec, "replicaset");
}

pub(crate) fn controller_revision(object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta(&mut errors, object, true, names::dns_subdomain);
    if !is_set(object, "data") {
        errors.required_as("data", "data is mandatory");
    }
    errors.not_negative("revision".to_owned(), integer(object, "/revision"));
    errors.0
}

pub(crate) fn controller_revision_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    errors.not_negative("revision".to_owned(), integer(new, "/revision"));
    errors.immutable("data", new.get("data"), old.get("data"));
    errors.0
}
