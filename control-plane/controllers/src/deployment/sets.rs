//! A Deployment and its ReplicaSets: which is new, which are old, revisions and annotations. Pure.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet, ReplicaSetSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;

use super::template;
use crate::owners::controller_reference;

pub(super) const REVISION: &str = "deployment.kubernetes.io/revision";
pub(super) const REVISION_HISTORY: &str = "deployment.kubernetes.io/revision-history";
pub(super) const DESIRED_REPLICAS: &str = "deployment.kubernetes.io/desired-replicas";
pub(super) const MAX_REPLICAS: &str = "deployment.kubernetes.io/max-replicas";

/// Annotations of a Deployment that are about the Deployment only.
const NOT_COPIED: [&str; 6] = [
    "kubectl.kubernetes.io/last-applied-configuration",
    REVISION,
    REVISION_HISTORY,
    DESIRED_REPLICAS,
    MAX_REPLICAS,
    "deprecated.deployment.rollback.to",
];

pub(super) fn replicas(deployment: &Deployment) -> i32 {
    deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1)
}

pub(super) fn set_replicas(set: &ReplicaSet) -> i32 {
    set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1)
}

pub(super) fn total<'a>(sets: impl IntoIterator<Item = &'a Arc<ReplicaSet>>) -> i32 {
    sets.into_iter().map(|set| set_replicas(set)).sum()
}

pub(super) fn available(set: &ReplicaSet) -> i32 {
    set.status.as_ref().and_then(|status| status.available_replicas).unwrap_or(0)
}

pub(super) fn total_available<'a>(sets: impl IntoIterator<Item = &'a Arc<ReplicaSet>>) -> i32 {
    sets.into_iter().map(|set| available(set)).sum()
}

pub(super) fn is_rolling(deployment: &Deployment) -> bool {
    let strategy = deployment.spec.as_ref().and_then(|spec| spec.strategy.as_ref());
    strategy.and_then(|strategy| strategy.type_.as_deref()).is_none_or(|type_| type_ != "Recreate")
}

pub(super) fn is_paused(deployment: &Deployment) -> bool {
    deployment.spec.as_ref().and_then(|spec| spec.paused).unwrap_or(false)
}

/// How far a rolling update may go over and under the wanted number: (surge, unavailable).
pub(super) fn fences(deployment: &Deployment) -> (i32, i32) {
    if !is_rolling(deployment) || replicas(deployment) == 0 {
        return (0, 0);
    }
    let spec = deployment.spec.as_ref();
    let rolling = spec.and_then(|spec| spec.strategy.as_ref()).and_then(|strategy| strategy.rolling_update.as_ref());
    let quarter = IntOrString::String("25%".to_owned());
    let surge = rolling.and_then(|rolling| rolling.max_surge.as_ref()).unwrap_or(&quarter);
    let unavailable = rolling.and_then(|rolling| rolling.max_unavailable.as_ref()).unwrap_or(&quarter);
    let surge = scaled(surge, replicas(deployment), true);
    let unavailable = scaled(unavailable, replicas(deployment), false);
    match (surge, unavailable) {
        // Both may round to nothing, and then the rollout could not move.
        (0, 0) => (0, 1),
        (surge, unavailable) => (surge, unavailable.min(replicas(deployment))),
    }
}

/// A number, or a percentage of `of`.
pub(crate) fn scaled(value: &IntOrString, of: i32, round_up: bool) -> i32 {
    let percent = match value {
        IntOrString::Int(number) => return (*number).max(0),
        IntOrString::String(text) => text.trim_end_matches('%').parse::<i64>().unwrap_or(0).clamp(0, 1_000_000),
    };
    let product = i64::from(of) * percent;
    let rounded = if round_up { (product + 99) / 100 } else { product / 100 };
    i32::try_from(rounded).unwrap_or(i32::MAX)
}

pub(super) fn max_unavailable(deployment: &Deployment) -> i32 {
    fences(deployment).1
}

/// The ReplicaSets of a Deployment, oldest first.
#[derive(Debug, Clone, Default)]
pub(super) struct Sets {
    pub new: Option<Arc<ReplicaSet>>,
    pub old: Vec<Arc<ReplicaSet>>,
}

pub(super) fn older_first(a: &ReplicaSet, b: &ReplicaSet) -> Ordering {
    let created = |set: &ReplicaSet| set.metadata.creation_timestamp.clone();
    created(a).cmp(&created(b)).then_with(|| a.metadata.name.cmp(&b.metadata.name))
}

impl Sets {
    /// The new set is the oldest one that has the Deployment's template.
    pub fn split(deployment: &Deployment, mut all: Vec<Arc<ReplicaSet>>) -> Self {
        all.sort_by(|a, b| older_first(a, b));
        let is_new = |set: &Arc<ReplicaSet>| {
            let ours = deployment.spec.as_ref().map(|spec| &spec.template);
            let theirs = set.spec.as_ref().and_then(|spec| spec.template.as_ref());
            ours.zip(theirs).is_some_and(|(ours, theirs)| template::same(ours, theirs))
        };
        let new = all.iter().position(is_new).map(|index| all.remove(index));
        Self { new, old: all }
    }

    pub fn all(&self) -> impl Iterator<Item = &Arc<ReplicaSet>> {
        self.old.iter().chain(&self.new)
    }

