//! What the node's object and its events tell of the machine, between a fake API server and a fake runtime.

mod fakes;

use fakes::node::{NODE, Node, POD, condition, plain, pod, ready};
use serde_json::{Value, json};

fn with_reason(node: &Node, reason: &str) -> Vec<Value> {
    let events = node.api.all("/events/").into_iter();
    events.filter(|event| event["reason"] == reason).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_node_says_that_it_is_short_of_nothing() {
    let mut node = Node::start(&[]).await;
    node.api.wait(NODE, "Ready", |node| condition(node, "Ready") == "True").await;
    for reason in ["NodeHasSufficientMemory", "NodeHasNoDiskPressure", "NodeHasSufficientPID"] {
        node.wait_for_event(reason).await;
        let event = &with_reason(&node, reason)[0];
        assert_eq!(event["message"], format!("Node node-1 status is now: {reason}"));
        assert_eq!(event["type"], "Normal");
        assert_eq!(event["involvedObject"]["kind"], "Node");
    }
    // An agent that comes back to it finds nothing new. Its events arrive in order, the last one being of the node's Ready.
    node.kill_agent().await;
    let readies = with_reason(&node, "NodeReady").len();
    let node = node.with_agent().await;
    node.wait_for_events("NodeReady", readies + 1).await;
    assert_eq!(with_reason(&node, "NodeHasSufficientMemory").len(), 1);
    assert!(with_reason(&node, "Rebooted").is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_was_started_anew_says_so_once() {
    let mut node = Node::start(&[]).await;
    let mut object = node.api.wait(NODE, "Ready", |node| condition(node, "Ready") == "True").await;
    node.wait_for_event("NodeReady").await;
    node.kill_agent().await;
    let now = object["status"]["nodeInfo"]["bootID"].as_str().expect("a boot id").to_owned();
    object["status"]["nodeInfo"]["bootID"] = json!("of-the-time-before");
    node.api.put(NODE, object);
    let mut node = node.with_agent().await;
    node.wait_for_event("Rebooted").await;
    let event = &with_reason(&node, "Rebooted")[0];
    assert_eq!(event["message"], format!("Node node-1 has been rebooted, boot id: {now}"));
    assert_eq!(event["type"], "Warning");
    node.api.wait(NODE, "of this start", |node| node["status"]["nodeInfo"]["bootID"] == now).await;
    node.wait_for_events("NodeReady", 2).await;

    node.kill_agent().await;
    let node = node.with_agent().await;
    node.wait_for_events("NodeReady", 3).await;
    assert_eq!(with_reason(&node, "Rebooted").len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_pods_resolver_cannot_take_is_told_and_left_out() {
    let node = Node::start_with(&["app:1"], |config| {
        std::fs::create_dir_all(&config.data_dir).expect("a directory");
        config.resolv_conf = config.data_dir.join("resolv.conf");
        let text = "nameserver 192.0.2.1\nnameserver 192.0.2.2\nnameserver 192.0.2.3\nnameserver 192.0.2.4\n";
        std::fs::write(&config.resolv_conf, text).expect("a file");
    })
    .await;
    let searches: Vec<String> = (0..33).map(|at| format!("s{at}")).collect();
    node.create(pod(json!({"nodeName": "node-1", "dnsPolicy": "Default", "dnsConfig": {"searches": searches},
        "containers": [{"name": "app", "image": "app:1"}]})));
    node.api.wait(POD, "Ready", ready).await;
    node.wait_for_events("DNSConfigForming", 2).await;
    let messages: Vec<Value> =
        with_reason(&node, "DNSConfigForming").into_iter().map(|e| e["message"].clone()).collect();
    let of = |what: &str, line: &str| {
        messages.iter().any(|message| {
            message.as_str().is_some_and(|text| text.starts_with(what) && text.ends_with(&format!("line is: {line}")))
        })
    };
    assert!(of("Nameserver limits were exceeded", "192.0.2.1 192.0.2.2 192.0.2.3"), "{messages:?}");
    assert!(of("Search Line limits were exceeded", &searches[..32].join(" ")), "{messages:?}");
    let config = node.runtime.world.lock().unwrap().sandboxes[0].config.dns_config.clone().unwrap_or_default();
    assert_eq!((config.servers.len(), config.searches.len()), (3, 32));
}

/// A pod that asks for nothing odd is told nothing about its resolver.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ordinary_resolver_is_no_event() {
    let node = Node::start_with(&["app:1"], |config| {
        std::fs::create_dir_all(&config.data_dir).expect("a directory");
        config.resolv_conf = config.data_dir.join("resolv.conf");
        std::fs::write(&config.resolv_conf, "nameserver 192.0.2.1\nsearch example.org\n").expect("a file");
    })
    .await;
    node.create(plain());
    node.api.wait(POD, "Ready", ready).await;
    node.wait_for_event("Started").await;
    assert!(with_reason(&node, "DNSConfigForming").is_empty());
}
