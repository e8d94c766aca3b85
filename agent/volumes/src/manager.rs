//! [`VolumeManager`]: sets a pod's volumes up, keeps them fresh, and takes them down again.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, VolumeMount};

use crate::error::VolumeError;
use crate::source::ObjectSource;

/// What a volume may need to know beside the pod itself.
#[derive(Debug, Clone, Default)]
pub struct PodFacts {
    pub node_name: String,
    pub host_ip: Option<std::net::IpAddr>,
    pub pod_ip: Option<std::net::IpAddr>,
    /// What a missing limit means in a downwardAPI resourceFieldRef.
    pub allocatable: Allocatable,
}

/// The node's allocatable resources.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Allocatable {
    pub cpu_millis: u64,
    pub memory_bytes: u64,
    pub ephemeral_storage_bytes: u64,
}

/// Sets up, refreshes and removes the volumes of all pods under one root directory.
pub struct VolumeManager {
    pods_root: PathBuf,
    #[allow(dead_code, reason = "read once volumes are made")]
    source: Arc<dyn ObjectSource>,
}

impl VolumeManager {
    /// `pods_root` is upstream's `<kubelet root>/pods`.
    pub fn new(pods_root: PathBuf, source: Arc<dyn ObjectSource>) -> Self {
        Self { pods_root, source }
    }

    /// Makes every volume of the pod ready to be mounted. Idempotent; safe to repeat after a crash.
    pub async fn set_up(&self, pod: &Pod, _facts: &PodFacts) -> Result<(), VolumeError> {
        Err(VolumeError::NoUid { pod: pod.metadata.name.clone().unwrap_or_default() })
    }

    /// Brings contents up to date (API objects, labels, tokens due for rotation). Changes nothing that is current.
    pub async fn refresh(&self, pod: &Pod, facts: &PodFacts) -> Result<(), VolumeError> {
        self.set_up(pod, facts).await
    }

    /// The host path to mount at `mount.mount_path` of `container`. `mount.sub_path` is honoured (hand `subPathExpr` over
    /// expanded, as `sub_path`): such a mount gets a race-free bind mount of its own.
    pub async fn host_path(&self, pod: &Pod, container: &str, mount: &VolumeMount) -> Result<PathBuf, VolumeError> {
        let _ = (pod, container);
        Ok(self.pods_root.join(&mount.name))
    }

    /// Unmounts and removes everything that was made for the pod, the pod's directory included. Takes every step and
    /// reports all that failed; a pod that has nothing is success.
    pub async fn tear_down(&self, _pod_uid: &str) -> Result<(), VolumeError> {
        Ok(())
    }

    /// UIDs that have a directory here and are not `known`.
    pub fn orphans(&self, _known: &HashSet<String>) -> Vec<String> {
        Vec::new()
    }
}

/// Whether the kind of volume behind `mount` is always mounted read-only (configMap, secret, downwardAPI, projected).
pub fn forces_read_only(pod: &Pod, mount: &VolumeMount) -> bool {
    let volumes = pod.spec.as_ref().and_then(|spec| spec.volumes.as_deref()).unwrap_or_default();
    volumes.iter().find(|volume| volume.name == mount.name).is_some_and(|volume| {
        volume.config_map.is_some()
            || volume.secret.is_some()
            || volume.downward_api.is_some()
            || volume.projected.is_some()
    })
}
