//! Server-side apply.

use super::compare::{compare, fields_of};
use super::entries::{self, Entry, Operation};
use super::form::Place;
use super::last_applied;
use super::merge::{merge, prune};
use super::set::FieldSet;
use super::{ApplyError, Conflict};
use crate::Gvk;
use serde_json::{Map, Value};

pub struct ApplyInput<'a> {
    pub gvk: Gvk<'a>,
    /// The stored object, or `None` when the apply creates.
    pub live: Option<&'a Value>,
    /// The applied configuration, as the client sent it.
    pub applied: &'a Value,
    /// The `fieldManager` parameter.
    pub manager: &'a str,
    pub force: bool,
    /// `status`, `scale` … when the request is for a subresource.
    pub subresource: Option<&'a str>,
    /// RFC 3339 time, to the second.
    pub now: &'a str,
}

/// Owner of what was there before anything was applied.
const BEFORE_FIRST_APPLY: &str = "before-first-apply";

/// Merges an applied configuration into the live object; the answer carries the new `managedFields`, and is the live
/// object itself when nothing changes. Typing, defaults, validation and the write are the caller's.
pub fn apply(input: ApplyInput<'_>) -> Result<Value, ApplyError> {
    let ApplyInput { gvk, live, applied, manager, force, subresource, now } = input;
    if !applied.is_object() {
        return Err(ApplyError::Invalid("the applied configuration is not an object".to_owned()));
    }
    let given = applied.pointer("/metadata/managedFields").and_then(Value::as_array);
    if given.is_some_and(|entries| !entries.is_empty()) {
        return Err(ApplyError::Invalid("metadata.managedFields must be nil".to_owned()));
    }
    let place = Place::root(gvk);
    let applied = &without_added_structs(place, applied);
    let mut applied_set = fields_of(place, applied);
    entries::strip(&mut applied_set, subresource);

    let mut list = match live {
        Some(live) => entries::read(live).unwrap_or_else(|| vec![before_first_apply(gvk, live, now)]),
        None => Vec::new(),
    };
    let own = Entry {
        manager: manager.to_owned(),
        operation: Operation::Apply,
        api_version: gvk.api_version(),
        subresource: subresource.unwrap_or_default().to_owned(),
        time: now.to_owned(),
        set: applied_set,
    };
    let last = list.iter().position(|entry| entry.is_same_manager(&own)).map(|at| list.remove(at));
    let Some(live) = live else {
        let mut created = applied.clone();
        if created.get("metadata").is_none_or(|metadata| !metadata.is_object()) {
            created["metadata"] = Value::Object(Map::new());
        }
        entries::write(&mut created, vec![own]);
        return Ok(created);
    };

    let mut merged = merge(place, live, &without_system_fields(applied));
    if let Some(last) = &last {
        let owned = list.iter().fold(own.set.clone(), |owned, entry| owned.union(&entry.set));
        prune(place, &mut merged, &last.set, &owned);
    }
    let mut difference = compare(place, Some(live), Some(&merged));
    for set in [&mut difference.added, &mut difference.changed, &mut difference.removed] {
        entries::strip(set, subresource);
    }
    let written = difference.written();
    if !force {
        let allowed = match manager {
            last_applied::MANAGER => last_applied::unchanged_since(gvk, live),
            _ => FieldSet::default(),
        };
        let conflicts = conflicts(&list, &written.difference(&allowed));
        if !conflicts.is_empty() {
            return Err(ApplyError::Conflicts(conflicts));
        }
    }
    let unchanged = written.is_empty() && difference.removed.is_empty();
    if unchanged && last.as_ref().is_some_and(|last| last.set == own.set && last.api_version == own.api_version) {
        return Ok(live.clone());
    }
    for entry in &mut list {
        entry.set = entry.set.difference(&written).difference(&difference.removed);
    }
    list.push(own);
    if manager == last_applied::MANAGER {
        last_applied::refresh(&mut merged, applied);
    }
    entries::write(&mut merged, list);
    Ok(merged)
}

/// The configuration without the empty structs that decoding adds; nobody means to own those.
fn without_added_structs(place: Place, value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let kept = map.iter().filter_map(|(name, value)| {
                let child = place.field(name).0;
                let value = without_added_structs(child, value);
                let added = child.is_always_there() && value.as_object().is_some_and(Map::is_empty);
                (!added).then(|| (name.clone(), value))
            });
            Value::Object(kept.collect())
        }
        Value::Array(items) => items.iter().map(|item| without_added_structs(place.item(), item)).collect(),
        other => other.clone(),
    }
}

/// The configuration without what the server keeps; a resource version stays, since the caller checks it.
fn without_system_fields(applied: &Value) -> Value {
    let mut applied = applied.clone();
    if let Some(metadata) = applied.get_mut("metadata").and_then(Value::as_object_mut) {
        for name in ["managedFields", "creationTimestamp", "generation", "selfLink"] {
            metadata.shift_remove(name);
        }
    }
    applied
}

fn before_first_apply(gvk: Gvk<'_>, live: &Value, now: &str) -> Entry {
    let empty = Value::Object(Map::new());
    let mut set = compare(Place::root(gvk), Some(&empty), Some(live)).added;
    entries::strip(&mut set, None);
    Entry {
        manager: BEFORE_FIRST_APPLY.to_owned(),
        operation: Operation::Update,
        api_version: gvk.api_version(),
        subresource: String::new(),
        time: now.to_owned(),
        set,
    }
}

fn conflicts(others: &[Entry], written: &FieldSet) -> Vec<Conflict> {
    let mut found = Vec::new();
    for entry in others {
        let fields = entry.set.intersection(written).paths();
        found.extend(fields.into_iter().map(|field| Conflict { manager: entry.readable(), field }));
    }
    found.sort();
    found
}
