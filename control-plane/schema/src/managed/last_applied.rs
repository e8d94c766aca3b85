//! The bridge from kubectl's client-side apply: an annotation holds what was applied last. Server-side apply by
//! kubectl may take over fields that still are what the annotation says, and keeps the annotation up to date.

use super::compare::{compare, fields_of};
use super::form::Place;
use super::set::FieldSet;
use crate::{Gvk, strict};
use serde_json::Value;

/// The manager for which this holds.
pub(super) const MANAGER: &str = "kubectl";
const ANNOTATION: &str = "kubectl.kubernetes.io/last-applied-configuration";
const MOST_BYTES: usize = 256 * 1024;

fn annotation(object: &Value) -> Option<&str> {
    object.pointer("/metadata/annotations")?.get(ANNOTATION)?.as_str()
}

/// The fields of the annotation whose values are those of the live object.
pub(super) fn unchanged_since(gvk: Gvk<'_>, live: &Value) -> FieldSet {
    let Some(mut last) = annotation(live).and_then(|text| serde_json::from_str::<Value>(text).ok()) else {
        return FieldSet::default();
    };
    if strict::prune(gvk, &mut last).is_err() {
        return FieldSet::default();
    }
    let place = Place::root(gvk);
    let difference = compare(place, Some(&last), Some(live));
    fields_of(place, &last)
        .difference(&difference.changed)
        .difference(&difference.added)
        .difference(&difference.removed)
}

/// Writes what is applied now into the annotation, where there is one.
pub(super) fn refresh(merged: &mut Value, applied: &Value) {
    if annotation(merged).is_none() {
        return;
    }
    let mut applied = applied.clone();
    if let Some(annotations) = applied.pointer_mut("/metadata/annotations").and_then(Value::as_object_mut) {
        annotations.shift_remove(ANNOTATION);
    }
    let text = format!("{applied}\n");
    if text.len() > MOST_BYTES {
        return;
    }
    if let Some(annotations) = merged.pointer_mut("/metadata/annotations").and_then(Value::as_object_mut) {
        annotations.insert(ANNOTATION.to_owned(), Value::String(text));
    }
}
