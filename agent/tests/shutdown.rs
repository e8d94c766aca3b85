//! The machine goes down: pods end by priority, and the API is told before the agent ends.

mod fakes;

use std::time::Duration;

use fakes::node::{NODE, Node, POD, condition, plain, ready};
use serde_json::json;

const CRITICAL: &str = "/api/v1/namespaces/default/pods/critical";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_end_by_priority_before_the_agent_does() {
    let mut node = Node::start_with(&["app:1"], |config| {
        config.shutdown.groups = vec![(0, Duration::from_secs(10)), (2_000_000_000, Duration::from_secs(10))];
        config.shutdown.machine_stops = || true;
    })
    .await;
    node.create(plain());
    let mut critical = plain();
    critical["metadata"]["name"] = json!("critical");
    critical["metadata"]["uid"] = json!("pod-uid-2");
    critical["spec"]["priority"] = json!(2_000_001_000);
    critical["spec"]["containers"][0]["name"] = json!("dns");
    node.api.put(CRITICAL, critical);
    node.api.wait(POD, "Ready", ready).await;
    node.api.wait(CRITICAL, "Ready", ready).await;
    node.stop_agent().await;
    for path in [POD, CRITICAL] {
        let pod = node.api.get(path).expect("the pod");
        assert_eq!((&pod["status"]["phase"], &pod["status"]["reason"]), (&json!("Failed"), &json!("Terminated")));
        assert_eq!(pod["status"]["message"], "Pod was terminated in response to imminent node shutdown.");
        assert_eq!(condition(&pod, "DisruptionTarget"), "True");
    }
    assert!(node.runtime.running().is_empty());
    assert_eq!(condition(&node.api.get(NODE).expect("the node"), "Ready"), "False");
    let world = node.runtime.world.lock().unwrap();
    let ended_at = |name: &str| {
        let named = world.containers.iter().find(|c| c.config.metadata.as_ref().is_some_and(|m| m.name == name));
        named.expect("its container is kept for its log").finished_at
    };
    assert!(ended_at("app") < ended_at("dns"), "the critical pod ends last");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_ends_alone_leaves_its_pods() {
    let mut node = Node::start_with(&["app:1"], |config| {
        config.shutdown.groups = vec![(0, Duration::from_secs(10))];
        config.shutdown.machine_stops = || false;
    })
    .await;
    node.create(plain());
    node.api.wait(POD, "Ready", ready).await;
    node.stop_agent().await;
    assert_eq!(node.runtime.running(), ["app"]);
    assert!(ready(&node.api.get(POD).expect("the pod")));
}
