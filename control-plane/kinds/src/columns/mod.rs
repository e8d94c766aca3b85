//! Printer columns: what `kubectl get` shows of each kind, cell by cell as upstream prints it.

mod cluster;
mod event;
mod network;
mod pod;
mod storage;
mod time;
mod workload;

pub(crate) use cluster::*;
pub(crate) use event::{EVENT, event, events_event};
pub(crate) use network::*;
pub(crate) use pod::{POD, pod};
pub(crate) use storage::*;
pub(crate) use workload::*;

use crate::access::{list, text};
use crate::kind::Column;
use jiff::Timestamp;
use serde_json::Value;

const fn column(name: &'static str, kind: &'static str, description: &'static str) -> Column {
    Column { name, kind, format: "", priority: 0, description }
}

/// A column of `-o wide`.
const fn wide(name: &'static str, description: &'static str) -> Column {
    Column { name, kind: "string", format: "", priority: 1, description }
}

pub(crate) const NAME: Column = Column {
    name: "Name",
    kind: "string",
    format: "name",
    priority: 0,
    description: "Name of the object, unique in its namespace.",
};
pub(crate) const AGE: Column = column("Age", "string", "Time since the object was created.");
const CONTAINERS: Column = wide("Containers", "Names of the containers in the template.");
const IMAGES: Column = wide("Images", "Images of the containers in the template.");
const SELECTOR: Column = wide("Selector", "Labels by which the object finds its pods.");

pub(crate) fn name(object: &Value) -> Value {
    Value::from(text(object, "/metadata/name"))
}

pub(crate) fn age(object: &Value, now: Timestamp) -> Value {
    Value::from(time::since(object.pointer("/metadata/creationTimestamp"), now))
}

fn or<'a>(given: &'a str, absent: &'a str) -> &'a str {
    if given.is_empty() { absent } else { given }
}

/// Field `field` of each element of a list, joined by commas.
fn joined(object: &Value, pointer: &str, field: &str) -> String {
    list(object, pointer).iter().map(|item| text(item, field)).collect::<Vec<_>>().join(",")
}

/// `a=b,c=d` in key order, or `<none>`.
fn labels(map: Option<&Value>) -> String {
    let mut pairs: Vec<String> = map
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
        .collect();
    pairs.sort();
    if pairs.is_empty() { "<none>".to_owned() } else { pairs.join(",") }
}

/// A LabelSelector as one line.
fn label_selector(selector: Option<&Value>) -> String {
    let Some(selector) = selector else { return "<none>".to_owned() };
    let mut terms: Vec<String> = crate::access::entries(selector, "/matchLabels")
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
        .collect();
    for term in list(selector, "/matchExpressions") {
        let key = text(term, "/key");
        let mut values: Vec<&str> = list(term, "/values").iter().filter_map(Value::as_str).collect();
        values.sort_unstable();
        let values = values.join(",");
        terms.push(match text(term, "/operator") {
            "In" => format!("{key} in ({values})"),
            "NotIn" => format!("{key} notin ({values})"),
            "DoesNotExist" => format!("!{key}"),
            _ => key.to_owned(),
        });
    }
    terms.sort();
    if terms.is_empty() { "<none>".to_owned() } else { terms.join(",") }
}

/// `a,b,c + 2 more...`: the first three of a list and how many follow.
fn first_three(items: &[String]) -> String {
    const SHOWN: usize = 3;
    if items.len() > SHOWN {
        format!("{} + {} more...", items[..SHOWN].join(","), items.len() - SHOWN)
    } else {
        items.join(",")
    }
}

#[cfg(test)]
mod tests;
