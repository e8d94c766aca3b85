//! Scheduling constraints of a pod: affinity, tolerations, topology spread.

use super::metadata::{label_selector, labels};
use super::{Errors, field, is_set, names, part};
use crate::access::{integer, list};
use serde_json::{Value, json};

const REQUIRED: &str = "requiredDuringSchedulingIgnoredDuringExecution";
const PREFERRED: &str = "preferredDuringSchedulingIgnoredDuringExecution";

pub(super) fn all(errors: &mut Errors, spec: &Value, path: &str) {
    labels(errors, part(spec, "nodeSelector"), &format!("{path}.nodeSelector"));
    let affinity = part(spec, "affinity");
    node_affinity(errors, part(affinity, "nodeAffinity"), &format!("{path}.affinity.nodeAffinity"));
    for kind in ["podAffinity", "podAntiAffinity"] {
        pod_affinity(errors, part(affinity, kind), &format!("{path}.affinity.{kind}"));
    }
    tolerations(errors, list(spec, "/tolerations"), &format!("{path}.tolerations"));
    topology_spread(errors, list(spec, "/topologySpreadConstraints"), &format!("{path}.topologySpreadConstraints"));
}

fn weight(errors: &mut Errors, term: &Value, path: &str) {
    let weight = integer(term, "/weight").unwrap_or(0);
    if !(1..=100).contains(&weight) {
        errors.invalid(format!("{path}.weight"), weight, "must be in the range 1-100");
    }
}

fn node_affinity(errors: &mut Errors, affinity: &Value, path: &str) {
    let required = part(affinity, REQUIRED);
    if !required.is_null() {
        let path = format!("{path}.{REQUIRED}.nodeSelectorTerms");
        let terms = list(required, "/nodeSelectorTerms");
        if terms.is_empty() {
            errors.required_as(&path, "must have at least one node selector term");
        }
        for (index, term) in terms.iter().enumerate() {
            node_selector_term(errors, term, true, &format!("{path}[{index}]"));
        }
    }
    for (index, term) in list(affinity, &format!("/{PREFERRED}")).iter().enumerate() {
        let path = format!("{path}.{PREFERRED}[{index}]");
        weight(errors, term, &path);
        node_selector_term(errors, part(term, "preference"), false, &format!("{path}.preference"));
    }
}

fn node_selector_term(errors: &mut Errors, term: &Value, check_values: bool, path: &str) {
    for (index, rule) in list(term, "/matchExpressions").iter().enumerate() {
        let path = format!("{path}.matchExpressions[{index}]");
        let values = list(rule, "/values");
        match field(rule, "operator") {
            "In" | "NotIn" if values.is_empty() => {
                errors.required_as(format!("{path}.values"), "must be specified when `operator` is 'In' or 'NotIn'")
            }
            "Exists" | "DoesNotExist" if !values.is_empty() => errors.forbidden(
                format!("{path}.values"),
                "may not be specified when `operator` is 'Exists' or 'DoesNotExist'",
            ),
            "Gt" | "Lt" if values.len() != 1 => errors.required_as(
                format!("{path}.values"),
                "must be specified single value when `operator` is 'Lt' or 'Gt'",
            ),
            "In" | "NotIn" | "Exists" | "DoesNotExist" | "Gt" | "Lt" => {}
            other => errors.invalid(format!("{path}.operator"), other, "not a valid selector operator"),
        }
        let key = field(rule, "key");
        errors.each(&format!("{path}.key"), key, names::qualified_name(key));
        for (index, value) in values.iter().filter_map(Value::as_str).enumerate().filter(|_| check_values) {
            errors.each(&format!("{path}.values[{index}]"), value, names::label_value(value));
        }
    }
    for (index, rule) in list(term, "/matchFields").iter().enumerate() {
        let path = format!("{path}.matchFields[{index}]");
        if !matches!(field(rule, "operator"), "In" | "NotIn") {
            errors.invalid(format!("{path}.operator"), field(rule, "operator"), "not a valid selector operator");
        } else if list(rule, "/values").len() != 1 {
            let detail = "must be only one value when `operator` is 'In' or 'NotIn' for node field selector";
            errors.required_as(format!("{path}.values"), detail);
        }
        if field(rule, "key") != "metadata.name" {
            errors.invalid(format!("{path}.key"), field(rule, "key"), "not a valid field selector key");
        }
    }
}

fn pod_affinity(errors: &mut Errors, affinity: &Value, path: &str) {
    for (index, term) in list(affinity, &format!("/{REQUIRED}")).iter().enumerate() {
        pod_affinity_term(errors, term, &format!("{path}.{REQUIRED}[{index}]"));
    }
    for (index, term) in list(affinity, &format!("/{PREFERRED}")).iter().enumerate() {
        let path = format!("{path}.{PREFERRED}[{index}]");
        weight(errors, term, &path);
        pod_affinity_term(errors, part(term, "podAffinityTerm"), &format!("{path}.podAffinityTerm"));
    }
}

