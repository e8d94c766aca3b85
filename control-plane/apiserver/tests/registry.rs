//! The generic registry as clients see it: create, read, update, patch, delete, list and watch.

mod fixture;

use fixture::Fixture;
use serde_json::json;

const MAPS: &str = "/api/v1/namespaces/default/configmaps";
const MERGE: &str = "application/merge-patch+json";

#[tokio::test]
async fn an_object_lives_from_create_to_delete() {
    let fixture = Fixture::new().await;
    let api = &fixture.admin;
    let created = api.post(MAPS, &json!({"metadata": {"name": "a"}, "data": {"k": "1"}})).await;
    assert_eq!(created.code, 201);
    assert_eq!((&created.body["kind"], &created.body["apiVersion"]), (&json!("ConfigMap"), &json!("v1")));
    assert!(created.body["metadata"]["uid"].is_string() && created.body["metadata"]["creationTimestamp"].is_string());
    let again = api.post(MAPS, &json!({"metadata": {"name": "a"}})).await;
    assert_eq!(
        (again.code, again.reason(), again.message()),
        (409, "AlreadyExists", "configmaps \"a\" already exists")
    );
    let mut object = api.get(&format!("{MAPS}/a")).await.ok();
    object["data"]["k"] = "2".into();
    let updated = api.put(&format!("{MAPS}/a"), &object).await.ok();
    assert_ne!(updated["metadata"]["resourceVersion"], object["metadata"]["resourceVersion"]);
    let stale = api.put(&format!("{MAPS}/a"), &object).await;
    assert_eq!((stale.code, stale.reason()), (409, "Conflict"));
    assert_eq!(
        stale.message(),
        "Operation cannot be fulfilled on configmaps \"a\": the object has been modified; please apply your changes to the \
         latest version and try again"
    );
    let gone = api.delete(&format!("{MAPS}/a"), &json!({})).await.ok();
    assert_eq!((&gone["status"], &gone["details"]["name"]), (&json!("Success"), &json!("a")));
    let missing = api.get(&format!("{MAPS}/a")).await;
    assert_eq!((missing.code, missing.message()), (404, "configmaps \"a\" not found"));
}

#[tokio::test]
async fn an_update_that_changes_nothing_keeps_the_revision() {
    let fixture = Fixture::new().await;
    let created = fixture.admin.post(MAPS, &json!({"metadata": {"name": "a"}, "data": {"k": "1"}})).await.ok();
    let again = fixture.admin.put(&format!("{MAPS}/a"), &created).await.ok();
    assert_eq!(created["metadata"]["resourceVersion"], again["metadata"]["resourceVersion"]);
}

#[tokio::test]
async fn names_are_generated_and_bad_ones_refused() {
    let fixture = Fixture::new().await;
    let generated = fixture.admin.post(MAPS, &json!({"metadata": {"generateName": "x-"}})).await.ok();
    assert!(generated["metadata"]["name"].as_str().is_some_and(|name| name.starts_with("x-") && name.len() == 7));
    let unnamed = fixture.admin.post(MAPS, &json!({"metadata": {}})).await;
    assert_eq!((unnamed.code, unnamed.reason()), (422, "Invalid"));
    assert_eq!(unnamed.body["details"]["causes"][0]["field"], "metadata.name");
    assert_eq!(fixture.admin.post(MAPS, &json!({"metadata": {"name": "a/b"}})).await.code, 422);
}

#[tokio::test]
async fn unknown_fields_are_an_error_a_warning_or_ignored_as_asked() {
    let fixture = Fixture::new().await;
    let body = json!({"metadata": {"name": "a"}, "dta": {}});
    let strict = fixture.admin.post(&format!("{MAPS}?fieldValidation=Strict"), &body).await;
    assert_eq!(strict.code, 400);
    assert!(strict.message().ends_with("strict decoding error: unknown field \"dta\""), "{}", strict.message());
    let warned = fixture.admin.post(&format!("{MAPS}?dryRun=All"), &body).await;
    assert_eq!(warned.headers.get("warning").expect("a warning"), "299 - \"unknown field \\\"dta\\\"\"");
    let ignored = fixture.admin.post(&format!("{MAPS}?fieldValidation=Ignore"), &body).await;
    assert!(ignored.code == 201 && ignored.headers.get("warning").is_none());
}

