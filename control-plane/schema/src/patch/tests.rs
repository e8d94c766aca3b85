//! Patches as kubectl sends them.

use super::*;
use crate::Gvk;
use proptest::prelude::*;
use serde_json::{Value, json};

const DEPLOYMENT: Gvk<'static> = Gvk::new("apps", "v1", "Deployment");
const POD: Gvk<'static> = Gvk::new("", "v1", "Pod");
const SERVICE: Gvk<'static> = Gvk::new("", "v1", "Service");

fn strategic(gvk: Gvk<'_>, mut doc: Value, patch: Value) -> Value {
    strategic_merge(gvk, &mut doc, &patch).expect("the patch applies");
    doc
}

fn names(doc: &Value, pointer: &str) -> Vec<String> {
    doc.pointer(pointer)
        .and_then(Value::as_array)
        .expect("a list")
        .iter()
        .map(|item| item["name"].as_str().unwrap_or_default().to_owned())
        .collect()
}

#[test]
fn lists_with_a_merge_key_merge_by_it() {
    let doc = json!({"spec": {"containers": [{"name": "a", "image": "x:1", "env": [{"name": "E", "value": "1"}]}, {"name": "b", "image": "y"}]}});
    let doc = strategic(
        POD,
        doc,
        json!({"spec": {"containers": [{"name": "a", "image": "x:2", "env": [{"name": "F", "value": "2"}]}]}}),
    );
    assert_eq!(names(&doc, "/spec/containers"), ["a", "b"]);
    assert_eq!(doc["spec"]["containers"][0]["image"], "x:2");
    assert_eq!(names(&doc, "/spec/containers/0/env"), ["E", "F"]);
}

#[test]
fn list_directives_delete_and_replace() {
    let doc = json!({"spec": {"containers": [{"name": "a"}, {"name": "b"}]}});
    let deleted = strategic(POD, doc.clone(), json!({"spec": {"containers": [{"name": "a", "$patch": "delete"}]}}));
    assert_eq!(names(&deleted, "/spec/containers"), ["b"]);
    let replaced = strategic(POD, doc, json!({"spec": {"containers": [{"name": "c"}, {"$patch": "replace"}]}}));
    assert_eq!(names(&replaced, "/spec/containers"), ["c"]);
}

#[test]
fn map_directives_delete_and_replace() {
    let doc = json!({"metadata": {"labels": {"a": "1", "b": "2"}}});
    let replaced = strategic(POD, doc.clone(), json!({"metadata": {"labels": {"$patch": "replace", "c": "3"}}}));
    assert_eq!(replaced["metadata"]["labels"], json!({"c": "3"}));
    let deleted = strategic(POD, doc, json!({"metadata": {"labels": {"$patch": "delete"}}}));
    assert_eq!(deleted["metadata"]["labels"], json!({}));
}

#[test]
fn the_element_order_of_the_patch_is_kept() {
    let doc = json!({"spec": {"containers": [{"name": "a"}, {"name": "b"}, {"name": "c"}]}});
    let patch = json!({"spec": {"$setElementOrder/containers": [{"name": "c"}, {"name": "a"}], "containers": [{"name": "a", "image": "x"}]}});
    let doc = strategic(POD, doc, patch);
    assert_eq!(names(&doc, "/spec/containers"), ["b", "c", "a"]);
    assert_eq!(doc["spec"]["containers"][2]["image"], "x");
    assert!(!doc.to_string().contains('$'));
    let doc = strategic(
        POD,
        doc,
        json!({"spec": {"$setElementOrder/containers": [{"name": "a"}, {"name": "b"}, {"name": "c"}]}}),
    );
    assert_eq!(names(&doc, "/spec/containers"), ["a", "b", "c"]);
}

#[test]
fn primitive_lists_add_and_delete() {
    let doc = json!({"metadata": {"finalizers": ["a", "b"]}});
    let doc =
        strategic(POD, doc, json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["a"], "finalizers": ["c"]}}));
    assert_eq!(doc["metadata"]["finalizers"], json!(["b", "c"]));
    let doc = strategic(POD, doc, json!({"metadata": {"$setElementOrder/finalizers": ["c", "b"]}}));
    assert_eq!(doc["metadata"]["finalizers"], json!(["c", "b"]));
}

