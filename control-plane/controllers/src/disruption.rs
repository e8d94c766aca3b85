//! PodDisruptionBudgets: how many pods may be evicted now. The API server enforces what the status says.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::{Api, ResourceExt};
use oarlock_machinery::{ApiError, Change, Key, Next, Selector, WorkQueue, merge_status, queue};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::conditions::status_patch;
use crate::deployment::scaled_value;
use crate::owners::controller_of;
use crate::pods::{is_ready, is_terminal, is_terminating};
use crate::shared::{Shared, Task};

const CONCURRENCY: usize = 4;
/// A pod whose eviction was allowed should be going by then.
const EVICTION_LIMIT: SignedDuration = SignedDuration::from_secs(120);

pub(crate) fn start(shared: &Arc<Shared>, stop: &CancellationToken) -> Task {
    let queue: Arc<WorkQueue<Key>> = WorkQueue::new();
    let (on_budget, on_pod) = (queue.clone(), queue.clone());
    shared.disruption_budgets.on_change(move |change| on_budget.add(Key::of(change.object().as_ref())));
    let budgets = shared.disruption_budgets.clone();
    shared.pods.on_change(move |change| {
        let before = match change {
            Change::Updated { old, .. } => old.metadata.labels.as_ref(),
            _ => None,
        };
        let pod = change.object();
        for budget in budgets.in_namespace(&pod.namespace().unwrap_or_default()) {
            let selector = selector(&budget);
            if selector.matches(pod.metadata.labels.as_ref()) || (before.is_some() && selector.matches(before)) {
                on_pod.add(Key::of(budget.as_ref()));
            }
        }
    });
    let (budgets, on_set) = (shared.disruption_budgets.clone(), queue.clone());
    shared.replica_sets.on_change(move |change| {
        for budget in budgets.in_namespace(&change.object().namespace().unwrap_or_default()) {
            on_set.add(Key::of(budget.as_ref()));
        }
    });
    let (shared, stop) = (shared.clone(), stop.clone());
    Box::pin(async move {
        shared.disruption_budgets.wait_synced().await;
        shared.pods.wait_synced().await;
        shared.replica_sets.wait_synced().await;
        shared.deployments.wait_synced().await;
        queue::work("disruption", queue, CONCURRENCY, stop, |key| reconcile(shared.clone(), key)).await;
    })
}

fn selector(budget: &PodDisruptionBudget) -> Selector {
    let selector = budget.spec.as_ref().and_then(|spec| spec.selector.as_ref());
    Selector::compile(selector).unwrap_or(Selector::nothing())
}

/// The number of pods that the owners of these pods want.
fn expected(shared: &Shared, pods: &[Arc<Pod>]) -> i32 {
    let mut by_owner: BTreeMap<String, i32> = BTreeMap::new();
    for pod in pods {
        let Some(owner) = controller_of(&pod.metadata) else {
            // A pod of nobody is wanted because it is there.
            by_owner.insert(pod.uid().unwrap_or_default(), 1);
            continue;
        };
        let namespace = pod.namespace().unwrap_or_default();
        let set = shared.replica_sets.get(&namespace, &owner.name).filter(|set| set.uid().as_ref() == Some(&owner.uid));
        let Some(set) = set else {
            by_owner.insert(pod.uid().unwrap_or_default(), 1);
            continue;
        };
        let deployment = controller_of(&set.metadata).and_then(|owner| shared.deployments.get(&namespace, &owner.name));
        match deployment {
            Some(deployment) => {
                let wanted = deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
                by_owner.insert(deployment.uid().unwrap_or_default(), wanted);
            }
            None => {
                let wanted = set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
                by_owner.insert(set.uid().unwrap_or_default(), wanted);
            }
        }
    }
    by_owner.values().sum()
}

