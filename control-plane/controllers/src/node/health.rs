//! What a node's lease and conditions say about its health, and which taints follow. Pure.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, NodeCondition, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use tokio::time::Instant;

/// A node that was heard of is given this long to be heard of again.
pub(super) const GRACE: Duration = Duration::from_secs(40);
/// A node that was never heard of is given this long.
pub(super) const START_UP_GRACE: Duration = Duration::from_secs(60);

pub(super) const NOT_READY: &str = "node.kubernetes.io/not-ready";
pub(super) const UNREACHABLE: &str = "node.kubernetes.io/unreachable";
const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";
const NO_SCHEDULE: &str = "NoSchedule";
pub(super) const NO_EXECUTE: &str = "NoExecute";

/// Conditions that taint a node while they are `True`.
const PRESSURES: [(&str, &str); 4] = [
    ("MemoryPressure", "node.kubernetes.io/memory-pressure"),
    ("DiskPressure", "node.kubernetes.io/disk-pressure"),
    ("PIDPressure", "node.kubernetes.io/pid-pressure"),
    ("NetworkUnavailable", "node.kubernetes.io/network-unavailable"),
];

/// Conditions that the node itself keeps, so that nobody knows them when it is silent.
const KEPT_BY_NODE: [&str; 4] = ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"];

/// When a node was last heard of, by our own clock: the clocks of nodes may be wrong.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Heard {
    /// What it said: a later different word is a sign of life.
    pub word: (Option<Timestamp>, Option<Timestamp>),
    pub at: Instant,
    pub ever: bool,
}

pub(super) fn condition<'a>(node: &'a Node, type_: &str) -> Option<&'a NodeCondition> {
    node.status.as_ref()?.conditions.iter().flatten().find(|condition| condition.type_ == type_)
}

/// The newest word of the node: its lease renewal and the heartbeat of its Ready condition.
pub(super) fn word(node: &Node, renewed: Option<Timestamp>) -> (Option<Timestamp>, Option<Timestamp>) {
    let ready = condition(node, "Ready").filter(|ready| ready.status != "Unknown");
    let heartbeat = ready.and_then(|ready| ready.last_heartbeat_time.as_ref()).map(|time| time.0);
    (renewed, heartbeat)
}

/// Takes note of what the node says now.
pub(super) fn listen(before: Option<&Heard>, word: (Option<Timestamp>, Option<Timestamp>), now: Instant) -> Heard {
    let ever = word.0.is_some() || word.1.is_some();
    match before {
        Some(before) if before.word == word => before.clone(),
        // Losing a condition is no sign of life.
        Some(before) if word.0 == before.word.0 && word.1.is_none() => Heard { word, ..before.clone() },
        _ => Heard { word, at: now, ever },
    }
}

/// How long until the node counts as lost; zero if it does now.
pub(super) fn time_left(heard: &Heard, now: Instant) -> Duration {
    let grace = if heard.ever { GRACE } else { START_UP_GRACE };
    grace.saturating_sub(now.duration_since(heard.at))
}

/// The conditions of a node that is silent; `None` if they say so already.
pub(super) fn silenced(node: &Node, now: Timestamp) -> Option<Vec<NodeCondition>> {
    let old = node.status.as_ref().and_then(|status| status.conditions.clone()).unwrap_or_default();
    let mut new = old.clone();
    for type_ in KEPT_BY_NODE {
        let (reason, message) = match new.iter().any(|condition| condition.type_ == type_) {
            true => ("NodeStatusUnknown", "Kubelet stopped posting node status."),
            false => ("NodeStatusNeverUpdated", "Kubelet never posted node status."),
        };
        let unknown = NodeCondition {
            type_: type_.to_owned(),
            status: "Unknown".to_owned(),
            reason: Some(reason.to_owned()),
            message: Some(message.to_owned()),
            last_heartbeat_time: node.metadata.creation_timestamp.clone(),
            last_transition_time: Some(Time(now)),
        };
        match new.iter_mut().find(|condition| condition.type_ == type_) {
            None => new.push(unknown),
            Some(condition) if condition.status != "Unknown" => {
                let last_heartbeat_time = condition.last_heartbeat_time.clone();
                *condition = NodeCondition { last_heartbeat_time, ..unknown };
            }
            Some(_) => {}
        }
    }
    (new != old).then_some(new)
}

