//! Bodies to JSON values, with a message for each repeated key.

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use std::cell::RefCell;
use std::fmt;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ParseError {
    #[error("{0}")]
    Json(String),
    #[error("error converting YAML to JSON: yaml: {0}")]
    Yaml(String),
}

/// Parses JSON. The list holds one `duplicate field "spec.foo"` message for each repeated key (the last value wins).
pub fn parse_json(body: &[u8]) -> Result<(Value, Vec<String>), ParseError> {
    let seen = RefCell::new(Seen::default());
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let parsed = Seed { seen: &seen, yaml: false }.deserialize(&mut deserializer);
    let parsed = parsed.and_then(|value| deserializer.end().map(|()| value));
    match parsed {
        Ok(value) => Ok((value, seen.into_inner().duplicates)),
        Err(error) => Err(ParseError::Json(go_wording(body, &error))),
    }
}

/// Parses one YAML document (JSON is YAML too), with the same duplicate messages as `parse_json`.
pub fn parse_yaml(body: &[u8]) -> Result<(Value, Vec<String>), ParseError> {
    let seen = RefCell::new(Seen::default());
    let mut documents = serde_yaml_ng::Deserializer::from_slice(body);
    let Some(document) = documents.next() else { return Ok((Value::Null, Vec::new())) };
    let value =
        Seed { seen: &seen, yaml: true }.deserialize(document).map_err(|error| ParseError::Yaml(error.to_string()))?;
    Ok((value, seen.into_inner().duplicates))
}

/// Words a syntax error as Go's decoder does.
fn go_wording(body: &[u8], error: &serde_json::Error) -> String {
    if error.is_eof() {
        return "unexpected end of JSON input".to_owned();
    }
    let line = body.split(|byte| *byte == b'\n').nth(error.line().saturating_sub(1)).unwrap_or_default();
    let rest = line.get(error.column().saturating_sub(1)..).unwrap_or_default();
    let found = String::from_utf8_lossy(&rest[..rest.len().min(4)]).chars().next();
    let text = error.to_string();
    let place = if text.starts_with("trailing characters") {
        "after top-level value"
    } else if text.starts_with("expected `:`") {
        "after object key"
    } else if text.starts_with("expected `,` or `}`") {
        "after object key:value pair"
    } else if text.starts_with("expected `,` or `]`") {
        "after array element"
    } else if text.starts_with("key must be a string") {
        "looking for beginning of object key string"
    } else if text.starts_with("expected value") || text.starts_with("expected ident") {
        "looking for beginning of value"
    } else {
        return text;
    };
    match found {
        Some(found) => format!("invalid character {found:?} {place}"),
        None => text,
    }
}

#[derive(Default)]
struct Seen {
    path: String,
    duplicates: Vec<String>,
}

/// More repeated keys than this are not worth a message each.
const MOST_MESSAGES: usize = 100;

#[derive(Clone, Copy)]
struct Seed<'a> {
    seen: &'a RefCell<Seen>,
    yaml: bool,
}