#[tokio::test]
async fn a_dry_run_changes_nothing() {
    let fixture = Fixture::new().await;
    assert_eq!(fixture.admin.post(&format!("{MAPS}?dryRun=All"), &json!({"metadata": {"name": "a"}})).await.code, 201);
    assert_eq!(fixture.admin.get(&format!("{MAPS}/a")).await.code, 404);
    fixture.admin.post(MAPS, &json!({"metadata": {"name": "a"}})).await.ok();
    fixture.admin.delete(&format!("{MAPS}/a?dryRun=All"), &json!({})).await.ok();
    fixture.admin.delete(&format!("{MAPS}/a"), &json!({"dryRun": ["All"]})).await.ok();
    assert_eq!(fixture.admin.get(&format!("{MAPS}/a")).await.code, 200);
}

#[tokio::test]
async fn every_patch_flavour_is_applied() {
    let fixture = Fixture::new().await;
    let path = format!("{MAPS}/a");
    fixture.admin.post(MAPS, &json!({"metadata": {"name": "a"}, "data": {"k": "1", "gone": "x"}})).await.ok();
    let merged = fixture.admin.patch(&path, MERGE, &json!({"data": {"gone": null, "m": "2"}})).await.ok();
    assert_eq!(merged["data"], json!({"k": "1", "m": "2"}));
    let json_patch = json!([{"op": "test", "path": "/data/k", "value": "1"}, {"op": "remove", "path": "/data/k"}]);
    let patched = fixture.admin.patch(&path, "application/json-patch+json", &json_patch).await.ok();
    assert_eq!(patched["data"], json!({"m": "2"}));
    let failed = json!([{"op": "test", "path": "/data/m", "value": "9"}]);
    let failed = fixture.admin.patch(&path, "application/json-patch+json", &failed).await;
    assert_eq!((failed.code, failed.reason()), (422, "Invalid"));
    assert_eq!(failed.body["details"]["causes"][0]["reason"], "UnexpectedServerResponse");
    let strategic = "application/strategic-merge-patch+json";
    let patched = fixture.admin.patch(&path, strategic, &json!({"metadata": {"labels": {"l": "1"}}})).await.ok();
    assert_eq!(patched["metadata"]["labels"]["l"], "1");
    let stale = json!({"metadata": {"resourceVersion": "1"}, "data": {"m": "3"}});
    assert_eq!(fixture.admin.patch(&path, MERGE, &stale).await.code, 409);
    assert_eq!(fixture.admin.patch(&path, "text/plain", &json!({})).await.code, 415);
    assert_eq!(fixture.admin.patch(&format!("{MAPS}/none"), MERGE, &json!({})).await.code, 404);
}

#[tokio::test]
async fn server_side_apply_creates_then_changes() {
    let fixture = Fixture::new().await;
    let path = format!("{MAPS}/a?fieldManager=one");
    let apply = "application/apply-patch+yaml";
    let config =
        |value: &str| json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": {"k": value}});
    assert_eq!(fixture.admin.patch(&path, apply, &config("1")).await.code, 201);
    let changed = fixture.admin.patch(&path, apply, &config("2")).await;
    assert_eq!((changed.code, &changed.body["data"]["k"]), (200, &json!("2")));
    let anonymous = fixture.admin.patch(&format!("{MAPS}/a"), apply, &config("3")).await;
    assert_eq!((anonymous.code, anonymous.reason()), (422, "Invalid"));
}

#[tokio::test]
async fn concurrent_patches_all_arrive() {
    let fixture = Fixture::new().await;
    fixture.admin.post(MAPS, &json!({"metadata": {"name": "a"}})).await.ok();
    let patches = (0..8).map(|n| {
        let caller = fixture.as_user("kubernetes-admin", &["system:masters"]);
        async move {
            let body = json!({"data": {(format!("k{n}")): "v"}});
            caller.patch(&format!("{MAPS}/a"), MERGE, &body).await.ok();
        }
    });
    futures::future::join_all(patches).await;
    let object = fixture.admin.get(&format!("{MAPS}/a")).await.ok();
    assert_eq!(object["data"].as_object().map(serde_json::Map::len), Some(8));
}

