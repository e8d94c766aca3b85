//! [`Cluster`]: what the API says of claims, volumes and drivers, and what the node tells it. Calls are bounded in time by the
//! implementation.

use std::collections::BTreeMap;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Secret};
use k8s_openapi::api::storage::v1::{CSIDriver, VolumeAttachment};
use oarlock_volumes::{IssuedToken, TokenOrder};

/// The API could not be asked, or refused.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct ClusterError {
    pub message: String,
}

/// A driver as the node's CSINode object lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeDriver {
    pub name: String,
    pub node_id: String,
    /// The most volumes of the driver on the node; None is no limit.
    pub most_volumes: Option<i32>,
    /// Where the node is, for the driver.
    pub topology: BTreeMap<String, String>,
}

/// The API server. An object that does not exist is `Ok(None)`.
#[async_trait]
pub trait Cluster: Send + Sync {
    fn node_name(&self) -> &str;
    async fn claim(&self, namespace: &str, name: &str) -> Result<Option<PersistentVolumeClaim>, ClusterError>;
    async fn volume(&self, name: &str) -> Result<Option<PersistentVolume>, ClusterError>;
    async fn driver(&self, name: &str) -> Result<Option<CSIDriver>, ClusterError>;
    async fn attachment(&self, name: &str) -> Result<Option<VolumeAttachment>, ClusterError>;
    async fn secret(&self, namespace: &str, name: &str) -> Result<Option<Secret>, ClusterError>;
    async fn token(&self, order: &TokenOrder) -> Result<IssuedToken, ClusterError>;
    /// Lists the driver in CSINode and notes what it says of the node in Node.
    async fn add_driver(&self, driver: &NodeDriver) -> Result<(), ClusterError>;
    async fn remove_driver(&self, name: &str) -> Result<(), ClusterError>;
    /// The file system on the node is as large as the volume now.
    async fn resized(&self, namespace: &str, claim: &str, capacity: &str) -> Result<(), ClusterError>;
}
