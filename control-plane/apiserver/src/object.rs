//! Objects at rest: how an object is laid out as bytes, and what is kept beside the bytes to select by.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use jiff::Timestamp;
use oarlock_kinds::Kind;
use oarlock_store::{Record, Value as Stored};
use serde_json::{Map, Value};

/// What selectors, owners and the node rules ask of an object, taken out once for each stored state.
pub(crate) struct Index {
    pub(crate) labels: Vec<(Box<str>, Box<str>)>,
    pub(crate) fields: Vec<(&'static str, Box<str>)>,
    pub(crate) uid: Box<str>,
    /// For a pod, the secrets, config maps and service account it refers to, as `secrets/x`.
    pub(crate) references: Vec<Box<str>>,
    /// The PartialObjectMetadata form, made when first asked for.
    pub(crate) partial: OnceLock<Bytes>,
}

impl Index {
    pub(crate) fn of(kind: &Kind, object: &Value) -> Index {
        let labels = text_map(object.pointer("/metadata/labels"));
        let fields = (kind.selectable)(object).into_iter().map(|(field, value)| (field, value.into())).collect();
        let references = if kind.storage == "pods" { pod_references(object) } else { Vec::new() };
        Index { labels, fields, uid: text(object, "/metadata/uid").into(), references, partial: OnceLock::new() }
    }

    pub(crate) fn field(&self, name: &str) -> &str {
        self.fields.iter().find(|(field, _)| *field == name).map_or("", |(_, value)| value)
    }
}

/// The index of a stored record, computed on first use.
pub(crate) fn index<'r>(kind: &Kind, record: &'r Record) -> &'r Index {
    let attachment = record.attachment_or_init(|| Arc::new(Index::of(kind, &parse(record))));
    match attachment.downcast_ref::<Index>() {
        Some(index) => index,
        None => unreachable!("only this module attaches to records"),
    }
}

/// A stored record as a JSON tree. What is stored was written by `encode`, so it parses.
pub(crate) fn parse(record: &Record) -> Value {
    serde_json::from_slice(record.value()).unwrap_or_else(|error| {
        tracing::error!(key = %record.key(), %error, "a stored object does not parse");
        Value::Object(Map::new())
    })
}

/// A stored record in the view of a kind.
pub(crate) fn parse_as(kind: &Kind, record: &Record) -> Value {
    let mut object = parse(record);
    if !is_native(kind) {
        (kind.from_stored)(&mut object);
    }
    object
}

/// Whether a kind's view is the stored one.
pub(crate) fn is_native(kind: &Kind) -> bool {
    match kind.storage.split_once('/') {
        Some((group, plural)) => group == kind.group && plural == kind.plural,
        None => kind.group.is_empty() && kind.storage == kind.plural,
    }
}

/// The text before the first slash of a kind's keys, with the slash.
pub(crate) fn bucket(kind: &Kind) -> String {
    format!("{}/", kind.storage.replace('/', "."))
}

/// The key of an object, or the prefix of a namespace's keys when `name` is empty.
pub(crate) fn key(kind: &Kind, namespace: &str, name: &str) -> String {
    if kind.namespaced && !namespace.is_empty() {
        format!("{}{namespace}/{name}", bucket(kind))
    } else {
        format!("{}{name}", bucket(kind))
    }
}

/// Lays an object out for the store: `metadata` opens with the resource version, which the store fills in at commit.
pub(crate) fn encode(kind: &Kind, object: &Value) -> Stored {
    let mut out = Vec::with_capacity(1024);
    let mut hole = usize::MAX;
    out.push(b'{');
    for (at, (name, value)) in object.as_object().into_iter().flatten().enumerate() {
        if at > 0 {
            out.push(b',');
        }
        write_json(&mut out, &Value::from(name.as_str()));
        out.push(b':');
        match value {
            Value::Object(metadata) if name == "metadata" => {
                out.extend_from_slice(br#"{"resourceVersion":""#);
                hole = out.len();
                out.push(b'"');
                for (field, value) in metadata.iter().filter(|(field, _)| *field != "resourceVersion") {
                    out.push(b',');
                    write_json(&mut out, &Value::from(field.as_str()));
                    out.push(b':');
                    write_json(&mut out, value);
                }
                out.push(b'}');
            }
            _ => write_json(&mut out, value),
        }
    }
    out.push(b'}');
    out.shrink_to_fit();
    Stored::with_hole(out, hole).attach(Arc::new(Index::of(kind, object)))
}

fn write_json(out: &mut Vec<u8>, value: &Value) {
    // Writing a tree with string keys to memory has no way to fail.
    let _ = serde_json::to_writer(out, value);
}

/// The string at a JSON pointer, or "".
pub(crate) fn text<'v>(object: &'v Value, pointer: &str) -> &'v str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

pub(crate) fn name(object: &Value) -> &str {
    text(object, "/metadata/name")
}

/// `metadata` as a map, made if it is not there.
pub(crate) fn metadata(object: &mut Value) -> &mut Map<String, Value> {
    section(object, "metadata")
}

