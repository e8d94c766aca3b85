//! The scheduler end to end against the in-memory API: what a user would see of waiting, bound and preempted pods.

use std::sync::Arc;

use oarlock_machinery::fake::{FakeApi, Refused};
use oarlock_scheduler::{Config, Scheduler};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

struct Cluster {
    api: Arc<FakeApi>,
    _stop: DropGuard,
    _task: JoinHandle<()>,
}

impl std::ops::Deref for Cluster {
    type Target = FakeApi;
    fn deref(&self) -> &FakeApi {
        &self.api
    }
}

fn start(api: Arc<FakeApi>) -> Cluster {
    let stop = CancellationToken::new();
    let scheduler = Scheduler::new(api.client(), Config::default());
    let token = stop.clone();
    let task = tokio::spawn(async move { scheduler.run(token).await.expect("the scheduler runs until stopped") });
    Cluster { api, _stop: stop.drop_guard(), _task: task }
}

fn cluster(nodes: &[&str]) -> Cluster {
    let api = FakeApi::new();
    nodes.iter().for_each(|name| drop(api.create(node(name, "4"))));
    start(api)
}

fn node(name: &str, cpu: &str) -> Value {
    json!({
        "kind": "Node", "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "status": {"allocatable": {"cpu": cpu, "memory": "8Gi", "pods": "110"}},
    })
}

fn pod(name: &str, cpu: &str) -> Value {
    json!({
        "kind": "Pod", "metadata": {"name": name},
        "spec": {"schedulerName": "default-scheduler", "containers": [
            {"name": "c", "resources": {"requests": {"cpu": cpu}}}]},
    })
}

fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

impl Cluster {
    async fn node_of(&self, name: &str) -> String {
        self.until(&format!("{name} has a node"), |api| {
            let pod = api.get("pods", "default", name)?;
            let node = text(&pod, "/spec/nodeName").to_owned();
            (!node.is_empty()).then_some(node)
        })
        .await
    }

    async fn says(&self, name: &str, message: &str) {
        self.until_true(&format!("{name} says {message:?}"), |api| {
            let pod = api.get("pods", "default", name).unwrap_or_default();
            pod["status"]["conditions"][0]["message"] == message
                && pod["status"]["conditions"][0]["reason"] == "Unschedulable"
        })
        .await;
    }

    async fn event(&self, reason: &str, message: &str) {
        let is_it = |event: &Value| event["reason"] == reason && event["message"] == message;
        self.until_true(&format!("event {reason}: {message}"), |api| api.list("events").iter().any(is_it)).await;
    }
}

#[tokio::test]
async fn a_pod_gets_a_node_and_an_event() {
    let cluster = cluster(&["n1"]);
    cluster.create(pod("p", "1"));
    assert_eq!(cluster.node_of("p").await, "n1");
    cluster.event("Scheduled", "Successfully assigned default/p to n1").await;
}

#[tokio::test]
async fn pods_fill_the_nodes_evenly_and_the_surplus_says_why_it_waits() {
    let cluster = cluster(&["n1", "n2"]);
    for number in 0..8 {
        cluster.create(pod(&format!("p{number}"), "1"));
    }
    let mut on_first = 0;
    for number in 0..8 {
        on_first += usize::from(cluster.node_of(&format!("p{number}")).await == "n1");
    }
    assert_eq!(on_first, 4);
    cluster.create(pod("surplus", "1"));
    let why = "0/2 nodes are available: 2 Insufficient cpu. preemption: 0/2 nodes are available: 2 No preemption \
               victims found for incoming pod.";
    cluster.says("surplus", why).await;
    cluster.event("FailedScheduling", why).await;
    // Room is made: the pod does not have to be asked again.
    cluster.delete("pods", "default", "p3", json!({"gracePeriodSeconds": 0}));
    cluster.node_of("surplus").await;
}

