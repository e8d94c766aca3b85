//! Namespaces, Nodes, ServiceAccounts, Leases, PriorityClasses and RuntimeClasses.

use super::affinity;
use super::metadata::{object_meta, object_meta_update};
use super::{Errors, field, is_set, names, net, part};
use crate::FieldError;
use crate::access::{boolean, entries, equal, integer, list};
use oarlock_schema::quantity::Quantity;
use serde_json::Value;

/// Metadata only, for status updates of kinds whose status has no rules.
pub(crate) fn metadata_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    errors.0
}

pub(crate) fn namespace(object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta(&mut errors, object, false, names::dns_label);
    namespace_finalizers(&mut errors, object);
    errors.0
}

pub(crate) fn namespace_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    namespace_finalizers(&mut errors, new);
    errors.0
}

fn namespace_finalizers(errors: &mut Errors, object: &Value) {
    for finalizer in list(object, "/spec/finalizers").iter().filter_map(Value::as_str) {
        errors.each("spec.finalizers", finalizer, names::qualified_name(finalizer));
        if !finalizer.contains('/') && finalizer != "kubernetes" {
            let detail = "name is neither a standard finalizer name nor is it fully qualified";
            errors.invalid("spec.finalizers", finalizer, detail);
        }
    }
}

pub(crate) fn node(object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta(&mut errors, object, false, names::dns_subdomain);
    node_parts(&mut errors, object);
    errors.0
}

pub(crate) fn node_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    node_parts(&mut errors, new);
    let (spec, before) = (part(new, "spec"), part(old, "spec"));
    let had_range = !field(before, "podCIDR").is_empty() || !list(before, "/podCIDRs").is_empty();
    if had_range && !equal(spec.get("podCIDRs"), before.get("podCIDRs")) {
        errors.forbidden("spec.podCIDRs", "node updates may not change podCIDR except from \"\" to valid");
    }
    let provider = field(before, "providerID");
    if !provider.is_empty() && provider != field(spec, "providerID") {
        errors.forbidden("spec.providerID", "node updates may not change providerID except from \"\" to valid");
    }
    errors.0
}

/// A status update of a node may not touch capacity badly.
pub(crate) fn node_status_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    node_resources(&mut errors, new);
    let mut seen = std::collections::HashSet::new();
    for (index, address) in list(new, "/status/addresses").iter().enumerate() {
        if !seen.insert((field(address, "type"), field(address, "address"))) {
            errors.duplicate(format!("status.addresses[{index}]"), address.clone());
        }
    }
    errors.0
}

fn node_resources(errors: &mut Errors, object: &Value) {
    for list in ["capacity", "allocatable"] {
        for (name, value) in entries(object, &format!("/status/{list}")) {
            let path = format!("status.{list}.{name}");
            errors.each(&path, name, names::qualified_name(name));
            if Quantity::from_json(value).is_ok_and(|quantity| quantity.sign() < 0) {
                errors.invalid(path, value.clone(), super::NOT_NEGATIVE);
            }
        }
    }
}

fn node_parts(errors: &mut Errors, object: &Value) {
    let spec = part(object, "spec");
    affinity::taints(errors, list(spec, "/taints"), "metadata.taints");
    node_resources(errors, object);
    for (index, range) in list(spec, "/podCIDRs").iter().filter_map(Value::as_str).enumerate() {
        net::cidr(errors, &format!("spec.podCIDRs[{index}]"), range);
    }
}

pub(crate) fn service_account(object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta(&mut errors, object, true, names::dns_subdomain);
    errors.0
}

pub(crate) fn lease(object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta(&mut errors, object, true, names::dns_subdomain);
    lease_spec(&mut errors, object);
    errors.0
}

pub(crate) fn lease_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    lease_spec(&mut errors, new);
    errors.0
}

fn lease_spec(errors: &mut Errors, object: &Value) {
    let spec = part(object, "spec");
    if let Some(seconds) = integer(spec, "/leaseDurationSeconds").filter(|seconds| *seconds <= 0) {
        errors.invalid("spec.leaseDurationSeconds", seconds, "must be greater than 0");
    }
    errors.not_negative("spec.leaseTransitions".to_owned(), integer(spec, "/leaseTransitions"));
    if is_set(spec, "preferredHolder") && !is_set(spec, "strategy") {
        let holder = field(spec, "preferredHolder");
        errors.invalid("spec.preferredHolder", holder, "may not be set when strategy is unset");
    }
}

/// The highest priority that is not the system's.
const MOST_PRIORITY: i64 = 1_000_000_000;
const SYSTEM_PRIORITIES: &[(&str, i64)] =
    &[("system-node-critical", 2_000_001_000), ("system-cluster-critical", 2_000_000_000)];

pub(crate) fn priority_class(object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta(&mut errors, object, false, names::dns_subdomain);
    let name = field(part(object, "metadata"), "name");
    let value = integer(object, "/value").unwrap_or(0);
    if let Some((_, expected)) = SYSTEM_PRIORITIES.iter().find(|(system, _)| *system == name) {
        if value != *expected || boolean(object, "/globalDefault") == Some(true) {
            let detail = "priority class names with 'system-' prefix are reserved for system use only";
            errors.forbidden("metadata.name", detail);
        }
    } else if name.starts_with("system-") {
        let detail = "priority class names with 'system-' prefix are reserved for system use only";
        errors.forbidden("metadata.name", detail);
    } else if value > MOST_PRIORITY {
        let detail = format!("maximum allowed value of a user defined priority is {MOST_PRIORITY}");
        errors.forbidden("value", detail);
    }
    preemption_policy(&mut errors, object);
    errors.0
}

fn preemption_policy(errors: &mut Errors, object: &Value) {
    if is_set(object, "preemptionPolicy") {
        errors.one_of(
            "preemptionPolicy".to_owned(),
            field(object, "preemptionPolicy"),
            &["PreemptLowerPriority", "Never"],
        );
    }
}

pub(crate) fn priority_class_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    if integer(new, "/value").unwrap_or(0) != integer(old, "/value").unwrap_or(0) {
        errors.forbidden("value", "may not be changed in an update.");
    }
    errors.immutable("preemptionPolicy", new.get("preemptionPolicy"), old.get("preemptionPolicy"));
    errors.0
}

pub(crate) fn runtime_class(object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta(&mut errors, object, false, names::dns_subdomain);
    let handler = field(object, "handler");
    errors.each("handler", handler, names::dns_label(handler));
    errors.0
}

pub(crate) fn runtime_class_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    errors.immutable("handler", new.get("handler"), old.get("handler"));
    errors.0
}
