//! Pods and pod templates.

use super::container::{self, Context};
use super::metadata::{annotations, labels, object_meta};
use super::{Errors, affinity, check_range, field, is_set, names, net, part, resources, security, volume};
use crate::FieldError;
use crate::access::{boolean, integer, list};
use serde_json::Value;

const MIRROR: &str = "kubernetes.io/config.mirror";

/// A Pod that is created.
pub(crate) fn pod(object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    metadata_and_spec(&mut errors, object);
    let spec = part(object, "spec");
    // A pod that runs somewhere may have got them through their subresource.
    if !list(spec, "/ephemeralContainers").is_empty() && field(spec, "nodeName").is_empty() {
        errors.forbidden("spec.ephemeralContainers", "cannot be set on create");
    }
    if !field(spec, "nodeName").is_empty() && !list(spec, "/schedulingGates").is_empty() {
        errors.forbidden("spec.nodeName", "cannot be set until all schedulingGates have been cleared");
    }
    errors.0
}

/// What create and update of a Pod check alike.
pub(super) fn metadata_and_spec(errors: &mut Errors, object: &Value) {
    object_meta(errors, object, true, names::dns_subdomain);
    let spec = part(object, "spec");
    let mirror = object.pointer("/metadata/annotations").and_then(|annotations| annotations.get(MIRROR));
    if let Some(mirror) = mirror.filter(|_| field(spec, "nodeName").is_empty()) {
        let detail = "must set spec.nodeName if mirror pod annotation is set";
        errors.invalid(format!("metadata.annotations[{MIRROR}]"), mirror.clone(), detail);
    }
    pod_spec(errors, spec, true, "spec");
    if field(spec, "serviceAccountName").is_empty() {
        for (outer, volume) in list(spec, "/volumes").iter().enumerate() {
            for (inner, source) in list(volume, "/projected/sources").iter().enumerate() {
                if is_set(source, "serviceAccountToken") {
                    let path = format!("spec.volumes[{outer}].projected.sources[{inner}].serviceAccountToken");
                    errors.forbidden(path, "must not be specified when serviceAccountName is not set");
                }
            }
        }
    }
}

pub(super) fn template(errors: &mut Errors, template: &Value, path: &str) {
    let metadata = part(template, "metadata");
    labels(errors, part(metadata, "labels"), &format!("{path}.labels"));
    annotations(errors, part(metadata, "annotations"), &format!("{path}.annotations"));
    pod_spec(errors, part(template, "spec"), false, &format!("{path}.spec"));
    if !list(template, "/spec/ephemeralContainers").is_empty() {
        let detail = "ephemeral containers not allowed in pod template";
        errors.forbidden(format!("{path}.spec.ephemeralContainers"), detail);
    }
}

fn pod_spec(errors: &mut Errors, spec: &Value, is_pod: bool, path: &str) {
    let grace_seconds = integer(spec, "/terminationGracePeriodSeconds");
    if grace_seconds.is_none() {
        errors.required(format!("{path}.terminationGracePeriodSeconds"));
    }
    volume::all(errors, spec, path);
    container::all(errors, &Context { spec, grace_seconds, is_pod }, path);
    host_network_ports(errors, spec, is_pod, path);
    errors.one_of(format!("{path}.restartPolicy"), field(spec, "restartPolicy"), &["Always", "OnFailure", "Never"]);
    errors.one_of(
        format!("{path}.dnsPolicy"),
        field(spec, "dnsPolicy"),
        &["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"],
    );
    security::pod(errors, spec, path);
    affinity::all(errors, spec, path);
    dns_config(errors, spec, &format!("{path}.dnsConfig"));
    for (index, gate) in list(spec, "/readinessGates").iter().enumerate() {
        let kind = field(gate, "conditionType");
        errors.each(&format!("{path}.readinessGates[{index}].conditionType"), kind, names::qualified_name(kind));
    }
    scheduling_gates(errors, spec, path);
    names_of_spec(errors, spec, path);
    check_range(
        errors,
        format!("{path}.activeDeadlineSeconds"),
        integer(spec, "/activeDeadlineSeconds"),
        1,
        i32::MAX.into(),
    );
    for (index, alias) in list(spec, "/hostAliases").iter().enumerate() {
        let path = format!("{path}.hostAliases[{index}]");
        net::ip(errors, &format!("{path}.ip"), field(alias, "ip"));
        for (index, name) in list(alias, "/hostnames").iter().filter_map(Value::as_str).enumerate() {
            errors.each(&format!("{path}.hostnames[{index}]"), name, names::dns_subdomain(name));
        }
    }
    if is_set(spec, "preemptionPolicy") {
        errors.one_of(
            format!("{path}.preemptionPolicy"),
            field(spec, "preemptionPolicy"),
            &["PreemptLowerPriority", "Never"],
        );
    }
    if is_set(spec, "overhead") {
        let overhead = serde_json::json!({"limits": part(spec, "overhead")});
        resources::requirements(errors, &overhead, &format!("{path}.overhead"));
    }
    if is_set(spec, "resources") {
        if is_set(part(spec, "resources"), "claims") {
            errors.forbidden(format!("{path}.resources.claims"), "claims cannot be set for Resources at pod-level");
        }
        resources::requirements(errors, part(spec, "resources"), &format!("{path}.resources"));
    }
    if is_set(spec, "os") {
        errors.one_of(format!("{path}.os.name"), field(part(spec, "os"), "name"), &["linux", "windows"]);
    }
}

