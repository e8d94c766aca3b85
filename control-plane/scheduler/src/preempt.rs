//! Preemption: which pods of lower priority to remove so that a more important one fits. Pure.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::sync::Arc;

use oarlock_machinery::Selector;

use crate::cache::{Cache, NodeInfo};
use crate::cycle::{Nominated, reserved};
use crate::filter::{Facts, Refusal, check};
use crate::message;
use crate::pod::PodInfo;

/// At most this many nodes are tried.
const CANDIDATE_LIMIT: usize = 100;

/// A PodDisruptionBudget.
#[derive(Clone, Debug)]
pub(crate) struct Budget {
    pub namespace: String,
    pub selector: Selector,
    pub allowed: i32,
    /// Pods whose eviction was allowed already.
    pub pending: BTreeSet<String>,
}

/// Remove these, and the pod fits here.
#[derive(Debug)]
pub(crate) struct Candidate {
    pub node: String,
    pub victims: Vec<Arc<PodInfo>>,
    violations: usize,
}

/// The best candidate, or what to say about why there is none.
pub(crate) fn plan(
    pod: &PodInfo,
    cache: &Cache,
    refusals: &[(String, Refusal)],
    budgets: &[Budget],
    nominated: &Nominated,
) -> Result<Candidate, String> {
    if refusals.is_empty() {
        return Err(String::new());
    }
    if !pod.may_preempt {
        return Err("not eligible due to preemptionPolicy=Never.".to_owned());
    }
    if let Some((name, _)) = nominated.get(&pod.uid) {
        let going = |other: &Arc<PodInfo>| other.terminating && other.priority < pod.priority;
        if cache.node(name).is_some_and(|node| node.pods.values().any(going)) {
            return Err("not eligible due to a terminating pod on the nominated node.".to_owned());
        }
    }
    let mut reasons: Vec<&str> = Vec::new();
    let mut best: Option<Candidate> = None;
    let mut found = 0;
    for (name, refusal) in refusals {
        let node = cache.node(name).filter(|_| refusal.resolvable && found < CANDIDATE_LIMIT);
        let Some(node) = node else {
            reasons.push(message::PREEMPTION_USELESS);
            continue;
        };
        match on_node(pod, node, cache, budgets, nominated) {
            None => reasons.push(message::NO_VICTIMS),
            Some(candidate) => {
                found += 1;
                if best.as_ref().is_none_or(|best| rank(&candidate) < rank(best)) {
                    best = Some(candidate);
                }
            }
        }
    }
    best.ok_or_else(|| message::unavailable(refusals.len(), reasons.into_iter()))
}

/// Less is better: fewest broken budgets, least important victims, least importance in all, fewest victims, and of
/// those the ones that started last.
fn rank(candidate: &Candidate) -> impl Ord + use<> {
    let highest = candidate.victims.iter().map(|victim| victim.priority).max().unwrap_or(i32::MIN);
    let sum: i64 = candidate.victims.iter().map(|victim| i64::from(victim.priority) + i64::from(i32::MAX) + 1).sum();
    let most_important = candidate.victims.iter().filter(|victim| victim.priority == highest);
    let earliest = most_important.filter_map(|victim| victim.started).min();
    (candidate.violations, highest, sum, candidate.victims.len(), Reverse(earliest))
}

fn on_node(
    pod: &PodInfo,
    node: &NodeInfo,
    cache: &Cache,
    budgets: &[Budget],
    nominated: &Nominated,
) -> Option<Candidate> {
    let mut lower: Vec<Arc<PodInfo>> =
        node.pods.values().filter(|other| other.priority < pod.priority).cloned().collect();
    if lower.is_empty() {
        return None;
    }
    let needs = cache.storage.needs(pod).ok()?;
    let mut trial = node.clone();
    lower.iter().for_each(|other| drop(trial.remove(&other.uid)));
    let reserved = reserved(pod, &node.name, nominated);
    let fits = |trial: &NodeInfo| {
        let others = cache.nodes().filter(|other| other.name != node.name).chain(std::iter::once(trial));
        let mut facts = Facts::gather(pod, others, &cache.namespaces);
        facts.needs = needs.clone();
        check(pod, trial, &facts, &reserved).is_ok()
    };
    if !fits(&trial) {
        return None;
    }
    // Pods that matter most, and have run longest, get back first.
    lower.sort_by_key(|other| (Reverse(other.priority), other.started.is_none(), other.started));
    let (protected, free) = split_by_budget(lower, budgets);
    let mut victims = Vec::new();
    let mut violations = 0;
    for (list, counts) in [(protected, true), (free, false)] {
        for other in list {
            trial.add(other.clone());
            if !fits(&trial) {
                trial.remove(&other.uid);
                violations += usize::from(counts);
                victims.push(other);
            }
        }
    }
    Some(Candidate { node: node.name.clone(), victims, violations })
}

