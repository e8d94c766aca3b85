//! Which zone each endpoint is meant for, for Services that ask for `service.kubernetes.io/topology-mode: Auto`: as many
//! endpoints for a zone as its share of the cluster's processors, so that no zone's endpoints get much more than the others'. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Node, Service};
use kube::ResourceExt;
use oarlock_machinery::quantity;

use super::backends;

const MODE_ANNOTATION: &str = "service.kubernetes.io/topology-mode";
/// The annotation's former name, which goes first where both are there, as upstream has it.
const FORMER_ANNOTATION: &str = "service.kubernetes.io/topology-aware-hints";
const CONTROL_PLANE_LABELS: [&str; 2] = ["node-role.kubernetes.io/control-plane", "node-role.kubernetes.io/master"];
/// How much more than its share an endpoint may get, as a part of the share.
const OVERLOAD: f64 = 0.2;

/// Whether a Service leaves it to the cluster which endpoints are for which zone.
pub(super) fn is_automatic(service: &Service) -> bool {
    let annotations = service.annotations();
    let mode = annotations.get(FORMER_ANNOTATION).or_else(|| annotations.get(MODE_ANNOTATION));
    mode.is_some_and(|mode| mode == "Auto" || mode == "auto")
}

/// What of a node matters here: its zone and its processors, in thousandths. `None` for nodes that take no ordinary pods'
/// clients.
pub(super) fn of_node(node: &Node) -> Option<(Option<&String>, i64)> {
    let is_control_plane = CONTROL_PLANE_LABELS.iter().any(|label| node.labels().contains_key(*label));
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let is_ready = conditions.into_iter().any(|one| one.type_ == "Ready" && one.status == "True");
    if is_control_plane || !is_ready {
        return None;
    }
    let allocatable = node.status.as_ref().and_then(|status| status.allocatable.as_ref());
    let cpu = allocatable.and_then(|all| all.get("cpu"));
    Some((backends::zone(node), cpu.map_or(0, quantity::milli)))
}

/// The share of each zone of the processors of all. None where a node's zone or size is not known, or all are in one zone:
/// then nothing can be said.
pub(super) fn shares<'a>(nodes: impl Iterator<Item = (Option<&'a String>, i64)>) -> Option<BTreeMap<String, f64>> {
    let mut by_zone: BTreeMap<String, i64> = BTreeMap::new();
    for (zone, cpu) in nodes {
        *by_zone.entry(zone.filter(|_| cpu > 0)?.clone()).or_default() += cpu;
    }
    let total: i64 = by_zone.values().sum();
    (by_zone.len() > 1).then(|| by_zone.into_iter().map(|(zone, cpu)| (zone, cpu as f64 / total as f64)).collect())
}

/// The zone that each of these ready endpoints is meant for, given the zones that they are in. None where they are too few, or
/// one is in a zone that nobody knows: then all are meant for everybody.
pub(super) fn allot(zones: &[Option<&str>], shares: &BTreeMap<String, f64>) -> Option<Vec<String>> {
    let count = zones.len();
    let lowest = |share: f64| (share * count as f64 / (1.0 + OVERLOAD)).ceil().max(1.0) as usize;
    if count < shares.len() || shares.values().map(|share| lowest(*share)).sum::<usize>() > count {
        return None;
    }
    let mut meant: Vec<String> = Vec::with_capacity(count);
    for zone in zones {
        meant.push(zone.filter(|zone| shares.contains_key(*zone))?.to_owned());
    }
    let targets = targets(count, shares);
    let has = |meant: &[String], zone: &str| meant.iter().filter(|one| *one == zone).count();
    // An endpoint stays in its zone unless another one has too few and this one more than it needs.
    for (zone, target) in &targets {
        while has(&meant, zone) < *target {
            let giver = targets.iter().find(|(other, target)| has(&meant, other) > **target).map(|(other, _)| other)?;
            let last = meant.iter().rposition(|one| one == giver)?;
            meant[last].clone_from(zone);
        }
    }
    Some(meant)
}

