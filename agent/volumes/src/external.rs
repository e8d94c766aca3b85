//! [`External`]: volumes that come from elsewhere — claims of persistent volumes, and drivers' volumes of the pod's own.

use std::path::PathBuf;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{Pod, Volume};

use crate::error::VolumeError;

/// Brings such volumes to pods. Calls are bounded in time by the implementation, and may be repeated.
#[async_trait]
pub trait External: Send + Sync {
    async fn set_up(&self, pod: &Pod, volume: &Volume) -> Result<(), VolumeError>;
    /// Brings a volume that is set up to date: tokens, sizes.
    async fn refresh(&self, pod: &Pod, volume: &Volume) -> Result<(), VolumeError>;
    /// Where a volume that is set up is.
    fn path(&self, pod_uid: &str, volume: &str) -> Option<PathBuf>;
    fn read_only(&self, pod_uid: &str, volume: &str) -> bool;
    /// Takes all of a pod's volumes down; nothing there is success.
    async fn tear_down(&self, pod_uid: &str) -> Result<(), VolumeError>;
    /// UIDs of pods that have something. Blocks.
    fn leftovers(&self) -> Vec<String>;
}

/// A node without such volumes.
pub(crate) struct Nothing;

#[async_trait]
impl External for Nothing {
    async fn set_up(&self, _: &Pod, volume: &Volume) -> Result<(), VolumeError> {
        let kind = if volume.csi.is_some() { "csi" } else { "persistentVolumeClaim" };
        Err(VolumeError::Unsupported { volume: volume.name.clone(), kind: kind.to_owned() })
    }

    async fn refresh(&self, _: &Pod, _: &Volume) -> Result<(), VolumeError> {
        Ok(())
    }

    fn path(&self, _: &str, _: &str) -> Option<PathBuf> {
        None
    }

    fn read_only(&self, _: &str, _: &str) -> bool {
        false
    }

    async fn tear_down(&self, _: &str) -> Result<(), VolumeError> {
        Ok(())
    }

    fn leftovers(&self) -> Vec<String> {
        Vec::new()
    }
}
