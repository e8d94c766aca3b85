//! One scheduling decision: from a pod and the cache to a node, or to the reasons why there is none. Pure but for the
//! dice that decide between equals.

use std::collections::HashMap;
use std::sync::Arc;

use crate::cache::{Cache, NodeInfo};
use crate::filter::{Facts, Plugin, Refusal, check};
use crate::message;
use crate::pod::PodInfo;
use crate::score;

/// Pods for which room is being made, by uid: they are counted on their node for pods that matter no more than they.
pub(crate) type Nominated = HashMap<String, (String, Arc<PodInfo>)>;

/// Below this number of nodes all are looked at; above, looking stops when enough possible ones are found.
const ALWAYS_ALL: usize = 100;

#[derive(Debug)]
pub(crate) enum Decision {
    Node(String),
    /// Nowhere, and why not on each node.
    Nowhere(Vec<(String, Refusal)>),
}

/// How many possible nodes are enough: a share that falls with the size of the cluster, from 50 % to 5 %.
fn enough(nodes: usize) -> usize {
    if nodes < ALWAYS_ALL {
        return nodes;
    }
    let percent = 50usize.saturating_sub(nodes / 125).max(5);
    (nodes * percent / 100).max(ALWAYS_ALL)
}

/// Pods nominated to `node` that come before `pod`.
pub(crate) fn reserved<'a>(pod: &PodInfo, node: &str, nominated: &'a Nominated) -> Vec<&'a PodInfo> {
    let others = nominated.values().filter(|(at, other)| at == node && other.uid != pod.uid);
    others.map(|(_, other)| other.as_ref()).filter(|other| other.priority >= pod.priority).collect()
}

/// Decides; `start` is where in the list of nodes to begin, and is moved on so that all nodes get their turn.
pub(crate) fn decide(pod: &PodInfo, cache: &Cache, nominated: &Nominated, start: &mut usize) -> Decision {
    let nodes: Vec<&NodeInfo> = cache.nodes().collect();
    if nodes.is_empty() {
        return Decision::Nowhere(Vec::new());
    }
    let needs = match cache.storage.needs(pod) {
        Ok(needs) => needs,
        Err(reason) => {
            let refusal = Refusal { plugin: Plugin::VolumeClaims, reasons: vec![reason], resolvable: false };
            return Decision::Nowhere(nodes.iter().map(|node| (node.name.clone(), refusal.clone())).collect());
        }
    };
    let mut facts = Facts::gather(pod, cache.nodes(), &cache.namespaces);
    facts.needs = needs;
    // Room was made for it there: that node first.
    if let Some((name, _)) = nominated.get(&pod.uid)
        && let Some(node) = cache.node(name).filter(|node| node.known)
        && check(pod, node, &facts, &reserved(pod, name, nominated)).is_ok()
    {
        return Decision::Node(name.clone());
    }
    let wanted = enough(nodes.len());
    let mut possible: Vec<&NodeInfo> = Vec::new();
    let mut refusals = Vec::new();
    let mut looked_at = 0;
    for step in 0..nodes.len() {
        let node = nodes[(*start + step) % nodes.len()];
        looked_at += 1;
        match check(pod, node, &facts, &reserved(pod, &node.name, nominated)) {
            Ok(()) => possible.push(node),
            Err(refusal) => refusals.push((node.name.clone(), refusal)),
        }
        if possible.len() >= wanted {
            break;
        }
    }
    *start = (*start + looked_at) % nodes.len();
    match possible.as_slice() {
        [] => Decision::Nowhere(refusals),
        [only] => Decision::Node(only.name.clone()),
        many => {
            let totals = score::totals(pod, many, cache);
            let best = totals.iter().copied().max().unwrap_or(0);
            let winners: Vec<&&NodeInfo> =
                many.iter().zip(&totals).filter(|(_, total)| **total == best).map(|(node, _)| node).collect();
            Decision::Node(winners[rand::random_range(0..winners.len())].name.clone())
        }
    }
}

