//! Renderings of objects: whole, as a Table, or metadata only.

use jiff::Timestamp;
use oarlock_kinds::Kind;
use oarlock_store::Record;
use serde_json::{Map, Value, json};

use crate::negotiate::Form;
use crate::object;

/// How much of the object each Table row carries (`includeObject`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Include {
    None,
    Metadata,
    Object,
}

impl Include {
    pub(crate) fn parse(text: Option<&str>) -> Include {
        match text {
            Some("None") => Include::None,
            Some("Object") => Include::Object,
            _ => Include::Metadata,
        }
    }
}

/// One object in the wanted form. A single row of a Table is a Table.
pub(crate) fn render(kind: &Kind, object: Value, form: Form, include: Include) -> Value {
    match form {
        Form::Object => object,
        Form::Partial { version } => partial(&object, version),
        Form::Table { version } => {
            let metadata = json!({"resourceVersion": object::text(&object, "/metadata/resourceVersion")});
            table(kind, version, metadata, vec![object], include, true)
        }
    }
}

/// A Table of objects. Watches leave the column definitions out after the first event.
pub(crate) fn table(
    kind: &Kind,
    version: &str,
    metadata: Value,
    objects: Vec<Value>,
    include: Include,
    with_columns: bool,
) -> Value {
    let now = Timestamp::now();
    let columns: Vec<Value> = if with_columns {
        let definition = |column: &oarlock_kinds::Column| {
            json!({
                "name": column.name, "type": column.kind, "format": column.format,
                "description": column.description, "priority": column.priority,
            })
        };
        kind.columns.iter().map(definition).collect()
    } else {
        Vec::new()
    };
    let rows: Vec<Value> = objects
        .into_iter()
        .map(|object| {
            let cells = (kind.row)(&object, now);
            let mut row = Map::new();
            row.insert("cells".into(), cells.into());
            match include {
                Include::None => {}
                Include::Metadata => {
                    row.insert("object".into(), partial(&object, version));
                }
                Include::Object => {
                    row.insert("object".into(), object);
                }
            }
            Value::Object(row)
        })
        .collect();
    json!({
        "kind": "Table", "apiVersion": format!("meta.k8s.io/{version}"), "metadata": metadata,
        "columnDefinitions": columns, "rows": rows,
    })
}

/// The metadata of an object as a PartialObjectMetadata.
pub(crate) fn partial(object: &Value, version: &str) -> Value {
    json!({
        "kind": "PartialObjectMetadata", "apiVersion": format!("meta.k8s.io/{version}"),
        "metadata": object.get("metadata").cloned().unwrap_or_else(|| json!({})),
    })
}

/// The metadata form of a stored record, made once.
pub(crate) fn partial_bytes(kind: &Kind, record: &Record) -> bytes::Bytes {
    let index = object::index(kind, record);
    // Deleting re-spells the revision but keeps the index, so what was made before may show an older one.
    let made = index.partial.get_or_init(|| partial(&object::parse(record), "v1").to_string().into());
    let revision = format!("\"resourceVersion\":\"{}\"", record.revision());
    if contains(made, revision.as_bytes()) {
        made.clone()
    } else {
        partial(&object::parse(record), "v1").to_string().into()
    }
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}
