//! Which of the possible nodes is best. Each plugin gives 0 to 100, times its weight. Pure.

use std::collections::HashMap;

use oarlock_machinery::node_terms::node_term_matches;

use crate::cache::{Cache, NodeInfo};
use crate::filter::spread_facts;
use crate::pod::PodInfo;
use crate::terms::tolerates;

const MAX: i64 = 100;
const TAINT_TOLERATION: i64 = 3;
const NODE_AFFINITY: i64 = 2;
const POD_TOPOLOGY_SPREAD: i64 = 2;
const INTER_POD_AFFINITY: i64 = 2;
const RESOURCES_FIT: i64 = 1;
const BALANCED_ALLOCATION: i64 = 1;
const IMAGE_LOCALITY: i64 = 1;

/// A required affinity of a running pod is worth this much as a preference in the other direction.
const HARD_AFFINITY_WEIGHT: i64 = 1;

/// The total of each node, in their order.
pub(crate) fn totals(pod: &PodInfo, nodes: &[&NodeInfo], cache: &Cache) -> Vec<i64> {
    let mut totals = vec![0; nodes.len()];
    let mut add = |weight: i64, scores: Vec<i64>| {
        totals.iter_mut().zip(scores).for_each(|(total, score)| *total += weight * score);
    };
    add(RESOURCES_FIT, nodes.iter().map(|node| least_allocated(pod, node)).collect());
    add(BALANCED_ALLOCATION, nodes.iter().map(|node| balanced(pod, node)).collect());
    if nodes.iter().any(|node| !node.taints.is_empty()) {
        add(TAINT_TOLERATION, normalised(nodes.iter().map(|node| soft_taints(pod, node)).collect(), true));
    }
    if !pod.preferred_nodes.is_empty() {
        add(NODE_AFFINITY, normalised(nodes.iter().map(|node| preferred_weight(pod, node)).collect(), false));
    }
    if let Some(scores) = spreading(pod, nodes, cache) {
        add(POD_TOPOLOGY_SPREAD, scores);
    }
    if let Some(scores) = company(pod, nodes, cache) {
        add(INTER_POD_AFFINITY, scores);
    }
    if nodes.len() > 1 {
        add(IMAGE_LOCALITY, image_locality(pod, nodes, cache));
    }
    totals
}

/// Scales to 0..=100 by the largest; `reversed` gives the smallest the most.
fn normalised(mut scores: Vec<i64>, reversed: bool) -> Vec<i64> {
    let max = scores.iter().copied().max().unwrap_or(0);
    for score in &mut scores {
        *score = if max == 0 { 0 } else { *score * MAX / max };
        if reversed {
            *score = MAX - *score;
        }
    }
    scores
}

fn least_allocated(pod: &PodInfo, node: &NodeInfo) -> i64 {
    let resources = [
        (node.allocatable.cpu_milli, node.usage.cpu_milli + pod.usage.cpu_milli),
        (node.allocatable.memory_bytes, node.usage.memory_bytes + pod.usage.memory_bytes),
    ];
    let counted = resources.iter().filter(|(capacity, _)| *capacity > 0);
    let free = |(capacity, used): &(i64, i64)| {
        if used > capacity {
            0
        } else {
            i64::try_from(i128::from(capacity - used) * 100 / i128::from(*capacity)).unwrap_or(0)
        }
    };
    let scores: Vec<i64> = counted.map(free).collect();
    if scores.is_empty() { 0 } else { scores.iter().sum::<i64>() / scores.len() as i64 }
}

fn balanced(pod: &PodInfo, node: &NodeInfo) -> i64 {
    let asks = pod.requests.cpu_milli > 0 || pod.requests.memory_bytes > 0;
    if !asks {
        return 0;
    }
    let fraction = |capacity: i64, used: i64| (capacity > 0).then(|| (used as f64 / capacity as f64).min(1.0));
    let cpu = fraction(node.allocatable.cpu_milli, node.requested.cpu_milli + pod.requests.cpu_milli);
    let memory = fraction(node.allocatable.memory_bytes, node.requested.memory_bytes + pod.requests.memory_bytes);
    let deviation = cpu.zip(memory).map_or(0.0, |(cpu, memory)| (cpu - memory).abs() / 2.0);
    ((1.0 - deviation) * MAX as f64) as i64
}

