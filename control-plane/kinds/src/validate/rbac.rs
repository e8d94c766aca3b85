//! Roles and their bindings.

use super::metadata::{label_selector, object_meta, object_meta_update};
use super::{Errors, field, names, part};
use crate::FieldError;
use crate::access::{equal, list};
use serde_json::Value;

const GROUP: &str = "rbac.authorization.k8s.io";

pub(crate) fn role(object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta(&mut errors, object, true, names::path_segment);
    rules(&mut errors, list(object, "/rules"), "rules", true);
    errors.0
}

pub(crate) fn role_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    rules(&mut errors, list(new, "/rules"), "rules", true);
    errors.0
}

pub(crate) fn cluster_role(object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta(&mut errors, object, false, names::path_segment);
    cluster_role_parts(&mut errors, object);
    errors.0
}

pub(crate) fn cluster_role_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    cluster_role_parts(&mut errors, new);
    errors.0
}

fn cluster_role_parts(errors: &mut Errors, object: &Value) {
    rules(errors, list(object, "/rules"), "rules", false);
    let aggregation = part(object, "aggregationRule");
    if aggregation.is_null() {
        return;
    }
    let path = "aggregationRule.clusterRoleSelectors";
    let selectors = list(aggregation, "/clusterRoleSelectors");
    if selectors.is_empty() {
        errors.required_as(path, "at least one clusterRoleSelector required if aggregationRule is non-nil");
    }
    for selector in selectors {
        label_selector(errors, selector, path);
    }
}

fn rules(errors: &mut Errors, rules: &[Value], path: &str, namespaced: bool) {
    for (index, rule) in rules.iter().enumerate() {
        let path = format!("{path}[{index}]");
        if list(rule, "/verbs").is_empty() {
            errors.required_as(format!("{path}.verbs"), "verbs must contain at least one value");
        }
        let (groups, resources) = (list(rule, "/apiGroups"), list(rule, "/resources"));
        if !list(rule, "/nonResourceURLs").is_empty() {
            let urls = part(rule, "nonResourceURLs").clone();
            let in_urls = format!("{path}.nonResourceURLs");
            if namespaced {
                errors.invalid(&in_urls, urls.clone(), "namespaced rules cannot apply to non-resource URLs");
            }
            if !groups.is_empty() || !resources.is_empty() || !list(rule, "/resourceNames").is_empty() {
                errors.invalid(in_urls, urls, "rules cannot apply to both regular resources and non-resource URLs");
            }
            continue;
        }
        if groups.is_empty() {
            errors.required_as(format!("{path}.apiGroups"), "resource rules must supply at least one api group");
        }
        if resources.is_empty() {
            errors.required_as(format!("{path}.resources"), "resource rules must supply at least one resource");
        }
    }
}

pub(crate) fn role_binding(object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta(&mut errors, object, true, names::path_segment);
    binding(&mut errors, object, true);
    errors.0
}

pub(crate) fn role_binding_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    binding(&mut errors, new, true);
    reference_stays(&mut errors, new, old);
    errors.0
}

pub(crate) fn cluster_role_binding(object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta(&mut errors, object, false, names::path_segment);
    binding(&mut errors, object, false);
    errors.0
}

pub(crate) fn cluster_role_binding_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    binding(&mut errors, new, false);
    reference_stays(&mut errors, new, old);
    errors.0
}

fn reference_stays(errors: &mut Errors, new: &Value, old: &Value) {
    if !equal(new.get("roleRef"), old.get("roleRef")) {
        errors.invalid("roleRef", part(new, "roleRef").clone(), "cannot change roleRef");
    }
}

fn binding(errors: &mut Errors, object: &Value, namespaced: bool) {
    let reference = part(object, "roleRef");
    if field(reference, "apiGroup") != GROUP {
        errors.not_supported("roleRef.apiGroup", field(reference, "apiGroup"), &[GROUP]);
    }
    let kinds: &[&str] = if namespaced { &["Role", "ClusterRole"] } else { &["ClusterRole"] };
    if !kinds.contains(&field(reference, "kind")) {
        errors.not_supported("roleRef.kind", field(reference, "kind"), kinds);
    }
    match field(reference, "name") {
        "" => errors.required("roleRef.name"),
        name => errors.each("roleRef.name", name, names::path_segment(name)),
    }
    for (index, subject) in list(object, "/subjects").iter().enumerate() {
        subject_parts(errors, subject, namespaced, &format!("subjects[{index}]"));
    }
}

fn subject_parts(errors: &mut Errors, subject: &Value, namespaced: bool, path: &str) {
    let (name, group) = (field(subject, "name"), field(subject, "apiGroup"));
    if name.is_empty() {
        errors.required(format!("{path}.name"));
    }
    match field(subject, "kind") {
        "ServiceAccount" => {
            if !name.is_empty() {
                errors.each(&format!("{path}.name"), name, names::dns_subdomain(name));
            }
            if !group.is_empty() {
                errors.not_supported(format!("{path}.apiGroup"), group, &[""]);
            }
            if !namespaced && field(subject, "namespace").is_empty() {
                errors.required(format!("{path}.namespace"));
            }
        }
        "User" | "Group" => {
            if group != GROUP {
                errors.not_supported(format!("{path}.apiGroup"), group, &[GROUP]);
            }
        }
        other => errors.not_supported(format!("{path}.kind"), other, &["ServiceAccount", "User", "Group"]),
    }
}