#[test]
fn retain_keys_drops_the_other_members_of_a_union() {
    let doc = json!({"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}});
    let doc = strategic(DEPLOYMENT, doc, json!({"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}}));
    assert_eq!(doc["spec"]["strategy"], json!({"type": "Recreate"}));
    let volumes = json!({"spec": {"volumes": [{"name": "v", "emptyDir": {}}]}});
    let patch =
        json!({"spec": {"volumes": [{"$retainKeys": ["name", "hostPath"], "name": "v", "hostPath": {"path": "/x"}}]}});
    let doc = strategic(POD, volumes.clone(), patch);
    assert_eq!(doc["spec"]["volumes"], json!([{"name": "v", "hostPath": {"path": "/x"}}]));
    let mut doc = volumes.clone();
    let stray = json!({"spec": {"volumes": [{"$retainKeys": ["name"], "name": "v", "hostPath": {}}]}});
    assert!(strategic_merge(POD, &mut doc, &stray).is_err());
    assert_eq!(doc, volumes);
}

#[test]
fn atomic_lists_are_replaced_and_nulls_delete() {
    let doc = json!({"spec": {"tolerations": [{"key": "a"}], "containers": [{"name": "a", "args": ["1", "2"]}], "nodeName": "n"}});
    let doc = strategic(
        POD,
        doc,
        json!({"spec": {"tolerations": [{"key": "b"}], "containers": [{"name": "a", "args": ["3"]}], "nodeName": null}}),
    );
    assert_eq!(doc, json!({"spec": {"tolerations": [{"key": "b"}], "containers": [{"name": "a", "args": ["3"]}]}}));
}

#[test]
fn service_ports_merge_by_port_number() {
    let doc = json!({"spec": {"ports": [{"port": 80, "nodePort": 30080}]}});
    let doc = strategic(SERVICE, doc, json!({"spec": {"ports": [{"port": 80, "name": "web"}, {"port": 81}]}}));
    assert_eq!(doc["spec"]["ports"], json!([{"port": 80, "nodePort": 30080, "name": "web"}, {"port": 81}]));
}

#[test]
fn malformed_strategic_patches_are_refused() {
    for patch in [
        json!([]),
        json!({"spec": {"containers": [{"image": "x"}]}}),
        json!({"spec": {"$patch": "explode"}}),
        json!({"spec": {"containers": [{"name": "a", "$patch": "merge"}]}}),
        json!({"metadata": {"$deleteFromPrimitiveList/finalizers": "a"}}),
    ] {
        let mut doc = json!({"spec": {"containers": [{"name": "a"}]}, "metadata": {"finalizers": []}});
        assert!(matches!(strategic_merge(POD, &mut doc, &patch), Err(PatchError::Invalid(_))), "{patch}");
    }
    let mut doc = json!({});
    let error = strategic_merge(POD, &mut doc, &json!({"spec": {"containers": [{"image": "x"}]}})).expect_err("no key");
    assert_eq!(error.to_string(), "map: {\"image\":\"x\"} does not contain declared merge key: name");
}

#[test]
fn merge_patch_follows_the_examples_of_its_rfc() {
    for (doc, patch, result) in [
        (json!({"a": "b"}), json!({"a": "c"}), json!({"a": "c"})),
        (json!({"a": "b", "b": "c"}), json!({"a": null}), json!({"b": "c"})),
        (json!({"a": [{"b": "c"}]}), json!({"a": [1]}), json!({"a": [1]})),
        (json!({"a": "foo"}), json!("bar"), json!("bar")),
        (json!([1, 2]), json!({"a": "b", "c": null}), json!({"a": "b"})),
        (json!({}), json!({"a": {"bb": {"ccc": null}}}), json!({"a": {"bb": {}}})),
    ] {
        let mut doc = doc;
        merge_patch(&mut doc, &patch);
        assert_eq!(doc, result);
    }
}

#[test]
fn json_patch_operations() {
    for (doc, patch, result) in [
        (json!({"a": 1}), json!([{"op": "add", "path": "/b", "value": 2}]), Ok(json!({"a": 1, "b": 2}))),
        (
            json!({"a": [1, 3]}),
            json!([{"op": "add", "path": "/a/1", "value": 2}, {"op": "add", "path": "/a/-", "value": 4}]),
            Ok(json!({"a": [1, 2, 3, 4]})),
        ),
        (json!({"a": {"x/y": 1}}), json!([{"op": "remove", "path": "/a/x~1y"}]), Ok(json!({"a": {}}))),
        (json!({"a": 1}), json!([{"op": "replace", "path": "/a", "value": null}]), Ok(json!({"a": null}))),
        (json!({"a": 1}), json!([{"op": "move", "from": "/a", "path": "/b"}]), Ok(json!({"b": 1}))),
        (json!({"a": [1]}), json!([{"op": "copy", "from": "/a/0", "path": "/b"}]), Ok(json!({"a": [1], "b": 1}))),
        (
            json!({"a": 1}),
            json!([{"op": "test", "path": "/a", "value": 2}]),
            Err("testing value /a failed: test failed"),
        ),
        (
            json!({"a": 1}),
            json!([{"op": "remove", "path": "/b"}]),
            Err("remove operation does not apply: doc is missing path: /b: missing value"),
        ),
        (
            json!({"a": 1}),
            json!([{"op": "replace", "path": "/b", "value": 1}]),
            Err("replace operation does not apply: doc is missing key: /b: missing value"),
        ),
        (json!({"a": 1}), json!([{"op": "burn", "path": "/a"}]), Err("Unexpected kind: burn")),
        (
            json!({"a": [1]}),
            json!([{"op": "add", "path": "/a/5", "value": 1}]),
            Err("error in add for path: '/a/5': Unable to access invalid index: 5: invalid index referenced"),
        ),
    ] {
        let mut patched = doc.clone();
        match (json_patch(&mut patched, &patch), result) {
            (Ok(()), Ok(result)) => assert_eq!(patched, result),
            (Err(error), Err(message)) => {
                assert_eq!(error.to_string(), message);
                assert_eq!(patched, doc, "a failed patch changes nothing");
            }
            (outcome, expected) => panic!("{patch}: {outcome:?}, expected {expected:?}"),
        }
    }
}

/// The merge patch that turns `from` into `to`; neither holds nulls.
fn merge_diff(from: &Value, to: &Value) -> Value {
    let (Value::Object(from), Value::Object(to)) = (from, to) else { return to.clone() };
    let mut patch = serde_json::Map::new();
    for key in from.keys().filter(|key| !to.contains_key(*key)) {
        patch.insert(key.clone(), Value::Null);
    }
    for (key, value) in to {
        match from.get(key) {
            Some(before) if before == value => {}
            Some(before) => {
                patch.insert(key.clone(), merge_diff(before, value));
            }
            None => {
                patch.insert(key.clone(), value.clone());
            }
        }
    }
    Value::Object(patch)
}

fn document() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        any::<bool>().prop_map(Value::from),
        any::<i32>().prop_map(Value::from),
        "[a-z]{0,3}".prop_map(Value::from)
    ];
    let tree = leaf.prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-d]", inner, 0..4).prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    });
    prop::collection::btree_map("[a-d]", tree, 0..4).prop_map(|map| Value::Object(map.into_iter().collect()))
}

fn containers() -> impl Strategy<Value = Value> {
    let item =
        ("[a-e]", "[x-z]:[1-3]", prop::collection::btree_map("[A-C]", "[0-9]", 0..3)).prop_map(|(name, image, env)| {
            let env: Vec<Value> = env.into_iter().map(|(name, value)| json!({"name": name, "value": value})).collect();
            json!({"name": name, "image": image, "env": env})
        });
    prop::collection::vec(item, 0..5).prop_map(|mut items| {
        let mut seen = std::collections::HashSet::new();
        items.retain(|item| seen.insert(item["name"].to_string()));
        Value::from(items)
    })
}

/// The strategic patch, as kubectl makes it, that turns one list of containers into another.
fn strategic_diff(from: &[Value], to: &[Value]) -> Value {
    let find = |items: &[Value], item: &Value| items.iter().find(|other| other["name"] == item["name"]).cloned();
    let mut list: Vec<Value> = Vec::new();
    for item in to {
        let before = find(from, item).unwrap_or_else(|| json!({"env": []}));
        let (old, new) = (
            before["env"].as_array().cloned().unwrap_or_default(),
            item["env"].as_array().cloned().unwrap_or_default(),
        );
        let mut env = new.clone();
        env.extend(
            old.iter()
                .filter(|old| find(&new, old).is_none())
                .map(|old| json!({"name": old["name"], "$patch": "delete"})),
        );
        let order: Vec<Value> = new.iter().map(|item| json!({"name": item["name"]})).collect();
        list.push(json!({"name": item["name"], "image": item["image"], "env": env, "$setElementOrder/env": order}));
    }
    list.extend(
        from.iter().filter(|old| find(to, old).is_none()).map(|old| json!({"name": old["name"], "$patch": "delete"})),
    );
    let order: Vec<Value> = to.iter().map(|item| json!({"name": item["name"]})).collect();
    json!({"spec": {"containers": list, "$setElementOrder/containers": order}})
}

proptest! {
    #[test]
    fn a_merge_patch_of_the_difference_converges(from in document(), to in document()) {
        let mut doc = from.clone();
        merge_patch(&mut doc, &merge_diff(&from, &to));
        prop_assert_eq!(doc, to);
    }

    #[test]
    fn a_strategic_patch_of_the_difference_converges(from in containers(), to in containers()) {
        let patch = strategic_diff(from.as_array().expect("a list"), to.as_array().expect("a list"));
        let mut doc = json!({"spec": {"containers": from}});
        strategic_merge(POD, &mut doc, &patch).expect("applies");
        prop_assert_eq!(doc, json!({"spec": {"containers": to}}));
    }

    #[test]
    fn any_document_is_a_patch_or_an_error(doc in document(), patch in document()) {
        let mut target = json!({"spec": doc});
        let _ = strategic_merge(POD, &mut target, &json!({"spec": patch.clone(), "metadata": patch.clone()}));
        let _ = json_patch(&mut target, &json!([patch]));
    }
}
