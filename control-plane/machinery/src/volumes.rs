//! Which persistent volumes suit a claim, and where they can be had. What the scheduler promises and what the claims controller
//! binds is decided by this alone. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::Selector;
use crate::node_terms::node_selector_matches;

/// The claim's annotation that names the node which a scheduler has chosen for it.
pub const SELECTED_NODE: &str = "volume.kubernetes.io/selected-node";
/// The mark of a volume, or of a claim, that was bound by a program and not by its user.
pub const BOUND_BY_CONTROLLER: &str = "pv.kubernetes.io/bound-by-controller";
/// The provisioner that stands for nobody.
pub const NO_PROVISIONER: &str = "kubernetes.io/no-provisioner";

/// Whether the claim has its volume.
pub fn is_bound(claim: &PersistentVolumeClaim) -> bool {
    claim.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Bound")
}

/// The volume that the claim names.
pub fn volume_name(claim: &PersistentVolumeClaim) -> Option<&str> {
    claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref()).filter(|name| !name.is_empty())
}

/// The claim's class, empty for none.
pub fn class_name(claim: &PersistentVolumeClaim) -> &str {
    claim.spec.as_ref().and_then(|spec| spec.storage_class_name.as_deref()).unwrap_or_default()
}

/// Whether the volume is free, or kept for this very claim.
pub fn may_have(claim: &PersistentVolumeClaim, volume: &PersistentVolume) -> bool {
    let Some(reference) = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref()) else { return true };
    reference.namespace == claim.metadata.namespace
        && reference.name == claim.metadata.name
        && reference.uid.as_ref().is_none_or(|uid| uid.is_empty() || Some(uid) == claim.metadata.uid.as_ref())
}

/// Whether the volume is kept for this very claim.
pub fn is_kept_for(claim: &PersistentVolumeClaim, volume: &PersistentVolume) -> bool {
    volume.spec.as_ref().is_some_and(|spec| spec.claim_ref.is_some()) && may_have(claim, volume)
}

/// Whether a node of this name and these labels can have the volume; one without an affinity can be had anywhere.
pub fn reaches(volume: &PersistentVolume, node: &str, labels: &BTreeMap<String, String>) -> bool {
    let affinity = volume.spec.as_ref().and_then(|spec| spec.node_affinity.as_ref());
    let required = affinity.and_then(|affinity| affinity.required.as_ref());
    required.is_none_or(|required| node_selector_matches(required, node, labels))
}

fn bytes(amount: Option<&Quantity>) -> i64 {
    amount.and_then(|amount| oarlock_quantity::units(&amount.0)).unwrap_or(0)
}

/// What the volume holds, in bytes.
pub fn capacity_bytes(volume: &PersistentVolume) -> i64 {
    bytes(volume.spec.as_ref().and_then(|spec| spec.capacity.as_ref()?.get("storage")))
}

/// What the claim asks for, in bytes.
pub fn requested_bytes(claim: &PersistentVolumeClaim) -> i64 {
    let resources = claim.spec.as_ref().and_then(|spec| spec.resources.as_ref());
    bytes(resources.and_then(|resources| resources.requests.as_ref()?.get("storage")))
}

/// Large enough, of the claim's mode, and there to stay.
fn holds(claim: &PersistentVolumeClaim, volume: &PersistentVolume) -> bool {
    let (Some(wanted), Some(offered)) = (&claim.spec, &volume.spec) else { return false };
    let mode = |mode: &Option<String>| mode.clone().unwrap_or_else(|| "Filesystem".to_owned());
    volume.metadata.deletion_timestamp.is_none()
        && mode(&wanted.volume_mode) == mode(&offered.volume_mode)
        && capacity_bytes(volume) >= requested_bytes(claim)
}

fn suits(claim: &PersistentVolumeClaim, volume: &PersistentVolume) -> bool {
    let (Some(wanted), Some(offered)) = (&claim.spec, &volume.spec) else { return false };
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    let modes = offered.access_modes.as_deref().unwrap_or_default();
    let selected = wanted.selector.as_ref().is_none_or(|selector| {
        Selector::compile(Some(selector)).is_ok_and(|s| s.matches(volume.metadata.labels.as_ref()))
    });
    text(&wanted.storage_class_name) == text(&offered.storage_class_name)
        && text(&wanted.volume_attributes_class_name) == text(&offered.volume_attributes_class_name)
        && wanted.access_modes.iter().flatten().all(|mode| modes.contains(mode))
        && selected
}

