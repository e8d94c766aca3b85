//! A Deployment's status and its conditions Available, Progressing and ReplicaFailure. Pure.

use k8s_openapi::api::apps::v1::{Deployment, DeploymentCondition, DeploymentStatus, ReplicaSet};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;

use super::sets::{Sets, max_unavailable, replicas, total};
use crate::conditions::{self, Condition};

pub(super) const PROGRESSING: &str = "Progressing";
const AVAILABLE: &str = "Available";
const REPLICA_FAILURE: &str = "ReplicaFailure";
const COMPLETE: &str = "NewReplicaSetAvailable";
const TIMED_OUT: &str = "ProgressDeadlineExceeded";

/// Progress deadline, if the Deployment has one.
pub(super) fn deadline(deployment: &Deployment) -> Option<SignedDuration> {
    let seconds = deployment.spec.as_ref().and_then(|spec| spec.progress_deadline_seconds)?;
    (seconds != i32::MAX).then(|| SignedDuration::from_secs(i64::from(seconds)))
}

pub(super) fn progressing(status: bool, reason: &str, message: String, now: Timestamp) -> DeploymentCondition {
    DeploymentCondition::new(PROGRESSING, status, reason, message, now)
}

fn sum(sets: &Sets, field: impl Fn(&k8s_openapi::api::apps::v1::ReplicaSetStatus) -> i32) -> i32 {
    sets.all().filter_map(|set| set.status.as_ref()).map(field).sum()
}

/// Counts and the Available condition; the other conditions are taken over.
pub(super) fn counts(deployment: &Deployment, sets: &Sets, now: Timestamp) -> DeploymentStatus {
    let old = deployment.status.clone().unwrap_or_default();
    let available = sum(sets, |status| status.available_replicas.unwrap_or(0));
    let updated = sets.new.as_ref().and_then(|new| new.status.as_ref()).map_or(0, |status| status.replicas);
    let positive = |number: i32| (number > 0).then_some(number);
    let mut all = old.conditions.unwrap_or_default();
    let enough = available >= replicas(deployment) - max_unavailable(deployment);
    let (reason, message) = match enough {
        true => ("MinimumReplicasAvailable", "Deployment has minimum availability."),
        false => ("MinimumReplicasUnavailable", "Deployment does not have minimum availability."),
    };
    let condition = DeploymentCondition::new(AVAILABLE, enough, reason, message.to_owned(), now);
    conditions::set(&mut all, enough, reason, condition);
    DeploymentStatus {
        observed_generation: deployment.metadata.generation,
        replicas: positive(sum(sets, |status| status.replicas)),
        updated_replicas: positive(updated),
        ready_replicas: positive(sum(sets, |status| status.ready_replicas.unwrap_or(0))),
        available_replicas: positive(available),
        unavailable_replicas: positive(total(sets.all()) - available),
        terminating_replicas: Some(sum(sets, |status| status.terminating_replicas.unwrap_or(0))),
        collision_count: old.collision_count,
        conditions: Some(all),
    }
}

fn number(value: Option<i32>) -> i32 {
    value.unwrap_or(0)
}

fn progress_of(status: &DeploymentStatus) -> Option<&DeploymentCondition> {
    conditions::find(status.conditions.as_deref().unwrap_or_default(), PROGRESSING)
}

/// All pods are of the new template, available, and no old one is left.
pub(super) fn is_complete(deployment: &Deployment, status: &DeploymentStatus) -> bool {
    let wanted = replicas(deployment);
    number(status.updated_replicas) == wanted
        && number(status.replicas) == wanted
        && number(status.available_replicas) == wanted
        && status.observed_generation >= deployment.metadata.generation
}

fn has_progressed(deployment: &Deployment, new: &DeploymentStatus) -> bool {
    let none = DeploymentStatus::default();
    let old = deployment.status.as_ref().unwrap_or(&none);
    let outdated = |status: &DeploymentStatus| number(status.replicas) - number(status.updated_replicas);
    number(new.updated_replicas) > number(old.updated_replicas)
        || outdated(new) < outdated(old)
        || new.ready_replicas > old.ready_replicas
        || new.available_replicas > old.available_replicas
}

