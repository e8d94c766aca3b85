//! Devices of a plugin in a process of its own, against a fake API server and a fake runtime.

mod fakes;

use fakes::node::{NODE, Node, POD, pod, ready};
use fakes::plugin::{PluginProcess, RESOURCE, be_plugin};
use oarlock_proto::podresources as wire;
use oarlock_proto::podresources::pod_resources_lister_client::PodResourcesListerClient;
use serde_json::{Value, json};

/// The plugin's process starts here.
#[tokio::test]
async fn plugin() {
    be_plugin().await;
}

fn with_cards(count: &str) -> Value {
    let cards = json!({ RESOURCE: count });
    pod(json!({"nodeName": "node-1", "terminationGracePeriodSeconds": 1, "restartPolicy": "Always", "containers": [
        {"name": "app", "image": "app:1", "resources": {"limits": cards, "requests": cards}}]}))
}

fn amounts(node: &Value) -> (&str, &str) {
    let of = |list: &str| node["status"][list][RESOURCE].as_str().unwrap_or_default().to_owned().leak();
    (of("capacity"), of("allocatable"))
}

async fn plugin_of(node: &Node, devices: &str) -> PluginProcess {
    let directory = node.dir.path().join("kubelet/device-plugins");
    // The socket is there once the agent serves.
    node.api.wait(NODE, "a node", |node| node["status"]["capacity"]["cpu"].is_string()).await;
    let mut plugin = PluginProcess::start(&directory, "plugin");
    plugin.order(&format!("devices {devices}"));
    plugin.order("register");
    plugin.wait_for("registered");
    plugin
}

async fn rejected(node: &Node) -> (String, String) {
    let failed = node.api.wait(POD, "Failed", |pod| pod["status"]["phase"] == "Failed").await;
    let text = |field: &str| failed["status"][field].as_str().unwrap_or_default().to_owned();
    (text("reason"), text("message"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_counts_devices_and_a_container_gets_what_the_plugin_says() {
    let node = Node::start(&["app:1"]).await;
    let mut plugin = plugin_of(&node, "a:Healthy:0 b:Healthy:0 c:Unhealthy").await;
    node.api.wait(NODE, "devices", |node| amounts(node) == ("3", "2")).await;
    node.create(with_cards("1"));
    node.api.wait(POD, "Ready", ready).await;
    assert_eq!(plugin.wait_for("allocate"), "allocate b", "the one that the plugin prefers");
    assert_eq!(plugin.wait_for("start"), "start b");
    let config = node.runtime.world.lock().unwrap().containers[0].config.clone();
    assert_eq!(config.devices[0].host_path, "/dev/null");
    assert!(config.mounts.iter().any(|mount| mount.container_path == "/cards" && mount.readonly));
    assert!(config.envs.iter().any(|env| env.key == "CARDS" && env.value.as_slice() == b"b"));
    assert_eq!(config.annotations["example.com/cards"], "1");
    assert_eq!(config.cdi_devices[0].name, "example.com/card=all");
    plugin.order("devices a:Unhealthy:0 b:Healthy:0 c:Unhealthy");
    node.api.wait(NODE, "one device fewer", |node| amounts(node) == ("3", "1")).await;
    plugin.kill();
    node.api.wait(NODE, "no device in order", |node| amounts(node) == ("3", "0")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_cannot_have_its_devices_is_rejected_with_the_reason() {
    let node = Node::start(&["app:1"]).await;
    let mut plugin = plugin_of(&node, "a:Healthy").await;
    node.api.wait(NODE, "devices", |node| amounts(node) == ("1", "1")).await;
    node.create(with_cards("2"));
    let message = "Pod was rejected: Allocate failed due to requested number of devices unavailable for example.com/card. Requested: 2, Available: 1, which is unexpected";
    assert_eq!(rejected(&node).await, ("UnexpectedAdmissionError".to_owned(), message.to_owned()));
    node.api.remove(POD);
    plugin.order("devices broken:Healthy");
    plugin.order("register v1alpha1");
    plugin.wait_for("refused requested API version \"v1alpha1\" is not supported by kubelet");
    plugin.order("register");
    plugin.wait_for("registered");
    let mut other = with_cards("1");
    other["metadata"]["uid"] = json!("pod-uid-2");
    // A device that the plugin lists and cannot hand over.
    let listed = || {
        let file = node.dir.path().join("kubelet/device-plugins/kubelet_internal_checkpoint");
        std::fs::read_to_string(file).is_ok_and(|text| text.contains("broken"))
    };
    assert!(fakes::reached(listed).await, "the plugin's devices are written down");
    node.api.put(POD, other);
    let (reason, message) = rejected(&node).await;
    assert_eq!(reason, "UnexpectedAdmissionError");
    assert!(
        message.contains("rpc error: code = Internal desc = the card is on fire, which is unexpected"),
        "{message}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_agent_remembers_who_has_which_device_and_monitors_can_ask() {
    let mut node = Node::start(&["app:1"]).await;
    let mut plugin = plugin_of(&node, "a:Healthy:1 b:Healthy:1").await;
    node.api.wait(NODE, "devices", |node| amounts(node) == ("2", "2")).await;
    node.create(with_cards("1"));
    node.api.wait(POD, "Ready", ready).await;
    plugin.wait_for("start b");
    node.kill_agent().await;
    let node = node.with_agent().await;
    node.api.wait(NODE, "no plugin", |node| amounts(node) == ("0", "0")).await;
    plugin.order("register");
    plugin.wait_for("registered");
    node.api.wait(NODE, "devices", |node| amounts(node) == ("2", "2")).await;
    node.runtime.exit("app", 1);
    node.api
        .wait(POD, "restarted", |pod| pod["status"]["containerStatuses"][0]["restartCount"] == 1 && ready(pod))
        .await;
    assert_eq!(plugin.wait_for("start"), "start b", "the same device, and without asking for another");
    let channel = oarlock_plugins::socket::channel(&node.dir.path().join("kubelet/pod-resources/kubelet.sock"));
    let mut client = PodResourcesListerClient::new(channel);
    let list = client.list(wire::ListPodResourcesRequest {}).await.expect("a list").into_inner();
    let devices = &list.pod_resources[0].containers[0].devices[0];
    assert_eq!(
        (devices.resource_name.as_str(), devices.device_ids.as_slice()),
        (RESOURCE, ["b".to_owned()].as_slice())
    );
    assert_eq!(devices.topology.as_ref().unwrap().nodes[0].id, 1);
    let all = client.get_allocatable_resources(wire::AllocatableResourcesRequest {}).await.expect("all").into_inner();
    assert_eq!(all.devices[0].device_ids, ["a", "b"]);
    let missing = wire::GetPodResourcesRequest { pod_name: "x".into(), pod_namespace: "default".into() };
    assert_eq!(client.get(missing).await.unwrap_err().message(), "pod x in namespace default not found");
    let one = wire::GetPodResourcesRequest { pod_name: "web".into(), pod_namespace: "default".into() };
    assert_eq!(client.get(one).await.expect("the pod").into_inner().pod_resources.unwrap().name, "web");
}
