//! Ownership as several clients see it.

use super::*;
use crate::Gvk;
use serde_json::{Value, json};

const DEPLOYMENT: Gvk<'static> = Gvk::new("apps", "v1", "Deployment");
const NOW: &str = "2026-01-01T00:00:00Z";

fn applied(live: Option<&Value>, config: &Value, manager: &str, force: bool) -> Result<Value, ApplyError> {
    apply(ApplyInput { gvk: DEPLOYMENT, live, applied: config, manager, force, subresource: None, now: NOW })
}

fn updated(old: Option<&Value>, mut new: Value, manager: &str) -> Value {
    track_update(UpdateInput { gvk: DEPLOYMENT, old, new: &mut new, manager, subresource: None, now: NOW });
    new
}

fn owned<'a>(object: &'a Value, manager: &str) -> &'a Value {
    let entries = object["metadata"]["managedFields"].as_array().expect("entries");
    &entries.iter().find(|entry| entry["manager"] == manager).expect("the manager has an entry")["fieldsV1"]
}

fn config(replicas: Value, image: &str) -> Value {
    let mut config = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d", "labels": {"app": "d"}},
        "spec": {"template": {"spec": {"containers": [{"name": "a", "image": image, "ports": [{"containerPort": 80}]}]}}}});
    if !replicas.is_null() {
        config["spec"]["replicas"] = replicas;
    }
    config
}

#[test]
fn an_apply_owns_what_it_names() {
    let object = applied(None, &config(json!(2), "x:1"), "kubectl", false).expect("applies");
    let entry = &object["metadata"]["managedFields"][0];
    assert_eq!(entry["operation"], "Apply");
    assert_eq!(entry["apiVersion"], "apps/v1");
    assert_eq!(entry["time"], NOW);
    assert_eq!(
        entry["fieldsV1"],
        json!({"f:metadata": {"f:labels": {"f:app": {}}}, "f:spec": {"f:replicas": {}, "f:template": {"f:spec": {"f:containers":
            {"k:{\"name\":\"a\"}": {".": {}, "f:image": {}, "f:name": {}, "f:ports":
                {"k:{\"containerPort\":80,\"protocol\":\"TCP\"}": {".": {}, "f:containerPort": {}}}}}}}}})
    );
}

#[test]
fn structs_that_decoding_adds_are_not_owned() {
    let mut typed = config(json!(2), "x:1");
    crate::strict::prune(DEPLOYMENT, &mut typed).expect("typed");
    assert_eq!(typed["spec"]["strategy"], json!({}));
    let plain = applied(None, &config(json!(2), "x:1"), "kubectl", false).expect("applies");
    let typed = applied(None, &typed, "kubectl", false).expect("applies");
    assert_eq!(owned(&typed, "kubectl"), owned(&plain, "kubectl"));
}

#[test]
fn a_create_owns_what_it_sent_with_defaults() {
    let object = updated(None, config(json!(2), "x:1"), "kubectl-create");
    assert_eq!(
        owned(&object, "kubectl-create"),
        &json!({"f:metadata": {"f:labels": {".": {}, "f:app": {}}}, "f:spec": {"f:replicas": {}, "f:template": {"f:spec": {"f:containers":
            {"k:{\"name\":\"a\"}": {".": {}, "f:image": {}, "f:name": {}, "f:ports":
                {".": {}, "k:{\"containerPort\":80,\"protocol\":\"TCP\"}": {".": {}, "f:containerPort": {}}}}}}}}})
    );
}

#[test]
fn a_second_equal_apply_changes_nothing() {
    let object = applied(None, &config(json!(2), "x:1"), "kubectl", false).expect("applies");
    let input = ApplyInput {
        gvk: DEPLOYMENT,
        live: Some(&object),
        applied: &config(json!(2), "x:1"),
        manager: "kubectl",
        force: false,
        subresource: None,
        now: "2027-01-01T00:00:00Z",
    };
    assert_eq!(apply(input).expect("applies"), object);
}

