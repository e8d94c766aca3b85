//! Events are stored as `v1` and served as `events.k8s.io/v1` too; these are the two conversions.

use crate::access::{remove, set};
use serde_json::Value;

/// (`v1` name, `events.k8s.io/v1` name) of the fields that differ.
const RENAMED: &[(&str, &str)] = &[
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("reportingComponent", "reportingController"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
    ("source", "deprecatedSource"),
];

/// From the `events.k8s.io/v1` view to the stored form.
pub(crate) fn to_core(event: &mut Value) {
    for (core, view) in RENAMED {
        if let Some(value) = remove(event, view) {
            set(event, core, value);
        }
    }
    if event.get("apiVersion").is_some() {
        set(event, "apiVersion", "v1");
    }
}

/// From the stored form to the `events.k8s.io/v1` view.
pub(crate) fn from_core(event: &mut Value) {
    for (core, view) in RENAMED {
        if let Some(value) = remove(event, core) {
            set(event, view, value);
        }
    }
    if event.get("apiVersion").is_some() {
        set(event, "apiVersion", "events.k8s.io/v1");
    }
}
