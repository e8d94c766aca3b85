//! Probes and lifecycle hooks.

use super::names;
use super::{Errors, check_port_or_name, field, is_set, part};
use crate::access::{integer, list};
use serde_json::Value;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Probe {
    Liveness,
    Readiness,
    Startup,
}

pub(super) fn probe(errors: &mut Errors, probe: &Value, which: Probe, path: &str) {
    if probe.is_null() {
        return;
    }
    handler(errors, probe, None, path);
    for name in ["initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"] {
        errors.not_negative(format!("{path}.{name}"), integer(probe, &format!("/{name}")));
    }
    if let Some(seconds) = integer(probe, "/terminationGracePeriodSeconds") {
        let path = format!("{path}.terminationGracePeriodSeconds");
        if seconds <= 0 {
            errors.invalid(&path, seconds, "must be greater than 0");
        }
        if which == Probe::Readiness {
            errors.invalid(path, seconds, "must not be set for readinessProbes");
        }
    }
    let successes = integer(probe, "/successThreshold").unwrap_or(0);
    if which != Probe::Readiness && successes != 1 {
        errors.invalid(format!("{path}.successThreshold"), successes, "must be 1");
    }
}

pub(super) fn lifecycle(errors: &mut Errors, lifecycle: &Value, grace_seconds: Option<i64>, path: &str) {
    for hook in ["postStart", "preStop"] {
        if is_set(lifecycle, hook) {
            handler(errors, part(lifecycle, hook), grace_seconds, &format!("{path}.{hook}"));
        }
    }
}

fn handler(errors: &mut Errors, handler: &Value, grace_seconds: Option<i64>, path: &str) {
    let mut any = false;
    for kind in ["exec", "httpGet", "tcpSocket", "grpc", "sleep"] {
        if !is_set(handler, kind) {
            continue;
        }
        let inner_path = format!("{path}.{kind}");
        if any {
            errors.forbidden(inner_path, "may not specify more than 1 handler type");
            continue;
        }
        any = true;
        let inner = part(handler, kind);
        match kind {
            "exec" if list(inner, "/command").is_empty() => errors.required(format!("{inner_path}.command")),
            "httpGet" => http_get(errors, inner, &inner_path),
            "tcpSocket" | "grpc" => check_port_or_name(errors, &format!("{inner_path}.port"), part(inner, "port")),
            "sleep" => {
                let seconds = integer(inner, "/seconds").unwrap_or(0);
                if let Some(grace) = grace_seconds.filter(|grace| !(0..=*grace).contains(&seconds)) {
                    let detail = format!("must be non-negative and less than terminationGracePeriodSeconds ({grace})");
                    errors.invalid(inner_path, seconds, detail);
                }
            }
            _ => {}
        }
    }
    if !any {
        errors.required_as(path, "must specify a handler type");
    }
}

fn http_get(errors: &mut Errors, action: &Value, path: &str) {
    if field(action, "path").is_empty() {
        errors.required(format!("{path}.path"));
    }
    check_port_or_name(errors, &format!("{path}.port"), part(action, "port"));
    let scheme = field(action, "scheme");
    if !matches!(scheme, "HTTP" | "HTTPS") {
        errors.not_supported(format!("{path}.scheme"), scheme, &["HTTP", "HTTPS"]);
    }
    for header in list(action, "/httpHeaders") {
        let name = field(header, "name");
        errors.each(&format!("{path}.httpHeaders"), name, names::http_header(name));
    }
}