#[test]
fn a_field_of_another_manager_is_a_conflict_until_forced() {
    let object = applied(None, &config(json!(2), "x:1"), "one", false).expect("applies");
    let other = config(json!(3), "x:1");
    let error = applied(Some(&object), &other, "two", false).expect_err("a conflict");
    assert_eq!(error.to_string(), "Apply failed with 1 conflict: conflict with \"one\": .spec.replicas");
    let forced = applied(Some(&object), &other, "two", true).expect("forced");
    assert_eq!(forced["spec"]["replicas"], 3);
    assert!(owned(&forced, "one")["f:spec"].get("f:replicas").is_none());
    assert_eq!(owned(&forced, "two")["f:spec"]["f:replicas"], json!({}));
}

#[test]
fn kubectl_takes_over_what_it_applied_on_the_client_side() {
    const ANNOTATION: &str = "kubectl.kubernetes.io/last-applied-configuration";
    let mut sent = config(json!(2), "x:1");
    sent["metadata"]["annotations"] = json!({ANNOTATION: config(json!(2), "x:1").to_string()});
    let object = updated(None, sent, "kubectl-client-side-apply");
    let changed = config(json!(3), "x:1");
    assert!(applied(Some(&object), &changed, "someone", false).is_err());
    let taken = applied(Some(&object), &changed, "kubectl", false).expect("no conflict");
    assert_eq!(taken["spec"]["replicas"], 3);
    let last: Value =
        serde_json::from_str(taken["metadata"]["annotations"][ANNOTATION].as_str().expect("text")).expect("JSON");
    assert_eq!(last, changed);
    // What another client changed since is a conflict all the same.
    let mut scaled = object.clone();
    scaled["spec"]["replicas"] = json!(7);
    let scaled = updated(Some(&object), scaled, "scaler");
    assert!(applied(Some(&scaled), &changed, "kubectl", false).is_err());
}

#[test]
fn several_conflicts_are_listed_by_manager() {
    let object = updated(None, config(json!(2), "x:1"), "kubectl-create");
    let error = applied(Some(&object), &config(json!(3), "x:2"), "two", false).expect_err("conflicts");
    assert_eq!(
        error.to_string(),
        "Apply failed with 2 conflicts: conflicts with \"kubectl-create\" using apps/v1:\n- .spec.replicas\n\
         - .spec.template.spec.containers[name=\"a\"].image"
    );
}

#[test]
fn the_same_value_is_shared_without_conflict() {
    let object = applied(None, &config(json!(2), "x:1"), "one", false).expect("applies");
    let object = applied(Some(&object), &config(json!(2), "x:1"), "two", false).expect("shared");
    assert_eq!(owned(&object, "one"), owned(&object, "two"));
    // One of two owners lets go: the field stays.
    let object = applied(Some(&object), &config(Value::Null, "x:1"), "one", false).expect("applies");
    assert_eq!(object["spec"]["replicas"], 2);
    // The last one lets go: it goes.
    let object = applied(Some(&object), &config(Value::Null, "x:1"), "two", false).expect("applies");
    assert!(object["spec"].get("replicas").is_none());
}

