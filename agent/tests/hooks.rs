//! What runs beside a pod's containers: postStart and preStop hooks, and ephemeral containers added to a running pod.

mod fakes;

use std::time::Duration;

use fakes::node::{Node, POD, plain, pod, ready};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

fn hooked(restart_policy: &str, grace_seconds: u32, lifecycle: Value) -> Value {
    pod(json!({"nodeName": "node-1", "restartPolicy": restart_policy, "terminationGracePeriodSeconds": grace_seconds,
        "containers": [{"name": "app", "image": "app:1", "lifecycle": lifecycle}]}))
}

fn exec(command: &str) -> Value {
    json!({"exec": {"command": [command]}})
}

fn message(node: &Node, reason: &str) -> String {
    let events = node.api.all("/events/");
    let found = events.iter().find(|event| event["reason"] == reason).unwrap_or_else(|| panic!("no event {reason}"));
    assert_eq!(found["involvedObject"]["fieldPath"], "spec.containers{app}");
    found["message"].as_str().unwrap_or_default().to_owned()
}

fn place(calls: &[String], call: &str) -> usize {
    calls.iter().position(|known| known == call).unwrap_or_else(|| panic!("no {call} in {calls:?}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_post_start_hook_that_fails_ends_its_container_which_starts_again() {
    let node = Node::start(&["app:1"]).await;
    node.runtime.world.lock().unwrap().exec_exit_codes.push_back(7);
    node.create(hooked("Always", 5, json!({"postStart": exec("hello")})));
    let restarted = |pod: &Value| pod["status"]["containerStatuses"][0]["restartCount"] == 1 && ready(pod);
    let pod = node.api.wait(POD, "restarted", restarted).await;
    let last = &pod["status"]["containerStatuses"][0]["lastState"]["terminated"];
    assert_eq!(last["exitCode"], 143, "it was asked to end");
    node.wait_for_event("FailedPostStartHook").await;
    assert!(message(&node, "FailedPostStartHook").contains("command 'hello' exited with 7"));
    node.wait_for_event("Killing").await;
    assert!(message(&node, "Killing").starts_with("FailedPostStartHook"));
    let calls = node.runtime.calls();
    assert_eq!(calls.iter().filter(|call| *call == "exec hello").count(), 2, "{calls:?}");
    assert!(
        place(&calls, "start") < place(&calls, "exec hello") && place(&calls, "exec hello") < place(&calls, "stop")
    );
    assert_eq!(node.runtime.world.lock().unwrap().stops, [("app".to_owned(), 5)], "with the pod's grace period");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_post_start_hook_that_fails_is_the_end_where_nothing_restarts() {
    let node = Node::start(&["app:1"]).await;
    node.runtime.world.lock().unwrap().exec_exit_code = 1;
    node.create(hooked("Never", 5, json!({"postStart": exec("hello")})));
    let pod = node.api.wait(POD, "Failed", |pod| pod["status"]["phase"] == "Failed").await;
    assert_eq!(pod["status"]["containerStatuses"][0]["restartCount"], 0);
    assert_eq!(node.runtime.calls().iter().filter(|call| *call == "create app").count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pre_stop_command_runs_before_the_signal() {
    let node = Node::start(&["app:1"]).await;
    node.create(hooked("Always", 30, json!({"preStop": exec("bye")})));
    node.api.wait(POD, "Ready", ready).await;
    node.api.delete_gracefully(POD, 30);
    node.api.wait(POD, "gone", Value::is_null).await;
    let calls = node.runtime.calls();
    assert!(place(&calls, "exec bye") < place(&calls, "stop"), "{calls:?}");
    assert_eq!(calls.iter().filter(|call| *call == "exec bye").count(), 1, "{calls:?}");
    assert!(!node.events().contains(&"FailedPreStopHook".to_owned()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pre_stop_hook_that_fails_is_told_and_the_container_ends_all_the_same() {
    let node = Node::start(&["app:1"]).await;
    node.runtime.world.lock().unwrap().exec_exit_code = 3;
    node.create(hooked("Always", 30, json!({"preStop": exec("bye")})));
    node.api.wait(POD, "Ready", ready).await;
    node.api.delete_gracefully(POD, 30);
    node.api.wait(POD, "gone", Value::is_null).await;
    node.wait_for_event("FailedPreStopHook").await;
    assert!(message(&node, "FailedPreStopHook").contains("command 'bye' exited with 3"));
    assert!(node.runtime.calls().contains(&"stop".to_owned()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_pre_stop_hook_takes_is_missing_from_the_grace_period() {
    let node = Node::start(&["app:1"]).await;
    node.create(hooked("Always", 8, json!({"preStop": {"sleep": {"seconds": 2}}})));
    node.api.wait(POD, "Ready", ready).await;
    let began = std::time::Instant::now();
    node.api.delete_gracefully(POD, 8);
    node.api.wait(POD, "gone", Value::is_null).await;
    assert!(began.elapsed() >= Duration::from_secs(2), "it slept");
    let (name, seconds) = node.runtime.world.lock().unwrap().stops[0].clone();
    assert_eq!(name, "app");
    // Two seconds less, or even less where the machine was busy, but always a moment.
    assert!((2..=6).contains(&seconds), "{seconds} s are left");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pre_stop_hook_that_does_not_end_is_left_behind_with_the_grace_period() {
    let node = Node::start(&["app:1"]).await;
    node.create(hooked("Always", 1, json!({"preStop": {"sleep": {"seconds": 3600}}})));
    node.api.wait(POD, "Ready", ready).await;
    node.api.delete_gracefully(POD, 1);
    node.api.wait(POD, "gone", Value::is_null).await;
    assert_eq!(node.runtime.world.lock().unwrap().stops, [("app".to_owned(), 2)], "it gets a moment still");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pre_stop_request_is_made_before_the_signal() {
    let node = Node::start(&["app:1"]).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let hook = json!({"httpGet": {"host": "127.0.0.1", "port": "web", "path": "/bye?now=1"}});
    let mut pod = hooked("Always", 30, json!({"preStop": hook}));
    pod["spec"]["containers"][0]["ports"] = json!([{"name": "web", "containerPort": port}]);
    node.create(pod);
    node.api.wait(POD, "Ready", ready).await;
    let runtime = node.runtime.clone();
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("a connection");
        let mut bytes = vec![0; 4096];
        let length = stream.read(&mut bytes).await.expect("a request");
        let stopped = runtime.calls().contains(&"stop".to_owned());
        stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            .await
            .expect("an answer");
        (String::from_utf8_lossy(&bytes[..length]).into_owned(), stopped)
    });
    node.api.delete_gracefully(POD, 30);
    node.api.wait(POD, "gone", Value::is_null).await;
    let (request, stopped) = server.await.expect("the server");
    assert!(request.starts_with("GET /bye?now=1 HTTP/1.1\r\n"), "{request}");
    assert!(!stopped, "the signal came first");
    assert!(!node.events().contains(&"FailedPreStopHook".to_owned()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ephemeral_container_joins_a_running_pod_once() {
    let node = Node::start(&["app:1", "tools:1"]).await;
    node.create(plain());
    let before = node.api.wait(POD, "Ready", ready).await;
    let mut pod = before.clone();
    pod["spec"]["ephemeralContainers"] = json!([{"name": "debug", "image": "tools:1", "targetContainerName": "app"}]);
    node.api.put(POD, pod);
    let state = |pod: &Value| pod["status"]["ephemeralContainerStatuses"][0]["state"].clone();
    let debugged = node.api.wait(POD, "being debugged", |pod| !state(pod)["running"].is_null()).await;
    assert_eq!(debugged["status"]["ephemeralContainerStatuses"][0]["name"], "debug");
    assert_eq!(
        debugged["status"]["containerStatuses"], before["status"]["containerStatuses"],
        "others go on as they are"
    );
    {
        let world = node.runtime.world.lock().unwrap();
        let named = |name: &str| {
            let of = |c: &&fakes::runtime::Container| c.config.metadata.as_ref().is_some_and(|m| m.name == name);
            world.containers.iter().find(of).cloned().expect("the container")
        };
        let context = named("debug").config.linux.unwrap_or_default().security_context.unwrap_or_default();
        let spaces = context.namespace_options.unwrap_or_default();
        assert_eq!(spaces.target_id, named("app").id, "it sees the processes of its target");
    }

    node.runtime.exit("debug", 4);
    let pod = node.api.wait(POD, "debugged", |pod| !state(pod)["terminated"].is_null()).await;
    assert_eq!(state(&pod)["terminated"]["exitCode"], 4);
    assert!(ready(&pod), "its end is nobody else's");
    // Another container that ends is started again, and the ephemeral one still is not.
    node.runtime.exit("app", 1);
    let again = |pod: &Value| pod["status"]["containerStatuses"][0]["restartCount"] == 1 && ready(pod);
    let pod = node.api.wait(POD, "restarted", again).await;
    assert_eq!(state(&pod)["terminated"]["exitCode"], 4);
    let calls = node.runtime.calls();
    assert_eq!(calls.iter().filter(|call| *call == "create debug").count(), 1, "{calls:?}");
}
