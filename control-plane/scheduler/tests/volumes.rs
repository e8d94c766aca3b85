//! Pods whose claims wait for them, against the in-memory API: where they go, what is written for their claims, and when they are
//! bound. The test plays the claims controller and the provisioner.

use std::sync::Arc;

use oarlock_machinery::fake::{FakeApi, Refused};
use oarlock_scheduler::{Config, Scheduler};
use serde_json::{Value, json};
use tokio_util::sync::{CancellationToken, DropGuard};

const CLAIMS: &str = "persistentvolumeclaims";
const VOLUMES: &str = "persistentvolumes";
const SELECTED_NODE: &str = "volume.kubernetes.io/selected-node";

/// Two nodes, a class of that provisioner, and a scheduler.
fn cluster(provisioner: &str) -> (Arc<FakeApi>, DropGuard) {
    let api = FakeApi::new();
    for name in ["n1", "n2"] {
        api.create(json!({"kind": "Node", "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
            "status": {"allocatable": {"cpu": "4", "memory": "8Gi", "pods": "110"}}}));
    }
    api.create(json!({"kind": "StorageClass", "metadata": {"name": "local"}, "provisioner": provisioner,
        "volumeBindingMode": "WaitForFirstConsumer"}));
    let stop = CancellationToken::new();
    let scheduler = Scheduler::new(api.client(), Config::default());
    let token = stop.clone();
    tokio::spawn(async move { scheduler.run(token).await.expect("the scheduler runs until stopped") });
    (api, stop.drop_guard())
}

fn volume(name: &str, node: &str) -> Value {
    let term = json!({"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}]});
    json!({"kind": "PersistentVolume", "metadata": {"name": name}, "spec": {"capacity": {"storage": "1Gi"},
        "accessModes": ["ReadWriteOnce"], "storageClassName": "local", "local": {"path": "/disk"},
        "nodeAffinity": {"required": {"nodeSelectorTerms": [term]}}}})
}

/// A pod with a claim of its own name.
fn create(api: &FakeApi, name: &str) {
    api.create(json!({"kind": "PersistentVolumeClaim", "metadata": {"name": name, "namespace": "default"}, "spec": {
        "accessModes": ["ReadWriteOnce"], "storageClassName": "local", "resources": {"requests": {"storage": "1Gi"}}},
        "status": {"phase": "Pending"}}));
    api.create(json!({"kind": "Pod", "metadata": {"name": name}, "spec": {"schedulerName": "default-scheduler",
        "containers": [{"name": "c"}], "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": name}}]}}));
}

fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn node_of(api: &FakeApi, pod: &str) -> String {
    api.get("pods", "default", pod).map(|pod| text(&pod, "/spec/nodeName").to_owned()).unwrap_or_default()
}

/// The claim that a volume is kept for.
fn holder(api: &FakeApi, volume: &str) -> Option<String> {
    let volume = api.get(VOLUMES, "", volume)?;
    let name = text(&volume, "/spec/claimRef/name");
    (!name.is_empty()).then(|| name.to_owned())
}

/// What the claims controller does once a volume names the claim.
fn finish(api: &FakeApi, claim: &str, volume: &str) {
    api.edit(CLAIMS, "default", claim, |claim| {
        claim["spec"]["volumeName"] = json!(volume);
        claim["status"]["phase"] = json!("Bound");
    });
}

async fn says(api: &FakeApi, pod: &str, message: &str) {
    let what = format!("{pod} says {message:?}");
    api.until_true(&what, |api| {
        let pod = api.get("pods", "default", pod).unwrap_or_default();
        pod["status"]["conditions"][0]["message"] == message
    })
    .await;
}

#[tokio::test]
async fn a_pod_goes_where_the_only_volume_is_and_is_bound_after_its_claim() {
    let (api, _stop) = cluster("kubernetes.io/no-provisioner");
    api.create(volume("disk", "n2"));
    create(&api, "p");
    api.until_true("the volume to be kept", |api| holder(api, "disk").as_deref() == Some("p")).await;
    let (kept, claim) = (api.get(VOLUMES, "", "disk").unwrap(), api.get(CLAIMS, "default", "p").unwrap());
    assert_eq!(kept["spec"]["claimRef"]["uid"], claim["metadata"]["uid"]);
    assert_eq!(kept["metadata"]["annotations"]["pv.kubernetes.io/bound-by-controller"], "yes");
    assert_eq!(node_of(&api, "p"), "", "not before its claim has the volume");
    finish(&api, "p", "disk");
    api.until_true("the pod to be bound", |api| node_of(api, "p") == "n2").await;
}

