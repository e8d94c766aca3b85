//! What becomes of a volume whose claim is gone, by its reclaim policy. Pure.

use k8s_openapi::api::core::v1::PersistentVolume;

/// Whose turn it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Reclaim {
    /// Nobody's but the administrator's: the data stays.
    Kept,
    /// Whoever made the volume deletes it.
    ByItsMaker,
    /// Nobody can do what the policy says.
    Impossible { reason: &'static str, message: String },
}

/// Who made the volume, if it was made for a claim.
const MAKER: &str = "pv.kubernetes.io/provisioned-by";

pub(super) fn of(volume: &PersistentVolume) -> Reclaim {
    let name = volume.metadata.name.as_deref().unwrap_or_default();
    let policy = volume.spec.as_ref().and_then(|spec| spec.persistent_volume_reclaim_policy.as_deref());
    let made = volume.metadata.annotations.as_ref().is_some_and(|all| all.contains_key(MAKER));
    match policy {
        Some("Delete") if made => Reclaim::ByItsMaker,
        Some("Delete") => Reclaim::Impossible {
            reason: "VolumeFailedDelete",
            message: format!(
                "error getting deleter volume plugin for volume {name:?}: no deletable volume plugin matched"
            ),
        },
        Some("Recycle") => Reclaim::Impossible {
            reason: "VolumeFailedRecycle",
            message: "No recycler plugin found for the volume!".to_owned(),
        },
        _ => Reclaim::Kept,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_who_made_a_volume_deletes_it() {
        let of = |policy: &str, annotations: serde_json::Value| {
            let volume = json!({"metadata": {"name": "v", "annotations": annotations},
                "spec": {"persistentVolumeReclaimPolicy": policy}});
            super::of(&serde_json::from_value(volume).unwrap())
        };
        assert_eq!(of("Retain", json!({})), Reclaim::Kept);
        assert_eq!(of("Delete", json!({MAKER: "disks.example.com"})), Reclaim::ByItsMaker);
        assert!(matches!(of("Delete", json!({})), Reclaim::Impossible { reason: "VolumeFailedDelete", .. }));
        assert!(matches!(of("Recycle", json!({})), Reclaim::Impossible { reason: "VolumeFailedRecycle", .. }));
    }
}
