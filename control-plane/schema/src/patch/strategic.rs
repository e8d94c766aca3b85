//! Strategic merge: a merge patch that knows which lists are maps by a key, and the directives `$patch`,
//! `$retainKeys`, `$setElementOrder/…` and `$deleteFromPrimitiveList/…`.

use super::PatchError;
use super::order::{arrange, identity};
use crate::Gvk;
use crate::catalogue::{Leaf, Property, Shape, TypeId, catalogue};
use serde_json::{Map, Value};

const PATCH: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const DELETE_FROM: &str = "$deleteFromPrimitiveList/";
const ORDER: &str = "$setElementOrder/";

/// Applies a strategic merge patch by the merge keys and patch strategies of the kind. On error `doc` is left as it was.
pub fn strategic_merge(gvk: Gvk<'_>, doc: &mut Value, patch: &Value) -> Result<(), PatchError> {
    let Value::Object(patch) = patch else { return Err(bad_document()) };
    let kind = catalogue().by_gvk(gvk).map_or(Node::Unknown, Node::Struct);
    let mut merged = match &*doc {
        Value::Object(map) => map.clone(),
        _ => Map::new(),
    };
    merge_map(&mut merged, patch, kind)?;
    *doc = Value::Object(merged);
    Ok(())
}

fn bad_document() -> PatchError {
    PatchError::Invalid("invalid JSON document".to_owned())
}

fn invalid(message: impl Into<String>) -> PatchError {
    PatchError::Invalid(message.into())
}

/// What is known of the type of a JSON object.
#[derive(Clone, Copy)]
enum Node {
    Struct(TypeId),
    /// A map whose values are structs.
    MapOf(TypeId),
    Unknown,
}

impl Node {
    fn property(self, name: &str) -> Option<&'static Property> {
        match self {
            Self::Struct(id) => catalogue().property(id, name),
            _ => None,
        }
    }

    fn child(self, name: &str) -> Self {
        match self {
            Self::MapOf(id) => Self::Struct(id),
            _ => match self.property(name).map(|property| property.shape) {
                Some(Shape::One(Leaf::Object(id)) | Shape::List(Leaf::Object(id))) => Self::Struct(id),
                Some(Shape::Map(Leaf::Object(id))) => Self::MapOf(id),
                _ => Self::Unknown,
            },
        }
    }
}

fn merge_map(original: &mut Map<String, Value>, patch: &Map<String, Value>, node: Node) -> Result<(), PatchError> {
    match patch.get(PATCH) {
        Some(Value::String(directive)) if directive == "replace" => {
            original.clear();
            for (key, value) in patch.iter().filter(|(key, value)| *key != PATCH && !value.is_null()) {
                original.insert(key.clone(), value.clone());
            }
            return Ok(());
        }
        Some(Value::String(directive)) if directive == "delete" => {
            original.clear();
            return Ok(());
        }
        Some(Value::String(directive)) if directive == "merge" => {}
        Some(directive) => return Err(invalid(format!("unknown patch type found: {directive}"))),
        None => {}
    }
    retain_keys(original, patch)?;
    for (key, value) in patch {
        if let Some(field) = key.strip_prefix(DELETE_FROM) {
            delete_from(original, field, value)?;
        }
    }
    for (key, value) in patch {
        if !key.starts_with('$') {
            merge_field(original, key, value, patch.get(&format!("{ORDER}{key}")), node)?;
        }
    }
    for (key, value) in patch {
        let Some(field) = key.strip_prefix(ORDER) else { continue };
        if !patch.contains_key(field) {
            set_order(original, field, value, node)?;
        }
    }
    Ok(())
}

fn retain_keys(original: &mut Map<String, Value>, patch: &Map<String, Value>) -> Result<(), PatchError> {
    let Some(retained) = patch.get(RETAIN_KEYS) else { return Ok(()) };
    let Value::Array(retained) = retained else { return Err(invalid("invalid patch format of retainKeys")) };
    let is_retained = |key: &str| retained.iter().any(|item| item.as_str() == Some(key));
    let stray = patch.iter().find(|(key, value)| !key.starts_with('$') && !value.is_null() && !is_retained(key));
    if stray.is_some() {
        return Err(invalid("retainKeys list doesn't contain all present keys in the patch"));
    }
    original.retain(|key, _| is_retained(key));
    Ok(())
}

fn delete_from(original: &mut Map<String, Value>, field: &str, deleted: &Value) -> Result<(), PatchError> {
    let Value::Array(deleted) = deleted else { return Err(invalid("invalid patch format of primitive list")) };
    if let Some(Value::Array(items)) = original.get_mut(field) {
        items.retain(|item| !deleted.contains(item));
    }
    Ok(())
}

