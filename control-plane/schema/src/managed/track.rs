//! Ownership after an update, a create or a patch that is no apply.

use super::compare::compare;
use super::entries::{self, Entry, Operation};
use super::form::Place;
use crate::Gvk;
use serde_json::{Map, Value};

pub struct UpdateInput<'a> {
    pub gvk: Gvk<'a>,
    pub old: Option<&'a Value>,
    pub new: &'a mut Value,
    /// The `fieldManager` parameter, or the first part of the user agent.
    pub manager: &'a str,
    pub subresource: Option<&'a str>,
    /// RFC 3339 time, to the second.
    pub now: &'a str,
}

/// Records in `new` which fields an update, create or non-apply patch changed.
pub fn track_update(input: UpdateInput<'_>) {
    let UpdateInput { gvk, old, new, manager, subresource, now } = input;
    let given = entries::read(new);
    let before = old.and_then(entries::read);
    if old.is_some() && before.is_none() && given.is_none() {
        // Nobody asked for ownership of this object so far.
        return;
    }
    let mut list = given.or(before).unwrap_or_default();
    let empty = Value::Object(Map::new());
    let mut difference = compare(Place::root(gvk), Some(old.unwrap_or(&empty)), Some(new));
    for set in [&mut difference.added, &mut difference.changed, &mut difference.removed] {
        entries::strip(set, subresource);
    }
    let written = difference.written();
    let own = Entry {
        manager: manager.to_owned(),
        operation: Operation::Update,
        api_version: gvk.api_version(),
        subresource: subresource.unwrap_or_default().to_owned(),
        time: now.to_owned(),
        set: written.clone(),
    };
    let mut found = false;
    for entry in &mut list {
        if entry.is_same_manager(&own) {
            found = true;
            let set = entry.set.difference(&difference.removed).union(&written);
            if set != entry.set {
                entry.set = set;
                now.clone_into(&mut entry.time);
            }
        } else {
            entry.set = entry.set.difference(&written).difference(&difference.removed);
        }
    }
    if !found {
        list.push(own);
    }
    entries::write(new, list);
}
