//! Pods and Services: admission, binding, eviction, graceful deletion, scale, addresses and ports.

mod fixture;

use fixture::Fixture;
use serde_json::{Value, json};

const PODS: &str = "/api/v1/namespaces/work/pods";
const SERVICES: &str = "/api/v1/namespaces/work/services";
const MERGE: &str = "application/merge-patch+json";

fn pod(name: &str) -> Value {
    json!({"metadata": {"name": name, "labels": {"app": "web"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}})
}

async fn with_namespace() -> Fixture {
    let fixture = Fixture::new().await;
    fixture.namespace("work").await;
    fixture
}

#[tokio::test]
async fn a_pod_is_given_what_every_pod_has() {
    let fixture = with_namespace().await;
    let made = fixture.admin.post(PODS, &pod("p")).await.ok();
    assert_eq!(made["spec"]["serviceAccountName"], "default");
    let volume = &made["spec"]["volumes"][0];
    assert!(volume["name"].as_str().is_some_and(|name| name.starts_with("kube-api-access-")));
    assert_eq!(volume["projected"]["sources"][0]["serviceAccountToken"]["path"], "token");
    assert_eq!(made["spec"]["tolerations"].as_array().map(Vec::len), Some(2));
    assert_eq!(made["spec"]["priority"], 0);
    let mut critical = pod("critical");
    critical["spec"]["priorityClassName"] = "system-node-critical".into();
    assert_eq!(fixture.admin.post(PODS, &critical).await.ok()["spec"]["priority"], 2_000_001_000);
    let mut unknown = pod("x");
    unknown["spec"]["serviceAccountName"] = "nobody".into();
    let refused = fixture.admin.post(PODS, &unknown).await;
    assert_eq!(
        (refused.code, refused.message()),
        (
            403,
            "pods \"x\" is forbidden: error looking up service account work/nobody: serviceaccount \"nobody\" not found"
        )
    );
    unknown["spec"]["serviceAccountName"] = "default".into();
    unknown["spec"]["runtimeClassName"] = "gone".into();
    assert_eq!(fixture.admin.post(PODS, &unknown).await.code, 403);
}

#[tokio::test]
async fn a_pod_is_bound_once() {
    let fixture = with_namespace().await;
    fixture.admin.post(PODS, &pod("p")).await.ok();
    let binding = json!({"metadata": {"name": "p"}, "target": {"kind": "Node", "name": "n1"}});
    assert_eq!(fixture.admin.post(&format!("{PODS}/p/binding"), &binding).await.code, 201);
    let bound = fixture.admin.get(&format!("{PODS}/p")).await.ok();
    assert_eq!(bound["spec"]["nodeName"], "n1");
    assert_eq!(bound["status"]["conditions"][0]["type"], "PodScheduled");
    let again = fixture.admin.post("/api/v1/namespaces/work/bindings", &binding).await;
    assert_eq!(again.code, 409);
    assert_eq!(
        again.message(),
        "Operation cannot be fulfilled on pods/binding \"p\": pod p is already assigned to node \"n1\""
    );
    let on_node = fixture.admin.get("/api/v1/pods?fieldSelector=spec.nodeName%3Dn1").await.ok();
    assert_eq!(on_node["items"].as_array().map(Vec::len), Some(1));
}

#[tokio::test]
async fn a_running_pod_is_deleted_gracefully() {
    let fixture = with_namespace().await;
    let path = format!("{PODS}/p");
    fixture.admin.post(PODS, &pod("p")).await.ok();
    let binding = json!({"metadata": {"name": "p"}, "target": {"kind": "Node", "name": "n1"}});
    fixture.admin.post(&format!("{path}/binding"), &binding).await.ok();
    let going = fixture.admin.delete(&path, &json!({"gracePeriodSeconds": 7})).await.ok();
    assert_eq!(going["metadata"]["deletionGracePeriodSeconds"], 7);
    assert_eq!(fixture.admin.get(&path).await.code, 200);
    let node = fixture.as_user("system:node:n1", &["system:nodes"]);
    let uid = going["metadata"]["uid"].clone();
    let now = json!({"gracePeriodSeconds": 0, "preconditions": {"uid": uid}});
    node.delete(&path, &now).await.ok();
    assert_eq!(fixture.admin.get(&path).await.code, 404);
}

#[tokio::test]
async fn debug_containers_are_added_and_resources_resized() {
    let fixture = with_namespace().await;
    let path = format!("{PODS}/p");
    fixture.admin.post(PODS, &pod("p")).await.ok();
    let strategic = "application/strategic-merge-patch+json";
    let debug = json!({"spec": {"ephemeralContainers": [{"name": "dbg", "image": "busybox"}]}});
    let direct = fixture.admin.patch(&path, strategic, &debug).await;
    assert_eq!(direct.code, 422, "only through the sub-resource");
    let added = fixture.admin.patch(&format!("{path}/ephemeralcontainers"), strategic, &debug).await.ok();
    assert_eq!(added["spec"]["ephemeralContainers"][0]["terminationMessagePolicy"], "File");
    let none = json!({"spec": {"ephemeralContainers": null}});
    assert_eq!(fixture.admin.patch(&format!("{path}/ephemeralcontainers"), MERGE, &none).await.code, 422);
    let more = json!({"spec": {"containers": [{"name": "c", "resources": {"requests": {"cpu": "200m"}}}]}});
    let resized = fixture.admin.patch(&format!("{path}/resize"), strategic, &more).await.ok();
    assert_eq!(resized["spec"]["containers"][0]["resources"]["requests"]["cpu"], "200m");
    assert_eq!(resized["spec"]["containers"][0]["image"], "i");
}

#[tokio::test]
async fn eviction_asks_the_disruption_budget() {
    let fixture = with_namespace().await;
    fixture.admin.post(PODS, &pod("p")).await.ok();
    let status = json!({"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}});
    fixture.admin.patch(&format!("{PODS}/p/status"), MERGE, &status).await.ok();
    let budgets = "/apis/policy/v1/namespaces/work/poddisruptionbudgets";
    let budget =
        json!({"metadata": {"name": "b"}, "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": "web"}}}});
    fixture.admin.post(budgets, &budget).await.ok();
    let eviction = json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "p"}});
    let refused = fixture.admin.post(&format!("{PODS}/p/eviction"), &eviction).await;
    assert_eq!((refused.code, refused.reason()), (429, "TooManyRequests"));
    assert_eq!(refused.message(), "Cannot evict pod as it would violate the pod's disruption budget.");
    assert!(refused.headers.contains_key("retry-after"));
    let allowed = json!({"status": {"observedGeneration": 1, "disruptionsAllowed": 1, "currentHealthy": 2, "desiredHealthy": 1, "expectedPods": 2}});
    fixture.admin.patch(&format!("{budgets}/b/status"), MERGE, &allowed).await.ok();
    assert_eq!(fixture.admin.post(&format!("{PODS}/p/eviction"), &eviction).await.code, 201);
    assert_eq!(fixture.admin.get(&format!("{PODS}/p")).await.code, 404);
    assert_eq!(fixture.admin.get(&format!("{budgets}/b")).await.ok()["status"]["disruptionsAllowed"], 0);
}

