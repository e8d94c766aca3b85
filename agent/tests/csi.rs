//! Volumes of a CSI driver in a process of its own, and local ones, against a fake API server and a fake runtime.

mod fakes;

use std::path::PathBuf;

use fakes::driver::{DRIVER, be_driver};
use fakes::node::{NODE, Node, POD, pod, ready};
use fakes::plugin::PluginProcess;
use serde_json::{Value, json};

const CSI_NODE: &str = "/apis/storage.k8s.io/v1/csinodes/node-1";
const CLAIM: &str = "/api/v1/namespaces/default/persistentvolumeclaims/data";
const VOLUME: &str = "/api/v1/persistentvolumes/pv-1";

/// The driver's process starts here.
#[tokio::test]
async fn driver() {
    be_driver().await;
}

async fn driver_of(node: &Node) -> PluginProcess {
    node.api.wait(NODE, "a node", |node| node["status"]["capacity"]["cpu"].is_string()).await;
    let driver = PluginProcess::start(&node.dir.path().join("kubelet"), "driver");
    assert_eq!(driver.wait_for("registered").trim(), "registered true");
    driver
}

fn describe_driver(node: &Node, spec: Value) {
    node.api.put(
        &format!("/apis/storage.k8s.io/v1/csidrivers/{DRIVER}"),
        json!({"apiVersion": "storage.k8s.io/v1", "kind": "CSIDriver", "metadata": {"name": DRIVER}, "spec": spec}),
    );
}

fn bound(node: &Node, source: Value, size: &str) {
    let claimed = json!({"storage": "1Gi"});
    node.api.put(
        CLAIM,
        json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim",
        "metadata": {"name": "data", "namespace": "default", "uid": "claim-1"},
        "spec": {"volumeName": "pv-1", "accessModes": ["ReadWriteOnce"], "resources": {"requests": claimed}},
        "status": {"phase": "Bound", "capacity": claimed}}),
    );
    let mut spec = json!({"capacity": {"storage": size}, "accessModes": ["ReadWriteOnce"],
        "claimRef": {"namespace": "default", "name": "data", "uid": "claim-1"}});
    for (key, value) in source.as_object().unwrap() {
        spec[key] = value.clone();
    }
    node.api.put(
        VOLUME,
        json!({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "pv-1"}, "spec": spec}),
    );
}

fn csi_source() -> Value {
    json!({"csi": {"driver": DRIVER, "volumeHandle": "disk-1", "volumeAttributes": {"speed": "fast"}}})
}

fn with_volume(volume: Value) -> Value {
    pod(
        json!({"nodeName": "node-1", "restartPolicy": "Always", "terminationGracePeriodSeconds": 1, "volumes": [volume],
        "containers": [{"name": "app", "image": "app:1", "volumeMounts": [{"name": "v", "mountPath": "/data"}]}]}),
    )
}

fn with_claim() -> Value {
    with_volume(json!({"name": "v", "persistentVolumeClaim": {"claimName": "data"}}))
}

/// Where the runtime was told to mount the volume from.
fn mounted(node: &Node) -> (PathBuf, bool) {
    let world = node.runtime.world.lock().unwrap();
    let container = world.containers.last().expect("a container");
    let mount = container.config.mounts.iter().find(|mount| mount.container_path == "/data").expect("the mount");
    (mount.host_path.clone().into(), mount.readonly)
}

