//! Which volume suits a claim. Pure.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim};
use oarlock_machinery::Selector;

pub(super) fn is_bound(claim: &PersistentVolumeClaim) -> bool {
    claim.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Bound")
}

/// Whether the volume is kept for a claim of that name.
pub(super) fn names(volume: &PersistentVolume, claim: &PersistentVolumeClaim) -> bool {
    let reference = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref());
    reference.is_some_and(|of| (&of.namespace, &of.name) == (&claim.metadata.namespace, &claim.metadata.name))
}

/// Whether the volume is free, or kept for this very claim.
pub(super) fn may_have(claim: &PersistentVolumeClaim, volume: &PersistentVolume) -> bool {
    let Some(reference) = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref()) else { return true };
    reference.namespace == claim.metadata.namespace
        && reference.name == claim.metadata.name
        && reference.uid.as_ref().is_none_or(|uid| uid.is_empty() || Some(uid) == claim.metadata.uid.as_ref())
}

fn kept_for(claim: &PersistentVolumeClaim, volume: &PersistentVolume) -> bool {
    volume.spec.as_ref().is_some_and(|spec| spec.claim_ref.is_some()) && may_have(claim, volume)
}

fn bytes(amount: Option<&k8s_openapi::apimachinery::pkg::api::resource::Quantity>) -> i64 {
    amount.and_then(|amount| oarlock_quantity::units(&amount.0)).unwrap_or(0)
}

fn capacity(volume: &PersistentVolume) -> i64 {
    bytes(volume.spec.as_ref().and_then(|spec| spec.capacity.as_ref()?.get("storage")))
}

fn suits(claim: &PersistentVolumeClaim, volume: &PersistentVolume) -> bool {
    let (Some(wanted), Some(offered)) = (&claim.spec, &volume.spec) else { return false };
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    let mode = |mode: &Option<String>| mode.clone().unwrap_or_else(|| "Filesystem".to_owned());
    let modes = offered.access_modes.as_deref().unwrap_or_default();
    let request = wanted.resources.as_ref().and_then(|resources| resources.requests.as_ref()?.get("storage"));
    let selected = wanted.selector.as_ref().is_none_or(|selector| {
        Selector::compile(Some(selector)).is_ok_and(|s| s.matches(volume.metadata.labels.as_ref()))
    });
    volume.metadata.deletion_timestamp.is_none()
        && text(&wanted.storage_class_name) == text(&offered.storage_class_name)
        && mode(&wanted.volume_mode) == mode(&offered.volume_mode)
        && wanted.access_modes.iter().flatten().all(|mode| modes.contains(mode))
        && capacity(volume) >= bytes(request)
        && selected
}

/// A volume that is kept for the claim, or else the smallest free one that suits it; with a node, one that can be had there.
pub(super) fn best(
    claim: &PersistentVolumeClaim,
    volumes: &[Arc<PersistentVolume>],
    node: Option<&Node>,
) -> Option<Arc<PersistentVolume>> {
    let there = |volume: &PersistentVolume| node.is_none_or(|node| super::place::reaches(volume, node));
    let fitting = volumes.iter().filter(|volume| may_have(claim, volume) && suits(claim, volume) && there(volume));
    let order =
        |volume: &&Arc<PersistentVolume>| (!kept_for(claim, volume), capacity(volume), volume.metadata.name.clone());
    fitting.min_by_key(order).cloned()
}

/// The phase of a volume whose claim is this, or gone.
pub(super) fn phase(volume: &PersistentVolume, claim: Option<&PersistentVolumeClaim>) -> &'static str {
    let Some(reference) = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref()) else { return "Available" };
    let taken = reference.uid.as_ref().is_some_and(|uid| !uid.is_empty());
    match claim {
        _ if !taken => "Available",
        Some(claim) if claim.metadata.uid == reference.uid => "Bound",
        _ => "Released",
    }
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

    #[test]
    fn the_smallest_that_fits_is_taken_unless_one_is_kept() {
        let none = serde_json::Value::Null;
        let mut all = vec![
            volume("small", "1Gi", "fast", none.clone()),
            volume("large", "9Gi", "fast", none.clone()),
            volume("right", "3Gi", "fast", none.clone()),
            volume("slow", "3Gi", "slow", none),
            volume("taken", "2Gi", "fast", json!({"namespace": "n", "name": "c", "uid": "before"})),
        ];
        let name =
            |all: &[Arc<PersistentVolume>]| best(&claim(), all, None).and_then(|volume| volume.metadata.name.clone());
        assert_eq!(name(&all).as_deref(), Some("right"));
        all.push(volume("kept", "9Gi", "fast", json!({"namespace": "n", "name": "c"})));
        assert_eq!(name(&all).as_deref(), Some("kept"));
        assert_eq!(name(&all[..1]), None);
    }

    #[test]
    fn a_volume_outlives_its_claim_as_released() {
        let own = volume("v", "1Gi", "", json!({"namespace": "n", "name": "c", "uid": "u"}));
        assert_eq!((phase(&own, Some(&claim())), phase(&own, None)), ("Bound", "Released"));
        let kept = volume("v", "1Gi", "", json!({"namespace": "n", "name": "c"}));
        assert_eq!(phase(&kept, None), "Available");
    }
}