/// The taints the node should have; `None` if it has them. Taints of others stay.
pub(super) fn taints(node: &Node, now: Timestamp) -> Option<Vec<Taint>> {
    let ready = condition(node, "Ready").map(|ready| ready.status.as_str());
    let mut wanted: Vec<(&str, &str)> = Vec::new();
    match ready {
        Some("True") => {}
        Some("Unknown") => wanted.extend([(UNREACHABLE, NO_SCHEDULE), (UNREACHABLE, NO_EXECUTE)]),
        // A node that has not said anything yet takes no pods, and there is nothing to evict.
        None => wanted.push((NOT_READY, NO_SCHEDULE)),
        Some(_) => wanted.extend([(NOT_READY, NO_SCHEDULE), (NOT_READY, NO_EXECUTE)]),
    }
    for (type_, taint) in PRESSURES {
        if condition(node, type_).is_some_and(|condition| condition.status == "True") {
            wanted.push((taint, NO_SCHEDULE));
        }
    }
    if node.spec.as_ref().and_then(|spec| spec.unschedulable).unwrap_or(false) {
        wanted.push((UNSCHEDULABLE, NO_SCHEDULE));
    }
    let old = node.spec.as_ref().and_then(|spec| spec.taints.clone()).unwrap_or_default();
    let is_wanted = |taint: &Taint| wanted.contains(&(taint.key.as_str(), taint.effect.as_str()));
    let mut new: Vec<Taint> = old.iter().filter(|taint| !is_managed(taint) || is_wanted(taint)).cloned().collect();
    for (key, effect) in wanted {
        if !new.iter().any(|taint| taint.key == key && taint.effect == effect) {
            let taint =
                Taint { key: key.to_owned(), effect: effect.to_owned(), time_added: Some(Time(now)), value: None };
            new.push(taint);
        }
    }
    (new != old).then_some(new)
}

fn is_managed(taint: &Taint) -> bool {
    let key = taint.key.as_str();
    let about_health = matches!(key, NOT_READY | UNREACHABLE);
    let about_state = key == UNSCHEDULABLE || PRESSURES.iter().any(|(_, pressure)| *pressure == key);
    (about_health && matches!(taint.effect.as_str(), NO_SCHEDULE | NO_EXECUTE))
        || (about_state && taint.effect == NO_SCHEDULE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn node(ready: Option<&str>, spec: Value) -> Node {
        let conditions: Vec<Value> = ready
            .map(|status| json!({"type": "Ready", "status": status, "lastHeartbeatTime": "2026-01-01T00:00:00Z"}))
            .into_iter()
            .collect();
        let value = json!({"metadata": {"name": "n"}, "spec": spec, "status": {"conditions": conditions}});
        serde_json::from_value(value).unwrap()
    }

    fn shown(node: &Node) -> Vec<String> {
        let taints = taints(node, Timestamp::UNIX_EPOCH).expect("a change");
        taints.iter().map(|taint| format!("{}:{}", taint.key.rsplit('/').next().unwrap(), taint.effect)).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_node_is_lost_after_the_grace_period_by_our_own_clock() {
        let at = |second| Some(Timestamp::from_second(second).unwrap());
        let heard = listen(None, (at(1), None), Instant::now());
        tokio::time::advance(Duration::from_secs(39)).await;
        let heard = listen(Some(&heard), (at(1), None), Instant::now());
        assert_eq!(time_left(&heard, Instant::now()), Duration::from_secs(1));
        let renewed = listen(Some(&heard), (at(2), None), Instant::now());
        assert_eq!(time_left(&renewed, Instant::now()), GRACE);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(time_left(&heard, Instant::now()), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_never_spoke_gets_more_time() {
        let heard = listen(None, (None, None), Instant::now());
        assert_eq!(time_left(&heard, Instant::now()), START_UP_GRACE);
    }

    #[test]
    fn silence_turns_every_condition_unknown_once() {
        let mut node = node(Some("True"), json!({}));
        let conditions = silenced(&node, Timestamp::UNIX_EPOCH).unwrap();
        assert_eq!(conditions.len(), 4);
        assert!(conditions.iter().all(|condition| condition.status == "Unknown"));
        assert_eq!(conditions[0].reason.as_deref(), Some("NodeStatusUnknown"));
        assert_eq!(conditions[1].reason.as_deref(), Some("NodeStatusNeverUpdated"));
        node.status.as_mut().unwrap().conditions = Some(conditions);
        assert_eq!(silenced(&node, Timestamp::UNIX_EPOCH), None);
    }

    #[test]
    fn taints_follow_conditions_and_leave_others_alone() {
        let foreign = json!({"taints": [{"key": "gpu", "effect": "NoSchedule"}]});
        assert_eq!(
            shown(&node(Some("False"), foreign.clone())),
            ["gpu:NoSchedule", "not-ready:NoSchedule", "not-ready:NoExecute"]
        );
        assert_eq!(shown(&node(Some("Unknown"), json!({}))), ["unreachable:NoSchedule", "unreachable:NoExecute"]);
        assert_eq!(shown(&node(None, json!({}))), ["not-ready:NoSchedule"]);
        assert_eq!(shown(&node(Some("True"), json!({"unschedulable": true}))), ["unschedulable:NoSchedule"]);
        assert_eq!(taints(&node(Some("True"), foreign), Timestamp::UNIX_EPOCH), None);
        let stale = json!({"taints": [{"key": NOT_READY, "effect": "NoExecute"}]});
        assert!(shown(&node(Some("True"), stale)).is_empty());
    }
}
