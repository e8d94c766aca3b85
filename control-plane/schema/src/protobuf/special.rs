//! Types whose JSON form differs from their message: quantities, times, int-or-string, embedded objects.

use super::message::{Failure, read_into, read_leaf, text};
use super::wire::{Reader, WireValue};
use super::{DEPTH_LIMIT, DecodeError};
use crate::catalogue::{Leaf, TypeId, catalogue};
use serde_json::{Map, Value};

pub(super) fn read(leaf: Leaf, bytes: &[u8], depth: usize) -> Result<Value, Failure> {
    match leaf {
        Leaf::Quantity => quantity(bytes),
        Leaf::IntOrString => int_or_string(bytes),
        Leaf::Time => time(bytes, false),
        Leaf::MicroTime => time(bytes, true),
        Leaf::Duration => duration(bytes),
        Leaf::Raw | Leaf::Fields => raw(bytes, depth),
        Leaf::WrappedStrings => wrapped_strings(bytes, depth),
        Leaf::SchemaOrArray | Leaf::SchemaOrBool | Leaf::SchemaOrStrings => schema_or(leaf, bytes, depth),
        _ => Err("a field has the wrong wire type".into()),
    }
}

fn quantity(bytes: &[u8]) -> Result<Value, Failure> {
    let mut read = String::from("0");
    let mut reader = Reader::new(bytes);
    while let Some((tag, value)) = reader.next_field()? {
        if let (1, WireValue::Bytes(bytes)) = (tag, value)
            && !bytes.is_empty()
        {
            read = text(bytes)?;
        }
    }
    Ok(Value::String(read))
}

fn int_or_string(bytes: &[u8]) -> Result<Value, Failure> {
    let (mut is_string, mut number, mut string) = (false, 0i32, String::new());
    let mut reader = Reader::new(bytes);
    while let Some((tag, value)) = reader.next_field()? {
        match (tag, value) {
            (1, WireValue::Varint(kind)) => is_string = kind == 1,
            (2, WireValue::Varint(value)) => number = value as i32,
            (3, WireValue::Bytes(bytes)) => string = text(bytes)?,
            _ => {}
        }
    }
    Ok(if is_string { Value::String(string) } else { Value::from(number) })
}

/// Null for Go's zero time.
fn time(bytes: &[u8], micro: bool) -> Result<Value, Failure> {
    let (mut seconds, mut nanos) = (0i64, 0i32);
    let mut reader = Reader::new(bytes);
    while let Some((tag, value)) = reader.next_field()? {
        match (tag, value) {
            (1, WireValue::Varint(value)) => seconds = value as i64,
            (2, WireValue::Varint(value)) => nanos = value as i32,
            _ => {}
        }
    }
    if seconds == 0 && nanos == 0 {
        return Ok(Value::Null);
    }
    let stamp = jiff::Timestamp::new(seconds, if micro { nanos } else { 0 })
        .map_err(|_| Failure::Reason("a time is out of range"))?;
    let printed = if micro { format!("{stamp:.6}") } else { format!("{stamp:.0}") };
    Ok(Value::String(printed))
}

fn duration(bytes: &[u8]) -> Result<Value, Failure> {
    let mut nanos = 0i64;
    let mut reader = Reader::new(bytes);
    while let Some((tag, value)) = reader.next_field()? {
        if let (1, WireValue::Varint(value)) = (tag, value) {
            nanos = value as i64;
        }
    }
    Ok(Value::String(go_duration(nanos)))
}

