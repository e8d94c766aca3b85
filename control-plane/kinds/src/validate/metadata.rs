//! Metadata of every kind: names, labels, annotations, owners, finalizers; and label selectors.

use super::names::{self, NameRule};
use super::{Errors, field, is_set, part};
use crate::FieldError;
use crate::access::{boolean, entries, integer, list, text};
use serde_json::Value;

const MOST_ANNOTATIONS_BYTES: usize = 256 * 1024;

/// What every object's metadata must be.
pub(super) fn object_meta(errors: &mut Errors, object: &Value, namespaced: bool, name_rule: NameRule) {
    let metadata = part(object, "metadata");
    let generate = field(metadata, "generateName");
    if !generate.is_empty() {
        // Five random characters follow, so that a trailing dash is fine.
        let masked = generate.strip_suffix('-').filter(|rest| !rest.is_empty()).map(|rest| format!("{rest}a"));
        let messages = name_rule(masked.as_deref().unwrap_or(generate));
        errors.each("metadata.generateName", generate, messages);
    }
    let name = field(metadata, "name");
    if name.is_empty() {
        errors.required_as("metadata.name", "name or generateName is required");
    } else {
        errors.each("metadata.name", name, name_rule(name));
    }
    let namespace = field(metadata, "namespace");
    if namespaced && namespace.is_empty() {
        errors.required("metadata.namespace");
    } else if namespaced {
        errors.each("metadata.namespace", namespace, names::dns_label(namespace));
    } else if !namespace.is_empty() {
        errors.forbidden("metadata.namespace", "not allowed on this type");
    }
    errors.not_negative("metadata.generation".to_owned(), integer(metadata, "/generation"));
    shared(errors, metadata);
    for finalizer in list(metadata, "/finalizers").iter().filter_map(Value::as_str) {
        errors.each("metadata.finalizers", finalizer, names::qualified_name(finalizer));
    }
    let has = |name: &str| list(metadata, "/finalizers").iter().any(|finalizer| finalizer == name);
    if has("orphan") && has("foregroundDeletion") {
        let detail = "finalizer orphan and foregroundDeletion cannot be both set";
        errors.invalid("metadata.finalizers", part(metadata, "finalizers").clone(), detail);
    }
}

/// What create and update check alike.
fn shared(errors: &mut Errors, metadata: &Value) {
    labels(errors, part(metadata, "labels"), "metadata.labels");
    annotations(errors, part(metadata, "annotations"), "metadata.annotations");
    owners(errors, list(metadata, "/ownerReferences"));
}

pub(super) fn labels(errors: &mut Errors, labels: &Value, path: &str) {
    for (key, value) in entries(labels, "") {
        errors.each(path, key, names::qualified_name(key));
        let value = value.as_str().unwrap_or_default();
        errors.each(path, value, names::label_value(value));
    }
}

pub(super) fn annotations(errors: &mut Errors, annotations: &Value, path: &str) {
    let mut size = 0;
    for (key, value) in entries(annotations, "") {
        errors.each(path, key, names::qualified_name(&key.to_lowercase()));
        size += key.len() + value.as_str().unwrap_or_default().len();
    }
    if size > MOST_ANNOTATIONS_BYTES {
        errors.push(FieldError::too_long(path, MOST_ANNOTATIONS_BYTES));
    }
}

fn owners(errors: &mut Errors, owners: &[Value]) {
    let mut controller: Option<String> = None;
    for (index, owner) in owners.iter().enumerate() {
        let path = format!("metadata.ownerReferences[{index}]");
        let missing = [
            ("apiVersion", "version must not be empty"),
            ("kind", "must not be empty"),
            ("name", "must not be empty"),
            ("uid", "must not be empty"),
        ];
        for (name, detail) in missing {
            if field(owner, name).is_empty() {
                errors.invalid(format!("{path}.{name}"), "", detail);
            }
        }
        if (field(owner, "apiVersion"), field(owner, "kind")) == ("v1", "Event") {
            errors.invalid(&path, owner.clone(), "/v1, Kind=Event is disallowed from being an owner");
        }
        if boolean(owner, "/controller") == Some(true) {
            let current = format!("{}/{}", field(owner, "kind"), field(owner, "name"));
            match &controller {
                Some(first) => {
                    let detail = format!(
                        "Only one reference can have Controller set to true. Found \"true\" in references for {first} and {current}"
                    );
                    errors.invalid("metadata.ownerReferences", Value::from(owners.to_vec()), detail);
                }
                None => controller = Some(current),
            }
        }
    }
}

