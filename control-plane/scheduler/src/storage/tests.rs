//! What nodes are judged to have for claims, and how promises bear on it.

use serde_json::{Value, json};

use super::*;
use crate::cache::NodeInfo;
use crate::cache::tests::{node, pod};

pub(crate) fn claim(name: &str, class: &str, volume: &str, phase: &str) -> PersistentVolumeClaim {
    let value = json!({"metadata": {"name": name, "namespace": "default", "uid": name, "resourceVersion": "1"},
        "spec": {"storageClassName": class, "volumeName": volume, "resources": {"requests": {"storage": "1Gi"}}},
        "status": {"phase": phase}});
    serde_json::from_value(value).unwrap()
}

pub(crate) fn user(name: &str, claims: &[&str]) -> Arc<PodInfo> {
    let volumes: Vec<Value> =
        claims.iter().map(|claim| json!({"name": claim, "persistentVolumeClaim": {"claimName": claim}})).collect();
    pod(name, json!({"spec": {"volumes": volumes}}))
}

/// A volume of the class `local` on one node.
pub(crate) fn volume_at(name: &str, node: &str) -> PersistentVolume {
    let term = json!({"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}]});
    let affinity = json!({"required": {"nodeSelectorTerms": [term]}});
    let spec = json!({"nodeAffinity": affinity, "capacity": {"storage": "1Gi"}, "storageClassName": "local"});
    serde_json::from_value(json!({"metadata": {"name": name, "resourceVersion": "1"}, "spec": spec})).unwrap()
}

fn class(mode: &str, extra: Value) -> StorageClass {
    let mut value = json!({"provisioner": "kubernetes.io/no-provisioner", "volumeBindingMode": mode});
    crate::cache::tests::merge(&mut value, &extra);
    serde_json::from_value(value).unwrap()
}

/// A node as the cache has it.
fn info(name: &str) -> NodeInfo {
    let cache = crate::cache::tests::cache(&[node(name, json!({"metadata": {"labels": {"zone": name}}}))], &[]);
    cache.node(name).unwrap().clone()
}

fn judged(storage: &Storage, pod: &PodInfo, node: &str) -> Result<Choice, String> {
    storage.needs(pod).and_then(|needs| needs.judge(&info(node)).map_err(|reasons| reasons.join("+")))
}

fn waiting_storage(extra: Value) -> Storage {
    let mut storage = Storage::default();
    storage.put_class("local".to_owned(), class("WaitForFirstConsumer", extra));
    storage.put_claim(claim("data", "local", "", "Pending"));
    storage
}

#[test]
fn a_pod_waits_for_its_claims_unless_they_wait_for_it() {
    let mut storage = Storage::default();
    let pod = user("p", &["data"]);
    let said = |storage: &Storage| judged(storage, &pod, "a").map(|choice| choice.bind.len());
    assert_eq!(said(&storage), Err("persistentvolumeclaim \"data\" not found".to_owned()));
    storage.put_claim(claim("data", "local", "", "Pending"));
    assert_eq!(said(&storage), Err("pod has unbound immediate PersistentVolumeClaims".to_owned()));
    storage.put_class("local".to_owned(), class("WaitForFirstConsumer", json!({})));
    assert_eq!(said(&storage), Err("node(s) didn't find available persistent volumes to bind".to_owned()));
    storage.put_volume("v".to_owned(), volume_at("v", "a"));
    assert_eq!(said(&storage), Ok(1));
    storage.put_class("local".to_owned(), class("Immediate", json!({})));
    assert!(said(&storage).is_err());
    storage.put_claim(claim("data", "local", "w", "Bound"));
    assert_eq!(
        said(&storage),
        Err("node(s) unavailable due to one or more pvc(s) bound to non-existent pv(s)".to_owned())
    );
    storage.put_volume("w".to_owned(), volume_at("w", "b"));
    assert_eq!(said(&storage), Err("node(s) didn't match PersistentVolume's node affinity".to_owned()));
    assert_eq!(judged(&storage, &pod, "b").map(|choice| choice.is_empty()), Ok(true));
    storage.put_claim(claim("data", "local", "w", "Lost"));
    assert!(said(&storage).unwrap_err().ends_with("bound to non-existent persistentvolume"));
}

#[test]
fn what_was_promised_to_one_is_not_there_for_another_until_it_is_taken_back() {
    let mut storage = waiting_storage(json!({}));
    storage.put_claim(claim("more", "local", "", "Pending"));
    storage.put_volume("v".to_owned(), volume_at("v", "a"));
    let (first, second) = (user("p", &["data"]), user("q", &["more"]));
    let choice = judged(&storage, &first, "a").unwrap();
    assert_eq!(choice.bind, [("v".to_owned(), Key::new("default", "data"))]);
    storage.promise(&choice);
    assert!(judged(&storage, &second, "a").is_err());
    assert!(judged(&storage, &first, "a").is_ok(), "another pod of the same claim goes to the same place");
    storage.take_back(&choice);
    assert!(judged(&storage, &second, "a").is_ok());
    // What the API shows counts from then on.
    storage.promise(&choice);
    let mut taken = volume_at("v", "a");
    taken.spec.as_mut().unwrap().claim_ref = Some(reference(&claim("data", "local", "", "Pending")));
    storage.put_volume("v".to_owned(), taken);
    storage.take_back(&choice);
    assert!(judged(&storage, &second, "a").is_err());
}

#[test]
fn a_pod_with_two_claims_needs_two_volumes_in_one_place() {
    let mut storage = waiting_storage(json!({}));
    let mut large = claim("more", "local", "", "Pending");
    large.spec.as_mut().unwrap().resources = serde_json::from_value(json!({"requests": {"storage": "500Mi"}})).unwrap();
    storage.put_claim(large);
    let both = user("p", &["data", "more"]);
    storage.put_volume("v".to_owned(), volume_at("v", "a"));
    storage.put_volume("w".to_owned(), volume_at("w", "b"));
    assert!(judged(&storage, &both, "a").is_err() && judged(&storage, &both, "b").is_err());
    storage.put_volume("x".to_owned(), volume_at("x", "b"));
    assert_eq!(judged(&storage, &both, "b").unwrap().bind.len(), 2);
}

#[test]
fn volumes_are_made_where_the_class_and_its_driver_can() {
    let made = json!({"provisioner": "disks.example.com", "allowedTopologies": [
        {"matchLabelExpressions": [{"key": "zone", "values": ["a", "b"]}]}]});
    let mut storage = waiting_storage(made);
    let pod = user("p", &["data"]);
    let said = |storage: &Storage, node: &str| judged(storage, &pod, node).map(|choice| choice.provision.len());
    assert_eq!(said(&storage, "a"), Ok(1));
    assert_eq!(said(&storage, "c"), Err("node(s) didn't find available persistent volumes to bind".to_owned()));
    let driver: CSIDriver = serde_json::from_value(json!({"spec": {"storageCapacity": true}})).unwrap();
    storage.put_driver("disks.example.com".to_owned(), &driver);
    assert_eq!(said(&storage, "a"), Err("node(s) did not have enough free storage".to_owned()));
    let room = |node: &str, bytes: &str| -> CSIStorageCapacity {
        serde_json::from_value(json!({"metadata": {"name": node, "namespace": "kube-system"}, "capacity": bytes,
            "storageClassName": "local", "nodeTopology": {"matchLabels": {"zone": node}}}))
        .unwrap()
    };
    storage.put_room(&room("a", "1023Mi"));
    storage.put_room(&room("b", "2Gi"));
    assert!(said(&storage, "a").is_err());
    assert_eq!(said(&storage, "b"), Ok(1));
    // A node that was chosen once stays chosen.
    storage.promise(&judged(&storage, &pod, "b").unwrap());
    storage.put_room(&room("a", "1Ti"));
    assert!(said(&storage, "a").is_err());
}

#[test]
fn a_choice_is_done_when_its_claims_are_bound_and_fails_when_it_is_undone() {
    let mut storage = waiting_storage(json!({"provisioner": "disks.example.com"}));
    let pod = user("p", &["data"]);
    let choice = judged(&storage, &pod, "a").unwrap();
    let key = Key::new("default", "data");
    let written = Written { claims: vec![(key, 5)], ..Default::default() };
    let labels = info("a").labels;
    let progress = |storage: &Storage| storage.progress(&choice, &written, &labels);
    assert_eq!(progress(&storage), Progress::Waiting, "what is known is older than what was written");
    let mut seen = claim("data", "local", "", "Pending");
    seen.metadata.resource_version = Some("5".to_owned());
    seen.metadata.annotations = Some(BTreeMap::from([(SELECTED_NODE.to_owned(), "a".to_owned())]));
    storage.put_claim(seen.clone());
    assert_eq!(progress(&storage), Progress::Waiting);
    seen.metadata.annotations = None;
    storage.put_claim(seen);
    assert_eq!(progress(&storage), Progress::Failed("selectedNode annotation reset for PVC \"data\"".to_owned()));
    storage.put_claim(claim("data", "local", "v", "Bound"));
    assert_eq!(progress(&storage), Progress::Waiting);
    storage.put_volume("v".to_owned(), volume_at("v", "a"));
    assert_eq!(progress(&storage), Progress::Done);
    storage.put_volume("v".to_owned(), volume_at("v", "b"));
    assert!(matches!(progress(&storage), Progress::Failed(_)));
    storage.remove_claim(&Key::new("default", "data"));
    assert!(matches!(progress(&storage), Progress::Failed(_)));
}