#[tokio::test]
async fn a_pod_waits_for_its_first_node() {
    let cluster = cluster(&[]);
    cluster.create(pod("p", "1"));
    cluster.says("p", "no nodes available to schedule pods").await;
    cluster.create(node("n1", "4"));
    assert_eq!(cluster.node_of("p").await, "n1");
}

#[tokio::test]
async fn a_pod_waits_until_the_node_is_uncordoned() {
    let cluster = cluster(&["n1"]);
    cluster.edit("nodes", "", "n1", |node| node["spec"]["unschedulable"] = json!(true));
    cluster.create(pod("p", "1"));
    let why = "0/1 nodes are available: 1 node(s) were unschedulable. preemption: 0/1 nodes are available: 1 \
               Preemption is not helpful for scheduling.";
    cluster.says("p", why).await;
    cluster.edit("nodes", "", "n1", |node| node["spec"]["unschedulable"] = json!(false));
    cluster.node_of("p").await;
}

#[tokio::test]
async fn gated_pods_and_those_of_other_schedulers_are_left_alone() {
    let cluster = cluster(&["n1"]);
    let mut gated = pod("gated", "1");
    gated["spec"]["schedulingGates"] = json!([{"name": "example.com/gate"}]);
    let mut foreign = pod("foreign", "1");
    foreign["spec"]["schedulerName"] = json!("other");
    cluster.create(gated);
    cluster.create(foreign);
    cluster.create(pod("plain", "1"));
    cluster.node_of("plain").await;
    for name in ["gated", "foreign"] {
        assert_eq!(text(&cluster.get("pods", "default", name).unwrap(), "/spec/nodeName"), "");
    }
    cluster.edit("pods", "default", "gated", |pod| pod["spec"]["schedulingGates"] = json!([]));
    cluster.node_of("gated").await;
}

#[tokio::test]
async fn an_important_pod_takes_the_place_of_another() {
    let cluster = cluster(&["n1"]);
    cluster.create(pod("small", "3"));
    cluster.node_of("small").await;
    let mut important = pod("important", "2");
    important["spec"]["priority"] = json!(1000);
    let important = cluster.create(important);
    cluster
        .until_true("the other is asked to go", |api| {
            let small = api.get("pods", "default", "small").unwrap();
            !text(&small, "/metadata/deletionTimestamp").is_empty()
        })
        .await;
    cluster
        .until_true("the node is promised", |api| {
            api.get("pods", "default", "important").unwrap()["status"]["nominatedNodeName"] == "n1"
        })
        .await;
    // A third pod may not slip into the room that is being made.
    cluster.create(pod("sneaky", "1"));
    cluster.delete("pods", "default", "small", json!({"gracePeriodSeconds": 0}));
    assert_eq!(cluster.node_of("important").await, "n1");
    let uid = text(&important, "/metadata/uid").to_owned();
    cluster.event("Preempted", &format!("Preempted by pod {uid} on node n1")).await;
}

#[tokio::test]
async fn a_refused_binding_is_tried_again() {
    let cluster = cluster(&["n1"]);
    cluster.refuse("POST", "pods/binding", 1, Refused::new(500, "InternalError", "storage is down"));
    cluster.create(pod("p", "4"));
    cluster.node_of("p").await;
    cluster.event("FailedScheduling", "binding rejected: storage is down").await;
}

#[tokio::test]
async fn a_restarted_scheduler_counts_what_is_there() {
    let api = FakeApi::new();
    api.create(node("n1", "4"));
    let mut running = pod("running", "3");
    running["spec"]["nodeName"] = json!("n1");
    running["status"] = json!({"phase": "Running"});
    api.create(running);
    api.create(pod("waiting", "2"));
    let cluster = start(api);
    let why = "0/1 nodes are available: 1 Insufficient cpu. preemption: 0/1 nodes are available: 1 No preemption \
               victims found for incoming pod.";
    cluster.says("waiting", why).await;
    cluster.edit("pods", "default", "running", |pod| pod["status"]["phase"] = json!("Succeeded"));
    cluster.node_of("waiting").await;
}