fn names_of_spec(errors: &mut Errors, spec: &Value, path: &str) {
    let rules: [(&str, names::NameRule); 6] = [
        ("serviceAccountName", names::dns_subdomain),
        ("nodeName", names::dns_subdomain),
        ("hostname", names::dns_label),
        ("subdomain", names::dns_label),
        ("priorityClassName", names::dns_subdomain),
        ("runtimeClassName", names::dns_subdomain),
    ];
    for (name, rule) in rules {
        let value = field(spec, name);
        if !value.is_empty() || (name == "runtimeClassName" && is_set(spec, name)) {
            errors.each(&format!("{path}.{name}"), value, rule(value));
        }
    }
}

fn scheduling_gates(errors: &mut Errors, spec: &Value, path: &str) {
    let mut seen = std::collections::HashSet::new();
    for (index, gate) in list(spec, "/schedulingGates").iter().enumerate() {
        let path = format!("{path}.schedulingGates[{index}]");
        let name = field(gate, "name");
        errors.each(&path, name, names::qualified_name(name));
        if !seen.insert(name) {
            errors.duplicate(path, name);
        }
    }
}

fn host_network_ports(errors: &mut Errors, spec: &Value, is_pod: bool, path: &str) {
    if boolean(spec, "/hostNetwork") != Some(true) {
        return;
    }
    for (outer, container) in list(spec, "/containers").iter().enumerate() {
        for (inner, port) in list(container, "/ports").iter().enumerate() {
            let host = integer(port, "/hostPort").unwrap_or(0);
            if (is_pod || host != 0) && host != integer(port, "/containerPort").unwrap_or(0) {
                let path = format!("{path}.containers[{outer}].ports[{inner}].hostPort");
                errors.invalid(path, host, "must match `containerPort` when `hostNetwork` is true");
            }
        }
    }
}

const MOST_NAMESERVERS: usize = 3;
const MOST_SEARCHES: usize = 32;
const MOST_SEARCH_CHARACTERS: usize = 2048;

fn dns_config(errors: &mut Errors, spec: &Value, path: &str) {
    let config = part(spec, "dnsConfig");
    let servers = list(config, "/nameservers");
    let searches: Vec<&str> = list(config, "/searches").iter().filter_map(Value::as_str).collect();
    if field(spec, "dnsPolicy") == "None" {
        if config.is_null() {
            errors.required_as(path, "must provide `dnsConfig` when `dnsPolicy` is None");
            return;
        }
        if servers.is_empty() {
            let detail = "must provide at least one DNS nameserver when `dnsPolicy` is None";
            errors.required_as(format!("{path}.nameservers"), detail);
            return;
        }
    }
    if servers.len() > MOST_NAMESERVERS {
        let detail = format!("must not have more than {MOST_NAMESERVERS} nameservers");
        errors.invalid(format!("{path}.nameservers"), servers.to_vec(), detail);
    }
    for (index, server) in servers.iter().filter_map(Value::as_str).enumerate() {
        net::ip(errors, &format!("{path}.nameservers[{index}]"), server);
    }
    let in_searches = format!("{path}.searches");
    if searches.len() > MOST_SEARCHES {
        let detail = format!("must not have more than {MOST_SEARCHES} search paths");
        errors.invalid(&in_searches, part(config, "searches").clone(), detail);
    }
    if searches.join(" ").len() > MOST_SEARCH_CHARACTERS {
        let detail = format!(
            "must not have more than {MOST_SEARCH_CHARACTERS} characters (including spaces) in the search list"
        );
        errors.invalid(&in_searches, part(config, "searches").clone(), detail);
    }
    for (index, search) in searches.iter().enumerate().filter(|(_, search)| **search != ".") {
        // Underscores are fine in search paths.
        let plain = search.strip_suffix('.').unwrap_or(search).replace('_', "a");
        errors.each(&format!("{in_searches}[{index}]"), search, names::dns_subdomain(&plain));
    }
    for (index, option) in list(config, "/options").iter().enumerate() {
        if field(option, "name").is_empty() {
            errors.required_as(format!("{path}.options[{index}]"), "must not be empty");
        }
    }
}