/// Why the pod cannot be scheduled, without what preemption says.
pub(crate) fn explain(refusals: &[(String, Refusal)]) -> String {
    if refusals.is_empty() {
        return message::NO_NODES.to_owned();
    }
    // What is about the pod itself is said once and not for each node.
    if let Some((_, Refusal { plugin: Plugin::VolumeClaims, reasons, .. })) = refusals.first() {
        return format!("0/{} nodes are available: {}.", refusals.len(), reasons.join(", "));
    }
    let reasons = refusals.iter().flat_map(|(_, refusal)| refusal.reasons.iter().map(String::as_str));
    message::unavailable(refusals.len(), reasons)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::tests::{cache, cpu, node, pod};
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn reasons_of_all_nodes_are_collected() {
        let cache = cache(&[node("a", json!({"spec": {"unschedulable": true}})), node("b", json!({}))], &[]);
        let Decision::Nowhere(refusals) = decide(&pod("p", cpu("9")), &cache, &Nominated::new(), &mut 0) else {
            panic!("it does not fit")
        };
        assert_eq!(explain(&refusals), "0/2 nodes are available: 1 Insufficient cpu, 1 node(s) were unschedulable.");
        assert_eq!(explain(&[]), "no nodes available to schedule pods");
    }

    #[test]
    fn room_is_kept_for_a_nominated_pod() {
        let cache = cache(&[node("a", json!({}))], &[]);
        let mut important = cpu("4");
        important["spec"]["priority"] = json!(100);
        let important = pod("important", important);
        let nominated = Nominated::from([("important".to_owned(), ("a".to_owned(), important.clone()))]);
        assert!(matches!(decide(&pod("p", cpu("1")), &cache, &nominated, &mut 0), Decision::Nowhere(_)));
        assert!(matches!(decide(&important, &cache, &nominated, &mut 0), Decision::Node(name) if name == "a"));
    }

    #[test]
    fn a_pod_goes_where_its_volume_is() {
        use crate::storage::tests::{claim, user, volume_at};
        let mut cache = cache(&[node("a", json!({})), node("b", json!({}))], &[]);
        let pod = user("p", &["data"]);
        let nowhere = |cache: &Cache| match decide(&pod, cache, &Nominated::new(), &mut 0) {
            Decision::Nowhere(refusals) => explain(&refusals),
            Decision::Node(node) => panic!("it was given {node}"),
        };
        assert_eq!(nowhere(&cache), "0/2 nodes are available: persistentvolumeclaim \"data\" not found.");
        cache.storage.put_claim(claim("data", "local", "v", "Bound"));
        cache.storage.put_volume("v".to_owned(), volume_at("v", "b"));
        for _ in 0..20 {
            let decision = decide(&pod, &cache, &Nominated::new(), &mut 0);
            assert!(matches!(decision, Decision::Node(name) if name == "b"));
        }
        cache.storage.put_volume("v".to_owned(), volume_at("v", "c"));
        let reason = "0/2 nodes are available: 2 node(s) didn't match PersistentVolume's node affinity.";
        assert_eq!(nowhere(&cache), reason);
    }

    #[test]
    fn large_clusters_are_sampled() {
        assert_eq!([enough(50), enough(100), enough(1000), enough(20_000)], [50, 100, 420, 1000]);
    }

    proptest! {
        /// However pods come, no node is ever given more than it has.
        #[test]
        fn nodes_are_never_overcommitted(sizes in proptest::collection::vec(1i64..3000, 1..60)) {
            let mut cache = cache(&[node("a", json!({})), node("b", json!({})), node("c", json!({}))], &[]);
            let mut start = 0;
            for (number, size) in sizes.iter().enumerate() {
                let pod = pod(&format!("p{number}"), cpu(&format!("{size}m")));
                match decide(&pod, &cache, &Nominated::new(), &mut start) {
                    Decision::Node(node) => cache.assume(&pod, &node),
                    Decision::Nowhere(_) => {
                        for node in cache.nodes() {
                            prop_assert!(node.requested.cpu_milli + size > 4000, "there was room on {}", node.name);
                        }
                    }
                }
            }
            for node in cache.nodes() {
                prop_assert!(node.requested.cpu_milli <= 4000);
            }
        }
    }
}