#[tokio::test]
async fn scale_reads_and_sets_replicas() {
    let fixture = with_namespace().await;
    let deployments = "/apis/apps/v1/namespaces/work/deployments";
    let deployment = json!({"metadata": {"name": "d"}, "spec": {
        "replicas": 2, "selector": {"matchLabels": {"app": "web"}},
        "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}}});
    fixture.admin.post(deployments, &deployment).await.ok();
    let path = format!("{deployments}/d/scale");
    let mut scale = fixture.admin.get(&path).await.ok();
    assert_eq!((&scale["kind"], &scale["spec"]["replicas"]), (&json!("Scale"), &json!(2)));
    assert_eq!(scale["status"]["selector"], "app=web");
    scale["spec"]["replicas"] = 5.into();
    assert_eq!(fixture.admin.put(&path, &scale).await.ok()["spec"]["replicas"], 5);
    assert_eq!(fixture.admin.put(&path, &scale).await.code, 409, "the revision is an old one");
    assert_eq!(fixture.admin.patch(&path, MERGE, &json!({"spec": {"replicas": 3}})).await.ok()["spec"]["replicas"], 3);
    assert_eq!(fixture.admin.patch(&path, MERGE, &json!({"spec": {"replicas": -1}})).await.code, 422);
    let seen = fixture.admin.get(&format!("{deployments}/d")).await.ok();
    assert_eq!((&seen["spec"]["replicas"], &seen["metadata"]["generation"]), (&json!(3), &json!(3)));
}

#[tokio::test]
async fn addresses_and_ports_are_handed_out_once_and_come_back() {
    let fixture = with_namespace().await;
    let service = |name: &str, spec: Value| {
        let mut object = json!({"metadata": {"name": name}, "spec": {"ports": [{"port": 80}]}});
        for (key, value) in spec.as_object().expect("a map") {
            object["spec"][key] = value.clone();
        }
        object
    };
    let first = fixture.admin.post(SERVICES, &service("a", json!({"type": "NodePort"}))).await.ok();
    let address = first["spec"]["clusterIP"].as_str().expect("an address").to_owned();
    assert!(address.starts_with("10.43."));
    assert_eq!(first["spec"]["clusterIPs"], json!([address]));
    let port = first["spec"]["ports"][0]["nodePort"].as_u64().expect("a port");
    assert!((30000..=32767).contains(&port));
    let taken = fixture.admin.post(SERVICES, &service("b", json!({"clusterIP": address}))).await;
    assert_eq!((taken.code, taken.reason()), (422, "Invalid"));
    assert!(taken.message().contains("provided IP is already allocated"), "{}", taken.message());
    let same_port = json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": port}]});
    assert_eq!(fixture.admin.post(SERVICES, &service("b", same_port.clone())).await.code, 422);
    let outside = json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 80}]});
    assert_eq!(fixture.admin.post(SERVICES, &service("b", outside)).await.code, 422);
    fixture.admin.delete(&format!("{SERVICES}/a"), &json!({})).await.ok();
    assert_eq!(fixture.admin.post(SERVICES, &service("b", same_port)).await.code, 201);
    let headless = fixture.admin.post(SERVICES, &service("h", json!({"clusterIP": "None"}))).await.ok();
    assert_eq!(headless["spec"]["clusterIPs"], json!(["None"]));
    let name = json!({"metadata": {"name": "e"}, "spec": {"type": "ExternalName", "externalName": "example.com"}});
    assert!(fixture.admin.post(SERVICES, &name).await.ok()["spec"].get("clusterIP").is_none());
    let kept = fixture.admin.put(&format!("{SERVICES}/b"), &service("b", json!({"type": "NodePort"}))).await.ok();
    assert_eq!(kept["spec"]["ports"][0]["nodePort"], port);
    let plain =
        fixture.admin.patch(&format!("{SERVICES}/b"), MERGE, &json!({"spec": {"type": "ClusterIP"}})).await.ok();
    assert!(plain["spec"]["ports"][0].get("nodePort").is_none(), "{plain}");
}

#[tokio::test]
async fn events_are_one_store_seen_two_ways() {
    let fixture = with_namespace().await;
    let event = json!({"metadata": {"name": "e"}, "reason": "Started", "message": "it runs", "type": "Normal",
        "involvedObject": {"kind": "Pod", "namespace": "work", "name": "p"}});
    fixture.admin.post("/api/v1/namespaces/work/events", &event).await.ok();
    let newer = fixture.admin.get("/apis/events.k8s.io/v1/namespaces/work/events/e").await.ok();
    assert_eq!(newer["apiVersion"], "events.k8s.io/v1");
    assert_eq!((&newer["note"], &newer["regarding"]["name"]), (&json!("it runs"), &json!("p")));
    let list = fixture.admin.get("/apis/events.k8s.io/v1/namespaces/work/events").await.ok();
    assert_eq!((&list["kind"], &list["items"][0]["reason"]), (&json!("EventList"), &json!("Started")));
    let selected = "/api/v1/namespaces/work/events?fieldSelector=involvedObject.name%3Dp,reason%3DStarted";
    assert_eq!(fixture.admin.get(selected).await.ok()["items"].as_array().map(Vec::len), Some(1));
}