#[tokio::test]
async fn lists_select_and_page() {
    let fixture = Fixture::new().await;
    for n in 0..5 {
        let parity = if n % 2 == 0 { "even" } else { "odd" };
        let body = json!({"metadata": {"name": format!("m{n}"), "labels": {"parity": parity}}});
        fixture.admin.post(MAPS, &body).await.ok();
    }
    let names = |list: &serde_json::Value| -> Vec<String> {
        let items = list["items"].as_array().expect("items");
        items.iter().map(|item| item["metadata"]["name"].as_str().unwrap_or_default().to_owned()).collect()
    };
    let even = fixture.admin.get(&format!("{MAPS}?labelSelector=parity%3Deven")).await.ok();
    assert_eq!(names(&even), ["m0", "m2", "m4"]);
    assert_eq!(even["kind"], "ConfigMapList");
    let one = fixture.admin.get(&format!("{MAPS}?fieldSelector=metadata.name%3Dm1")).await.ok();
    assert_eq!(names(&one), ["m1"]);
    let first = fixture.admin.get(&format!("{MAPS}?limit=2")).await.ok();
    assert_eq!(first["metadata"]["remainingItemCount"], 3);
    fixture.admin.delete(&format!("{MAPS}/m3"), &json!({})).await.ok();
    let token = first["metadata"]["continue"].as_str().expect("a token");
    let rest = fixture.admin.get(&format!("{MAPS}?limit=9&continue={token}")).await.ok();
    assert_eq!(names(&rest), ["m2", "m3", "m4"], "the second page is of the first page's revision");
    assert_eq!(rest["metadata"]["resourceVersion"], first["metadata"]["resourceVersion"]);
    assert_eq!(fixture.admin.get(&format!("{MAPS}?fieldSelector=spec.x%3D1")).await.code, 400);
    assert_eq!(fixture.admin.get(&format!("{MAPS}?continue=nonsense")).await.code, 400);
    let ahead = fixture.admin.get(&format!("{MAPS}?resourceVersion=999999")).await;
    assert_eq!((ahead.code, ahead.reason()), (504, "Timeout"));
}

#[tokio::test]
async fn a_watch_shows_what_happens_to_what_it_selects() {
    let fixture = Fixture::new().await;
    let api = &fixture.admin;
    api.post(MAPS, &json!({"metadata": {"name": "a", "labels": {"on": "yes"}}})).await.ok();
    let mut events = api.watch(&format!("{MAPS}?watch=true&labelSelector=on%3Dyes")).await;
    assert_eq!(events.next().await.expect("the present state").0, "ADDED");
    api.post(MAPS, &json!({"metadata": {"name": "other"}})).await.ok();
    api.patch(&format!("{MAPS}/a"), MERGE, &json!({"data": {"k": "v"}})).await.ok();
    let (what, object) = events.next().await.expect("a change");
    assert_eq!((&*what, &object["data"]["k"]), ("MODIFIED", &json!("v")));
    api.patch(&format!("{MAPS}/a"), MERGE, &json!({"metadata": {"labels": {"on": "no"}}})).await.ok();
    let (what, left) = events.next().await.expect("it leaves the selection");
    assert_eq!((&*what, &left["metadata"]["labels"]["on"]), ("DELETED", &json!("yes")), "as it was last seen");
    let now = api.get(&format!("{MAPS}/a")).await.body;
    assert_eq!(
        left["metadata"]["resourceVersion"], now["metadata"]["resourceVersion"],
        "at the revision of the change"
    );
    api.patch(&format!("{MAPS}/a"), MERGE, &json!({"metadata": {"labels": {"on": "yes"}}})).await.ok();
    assert_eq!(events.next().await.expect("it comes back").0, "ADDED");
    let gone_at = api.delete(&format!("{MAPS}/a"), &json!({})).await.ok();
    let (what, object) = events.next().await.expect("a deletion");
    assert_eq!((&*what, &gone_at["status"]), ("DELETED", &json!("Success")));
    let mut resumed = api
        .watch(&format!(
            "{MAPS}?watch=1&resourceVersion={}",
            object["metadata"]["resourceVersion"].as_str().expect("rv")
        ))
        .await;
    api.post(MAPS, &json!({"metadata": {"name": "later"}})).await.ok();
    assert_eq!(resumed.next().await.expect("only what came after").1["metadata"]["name"], "later");
}

