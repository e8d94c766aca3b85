//! How many replicas each ReplicaSet should have: rolling updates and proportional scaling. Pure.

use std::sync::Arc;

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};

use super::sets::{
    DESIRED_REPLICAS, MAX_REPLICAS, Sets, available, fences, is_rolling, max_unavailable, number_annotation,
    older_first, replicas, set_replicas, total, total_available,
};

/// A new size for a set.
#[derive(Debug, Clone)]
pub(super) struct Resize {
    pub set: Arc<ReplicaSet>,
    pub to: i32,
}

fn resize(set: &Arc<ReplicaSet>, to: i32) -> Resize {
    Resize { set: set.clone(), to }
}

/// How large the new set may be, given what all sets have now.
pub(super) fn new_set_size(deployment: &Deployment, all: i32, new: i32) -> i32 {
    let wanted = replicas(deployment);
    if !is_rolling(deployment) {
        return wanted;
    }
    let most = wanted + fences(deployment).0;
    if all >= most {
        return new;
    }
    new + (most - all).min(wanted - new).max(0)
}

/// One step of a rolling update: the new set grows, or if it cannot, old sets shrink.
pub(super) fn rolling_step(deployment: &Deployment, sets: &Sets) -> Vec<Resize> {
    let Some(new) = &sets.new else { return Vec::new() };
    let (wanted, has) = (replicas(deployment), set_replicas(new));
    let target = if has > wanted { wanted } else { new_set_size(deployment, total(sets.all()), has) };
    if target != has {
        return vec![resize(new, target)];
    }
    shrink_old(deployment, sets, new)
}

fn shrink_old(deployment: &Deployment, sets: &Sets, new: &ReplicaSet) -> Vec<Resize> {
    let mut old = sets.active_old();
    if old.is_empty() {
        return Vec::new();
    }
    let least = replicas(deployment) - max_unavailable(deployment);
    let new_unavailable = set_replicas(new) - available(new);
    let may_go = total(sets.all()) - least - new_unavailable;
    if may_go <= 0 {
        return Vec::new();
    }
    // Pods that serve nobody go first: they cost no availability.
    old.sort_by(|a, b| older_first(a, b));
    let mut sizes: Vec<i32> = old.iter().map(|set| set_replicas(set)).collect();
    let mut unhealthy_left = may_go;
    for (size, set) in sizes.iter_mut().zip(&old) {
        let gone = (*size - available(set)).clamp(0, unhealthy_left);
        *size -= gone;
        unhealthy_left -= gone;
    }
    // Then as many serving ones as the fence allows.
    let mut serving_left = (total_available(sets.all()) - least).max(0);
    for (size, set) in sizes.iter_mut().zip(&old) {
        let gone = (*size).min(serving_left).min(available(set));
        *size -= gone;
        serving_left -= gone;
    }
    old.iter()
        .zip(sizes)
        .filter(|(set, size)| set_replicas(set) != *size)
        .map(|(set, size)| resize(set, size))
        .collect()
}

/// All old sets to nothing, for Recreate.
pub(super) fn stop_old(sets: &Sets) -> Vec<Resize> {
    sets.active_old().iter().map(|set| resize(set, 0)).collect()
}

/// Whether the user changed `spec.replicas` since the sets were last sized.
pub(super) fn is_scaling(deployment: &Deployment, sets: &Sets) -> bool {
    let differs = |desired: i32| desired != replicas(deployment);
    sets.active().iter().any(|set| number_annotation(set, DESIRED_REPLICAS).is_some_and(differs))
}

fn is_saturated(deployment: &Deployment, set: &ReplicaSet) -> bool {
    let wanted = replicas(deployment);
    number_annotation(set, DESIRED_REPLICAS) == Some(wanted) && set_replicas(set) == wanted && available(set) == wanted
}

/// Sizes after a change of `spec.replicas`, or while paused. Sets whose size stays are listed too, since their size
/// annotations must follow.
pub(super) fn scale(deployment: &Deployment, sets: &Sets) -> Vec<Resize> {
    let active = sets.active();
    let wanted = replicas(deployment);
    if active.len() <= 1 {
        let single = active.first().or(sets.new.as_ref()).or(sets.old.last());
        return single.map(|set| resize(set, wanted)).into_iter().collect();
    }
    if sets.new.as_ref().is_some_and(|new| is_saturated(deployment, new)) {
        return sets.active_old().iter().map(|set| resize(set, 0)).collect();
    }
    if !is_rolling(deployment) {
        return Vec::new();
    }
    proportional(deployment, active)
}