fn merge_field(
    original: &mut Map<String, Value>,
    key: &str,
    value: &Value,
    order: Option<&Value>,
    node: Node,
) -> Result<(), PatchError> {
    match value {
        Value::Null => {
            original.shift_remove(key);
        }
        Value::Object(patch) => {
            let replaces = node.property(key).is_some_and(|property| property.patch_replace);
            let entry = original.entry(key).or_insert(Value::Null);
            if replaces || !entry.is_object() {
                *entry = Value::Object(Map::new());
            }
            if let Value::Object(map) = entry {
                merge_map(map, patch, node.child(key))?;
            }
        }
        Value::Array(patch) => {
            let property = node.property(key);
            let merges = property.is_some_and(|property| property.patch_merge);
            let before = match original.get(key) {
                Some(Value::Array(items)) if merges => items.clone(),
                _ => Vec::new(),
            };
            let merge_key = property.and_then(|property| property.merge_key);
            let mut merged = if merges {
                merge_list(before.clone(), patch, merge_key, node.child(key))?
            } else {
                without_directives(patch)
            };
            if let (true, Some(order)) = (merges, order) {
                let Value::Array(order) = order else {
                    return Err(invalid("invalid patch format of setElementOrder list"));
                };
                merged = arrange(merged, order, &before, merge_key);
            }
            original.insert(key.to_owned(), Value::Array(merged));
        }
        scalar => {
            original.insert(key.to_owned(), scalar.clone());
        }
    }
    Ok(())
}

fn set_order(original: &mut Map<String, Value>, field: &str, order: &Value, node: Node) -> Result<(), PatchError> {
    let Value::Array(order) = order else { return Err(invalid("invalid patch format of setElementOrder list")) };
    let merge_key = node.property(field).and_then(|property| property.merge_key);
    if let Some(Value::Array(items)) = original.get_mut(field) {
        let before = items.clone();
        *items = arrange(std::mem::take(items), order, &before, merge_key);
    }
    Ok(())
}

/// A list that replaces another: its directive elements say nothing more.
fn without_directives(patch: &[Value]) -> Vec<Value> {
    patch.iter().filter(|item| item.get(PATCH).is_none()).cloned().collect()
}

fn merge_list(
    mut original: Vec<Value>,
    patch: &[Value],
    merge_key: Option<&str>,
    node: Node,
) -> Result<Vec<Value>, PatchError> {
    let before = original.clone();
    let mut wanted = Vec::with_capacity(patch.len());
    let mut replaces = false;
    for item in patch {
        match item.get(PATCH).and_then(Value::as_str) {
            Some("delete") => {
                let key = merge_key.ok_or_else(|| invalid("delete patch type with no merge key defined"))?;
                let deleted = item.get(key).ok_or_else(|| no_merge_key(item, key))?;
                original.retain(|other| other.get(key) != Some(deleted));
            }
            Some("replace") => replaces = true,
            Some("merge") => return Err(invalid("merging lists cannot yet be specified in the patch")),
            Some(other) => return Err(invalid(format!("unknown patch type found: {other}"))),
            None => wanted.push(item.clone()),
        }
    }
    if replaces {
        return Ok(wanted);
    }
    for item in &wanted {
        merge_item(&mut original, item, merge_key, node)?;
    }
    Ok(arrange(original, &wanted, &before, merge_key))
}

fn merge_item(original: &mut Vec<Value>, item: &Value, merge_key: Option<&str>, node: Node) -> Result<(), PatchError> {
    let found = match merge_key {
        None => original.contains(item).then_some(None),
        Some(key) => {
            let wanted = identity(item, merge_key).ok_or_else(|| no_merge_key(item, key))?;
            original.iter().position(|other| other.get(key) == Some(wanted)).map(Some)
        }
    };
    match (found, item) {
        (Some(None), _) => {}
        (Some(Some(at)), Value::Object(patch)) => {
            if let Value::Object(map) = &mut original[at] {
                merge_map(map, patch, node)?;
            }
        }
        (None, Value::Object(patch)) => {
            let mut fresh = Map::new();
            merge_map(&mut fresh, patch, node)?;
            original.push(Value::Object(fresh));
        }
        _ => original.push(item.clone()),
    }
    Ok(())
}

fn no_merge_key(item: &Value, key: &str) -> PatchError {
    invalid(format!("map: {item} does not contain declared merge key: {key}"))
}