fn soft_taints(pod: &PodInfo, node: &NodeInfo) -> i64 {
    let soft = node.taints.iter().filter(|taint| taint.effect == "PreferNoSchedule");
    soft.filter(|taint| !pod.tolerations.iter().any(|toleration| tolerates(toleration, taint))).count() as i64
}

fn preferred_weight(pod: &PodInfo, node: &NodeInfo) -> i64 {
    let matching =
        pod.preferred_nodes.iter().filter(|term| node_term_matches(&term.preference, &node.name, &node.labels));
    matching.map(|term| i64::from(term.weight)).sum()
}

fn spreading(pod: &PodInfo, nodes: &[&NodeInfo], cache: &Cache) -> Option<Vec<i64>> {
    let soft: Vec<_> = pod.spread.iter().filter(|constraint| !constraint.hard).collect();
    if soft.is_empty() {
        return None;
    }
    let facts = spread_facts(pod, soft, cache.nodes());
    // A domain counts only if a possible node is in it.
    let sizes: Vec<f64> = facts
        .iter()
        .map(|fact| {
            let values: std::collections::HashSet<&String> =
                nodes.iter().filter_map(|node| node.labels.get(&fact.constraint.topology_key)).collect();
            (values.len() as f64 + 2.0).ln()
        })
        .collect();
    let score = |node: &&NodeInfo| -> Option<i64> {
        let mut total = 0.0;
        for (fact, weight) in facts.iter().zip(&sizes) {
            match node.labels.get(&fact.constraint.topology_key) {
                Some(value) => {
                    let here = fact.by_value.get(value.as_str()).copied().unwrap_or(0);
                    total += here as f64 * weight + (fact.constraint.max_skew - 1) as f64;
                }
                None if fact.constraint.system_default => {}
                None => return None,
            }
        }
        Some(total.round() as i64)
    };
    let raw: Vec<Option<i64>> = nodes.iter().map(score).collect();
    let (min, max) = (raw.iter().flatten().min().copied()?, raw.iter().flatten().max().copied()?);
    let scaled = raw.into_iter().map(|score| match score {
        None => 0,
        Some(_) if max == 0 => MAX,
        Some(score) => MAX * (max + min - score) / max,
    });
    Some(scaled.collect())
}

fn company(pod: &PodInfo, nodes: &[&NodeInfo], cache: &Cache) -> Option<Vec<i64>> {
    let mut weights: HashMap<(&str, &str), i64> = HashMap::new();
    for node in cache.nodes() {
        let mut add = |key: &'_ str, weight: i64| {
            if let Some((key, value)) = node.labels.get_key_value(key) {
                *weights.entry((key, value)).or_default() += weight;
            }
        };
        for other in node.pods.values() {
            for (weight, term) in &pod.preferences {
                if term.matches(&other.key.namespace, &other.labels, &cache.namespaces) {
                    add(&term.topology_key, *weight);
                }
            }
            let wanted = other.affinity.iter().map(|term| (HARD_AFFINITY_WEIGHT, term));
            let liked = other.preferences.iter().map(|(weight, term)| (*weight, term));
            for (weight, term) in wanted.chain(liked) {
                if term.matches(&pod.key.namespace, &pod.labels, &cache.namespaces) {
                    add(&term.topology_key, weight);
                }
            }
        }
    }
    if weights.is_empty() {
        return None;
    }
    let raw: Vec<i64> = nodes
        .iter()
        .map(|node| {
            let pairs = node.labels.iter().filter_map(|(key, value)| weights.get(&(key.as_str(), value.as_str())));
            pairs.sum()
        })
        .collect();
    let (min, max) = (raw.iter().min().copied()?, raw.iter().max().copied()?);
    Some(raw.iter().map(|score| if max == min { 0 } else { MAX * (score - min) / (max - min) }).collect())
}

