//! The columns of events, in both of their APIs.

use super::time::since;
use super::{column, name, wide};
use crate::access::{integer, text};
use crate::kind::Column;
use jiff::Timestamp;
use serde_json::Value;

pub(crate) const EVENT: &[Column] = &[
    column("Last Seen", "string", "Time since the event was last seen."),
    column("Type", "string", "Normal or Warning."),
    column("Reason", "string", "Why the event was sent, in one word."),
    column("Object", "string", "Object that the event is about."),
    wide("Subobject", "Part of the object that the event is about."),
    wide("Source", "Component that sent the event."),
    column("Message", "string", "What happened."),
    wide("First Seen", "Time since the event was first seen."),
    Column { name: "Count", kind: "string", format: "", priority: 1, description: "How often the event was seen." },
    Column { name: "Name", kind: "string", format: "name", priority: 1, description: "Name of the event." },
];

/// `v1` events.
pub(crate) fn event(object: &Value, now: Timestamp) -> Vec<Value> {
    let time = |pointer: &str| object.pointer(pointer).filter(|value| !value.is_null());
    let first = since(time("/firstTimestamp").or_else(|| time("/eventTime")), now);
    let mut last = match time("/lastTimestamp") {
        Some(seen) => since(Some(seen), now),
        None => first.clone(),
    };
    let mut count = integer(object, "/count").unwrap_or(0).max(1);
    if let Some(series) = object.get("series").filter(|series| series.is_object()) {
        last = since(series.get("lastObservedTime"), now);
        count = integer(series, "/count").unwrap_or(0);
    }
    let kind = text(object, "/involvedObject/kind").to_lowercase();
    let target = match text(object, "/involvedObject/name") {
        "" => kind,
        name => format!("{kind}/{name}"),
    };
    vec![
        Value::from(last),
        Value::from(text(object, "/type")),
        Value::from(text(object, "/reason")),
        Value::from(target),
        Value::from(text(object, "/involvedObject/fieldPath")),
        Value::from(source(object)),
        Value::from(text(object, "/message").trim()),
        Value::from(first),
        Value::from(count),
        name(object),
    ]
}

/// `events.k8s.io/v1` events, shown as what they are stored as.
pub(crate) fn events_event(object: &Value, now: Timestamp) -> Vec<Value> {
    let mut stored = object.clone();
    crate::event_views::to_core(&mut stored);
    event(&stored, now)
}

fn source(object: &Value) -> String {
    let mut component = text(object, "/source/component");
    if component.is_empty() {
        component = text(object, "/reportingComponent");
    }
    let mut host = text(object, "/source/host");
    if host.is_empty() {
        host = text(object, "/reportingInstance");
    }
    if host.is_empty() { component.to_owned() } else { format!("{component}, {host}") }
}