impl<'de> DeserializeSeed<'de> for Seed<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seed<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("a number is not finite"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        let start = self.seen.borrow().path.len();
        loop {
            self.seen.borrow_mut().path.push_str(&format!("[{}]", items.len()));
            let item = access.next_element_seed(self)?;
            self.seen.borrow_mut().path.truncate(start);
            match item {
                Some(item) => items.push(item),
                None => return Ok(Value::Array(items)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        let mut merges = Vec::new();
        let start = self.seen.borrow().path.len();
        while let Some(key) = access.next_key_seed(Key)? {
            {
                let mut seen = self.seen.borrow_mut();
                if start > 0 {
                    seen.path.push('.');
                }
                seen.path.push_str(&key);
                if map.contains_key(&key) && seen.duplicates.len() < MOST_MESSAGES {
                    let message = format!("duplicate field \"{}\"", seen.path);
                    seen.duplicates.push(message);
                }
            }
            let value = access.next_value_seed(self)?;
            self.seen.borrow_mut().path.truncate(start);
            if self.yaml && key == "<<" {
                merges.push(value);
            } else {
                map.insert(key, value);
            }
        }
        for merge in merges {
            merge_into(&mut map, merge).map_err(A::Error::custom)?;
        }
        Ok(Value::Object(map))
    }
}

/// A YAML merge key: own keys win, earlier sources win over later ones.
fn merge_into(map: &mut Map<String, Value>, merge: Value) -> Result<(), &'static str> {
    let sources = match merge {
        Value::Array(items) => items,
        other => vec![other],
    };
    for source in sources {
        let Value::Object(source) = source else {
            return Err("map merge requires map or sequence of maps as the value");
        };
        for (key, value) in source {
            map.entry(key).or_insert(value);
        }
    }
    Ok(())
}

/// A key: YAML allows scalars other than strings, which JSON writes as strings.
struct Key;

impl<'de> DeserializeSeed<'de> for Key {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Key {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string key")
    }

    fn visit_str<E>(self, value: &str) -> Result<String, E> {
        Ok(value.to_owned())
    }

    fn visit_string<E>(self, value: String) -> Result<String, E> {
        Ok(value)
    }

    fn visit_bool<E>(self, value: bool) -> Result<String, E> {
        Ok(value.to_string())
    }

    fn visit_i64<E>(self, value: i64) -> Result<String, E> {
        Ok(value.to_string())
    }

    fn visit_u64<E>(self, value: u64) -> Result<String, E> {
        Ok(value.to_string())
    }

    fn visit_f64<E>(self, value: f64) -> Result<String, E> {
        Ok(value.to_string())
    }

    fn visit_unit<E>(self) -> Result<String, E> {
        Ok("null".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn repeated_keys_are_named_by_path_and_the_last_value_wins() {
        let body = br#"{"a":1,"b":{"c":1,"c":2,"d":[{"e":1,"e":2}]},"a":3}"#;
        let (value, messages) = parse_json(body).expect("parses");
        assert_eq!(value, json!({"a":3,"b":{"c":2,"d":[{"e":2}]}}));
        assert_eq!(messages, ["duplicate field \"b.c\"", "duplicate field \"b.d[0].e\"", "duplicate field \"a\""]);
    }

    #[test]
    fn syntax_errors_read_as_go_words_them() {
        for (body, message) in [
            ("", "unexpected end of JSON input"),
            ("{\"a\":", "unexpected end of JSON input"),
            ("x", "invalid character 'x' looking for beginning of value"),
            ("{\"a\":1}}", "invalid character '}' after top-level value"),
            ("{\"a\" 1}", "invalid character '1' after object key"),
        ] {
            let error = parse_json(body.as_bytes()).expect_err(body);
            assert_eq!(error.to_string(), message, "{body}");
        }
    }

    #[test]
    fn yaml_is_read_with_merges_and_scalar_keys() {
        let (value, messages) =
            parse_yaml(b"base: &b {x: 1, y: 2}\nuse:\n  <<: *b\n  y: 3\n8080: on8\n").expect("parses");
        assert_eq!(value["use"], json!({"y": 3, "x": 1}));
        assert_eq!(value["8080"], "on8");
        assert!(messages.is_empty());
        let (_, messages) = parse_yaml(b"spec:\n  a: 1\n  a: 2\n").expect("parses");
        assert_eq!(messages, ["duplicate field \"spec.a\""]);
        assert!(parse_yaml(b"a: [1\nb: 2").is_err());
    }

    proptest::proptest! {
        #[test]
        fn hostile_bodies_never_panic(body in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let _ = parse_json(&body);
            let _ = parse_yaml(&body);
        }
    }

    #[test]
    fn deep_nesting_is_refused() {
        assert!(parse_json("[".repeat(100_000).as_bytes()).is_err());
        assert!(parse_yaml("[".repeat(100_000).as_bytes()).is_err());
    }
}
