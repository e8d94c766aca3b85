//! The whole agent between a fake API server and a fake runtime: pods from their creation to Ready to their deletion.

mod fakes;

use std::time::Duration;

use fakes::node::{NODE, Node, POD, condition, plain, pod, ready};
use serde_json::{Value, json};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_lives_from_creation_to_ready_to_deletion() {
    let node = Node::start(&["app:1"]).await;
    let registered = node.api.wait(NODE, "Ready", |node| condition(node, "Ready") == "True").await;
    assert_eq!(registered["status"]["nodeInfo"]["containerRuntimeVersion"], "fake://1.0");
    assert_eq!(registered["metadata"]["labels"]["kubernetes.io/hostname"], "node-1");
    node.api
        .wait("/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/node-1", "held", |lease| {
            lease["spec"]["holderIdentity"] == "node-1"
        })
        .await;

    node.create(plain());
    let pod = node.api.wait(POD, "Ready", ready).await;
    assert_eq!(pod["status"]["phase"], "Running");
    assert_eq!(pod["status"]["podIP"], "10.42.0.9");
    assert_eq!(pod["status"]["containerStatuses"][0]["restartCount"], 0);
    for event in ["Pulled", "Created", "Started"] {
        node.wait_for_event(event).await;
    }
    let hosts = std::fs::read_to_string(node.dir.path().join("data/pods/pod-uid-1/etc-hosts")).expect("a hosts file");
    assert!(hosts.contains("10.42.0.9\tweb"), "{hosts}");

    node.api.delete_gracefully(POD, 1);
    node.api.wait(POD, "gone", Value::is_null).await;
    let changes = node.api.changes();
    let last = changes.iter().rposition(|change| change.ends_with("pods/web/status")).expect("a status");
    let deleted = changes.iter().position(|change| change.starts_with("DELETE")).expect("a deletion");
    assert!(last < deleted, "the last status comes before the deletion: {changes:?}");
    let empty = fakes::reached(|| node.runtime.is_empty());
    assert!(empty.await, "something is left in the runtime: {:?}", node.runtime.calls());
    assert!(!node.dir.path().join("data/pods/pod-uid-1").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_that_ends_runs_again_and_is_counted() {
    let node = Node::start(&["app:1"]).await;
    node.create(plain());
    node.api.wait(POD, "Ready", ready).await;
    node.runtime.exit("app", 3);
    let pod = node
        .api
        .wait(POD, "restarted", |pod| pod["status"]["containerStatuses"][0]["restartCount"] == 1 && ready(pod))
        .await;
    let last = &pod["status"]["containerStatuses"][0]["lastState"]["terminated"];
    assert_eq!((&last["exitCode"], &last["reason"]), (&json!(3), &json!("Error")));
    node.runtime.exit("app", 3);
    node.api
        .wait(POD, "in CrashLoopBackOff", |pod| {
            pod["status"]["containerStatuses"][0]["state"]["waiting"]["reason"] == "CrashLoopBackOff"
        })
        .await;
    node.wait_for_event("BackOff").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_like_pod_with_an_init_container_succeeds() {
    let node = Node::start(&["app:1"]).await;
    node.create(pod(json!({"nodeName": "node-1", "restartPolicy": "Never",
        "initContainers": [{"name": "prepare", "image": "app:1"}], "containers": [{"name": "app", "image": "app:1"}]})));
    node.api
        .wait(POD, "preparing", |pod| !pod["status"]["initContainerStatuses"][0]["state"]["running"].is_null())
        .await;
    assert_eq!(node.runtime.running(), ["prepare"]);
    node.runtime.exit("prepare", 0);
    node.api.wait(POD, "Ready", ready).await;
    node.runtime.exit("app", 0);
    let pod = node.api.wait(POD, "Succeeded", |pod| pod["status"]["phase"] == "Succeeded").await;
    assert_eq!(pod["status"]["initContainerStatuses"][0]["ready"], true);
    assert_eq!(pod["status"]["containerStatuses"][0]["state"]["terminated"]["reason"], "Completed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_agent_adopts_its_pods_without_a_flip_or_a_restart() {
    let mut node = Node::start(&["app:1"]).await;
    node.runtime.world.lock().unwrap().exec_exit_code = 0;
    node.create(pod(json!({"nodeName": "node-1", "containers": [{"name": "app", "image": "app:1",
        "readinessProbe": {"exec": {"command": ["true"]}, "periodSeconds": 1}}]})));
    node.api.wait(POD, "Ready", ready).await;
    node.kill_agent().await;
    let patches = |node: &Node| node.api.changes().iter().filter(|c| c.ends_with("pods/web/status")).count();
    let (before, calls) = (patches(&node), node.runtime.calls());
    // A pod that nobody knows any more appears in the meantime.
    let stray = {
        let mut world = node.runtime.world.lock().unwrap();
        let mut stray = world.sandboxes[0].clone();
        stray.id = "stray".into();
        let uid = "stray-uid".to_owned();
        stray.config.labels.insert("io.kubernetes.pod.uid".into(), uid);
        world.sandboxes.push(stray);
        "stray"
    };
    let node = node.with_agent().await;
    let removed =
        fakes::reached(|| node.runtime.world.lock().unwrap().sandboxes.iter().all(|sandbox| sandbox.id != stray));
    assert!(removed.await, "the unknown pod stays: {:?}", node.runtime.calls());
    let pod = node.api.get(POD).expect("the pod");
    assert!(ready(&pod));
    assert_eq!(patches(&node), before, "an adopted pod has nothing to tell");
    let made = |calls: &[String]| calls.iter().filter(|call| call.starts_with("create") || *call == "run").count();
    assert_eq!(made(&node.runtime.calls()), made(&calls), "nothing was started again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn containers_outlive_an_api_outage_and_the_status_catches_up() {
    let node = Node::start(&["app:1"]).await;
    node.create(plain());
    node.api.wait(POD, "Ready", ready).await;
    node.api.set_down(true);
    node.runtime.exit("app", 1);
    let restarted = fakes::reached(|| !node.runtime.running().is_empty());
    assert!(restarted.await, "restarts need the API: {:?}", node.runtime.calls());
    node.api.set_down(false);
    node.api.wait(POD, "told", |pod| pod["status"]["containerStatuses"][0]["restartCount"] == 1 && ready(pod)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn trouble_is_told_where_the_user_looks() {
    let node = Node::start(&["app:1"]).await;
    node.create(pod(json!({"nodeName": "node-1", "containers": [
        {"name": "app", "image": "app:1", "env": [{"name": "X", "valueFrom": {"configMapKeyRef": {"name": "none", "key": "k"}}}]},
        {"name": "nothere", "image": "missing:1"}, {"name": "never", "image": "absent:1", "imagePullPolicy": "Never"},
        {"name": "bad", "image": "Bad Name"}]})));
    let reason = |pod: &Value, name: &str| {
        let all = pod["status"]["containerStatuses"].as_array().cloned().unwrap_or_default();
        let found = all.iter().find(|status| status["name"] == name).cloned().unwrap_or_default();
        found["state"]["waiting"]["reason"].as_str().unwrap_or_default().to_owned()
    };
    let pod = node
        .api
        .wait(POD, "in trouble", |pod| {
            reason(pod, "app") == "CreateContainerConfigError"
                && reason(pod, "nothere") == "ImagePullBackOff"
                && reason(pod, "never") == "ErrImageNeverPull"
                && reason(pod, "bad") == "InvalidImageName"
        })
        .await;
    assert_eq!(pod["status"]["phase"], "Pending");
    let message = &pod["status"]["containerStatuses"][0]["state"]["waiting"]["message"];
    assert_eq!(message, "configmap \"none\" not found");
    node.wait_for_event("Failed").await;
    // The config map appears: the container starts without anyone touching the pod.
    node.api
        .put("/api/v1/namespaces/default/configmaps/none", json!({"metadata": {"name": "none"}, "data": {"k": "v"}}));
    node.api.wait(POD, "running", |pod| !pod["status"]["containerStatuses"][0]["state"]["running"].is_null()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_does_not_fit_fails_with_the_reason() {
    let node = Node::start(&["app:1"]).await;
    node.create(pod(json!({"nodeName": "node-1", "containers": [
        {"name": "app", "image": "app:1", "resources": {"requests": {"cpu": "100000"}}}]})));
    let pod = node.api.wait(POD, "Failed", |pod| pod["status"]["phase"] == "Failed").await;
    assert_eq!(pod["status"]["reason"], "OutOfcpu");
    assert!(node.runtime.calls().is_empty(), "nothing may be made for it");
}

/// Pods whose label the node has no more are refused as soon as the watch of the node has told so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_label_that_is_taken_from_the_node_admits_no_more_pods() {
    // Its own reports, whose answers tell the node too, are far apart.
    let node = Node::start_with(&["app:1"], |config| config.node_status_update_period = Duration::from_secs(300)).await;
    let mut object = node.api.wait(NODE, "Ready", |node| condition(node, "Ready") == "True").await;
    object["metadata"]["labels"]["pool"] = json!("a");
    node.api.put(NODE, object.clone());
    let choosy = |attempt: u32| {
        let mut pod = plain();
        pod["spec"]["nodeSelector"] = json!({"pool": "a"});
        pod["metadata"]["uid"] = json!(format!("choosy-{attempt}"));
        pod
    };
    node.create(choosy(0));
    node.api.wait(POD, "Ready", ready).await;
    object["metadata"]["labels"].as_object_mut().expect("labels").remove("pool");
    node.api.put(NODE, object);
    let refused = tokio::time::timeout(Duration::from_secs(20), async {
        for attempt in 1.. {
            node.api.delete_gracefully(POD, 1);
            node.api.wait(POD, "gone", Value::is_null).await;
            node.create(choosy(attempt));
            let over = |pod: &Value| ready(pod) || pod["status"]["phase"] == "Failed";
            let pod = node.api.wait(POD, "admitted or refused", over).await;
            if pod["status"]["reason"] == "NodeAffinity" {
                return;
            }
        }
    });
    assert!(refused.await.is_ok(), "the label still admits pods");
}

/// A node that was cut off for a while, and that others have called unreachable, says that it is ready as soon as it hears so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_others_gave_up_says_that_it_is_ready_at_once() {
    let node = Node::start_with(&["app:1"], |config| config.node_status_update_period = Duration::from_secs(300)).await;
    let mut object = node.api.wait(NODE, "Ready", |node| condition(node, "Ready") == "True").await;
    // More than once: what begins with the node ends with its first reports.
    for _ in 0..3 {
        for condition in object["status"]["conditions"].as_array_mut().expect("conditions") {
            condition["status"] = json!("Unknown");
            condition["lastTransitionTime"] = json!("2026-01-01T00:00:00Z");
        }
        node.api.put(NODE, object);
        object = node.api.wait(NODE, "Ready again", |node| condition(node, "Ready") == "True").await;
        let conditions = object["status"]["conditions"].as_array().expect("conditions");
        let renewed = |one: &Value| one["status"] != "Unknown" && one["lastTransitionTime"] != "2026-01-01T00:00:00Z";
        assert!(conditions.iter().all(renewed), "{conditions:#?}");
    }
}

/// A pod that the node needs gets the place of one that it can do without, and waits until that has ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_critical_pod_takes_the_place_of_another_on_a_full_node() {
    const VITAL: &str = "/api/v1/namespaces/default/pods/vital";
    const LATE: &str = "/api/v1/namespaces/default/pods/late";
    let node = Node::start_with(&["app:1"], |config| config.max_pods = 1).await;
    let mut first = plain();
    // Its end takes a while, in which the other must not start.
    first["spec"]["terminationGracePeriodSeconds"] = json!(10);
    first["spec"]["containers"][0]["lifecycle"] = json!({"preStop": {"sleep": {"seconds": 1}}});
    node.create(first);
    node.api.wait(POD, "Ready", ready).await;
    let named = |name: &str, priority: i64| {
        let mut pod = plain();
        pod["metadata"]["name"] = json!(name);
        pod["metadata"]["uid"] = json!(format!("uid-{name}"));
        pod["spec"]["priority"] = json!(priority);
        pod
    };
    let mut late = named("late", 1_000_000);
    late["metadata"]["annotations"] = json!({"kubernetes.io/config.source": "file"});
    node.api.put(LATE, late);
    let late = node.api.wait(LATE, "refused", |pod| pod["status"]["phase"] == "Failed").await;
    assert_eq!(late["status"]["reason"], "OutOfpods", "neither a high priority nor a claim to be static makes room");
    node.api.put(VITAL, named("vital", 2_000_001_000));
    node.api.wait(VITAL, "Ready", ready).await;
    let pod = node.api.wait(POD, "Failed", |pod| pod["status"]["phase"] == "Failed").await;
    assert_eq!(pod["status"]["reason"], "Preempting");
    assert_eq!(pod["status"]["message"], "Preempted in order to admit critical pod");
    assert_eq!(condition(&pod, "DisruptionTarget"), "True");
    node.wait_for_event("Preempting").await;
    let calls = node.runtime.calls();
    let stopped = calls.iter().position(|call| call == "stop").expect("the end of the one");
    let started = calls.iter().rposition(|call| call == "start").expect("the start of the other");
    assert!(stopped < started, "{calls:?}");
}
