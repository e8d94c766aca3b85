//! Images as volumes, and credentials for them from plugins, against a fake API server and a fake runtime.

mod fakes;

use std::os::unix::fs::PermissionsExt;

use fakes::node::{Node, POD, pod, ready};
use oarlock_agent::Config;
use serde_json::{Value, json};

fn with_image(policy: &str) -> Value {
    pod(json!({"nodeName": "node-1", "terminationGracePeriodSeconds": 1,
        "volumes": [{"name": "model", "image": {"reference": "models/large:3", "pullPolicy": policy}}],
        "containers": [{"name": "app", "image": "app:1", "volumeMounts": [
            {"name": "model", "mountPath": "/model", "subPath": "weights"}]}]}))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_is_pulled_and_mounted_by_the_runtime() {
    let node = Node::start(&["app:1"]).await;
    node.create(with_image("IfNotPresent"));
    node.api.wait(POD, "Ready", ready).await;
    let world = node.runtime.world.lock().unwrap();
    assert_eq!(world.pulls, ["models/large:3"]);
    let mounts = &world.containers[0].config.mounts;
    let mount = mounts.iter().find(|mount| mount.container_path == "/model").expect("the mount");
    let image = mount.image.as_ref().expect("an image");
    assert_eq!(image.user_specified_image, "models/large:3");
    assert!(!image.image.is_empty() && mount.host_path.is_empty() && mount.readonly);
    assert_eq!(mount.image_sub_path, "weights");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_waits_for_an_image_that_is_not_there_and_never_pulled() {
    let node = Node::start(&["app:1"]).await;
    node.create(with_image("Never"));
    let waiting = |pod: &Value| {
        let state = &pod["status"]["containerStatuses"][0]["state"]["waiting"];
        state["reason"] == "ErrImageNeverPull"
            && state["message"] == "Container image \"models/large:3\" is not present with pull policy of Never"
    };
    node.api.wait(POD, "ErrImageNeverPull", waiting).await;
    node.wait_for_event("ErrImageNeverPull").await;
    assert!(node.runtime.running().is_empty());
}

/// A plugin that is a shell script.
fn with_plugin(config: &mut Config) {
    let dir = config.kubelet_dir.join("plugins");
    std::fs::create_dir_all(&dir).expect("a directory");
    let program = dir.join("giver");
    let answer = r#"{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1",
        "cacheKeyType":"Image","auth":{"docker.io":{"username":"rower","password":"secret"}}}"#;
    std::fs::write(&program, format!("#!/bin/sh\ncat >/dev/null\ncat <<END\n{answer}\nEND\n")).expect("a file");
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).expect("a mode");
    let file = dir.join("providers.yaml");
    let text = "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders: [{name: giver, matchImages: \
        [docker.io], defaultCacheDuration: 1h, apiVersion: credentialprovider.kubelet.k8s.io/v1}]\n";
    std::fs::write(&file, text).expect("a file");
    config.credential_providers = Some((file, dir));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_is_pulled_as_whom_a_plugin_names() {
    let node = Node::start_with(&["app:1"], with_plugin).await;
    node.create(with_image("Always"));
    node.api.wait(POD, "Ready", ready).await;
    assert_eq!(node.runtime.world.lock().unwrap().logins, ["rower"]);
}
