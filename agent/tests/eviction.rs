//! A node that runs short, between a fake API server and a fake runtime: who goes, who stays, and what users read.

mod fakes;

use std::time::Duration;

use fakes::node::{NODE, Node, POD, condition, plain, pod, ready};
use oarlock_agent::{Amount, Config, Signal, Threshold};
use oarlock_proto::cri;
use serde_json::{Value, json};

const OTHER: &str = "/api/v1/namespaces/default/pods/other";

/// Far more than any machine has left.
fn short_of(config: &mut Config, signal: Signal) {
    let below = Amount::Percent(99.99);
    config.eviction.thresholds = vec![Threshold { signal, below, grace: None, min_reclaim: None }];
    config.eviction.period = Duration::from_millis(100);
    config.image_gc.min_age = Duration::ZERO;
}

/// A pod named `other` with its own UID.
fn other(spec: Value) -> Value {
    let mut pod = pod(spec);
    pod["metadata"]["name"] = json!("other");
    pod["metadata"]["uid"] = json!("pod-uid-2");
    pod
}

fn with_memory(request: &str) -> Value {
    json!({"nodeName": "node-1", "terminationGracePeriodSeconds": 1, "containers": [
        {"name": "app", "image": "app:1", "resources": {"requests": {"memory": request}}}]})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_without_memory_ends_pods_says_so_and_takes_no_more() {
    let mut node = Node::start(&["app:1"]).await;
    node.runtime.world.lock().unwrap().memory.insert("app".to_owned(), 300 << 20);
    node.create(pod(with_memory("2Ki")));
    node.api.wait(POD, "Ready", ready).await;
    // The shortage begins when the pod's use can be seen.
    node.kill_agent().await;
    let node = node.with_agent_of(|config| short_of(config, Signal::MemoryAvailable)).await;
    node.api.wait(NODE, "under pressure", |node| condition(node, "MemoryPressure") == "True").await;
    let ended = node.api.wait(POD, "Failed", |pod| pod["status"]["phase"] == "Failed").await;
    assert_eq!(ended["status"]["reason"], "Evicted");
    let message = ended["status"]["message"].as_str().unwrap_or_default().to_owned();
    assert!(message.starts_with("The node was low on resource: memory. Threshold quantity: "), "{message}");
    assert!(
        message.contains("Container app was using 300Mi, request is 2Ki, has larger consumption of memory. "),
        "{message}"
    );
    assert_eq!(condition(&ended, "DisruptionTarget"), "True");
    for event in ["EvictionThresholdMet", "Evicted", "Killing", "NodeHasInsufficientMemory"] {
        node.wait_for_event(event).await;
    }
    assert!(node.runtime.running().is_empty());
    // A pod that asks for nothing is not even started.
    node.api.put(OTHER, other(json!({"nodeName": "node-1", "containers": [{"name": "app", "image": "app:1"}]})));
    let refused = node.api.wait(OTHER, "Failed", |pod| pod["status"]["phase"] == "Failed").await;
    assert_eq!(refused["status"]["message"], "Pod was rejected: The node had condition: [MemoryPressure]. ");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn system_pods_outlive_the_shortage() {
    let node = Node::start_with(&["app:1"], |config| short_of(config, Signal::MemoryAvailable)).await;
    let mut spec = with_memory("2Ki");
    spec["priority"] = json!(2_000_001_000);
    node.create(pod(spec));
    node.api.wait(POD, "Ready", ready).await;
    node.api.put(OTHER, other(with_memory("1Ki")));
    node.api.wait(OTHER, "Failed", |pod| pod["status"]["phase"] == "Failed").await;
    assert!(ready(&node.api.get(POD).expect("the pod")), "the system pod stays");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_costs_dead_containers_and_unused_images_before_pods() {
    let mut node = Node::start(&["app:1"]).await;
    node.create(pod(
        json!({"nodeName": "node-1", "restartPolicy": "Never", "containers": [{"name": "app", "image": "app:1"}]}),
    ));
    node.api.wait(POD, "Ready", ready).await;
    node.runtime.exit("app", 0);
    node.api.wait(POD, "Succeeded", |pod| pod["status"]["phase"] == "Succeeded").await;
    node.kill_agent().await;
    let image = |id: &str, pinned| cri::Image { id: id.into(), size: 1, pinned, ..Default::default() };
    node.runtime.world.lock().unwrap().stored = vec![image("sha256:unused", false), image("sha256:pinned", true)];
    let node = node.with_agent_of(|config| short_of(config, Signal::NodefsAvailable)).await;
    node.api.wait(NODE, "under pressure", |node| condition(node, "DiskPressure") == "True").await;
    let cleaned = fakes::reached(|| node.runtime.is_empty() && node.runtime.world.lock().unwrap().stored.len() == 1);
    assert!(cleaned.await, "dead containers or unused images are left: {:?}", node.runtime.calls());
    assert_eq!(node.runtime.world.lock().unwrap().stored[0].id, "sha256:pinned");
    let pod = node.api.get(POD).expect("the pod's object stays");
    assert_eq!(pod["status"]["phase"], "Succeeded");
    assert_eq!(pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"], 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_dir_that_grows_past_its_limit_ends_its_pod() {
    let node = Node::start_with(&["app:1"], |config| {
        config.eviction.period = Duration::from_millis(100);
        config.eviction.thresholds.clear();
    });
    let node = node.await;
    node.create(pod(json!({"nodeName": "node-1", "terminationGracePeriodSeconds": 1,
        "volumes": [{"name": "cache", "emptyDir": {"sizeLimit": "1Mi"}}],
        "containers": [{"name": "app", "image": "app:1", "volumeMounts": [{"name": "cache", "mountPath": "/cache"}]}]})));
    node.api.wait(POD, "Ready", ready).await;
    let volume = node.dir.path().join("data/pods/pod-uid-1/volumes/kubernetes.io~empty-dir/cache");
    std::fs::write(volume.join("file"), vec![1; 2 << 20]).expect("a file in the volume");
    let ended = node.api.wait(POD, "Failed", |pod| pod["status"]["phase"] == "Failed").await;
    assert_eq!(ended["status"]["reason"], "Evicted");
    assert_eq!(ended["status"]["message"], "Usage of EmptyDir volume \"cache\" exceeds the limit \"1Mi\". ");
    assert!(node.runtime.running().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_with_enough_of_everything_leaves_pods_alone() {
    let node = Node::start_with(&["app:1"], |config| {
        config.eviction.period = Duration::from_millis(10);
        let below = Amount::Absolute(1);
        config.eviction.thresholds =
            Signal::ALL.map(|signal| Threshold { signal, below, grace: None, min_reclaim: None }).into();
    });
    let node = node.await;
    node.create(plain());
    node.api.wait(POD, "Ready", ready).await;
    for kind in ["MemoryPressure", "DiskPressure", "PIDPressure"] {
        node.api.wait(NODE, "free of pressure", |node| condition(node, kind) == "False").await;
    }
}