fn has_timed_out(deployment: &Deployment, status: &DeploymentStatus, now: Timestamp) -> bool {
    let Some(condition) = progress_of(status) else { return false };
    match condition.reason.as_deref() {
        Some(COMPLETE) => false,
        Some(TIMED_OUT) => true,
        _ => deadline_at(deployment, status).is_some_and(|at| at < now),
    }
}

fn deadline_at(deployment: &Deployment, status: &DeploymentStatus) -> Option<Timestamp> {
    Some(progress_of(status)?.last_update_time.as_ref()?.0 + deadline(deployment)?)
}

/// The whole status during a rollout.
pub(super) fn rollout(deployment: &Deployment, sets: &Sets, now: Timestamp) -> DeploymentStatus {
    let mut status = counts(deployment, sets, now);
    let mut all = status.conditions.take().unwrap_or_default();
    if deadline(deployment).is_none() {
        conditions::remove(&mut all, PROGRESSING);
    }
    let was_complete = number(status.replicas) == number(status.updated_replicas)
        && conditions::find(&all, PROGRESSING).is_some_and(|condition| condition.is(true, COMPLETE));
    status.conditions = Some(all);
    if deadline(deployment).is_some() && !was_complete {
        let about = match &sets.new {
            Some(new) => format!("ReplicaSet \"{}\"", new.name_any()),
            None => format!("Deployment \"{}\"", deployment.name_any()),
        };
        let (complete, moved) = (is_complete(deployment, &status), has_progressed(deployment, &status));
        let timed_out = has_timed_out(deployment, &status, now);
        let all = status.conditions.get_or_insert_default();
        if complete {
            let message = format!("{about} has successfully progressed.");
            conditions::set(all, true, COMPLETE, progressing(true, COMPLETE, message, now));
        } else if moved {
            let message = format!("{about} is progressing.");
            conditions::replace(all, progressing(true, "ReplicaSetUpdated", message, now));
        } else if timed_out {
            let message = format!("{about} has timed out progressing.");
            conditions::set(all, false, TIMED_OUT, progressing(false, TIMED_OUT, message, now));
        }
    }
    show_failure(&mut status, sets, now);
    status
}

/// Shows the trouble a ReplicaSet has with its pods, the new set's first.
fn show_failure(status: &mut DeploymentStatus, sets: &Sets, now: Timestamp) {
    let failure = |set: &ReplicaSet| {
        let all = set.status.as_ref()?.conditions.as_deref()?;
        let found = conditions::find(all, REPLICA_FAILURE)?;
        Some((found.reason.clone().unwrap_or_default(), found.message().to_owned()))
    };
    let found = sets.new.iter().chain(&sets.old).find_map(|set| failure(set));
    let all = status.conditions.get_or_insert_default();
    match found {
        Some((reason, message)) => {
            let condition = DeploymentCondition::new(REPLICA_FAILURE, true, &reason, message, now);
            conditions::set(all, true, &reason, condition);
        }
        None => conditions::remove(all, REPLICA_FAILURE),
    }
}

/// When to look again whether the deadline has passed.
pub(super) fn next_check(deployment: &Deployment, status: &DeploymentStatus, now: Timestamp) -> Option<SignedDuration> {
    let condition = progress_of(status)?;
    if matches!(condition.reason.as_deref(), Some(COMPLETE | TIMED_OUT)) || is_complete(deployment, status) {
        return None;
    }
    let left = deadline_at(deployment, status)?.duration_since(now);
    Some(left.max(SignedDuration::ZERO) + SignedDuration::from_secs(1))
}

