//! Fields of a pod that reach the runtime in another form, or keep it away: runtime classes, host names, sub-paths, systems.

mod fakes;

use fakes::node::{Node, POD, plain, pod, ready};
use serde_json::{Value, json};

const CLASS: &str = "/apis/node.k8s.io/v1/runtimeclasses/boxed";

fn of_class() -> Value {
    let mut pod = plain();
    pod["spec"]["runtimeClassName"] = json!("boxed");
    pod
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_runtime_class_is_the_handler_that_it_names() {
    let node = Node::start(&["app:1"]).await;
    node.api.put(CLASS, json!({"metadata": {"name": "boxed"}, "handler": "kata-qemu"}));
    node.create(of_class());
    node.api.wait(POD, "Ready", ready).await;
    assert_eq!(node.runtime.world.lock().unwrap().sandboxes[0].runtime_handler, "kata-qemu");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_runtime_class_the_runtime_chooses() {
    let node = Node::start(&["app:1"]).await;
    node.create(plain());
    node.api.wait(POD, "Ready", ready).await;
    assert_eq!(node.runtime.world.lock().unwrap().sandboxes[0].runtime_handler, "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_of_an_unknown_class_waits_for_it_and_says_so() {
    let node = Node::start(&["app:1"]).await;
    node.create(of_class());
    node.wait_for_event("FailedCreatePodSandBox").await;
    let events = node.api.all("/events/");
    let event = events.iter().find(|event| event["reason"] == "FailedCreatePodSandBox").expect("the event");
    assert!(event["message"].as_str().is_some_and(|text| text.contains("RuntimeClass \"boxed\" not found")), "{event}");
    let waiting = |pod: &Value| {
        pod["status"]["containerStatuses"][0]["state"]["waiting"]["reason"] == "ContainerCreating"
            && pod["status"]["phase"] == "Pending"
    };
    node.api.wait(POD, "waiting", waiting).await;
    assert!(!node.runtime.calls().contains(&"run".to_owned()), "{:?}", node.runtime.calls());
    // The class appears, and the pod needs nobody to touch it.
    node.api.put(CLASS, json!({"metadata": {"name": "boxed"}, "handler": "kata"}));
    node.api.wait(POD, "Ready", ready).await;
    assert_eq!(node.runtime.world.lock().unwrap().sandboxes[0].runtime_handler, "kata");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_host_name_is_the_full_one_where_that_is_wanted() {
    let node = Node::start(&["app:1"]).await;
    let named = |full: bool| {
        pod(json!({"nodeName": "node-1", "hostname": "db", "subdomain": "data", "setHostnameAsFQDN": full,
            "terminationGracePeriodSeconds": 1, "containers": [{"name": "app", "image": "app:1"}]}))
    };
    node.create(named(true));
    node.api.wait(POD, "Ready", ready).await;
    let hostname = || node.runtime.world.lock().unwrap().sandboxes[0].config.hostname.clone();
    assert_eq!(hostname(), "db.data.default.svc.cluster.local");
    node.api.delete_gracefully(POD, 1);
    node.api.wait(POD, "gone", Value::is_null).await;
    let mut short = named(false);
    short["metadata"]["uid"] = json!("pod-uid-2");
    node.create(short);
    node.api.wait(POD, "Ready", ready).await;
    let world = node.runtime.world.lock().unwrap();
    let second = world
        .sandboxes
        .iter()
        .find(|sandbox| sandbox.config.metadata.as_ref().is_some_and(|metadata| metadata.uid == "pod-uid-2"));
    assert_eq!(second.expect("the sandbox").config.hostname, "db");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_host_name_that_no_machine_may_have_keeps_the_pod_waiting() {
    let node = Node::start(&["app:1"]).await;
    let long = "d".repeat(40);
    node.create(pod(json!({"nodeName": "node-1", "hostname": "db", "subdomain": long, "setHostnameAsFQDN": true,
        "containers": [{"name": "app", "image": "app:1"}]})));
    node.wait_for_event("FailedCreatePodSandBox").await;
    let events = node.api.all("/events/");
    let event = events.iter().find(|event| event["reason"] == "FailedCreatePodSandBox").expect("the event");
    let text = event["message"].as_str().unwrap_or_default();
    assert!(text.contains(&format!("FQDN db.{long}.default.svc.cluster.local is too long")), "{text}");
    assert!(!node.runtime.calls().contains(&"run".to_owned()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sub_path_is_made_of_the_containers_variables() {
    let node = Node::start(&["app:1"]).await;
    node.create(pod(json!({"nodeName": "node-1", "volumes": [{"name": "data", "emptyDir": {}}],
        "containers": [{"name": "app", "image": "app:1",
            "env": [{"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                {"name": "PLACE", "value": "of-$(POD_NAME)"}],
            "volumeMounts": [{"name": "data", "mountPath": "/data", "subPathExpr": "$(PLACE)/logs"}]}]})));
    node.api.wait(POD, "Ready", ready).await;
    let directory = node.dir.path().join("data/pods/pod-uid-1/volumes/kubernetes.io~empty-dir/data/of-web/logs");
    assert!(directory.is_dir(), "{} is not there", directory.display());
    let world = node.runtime.world.lock().unwrap();
    let mounts = &world.containers[0].config.mounts;
    let mount = mounts.iter().find(|mount| mount.container_path == "/data").expect("the mount");
    assert!(!mount.host_path.ends_with("empty-dir/data"), "not the whole volume: {}", mount.host_path);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_for_another_system_is_refused() {
    let node = Node::start(&["app:1"]).await;
    node.create(pod(json!({"nodeName": "node-1", "os": {"name": "windows"},
        "containers": [{"name": "app", "image": "app:1"}]})));
    let pod = node.api.wait(POD, "Failed", |pod| pod["status"]["phase"] == "Failed").await;
    assert_eq!(pod["status"]["reason"], "PodOSNotSupported");
    assert!(node.runtime.calls().is_empty(), "nothing may be made for it");
}
