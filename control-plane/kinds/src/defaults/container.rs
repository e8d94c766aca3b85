//! Defaults of containers, probes and lifecycle handlers.

use crate::access::{child, elements_mut, set_default, set_default_text, text};
use serde_json::Value;

pub(super) fn container(container: &mut Value) {
    let policy = pull_policy(text(container, "/image"));
    set_default_text(container, "imagePullPolicy", policy);
    set_default_text(container, "terminationMessagePath", "/dev/termination-log");
    set_default_text(container, "terminationMessagePolicy", "File");
    set_default(container, "resources", serde_json::json!({}));
    for port in elements_mut(container, "ports") {
        set_default_text(port, "protocol", "TCP");
    }
    for variable in elements_mut(container, "env") {
        if let Some(source) = variable.get_mut("valueFrom") {
            field_source(source);
        }
    }
    for name in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if let Some(found) = container.get_mut(name) {
            probe(found);
        }
    }
    for hook in ["postStart", "preStop"] {
        if let Some(handler) = container.get_mut("lifecycle").and_then(|lifecycle| lifecycle.get_mut(hook)) {
            http_get(handler);
        }
    }
}

/// `fieldRef` and `resourceFieldRef`, in environment variables and downward API files.
pub(super) fn field_source(source: &mut Value) {
    if let Some(field) = source.get_mut("fieldRef") {
        set_default_text(field, "apiVersion", "v1");
    }
    if let Some(resource) = source.get_mut("resourceFieldRef") {
        set_default(resource, "divisor", "0");
    }
}

fn probe(probe: &mut Value) {
    for (field, value) in
        [("timeoutSeconds", 1), ("periodSeconds", 10), ("successThreshold", 1), ("failureThreshold", 3)]
    {
        if probe.get(field).and_then(Value::as_i64) == Some(0) {
            crate::access::remove(probe, field);
        }
        set_default(probe, field, value);
    }
    http_get(probe);
    if let Some(grpc) = probe.get_mut("grpc") {
        set_default(grpc, "service", "");
    }
}

fn http_get(handler: &mut Value) {
    if let Some(action) = handler.get_mut("httpGet") {
        set_default_text(action, "path", "/");
        set_default_text(action, "scheme", "HTTP");
    }
}

/// `Always` for `latest` or no tag, else `IfNotPresent`. A digest pins the image.
pub(super) fn pull_policy(image: &str) -> &'static str {
    let (name, digest) = image.split_once('@').map_or((image, false), |(name, _)| (name, true));
    let tag = name.rsplit_once('/').map_or(name, |(_, last)| last).split_once(':').map(|(_, tag)| tag);
    match tag {
        Some("latest") => "Always",
        None if !digest => "Always",
        _ => "IfNotPresent",
    }
}

/// Requests that are not given are the limits.
pub(super) fn requests_from_limits(container: &mut Value) {
    let Some(limits) = container.pointer("/resources/limits").and_then(Value::as_object).cloned() else { return };
    let Some(requests) = child(container, "resources").and_then(|resources| child(resources, "requests")) else {
        return;
    };
    for (name, limit) in limits {
        set_default(requests, &name, limit);
    }
}