fn pod_affinity_term(errors: &mut Errors, term: &Value, path: &str) {
    label_selector(errors, part(term, "labelSelector"), &format!("{path}.labelSelector"));
    label_selector(errors, part(term, "namespaceSelector"), &format!("{path}.namespaceSelector"));
    for namespace in list(term, "/namespaces").iter().filter_map(Value::as_str) {
        errors.each(&format!("{path}.namespace"), namespace, names::dns_label(namespace));
    }
    let key = field(term, "topologyKey");
    if key.is_empty() {
        errors.required_as(format!("{path}.topologyKey"), "can not be empty");
    }
    errors.each(&format!("{path}.topologyKey"), key, names::qualified_name(key));
}

const EFFECTS: &[&str] = &["NoSchedule", "PreferNoSchedule", "NoExecute"];

pub(super) fn tolerations(errors: &mut Errors, tolerations: &[Value], path: &str) {
    for (index, toleration) in tolerations.iter().enumerate() {
        let path = format!("{path}[{index}]");
        let (key, operator) = (field(toleration, "key"), field(toleration, "operator"));
        let (value, effect) = (field(toleration, "value"), field(toleration, "effect"));
        let in_operator = format!("{path}.operator");
        if !key.is_empty() {
            errors.each(&format!("{path}.key"), key, names::qualified_name(key));
        } else if operator != "Exists" {
            let detail = "operator must be Exists when `key` is empty, which means \"match all values and all keys\"";
            errors.invalid(&in_operator, operator, detail);
        }
        if is_set(toleration, "tolerationSeconds") && effect != "NoExecute" {
            let detail = "effect must be 'NoExecute' when `tolerationSeconds` is set";
            errors.invalid(format!("{path}.effect"), effect, detail);
        }
        match operator {
            "Equal" | "" => {
                let messages = names::label_value(value);
                if !messages.is_empty() {
                    errors.invalid(in_operator, value, messages.join(";"));
                }
            }
            "Exists" if !value.is_empty() => {
                errors.invalid(in_operator, value, "value must be empty when `operator` is 'Exists'");
            }
            "Exists" => {}
            other => errors.not_supported(in_operator, other, &["Equal", "Exists"]),
        }
        if !effect.is_empty() && !EFFECTS.contains(&effect) {
            errors.not_supported(format!("{path}.effect"), effect, EFFECTS);
        }
    }
}

/// Taints of a node.
pub(super) fn taints(errors: &mut Errors, taints: &[Value], path: &str) {
    let mut seen = std::collections::HashSet::new();
    for (index, taint) in taints.iter().enumerate() {
        let path = format!("{path}[{index}]");
        let (key, value, effect) = (field(taint, "key"), field(taint, "value"), field(taint, "effect"));
        errors.each(&format!("{path}.key"), key, names::qualified_name(key));
        let messages = names::label_value(value);
        if !messages.is_empty() {
            errors.invalid(format!("{path}.value"), value, messages.join(";"));
        }
        errors.one_of(format!("{path}.effect"), effect, EFFECTS);
        if !seen.insert((key, effect)) {
            let mut error = crate::FieldError::duplicate(path, taint.clone());
            "taints must be unique by key and effect pair".clone_into(&mut error.detail);
            errors.push(error);
        }
    }
}

fn topology_spread(errors: &mut Errors, constraints: &[Value], path: &str) {
    let mut seen = std::collections::HashSet::new();
    for (index, constraint) in constraints.iter().enumerate() {
        let path = format!("{path}[{index}]");
        let skew = integer(constraint, "/maxSkew").unwrap_or(0);
        if skew <= 0 {
            errors.invalid(format!("{path}.maxSkew"), skew, "must be greater than zero");
        }
        let (key, action) = (field(constraint, "topologyKey"), field(constraint, "whenUnsatisfiable"));
        if key.is_empty() {
            errors.required_as(format!("{path}.topologyKey"), "can not be empty");
        } else {
            errors.each(&format!("{path}.topologyKey"), key, names::qualified_name(key));
        }
        if !matches!(action, "DoNotSchedule" | "ScheduleAnyway") {
            let supported = &["DoNotSchedule", "ScheduleAnyway"];
            errors.not_supported(format!("{path}.whenUnsatisfiable"), action, supported);
        }
        if !seen.insert((key, action)) {
            let pair = json!(format!("{{{key}, {action}}}"));
            errors.duplicate(format!("{path}.{{topologyKey, whenUnsatisfiable}}"), pair);
        }
        if let Some(domains) = integer(constraint, "/minDomains") {
            let path = format!("{path}.minDomains");
            if domains <= 0 {
                errors.invalid(&path, domains, "must be greater than zero");
            }
            if action != "DoNotSchedule" {
                let detail = format!("can only use minDomains if whenUnsatisfiable=DoNotSchedule, not {action}");
                errors.invalid(path, domains, detail);
            }
        }
        for name in ["nodeAffinityPolicy", "nodeTaintsPolicy"] {
            let policy = field(constraint, name);
            if is_set(constraint, name) && !matches!(policy, "Honor" | "Ignore") {
                errors.not_supported(format!("{path}.{name}"), policy, &["Honor", "Ignore"]);
            }
        }
        label_selector(errors, part(constraint, "labelSelector"), &format!("{path}.labelSelector"));
    }
}
