//! Resizing pods in place, and volumes that follow their objects, against a fake API server and a fake runtime.

mod fakes;

use fakes::node::{Node, POD, condition, pod, ready};
use serde_json::{Value, json};

fn sized(cpu: &str, policy: &str) -> Value {
    pod(
        json!({"nodeName": "node-1", "terminationGracePeriodSeconds": 1, "containers": [{"name": "app", "image": "app:1",
        "resizePolicy": [{"resourceName": "cpu", "restartPolicy": policy}],
        "resources": {"requests": {"cpu": cpu, "memory": "1Mi"}, "limits": {"cpu": "100"}}}]}),
    )
}

/// What a user's `kubectl patch --subresource resize` does to the object.
fn resize(node: &Node, cpu: &str) {
    let mut pod = node.api.get(POD).expect("the pod");
    pod["spec"]["containers"][0]["resources"]["requests"]["cpu"] = json!(cpu);
    node.api.put(POD, pod);
}

fn container(pod: &Value) -> &Value {
    &pod["status"]["containerStatuses"][0]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_is_resized_without_a_restart() {
    let node = Node::start(&["app:1"]).await;
    node.create(sized("100m", "NotRequired"));
    let before = node.api.wait(POD, "Ready", ready).await;
    assert_eq!(container(&before)["resources"]["requests"]["cpu"], "100m");
    resize(&node, "200m");
    let after = node.api.wait(POD, "resized", |pod| container(pod)["resources"]["requests"]["cpu"] == "200m").await;
    assert_eq!(container(&after)["allocatedResources"]["cpu"], "200m");
    assert_eq!(container(&after)["containerID"], container(&before)["containerID"]);
    assert_eq!(condition(&after, "PodResizeInProgress"), "");
    assert!(node.runtime.calls().contains(&"update cpu.shares=204".to_owned()), "{:?}", node.runtime.calls());
    assert_eq!(node.runtime.calls().iter().filter(|call| call.starts_with("create")).count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_that_asks_for_it_is_restarted_with_its_new_size() {
    let node = Node::start(&["app:1"]).await;
    node.create(sized("100m", "RestartContainer"));
    node.api.wait(POD, "Ready", ready).await;
    resize(&node, "200m");
    let after = node.api.wait(POD, "restarted", |pod| container(pod)["restartCount"] == 1 && ready(pod)).await;
    assert_eq!(container(&after)["resources"]["requests"]["cpu"], "200m");
    assert!(!node.runtime.calls().iter().any(|call| call.starts_with("update")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_size_that_does_not_fit_leaves_the_pod_as_it_is_and_says_so() {
    let mut node = Node::start(&["app:1"]).await;
    node.create(sized("100m", "NotRequired"));
    node.api.wait(POD, "Ready", ready).await;
    resize(&node, "100");
    let reason = |pod: &Value| {
        let conditions = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let found = conditions.into_iter().find(|condition| condition["type"] == "PodResizePending");
        found.unwrap_or_default()["reason"].as_str().unwrap_or_default().to_owned()
    };
    let waiting = node.api.wait(POD, "Infeasible", |pod| reason(pod) == "Infeasible").await;
    assert!(ready(&waiting));
    assert_eq!(container(&waiting)["allocatedResources"]["cpu"], "100m");
    // Also for the agent that comes after this one.
    node.kill_agent().await;
    let node = node.with_agent().await;
    node.wait_for_event("ResizeInfeasible").await;
    resize(&node, "100m");
    let fits = node.api.wait(POD, "as it was", |pod| reason(pod).is_empty()).await;
    assert_eq!(container(&fits)["allocatedResources"]["cpu"], "100m");
    // The second agent may make sure of the size, which is the one that it was.
    let calls = node.runtime.calls();
    let mut updates = calls.iter().filter(|call| call.starts_with("update"));
    assert!(updates.all(|call| call == "update cpu.shares=102"), "{calls:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mounted_config_map_follows_within_a_moment() {
    const MAP: &str = "/api/v1/namespaces/default/configmaps/settings";
    let node = Node::start(&["app:1"]).await;
    let map = |depth: &str| json!({"metadata": {"name": "settings", "namespace": "default"}, "data": {"depth": depth}});
    node.api.put(MAP, map("1"));
    node.create(pod(json!({"nodeName": "node-1", "volumes": [{"name": "v", "configMap": {"name": "settings"}}],
        "containers": [{"name": "app", "image": "app:1", "volumeMounts": [{"name": "v", "mountPath": "/v"}]}]})));
    node.api.wait(POD, "Ready", ready).await;
    let file = node.dir.path().join("data/pods/pod-uid-1/volumes/kubernetes.io~configmap/v/depth");
    assert_eq!(std::fs::read_to_string(&file).expect("a file"), "1");
    // While versions are changed the old one may go between finding the file and opening it.
    for depth in ["2", "3"] {
        node.api.put(MAP, map(depth));
        let followed = fakes::reached(|| std::fs::read_to_string(&file).is_ok_and(|text| text == depth));
        assert!(followed.await, "the volume shows an old version");
    }
}