#[tokio::test]
async fn of_two_pods_that_race_for_one_volume_one_waits_for_another_volume() {
    let (api, _stop) = cluster("kubernetes.io/no-provisioner");
    api.create(volume("disk", "n1"));
    for name in ["p", "q"] {
        create(&api, name);
    }
    let winner = api.until("a holder", |api| holder(api, "disk")).await;
    let loser = if winner == "p" { "q" } else { "p" };
    let why = "0/2 nodes are available: 2 node(s) didn't find available persistent volumes to bind. preemption: 0/2 \
               nodes are available: 2 Preemption is not helpful for scheduling.";
    says(&api, loser, why).await;
    finish(&api, &winner, "disk");
    api.until_true("the first pod to be bound", |api| node_of(api, &winner) == "n1").await;
    api.create(volume("other", "n2"));
    api.until_true("the other volume to be kept", |api| holder(api, "other").as_deref() == Some(loser)).await;
    finish(&api, loser, "other");
    api.until_true("the other pod to be bound", |api| node_of(api, loser) == "n2").await;
}

#[tokio::test]
async fn a_volume_that_another_took_meanwhile_is_not_waited_for() {
    let (api, _stop) = cluster("kubernetes.io/no-provisioner");
    api.create(volume("disk", "n1"));
    api.refuse("PATCH", VOLUMES, 1, Refused::new(409, "Conflict", "the object has been modified"));
    create(&api, "p");
    let failed = "running PreBind plugin \"VolumeBinding\": binding volumes: the object has been modified";
    api.until_true("the failure", |api| api.list("events").iter().any(|event| event["message"] == failed)).await;
    api.until_true("the volume to be kept after all", |api| holder(api, "disk").is_some()).await;
    // Its administrator takes it back.
    api.edit(VOLUMES, "", "disk", |volume| volume["spec"]["claimRef"] = Value::Null);
    let reset = "running PreBind plugin \"VolumeBinding\": binding volumes: ClaimRef got reset for pv \"disk\"";
    api.until_true("the loss", |api| api.list("events").iter().any(|event| event["message"] == reset)).await;
}

#[tokio::test]
async fn a_provisioner_is_told_the_node_and_may_refuse_it() {
    let (api, _stop) = cluster("disks.example.com");
    create(&api, "p");
    let chosen = |api: &FakeApi| {
        let claim = api.get(CLAIMS, "default", "p")?;
        claim["metadata"]["annotations"][SELECTED_NODE].as_str().map(str::to_owned)
    };
    let node = api.until("a node for the claim", chosen).await;
    assert!(["n1", "n2"].contains(&node.as_str()));
    assert_eq!(node_of(&api, "p"), "");
    // No room there: only the other node is left.
    api.edit("nodes", "", &node, |node| node["spec"]["unschedulable"] = json!(true));
    api.edit(CLAIMS, "default", "p", |claim| {
        claim["metadata"]["annotations"] = json!({});
    });
    let other = api.until("the other node", |api| chosen(api).filter(|chosen| *chosen != node)).await;
    api.create(volume("made", &other));
    finish(&api, "p", "made");
    api.until_true("the pod to be bound", |api| node_of(api, "p") == other).await;
}

#[tokio::test]
async fn a_pod_that_goes_leaves_the_volume_to_others() {
    let (api, _stop) = cluster("kubernetes.io/no-provisioner");
    api.create(volume("disk", "n1"));
    api.interrupt("PATCH", VOLUMES, |api| api.delete("pods", "default", "p", json!({"gracePeriodSeconds": 0})));
    api.refuse("PATCH", VOLUMES, 1, Refused::new(500, "InternalError", "storage is down"));
    create(&api, "p");
    api.until_true("the pod to go", |api| api.get("pods", "default", "p").is_none()).await;
    create(&api, "q");
    api.until_true("the volume to be kept", |api| holder(api, "disk").as_deref() == Some("q")).await;
}