    pub fn active(&self) -> Vec<Arc<ReplicaSet>> {
        self.all().filter(|set| set_replicas(set) > 0).cloned().collect()
    }

    pub fn active_old(&self) -> Vec<Arc<ReplicaSet>> {
        self.old.iter().filter(|set| set_replicas(set) > 0).cloned().collect()
    }

    /// One more than the highest revision of the old sets.
    pub fn next_revision(&self) -> i64 {
        self.old.iter().map(|set| revision(set)).max().unwrap_or(0) + 1
    }
}

pub(super) fn annotation<'a, K: ResourceExt>(object: &'a K, key: &str) -> Option<&'a str> {
    object.annotations().get(key).map(String::as_str)
}

pub(super) fn revision(set: &ReplicaSet) -> i64 {
    annotation(set, REVISION).and_then(|revision| revision.parse().ok()).unwrap_or(0)
}

pub(super) fn number_annotation(set: &ReplicaSet, key: &str) -> Option<i32> {
    annotation(set, key).and_then(|number| number.parse().ok())
}

/// desired-replicas and max-replicas, by which a later scaling knows what this one meant.
pub(super) fn size_annotations(deployment: &Deployment) -> [(&'static str, String); 2] {
    let wanted = replicas(deployment);
    [(DESIRED_REPLICAS, wanted.to_string()), (MAX_REPLICAS, (wanted + fences(deployment).0).to_string())]
}

fn copied_annotations(deployment: &Deployment) -> impl Iterator<Item = (&String, &String)> {
    deployment.annotations().iter().filter(|(key, _)| !NOT_COPIED.contains(&key.as_str()))
}

/// The annotations the new set should have: those of the Deployment, and the revision it is now.
pub(super) fn new_set_annotations(deployment: &Deployment, set: &ReplicaSet, next: i64) -> BTreeMap<String, String> {
    let mut annotations = set.annotations().clone();
    for (key, value) in copied_annotations(deployment) {
        annotations.insert(key.clone(), value.clone());
    }
    let had = revision(set);
    if had < next {
        if had > 0 {
            // The set comes back to life by a rollback: it remembers which revisions it was.
            let history = annotations.get(REVISION_HISTORY).cloned().unwrap_or_default();
            let history = if history.is_empty() { had.to_string() } else { format!("{history},{had}") };
            annotations.insert(REVISION_HISTORY.to_owned(), history);
        }
        annotations.insert(REVISION.to_owned(), next.to_string());
    }
    annotations
}

/// The ReplicaSet to create for the Deployment's template.
pub(super) fn new_set(deployment: &Deployment, next_revision: i64, wanted: i32) -> ReplicaSet {
    let spec = deployment.spec.clone().unwrap_or_default();
    let collisions = deployment.status.as_ref().and_then(|status| status.collision_count);
    let hash = template::hash(&spec.template, collisions);
    let mut template = spec.template;
    let meta = template.metadata.get_or_insert_default();
    meta.labels.get_or_insert_default().insert(template::HASH_LABEL.to_owned(), hash.clone());
    let labels = meta.labels.clone();
    let mut selector = spec.selector;
    selector.match_labels.get_or_insert_default().insert(template::HASH_LABEL.to_owned(), hash.clone());
    let mut annotations: BTreeMap<String, String> =
        copied_annotations(deployment).map(|(key, value)| (key.clone(), value.clone())).collect();
    annotations.insert(REVISION.to_owned(), next_revision.to_string());
    annotations.extend(size_annotations(deployment).map(|(key, value)| (key.to_owned(), value)));
    ReplicaSet {
        metadata: ObjectMeta {
            name: Some(format!("{}-{hash}", deployment.name_any())),
            namespace: deployment.namespace(),
            labels,
            annotations: Some(annotations),
            owner_references: Some(vec![controller_reference(deployment)]),
            ..Default::default()
        },
        spec: Some(ReplicaSetSpec {
            replicas: Some(wanted),
            min_ready_seconds: spec.min_ready_seconds,
            selector,
            template: Some(template),
        }),
        status: None,
    }
}

/// Old sets beyond the history limit that have nothing left, oldest revision first.
pub(super) fn to_clean_up(deployment: &Deployment, sets: &Sets) -> Vec<Arc<ReplicaSet>> {
    let limit = deployment.spec.as_ref().and_then(|spec| spec.revision_history_limit).unwrap_or(10);
    let Ok(limit) = usize::try_from(limit) else { return Vec::new() };
    let alive = sets.old.iter().filter(|set| set.metadata.deletion_timestamp.is_none());
    let mut alive: Vec<&Arc<ReplicaSet>> = alive.collect();
    if limit == i32::MAX as usize || alive.len() <= limit {
        return Vec::new();
    }
    alive.sort_by_key(|set| revision(set));
    let excess = alive.len() - limit;
    let is_done = |set: &&&Arc<ReplicaSet>| {
        let status = set.status.as_ref();
        let observed = status.and_then(|status| status.observed_generation).unwrap_or(0);
        set_replicas(set) == 0
            && status.is_none_or(|status| status.replicas == 0)
            && set.metadata.generation.unwrap_or(0) <= observed
    };
    alive.iter().take(excess).filter(is_done).map(|set| (*set).clone()).collect()
}
