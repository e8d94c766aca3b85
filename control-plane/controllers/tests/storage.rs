//! Persistent volumes, their claims and their attachments against the in-memory API, as users, provisioners, attachers and agents
//! see them.

use std::sync::Arc;

use oarlock_controllers::{Config, Controllers};
use oarlock_machinery::fake::{FakeApi, Refused};
use serde_json::{Value, json};
use tokio_util::sync::{CancellationToken, DropGuard};

const CLAIMS: &str = "persistentvolumeclaims";
const VOLUMES: &str = "persistentvolumes";
const ATTACHMENTS: &str = "volumeattachments";

fn cluster() -> (Arc<FakeApi>, DropGuard) {
    let api = FakeApi::new();
    api.create(json!({"kind": "Namespace", "metadata": {"name": "default"}}));
    for name in ["n1", "n2"] {
        api.create(json!({"kind": "Node", "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
            "status": {"conditions": [{"type": "Ready", "status": "True"}]}}));
    }
    let stop = CancellationToken::new();
    let config = Config {
        cluster_cidrs: vec![("10.42.0.0/16".parse().unwrap(), 24)],
        root_ca_pem: "PEM".to_owned(),
        balancer_pools: tokio::sync::watch::channel(Vec::new()).1,
        balancer_class: "ours".to_owned(),
        signing_ca_dir: None,
        server_names: Vec::new(),
    };
    let controllers = Controllers::new(api.client(), config);
    let token = stop.clone();
    tokio::spawn(async move { controllers.run(token).await.expect("the controllers run until stopped") });
    (api, stop.drop_guard())
}

fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn has(api: &FakeApi, resource: &str, namespace: &str, name: &str, pointer: &str, value: &str) -> bool {
    api.get(resource, namespace, name).is_some_and(|object| text(&object, pointer) == value)
}

fn protected(object: &Value) -> bool {
    object["metadata"]["finalizers"].to_string().contains("protection")
}

fn claim(class: &str) -> Value {
    json!({"kind": "PersistentVolumeClaim", "metadata": {"name": "data", "namespace": "default"}, "spec": {
        "accessModes": ["ReadWriteOnce"], "storageClassName": class, "resources": {"requests": {"storage": "1Gi"}}},
        "status": {"phase": "Pending"}})
}

/// The claim is deleted, and another made under its name.
fn again(api: &FakeApi, class: &str) {
    api.edit(CLAIMS, "default", "data", |claim| claim["metadata"]["finalizers"] = json!([]));
    api.delete(CLAIMS, "default", "data", json!({}));
    api.create(claim(class));
}

fn class(provisioner: &str, mode: &str) -> Value {
    json!({"kind": "StorageClass", "metadata": {"name": "fast"}, "provisioner": provisioner, "volumeBindingMode": mode})
}