/// Progressing as paused or resumed; `None` if it is right already.
pub(super) fn pause_condition(deployment: &Deployment, paused: bool, now: Timestamp) -> Option<DeploymentCondition> {
    deadline(deployment)?;
    let current = deployment.status.as_ref().and_then(progress_of);
    let reason = current.and_then(|condition| condition.reason.as_deref());
    match (paused, reason) {
        (_, Some(TIMED_OUT)) => None,
        (true, reason) if reason != Some("DeploymentPaused") => {
            let mut condition = progressing(true, "DeploymentPaused", "Deployment is paused".to_owned(), now);
            "Unknown".clone_into(&mut condition.status);
            Some(condition)
        }
        (false, Some("DeploymentPaused")) => {
            let mut condition = progressing(true, "DeploymentResumed", "Deployment is resumed".to_owned(), now);
            "Unknown".clone_into(&mut condition.status);
            Some(condition)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::sync::Arc;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn deployment(replicas: i32) -> Deployment {
        serde_json::from_value(json!({
            "metadata": {"name": "web", "generation": 2},
            "spec": {"replicas": replicas, "selector": {}, "template": {}, "progressDeadlineSeconds": 600},
        }))
        .unwrap()
    }

    fn set(replicas: i32, available: i32) -> Arc<ReplicaSet> {
        Arc::new(
            serde_json::from_value(json!({
                "metadata": {"name": "web-1"}, "spec": {"replicas": replicas, "selector": {}},
                "status": {"replicas": replicas, "readyReplicas": available, "availableReplicas": available},
            }))
            .unwrap(),
        )
    }

    fn reason<'a>(status: &'a DeploymentStatus, type_: &str) -> &'a str {
        let found = conditions::find(status.conditions.as_deref().unwrap(), type_).unwrap();
        found.reason.as_deref().unwrap()
    }

    #[test]
    fn a_rollout_progresses_completes_and_stays_complete() {
        let mut d = deployment(2);
        let status = rollout(&d, &Sets { new: Some(set(2, 1)), old: vec![] }, at(10));
        assert_eq!(reason(&status, PROGRESSING), "ReplicaSetUpdated");
        assert_eq!(reason(&status, AVAILABLE), "MinimumReplicasUnavailable");
        d.status = Some(status);
        let status = rollout(&d, &Sets { new: Some(set(2, 2)), old: vec![] }, at(20));
        assert_eq!(reason(&status, PROGRESSING), COMPLETE);
        assert_eq!(reason(&status, AVAILABLE), "MinimumReplicasAvailable");
        assert_eq!(status.observed_generation, Some(2));
        d.status = Some(status.clone());
        assert_eq!(next_check(&d, &status, at(21)), None);
        // A pod dies later: that is no new rollout.
        let status = rollout(&d, &Sets { new: Some(set(2, 1)), old: vec![] }, at(2000));
        assert_eq!(reason(&status, PROGRESSING), COMPLETE);
        assert_eq!(reason(&status, AVAILABLE), "MinimumReplicasUnavailable");
    }

    #[test]
    fn a_rollout_that_stands_still_times_out() {
        let mut d = deployment(2);
        let sets = Sets { new: Some(set(2, 0)), old: vec![] };
        let status = rollout(&d, &sets, at(10));
        assert_eq!(next_check(&d, &status, at(10)).unwrap().as_secs(), 601);
        d.status = Some(status);
        let status = rollout(&d, &sets, at(611));
        assert_eq!(reason(&status, PROGRESSING), TIMED_OUT);
        let shown = progress_of(&status).unwrap();
        assert_eq!(
            (shown.status.as_str(), shown.message()),
            ("False", "ReplicaSet \"web-1\" has timed out progressing.")
        );
    }

    #[test]
    fn pausing_and_resuming_is_said_once() {
        let mut d = deployment(1);
        let paused = pause_condition(&d, true, at(1)).unwrap();
        d.status = Some(DeploymentStatus { conditions: Some(vec![paused]), ..Default::default() });
        assert_eq!(pause_condition(&d, true, at(2)), None);
        let resumed = pause_condition(&d, false, at(3)).unwrap();
        assert_eq!(resumed.reason.as_deref(), Some("DeploymentResumed"));
    }

    #[test]
    fn a_failing_set_is_shown_on_the_deployment() {
        let mut broken = (*set(1, 0)).clone();
        broken.status.as_mut().unwrap().conditions =
            Some(vec![Condition::new(REPLICA_FAILURE, true, "FailedCreate", "quota".into(), at(1))]);
        let sets = Sets { new: Some(Arc::new(broken)), old: vec![] };
        assert_eq!(reason(&rollout(&deployment(1), &sets, at(2)), REPLICA_FAILURE), "FailedCreate");
    }
}