fn image_locality(pod: &PodInfo, nodes: &[&NodeInfo], cache: &Cache) -> Vec<i64> {
    const MEGABYTE: i64 = 1024 * 1024;
    let least = 23 * MEGABYTE;
    let most = 1000 * MEGABYTE * pod.images.len().max(1) as i64;
    let all = cache.nodes().count().max(1) as f64;
    let sizes = |node: &&NodeInfo| {
        let present = pod.images.iter().filter_map(|image| {
            let image = normalised_image(image);
            let size = *node.images.get(image.as_str())?;
            let having = cache.nodes().filter(|node| node.images.contains_key(image.as_str())).count() as f64;
            Some((size as f64 * having / all) as i64)
        });
        let total: i64 = present.sum();
        MAX * (total.clamp(least, most) - least) / (most - least)
    };
    nodes.iter().map(sizes).collect()
}

/// Nodes report images with a tag.
fn normalised_image(image: &str) -> String {
    let last = image.rsplit('/').next().unwrap_or(image);
    if last.contains(':') || last.contains('@') { image.to_owned() } else { format!("{image}:latest") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::tests::{cache, cpu, merge, node, pod};
    use serde_json::{Value, json};

    fn best(cache: &Cache, pod: &PodInfo) -> String {
        let mut nodes: Vec<&NodeInfo> = cache.nodes().collect();
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        let totals = totals(pod, &nodes, cache);
        let best =
            totals.iter().enumerate().max_by_key(|(index, total)| (**total, std::cmp::Reverse(*index))).unwrap().0;
        nodes[best].name.clone()
    }

    fn on(name: &str, at: &str, extra: Value) -> std::sync::Arc<PodInfo> {
        let mut value = json!({"spec": {"nodeName": at}, "metadata": {"labels": {"app": "web"}}});
        merge(&mut value, &extra);
        pod(name, value)
    }

    #[test]
    fn the_emptier_node_wins() {
        let cache = cache(&[node("a", json!({})), node("b", json!({}))], &[on("1", "a", cpu("2"))]);
        assert_eq!(best(&cache, &pod("p", cpu("1"))), "b");
    }

    #[test]
    fn pods_of_one_controller_spread_by_default() {
        let owned = json!({"metadata": {"ownerReferences": [
            {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "r", "uid": "r", "controller": true}]}});
        let cache = cache(&[node("a", json!({})), node("b", json!({}))], &[on("1", "a", owned.clone())]);
        assert_eq!(best(&cache, &pod("p", owned)), "b");
    }

    #[test]
    fn soft_taints_and_preferences_count() {
        let tainted = node("a", json!({"spec": {"taints": [{"key": "k", "effect": "PreferNoSchedule"}]}}));
        assert_eq!(best(&cache(&[tainted, node("b", json!({}))], &[]), &pod("p", json!({}))), "b");
        let preferring = json!({"spec": {"affinity": {"nodeAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 10, "preference": {
                "matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": ["b"]}]}}]}}}});
        assert_eq!(best(&cache(&[node("a", json!({})), node("b", json!({}))], &[]), &pod("p", preferring)), "b");
    }

    #[test]
    fn preferred_company_attracts_and_repels() {
        let wish = |kind: &str| {
            json!({"spec": {"affinity": {kind: {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100,
                "podAffinityTerm": {"topologyKey": "kubernetes.io/hostname",
                                    "labelSelector": {"matchLabels": {"app": "web"}}}}]}}}})
        };
        let nodes = [node("a", json!({})), node("b", json!({}))];
        let cache = cache(&nodes, &[on("1", "b", json!({}))]);
        assert_eq!(best(&cache, &pod("p", wish("podAffinity"))), "b");
        assert_eq!(best(&cache, &pod("p", wish("podAntiAffinity"))), "a");
    }

    #[test]
    fn a_node_that_has_the_image_wins() {
        let has = json!({"status": {"images": [{"names": ["i:latest"], "sizeBytes": 900_000_000}]}});
        assert_eq!(best(&cache(&[node("a", json!({})), node("b", has)], &[]), &pod("p", json!({}))), "b");
    }
}
