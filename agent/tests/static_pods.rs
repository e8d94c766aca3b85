//! Pods of manifests on the node: run without an API object, shown by one, and changed with their file.

mod fakes;

use std::path::{Path, PathBuf};

use fakes::node::{Node, ready};
use serde_json::Value;

const MIRROR: &str = "/api/v1/namespaces/default/pods/web-node-1";

async fn node() -> Node {
    Node::start_with(&["app:1", "app:2"], |config| {
        let manifests = config.data_dir.join("manifests");
        std::fs::create_dir_all(&manifests).expect("a directory");
        config.static_pod_dir = Some(manifests);
    })
    .await
}

fn manifest(node: &Node) -> PathBuf {
    node.dir.path().join("data/manifests/web.yaml")
}

fn write(path: &Path, image: &str) {
    let text = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: web}}\nspec:\n  terminationGracePeriodSeconds: 1\n  containers: [{{name: app, image: \"{image}\"}}]\n"
    );
    std::fs::write(path, text).expect("a manifest");
}

/// Waits for something of the fake runtime, for longer than an event takes and shorter than the next look would.
async fn soon(what: &str, so: impl FnMut() -> bool) {
    let reached = fakes::reached(so);
    assert!(reached.await, "not soon: {what}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_manifest_runs_is_mirrored_and_is_followed() {
    let node = node().await;
    write(&manifest(&node), "app:1");
    let mirror = node.api.wait(MIRROR, "Ready", ready).await;
    let annotations = &mirror["metadata"]["annotations"];
    assert_eq!(annotations["kubernetes.io/config.source"], "file");
    let first = annotations["kubernetes.io/config.mirror"].clone();
    assert_eq!(node.runtime.running(), ["app"]);

    // Somebody deletes the mirror: the pod runs on and is shown again.
    node.api.remove(MIRROR);
    let again = node.api.wait(MIRROR, "back and Ready", |pod| !pod.is_null() && ready(pod)).await;
    assert_ne!(again["metadata"]["uid"], mirror["metadata"]["uid"]);
    assert!(!node.runtime.calls().iter().any(|call| call == "stop"), "{:?}", node.runtime.calls());

    // Another manifest is another pod, which starts when the first has ended.
    write(&manifest(&node), "app:2");
    let changed = |pod: &Value| pod["spec"]["containers"][0]["image"] == "app:2" && ready(pod);
    let mirror = node.api.wait(MIRROR, "of the new manifest", changed).await;
    assert_ne!(mirror["metadata"]["annotations"]["kubernetes.io/config.mirror"], first);
    let calls = node.runtime.calls();
    let removed = calls.iter().position(|call| call == "remove sandbox").expect("the first pod goes");
    let second = calls.iter().rposition(|call| call == "run").expect("the second pod");
    assert!(removed < second, "{calls:?}");

    std::fs::remove_file(manifest(&node)).expect("the manifest goes");
    node.api.wait(MIRROR, "gone", Value::is_null).await;
    soon("the pod is gone", || node.runtime.is_empty()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_manifest_harms_nobody() {
    let node = node().await;
    std::fs::write(node.dir.path().join("data/manifests/bad.yaml"), "{").expect("a file");
    std::fs::write(node.dir.path().join("data/manifests/.hidden"), "{").expect("a file");
    write(&manifest(&node), "app:1");
    node.api.wait(MIRROR, "Ready", ready).await;
    assert_eq!(node.runtime.running(), ["app"]);
}

/// A node of one manifest by its name, and where that is.
async fn node_of_one_file() -> (Node, PathBuf) {
    let node = Node::start_with(&["app:1", "app:2"], |config| {
        std::fs::create_dir_all(&config.data_dir).expect("a directory");
        config.static_pod_dir = Some(config.data_dir.join("pod.yaml"));
    })
    .await;
    let file = node.dir.path().join("data/pod.yaml");
    (node, file)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_file_is_followed_through_writing_replacement_and_removal() {
    let (node, file) = node_of_one_file().await;
    // Its neighbours are nobody's business, and it may be a manifest by any name.
    write(&file.with_file_name("neighbour.yaml"), "app:2");
    write(&file, "app:1");
    let of = |image: &'static str| move |pod: &Value| pod["spec"]["containers"][0]["image"] == image && ready(pod);
    let mirror = node.api.wait(MIRROR, "of the file", of("app:1")).await;
    assert_eq!(mirror["metadata"]["annotations"]["kubernetes.io/config.source"], "file");
    assert_eq!(node.runtime.running(), ["app"]);

    // Written anew.
    write(&file, "app:2");
    node.api.wait(MIRROR, "of what was written", of("app:2")).await;
    // Another file takes its name, as an editor or a configuration tool does it.
    let next = file.with_file_name("pod.yaml.new");
    write(&next, "app:1");
    std::fs::rename(&next, &file).expect("a rename");
    node.api.wait(MIRROR, "of the file that took its place", of("app:1")).await;

    // It says nothing usable for a while: the pod goes on.
    let calls = node.runtime.calls();
    std::fs::write(&file, "{").expect("a file");
    node.api.remove(MIRROR);
    node.api.wait(MIRROR, "shown again", of("app:1")).await;
    assert_eq!(node.runtime.calls(), calls, "a file that cannot be read ends nothing");

    std::fs::remove_file(&file).expect("the file goes");
    node.api.wait(MIRROR, "gone", Value::is_null).await;
    soon("the pod is gone", || node.runtime.is_empty()).await;
    // And comes back.
    write(&file, "app:2");
    node.api.wait(MIRROR, "of the file that came back", of("app:2")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_may_take_the_place_of_the_file() {
    let (node, path) = node_of_one_file().await;
    write(&path, "app:1");
    node.api.wait(MIRROR, "Ready", ready).await;
    std::fs::remove_file(&path).expect("the file goes");
    node.api.wait(MIRROR, "gone", Value::is_null).await;
    std::fs::create_dir(&path).expect("a directory");
    write(&path.join("web.yaml"), "app:2");
    let second = |pod: &Value| pod["spec"]["containers"][0]["image"] == "app:2" && ready(pod);
    node.api.wait(MIRROR, "of the directory's manifest", second).await;
}
