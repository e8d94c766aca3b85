//! Which volume a claim gets, and what phase that leaves the volume in. Pure.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use oarlock_machinery::volumes;

/// Whether the volume is kept for a claim of that name.
pub(super) fn names(volume: &PersistentVolume, claim: &PersistentVolumeClaim) -> bool {
    let reference = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref());
    reference.is_some_and(|of| (&of.namespace, &of.name) == (&claim.metadata.namespace, &claim.metadata.name))
}

/// The volume for a claim that need not wait, or the one that is kept for a claim that waits.
pub(super) fn best(
    claim: &PersistentVolumeClaim,
    all: &[Arc<PersistentVolume>],
    waits: bool,
) -> Option<Arc<PersistentVolume>> {
    let fits = |volume: &&&Arc<PersistentVolume>| !waits || volumes::is_kept_for(claim, volume);
    volumes::fitting(claim, all.iter()).iter().find(fits).map(|volume| Arc::clone(volume))
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
    fn a_claim_that_waits_gets_only_what_is_kept_for_it() {
        let free = volume("free", "2Gi", "fast", serde_json::Value::Null);
        let kept = volume("kept", "9Gi", "fast", json!({"namespace": "n", "name": "c"}));
        let name = |all: &[Arc<PersistentVolume>], waits| {
            best(&claim(), all, waits).and_then(|volume| volume.metadata.name.clone())
        };
        assert_eq!(name(std::slice::from_ref(&free), false).as_deref(), Some("free"));
        assert_eq!(name(std::slice::from_ref(&free), true), None);
        assert_eq!(name(&[free, kept], true).as_deref(), Some("kept"));
    }

    #[test]
    fn a_volume_outlives_its_claim_as_released() {
        let own = volume("v", "1Gi", "", json!({"namespace": "n", "name": "c", "uid": "u"}));
        assert_eq!((phase(&own, Some(&claim())), phase(&own, None)), ("Bound", "Released"));
        let kept = volume("v", "1Gi", "", json!({"namespace": "n", "name": "c"}));
        assert_eq!(phase(&kept, None), "Available");
    }
}