#[test]
fn list_items_are_owned_one_by_one() {
    let object = applied(None, &config(Value::Null, "x:1"), "one", false).expect("applies");
    let sidecar = json!({"metadata": {"name": "d"}, "spec": {"template": {"spec": {"containers": [{"name": "b", "image": "y"}]}}}});
    let object = applied(Some(&object), &sidecar, "two", false).expect("applies");
    let names = |object: &Value| {
        let containers = object["spec"]["template"]["spec"]["containers"].as_array().cloned().unwrap_or_default();
        containers.iter().map(|container| container["name"].as_str().unwrap_or_default().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(names(&object), ["a", "b"]);
    let without = json!({"metadata": {"name": "d"}, "spec": {"template": {"spec": {"containers": []}}}});
    let object = applied(Some(&object), &without, "two", false).expect("applies");
    assert_eq!(names(&object), ["a"]);
}

#[test]
fn an_update_takes_what_it_changes() {
    let object = applied(None, &config(json!(2), "x:1"), "one", false).expect("applies");
    let mut new = object.clone();
    new["spec"]["replicas"] = json!(5);
    let object = updated(Some(&object), new, "kubectl-scale");
    assert_eq!(owned(&object, "kubectl-scale"), &json!({"f:spec": {"f:replicas": {}}}));
    assert!(owned(&object, "one")["f:spec"].get("f:replicas").is_none());
    let entry = &object["metadata"]["managedFields"][1];
    assert_eq!((entry["operation"].as_str(), entry["manager"].as_str()), (Some("Update"), Some("kubectl-scale")));
}

#[test]
fn status_and_identity_are_nobody_s_on_the_main_resource() {
    let mut new = config(json!(1), "x");
    new["status"] = json!({"replicas": 1});
    new["metadata"]["uid"] = json!("u");
    new["metadata"]["resourceVersion"] = json!("7");
    let object = updated(None, new, "m");
    assert!(owned(&object, "m").get("f:status").is_none());
    assert_eq!(owned(&object, "m")["f:metadata"], json!({"f:labels": {".": {}, "f:app": {}}}));
    let mut new = object.clone();
    new["status"] = json!({"replicas": 2});
    track_update(UpdateInput {
        gvk: DEPLOYMENT,
        old: Some(&object),
        new: &mut new,
        manager: "c",
        subresource: Some("status"),
        now: NOW,
    });
    assert_eq!(owned(&new, "c"), &json!({"f:status": {"f:replicas": {}}}));
}

#[test]
fn objects_without_owners_get_one_at_the_first_apply() {
    let live = config(json!(2), "x:1");
    let untracked = updated(Some(&live), live.clone(), "m");
    assert!(untracked["metadata"].get("managedFields").is_none());
    let error = applied(Some(&live), &config(json!(3), "x:1"), "two", false).expect_err("a conflict");
    assert_eq!(
        error.to_string(),
        "Apply failed with 1 conflict: conflict with \"before-first-apply\" using apps/v1: .spec.replicas"
    );
}

#[test]
fn owners_can_be_forgotten_and_must_not_be_applied() {
    let object = applied(None, &config(json!(2), "x:1"), "one", false).expect("applies");
    let mut new = object.clone();
    new["metadata"]["managedFields"] = json!([{}]);
    let forgotten = updated(Some(&object), new, "m");
    assert!(forgotten["metadata"].get("managedFields").is_none());
    let error = applied(None, &object, "two", false).expect_err("refused");
    assert_eq!(error.to_string(), "metadata.managedFields must be nil");
}

#[test]
fn many_updaters_are_folded() {
    let mut object = updated(None, config(json!(0), "x"), "m0");
    for turn in 1..15 {
        let mut new = object.clone();
        new["metadata"]["labels"][format!("l{turn}")] = json!("x");
        object = updated(Some(&object), new, &format!("m{turn}"));
    }
    let entries = object["metadata"]["managedFields"].as_array().expect("entries");
    assert!(entries.len() <= 10, "{}", entries.len());
    assert!(entries.iter().any(|entry| entry["manager"] == "ancient-changes"));
}

#[test]
fn hostile_configurations_are_errors_or_objects() {
    for config in [
        json!(null),
        json!([]),
        json!({"metadata": 1}),
        json!({"spec": {"template": {"spec": {"containers": [{"image": "x"}, 1, null]}}}}),
    ] {
        let _ = applied(None, &config, "m", false);
        let _ = applied(
            Some(&json!({"metadata": {"managedFields": [{"operation": "Apply", "fieldsV1": 3}]}})),
            &config,
            "m",
            true,
        );
    }
}