/// A top-level map, made if it is not there (or not a map).
pub(crate) fn section<'v>(object: &'v mut Value, name: &str) -> &'v mut Map<String, Value> {
    if !object.is_object() {
        *object = Value::Object(Map::new());
    }
    let Value::Object(fields) = object else { unreachable!("made an object above") };
    let found = fields.entry(name).or_insert_with(|| Value::Object(Map::new()));
    if !found.is_object() {
        *found = Value::Object(Map::new());
    }
    match found {
        Value::Object(map) => map,
        _ => unreachable!("made an object above"),
    }
}

/// The strings of an array, or none.
pub(crate) fn strings(value: Option<&Value>) -> impl Iterator<Item = &str> {
    value.and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str)
}

pub(crate) fn finalizers(object: &Value) -> Vec<String> {
    strings(object.pointer("/metadata/finalizers")).map(str::to_owned).collect()
}

pub(crate) fn is_deleting(object: &Value) -> bool {
    object.pointer("/metadata/deletionTimestamp").is_some_and(|at| !at.is_null())
}

/// Now, to the second, as timestamps in metadata are written.
pub(crate) fn now_text() -> String {
    seconds_text(Timestamp::now())
}

pub(crate) fn seconds_text(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

fn text_map(value: Option<&Value>) -> Vec<(Box<str>, Box<str>)> {
    let entries = value.and_then(Value::as_object).into_iter().flatten();
    entries.filter_map(|(key, value)| Some((key.as_str().into(), value.as_str()?.into()))).collect()
}

/// What a pod refers to in its namespace, as `secrets/x`: what its node may read for it.
pub(crate) fn pod_references(pod: &Value) -> Vec<Box<str>> {
    let mut found: Vec<Box<str>> = Vec::new();
    let mut add = |resource: &str, name: Option<&Value>| {
        if let Some(name) = name.and_then(Value::as_str) {
            let reference: Box<str> = format!("{resource}/{name}").into();
            if !found.contains(&reference) {
                found.push(reference);
            }
        }
    };
    let spec = &pod["spec"];
    add("serviceaccounts", spec.get("serviceAccountName"));
    for secret in spec["imagePullSecrets"].as_array().into_iter().flatten() {
        add("secrets", secret.get("name"));
    }
    for volume in spec["volumes"].as_array().into_iter().flatten() {
        add("secrets", volume.pointer("/secret/secretName"));
        add("configmaps", volume.pointer("/configMap/name"));
        add("secrets", volume.pointer("/csi/nodePublishSecretRef/name"));
        add("persistentvolumeclaims", volume.pointer("/persistentVolumeClaim/claimName"));
        if volume.get("ephemeral").is_some_and(Value::is_object) {
            let claim = format!("{}-{}", name(pod), text(volume, "/name"));
            add("persistentvolumeclaims", Some(&Value::from(claim)));
        }
        for source in volume.pointer("/projected/sources").and_then(Value::as_array).into_iter().flatten() {
            add("secrets", source.pointer("/secret/name"));
            add("configmaps", source.pointer("/configMap/name"));
        }
    }
    for list in ["initContainers", "containers", "ephemeralContainers"] {
        for container in spec[list].as_array().into_iter().flatten() {
            for source in container["envFrom"].as_array().into_iter().flatten() {
                add("secrets", source.pointer("/secretRef/name"));
                add("configmaps", source.pointer("/configMapRef/name"));
            }
            for variable in container["env"].as_array().into_iter().flatten() {
                add("secrets", variable.pointer("/valueFrom/secretKeyRef/name"));
                add("configmaps", variable.pointer("/valueFrom/configMapKeyRef/name"));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use oarlock_store::{Expect, MemoryStore, Op, Store};
    use serde_json::json;

    #[tokio::test]
    async fn a_stored_object_carries_the_revision_it_was_written_at() {
        let kind = oarlock_kinds::find("", "v1", "configmaps").expect("a row");
        let store = MemoryStore::new().expect("a store");
        let object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a", "resourceVersion": "9"}, "data": {"k": "v"}});
        let op = Op::Put {
            key: key(kind, "default", "a").into(),
            value: encode(kind, &object),
            expect: Expect::Absent,
            ttl_seconds: None,
        };
        let outcomes = store.txn(vec![op]).await.expect("written");
        let record = outcomes[0].record().expect("a record");
        let read = parse(record);
        assert_eq!(text(&read, "/metadata/resourceVersion"), record.revision().to_string());
        assert_eq!(&**record.key(), "configmaps/default/a");
        assert_eq!(read["data"], object["data"]);
    }

    #[test]
    fn what_a_pod_refers_to_is_found() {
        let pod = json!({"spec": {"volumes": [{"secret": {"secretName": "s"}}], "containers": [
            {"env": [{"valueFrom": {"configMapKeyRef": {"name": "c"}}}], "envFrom": [{"secretRef": {"name": "s"}}]}]}});
        assert_eq!(pod_references(&pod), ["secrets/s".into(), "configmaps/c".into()]);
    }
}