#[tokio::test]
async fn a_watch_list_ends_its_initial_events_with_a_bookmark() {
    let fixture = Fixture::new().await;
    fixture.admin.post(MAPS, &json!({"metadata": {"name": "a"}})).await.ok();
    let query =
        "watch=1&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true&timeoutSeconds=1";
    let mut events = fixture.admin.watch(&format!("{MAPS}?{query}")).await;
    assert_eq!(events.next().await.expect("the object").0, "ADDED");
    let (what, bookmark) = events.next().await.expect("the bookmark");
    assert_eq!(
        (&*what, &bookmark["metadata"]["annotations"]["k8s.io/initial-events-end"]),
        ("BOOKMARK", &json!("true"))
    );
    assert_eq!(events.next().await.expect("a last bookmark when time is up").0, "BOOKMARK");
    assert!(events.next().await.is_none(), "then the stream ends");
    let refused = fixture.admin.get(&format!("{MAPS}?watch=1&sendInitialEvents=true")).await;
    assert_eq!(refused.code, 422);
}

#[tokio::test]
async fn a_deletion_waits_for_finalizers() {
    let fixture = Fixture::new().await;
    let path = format!("{MAPS}/a");
    fixture.admin.post(MAPS, &json!({"metadata": {"name": "a", "finalizers": ["example.com/held"]}})).await.ok();
    let pending = fixture.admin.delete(&path, &json!({})).await.ok();
    assert!(pending["metadata"]["deletionTimestamp"].is_string());
    assert_eq!(fixture.admin.get(&path).await.code, 200);
    fixture.admin.patch(&path, MERGE, &json!({"metadata": {"finalizers": null}})).await.ok();
    assert_eq!(fixture.admin.get(&path).await.code, 404);
    fixture.admin.post(MAPS, &json!({"metadata": {"name": "a"}})).await.ok();
    let wrong = fixture.admin.delete(&path, &json!({"preconditions": {"uid": "other"}})).await;
    assert_eq!((wrong.code, wrong.reason()), (409, "Conflict"));
    let held = fixture.admin.delete(&path, &json!({"propagationPolicy": "Foreground"})).await.ok();
    assert_eq!(held["metadata"]["finalizers"], json!(["foregroundDeletion"]));
}

#[tokio::test]
async fn a_collection_is_deleted_by_selector() {
    let fixture = Fixture::new().await;
    for (name, label) in [("a", "x"), ("b", "x"), ("c", "y")] {
        fixture.admin.post(MAPS, &json!({"metadata": {"name": name, "labels": {"l": label}}})).await.ok();
    }
    let gone = fixture.admin.delete(&format!("{MAPS}?labelSelector=l%3Dx"), &json!({})).await.ok();
    assert_eq!(gone["items"].as_array().map(Vec::len), Some(2));
    assert_eq!(fixture.admin.get(&format!("{MAPS}/c")).await.code, 200);
    assert_eq!(fixture.admin.get(&format!("{MAPS}/a")).await.code, 404);
}

#[tokio::test]
async fn answers_come_as_tables_and_metadata_where_asked() {
    let fixture = Fixture::new().await;
    let table = fixture.admin.get_as("/api/v1/namespaces", "application/json;as=Table;v=v1;g=meta.k8s.io").await.ok();
    assert_eq!(table["kind"], "Table");
    assert_eq!(table["columnDefinitions"][0]["name"], "Name");
    assert_eq!(table["rows"][0]["cells"][0], "default");
    let partial = "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io";
    let metadata = fixture.admin.get_as("/api/v1/namespaces", partial).await.ok();
    assert_eq!(metadata["kind"], "PartialObjectMetadataList");
    assert!(metadata["items"][0].get("spec").is_none());
    assert_eq!(fixture.admin.get_as("/api/v1/namespaces", "application/xml").await.code, 406);
}

