//! Reading and writing fields of JSON objects. Absent fields and fields of the wrong type read as empty, since
//! decoding has typed the object before any of this runs.

use serde_json::{Map, Value};

/// A string field at a JSON pointer; empty when absent.
pub(crate) fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// An integer field at a JSON pointer.
pub(crate) fn integer(value: &Value, pointer: &str) -> Option<i64> {
    value.pointer(pointer).and_then(Value::as_i64)
}

pub(crate) fn boolean(value: &Value, pointer: &str) -> Option<bool> {
    value.pointer(pointer).and_then(Value::as_bool)
}

/// The elements of a list at a JSON pointer; none when absent.
pub(crate) fn list<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// The entries of a map at a JSON pointer; none when absent.
pub(crate) fn entries<'a>(value: &'a Value, pointer: &str) -> impl Iterator<Item = (&'a String, &'a Value)> + use<'a> {
    value.pointer(pointer).and_then(Value::as_object).into_iter().flatten()
}

pub(crate) fn elements_mut<'a>(value: &'a mut Value, field: &str) -> impl Iterator<Item = &'a mut Value> + use<'a> {
    value.get_mut(field).and_then(Value::as_array_mut).into_iter().flatten()
}

/// Sets a field that is absent.
pub(crate) fn set_default(value: &mut Value, field: &str, default: impl Into<Value>) {
    if let Value::Object(map) = value
        && map.get(field).is_none_or(Value::is_null)
    {
        map.insert(field.to_owned(), default.into());
    }
}

/// Sets a field that is absent, or empty text.
pub(crate) fn set_default_text(value: &mut Value, field: &str, default: &str) {
    if value.get(field).and_then(Value::as_str) == Some("") {
        set(value, field, default);
    } else {
        set_default(value, field, default);
    }
}

pub(crate) fn set(value: &mut Value, field: &str, new: impl Into<Value>) {
    if let Value::Object(map) = value {
        map.insert(field.to_owned(), new.into());
    }
}

pub(crate) fn remove(value: &mut Value, field: &str) -> Option<Value> {
    value.as_object_mut().and_then(|map| map.shift_remove(field))
}

/// The object at a field, created empty when absent.
pub(crate) fn child<'a>(value: &'a mut Value, field: &str) -> Option<&'a mut Value> {
    set_default(value, field, Value::Object(Map::new()));
    value.get_mut(field).filter(|child| child.is_object())
}

/// Makes `new[field]` what `old[field]` is, or absent.
pub(crate) fn keep(new: &mut Value, old: &Value, field: &str) {
    match old.get(field) {
        Some(kept) => set(new, field, kept.clone()),
        None => {
            remove(new, field);
        }
    }
}

/// `keep` for a field of metadata.
pub(crate) fn keep_metadata(new: &mut Value, old: &Value, field: &str) {
    if let (Some(new), Some(old)) = (child(new, "metadata"), old.get("metadata")) {
        keep(new, old, field);
    }
}

/// Whether two fields are equal, where absent, null and empty are the same.
pub(crate) fn same(left: &Value, right: &Value, pointer: &str) -> bool {
    equal(left.pointer(pointer), right.pointer(pointer))
}

/// Equality in which absent, null, empty lists and empty objects are one.
pub(crate) fn equal(left: Option<&Value>, right: Option<&Value>) -> bool {
    let is_empty = |value: Option<&Value>| match value {
        None | Some(Value::Null) => true,
        Some(Value::Array(items)) => items.is_empty(),
        Some(Value::Object(map)) => map.is_empty(),
        _ => false,
    };
    match (left, right) {
        (Some(Value::Object(left)), Some(Value::Object(right))) => {
            left.iter().all(|(key, value)| equal(Some(value), right.get(key)))
                && right.iter().all(|(key, value)| left.contains_key(key) || is_empty(Some(value)))
        }
        (Some(Value::Array(left)), Some(Value::Array(right))) => {
            left.len() == right.len() && left.iter().zip(right).all(|(left, right)| equal(Some(left), Some(right)))
        }
        (left, right) => (is_empty(left) && is_empty(right)) || left == right,
    }
}
