//! The v2 document in protobuf (gnostic's `openapi.v2.Document`), which client-go asks for. It carries the
//! definitions, with their structure and extensions, and the operations of each path.

use super::{ServedResource, v2_document};
use serde_json::Value;

/// The answer to `GET /openapi/v2` where the client accepts `application/com.github.proto-openapi.spec.v2@v1.0+protobuf`.
pub fn v2_protobuf(resources: &[ServedResource]) -> Vec<u8> {
    let document = v2_document(resources);
    let mut out = Message::default();
    out.text(1, text(&document, "swagger"));
    let info = document.get("info");
    out.message(2, |message| {
        message.text(1, info.map_or("", |info| text(info, "title")));
        message.text(2, info.map_or("", |info| text(info, "version")));
    });
    out.message(8, |message| {
        for (path, item) in entries(document.get("paths")) {
            message.named(2, path, |message| path_item(message, item));
        }
    });
    out.message(9, |message| {
        for (name, definition) in entries(document.get("definitions")) {
            message.named(1, name, |message| schema(message, definition));
        }
    });
    out.bytes
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value.get(field).and_then(Value::as_str).unwrap_or_default()
}

fn entries(value: Option<&Value>) -> impl Iterator<Item = (&String, &Value)> {
    value.and_then(Value::as_object).into_iter().flatten()
}

fn elements(value: Option<&Value>) -> impl Iterator<Item = &Value> {
    value.and_then(Value::as_array).into_iter().flatten()
}

#[derive(Default)]
struct Message {
    bytes: Vec<u8>,
}

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.bytes.push((value as u8) | 0x80);
            value >>= 7;
        }
        self.bytes.push(value as u8);
    }

    fn raw(&mut self, tag: u32, content: &[u8]) {
        self.varint(u64::from(tag) << 3 | 2);
        self.varint(content.len() as u64);
        self.bytes.extend_from_slice(content);
    }

    /// A string that is left out when empty.
    fn text(&mut self, tag: u32, content: &str) {
        if !content.is_empty() {
            self.raw(tag, content.as_bytes());
        }
    }

    fn flag(&mut self, tag: u32, set: bool) {
        if set {
            self.varint(u64::from(tag) << 3);
            self.varint(1);
        }
    }

    fn message(&mut self, tag: u32, fill: impl FnOnce(&mut Self)) {
        let mut inner = Self::default();
        fill(&mut inner);
        self.raw(tag, &inner.bytes);
    }

    /// gnostic's `NamedX { name = 1, value = 2 }`.
    fn named(&mut self, tag: u32, name: &str, fill: impl FnOnce(&mut Self)) {
        self.message(tag, |message| {
            message.text(1, name);
            message.message(2, fill);
        });
    }

    /// `NamedAny` for an extension: its value as YAML, which JSON is.
    fn extension(&mut self, tag: u32, name: &str, value: &Value) {
        self.named(tag, name, |message| message.text(2, &value.to_string()));
    }
}

fn path_item(out: &mut Message, item: &Value) {
    for (method, tag) in [("get", 2), ("put", 3), ("post", 4), ("delete", 5), ("patch", 8)] {
        if let Some(found) = item.get(method) {
            out.message(tag, |message| operation(message, found));
        }
    }
    for found in elements(item.get("parameters")) {
        out.message(9, |message| parameter(message, found));
    }
}

fn operation(out: &mut Message, operation: &Value) {
    for tag in elements(operation.get("tags")) {
        out.text(1, tag.as_str().unwrap_or_default());
    }
    out.text(5, text(operation, "operationId"));
    for media in elements(operation.get("produces")) {
        out.text(6, media.as_str().unwrap_or_default());
    }
    for media in elements(operation.get("consumes")) {
        out.text(7, media.as_str().unwrap_or_default());
    }
    for found in elements(operation.get("parameters")) {
        out.message(8, |message| parameter(message, found));
    }
    out.message(9, |message| {
        for (code, response) in entries(operation.get("responses")) {
            message.named(1, code, |message| {
                message.message(1, |message| {
                    message.text(1, text(response, "description"));
                    if let Some(found) = response.get("schema") {
                        message.message(2, |message| message.message(1, |message| schema(message, found)));
                    }
                });
            });
        }
    });
    for (name, value) in entries(Some(operation)).filter(|(name, _)| name.starts_with("x-")) {
        out.extension(13, name, value);
    }
}

/// `ParametersItem { parameter = 1 { body_parameter = 1 | non_body_parameter = 2 } }`.
fn parameter(out: &mut Message, found: &Value) {
    let (name, place) = (text(found, "name"), text(found, "in"));
    let required = found.get("required").and_then(Value::as_bool).unwrap_or(false);
    out.message(1, |message| {
        if place == "body" {
            message.message(1, |message| {
                message.text(2, name);
                message.text(3, place);
                message.flag(4, required);
                if let Some(found) = found.get("schema") {
                    message.message(5, |message| schema(message, found));
                }
            });
            return;
        }
        // The oneof of places: header 1, form data 2, query 3, path 4. Path parameters are always required.
        let of_query = place == "query";
        message.message(2, |message| {
            message.message(if of_query { 3 } else { 4 }, |message| {
                message.flag(1, required);
                message.text(2, place);
                message.text(4, name);
                message.text(if of_query { 6 } else { 5 }, text(found, "type"));
            });
        });
    });
}

fn schema(out: &mut Message, schema_value: &Value) {
    out.text(1, text(schema_value, "$ref"));
    out.text(2, text(schema_value, "format"));
    out.text(4, text(schema_value, "description"));
    if let Some(default) = schema_value.get("default") {
        out.message(5, |message| message.text(2, &default.to_string()));
    }
    for required in elements(schema_value.get("required")) {
        out.text(19, required.as_str().unwrap_or_default());
    }
    if let Some(values) = schema_value.get("additionalProperties") {
        out.message(21, |message| message.message(1, |message| schema(message, values)));
    }
    let kind = text(schema_value, "type");
    if !kind.is_empty() {
        out.message(22, |message| message.text(1, kind));
    }
    if let Some(items) = schema_value.get("items") {
        out.message(23, |message| message.message(1, |message| schema(message, items)));
    }
    if let Some(properties) = schema_value.get("properties") {
        out.message(25, |message| {
            for (name, found) in entries(Some(properties)) {
                message.named(1, name, |message| schema(message, found));
            }
        });
    }
    for (name, value) in entries(Some(schema_value)).filter(|(name, _)| name.starts_with("x-")) {
        out.extension(31, name, value);
    }
}