#[tokio::test]
async fn a_namespace_refuses_new_objects_while_it_goes() {
    let fixture = Fixture::new().await;
    fixture.namespace("going").await;
    let missing = fixture.admin.post("/api/v1/namespaces/none/configmaps", &json!({"metadata": {"name": "a"}})).await;
    assert_eq!((missing.code, missing.message()), (404, "namespaces \"none\" not found"));
    let going = fixture.admin.delete("/api/v1/namespaces/going", &json!({})).await.ok();
    assert_eq!(going["status"]["phase"], "Terminating");
    let refused = fixture.admin.post("/api/v1/namespaces/going/configmaps", &json!({"metadata": {"name": "a"}})).await;
    assert_eq!((refused.code, &refused.body["details"]["causes"][0]["reason"]), (403, &json!("NamespaceTerminating")));
    let mut namespace = fixture.admin.get("/api/v1/namespaces/going").await.ok();
    namespace["spec"]["finalizers"] = json!([]);
    fixture.admin.put("/api/v1/namespaces/going/finalize", &namespace).await.ok();
    assert_eq!(fixture.admin.get("/api/v1/namespaces/going").await.code, 404);
    assert_eq!(fixture.admin.delete("/api/v1/namespaces/default", &json!({})).await.code, 403);
}

#[tokio::test]
async fn oversized_and_malformed_bodies_are_refused() {
    let fixture = Fixture::new().await;
    let large = json!({"metadata": {"name": "a"}, "data": {"k": "x".repeat(4 << 20)}});
    assert_eq!(fixture.admin.post(MAPS, &large).await.code, 413);
    let builder = || http::Request::post(MAPS).header("content-type", "application/json");
    assert_eq!(fixture.admin.send(builder(), b"{\"a\":".to_vec()).await.code, 400);
    let deep = format!("{}{}", "[".repeat(5000), "]".repeat(5000));
    assert_eq!(fixture.admin.send(builder(), deep.into_bytes()).await.code, 400);
    let wrong =
        fixture.admin.post(MAPS, &json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "a"}})).await;
    assert_eq!(wrong.code, 400);
    let yaml = http::Request::post(MAPS).header("content-type", "application/yaml");
    let made = fixture.admin.send(yaml, b"metadata: {name: y}\ndata: {k: v}\n".to_vec()).await.ok();
    assert_eq!(made["data"]["k"], "v");
}

#[tokio::test]
async fn the_state_survives_a_restart() {
    let dir = tempfile::tempdir().expect("a directory");
    let listen = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    let config = fixture::configure(dir.path(), listen).expect("certificates");
    let first = oarlock_apiserver::ApiServer::new(config.clone()).await.expect("starts");
    let caller = fixture::Caller { client: first.client("kubernetes-admin", &["system:masters"]) };
    let made = caller.post(MAPS, &json!({"metadata": {"name": "a"}, "data": {"k": "v"}})).await.ok();
    drop((caller, first));
    // The in-process client's worker lets go of the store a moment after its last handle is dropped.
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(20);
    let second = loop {
        match oarlock_apiserver::ApiServer::new(config.clone()).await {
            Ok(server) => break server,
            Err(error) if tokio::time::Instant::now() > deadline => panic!("starts again: {error}"),
            Err(_) => tokio::time::sleep(std::time::Duration::from_millis(2)).await,
        }
    };
    let caller = fixture::Caller { client: second.client("kubernetes-admin", &["system:masters"]) };
    let kept = caller.get(&format!("{MAPS}/a")).await.ok();
    assert_eq!(kept, made);
    let mut events = caller
        .watch(&format!("{MAPS}?watch=1&resourceVersion={}", made["metadata"]["resourceVersion"].as_str().expect("rv")))
        .await;
    caller.delete(&format!("{MAPS}/a"), &json!({})).await.ok();
    assert_eq!(events.next().await.expect("the watch resumes over the restart").0, "DELETED");
}