fn status(
    budget: &PodDisruptionBudget,
    pods: &[Arc<Pod>],
    owners_want: i32,
    now: Timestamp,
) -> PodDisruptionBudgetStatus {
    let spec = budget.spec.as_ref();
    let have = i32::try_from(pods.len()).unwrap_or(i32::MAX);
    let (expected, desired) = match spec.map(|spec| (&spec.min_available, &spec.max_unavailable)) {
        Some((_, Some(max))) => (owners_want, (owners_want - scaled_value(max, owners_want, true)).max(0)),
        Some((Some(k8s_openapi::apimachinery::pkg::util::intstr::IntOrString::Int(min)), None)) => (have, *min),
        Some((Some(min), None)) => (owners_want, scaled_value(min, owners_want, true)),
        _ => (have, 1),
    };
    let old = budget.status.as_ref();
    // Evictions that were allowed and have not shown yet: the pod is still there and not going.
    let mut pending = old.and_then(|status| status.disrupted_pods.clone()).unwrap_or_default();
    pending.retain(|name, since| {
        let there = pods.iter().any(|pod| pod.metadata.name.as_ref() == Some(name) && !is_terminating(pod));
        there && now.duration_since(since.0) < EVICTION_LIMIT
    });
    let is_healthy = |pod: &&Arc<Pod>| {
        is_ready(pod)
            && !is_terminating(pod)
            && pod.metadata.name.as_ref().is_none_or(|name| !pending.contains_key(name))
    };
    let healthy = i32::try_from(pods.iter().filter(is_healthy).count()).unwrap_or(i32::MAX);
    let allowed = if expected > 0 { (healthy - desired).max(0) } else { 0 };
    let (state, reason) = if allowed > 0 { ("True", "SufficientPods") } else { ("False", "InsufficientPods") };
    let mut conditions = old.and_then(|status| status.conditions.clone()).unwrap_or_default();
    let generation = budget.metadata.generation;
    match conditions.iter_mut().find(|condition| condition.type_ == "DisruptionAllowed") {
        Some(condition) if condition.status == state && condition.reason == reason => {
            condition.observed_generation = generation;
        }
        _ => {
            conditions.retain(|condition| condition.type_ != "DisruptionAllowed");
            conditions.push(Condition {
                type_: "DisruptionAllowed".to_owned(),
                status: state.to_owned(),
                reason: reason.to_owned(),
                message: String::new(),
                observed_generation: generation,
                last_transition_time: Time(now),
            });
        }
    }
    PodDisruptionBudgetStatus {
        current_healthy: Some(healthy),
        desired_healthy: Some(desired),
        expected_pods: Some(expected),
        disruptions_allowed: Some(allowed),
        disrupted_pods: (!pending.is_empty()).then_some(pending),
        observed_generation: generation,
        conditions: Some(conditions),
    }
}

async fn reconcile(shared: Arc<Shared>, key: Key) -> Result<Next, ApiError> {
    let Some(budget) = shared.disruption_budgets.get_key(&key) else { return Ok(Next::Done) };
    let selector = selector(&budget);
    let mut pods = shared.pods.in_namespace(&key.namespace);
    pods.retain(|pod| selector.matches(pod.metadata.labels.as_ref()) && !is_terminal(pod));
    let status = status(&budget, &pods, expected(&shared, &pods), Timestamp::now());
    let waits = status.disrupted_pods.is_some();
    if let Some(mut patch) = status_patch(budget.metadata.uid.as_deref(), budget.status.as_ref(), &status) {
        // The API server counts evictions down in this status; a stale count must not overwrite that.
        patch["metadata"]["resourceVersion"] = json!(budget.resource_version());
        let api: Api<PodDisruptionBudget> = Api::namespaced(shared.client.clone(), &key.namespace);
        match merge_status("patch poddisruptionbudget status", &api, &key.name, &patch).await {
            Err(error) if error.is_not_found() => {}
            result => drop(result?),
        }
    }
    Ok(if waits { Next::After(Duration::from_secs(120)) } else { Next::Done })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn pods(ready: &[bool]) -> Vec<Arc<Pod>> {
        let pod = |(number, ready): (usize, &bool)| {
            let value = json!({"metadata": {"name": format!("p{number}")},
                "status": {"conditions": [{"type": "Ready", "status": if *ready { "True" } else { "False" }}]}});
            Arc::new(serde_json::from_value(value).unwrap())
        };
        ready.iter().enumerate().map(pod).collect()
    }

    fn allowed(spec: Value, ready: &[bool], status_now: Value) -> i32 {
        let budget = json!({"metadata": {"name": "b", "generation": 1}, "spec": spec, "status": status_now});
        let budget: PodDisruptionBudget = serde_json::from_value(budget).unwrap();
        let now = Timestamp::from_second(1_000_000).unwrap();
        status(&budget, &pods(ready), i32::try_from(ready.len()).unwrap(), now).disruptions_allowed.unwrap()
    }

    #[test]
    fn budgets_allow_what_keeps_enough_pods_healthy() {
        let all = [true, true, true, true];
        assert_eq!(allowed(json!({"minAvailable": 3}), &all, json!({})), 1);
        assert_eq!(allowed(json!({"minAvailable": "50%"}), &all, json!({})), 2);
        assert_eq!(allowed(json!({"maxUnavailable": 1}), &all, json!({})), 1);
        assert_eq!(allowed(json!({"maxUnavailable": 1}), &[true, true, true, false], json!({})), 0);
        assert_eq!(allowed(json!({"minAvailable": 5}), &all, json!({})), 0);
    }

    #[test]
    fn an_eviction_under_way_counts_until_it_shows_or_expires() {
        let recent = Timestamp::from_second(999_990).unwrap().to_string();
        let old = Timestamp::from_second(999_000).unwrap().to_string();
        let all = [true, true];
        assert_eq!(allowed(json!({"minAvailable": 1}), &all, json!({"disruptedPods": {"p0": recent}})), 0);
        assert_eq!(allowed(json!({"minAvailable": 1}), &all, json!({"disruptedPods": {"p0": old}})), 1);
    }
}