/// Pods whose removal would break a budget, and the others.
fn split_by_budget(pods: Vec<Arc<PodInfo>>, budgets: &[Budget]) -> (Vec<Arc<PodInfo>>, Vec<Arc<PodInfo>>) {
    let mut left: Vec<i32> = budgets.iter().map(|budget| budget.allowed).collect();
    pods.into_iter().partition(|pod| {
        let mut breaks = false;
        for (budget, left) in budgets.iter().zip(&mut left) {
            if budget.namespace == pod.key.namespace
                && budget.selector.matches(Some(&pod.labels))
                && !budget.pending.contains(&pod.key.name)
            {
                *left -= 1;
                breaks |= *left < 0;
            }
        }
        breaks
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::tests::{cache, cpu, node, pod};
    use crate::cycle::{Decision, decide};
    use serde_json::json;

    fn running(name: &str, at: &str, amount: &str, priority: i32) -> Arc<PodInfo> {
        let mut value = cpu(amount);
        value["metadata"] = json!({"labels": {"app": name}});
        value["spec"]["nodeName"] = json!(at);
        value["spec"]["priority"] = json!(priority);
        pod(name, value)
    }

    fn incoming(amount: &str, priority: i32) -> Arc<PodInfo> {
        let mut value = cpu(amount);
        value["spec"]["priority"] = json!(priority);
        pod("incoming", value)
    }

    fn try_plan(pod: &PodInfo, cache: &Cache, budgets: &[Budget]) -> Result<(String, Vec<String>), String> {
        let Decision::Nowhere(refusals) = decide(pod, cache, &Nominated::new(), &mut 0) else { panic!("it fits") };
        plan(pod, cache, &refusals, budgets, &Nominated::new()).map(|candidate| {
            let mut names: Vec<String> = candidate.victims.iter().map(|victim| victim.key.name.clone()).collect();
            names.sort();
            (candidate.node, names)
        })
    }

    #[test]
    fn only_as_many_as_needed_go_and_the_least_important_first() {
        let pods = [running("low", "a", "2", 1), running("mid", "a", "2", 5), running("top", "b", "4", 100)];
        let cache = cache(&[node("a", json!({})), node("b", json!({}))], &pods);
        assert_eq!(try_plan(&incoming("2", 50), &cache, &[]), Ok(("a".into(), vec!["low".into()])));
        assert_eq!(try_plan(&incoming("4", 50), &cache, &[]), Ok(("a".into(), vec!["low".into(), "mid".into()])));
    }

    #[test]
    fn nothing_goes_for_a_pod_that_matters_no_more() {
        let cache = cache(&[node("a", json!({}))], &[running("equal", "a", "4", 0)]);
        assert_eq!(
            try_plan(&incoming("1", 0), &cache, &[]),
            Err("0/1 nodes are available: 1 No preemption victims found for incoming pod.".into())
        );
        assert_eq!(
            try_plan(&incoming("9", 10), &cache, &[]),
            Err("0/1 nodes are available: 1 Preemption is not helpful for scheduling.".into())
        );
    }

    #[test]
    fn budgets_are_kept_where_there_is_a_choice() {
        let pods = [running("guarded", "a", "4", 1), running("plain", "b", "4", 1)];
        let cache = cache(&[node("a", json!({})), node("b", json!({}))], &pods);
        let selector = serde_json::from_value(json!({"matchLabels": {"app": "guarded"}})).unwrap();
        let budget = Budget {
            namespace: "default".into(),
            selector: Selector::from_label_selector(&selector).unwrap(),
            allowed: 0,
            pending: BTreeSet::new(),
        };
        assert_eq!(try_plan(&incoming("1", 9), &cache, &[budget]), Ok(("b".into(), vec!["plain".into()])));
    }

    #[test]
    fn a_pod_may_say_that_it_never_preempts() {
        let cache = cache(&[node("a", json!({}))], &[running("low", "a", "4", 0)]);
        let mut value = cpu("1");
        value["spec"]["priority"] = json!(9);
        value["spec"]["preemptionPolicy"] = json!("Never");
        let refused = try_plan(&pod("p", value), &cache, &[]);
        assert_eq!(refused, Err("not eligible due to preemptionPolicy=Never.".into()));
    }
}