/// As Go prints a duration: `1h0m0s`, `1.5s`, `20ms`.
fn go_duration(nanos: i64) -> String {
    if nanos == 0 {
        return "0s".to_owned();
    }
    let sign = if nanos < 0 { "-" } else { "" };
    let total = nanos.unsigned_abs();
    let fraction = |value: u64, unit: u64, suffix: &str| {
        let digits = unit.ilog10() as usize;
        let rest = format!("{:0digits$}", value % unit);
        let rest = rest.trim_end_matches('0');
        let dot = if rest.is_empty() { "" } else { "." };
        format!("{sign}{}{dot}{rest}{suffix}", value / unit)
    };
    if total < 1_000 {
        return format!("{sign}{total}ns");
    }
    if total < 1_000_000 {
        return fraction(total, 1_000, "µs");
    }
    if total < 1_000_000_000 {
        return fraction(total, 1_000_000, "ms");
    }
    let (hours, rest) = (total / 3_600_000_000_000, total % 3_600_000_000_000);
    let (minutes, rest) = (rest / 60_000_000_000, rest % 60_000_000_000);
    let seconds = fraction(rest, 1_000_000_000, "s");
    let seconds = seconds.trim_start_matches('-');
    match (hours, minutes) {
        (0, 0) => format!("{sign}{seconds}"),
        (0, _) => format!("{sign}{minutes}m{seconds}"),
        _ => format!("{sign}{hours}h{minutes}m{seconds}"),
    }
}

/// An embedded object: JSON, or an envelope of its own.
fn raw(bytes: &[u8], depth: usize) -> Result<Value, Failure> {
    let mut body: &[u8] = &[];
    let mut reader = Reader::new(bytes);
    while let Some((tag, value)) = reader.next_field()? {
        if let (1, WireValue::Bytes(bytes)) = (tag, value) {
            body = bytes;
        }
    }
    if body.is_empty() {
        return Ok(Value::Null);
    }
    if body.starts_with(super::MAGIC) {
        let depth = depth.checked_sub(1).ok_or(DecodeError::TooDeep { limit: DEPTH_LIMIT })?;
        return Ok(super::decode_at(body, depth)?);
    }
    serde_json::from_slice(body).map_err(|_| Failure::Reason("an embedded object is not JSON"))
}

fn wrapped_strings(bytes: &[u8], depth: usize) -> Result<Value, Failure> {
    let mut items = Vec::new();
    let mut reader = Reader::new(bytes);
    while let Some((tag, value)) = reader.next_field()? {
        if tag == 1 {
            items.push(read_leaf(Leaf::String, value, depth)?);
        }
    }
    Ok(Value::Array(items))
}

fn schema_type() -> Result<TypeId, Failure> {
    catalogue().by_name("apiextensions.v1.JSONSchemaProps").ok_or(Failure::Reason("the schema type is not known"))
}

fn schema_or(leaf: Leaf, bytes: &[u8], depth: usize) -> Result<Value, Failure> {
    let schema = |bytes: &[u8]| -> Result<Value, Failure> {
        let mut object = Map::new();
        read_into(&mut object, schema_type()?, bytes, depth)?;
        Ok(Value::Object(object))
    };
    let mut single = None;
    let mut items = Vec::new();
    let mut allows = false;
    let mut reader = Reader::new(bytes);
    while let Some((tag, value)) = reader.next_field()? {
        match (leaf, tag, value) {
            (Leaf::SchemaOrBool, 1, WireValue::Varint(value)) => allows = value != 0,
            (Leaf::SchemaOrBool, 2, WireValue::Bytes(bytes))
            | (Leaf::SchemaOrArray | Leaf::SchemaOrStrings, 1, WireValue::Bytes(bytes)) => {
                single = Some(schema(bytes)?);
            }
            (Leaf::SchemaOrArray, 2, WireValue::Bytes(bytes)) => items.push(schema(bytes)?),
            (Leaf::SchemaOrStrings, 2, value) => items.push(read_leaf(Leaf::String, value, depth)?),
            _ => {}
        }
    }
    Ok(match single {
        Some(schema) => schema,
        None if leaf == Leaf::SchemaOrBool => Value::Bool(allows),
        None => Value::Array(items),
    })
}

#[cfg(test)]
mod tests {
    use super::go_duration;

    #[test]
    fn durations_print_as_go_prints_them() {
        for (nanos, text) in [
            (0, "0s"),
            (20_000_000, "20ms"),
            (1_500_000_000, "1.5s"),
            (3_600_000_000_000, "1h0m0s"),
            (90_000_000_000, "1m30s"),
            (-1_500, "-1.5µs"),
        ] {
            assert_eq!(go_duration(nanos), text);
        }
    }
}
