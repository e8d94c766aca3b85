//! Pods in user namespaces of their own, against a fake API server and a fake runtime.

mod fakes;

use fakes::node::{NODE, Node, POD, pod, ready};
use oarlock_proto::cri;
use serde_json::{Value, json};

const OTHER: &str = "/api/v1/namespaces/default/pods/other";

fn apart(name: &str) -> Value {
    let mut pod = pod(json!({"nodeName": "node-1", "hostUsers": false, "terminationGracePeriodSeconds": 1,
        "volumes": [{"name": "v", "emptyDir": {}}], "containers": [
        {"name": name, "image": "app:1", "volumeMounts": [{"name": "v", "mountPath": "/data"}]}]}));
    pod["metadata"]["name"] = json!(name);
    pod["metadata"]["uid"] = json!(format!("uid-of-{name}"));
    pod
}

fn container(node: &Node, name: &str) -> cri::ContainerConfig {
    let world = node.runtime.world.lock().unwrap();
    let named = |c: &&fakes::runtime::Container| c.config.metadata.as_ref().is_some_and(|m| m.name == name);
    world.containers.iter().rev().find(named).expect("the container").config.clone()
}

fn sandbox(node: &Node, pod: &str) -> cri::UserNamespace {
    let world = node.runtime.world.lock().unwrap();
    let named = |s: &&fakes::runtime::Sandbox| s.config.metadata.as_ref().is_some_and(|m| m.name == pod);
    let config = world.sandboxes.iter().rev().find(named).expect("the sandbox").config.clone();
    let context = config.linux.and_then(|linux| linux.security_context).expect("a context");
    context.namespace_options.and_then(|options| options.userns_options).expect("an answer")
}

fn first_id(users: &cri::UserNamespace) -> u32 {
    assert_eq!(users.mode, cri::NamespaceMode::Pod as i32);
    assert_eq!(users.uids, users.gids);
    assert_eq!((users.uids[0].container_id, users.uids[0].length), (0, 65_536));
    users.uids[0].host_id
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_pod_has_its_own_ids_and_volumes_are_mapped_to_them() {
    let node = Node::start(&["app:1"]).await;
    node.api.put(POD, apart("web"));
    node.api.wait(POD, "Ready", ready).await;
    let ids = first_id(&sandbox(&node, "web"));
    assert!(ids >= 65_536);
    let config = container(&node, "web");
    let context = config.linux.clone().and_then(|linux| linux.security_context).expect("a context");
    let options = context.namespace_options.expect("options");
    assert_eq!(options.userns_options, Some(sandbox(&node, "web")));
    let inside: Vec<&str> = config.mounts.iter().map(|mount| mount.container_path.as_str()).collect();
    assert_eq!(inside, ["/data", "/etc/hosts", "/dev/termination-log"]);
    assert!(config.mounts.iter().all(|mount| mount.uid_mappings[0].host_id == ids && mount.gid_mappings.len() == 1));
    // Known to an agent that starts anew: the ids are nobody else's, and come back only with the pod's end.
    let mut node = node;
    node.kill_agent().await;
    let node = node.with_agent().await;
    node.api.put(OTHER, apart("other"));
    node.api.wait(OTHER, "Ready", ready).await;
    assert_ne!(first_id(&sandbox(&node, "other")), ids);
    node.api.delete_gracefully(POD, 1);
    let gone = fakes::reached(|| node.api.get(POD).is_none());
    assert!(gone.await, "the pod stays: {:?}", node.events());
    let again = "/api/v1/namespaces/default/pods/again";
    node.api.put(again, apart("again"));
    node.api.wait(again, "Ready", ready).await;
    assert_eq!(first_id(&sandbox(&node, "again")), ids);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_is_not_started_among_the_nodes_users_when_the_pods_ids_are_lost() {
    let mut node = Node::start(&["app:1"]).await;
    node.api.put(POD, apart("web"));
    node.api.wait(POD, "Ready", ready).await;
    node.kill_agent().await;
    let mut records = Vec::new();
    let mut dirs = vec![node.dir.path().to_owned()];
    while let Some(dir) = dirs.pop() {
        for path in std::fs::read_dir(dir).expect("a directory").flatten().map(|entry| entry.path()) {
            match path.is_dir() && !path.is_symlink() {
                true => dirs.push(path),
                false if path.ends_with("userns") => records.push(path),
                false => {}
            }
        }
    }
    assert_eq!(records.len(), 1);
    std::fs::remove_file(&records[0]).expect("removed");
    let before = node.runtime.world.lock().unwrap().containers.len();
    node.runtime.exit("web", 1);
    let node = node.with_agent().await;
    let refused = |pod: &Value| {
        pod["status"]["containerStatuses"][0]["state"]["waiting"]["reason"] == "CreateContainerConfigError"
    };
    node.api.wait(POD, "refusal", refused).await;
    assert_eq!(node.runtime.world.lock().unwrap().containers.len(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_runtime_without_user_namespaces_is_not_asked_for_one() {
    let node = Node::start(&["app:1"]).await;
    node.runtime.world.lock().unwrap().no_user_namespaces = true;
    node.api.put(POD, apart("web"));
    node.wait_for_event("FailedCreatePodSandBox").await;
    let said = node.api.all("/events/").iter().any(|event| {
        event["message"]
            .as_str()
            .unwrap_or_default()
            .contains("can't set `spec.hostUsers: false`, runtime does not support user namespaces")
    });
    assert!(said, "{:?}", node.api.all("/events/"));
    assert!(node.runtime.is_empty());
    node.api
        .wait(NODE, "what it cannot do", |node| {
            node["status"]["runtimeHandlers"][0]["features"]["userNamespaces"] == json!(false)
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_pods_stay_in_the_nodes_user_namespace() {
    let node = Node::start(&["app:1"]).await;
    node.create(fakes::node::plain());
    node.api.wait(POD, "Ready", ready).await;
    assert_eq!(sandbox(&node, "web").mode, cri::NamespaceMode::Node as i32);
    assert!(container(&node, "app").mounts.iter().all(|mount| mount.uid_mappings.is_empty()));
}