async fn gone(node: &Node) {
    let ended = fakes::reached(|| node.api.get(POD).is_none());
    assert!(ended.await, "the pod stays: {:#?}", node.events());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_driver_is_listed_on_the_node_and_goes_with_its_socket() {
    let node = Node::start(&["app:1"]).await;
    let driver = driver_of(&node).await;
    let listed = node.api.wait(CSI_NODE, "the driver", |object| object["spec"]["drivers"][0]["name"] == DRIVER).await;
    let entry = &listed["spec"]["drivers"][0];
    assert_eq!((&entry["nodeID"], &entry["allocatable"]["count"]), (&json!("rack-7"), &json!(16)));
    assert_eq!(entry["topologyKeys"], json!(["disks.example.com/rack"]));
    let object = node.api.get(NODE).expect("the node");
    assert_eq!(object["metadata"]["labels"]["disks.example.com/rack"], "7");
    assert_eq!(
        object["metadata"]["annotations"]["csi.volume.kubernetes.io/nodeid"],
        format!("{{\"{DRIVER}\":\"rack-7\"}}")
    );
    driver.kill();
    std::fs::remove_file(node.dir.path().join(format!("kubelet/plugins_registry/{DRIVER}-reg.sock"))).expect("removed");
    node.api.wait(CSI_NODE, "no driver", |object| object["spec"]["drivers"] == json!([])).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_is_staged_published_grown_and_taken_down() {
    let node = Node::start(&["app:1"]).await;
    describe_driver(&node, json!({"attachRequired": false, "podInfoOnMount": true}));
    bound(&node, csi_source(), "2Gi");
    let driver = driver_of(&node).await;
    node.create(with_claim());
    node.api.wait(POD, "Ready", ready).await;
    assert_eq!(driver.wait_for("stage"), "stage disk-1 0");
    assert_eq!(driver.wait_for("publish"), "publish disk-1");
    assert_eq!(driver.wait_for("expand"), format!("expand disk-1 {}", 2u64 << 30));
    let (path, read_only) = mounted(&node);
    assert!(path.ends_with("kubelet/pods/pod-uid-1/volumes/kubernetes.io~csi/pv-1/mount") && !read_only, "{path:?}");
    let told = std::fs::read_to_string(path.join("told")).expect("what the driver was told");
    assert!(told.contains("csi.storage.k8s.io/pod.name=web") && told.contains("speed=fast"), "{told}");
    node.api.wait(CLAIM, "grown", |claim| claim["status"]["capacity"]["storage"] == "2Gi").await;
    let in_use = format!("kubernetes.io/csi/{DRIVER}^disk-1");
    node.api.wait(NODE, "in use", |node| node["status"]["volumesInUse"][0] == json!(in_use)).await;
    node.api.delete_gracefully(POD, 1);
    gone(&node).await;
    assert_eq!(driver.wait_for("unpublish"), "unpublish disk-1");
    assert_eq!(driver.wait_for("unstage"), "unstage disk-1");
    assert!(!node.dir.path().join("kubelet/pods/pod-uid-1").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_agent_takes_down_what_the_one_before_had_begun() {
    let mut node = Node::start(&["app:1"]).await;
    describe_driver(&node, json!({"attachRequired": false}));
    bound(&node, csi_source(), "1Gi");
    let mut driver = driver_of(&node).await;
    driver.order("fail publish");
    driver.wait_for("understood");
    node.create(with_claim());
    driver.wait_for("publish");
    node.wait_for_event("FailedMount").await;
    // Killed between staging and publishing; the pod is deleted while nobody is there.
    node.kill_agent().await;
    node.api.remove(POD);
    driver.order("mend");
    driver.wait_for("understood");
    let _node = node.with_agent().await;
    assert_eq!(driver.wait_for("unpublish"), "unpublish disk-1");
    assert_eq!(driver.wait_for("unstage"), "unstage disk-1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_must_be_attached_waits_for_it() {
    let node = Node::start(&["app:1"]).await;
    bound(&node, csi_source(), "1Gi");
    let _driver = driver_of(&node).await;
    node.create(with_claim());
    node.wait_for_event("FailedMount").await;
    let messages: Vec<String> = node.api.all("/events/").iter().map(|event| event["message"].to_string()).collect();
    assert!(messages.iter().any(|message| message.contains("volumeattachments.storage.k8s.io")), "{messages:?}");
    let name =
        messages.iter().find_map(|text| Some(text.split("csi-").nth(1)?.get(..64)?.to_owned())).expect("its name");
    let in_use = json!([format!("kubernetes.io/csi/{DRIVER}^disk-1")]);
    let named = node.api.get(NODE).expect("the node")["status"]["volumesInUse"].clone();
    assert_eq!(named, in_use, "the node says so before it looks for the attachment");
    let mut attachment = json!({"apiVersion": "storage.k8s.io/v1",
        "kind": "VolumeAttachment", "metadata": {"name": format!("csi-{name}")},
        "spec": {"attacher": DRIVER, "nodeName": "node-1", "source": {"persistentVolumeName": "pv-1"}},
        "status": {"attached": true, "attachmentMetadata": {"device": "/dev/sdx"}}});
    let path = format!("/apis/storage.k8s.io/v1/volumeattachments/csi-{name}");
    attachment["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    node.api.put(&path, attachment.clone());
    let told =
        |node: &Node| node.api.all("/events/").iter().any(|e| e["message"].to_string().contains("being deleted"));
    let refused = fakes::reached(|| told(&node));
    assert!(refused.await, "it is mounted while it goes: {:#?}", node.events());
    attachment["metadata"].as_object_mut().expect("metadata").remove("deletionTimestamp");
    node.api.put(&path, attachment);
    node.api.wait(POD, "Ready", ready).await;
    let told = std::fs::read_to_string(mounted(&node).0.join("told")).expect("what the driver was told");
    assert!(told.starts_with("device=/dev/sdx"), "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pods_own_volume_is_published_without_staging_and_read_only_where_asked() {
    let node = Node::start(&["app:1"]).await;
    describe_driver(
        &node,
        json!({"attachRequired": false, "podInfoOnMount": true, "volumeLifecycleModes": ["Ephemeral"]}),
    );
    let driver = driver_of(&node).await;
    let source = json!({"driver": DRIVER, "readOnly": true, "volumeAttributes": {"size": "1"}});
    node.create(with_volume(json!({"name": "v", "csi": source})));
    node.api.wait(POD, "Ready", ready).await;
    assert!(driver.wait_for("publish").starts_with("publish csi-"), "a handle made of the pod");
    let (path, read_only) = mounted(&node);
    assert!(read_only);
    let told = std::fs::read_to_string(path.join("told")).expect("what the driver was told");
    assert!(told.contains("readonly=true") && told.contains("csi.storage.k8s.io/ephemeral=true"), "{told}");
    node.api.delete_gracefully(POD, 1);
    gone(&node).await;
    assert!(driver.wait_for("un").starts_with("unpublish"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_raw_device_reaches_the_container_and_is_taken_down() {
    let node = Node::start(&["app:1"]).await;
    describe_driver(&node, json!({"attachRequired": false}));
    let mut source = csi_source();
    source["volumeMode"] = json!("Block");
    bound(&node, source, "1Gi");
    let driver = driver_of(&node).await;
    let mut pod = with_claim();
    // First as it must not be used.
    node.create(pod.clone());
    node.wait_for_event("FailedMount").await;
    let messages: Vec<String> = node.api.all("/events/").iter().map(|event| event["message"].to_string()).collect();
    let expected = "volume v has volumeMode Block, but is specified in volumeMounts";
    assert!(messages.iter().any(|message| message.contains(expected)), "{messages:?}");
    node.api.delete_gracefully(POD, 1);
    gone(&node).await;
    pod["metadata"]["uid"] = json!("pod-uid-2");
    pod["spec"]["containers"][0]["volumeMounts"] = json!(null);
    pod["spec"]["containers"][0]["volumeDevices"] = json!([{"name": "v", "devicePath": "/dev/xvda"}]);
    node.create(pod);
    node.api.wait(POD, "Ready", ready).await;
    assert_eq!(driver.wait_for("stage"), "stage disk-1 0");
    assert_eq!(driver.wait_for("publish"), "publish disk-1");
    let device = {
        let world = node.runtime.world.lock().unwrap();
        world.containers.last().expect("a container").config.devices[0].clone()
    };
    assert_eq!((device.container_path.as_str(), device.permissions.as_str()), ("/dev/xvda", "mrw"));
    let published = node.dir.path().join("kubelet/plugins/kubernetes.io/csi/volumeDevices/publish/pv-1/pod-uid-2");
    assert_eq!(PathBuf::from(&device.host_path), published);
    assert!(published.exists());
    node.api.delete_gracefully(POD, 1);
    gone(&node).await;
    assert_eq!(driver.wait_for("unpublish"), "unpublish disk-1");
    assert_eq!(driver.wait_for("unstage"), "unstage disk-1");
    assert!(!node.dir.path().join("kubelet/pods/pod-uid-2").exists());
    assert!(!published.parent().unwrap().exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_local_volume_is_the_nodes_own_directory() {
    let node = Node::start(&["app:1"]).await;
    let disk = node.dir.path().join("disk");
    bound(&node, json!({"local": {"path": disk}}), "1Gi");
    node.create(with_claim());
    node.wait_for_event("FailedMount").await;
    std::fs::create_dir(&disk).expect("a directory");
    node.api.wait(POD, "Ready", ready).await;
    assert_eq!(mounted(&node), (disk.clone(), false));
    node.api.delete_gracefully(POD, 1);
    gone(&node).await;
    assert!(disk.exists(), "the data stays");
}
