//! Which nodes a pod can run on, and why not on the others. `Facts` is what must be known of all nodes before one can
//! be judged (pods in each topology domain); `check` judges one. Pure.

use std::collections::HashMap;

use k8s_openapi::api::core::v1::Taint;
use oarlock_machinery::node_terms::node_selector_matches;

use crate::cache::NodeInfo;
use crate::pod::PodInfo;
use crate::storage::Needs;
use crate::terms::{Counted, Namespaces, PodTerm, Spread, tolerates};

/// The plugin that refused a node; events that cannot change its mind do not wake the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Plugin {
    NodeUnschedulable,
    NodeName,
    TaintToleration,
    NodeAffinity,
    NodePorts,
    NodeResourcesFit,
    PodTopologySpread,
    InterPodAffinity,
    /// The pod's claims can be served nowhere for now.
    VolumeClaims,
    /// A volume cannot be had on the node.
    VolumeBinding,
}

/// Why a node cannot take the pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub plugin: Plugin,
    pub reasons: Vec<String>,
    /// Whether removing pods from the node could help.
    pub resolvable: bool,
}

fn refuse(plugin: Plugin, resolvable: bool, reason: &str) -> Result<(), Refusal> {
    Err(Refusal { plugin, reasons: vec![reason.to_owned()], resolvable })
}

type Counts<'a> = HashMap<(&'a str, &'a str), i64>;

/// How the pods of a spread constraint are spread now.
pub(crate) struct SpreadFacts<'a> {
    pub constraint: &'a Spread,
    /// Matching pods by topology value, over eligible nodes; values without any pod are there with zero.
    pub by_value: HashMap<&'a str, i64>,
    /// One if the pod itself would be counted.
    pub own: i64,
}

impl SpreadFacts<'_> {
    fn least(&self) -> i64 {
        if (self.by_value.len() as i64) < self.constraint.min_domains {
            return 0;
        }
        self.by_value.values().copied().min().unwrap_or(0)
    }
}

/// What has to be known of all nodes before one can be judged.
pub(crate) struct Facts<'a> {
    pub hard_spread: Vec<SpreadFacts<'a>>,
    /// Topology pairs where a running pod does not want this one.
    unwelcome: Counts<'a>,
    /// For each required affinity term: matching pods by topology pair.
    wanted: Counts<'a>,
    unwanted: Vec<Counts<'a>>,
    /// No pod anywhere matches the affinity, and the pod matches it itself: it is the first of its kind.
    is_first: bool,
    /// What the pod's claims need.
    pub needs: Needs<'a>,
}

fn pairs<'a>(node: &'a NodeInfo, key: &'a str) -> Option<(&'a str, &'a str)> {
    node.labels.get(key).map(|value| (key, value.as_str()))
}

fn counts_pod(counted: &Counted, of: &PodInfo, pod: &PodInfo) -> bool {
    of.key.namespace == pod.key.namespace
        && !pod.terminating
        && match counted {
            Counted::Selector(selector) => selector.matches(Some(&pod.labels)),
            Counted::Controller(uid) => pod.controller_uid.as_ref() == Some(uid),
        }
}

pub(crate) fn spread_facts<'a>(
    pod: &PodInfo,
    constraints: Vec<&'a Spread>,
    nodes: impl Iterator<Item = &'a NodeInfo> + Clone,
) -> Vec<SpreadFacts<'a>> {
    let mut facts: Vec<SpreadFacts<'a>> = constraints
        .iter()
        .map(|constraint| {
            let own = match &constraint.counted {
                Counted::Selector(selector) => i64::from(selector.matches(Some(&pod.labels))),
                Counted::Controller(_) => 1,
            };
            SpreadFacts { constraint, by_value: HashMap::new(), own }
        })
        .collect();
    if facts.is_empty() {
        return facts;
    }
    for node in nodes {
        // A node that lacks one of the keys is no domain of any; the system's defaults are not that strict.
        let lacks =
            |constraint: &&Spread| !constraint.system_default && !node.labels.contains_key(&constraint.topology_key);
        if constraints.iter().any(lacks) {
            continue;
        }
        for facts in &mut facts {
            let Some(value) = node.labels.get(&facts.constraint.topology_key) else { continue };
            if facts.constraint.honours_affinity && !matches_node(pod, node)
                || facts.constraint.honours_taints && untolerated(pod, node).is_some()
            {
                continue;
            }
            let matching = node.pods.values().filter(|other| counts_pod(&facts.constraint.counted, pod, other));
            *facts.by_value.entry(value).or_default() += matching.count() as i64;
        }
    }
    facts
}

