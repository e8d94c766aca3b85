//! Why what a command waits for is not there: what the API knows of pods and nodes, in the words of `kubectl describe`. The
//! commands that wait stop what they started when they give up, so that nobody could ask afterwards.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Pod, PodStatus};
use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt};

/// How long the API may take to tell.
const PATIENCE: Duration = Duration::from_secs(5);
/// So many objects are looked at.
const MOST: u32 = 10;

/// One line for every pod of a namespace that is not Ready and for every node that is short of something; empty if the API does
/// not answer.
pub(crate) async fn of_pods(client: &Client, namespace: &str) -> String {
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let first = ListParams::default().limit(MOST);
    let pods = tokio::time::timeout(PATIENCE, pods.list(&first)).await;
    let pods = pods.ok().and_then(Result::ok).into_iter().flatten();
    let lines: Vec<String> =
        pods.filter_map(|pod| Some(format!("pod {}: {}", pod.name_any(), pod_reason(&pod)?))).collect();
    indented(lines) + &of_nodes(client, None).await
}

/// One line for every node, or the one of a name, that is not Ready, is short of something or takes no pods.
pub(crate) async fn of_nodes(client: &Client, name: Option<&str>) -> String {
    let mut first = ListParams::default().limit(MOST);
    first.field_selector = name.map(|name| format!("metadata.name={name}"));
    let nodes: Api<Node> = Api::all(client.clone());
    let nodes = tokio::time::timeout(PATIENCE, nodes.list(&first)).await;
    let nodes = nodes.ok().and_then(Result::ok).into_iter().flatten();
    indented(nodes.flat_map(|node| node_reasons(&node)).collect())
}

fn indented(lines: Vec<String>) -> String {
    lines.into_iter().map(|line| format!("\n  {line}")).collect()
}

/// Why a pod is not Ready: what the scheduler said, what a container waits for or how it ended, else the pod's phase.
fn pod_reason(pod: &Pod) -> Option<String> {
    let status = pod.status.as_ref()?;
    let condition = |kind: &str| status.conditions.iter().flatten().find(|condition| condition.type_ == kind);
    if condition("Ready").is_some_and(|ready| ready.status == "True") {
        return None;
    }
    let told = |reason: Option<&String>, message: Option<&String>| {
        let words: Vec<&str> = [reason, message].into_iter().flatten().map(String::as_str).collect();
        (!words.is_empty()).then(|| words.join(": "))
    };
    let scheduler = condition("PodScheduled").filter(|scheduled| scheduled.status != "True");
    scheduler
        .and_then(|scheduled| told(scheduled.reason.as_ref(), scheduled.message.as_ref()))
        .or_else(|| told(status.reason.as_ref(), status.message.as_ref()))
        .or_else(|| container_reason(status))
        .or_else(|| condition("Ready").and_then(|ready| told(ready.reason.as_ref(), ready.message.as_ref())))
        .or_else(|| Some(status.phase.clone().unwrap_or_else(|| "no status yet".to_owned())))
}

fn container_reason(status: &PodStatus) -> Option<String> {
    let containers = status.init_container_statuses.iter().chain(&status.container_statuses).flatten();
    containers
        .filter_map(|container| {
            let state = container.state.as_ref()?;
            let (reason, message) = match (&state.waiting, &state.terminated) {
                (Some(waiting), _) => (waiting.reason.clone()?, waiting.message.clone()),
                (None, Some(ended)) if ended.exit_code != 0 => {
                    (format!("ended with exit code {}", ended.exit_code), ended.message.clone())
                }
                _ => return None,
            };
            let message = message.map(|message| format!(": {message}")).unwrap_or_default();
            Some(format!("container {}: {reason}{message}", container.name))
        })
        .next()
}

/// What is wrong with a node.
fn node_reasons(node: &Node) -> Vec<String> {
    let name = node.name_any();
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let mut lines: Vec<String> = conditions
        .filter(|condition| (condition.type_ == "Ready") != (condition.status == "True"))
        .map(|condition| {
            let message = condition.message.as_deref().or(condition.reason.as_deref()).unwrap_or("no reason given");
            format!("node {name}: {}={}: {message}", condition.type_, condition.status)
        })
        .collect();
    if node.spec.as_ref().is_some_and(|spec| spec.unschedulable == Some(true)) {
        lines.push(format!("node {name}: is cordoned"));
    }
    lines
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(status: serde_json::Value) -> Option<String> {
        pod_reason(&serde_json::from_value(json!({"metadata": {"name": "p"}, "status": status})).expect("a pod"))
    }

    #[test]
    fn a_pod_that_is_not_ready_says_why() {
        let condition = |kind: &str, status: &str, reason: &str, message: &str| json!([{"type": kind, "status": status, "reason": reason, "message": message}]);
        let no_room = "0/1 nodes are available: 1 node(s) had untolerated taint(s).";
        let waiting = json!({"waiting": {"reason": "ErrImagePull", "message": "no such host"}});
        let ended = json!({"terminated": {"exitCode": 3}});
        let container = |state: &serde_json::Value| {
            let status =
                json!({"name": "c", "state": state, "ready": false, "image": "", "imageID": "", "restartCount": 0});
            json!({"phase": "Pending", "containerStatuses": [status]})
        };
        for (status, expected) in [
            (json!({"conditions": condition("Ready", "True", "", "")}), None),
            (
                json!({"conditions": condition("PodScheduled", "False", "Unschedulable", no_room)}),
                Some(format!("Unschedulable: {no_room}")),
            ),
            (
                json!({"phase": "Failed", "reason": "Evicted", "message": "low on memory"}),
                Some("Evicted: low on memory".into()),
            ),
            (container(&waiting), Some("container c: ErrImagePull: no such host".into())),
            (container(&ended), Some("container c: ended with exit code 3".into())),
            (json!({"phase": "Pending"}), Some("Pending".into())),
            (json!({}), Some("no status yet".into())),
        ] {
            assert_eq!(pod(status.clone()), expected, "{status}");
        }
    }

    #[test]
    fn a_node_says_what_it_is_short_of() {
        let node = json!({"metadata": {"name": "n"}, "spec": {"unschedulable": true}, "status": {"conditions": [
            {"type": "Ready", "status": "True", "message": "fine"},
            {"type": "MemoryPressure", "status": "False"},
            {"type": "DiskPressure", "status": "True", "message": "kubelet has disk pressure"},
        ]}});
        assert_eq!(
            node_reasons(&serde_json::from_value(node).expect("a node")),
            ["node n: DiskPressure=True: kubelet has disk pressure", "node n: is cordoned"]
        );
        let down = json!({"metadata": {"name": "n"}, "status": {"conditions": [
            {"type": "Ready", "status": "False", "reason": "KubeletNotReady"}]}});
        assert_eq!(
            node_reasons(&serde_json::from_value(down).expect("a node")),
            ["node n: Ready=False: KubeletNotReady"]
        );
    }
}
