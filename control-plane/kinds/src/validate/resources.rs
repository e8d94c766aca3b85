//! Requests and limits.

use super::names;
use super::{Errors, NOT_NEGATIVE};
use crate::access::entries;
use oarlock_schema::quantity::Quantity;
use serde_json::Value;

/// Requests and limits of one container (or of an overhead, given as limits).
pub(super) fn requirements(errors: &mut Errors, resources: &Value, path: &str) {
    for list in ["limits", "requests"] {
        for (name, value) in entries(resources, &format!("/{list}")) {
            quantity(errors, name, value, &format!("{path}.{list}[{name}]"));
        }
    }
    for (name, value) in entries(resources, "/requests") {
        let Some(limit) = resources.get("limits").and_then(|limits| limits.get(name)) else { continue };
        let (Ok(request), Ok(limit)) = (Quantity::from_json(value), Quantity::from_json(limit)) else { continue };
        let requests = format!("{path}.requests");
        if !can_overcommit(name) && request != limit {
            errors.invalid(requests, request.to_string(), format!("must be equal to {name} limit of {limit}"));
        } else if request > limit {
            let detail = format!("must be less than or equal to {name} limit of {limit}");
            errors.invalid(requests, request.to_string(), detail);
        }
    }
}

fn can_overcommit(name: &str) -> bool {
    matches!(name, "cpu" | "memory" | "ephemeral-storage")
}

fn quantity(errors: &mut Errors, name: &str, value: &Value, path: &str) {
    let messages = names::qualified_name(name);
    let named = messages.is_empty();
    errors.each(path, name, messages);
    if named && !name.contains('/') && !can_overcommit(name) && !name.starts_with("hugepages-") {
        errors.invalid(path, name, "must be a standard resource for containers");
    }
    let Ok(quantity) = Quantity::from_json(value) else { return };
    if quantity.sign() < 0 {
        errors.invalid(path, quantity.to_string(), NOT_NEGATIVE);
    }
    if name.contains('/') && !quantity.is_whole() {
        errors.invalid(path, quantity.to_string(), "must be an integer");
    }
}