impl<'a> Facts<'a> {
    pub fn gather(
        pod: &'a PodInfo,
        nodes: impl Iterator<Item = &'a NodeInfo> + Clone,
        namespaces: &Namespaces,
    ) -> Self {
        let hard = pod.spread.iter().filter(|constraint| constraint.hard).collect();
        let hard_spread = spread_facts(pod, hard, nodes.clone());
        let mut unwelcome = Counts::new();
        let mut wanted = Counts::new();
        let mut unwanted = vec![Counts::new(); pod.anti_affinity.len()];
        for node in nodes {
            for other in node.pods.values() {
                for term in &other.anti_affinity {
                    if term.matches(&pod.key.namespace, &pod.labels, namespaces)
                        && let Some(pair) = pairs(node, &term.topology_key)
                    {
                        *unwelcome.entry(pair).or_default() += 1;
                    }
                }
                let matches = |term: &PodTerm| term.matches(&other.key.namespace, &other.labels, namespaces);
                if !pod.affinity.is_empty() && pod.affinity.iter().all(matches) {
                    for term in &pod.affinity {
                        if let Some(pair) = pairs(node, &term.topology_key) {
                            *wanted.entry(pair).or_default() += 1;
                        }
                    }
                }
                for (term, counts) in pod.anti_affinity.iter().zip(&mut unwanted) {
                    if matches(term)
                        && let Some(pair) = pairs(node, &term.topology_key)
                    {
                        *counts.entry(pair).or_default() += 1;
                    }
                }
            }
        }
        let matches_itself = pod.affinity.iter().all(|term| term.matches(&pod.key.namespace, &pod.labels, namespaces));
        let is_first = wanted.is_empty() && matches_itself;
        Self { hard_spread, unwelcome, wanted, unwanted, is_first, needs: Needs::default() }
    }
}

/// The first taint that keeps the pod away.
pub(crate) fn untolerated<'a>(pod: &PodInfo, node: &'a NodeInfo) -> Option<&'a Taint> {
    let hard = node.taints.iter().filter(|taint| matches!(taint.effect.as_str(), "NoSchedule" | "NoExecute"));
    hard.into_iter().find(|taint| !pod.tolerations.iter().any(|toleration| tolerates(toleration, taint)))
}

/// nodeSelector and required node affinity.
pub(crate) fn matches_node(pod: &PodInfo, node: &NodeInfo) -> bool {
    pod.node_selector.iter().all(|(key, value)| node.labels.get(key) == Some(value))
        && pod.required_nodes.as_ref().is_none_or(|selector| node_selector_matches(selector, &node.name, &node.labels))
}

/// Whether the pod can run on the node, with `reserved` pods counted as if they were there.
pub(crate) fn check(pod: &PodInfo, node: &NodeInfo, facts: &Facts<'_>, reserved: &[&PodInfo]) -> Result<(), Refusal> {
    check_node(pod, node)?;
    let taken = node.pods.values().flat_map(|other| &other.host_ports);
    let mut taken = taken.chain(reserved.iter().flat_map(|other| &other.host_ports));
    if taken.any(|port| pod.host_ports.iter().any(|wanted| wanted.conflicts(port))) {
        return refuse(Plugin::NodePorts, true, "node(s) didn't have free ports for the requested pod ports");
    }
    check_resources(pod, node, reserved)?;
    if let Err(reasons) = facts.needs.judge(node) {
        return Err(Refusal { plugin: Plugin::VolumeBinding, reasons, resolvable: false });
    }
    check_spread(node, facts)?;
    check_company(pod, node, facts)
}