/// What an update may not do to metadata. Fields that the writer left out keep their value, so only others count.
pub(super) fn object_meta_update(errors: &mut Errors, new: &Value, old: &Value) {
    let (new, old) = (part(new, "metadata"), part(old, "metadata"));
    if is_set(old, "deletionTimestamp") {
        let had = list(old, "/finalizers");
        let mut added: Vec<&str> =
            list(new, "/finalizers").iter().filter(|item| !had.contains(item)).filter_map(Value::as_str).collect();
        added.sort_unstable();
        if !added.is_empty() {
            let quoted: Vec<String> = added.iter().map(|item| format!("{item:?}")).collect();
            let detail = format!(
                "no new finalizers can be added if the object is being deleted, found new finalizers []string{{{}}}",
                quoted.join(", ")
            );
            errors.forbidden("metadata.finalizers", detail);
        }
    }
    let generation = integer(new, "/generation").unwrap_or(0);
    if generation != 0 && generation < integer(old, "/generation").unwrap_or(0) {
        errors.invalid("metadata.generation", generation, "must not be decremented");
    }
    for name in ["name", "namespace", "uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds"] {
        if is_set(new, name) {
            errors.immutable(&format!("metadata.{name}"), new.get(name), old.get(name));
        }
    }
    shared(errors, new);
}

pub(super) fn label_selector(errors: &mut Errors, selector: &Value, path: &str) {
    labels(errors, part(selector, "matchLabels"), &format!("{path}.matchLabels"));
    for (index, term) in list(selector, "/matchExpressions").iter().enumerate() {
        let path = format!("{path}.matchExpressions[{index}]");
        let values = list(term, "/values");
        match field(term, "operator") {
            "In" | "NotIn" if values.is_empty() => {
                errors.required_as(format!("{path}.values"), "must be specified when `operator` is 'In' or 'NotIn'")
            }
            "Exists" | "DoesNotExist" if !values.is_empty() => errors.forbidden(
                format!("{path}.values"),
                "may not be specified when `operator` is 'Exists' or 'DoesNotExist'",
            ),
            "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
            other => errors.invalid(format!("{path}.operator"), other, "not a valid selector operator"),
        }
        let key = field(term, "key");
        errors.each(&format!("{path}.key"), key, names::qualified_name(key));
        for (index, value) in values.iter().filter_map(Value::as_str).enumerate() {
            errors.each(&format!("{path}.values[{index}]"), value, names::label_value(value));
        }
    }
}

pub(super) fn is_empty_selector(selector: &Value) -> bool {
    entries(selector, "/matchLabels").next().is_none() && list(selector, "/matchExpressions").is_empty()
}

/// Whether a LabelSelector selects a set of labels.
pub(super) fn selects(selector: &Value, labels: &Value) -> bool {
    let equal = |(key, value): (&String, &Value)| labels.get(key) == Some(value);
    entries(selector, "/matchLabels").all(equal)
        && list(selector, "/matchExpressions").iter().all(|term| {
            let found = labels.get(field(term, "key"));
            let listed = found.is_some_and(|value| list(term, "/values").contains(value));
            match text(term, "/operator") {
                "In" => listed,
                "NotIn" => !listed,
                "Exists" => found.is_some(),
                "DoesNotExist" => found.is_none(),
                _ => false,
            }
        })
}
