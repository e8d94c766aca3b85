//! Messages of the catalogue: tags to properties, zero values dropped as JSON would drop them.

use super::special;
use super::wire::{Reader, WireValue};
use super::{DEPTH_LIMIT, DecodeError};
use crate::catalogue::{Leaf, Property, Shape, TypeId, catalogue};
use base64::Engine;
use serde_json::{Map, Value};

/// Reads the message `bytes` of a type into `object`.
pub(super) fn read_into(
    object: &mut Map<String, Value>,
    id: TypeId,
    bytes: &[u8],
    depth: usize,
) -> Result<(), DecodeError> {
    let depth = depth.checked_sub(1).ok_or(DecodeError::TooDeep { limit: DEPTH_LIMIT })?;
    let malformed = |reason| DecodeError::Malformed { message: catalogue().full_name(id), reason };
    let mut reader = Reader::new(bytes);
    while let Some((tag, value)) = reader.next_field().map_err(malformed)? {
        let properties = catalogue().properties(id);
        let Some(property) = properties.iter().find(|property| property.tag == tag && !property.inlined) else {
            continue;
        };
        read_property(object, property, value, depth).map_err(|failure| match failure {
            Failure::Reason(reason) => malformed(reason),
            Failure::Inner(error) => error,
        })?;
    }
    Ok(())
}

pub(super) enum Failure {
    Reason(&'static str),
    Inner(DecodeError),
}

impl From<&'static str> for Failure {
    fn from(reason: &'static str) -> Self {
        Self::Reason(reason)
    }
}

impl From<DecodeError> for Failure {
    fn from(error: DecodeError) -> Self {
        Self::Inner(error)
    }
}

fn read_property(
    object: &mut Map<String, Value>,
    property: &Property,
    value: WireValue<'_>,
    depth: usize,
) -> Result<(), Failure> {
    if property.is_inline_message() {
        let (Leaf::Object(inner), WireValue::Bytes(bytes)) = (property.shape.leaf(), value) else {
            return Err("an inline message has the wrong wire type".into());
        };
        return Ok(read_into(object, inner, bytes, depth)?);
    }
    match property.shape {
        Shape::One(leaf) => {
            let read = read_leaf(leaf, value, depth)?;
            if !is_dropped(property, leaf, &read) {
                object.insert(property.name.to_owned(), read);
            }
        }
        Shape::List(leaf) => {
            let entry = object.entry(property.name).or_insert_with(|| Value::Array(Vec::new()));
            let Value::Array(items) = entry else { return Err("a repeated field clashes with another".into()) };
            read_item(items, leaf, value, depth)?;
        }
        Shape::Map(leaf) => {
            let WireValue::Bytes(bytes) = value else { return Err("a map entry has the wrong wire type".into()) };
            let (key, read) = read_entry(leaf, bytes, depth)?;
            let entry = object.entry(property.name).or_insert_with(|| Value::Object(Map::new()));
            let Value::Object(map) = entry else { return Err("a map field clashes with another".into()) };
            map.insert(key, read);
        }
    }
    Ok(())
}

/// Whether JSON from a Go client would not show this value.
fn is_dropped(property: &Property, leaf: Leaf, value: &Value) -> bool {
    match value {
        Value::Null => true,
        _ if property.pointer || property.keep => false,
        Value::Bool(set) => !set,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty() && leaf != Leaf::Quantity,
        Value::Object(map) => map.is_empty(),
        Value::Array(_) => false,
    }
}

/// One element, or a packed run of numbers.
fn read_item(items: &mut Vec<Value>, leaf: Leaf, value: WireValue<'_>, depth: usize) -> Result<(), Failure> {
    if let (Leaf::Int32 | Leaf::Int64 | Leaf::Bool, WireValue::Bytes(packed)) = (leaf, &value) {
        let mut reader = Reader::new(packed);
        while !reader.is_empty() {
            items.push(read_leaf(leaf, WireValue::Varint(reader.varint()?), depth)?);
        }
        return Ok(());
    }
    items.push(read_leaf(leaf, value, depth)?);
    Ok(())
}

fn read_entry(leaf: Leaf, bytes: &[u8], depth: usize) -> Result<(String, Value), Failure> {
    let mut key = String::new();
    let mut read = None;
    let mut reader = Reader::new(bytes);
    while let Some((tag, value)) = reader.next_field()? {
        match (tag, value) {
            (1, WireValue::Bytes(bytes)) => key = text(bytes)?,
            (2, value) => read = Some(read_leaf(leaf, value, depth)?),
            _ => {}
        }
    }
    let read = match read {
        Some(read) => read,
        None => empty(leaf, depth)?,
    };
    Ok((key, read))
}

/// The value of a map entry that has none on the wire.
fn empty(leaf: Leaf, depth: usize) -> Result<Value, Failure> {
    match leaf {
        Leaf::Bool | Leaf::Int32 | Leaf::Int64 => read_leaf(leaf, WireValue::Varint(0), depth),
        Leaf::Double => read_leaf(leaf, WireValue::Fixed64(0), depth),
        _ => read_leaf(leaf, WireValue::Bytes(&[]), depth),
    }
}

pub(super) fn read_leaf(leaf: Leaf, value: WireValue<'_>, depth: usize) -> Result<Value, Failure> {
    Ok(match (leaf, value) {
        (Leaf::Bool, WireValue::Varint(number)) => Value::Bool(number != 0),
        // Negative int32 values are sign-extended to 64 bits on the wire; truncation is what the format asks for.
        (Leaf::Int32, WireValue::Varint(number)) => Value::from(number as i32),
        (Leaf::Int64, WireValue::Varint(number)) => Value::from(number as i64),
        (Leaf::Double, WireValue::Fixed64(bits)) => Value::from(f64::from_bits(bits)),
        (Leaf::Double, WireValue::Fixed32(bits)) => Value::from(f64::from(f32::from_bits(bits))),
        (Leaf::String, WireValue::Bytes(bytes)) => Value::String(text(bytes)?),
        (Leaf::Bytes, WireValue::Bytes(bytes)) => {
            Value::String(base64::engine::general_purpose::STANDARD.encode(bytes))
        }
        (Leaf::Object(id), WireValue::Bytes(bytes)) => {
            let mut inner = Map::new();
            read_into(&mut inner, id, bytes, depth)?;
            Value::Object(inner)
        }
        (_, WireValue::Bytes(bytes)) => special::read(leaf, bytes, depth)?,
        _ => return Err("a field has the wrong wire type".into()),
    })
}

pub(super) fn text(bytes: &[u8]) -> Result<String, &'static str> {
    std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| "a string is not UTF-8")
}