/// The volumes that the claim could have, the best first: one that is kept for it alone, or else the free ones that suit it,
/// small ones first.
pub fn fitting<'a>(
    claim: &PersistentVolumeClaim,
    volumes: impl Iterator<Item = &'a Arc<PersistentVolume>> + Clone,
) -> Vec<&'a Arc<PersistentVolume>> {
    let order = |volume: &&Arc<PersistentVolume>| (capacity_bytes(volume), volume.metadata.name.clone());
    let mut kept = volumes.clone().filter(|volume| is_kept_for(claim, volume)).peekable();
    if kept.peek().is_some() {
        return kept.filter(|volume| holds(claim, volume)).min_by_key(order).into_iter().collect();
    }
    let fits =
        |volume: &&Arc<PersistentVolume>| may_have(claim, volume) && holds(claim, volume) && suits(claim, volume);
    let mut fitting: Vec<_> = volumes.filter(fits).collect();
    fitting.sort_by_key(order);
    fitting
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn claim() -> PersistentVolumeClaim {
        serde_json::from_value(json!({"metadata": {"namespace": "n", "name": "c", "uid": "u"}, "spec": {
            "accessModes": ["ReadWriteOnce"], "storageClassName": "fast", "resources": {"requests": {"storage": "2Gi"}}}}))
        .unwrap()
    }

    fn volume(name: &str, size: &str, class: &str, reference: serde_json::Value) -> Arc<PersistentVolume> {
        Arc::new(
            serde_json::from_value(json!({"metadata": {"name": name}, "spec": {"capacity": {"storage": size},
                "accessModes": ["ReadWriteOnce", "ReadOnlyMany"], "storageClassName": class, "claimRef": reference}}))
            .unwrap(),
        )
    }

    fn names(claim: &PersistentVolumeClaim, all: &[Arc<PersistentVolume>]) -> Vec<String> {
        fitting(claim, all.iter()).into_iter().filter_map(|volume| volume.metadata.name.clone()).collect()
    }

    #[test]
    fn the_smallest_that_fits_comes_first_unless_one_is_kept() {
        let none = serde_json::Value::Null;
        let mut all = vec![
            volume("small", "1Gi", "fast", none.clone()),
            volume("large", "9Gi", "fast", none.clone()),
            volume("right", "3Gi", "fast", none.clone()),
            volume("slow", "3Gi", "slow", none),
            volume("taken", "2Gi", "fast", json!({"namespace": "n", "name": "c", "uid": "before"})),
        ];
        assert_eq!(names(&claim(), &all), ["right", "large"]);
        all.push(volume("kept", "9Gi", "slow", json!({"namespace": "n", "name": "c"})));
        assert_eq!(names(&claim(), &all), ["kept"], "what is kept for it, whatever its class");
        all.push(volume("too-small", "1Gi", "fast", json!({"namespace": "n", "name": "c", "uid": "u"})));
        assert_eq!(names(&claim(), &all), ["kept"]);
        assert!(names(&claim(), &all[..1]).is_empty());
    }

    #[test]
    fn a_volume_is_had_where_its_affinity_says() {
        let labels = BTreeMap::from([("zone".to_owned(), "a".to_owned())]);
        let term = json!({"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]});
        let mut of_zone = PersistentVolume::clone(&volume("v", "1Gi", "", serde_json::Value::Null));
        assert!(reaches(&of_zone, "n1", &BTreeMap::new()), "one without is had anywhere");
        let affinity = json!({"required": {"nodeSelectorTerms": [term]}});
        of_zone.spec.as_mut().unwrap().node_affinity = Some(serde_json::from_value(affinity).unwrap());
        assert!(reaches(&of_zone, "n1", &labels) && !reaches(&of_zone, "n1", &BTreeMap::new()));
    }
}
