//! `metadata.managedFields`: reading, writing, identity and order of its entries.

use super::set::FieldSet;
use serde_json::{Map, Value, json};

/// More managers than this that only update are folded into one.
const MOST_UPDATERS: usize = 10;
const FOLDED: &str = "ancient-changes";

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Operation {
    Apply,
    Update,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entry {
    pub(super) manager: String,
    pub(super) operation: Operation,
    pub(super) api_version: String,
    pub(super) subresource: String,
    pub(super) time: String,
    pub(super) set: FieldSet,
}

impl Entry {
    /// An applier stays the same when it moves to another version; an updater does not.
    pub(super) fn is_same_manager(&self, other: &Self) -> bool {
        self.manager == other.manager
            && self.operation == other.operation
            && self.subresource == other.subresource
            && (self.operation == Operation::Apply || self.api_version == other.api_version)
    }

    /// As conflicts name the manager.
    pub(super) fn readable(&self) -> String {
        let mut text = format!("{:?}", self.manager);
        if !self.subresource.is_empty() {
            text.push_str(&format!(" with subresource {:?}", self.subresource));
        }
        if self.operation == Operation::Update {
            text.push_str(&format!(" using {}", self.api_version));
        }
        text
    }

    fn from_json(value: &Value) -> Option<Self> {
        let text = |name: &str| value.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        let operation = match text("operation").as_str() {
            "Apply" => Operation::Apply,
            "Update" => Operation::Update,
            _ => return None,
        };
        let mut set = FieldSet::from_json(value.get("fieldsV1")?);
        set.member = false;
        Some(Self {
            manager: text("manager"),
            operation,
            api_version: text("apiVersion"),
            subresource: text("subresource"),
            time: text("time"),
            set,
        })
    }

    fn to_json(&self) -> Value {
        let mut entry = Map::new();
        let mut put = |name: &str, value: Value| entry.insert(name.to_owned(), value);
        put("apiVersion", json!(self.api_version));
        put("fieldsType", json!("FieldsV1"));
        put("fieldsV1", self.set.to_json());
        put("manager", json!(self.manager));
        put("operation", json!(if self.operation == Operation::Apply { "Apply" } else { "Update" }));
        if !self.subresource.is_empty() {
            put("subresource", json!(self.subresource));
        }
        if !self.time.is_empty() {
            put("time", json!(self.time));
        }
        Value::Object(entry)
    }
}

/// The entries of an object; `None` when it has none at all.
pub(super) fn read(object: &Value) -> Option<Vec<Entry>> {
    let entries = object.pointer("/metadata/managedFields")?.as_array()?;
    if entries.is_empty() {
        return None;
    }
    // A single empty entry is how clients ask to forget all owners.
    Some(entries.iter().filter_map(Entry::from_json).collect())
}

/// Writes the entries in their canonical order; empty ones go.
pub(super) fn write(object: &mut Value, mut entries: Vec<Entry>) {
    entries.retain(|entry| !entry.set.is_empty());
    fold_old_updaters(&mut entries);
    entries.sort_by(|left, right| {
        let key = |entry: &Entry| {
            (
                entry.operation,
                entry.time.clone(),
                entry.manager.clone(),
                entry.api_version.clone(),
                entry.subresource.clone(),
            )
        };
        key(left).cmp(&key(right))
    });
    let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) else { return };
    if entries.is_empty() {
        metadata.shift_remove("managedFields");
    } else {
        metadata.insert("managedFields".to_owned(), entries.iter().map(Entry::to_json).collect());
    }
}

fn fold_old_updaters(entries: &mut Vec<Entry>) {
    let count = entries.iter().filter(|entry| entry.operation == Operation::Update).count();
    if count <= MOST_UPDATERS {
        return;
    }
    entries.sort_by(|left, right| left.time.cmp(&right.time));
    let mut surplus = count - MOST_UPDATERS + 1;
    let mut folded: Vec<Entry> = Vec::new();
    entries.retain(|entry| {
        if surplus == 0 || entry.operation != Operation::Update || !entry.subresource.is_empty() {
            return true;
        }
        surplus -= 1;
        match folded.iter_mut().find(|other| other.api_version == entry.api_version) {
            Some(other) => {
                other.set = std::mem::take(&mut other.set).union(&entry.set);
                other.time.clone_from(&entry.time);
            }
            None => folded.push(Entry { manager: FOLDED.to_owned(), ..entry.clone() }),
        }
        false
    });
    entries.extend(folded);
}

/// Fields that are nobody's: identity and what the server keeps.
const SYSTEM: &[&[&str]] = &[
    &["apiVersion"],
    &["kind"],
    &["metadata", "name"],
    &["metadata", "namespace"],
    &["metadata", "creationTimestamp"],
    &["metadata", "selfLink"],
    &["metadata", "uid"],
    &["metadata", "generation"],
    &["metadata", "managedFields"],
    &["metadata", "resourceVersion"],
];

/// Takes out what a writer cannot own: system fields, and the half of the object that its resource resets.
pub(super) fn strip(set: &mut FieldSet, subresource: Option<&str>) {
    for path in SYSTEM {
        set.remove(path);
    }
    if let Some(metadata) = set.children.get_mut("f:metadata") {
        metadata.member = false;
        if metadata.is_empty() {
            set.children.remove("f:metadata");
        }
    }
    match subresource {
        Some("status") => set.remove(&["spec"]),
        _ => set.remove(&["status"]),
    }
    set.member = false;
}
