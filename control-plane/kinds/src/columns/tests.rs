//! Rows as `kubectl get -o wide` prints them.

use jiff::Timestamp;
use serde_json::{Value, json};

fn now() -> Timestamp {
    "2026-01-01T12:00:00Z".parse().expect("a time")
}

fn texts(cells: &[Value]) -> Vec<String> {
    cells.iter().map(|cell| cell.as_str().map_or_else(|| cell.to_string(), str::to_owned)).collect()
}

#[test]
fn ages_read_as_kubectl_words_them() {
    for (seconds, text) in [
        (-5, "<invalid>"),
        (0, "0s"),
        (119, "119s"),
        (120, "2m"),
        (190, "3m10s"),
        (60 * 60, "60m"),
        (3 * 3600, "3h"),
        (5 * 3600 + 120, "5h2m"),
        (30 * 3600, "30h"),
        (49 * 3600, "2d1h"),
        (20 * 86400, "20d"),
        (800 * 86400, "2y70d"),
    ] {
        assert_eq!(super::time::human_duration(seconds * 1000), text);
    }
}

/// STATUS, READY and RESTARTS of a pod with one container.
fn pod_cells(status: Value, spec: Value, metadata: Value) -> (String, String, String) {
    let pod = json!({"metadata": metadata, "spec": spec, "status": status});
    let cells = texts(&super::pod(&pod, now()));
    assert_eq!(cells.len(), super::POD.len());
    (cells[2].clone(), cells[1].clone(), cells[3].clone())
}

#[test]
fn the_status_of_a_pod_names_what_holds_it_up() {
    let spec = json!({"containers": [{"name": "a"}], "initContainers": [{"name": "i"}, {"name": "j"}]});
    for (status, metadata, expected) in [
        (json!({"phase": "Pending"}), json!({}), "Pending"),
        (json!({"phase": "Failed", "reason": "Evicted"}), json!({}), "Evicted"),
        (
            json!({"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False", "reason": "SchedulingGated"}]}),
            json!({}),
            "SchedulingGated",
        ),
        (
            json!({"phase": "Pending", "containerStatuses": [{"state": {"waiting": {"reason": "ImagePullBackOff"}}}]}),
            json!({}),
            "ImagePullBackOff",
        ),
        (
            json!({"phase": "Running", "containerStatuses": [{"state": {"terminated": {"exitCode": 3}}}]}),
            json!({}),
            "ExitCode:3",
        ),
        (
            json!({"phase": "Running", "containerStatuses": [{"state": {"terminated": {"exitCode": 137, "signal": 9}}}]}),
            json!({}),
            "Signal:9",
        ),
        (
            json!({"phase": "Succeeded", "containerStatuses": [{"state": {"terminated": {"exitCode": 0, "reason": "Completed"}}}]}),
            json!({}),
            "Completed",
        ),
        (
            json!({"phase": "Pending", "initContainerStatuses": [{"name": "i", "state": {"running": {}}}]}),
            json!({}),
            "Init:0/2",
        ),
        (
            json!({"phase": "Pending", "initContainerStatuses": [{"name": "i", "state": {"terminated": {"exitCode": 0}}}, {"name": "j", "state": {"waiting": {"reason": "PodInitializing"}}}]}),
            json!({}),
            "Init:1/2",
        ),
        (
            json!({"phase": "Pending", "initContainerStatuses": [{"name": "i", "state": {"waiting": {"reason": "CrashLoopBackOff"}}}]}),
            json!({}),
            "Init:CrashLoopBackOff",
        ),
        (
            json!({"phase": "Pending", "initContainerStatuses": [{"name": "i", "state": {"terminated": {"exitCode": 2, "reason": "Error"}}}]}),
            json!({}),
            "Init:Error",
        ),
        (
            json!({"phase": "Pending", "initContainerStatuses": [{"name": "i", "state": {"terminated": {"exitCode": 2}}}]}),
            json!({}),
            "Init:ExitCode:2",
        ),
        (
            json!({"phase": "Running", "containerStatuses": [{"ready": true, "state": {"running": {}}}]}),
            json!({"deletionTimestamp": "2026-01-01T12:00:00Z"}),
            "Terminating",
        ),
        (
            json!({"phase": "Running", "reason": "NodeLost"}),
            json!({"deletionTimestamp": "2026-01-01T12:00:00Z"}),
            "Unknown",
        ),
        (json!({"phase": "Succeeded"}), json!({"deletionTimestamp": "2026-01-01T12:00:00Z"}), "Succeeded"),
    ] {
        assert_eq!(pod_cells(status, spec.clone(), metadata).0, expected);
    }
}

