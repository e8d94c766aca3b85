//! Which pods make room for one that the node needs. Pure.
//!
//! Follows the kubelet's preemption: pods of a lower class go first (best effort, burstable, guaranteed), as few as possible,
//! and of equal ones those that ask for less.

use std::cmp::Ordering;

use k8s_openapi::api::core::v1::Pod;

use crate::eviction;
use crate::spec::resources::{Amounts, Qos, pod_requests, qos_of};

/// Reason of the Failed status and of the event.
pub(crate) const REASON: &str = "Preempting";
/// Message of both.
pub(crate) const MESSAGE: &str = "Preempted in order to admit critical pod";

/// What a pod gives back when it goes, in thousandths.
fn request(pod: &Pod, resource: &str) -> i64 {
    if resource == "pods" { 1000 } else { pod_requests(pod).get(resource).copied().unwrap_or(0) }
}

/// Whether `pod` may take the place of `other`.
fn comes_before(pod: &Pod, other: &Pod) -> bool {
    let priority = |pod: &Pod| pod.spec.as_ref().and_then(|spec| spec.priority);
    let higher = priority(pod).zip(priority(other)).is_some_and(|(own, other)| own > other);
    higher || (eviction::is_critical(pod) && !eviction::is_critical(other))
}

/// The pods of `others`, by their places, that go so that what `pod` is short of is free. None for a pod that the node can
/// do without, or when even all that may go would not be enough.
pub(crate) fn victims(pod: &Pod, others: &[&Pod], lacking: &Amounts) -> Option<Vec<usize>> {
    if !eviction::is_critical(pod) {
        return None;
    }
    let of_class = |class: Qos| -> Vec<usize> {
        let fits = |index: &usize| comes_before(pod, others[*index]) && qos_of(others[*index]) == class;
        (0..others.len()).filter(fits).collect()
    };
    let (best_effort, burstable, guaranteed) =
        (of_class(Qos::BestEffort), of_class(Qos::Burstable), of_class(Qos::Guaranteed));
    let without =
        |gone: &[&[usize]]| less(lacking, others, &gone.iter().copied().flatten().copied().collect::<Vec<_>>());
    // Of each class only what is still lacking when all below it and the chosen ones above it are gone.
    let guaranteed = nearest(guaranteed, others, without(&[&best_effort, &burstable]))?;
    let burstable = nearest(burstable, others, without(&[&best_effort, &guaranteed]))?;
    let best_effort = nearest(best_effort, others, without(&[&burstable, &guaranteed]))?;
    Some([best_effort, burstable, guaranteed].concat())
}

/// What is still lacking when these pods are gone.
fn less(lacking: &Amounts, others: &[&Pod], gone: &[usize]) -> Amounts {
    let freed = |name: &str| gone.iter().map(|index| request(others[*index], name)).fold(0, i64::saturating_add);
    let left = lacking.iter().map(|(name, amount)| (name.clone(), amount - freed(name)));
    left.filter(|(_, amount)| *amount > 0).collect()
}

/// The candidates that go, one by one the one that leaves least lacking.
fn nearest(mut candidates: Vec<usize>, others: &[&Pod], mut lacking: Amounts) -> Option<Vec<usize>> {
    let mut chosen = Vec::new();
    while !lacking.is_empty() {
        let better = |a: &&usize, b: &&usize| {
            let (a, b) = (others[**a], others[**b]);
            distance(a, &lacking).total_cmp(&distance(b, &lacking)).then_with(|| smaller(a, b))
        };
        let best = candidates.iter().min_by(better).copied()?;
        candidates.retain(|index| *index != best);
        lacking = less(&lacking, others, &[best]);
        chosen.push(best);
    }
    Some(chosen)
}

/// How far a pod's end would be from what is lacking: each resource counts the same, whatever its unit.
fn distance(pod: &Pod, lacking: &Amounts) -> f64 {
    let rest = |(name, amount): (&String, &i64)| {
        let left = amount.saturating_sub(request(pod, name)).max(0);
        (left as f64 / *amount as f64).powi(2)
    };
    lacking.iter().map(rest).sum()
}

/// Less memory first, then less of the processor.
fn smaller(a: &Pod, b: &Pod) -> Ordering {
    let of = |pod: &Pod| (request(pod, "memory"), request(pod, "cpu"));
    of(a).cmp(&of(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(priority: i32, requests: serde_json::Value, limits: serde_json::Value) -> Pod {
        let resources = serde_json::json!({"requests": requests, "limits": limits});
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": "p"},
            "spec": {"priority": priority, "containers": [{"name": "c", "resources": resources}]}}))
        .expect("a pod")
    }

    fn burstable(cpu: &str) -> Pod {
        pod(0, serde_json::json!({"cpu": cpu}), serde_json::json!({}))
    }

    fn guaranteed(cpu: &str) -> Pod {
        let both = serde_json::json!({"cpu": cpu, "memory": "1Mi"});
        pod(0, both.clone(), both)
    }

    fn critical() -> Pod {
        pod(eviction::CRITICAL_PRIORITY, serde_json::json!({"cpu": "1"}), serde_json::json!({}))
    }

    fn lacking(name: &str, thousandths: i64) -> Amounts {
        [(name.to_owned(), thousandths)].into()
    }

    #[test]
    fn as_few_and_as_small_pods_as_possible_go_and_those_of_a_lower_class_first() {
        let pods = [burstable("300m"), guaranteed("500m"), burstable("500m"), burstable("400m"), critical()];
        let others: Vec<&Pod> = pods.iter().collect();
        let choose = |amount| victims(&critical(), &others, &lacking("cpu", amount));
        assert_eq!(choose(200), Some(vec![0]), "the smallest that is enough");
        assert_eq!(choose(350), Some(vec![3]));
        assert_eq!(choose(900), Some(vec![2, 3]));
        assert_eq!(choose(1300), Some(vec![2, 0, 1]), "of a higher class only what all of the lower do not give");
        assert_eq!(choose(1701), None, "critical ones stay");
        assert_eq!(victims(&burstable("1"), &others, &lacking("cpu", 200)), None, "only for the sake of critical ones");
        let idle = pod(0, serde_json::json!({}), serde_json::json!({}));
        let others: Vec<&Pod> = pods.iter().chain([&idle]).collect();
        assert_eq!(victims(&critical(), &others, &lacking("pods", 1000)), Some(vec![5]), "best effort makes room too");
        let above = pod(eviction::CRITICAL_PRIORITY + 1000, serde_json::json!({}), serde_json::json!({}));
        assert_eq!(victims(&above, &[&critical()], &lacking("cpu", 500)), Some(vec![0]), "of a lower priority");
    }
}