/// Spreads the change over the sets by their size, so that the risk of a rollout under way stays the same.
fn proportional(deployment: &Deployment, mut active: Vec<Arc<ReplicaSet>>) -> Vec<Resize> {
    let wanted = replicas(deployment);
    let allowed = if wanted > 0 { wanted + fences(deployment).0 } else { 0 };
    let to_add = allowed - total(&active);
    // The largest first; of equals the newest grows first and the oldest shrinks first.
    active.sort_by(|a, b| {
        let by_age = if to_add > 0 { older_first(b, a) } else { older_first(a, b) };
        set_replicas(b).cmp(&set_replicas(a)).then(by_age)
    });
    let mut added = 0;
    let mut sizes: Vec<i32> = Vec::with_capacity(active.len());
    for set in &active {
        let share = share(deployment, set, to_add, added);
        added += share;
        sizes.push(set_replicas(set) + share);
    }
    if let Some(first) = sizes.first_mut() {
        *first = (*first + to_add - added).max(0);
    }
    active.iter().zip(sizes).map(|(set, size)| resize(set, size)).collect()
}

fn share(deployment: &Deployment, set: &ReplicaSet, to_add: i32, added: i32) -> i32 {
    let has = set_replicas(set);
    if has == 0 || to_add == 0 || to_add == added {
        return 0;
    }
    let left = to_add - added;
    let wanted = replicas(deployment);
    let fraction = if wanted == 0 {
        -has
    } else {
        let status_total = deployment.status.as_ref().and_then(|status| status.replicas).unwrap_or(0);
        let before = number_annotation(set, MAX_REPLICAS).filter(|max| *max > 0).unwrap_or(status_total);
        if before <= 0 {
            return 0;
        }
        let most = wanted + fences(deployment).0;
        let exact = f64::from(has) * f64::from(most) / f64::from(before);
        // Sizes are small integers, so rounding and converting back is exact.
        exact.round() as i32 - has
    };
    if to_add > 0 { fraction.min(left) } else { fraction.max(left) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn deployment(replicas: i32, surge: &serde_json::Value, unavailable: &serde_json::Value) -> Deployment {
        serde_json::from_value(json!({
            "metadata": {"name": "d", "namespace": "ns", "uid": "d"},
            "spec": {"replicas": replicas, "selector": {}, "template": {},
                     "strategy": {"type": "RollingUpdate",
                                  "rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}}},
        }))
        .unwrap()
    }

    fn set(name: &str, replicas: i32, available: i32, desired: i32, max: i32) -> Arc<ReplicaSet> {
        Arc::new(
            serde_json::from_value(json!({
                "metadata": {"name": name, "annotations": {
                    DESIRED_REPLICAS: desired.to_string(), MAX_REPLICAS: max.to_string(),
                }},
                "spec": {"replicas": replicas, "selector": {}},
                "status": {"replicas": replicas, "availableReplicas": available, "readyReplicas": available},
            }))
            .unwrap(),
        )
    }

    fn sizes(resizes: &[Resize]) -> Vec<(String, i32)> {
        resizes.iter().map(|resize| (resize.set.metadata.name.clone().unwrap(), resize.to)).collect()
    }

    fn named(list: &[(&str, i32)]) -> Vec<(String, i32)> {
        list.iter().map(|(name, size)| ((*name).to_owned(), *size)).collect()
    }

    #[test]
    fn the_new_set_grows_within_the_surge() {
        let d = deployment(10, &json!("25%"), &json!("25%"));
        let sets = Sets { new: Some(set("new", 0, 0, 10, 13)), old: vec![set("old", 10, 10, 10, 13)] };
        assert_eq!(sizes(&rolling_step(&d, &sets)), named(&[("new", 3)]));
    }

    #[test]
    fn old_sets_shrink_as_far_as_availability_allows() {
        let d = deployment(10, &json!(3), &json!(2));
        let sets = Sets { new: Some(set("new", 3, 0, 10, 13)), old: vec![set("old", 10, 10, 10, 13)] };
        assert_eq!(sizes(&rolling_step(&d, &sets)), named(&[("old", 8)]));
    }

    #[test]
    fn broken_old_pods_go_before_serving_ones() {
        let d = deployment(4, &json!(1), &json!(0));
        let old = vec![set("broken", 2, 0, 4, 5), set("serving", 3, 3, 4, 5)];
        let sets = Sets { new: Some(set("new", 1, 1, 4, 5)), old };
        let step = rolling_step(&d, &sets);
        assert_eq!(sizes(&step), named(&[("broken", 0)]), "three serving old, one new: none may go");
    }

    #[test]
    fn nothing_moves_while_new_pods_are_not_available() {
        let d = deployment(3, &json!(1), &json!(0));
        let sets = Sets { new: Some(set("new", 1, 0, 3, 4)), old: vec![set("old", 3, 3, 3, 4)] };
        assert!(rolling_step(&d, &sets).is_empty());
    }

    #[test]
    fn scaling_during_a_rollout_keeps_the_proportions() {
        let d = deployment(15, &json!(3), &json!(2));
        let sets = Sets { new: Some(set("new", 5, 0, 10, 13)), old: vec![set("old", 8, 8, 10, 13)] };
        assert!(is_scaling(&d, &sets));
        assert_eq!(sizes(&scale(&d, &sets)), named(&[("old", 11), ("new", 7)]));
    }

    #[test]
    fn scaling_to_zero_empties_every_set() {
        let d = deployment(0, &json!(3), &json!(2));
        let sets = Sets { new: Some(set("new", 5, 0, 10, 13)), old: vec![set("old", 8, 8, 10, 13)] };
        assert_eq!(sizes(&scale(&d, &sets)), named(&[("old", 0), ("new", 0)]));
    }

    /// Plays a whole rollout, in which pods of the new set become available at random.
    fn play(replicas: i32, surge: i32, unavailable: i32, mut coin: impl FnMut() -> bool) -> Result<(), TestCaseError> {
        let d = deployment(replicas, &json!(surge), &json!(unavailable));
        let (surge, unavailable) = fences(&d);
        let (mut new, mut new_available, mut old) = (0, 0, replicas);
        for _ in 0..10_000 {
            if new == replicas && old == 0 && new_available == replicas {
                return Ok(());
            }
            let max = replicas + surge;
            let sets = Sets {
                new: Some(set("new", new, new_available, replicas, max)),
                old: vec![set("old", old, old, replicas, max)],
            };
            for resize in rolling_step(&d, &sets) {
                if resize.set.metadata.name.as_deref() == Some("new") { new = resize.to } else { old = resize.to }
            }
            prop_assert!(new + old <= max, "{new} + {old} > {max}");
            prop_assert!(new_available + old >= replicas - unavailable, "{new_available} + {old}");
            if new_available < new && coin() {
                new_available += 1;
            }
        }
        Err(TestCaseError::fail(format!("the rollout never ends: new {new}/{new_available}, old {old}")))
    }

    proptest! {
        #[test]
        fn a_rollout_ends_and_never_leaves_the_fences(
            replicas in 1i32..30, surge in 0i32..10, unavailable in 0i32..10, coins in proptest::collection::vec(any::<bool>(), 1..50),
        ) {
            let mut tossed = 0;
            play(replicas, surge, unavailable, || {
                tossed += 1;
                coins[tossed % coins.len()] || tossed % 7 == 0
            })?;
        }

        #[test]
        fn proportional_scaling_gives_exactly_what_is_allowed(
            wanted in 1i32..60, before in 1i32..60, split in 1i32..60, surge in 0i32..5,
        ) {
            let d = deployment(wanted, &json!(surge), &json!(1));
            let new = split.min(before);
            let sets = Sets {
                new: Some(set("new", new, 0, before, before + surge)),
                old: vec![set("old", before + 1 - new, 1, before, before + surge)],
            };
            let total: i32 = scale(&d, &sets).iter().map(|resize| resize.to).sum();
            prop_assert_eq!(total, wanted + fences(&d).0);
        }
    }
}