fn check_node(pod: &PodInfo, node: &NodeInfo) -> Result<(), Refusal> {
    if node.unschedulable {
        let taint = Taint {
            key: "node.kubernetes.io/unschedulable".to_owned(),
            effect: "NoSchedule".to_owned(),
            ..Default::default()
        };
        if !pod.tolerations.iter().any(|toleration| tolerates(toleration, &taint)) {
            return refuse(Plugin::NodeUnschedulable, false, "node(s) were unschedulable");
        }
    }
    if !pod.node_name.is_empty() && pod.node_name != node.name {
        return refuse(Plugin::NodeName, false, "node(s) didn't match the requested node name");
    }
    if untolerated(pod, node).is_some() {
        return refuse(Plugin::TaintToleration, false, "node(s) had untolerated taint(s)");
    }
    if !matches_node(pod, node) {
        return refuse(Plugin::NodeAffinity, false, "node(s) didn't match Pod's node affinity/selector");
    }
    Ok(())
}

fn check_resources(pod: &PodInfo, node: &NodeInfo, reserved: &[&PodInfo]) -> Result<(), Refusal> {
    let mut used = node.requested.clone();
    reserved.iter().for_each(|other| used.add(&other.requests));
    let mut reasons = Vec::new();
    if (node.pods.len() + reserved.len()) as i64 + 1 > node.max_pods {
        reasons.push("Too many pods".to_owned());
    }
    let missing = pod.requests.insufficient(&used, &node.allocatable);
    reasons.extend(missing.into_iter().map(|name| format!("Insufficient {name}")));
    if reasons.is_empty() {
        return Ok(());
    }
    let hopeless = !pod.requests.insufficient(&Default::default(), &node.allocatable).is_empty();
    Err(Refusal { plugin: Plugin::NodeResourcesFit, reasons, resolvable: !hopeless })
}

fn check_spread(node: &NodeInfo, facts: &Facts<'_>) -> Result<(), Refusal> {
    for spread in &facts.hard_spread {
        let Some(value) = node.labels.get(&spread.constraint.topology_key) else {
            let reason = "node(s) didn't match pod topology spread constraints (missing required label)";
            return refuse(Plugin::PodTopologySpread, false, reason);
        };
        let here = spread.by_value.get(value.as_str()).copied().unwrap_or(0);
        if here + spread.own - spread.least() > spread.constraint.max_skew {
            return refuse(Plugin::PodTopologySpread, true, "node(s) didn't match pod topology spread constraints");
        }
    }
    Ok(())
}