/// How many endpoints each zone is to have: its share of them, rounded so that all are given out and none has nothing.
fn targets(count: usize, shares: &BTreeMap<String, f64>) -> BTreeMap<String, usize> {
    let exact = |share: f64| share * count as f64;
    let mut targets: BTreeMap<String, usize> =
        shares.iter().map(|(zone, share)| (zone.clone(), (exact(*share) as usize).max(1))).collect();
    let mut by_rest: Vec<(&String, f64)> = shares.iter().map(|(zone, share)| (zone, exact(*share).fract())).collect();
    by_rest.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(b.0)));
    let given: usize = targets.values().sum();
    for (zone, _) in by_rest.into_iter().cycle().take(count.saturating_sub(given)) {
        targets.entry(zone.clone()).and_modify(|target| *target += 1);
    }
    // Zones that have one although their share is less take it from the largest.
    for _ in count..given {
        if let Some((_, largest)) = targets.iter_mut().max_by_key(|(_, target)| **target) {
            *largest -= 1;
        }
    }
    targets
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn node(zone: Option<&str>, cpu: &str, more: Value) -> Node {
        let mut labels = more;
        if let Some(zone) = zone {
            labels["topology.kubernetes.io/zone"] = zone.into();
        }
        serde_json::from_value(json!({
            "metadata": {"name": "n", "labels": labels},
            "status": {"allocatable": {"cpu": cpu}, "conditions": [{"type": "Ready", "status": "True"}]},
        }))
        .unwrap()
    }

    fn shares_of(nodes: &[Node]) -> Option<BTreeMap<String, f64>> {
        shares(nodes.iter().filter_map(of_node))
    }

    fn counts(zones: &[&str], shares: &[(&str, f64)]) -> Option<Vec<(String, usize)>> {
        let zones: Vec<Option<&str>> = zones.iter().map(|zone| Some(*zone)).collect();
        let shares: BTreeMap<String, f64> = shares.iter().map(|(zone, share)| ((*zone).to_owned(), *share)).collect();
        let meant = allot(&zones, &shares)?;
        Some(shares.keys().map(|zone| (zone.clone(), meant.iter().filter(|one| *one == zone).count())).collect())
    }

    #[test]
    fn zones_count_by_the_processors_of_their_ordinary_nodes() {
        let server = node(Some("a"), "64", json!({"node-role.kubernetes.io/control-plane": ""}));
        let nodes = [node(Some("a"), "2", json!({})), node(Some("b"), "1500m", json!({})), server];
        let shares = shares_of(&nodes).unwrap();
        assert_eq!((shares.len(), shares["a"] > 0.57 && shares["a"] < 0.58), (2, true));
        assert_eq!(shares_of(&nodes[..1]), None, "one zone");
        assert_eq!(
            shares_of(&[nodes[0].clone(), nodes[1].clone(), node(None, "1", json!({}))]),
            None,
            "a node of no zone"
        );
    }

    #[test]
    fn endpoints_are_for_their_own_zone_as_far_as_shares_allow() {
        let halves = [("a", 0.5), ("b", 0.5)];
        let of = |zone: &str, number| (zone.to_owned(), number);
        assert_eq!(counts(&["a", "b", "b"], &halves), None, "one would get a third more than its share");
        assert_eq!(counts(&["a", "a", "a", "b"], &halves), Some(vec![of("a", 2), of("b", 2)]));
        assert_eq!(counts(&["a", "a", "b", "b"], &halves), Some(vec![of("a", 2), of("b", 2)]));
        assert_eq!(counts(&["a"], &halves), None, "too few for two zones");
        assert_eq!(counts(&["a", "c", "b"], &halves), None, "a zone without nodes");
        let uneven = [("a", 0.1), ("b", 0.9)];
        assert_eq!(counts(&["a"; 10], &uneven), Some(vec![of("a", 1), of("b", 9)]));
    }
}
