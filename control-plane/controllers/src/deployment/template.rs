//! Pod templates: when two are the same, and the short hash that names a template's ReplicaSet. Pure.

use k8s_openapi::api::core::v1::PodTemplateSpec;
use serde_json::Value;
use sha2::{Digest, Sha256};

/// The label by which the pods of one template are told from those of another.
pub(super) const HASH_LABEL: &str = "pod-template-hash";

/// Letters and digits that cannot form a word.
const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

/// A template without the hash label and without empty fields, which mean the same as missing ones.
fn canonical(template: &PodTemplateSpec) -> Value {
    let mut value = serde_json::to_value(template).unwrap_or(Value::Null);
    if let Some(labels) = value.pointer_mut("/metadata/labels").and_then(Value::as_object_mut) {
        labels.remove(HASH_LABEL);
    }
    if let Some(metadata) = value.pointer_mut("/metadata").and_then(Value::as_object_mut) {
        metadata.remove("creationTimestamp");
    }
    prune(&mut value);
    value
}

/// Removes empty fields; volumes keep theirs, since `emptyDir: {}` says something.
fn prune(value: &mut Value) {
    match value {
        Value::Object(map) => {
            for (key, field) in map.iter_mut() {
                if key != "emptyDir" && key != "securityContext" {
                    prune(field);
                }
            }
            map.retain(|key, field| key == "emptyDir" || !is_empty(field));
        }
        Value::Array(items) => items.iter_mut().for_each(prune),
        _ => {}
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Object(map) => map.is_empty(),
        Value::Array(items) => items.is_empty(),
        _ => false,
    }
}

pub(super) fn same(a: &PodTemplateSpec, b: &PodTemplateSpec) -> bool {
    a == b || canonical(a) == canonical(b)
}

/// A name part for the template; `collisions` changes it when another set has taken the name.
pub(super) fn hash(template: &PodTemplateSpec, collisions: Option<i32>) -> String {
    let mut digest = Sha256::new();
    digest.update(canonical(template).to_string());
    if let Some(collisions) = collisions {
        digest.update(collisions.to_le_bytes());
    }
    digest.finalize()[..10].iter().map(|byte| char::from(ALPHABET[usize::from(*byte) % ALPHABET.len()])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn template(json: Value) -> PodTemplateSpec {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn the_hash_label_and_empty_fields_make_no_difference() {
        let a = template(json!({"metadata": {"labels": {"app": "a"}}, "spec": {"containers": [{"name": "c"}]}}));
        let b = template(json!({
            "metadata": {"labels": {"app": "a", "pod-template-hash": "x"}, "annotations": {}},
            "spec": {"containers": [{"name": "c", "resources": {}, "env": []}]},
        }));
        assert!(same(&a, &b));
        assert_eq!(hash(&a, None), hash(&b, None));
    }

    #[test]
    fn an_empty_dir_makes_a_difference() {
        let with = |volume| template(json!({"spec": {"containers": [], "volumes": [volume]}}));
        let a = with(json!({"name": "v", "emptyDir": {}}));
        assert!(!same(&a, &with(json!({"name": "v"}))));
    }

    #[test]
    fn the_hash_depends_on_template_and_collisions_and_is_a_valid_label() {
        let a = template(json!({"spec": {"containers": [{"name": "a"}]}}));
        let b = template(json!({"spec": {"containers": [{"name": "b"}]}}));
        let all = [hash(&a, None), hash(&b, None), hash(&a, Some(1)), hash(&a, Some(2))];
        for (index, one) in all.iter().enumerate() {
            assert_eq!(one.len(), 10);
            assert!(!all[..index].contains(one));
        }
    }
}