fn check_company(pod: &PodInfo, node: &NodeInfo, facts: &Facts<'_>) -> Result<(), Refusal> {
    let count =
        |counts: &Counts<'_>, key: &str| pairs(node, key).and_then(|pair| counts.get(&pair).copied()).unwrap_or(0);
    let has_keys = pod.affinity.iter().all(|term| node.labels.contains_key(&term.topology_key));
    let together = pod.affinity.iter().all(|term| count(&facts.wanted, &term.topology_key) > 0);
    if !pod.affinity.is_empty() && !(has_keys && (together || facts.is_first)) {
        return refuse(Plugin::InterPodAffinity, false, "node(s) didn't match pod affinity rules");
    }
    let apart = pod.anti_affinity.iter().zip(&facts.unwanted);
    if apart.into_iter().any(|(term, counts)| count(counts, &term.topology_key) > 0) {
        return refuse(Plugin::InterPodAffinity, true, "node(s) didn't match pod anti-affinity rules");
    }
    let unwelcome = facts.unwelcome.keys().any(|(key, value)| node.labels.get(*key).is_some_and(|own| own == value));
    if unwelcome {
        return refuse(Plugin::InterPodAffinity, true, "node(s) didn't satisfy existing pods anti-affinity rules");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::Cache;
    use crate::cache::tests::{cache, cpu, merge, node, pod};
    use serde_json::{Value, json};
    use std::sync::Arc;

    fn verdicts(cache: &Cache, pod: &PodInfo) -> Vec<(String, String)> {
        let facts = Facts::gather(pod, cache.nodes(), &cache.namespaces);
        let mut all: Vec<(String, String)> = cache
            .nodes()
            .map(|node| {
                let verdict = check(pod, node, &facts, &[]).err().map(|refusal| refusal.reasons.join("+"));
                (node.name.clone(), verdict.unwrap_or_else(|| "fits".to_owned()))
            })
            .collect();
        all.sort();
        all
    }

    fn verdict(node_extra: Value, pod_extra: Value) -> String {
        verdicts(&cache(&[node("n", node_extra)], &[]), &pod("p", pod_extra)).remove(0).1
    }

    fn on(name: &str, at: &str, extra: Value) -> Arc<PodInfo> {
        let mut value = json!({"spec": {"nodeName": at}, "metadata": {"labels": {"app": "web"}}});
        merge(&mut value, &extra);
        pod(name, value)
    }

    #[test]
    fn plain_reasons() {
        let spec = |value: Value| json!({ "spec": value });
        assert_eq!(verdict(json!({}), json!({})), "fits");
        assert_eq!(verdict(spec(json!({"unschedulable": true})), json!({})), "node(s) were unschedulable");
        let taint = spec(json!({"taints": [{"key": "k", "value": "v", "effect": "NoSchedule"}]}));
        assert_eq!(verdict(taint.clone(), json!({})), "node(s) had untolerated taint(s)");
        let tolerating = spec(json!({"tolerations": [{"key": "k", "operator": "Exists"}]}));
        assert_eq!(verdict(taint, tolerating), "fits");
        let soft = spec(json!({"taints": [{"key": "k", "effect": "PreferNoSchedule"}]}));
        assert_eq!(verdict(soft, json!({})), "fits");
        let selecting = spec(json!({"nodeSelector": {"disk": "ssd"}}));
        assert_eq!(verdict(json!({}), selecting.clone()), "node(s) didn't match Pod's node affinity/selector");
        assert_eq!(verdict(json!({"metadata": {"labels": {"disk": "ssd"}}}), selecting), "fits");
        assert_eq!(verdict(json!({}), cpu("5")), "Insufficient cpu");
        assert_eq!(
            verdict(json!({"status": {"allocatable": {"pods": "0"}}}), cpu("5")),
            "Too many pods+Insufficient cpu"
        );
    }

    #[test]
    fn host_ports_are_taken_once() {
        let with_port = |port: i32| json!({"spec": {"containers": [{"name": "c", "ports": [{"containerPort": 1, "hostPort": port}]}]}});
        let cache = cache(&[node("n", json!({}))], &[on("a", "n", with_port(80))]);
        let taken = "node(s) didn't have free ports for the requested pod ports";
        assert_eq!(verdicts(&cache, &pod("b", with_port(80)))[0].1, taken);
        assert_eq!(verdicts(&cache, &pod("c", with_port(81)))[0].1, "fits");
    }

    #[test]
    fn only_a_shortage_that_pods_cause_can_be_resolved() {
        let cache = cache(&[node("n", json!({}))], &[on("a", "n", cpu("3"))]);
        let refusal = |wanted: &str| {
            let pod = pod("p", cpu(wanted));
            let facts = Facts::gather(&pod, cache.nodes(), &cache.namespaces);
            check(&pod, cache.node("n").unwrap(), &facts, &[]).unwrap_err()
        };
        assert!(refusal("2").resolvable);
        assert!(!refusal("5").resolvable);
    }

    fn zoned() -> [k8s_openapi::api::core::v1::Node; 3] {
        [("a1", "a"), ("a2", "a"), ("b1", "b")]
            .map(|(name, zone)| node(name, json!({"metadata": {"labels": {"zone": zone}}})))
    }

    fn spread(extra: Value) -> Value {
        let mut constraint = json!({"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule",
            "labelSelector": {"matchLabels": {"app": "web"}}});
        merge(&mut constraint, &extra);
        json!({"metadata": {"labels": {"app": "web"}}, "spec": {"topologySpreadConstraints": [constraint]}})
    }

    #[test]
    fn hard_spreading_keeps_the_skew() {
        let cache = cache(&zoned(), &[on("1", "a1", json!({}))]);
        let too_much = "node(s) didn't match pod topology spread constraints".to_owned();
        let all = verdicts(&cache, &pod("p", spread(json!({}))));
        assert_eq!(all.iter().map(|v| v.1.as_str()).collect::<Vec<_>>(), [too_much.as_str(), &too_much, "fits"]);
        let all = verdicts(&cache, &pod("p", spread(json!({"maxSkew": 2}))));
        assert!(all.iter().all(|verdict| verdict.1 == "fits"));
        // With a third domain asked for, two count as if one more were empty.
        let all = verdicts(&cache, &pod("p", spread(json!({"minDomains": 3}))));
        assert_eq!(all[2].1, "fits");
        assert_eq!(all[0].1, too_much);
        let missing = verdicts(&cache, &pod("p", spread(json!({"topologyKey": "rack"}))));
        assert_eq!(missing[0].1, "node(s) didn't match pod topology spread constraints (missing required label)");
    }

    fn company(kind: &str, app: &str) -> Value {
        json!({"metadata": {"labels": {"app": "web"}}, "spec": {"affinity": {kind: {
            "requiredDuringSchedulingIgnoredDuringExecution": [
                {"topologyKey": "zone", "labelSelector": {"matchLabels": {"app": app}}}]}}}})
    }

    #[test]
    fn affinity_goes_where_its_friends_are_and_the_first_may_go_anywhere() {
        let friends = cache(&zoned(), &[on("1", "b1", json!({}))]);
        let all = verdicts(&friends, &pod("p", company("podAffinity", "web")));
        assert_eq!(all[2].1, "fits");
        assert_eq!(all[0].1, "node(s) didn't match pod affinity rules");
        let alone = cache(&zoned(), &[]);
        assert!(verdicts(&alone, &pod("p", company("podAffinity", "web"))).iter().all(|v| v.1 == "fits"));
        assert!(verdicts(&alone, &pod("p", company("podAffinity", "db"))).iter().all(|v| v.1 != "fits"));
    }

    #[test]
    fn anti_affinity_holds_in_both_directions() {
        let cache = cache(&zoned(), &[on("1", "a1", company("podAntiAffinity", "web"))]);
        let newcomer = verdicts(&cache, &pod("p", json!({"metadata": {"labels": {"app": "web"}}})));
        assert_eq!(newcomer[1].1, "node(s) didn't satisfy existing pods anti-affinity rules");
        assert_eq!(newcomer[2].1, "fits");
        let wary = verdicts(&cache, &pod("q", company("podAntiAffinity", "web")));
        assert_eq!(wary[0].1, "node(s) didn't match pod anti-affinity rules");
    }

    #[test]
    fn room_promised_to_others_is_not_there() {
        let cache = cache(&[node("n", json!({}))], &[]);
        let (pod, promised) = (pod("p", cpu("2")), pod("q", cpu("3")));
        let facts = Facts::gather(&pod, cache.nodes(), &cache.namespaces);
        let node = cache.node("n").unwrap();
        assert!(check(&pod, node, &facts, &[]).is_ok());
        assert!(check(&pod, node, &facts, &[&promised]).is_err());
    }
}
