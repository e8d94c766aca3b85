//! The machine goes down: pods end by priority, and the API is told before the agent ends.

mod fakes;

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use fakes::node::{NODE, Node, POD, condition, plain, ready};
use oarlock_systemd::fake::Fake;
use serde_json::json;

const LATE: &str = "/api/v1/namespaces/default/pods/late";
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_machine_waits_for_pods_and_a_stop_that_is_called_off_is_over() {
    let directory = tempfile::tempdir().unwrap();
    let login = Fake::start(directory.path());
    login.world().inhibit_delay_usec = 5_000_000;
    let drop_in = directory.path().join("logind.conf.d/99-kubelet.conf");
    login.world().configuration = Some(drop_in.clone());
    BUS.set(login.socket.clone()).unwrap();
    let mut node = Node::start_with(&["app:1"], |config| {
        config.shutdown.groups = vec![(0, Duration::from_secs(10)), (2_000_000_000, Duration::from_secs(5))];
        config.shutdown.machine_stops = || false;
        config.shutdown.login.bus = BUS.get().unwrap().clone();
        config.shutdown.login.drop_in_dir = config.shutdown.login.bus.parent().unwrap().join("logind.conf.d");
        config.shutdown.login.reload = || Ok(());
    })
    .await;
    node.create(plain());
    node.api.wait(POD, "Ready", ready).await;
    until("the lock", || login.locks_held() == 1).await;
    // What pods are given is longer than login1 waited.
    assert!(std::fs::read_to_string(&drop_in).unwrap().ends_with("[Login]\nInhibitDelayMaxSec=15\n"));

    login.prepare_for_shutdown(true);
    until("the lock to be let go", || login.locks_held() == 0).await;
    let pod = node.api.get(POD).expect("the pod");
    assert_eq!((&pod["status"]["phase"], &pod["status"]["reason"]), (&json!("Failed"), &json!("Terminated")));
    assert!(node.runtime.running().is_empty());
    assert_eq!(condition(&node.api.get(NODE).expect("the node"), "Ready"), "False");
    let mut late = plain();
    late["metadata"]["name"] = json!("late");
    late["metadata"]["uid"] = json!("pod-uid-3");
    node.api.put(LATE, late);
    let refused = node.api.wait(LATE, "refused", |pod| pod["status"]["phase"] == "Failed").await;
    assert_eq!(refused["status"]["reason"], "NodeShutdown");
    let message = refused["status"]["message"].as_str().unwrap_or_default();
    assert!(message.ends_with("the node is shutting down."), "{message}");

    login.prepare_for_shutdown(false);
    until("a new lock", || login.locks_held() == 1).await;
    node.api.wait(NODE, "Ready again", |node| condition(node, "Ready") == "True").await;
    node.stop_agent().await;
    until("the end of the lock", || login.locks_held() == 0).await;
}

/// What an adjustment, which captures nothing, has to know.
static BUS: OnceLock<PathBuf> = OnceLock::new();

async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let waited = tokio::time::timeout(Duration::from_secs(20), async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("waited in vain for {what}"));
}
