//! The Event on the Node that says when policies do not hold between its pods, and when they do again.

use std::time::Duration;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::PostParams;
use kube::{Api, Client};
use tracing::warn;

const COMPONENT: &str = "oarlock-netproxy";
/// Where Events of objects without a namespace are.
const NAMESPACE: &str = "default";
const TIMEOUT: Duration = Duration::from_secs(10);

/// Says which bridges' packets no rule sees; none that all are seen again.
pub async fn record(client: Client, node: String, unseen: Vec<String>) {
    let event = event(&node, &unseen);
    let api: Api<core::Event> = Api::namespaced(client, NAMESPACE);
    match tokio::time::timeout(TIMEOUT, api.create(&PostParams::default(), &event)).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => warn!(error = &error as &dyn std::error::Error, "event of the node cannot be recorded"),
        Err(_elapsed) => warn!("event of the node cannot be recorded in time"),
    }
}

fn event(node: &str, unseen: &[String]) -> core::Event {
    let now = k8s_openapi::jiff::Timestamp::now();
    let (type_, reason, message) = if unseen.is_empty() {
        let message = "NetworkPolicies hold between pods of this node".to_owned();
        ("Normal", "NetworkPolicyEnforced", message)
    } else {
        let message = format!(
            "NetworkPolicies do not hold between pods of this node: packets that only cross {} pass no rules, because the \
             kernel has no br_netfilter",
            unseen.join(", ")
        );
        ("Warning", "NetworkPolicyNotEnforced", message)
    };
    let object = core::ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Node".to_owned()),
        name: Some(node.to_owned()),
        // As the agent has it, so that `kubectl describe node` finds it.
        uid: Some(node.to_owned()),
        ..core::ObjectReference::default()
    };
    core::Event {
        metadata: ObjectMeta {
            name: Some(format!("{node}.{:x}", now.as_nanosecond())),
            namespace: Some(NAMESPACE.to_owned()),
            ..ObjectMeta::default()
        },
        involved_object: object,
        type_: Some(type_.to_owned()),
        reason: Some(reason.to_owned()),
        message: Some(message),
        source: Some(core::EventSource { component: Some(COMPONENT.to_owned()), host: Some(node.to_owned()) }),
        reporting_component: Some(COMPONENT.to_owned()),
        reporting_instance: Some(node.to_owned()),
        first_timestamp: Some(Time(now)),
        last_timestamp: Some(Time(now)),
        count: Some(1),
        ..core::Event::default()
    }
}