#[test]
fn restarts_say_when_and_sidecars_count_as_containers() {
    let spec = json!({"containers": [{"name": "a"}], "initContainers": [{"name": "s", "restartPolicy": "Always"}]});
    let status = json!({"phase": "Running",
        "initContainerStatuses": [{"name": "s", "ready": true, "started": true, "restartCount": 1, "state": {"running": {}}}],
        "containerStatuses": [{"name": "a", "ready": true, "restartCount": 2, "state": {"running": {}},
            "lastState": {"terminated": {"finishedAt": "2026-01-01T11:55:00Z"}}}]});
    let (reason, ready, restarts) = pod_cells(status, spec, json!({}));
    assert_eq!((reason.as_str(), ready.as_str(), restarts.as_str()), ("Running", "2/2", "3 (5m ago)"));
}

#[test]
fn one_finished_container_beside_a_running_one_is_not_ready() {
    let spec = json!({"containers": [{"name": "a"}, {"name": "b"}]});
    let status = json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "False"}], "containerStatuses": [
        {"state": {"terminated": {"exitCode": 0, "reason": "Completed"}}}, {"ready": true, "state": {"running": {}}}]});
    assert_eq!(pod_cells(status, spec, json!({})).0, "NotReady");
}

#[test]
fn services_show_addresses_and_ports() {
    let row = |spec: Value, status: Value| {
        texts(&super::service(
            &json!({"metadata": {"name": "s", "creationTimestamp": "2026-01-01T11:59:00Z"}, "spec": spec, "status": status}),
            now(),
        ))
    };
    assert_eq!(
        row(
            json!({"type": "NodePort", "clusterIP": "10.43.0.5", "ports": [{"port": 80, "nodePort": 30080, "protocol": "TCP"}, {"port": 53, "protocol": "UDP"}], "selector": {"b": "c", "a": "d"}}),
            json!({})
        ),
        ["s", "NodePort", "10.43.0.5", "<none>", "80:30080/TCP,53/UDP", "60s", "a=d,b=c"]
    );
    assert_eq!(row(json!({"type": "LoadBalancer", "clusterIP": "10.43.0.5"}), json!({}))[3], "<pending>");
    assert_eq!(row(json!({"type": "ClusterIP", "clusterIP": "None"}), json!({}))[2..5], ["None", "<none>", "<none>"]);
    assert_eq!(row(json!({"type": "ExternalName", "externalName": "a.b"}), json!({}))[2..4], ["<none>", "a.b"]);
}

#[test]
fn deployments_nodes_and_slices() {
    let deployment = json!({"metadata": {"name": "d"}, "spec": {"replicas": 3, "selector": {"matchLabels": {"app": "d"}},
        "template": {"spec": {"containers": [{"name": "a", "image": "x:1"}, {"name": "b", "image": "y:2"}]}}},
        "status": {"readyReplicas": 2, "updatedReplicas": 3, "availableReplicas": 1}});
    assert_eq!(
        texts(&super::deployment(&deployment, now())),
        ["d", "2/3", "3", "1", "<unknown>", "a,b", "x:1,y:2", "app=d"]
    );
    let node = json!({"metadata": {"name": "n", "labels": {"node-role.kubernetes.io/control-plane": ""}}, "spec": {"unschedulable": true},
        "status": {"conditions": [{"type": "Ready", "status": "True"}], "addresses": [{"type": "InternalIP", "address": "10.0.0.1"}],
            "nodeInfo": {"kubeletVersion": "v1.36.0"}}});
    let cells = texts(&super::node(&node, now()));
    assert_eq!(
        cells[..7],
        ["n", "Ready,SchedulingDisabled", "control-plane", "<unknown>", "v1.36.0", "10.0.0.1", "<none>"]
    );
    let slice = json!({"metadata": {"name": "e"}, "addressType": "IPv4", "ports": [{"port": 80}],
        "endpoints": [{"addresses": ["10.0.0.1"]}, {"addresses": ["10.0.0.2"]}, {"addresses": ["10.0.0.3"]}, {"addresses": ["10.0.0.4"]}]});
    assert_eq!(
        texts(&super::endpoint_slice(&slice, now()))[1..4],
        ["IPv4", "80", "10.0.0.1,10.0.0.2,10.0.0.3 + 1 more..."]
    );
}

#[test]
fn an_event_of_either_api_has_the_same_row() {
    let core = json!({"metadata": {"name": "e"}, "type": "Normal", "reason": "Started", "message": "hello\n", "count": 4,
        "firstTimestamp": "2026-01-01T11:50:00Z", "lastTimestamp": "2026-01-01T11:59:30Z",
        "involvedObject": {"kind": "Pod", "name": "p", "fieldPath": "spec.containers{a}"}, "source": {"component": "kubelet", "host": "n"}});
    let row = texts(&super::event(&core, now()));
    assert_eq!(
        row,
        ["30s", "Normal", "Started", "pod/p", "spec.containers{a}", "kubelet, n", "hello", "10m", "4", "e"]
    );
    let mut view = core;
    crate::event_views::from_core(&mut view);
    assert_eq!(view["regarding"]["name"], "p");
    assert_eq!(view["note"], "hello\n");
    assert_eq!(texts(&super::events_event(&view, now())), row);
}