/// A volume of a driver, to be had on one node only if that is named.
fn volume(name: &str, class: &str, policy: &str, node: Option<&str>) -> Value {
    let mut volume = json!({"kind": "PersistentVolume", "metadata": {"name": name}, "spec": {
        "capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"], "storageClassName": class,
        "persistentVolumeReclaimPolicy": policy, "csi": {"driver": "disks.example.com", "volumeHandle": name}},
        "status": {"phase": "Pending"}});
    if let Some(node) = node {
        let terms =
            json!([{"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}]}]);
        volume["spec"]["nodeAffinity"] = json!({"required": {"nodeSelectorTerms": terms}});
    }
    volume
}

fn pod(name: &str, node: &str) -> Value {
    json!({"kind": "Pod", "metadata": {"name": name, "namespace": "default"}, "status": {"phase": "Pending"}, "spec": {
        "nodeName": node, "containers": [{"name": "c", "image": "i"}],
        "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "data"}}]}})
}

/// Has another volume attached to the node, after which the controller has seen what was there before.
async fn attach_another(api: &FakeApi, node: &str) {
    api.create(volume("more", "more", "Retain", None));
    let mut second = claim("more");
    second["metadata"]["name"] = json!("more");
    api.create(second);
    let mut user = pod("more", node);
    user["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] = json!("more");
    api.create(user);
    api.until_true("another attachment", |api| {
        api.list(ATTACHMENTS).iter().any(|attachment| text(attachment, "/spec/source/persistentVolumeName") == "more")
    })
    .await;
}

fn event(api: &FakeApi, reason: &str) -> bool {
    api.list("events").iter().any(|event| text(event, "/reason") == reason)
}

async fn bound(api: &FakeApi, volume: &str) {
    api.until_true("the claim to be bound", |api| {
        has(api, CLAIMS, "default", "data", "/status/phase", "Bound")
            && has(api, CLAIMS, "default", "data", "/spec/volumeName", volume)
            && has(api, VOLUMES, "", volume, "/status/phase", "Bound")
    })
    .await;
}

#[tokio::test]
async fn a_claim_of_a_waiting_class_gets_the_volume_that_the_scheduler_has_chosen() {
    let (api, _stop) = cluster();
    api.create(class("kubernetes.io/no-provisioner", "WaitForFirstConsumer"));
    api.create(volume("a-on-n1", "fast", "Retain", Some("n1")));
    api.create(volume("b-on-n2", "fast", "Retain", Some("n2")));
    api.create(pod("first", ""));
    api.create(claim("fast"));
    let waits = |event: &Value| {
        text(event, "/reason") == "WaitForPodScheduled"
            && text(event, "/message") == "waiting for pod first to be scheduled"
    };
    api.until_true("the claim to wait", |api| api.list("events").iter().any(waits)).await;
    assert!(has(&api, CLAIMS, "default", "data", "/status/phase", "Pending"));
    let uid = api.get(CLAIMS, "default", "data").unwrap()["metadata"]["uid"].clone();
    api.edit(VOLUMES, "", "b-on-n2", |volume| {
        volume["spec"]["claimRef"] = json!({"namespace": "default", "name": "data", "uid": uid});
    });
    bound(&api, "b-on-n2").await;
    assert!(!api.ever(VOLUMES, |volume| {
        text(volume, "/metadata/name") == "a-on-n1" && volume["spec"]["claimRef"].is_object()
    }));
}

#[tokio::test]
async fn a_volume_is_not_called_left_behind_by_what_is_cached_of_its_claim() {
    let (api, _stop) = cluster();
    api.create(claim("none"));
    api.until_true("the first claim to be seen", |api| event(api, "ProvisioningFailed")).await;
    api.hold(CLAIMS);
    again(&api, "none");
    let uid = api.get(CLAIMS, "default", "data").unwrap()["metadata"]["uid"].clone();
    let mut made = volume("made", "none", "Delete", None);
    made["spec"]["claimRef"] = json!({"namespace": "default", "name": "data", "uid": uid});
    api.create(made);
    api.until_true("a phase", |api| !has(api, VOLUMES, "", "made", "/status/phase", "Pending")).await;
    api.release(CLAIMS);
    bound(&api, "made").await;
    assert!(!api.ever(VOLUMES, |volume| text(volume, "/status/phase") == "Released"));
}

#[tokio::test]
async fn a_phase_is_not_written_over_what_came_after_it() {
    let (api, _stop) = cluster();
    api.create(volume("disk", "", "Retain", None));
    api.create(claim(""));
    bound(&api, "disk").await;
    api.interrupt("PATCH", "persistentvolumes/status", |api| {
        // An administrator gives the volume free.
        api.edit(VOLUMES, "", "disk", |volume| {
            volume["spec"]["claimRef"] = Value::Null;
            volume["status"]["phase"] = json!("Available");
        });
    });
    api.edit(CLAIMS, "default", "data", |claim| claim["metadata"]["finalizers"] = json!([]));
    api.delete(CLAIMS, "default", "data", json!({}));
    api.until_true("the volume to be free", |api| has(api, VOLUMES, "", "disk", "/status/phase", "Available")).await;
    api.create(volume("later", "", "Retain", None));
    api.until_true("the next volume", |api| has(api, VOLUMES, "", "later", "/status/phase", "Available")).await;
    assert!(!api.ever(VOLUMES, |volume| text(volume, "/status/phase") == "Released"));
}

#[tokio::test]
async fn a_volume_is_not_given_to_another_claim_of_the_same_name() {
    let (api, _stop) = cluster();
    api.interrupt("PATCH", CLAIMS, |api| again(api, "other"));
    let mut first = claim("");
    // Nothing else is written to it first.
    first["metadata"]["finalizers"] = json!(["kubernetes.io/pvc-protection"]);
    api.create(first);
    api.create(volume("disk", "", "Retain", None));
    api.until_true("the volume to be left behind", |api| has(api, VOLUMES, "", "disk", "/status/phase", "Released"))
        .await;
    api.until_true("the new claim to be looked at", |api| event(api, "ProvisioningFailed")).await;
    assert!(!api.ever(CLAIMS, |claim| !text(claim, "/spec/volumeName").is_empty()));
    assert!(has(&api, CLAIMS, "default", "data", "/status/phase", "Pending"));
}

#[tokio::test]
async fn a_claim_without_a_volume_is_marked_for_the_provisioner_of_its_class() {
    let (api, _stop) = cluster();
    api.create(class("disks.example.com", "WaitForFirstConsumer"));
    api.create(claim("fast"));
    api.until_true("the claim to wait", |api| event(api, "WaitForFirstConsumer")).await;
    let marks = api.get(CLAIMS, "default", "data").unwrap()["metadata"]["annotations"].clone();
    assert!(!marks.to_string().contains("storage-provisioner"), "nobody needs it yet: {marks}");
    api.edit(CLAIMS, "default", "data", |claim| {
        claim["metadata"]["annotations"] = json!({"volume.kubernetes.io/selected-node": "n1"});
    });
    let marked = |claim: &Value| {
        let marks = &claim["metadata"]["annotations"];
        marks["volume.kubernetes.io/storage-provisioner"] == "disks.example.com"
            && marks["volume.beta.kubernetes.io/storage-provisioner"] == "disks.example.com"
            && marks["volume.kubernetes.io/selected-node"] == "n1"
    };
    api.until_true("the marks", |api| api.get(CLAIMS, "default", "data").is_some_and(|claim| marked(&claim))).await;
    api.until_true("the event", |api| event(api, "ExternalProvisioning")).await;
    // The provisioner answers.
    let uid = api.get(CLAIMS, "default", "data").unwrap()["metadata"]["uid"].clone();
    let mut made = volume("made", "fast", "Delete", None);
    made["spec"]["claimRef"] = json!({"namespace": "default", "name": "data", "uid": uid});
    made["metadata"]["annotations"] = json!({"pv.kubernetes.io/provisioned-by": "disks.example.com"});
    api.create(made);
    bound(&api, "made").await;
    // And it is the one to delete it.
    api.delete(CLAIMS, "default", "data", json!({}));
    api.until_true("release", |api| has(api, VOLUMES, "", "made", "/status/phase", "Released")).await;
    assert!(!event(&api, "VolumeFailedDelete"));
}

#[tokio::test]
async fn a_claim_in_use_and_a_bound_volume_do_not_go() {
    let (api, _stop) = cluster();
    api.create(volume("disk", "", "Retain", None));
    api.create(claim(""));
    bound(&api, "disk").await;
    api.create(pod("user", "n1"));
    api.until_true("protection", |api| {
        api.get(CLAIMS, "default", "data").is_some_and(|claim| protected(&claim))
            && api.get(VOLUMES, "", "disk").is_some_and(|volume| protected(&volume))
    })
    .await;
    api.delete(CLAIMS, "default", "data", json!({}));
    api.delete(VOLUMES, "", "disk", json!({}));
    let going = |api: &FakeApi, resource: &str, namespace: &str, name: &str| {
        api.get(resource, namespace, name)
            .is_some_and(|object| !text(&object, "/metadata/deletionTimestamp").is_empty())
    };
    assert!(going(&api, CLAIMS, "default", "data") && going(&api, VOLUMES, "", "disk"));
    api.edit("pods", "default", "user", |pod| pod["status"]["phase"] = json!("Succeeded"));
    api.until_true("both to go", |api| {
        api.get(CLAIMS, "default", "data").is_none() && api.get(VOLUMES, "", "disk").is_none()
    })
    .await;
}

#[tokio::test]
async fn a_volume_that_nobody_can_delete_says_so_and_a_lost_claim_too() {
    let (api, _stop) = cluster();
    api.create(volume("disk", "", "Delete", None));
    api.create(claim(""));
    bound(&api, "disk").await;
    api.edit(VOLUMES, "", "disk", |volume| volume["metadata"]["finalizers"] = json!([]));
    api.delete(CLAIMS, "default", "data", json!({}));
    api.until_true("the failure", |api| has(api, VOLUMES, "", "disk", "/status/phase", "Failed")).await;
    let message = text(&api.get(VOLUMES, "", "disk").unwrap(), "/status/message").to_owned();
    assert!(message.contains("no deletable volume plugin matched"), "{message}");
    api.until_true("the event", |api| event(api, "VolumeFailedDelete")).await;

    let mut lost = claim("");
    lost["spec"]["volumeName"] = json!("never-was");
    lost["status"]["phase"] = json!("Bound");
    api.create(lost);
    api.until_true("the loss", |api| has(api, CLAIMS, "default", "data", "/status/phase", "Lost")).await;
    api.until_true("the event", |api| event(api, "ClaimLost")).await;
}

#[tokio::test]
async fn a_volume_follows_its_pod_from_node_to_node() {
    let (api, _stop) = cluster();
    api.create(volume("disk", "", "Retain", None));
    api.create(claim(""));
    bound(&api, "disk").await;
    api.create(pod("first", "n1"));
    let of = |api: &FakeApi, node: &str| {
        api.list(ATTACHMENTS).into_iter().find(|attachment| {
            text(attachment, "/spec/nodeName") == node
                && text(attachment, "/spec/source/persistentVolumeName") == "disk"
        })
    };
    let first = api.until("an attachment", |api| of(api, "n1")).await;
    assert_eq!(text(&first, "/spec/attacher"), "disks.example.com");
    assert_eq!(text(&first, "/spec/source/persistentVolumeName"), "disk");
    let name = text(&first, "/metadata/name").to_owned();
    assert_eq!(name.len(), "csi-".len() + 64);
    api.edit(ATTACHMENTS, "", &name, |attachment| attachment["status"] = json!({"attached": true}));
    let in_status = "kubernetes.io/csi/disks.example.com^disk";
    api.until_true("the node's status", |api| has(api, "nodes", "", "n1", "/status/volumesAttached/0/name", in_status))
        .await;
    api.until_true("the event", |api| event(api, "SuccessfulAttachVolume")).await;
    // What is cached of the node is behind that of its pods.
    api.hold("nodes");
    api.edit("nodes", "", "n1", |node| node["status"]["volumesInUse"] = json!([in_status]));

    // The first pod is over, but its node still has the volume mounted; the second one waits.
    api.edit("pods", "default", "first", |pod| pod["status"]["phase"] = json!("Failed"));
    api.create(pod("second", "n2"));
    api.until_true("the wait", |api| event(api, "FailedAttachVolume")).await;
    api.release("nodes");
    attach_another(&api, "n1").await;
    assert!(of(&api, "n1").is_some() && of(&api, "n2").is_none());
    assert_eq!(api.changes(ATTACHMENTS, "DELETED"), 0);
    api.edit("nodes", "", "n1", |node| node["status"]["volumesInUse"] = json!([]));
    api.until_true("the move", |api| of(api, "n1").is_none() && of(api, "n2").is_some()).await;
}

#[tokio::test]
async fn a_volume_for_one_node_is_not_attached_to_two_at_once() {
    let (api, _stop) = cluster();
    api.create(volume("disk", "", "Retain", None));
    api.create(claim(""));
    bound(&api, "disk").await;
    api.hold(ATTACHMENTS);
    api.create(pod("first", "n1"));
    api.until_true("an attachment", |api| !api.list(ATTACHMENTS).is_empty()).await;
    api.create(pod("second", "n2"));
    api.until_true("the wait", |api| event(api, "FailedAttachVolume")).await;
    assert_eq!(api.list(ATTACHMENTS).len(), 1);
    api.release(ATTACHMENTS);
    api.delete("pods", "default", "first", json!({"gracePeriodSeconds": 0}));
    api.until_true("the move", |api| {
        let all = api.list(ATTACHMENTS);
        all.len() == 1 && text(&all[0], "/spec/nodeName") == "n2"
    })
    .await;
}

#[tokio::test]
async fn an_attachment_that_was_not_made_does_not_keep_others_away() {
    let (api, _stop) = cluster();
    api.create(volume("disk", "", "Retain", None));
    api.create(claim(""));
    bound(&api, "disk").await;
    // The pod goes while its volume is being attached, and that fails.
    api.interrupt("POST", ATTACHMENTS, |api| api.delete("pods", "default", "first", json!({"gracePeriodSeconds": 0})));
    api.refuse("POST", ATTACHMENTS, 1, Refused::new(500, "InternalError", "no room"));
    api.create(pod("first", "n1"));
    api.until_true("the first pod to go", |api| api.get("pods", "default", "first").is_none()).await;
    api.create(pod("second", "n2"));
    let attached = api.until("an attachment", |api| api.list(ATTACHMENTS).pop()).await;
    assert_eq!(text(&attached, "/spec/nodeName"), "n2");
}

#[tokio::test]
async fn a_driver_that_does_not_attach_is_not_asked_to() {
    let (api, _stop) = cluster();
    api.create(
        json!({"kind": "CSIDriver", "metadata": {"name": "disks.example.com"}, "spec": {"attachRequired": false}}),
    );
    api.create(
        json!({"kind": "CSIDriver", "metadata": {"name": "other.example.com"}, "spec": {"attachRequired": true}}),
    );
    api.create(volume("disk", "", "Retain", None));
    api.create(claim(""));
    bound(&api, "disk").await;
    let mut other = volume("other", "other", "Retain", None);
    other["spec"]["csi"]["driver"] = json!("other.example.com");
    api.create(other);
    let mut second = claim("other");
    second["metadata"]["name"] = json!("more");
    api.create(second);
    api.until_true("the other claim", |api| has(api, CLAIMS, "default", "more", "/status/phase", "Bound")).await;
    let mut both = pod("user", "n1");
    both["spec"]["volumes"]
        .as_array_mut()
        .unwrap()
        .push(json!({"name": "w", "persistentVolumeClaim": {"claimName": "more"}}));
    api.create(both);
    api.until_true("the other's attachment", |api| !api.list(ATTACHMENTS).is_empty()).await;
    let attachers: Vec<Value> = api.list(ATTACHMENTS).iter().map(|a| a["spec"]["attacher"].clone()).collect();
    assert_eq!(attachers, ["other.example.com"]);
}
