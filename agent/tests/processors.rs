//! Whole processors for containers, on a machine given as files, against a fake API server and a fake runtime.

mod fakes;

use fakes::node::{Node, POD, pod, ready};
use oarlock_agent::Config;
use serde_json::{Value, json};

/// Four processors, one of them reserved.
fn four(config: &mut Config) {
    let sys = config.kubelet_dir.join("sys");
    let cpus = sys.join("devices/system/cpu");
    std::fs::create_dir_all(&cpus).expect("a directory");
    std::fs::write(cpus.join("online"), "0-3").expect("a file");
    config.reserved_cpu_millis = 1000;
    config.assignment.sys = sys;
    config.assignment.cpu_static = true;
}

fn exact(uid: &str, cpu: &str) -> Value {
    let size = json!({"cpu": cpu, "memory": "1Mi"});
    let mut pod = pod(json!({"nodeName": "node-1", "terminationGracePeriodSeconds": 1, "containers": [
        {"name": uid, "image": "app:1", "resources": {"limits": size, "requests": size}}]}));
    pod["metadata"]["uid"] = json!(uid);
    pod["metadata"]["name"] = json!(uid);
    pod
}

fn cpuset(node: &Node, container: &str) -> String {
    let world = node.runtime.world.lock().unwrap();
    let found = world.containers.iter().rev().find(|c| c.config.metadata.as_ref().is_some_and(|m| m.name == container));
    let linux = found.and_then(|container| container.config.linux.clone()).expect("the container");
    linux.resources.unwrap_or_default().cpuset_cpus
}

async fn updated(node: &Node, cpus: &str) {
    let call = format!("update cpuset.cpus={cpus}");
    let seen = fakes::reached(|| node.runtime.calls().contains(&call));
    assert!(seen.await, "{call}: {:?}", node.runtime.calls());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_gets_its_processors_and_running_ones_leave_them() {
    const BIG: &str = "/api/v1/namespaces/default/pods/big";
    let node = Node::start_with(&["app:1"], four).await;
    node.create(fakes::node::plain());
    node.api.wait(POD, "Ready", ready).await;
    assert_eq!(cpuset(&node, "app"), "0-3", "everybody shares while nobody has some alone");
    node.api.put(BIG, exact("big", "1"));
    node.api.wait(BIG, "Ready", ready).await;
    assert_eq!(cpuset(&node, "big"), "1");
    updated(&node, "0,2-3").await;
    node.api.delete_gracefully(BIG, 1);
    updated(&node, "0-3").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exact_pod_is_not_resized_under_the_static_policy() {
    const BIG: &str = "/api/v1/namespaces/default/pods/big";
    let node = Node::start_with(&["app:1"], four).await;
    node.api.put(BIG, exact("big", "1"));
    node.api.wait(BIG, "Ready", ready).await;
    let mut pod = node.api.get(BIG).expect("the pod");
    for list in ["requests", "limits"] {
        pod["spec"]["containers"][0]["resources"][list]["cpu"] = json!("500m");
    }
    node.api.put(BIG, pod);
    let refused = |pod: &Value| pod["status"]["conditions"].to_string().contains("alongside CPU Manager static policy");
    node.api.wait(BIG, "Infeasible", refused).await;
}
