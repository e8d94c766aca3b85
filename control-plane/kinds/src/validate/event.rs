//! Events, in both of their APIs.

use super::metadata::{object_meta, object_meta_update};
use super::{Errors, field, names, part};
use crate::FieldError;
use serde_json::Value;

/// Namespaces in which events about objects without a namespace live.
const OF_CLUSTER: &[&str] = &["", "default", "kube-system"];

pub(crate) fn event(object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta(&mut errors, object, true, names::dns_subdomain);
    namespaces(&mut errors, object, "involvedObject");
    errors.0
}

fn namespaces(errors: &mut Errors, object: &Value, reference: &str) {
    let own = field(part(object, "metadata"), "namespace");
    let about = field(part(object, reference), "namespace");
    let fits = if about.is_empty() { OF_CLUSTER.contains(&own) } else { about == own };
    if !fits {
        errors.invalid(format!("{reference}.namespace"), about, "does not match event.namespace");
    }
}

pub(crate) fn event_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    namespaces(&mut errors, new, "involvedObject");
    errors.0
}

const MOST_NAME: usize = 128;
const MOST_NOTE: usize = 1024;

/// An `events.k8s.io/v1` event says more than a `v1` one has to.
pub(crate) fn events_event(object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta(&mut errors, object, true, names::dns_subdomain);
    namespaces(&mut errors, object, "regarding");
    if field(object, "eventTime").is_empty() {
        errors.required("eventTime");
    }
    let controller = field(object, "reportingController");
    if controller.is_empty() {
        errors.required("reportingController");
    } else {
        errors.each("reportingController", controller, names::qualified_name(controller));
    }
    for name in ["reportingInstance", "action", "reason"] {
        let value = field(object, name);
        if value.is_empty() {
            errors.required(name);
        } else if value.len() > MOST_NAME {
            errors.invalid(name, "", format!("can have at most {MOST_NAME} characters"));
        }
    }
    if field(object, "note").len() > MOST_NOTE {
        errors.invalid("note", "", format!("can have at most {MOST_NOTE} characters"));
    }
    let kind = field(object, "type");
    if !matches!(kind, "Normal" | "Warning") {
        errors.invalid("type", "", "has invalid value: ".to_owned() + kind);
    }
    errors.0
}

pub(crate) fn events_event_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    namespaces(&mut errors, new, "regarding");
    for name in ["reason", "action", "type", "reportingController", "reportingInstance", "regarding"] {
        errors.immutable(name, new.get(name), old.get(name));
    }
    errors.0
}
