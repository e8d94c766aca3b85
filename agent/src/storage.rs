//! [`NodeStorage`]: what volumes need of the API: claims, volumes and drivers to read, CSINode and claims to write.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim, Secret};
use k8s_openapi::api::storage::v1::{
    CSIDriver, CSINode, CSINodeDriver, CSINodeSpec, VolumeAttachment, VolumeNodeResources,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::api::{Api, Patch, PatchParams, PostParams};
use oarlock_csi::{Cluster, ClusterError, NodeDriver};
use oarlock_volumes::{IssuedToken, ObjectSource, TokenOrder};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::objects::Objects;
use crate::shared::Shared;

const CALL: Duration = Duration::from_secs(10);
/// Writers of one object may meet so often.
const ATTEMPTS: u32 = 5;
/// How often volumes that no pod has are looked for.
const LEFTOVERS: Duration = Duration::from_secs(120);
const NODE_IDS: &str = "csi.volume.kubernetes.io/nodeid";

/// The API as volumes see it.
pub(crate) struct NodeStorage {
    client: kube::Client,
    node_name: String,
    objects: Arc<Objects>,
    /// Registrations change one object: one at a time.
    turn: tokio::sync::Mutex<()>,
}

fn failed(error: impl std::fmt::Display) -> ClusterError {
    ClusterError { message: error.to_string() }
}

async fn bounded<T>(call: impl Future<Output = Result<T, kube::Error>>) -> Result<T, ClusterError> {
    match tokio::time::timeout(CALL, call).await {
        Ok(answer) => answer.map_err(failed),
        Err(_) => Err(failed("the API did not answer in time")),
    }
}

impl NodeStorage {
    pub(crate) fn new(client: kube::Client, node_name: String, objects: Arc<Objects>) -> Arc<Self> {
        Arc::new(Self { client, node_name, objects, turn: tokio::sync::Mutex::default() })
    }

    /// Changes the list of drivers in CSINode, which is made if need be.
    async fn change_drivers(&self, change: impl Fn(&mut Vec<CSINodeDriver>)) -> Result<(), ClusterError> {
        let api: Api<CSINode> = Api::all(self.client.clone());
        let mut last = failed("CSINode keeps changing");
        for _ in 0..ATTEMPTS {
            let written = match bounded(api.get_opt(&self.node_name)).await? {
                Some(mut found) => {
                    let before = found.spec.drivers.clone();
                    change(&mut found.spec.drivers);
                    if found.spec.drivers == before {
                        return Ok(());
                    }
                    // Refused where somebody else has changed it meanwhile.
                    let version = found.metadata.resource_version;
                    let patch = json!({ "metadata": { "resourceVersion": version }, "spec": found.spec });
                    bounded(api.patch(&self.node_name, &PatchParams::default(), &Patch::Merge(patch))).await
                }
                None => {
                    let mut drivers = Vec::new();
                    change(&mut drivers);
                    let object = self.new_csi_node(drivers).await?;
                    bounded(api.create(&PostParams::default(), &object)).await
                }
            };
            match written {
                Ok(_) => return Ok(()),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    async fn new_csi_node(&self, drivers: Vec<CSINodeDriver>) -> Result<CSINode, ClusterError> {
        let nodes: Api<Node> = Api::all(self.client.clone());
        let node = bounded(nodes.get(&self.node_name)).await?;
        let owner = OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Node".to_owned(),
            name: self.node_name.clone(),
            uid: node.metadata.uid.unwrap_or_default(),
            ..Default::default()
        };
        let metadata = ObjectMeta {
            name: Some(self.node_name.clone()),
            owner_references: Some(vec![owner]),
            ..Default::default()
        };
        Ok(CSINode { metadata, spec: CSINodeSpec { drivers } })
    }

    /// Notes on the node object what drivers call the node, and where they say it is.
    async fn note_on_node(&self, name: &str, id: Option<&str>, labels: Value) -> Result<(), ClusterError> {
        let api: Api<Node> = Api::all(self.client.clone());
        let node = bounded(api.get(&self.node_name)).await?;
        let noted = node.metadata.annotations.as_ref().and_then(|all| all.get(NODE_IDS));
        let mut ids: BTreeMap<String, String> =
            noted.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
        match id {
            Some(id) => drop(ids.insert(name.to_owned(), id.to_owned())),
            None => drop(ids.remove(name)),
        }
        let text = (!ids.is_empty()).then(|| json!(ids).to_string());
        let patch = json!({ "metadata": { "annotations": { NODE_IDS: text }, "labels": labels } });
        bounded(api.patch(&self.node_name, &PatchParams::default(), &Patch::Merge(patch))).await.map(drop)
    }
}

#[async_trait]
impl Cluster for NodeStorage {
    fn node_name(&self) -> &str {
        &self.node_name
    }

    async fn claim(&self, namespace: &str, name: &str) -> Result<Option<PersistentVolumeClaim>, ClusterError> {
        bounded(Api::namespaced(self.client.clone(), namespace).get_opt(name)).await
    }

    async fn volume(&self, name: &str) -> Result<Option<PersistentVolume>, ClusterError> {
        bounded(Api::all(self.client.clone()).get_opt(name)).await
    }

    async fn driver(&self, name: &str) -> Result<Option<CSIDriver>, ClusterError> {
        bounded(Api::all(self.client.clone()).get_opt(name)).await
    }

    async fn attachment(&self, name: &str) -> Result<Option<VolumeAttachment>, ClusterError> {
        bounded(Api::all(self.client.clone()).get_opt(name)).await
    }

    async fn secret(&self, namespace: &str, name: &str) -> Result<Option<Secret>, ClusterError> {
        bounded(Api::namespaced(self.client.clone(), namespace).get_opt(name)).await
    }

    async fn token(&self, order: &TokenOrder) -> Result<IssuedToken, ClusterError> {
        self.objects.token(order).await.map_err(failed)
    }

    async fn add_driver(&self, driver: &NodeDriver) -> Result<(), ClusterError> {
        let _turn = self.turn.lock().await;
        self.note_on_node(&driver.name, Some(&driver.node_id), json!(driver.topology)).await?;
        let count = driver.most_volumes.map(|count| VolumeNodeResources { count: Some(count) });
        let keys: Vec<String> = driver.topology.keys().cloned().collect();
        let entry = CSINodeDriver {
            name: driver.name.clone(),
            node_id: driver.node_id.clone(),
            topology_keys: (!keys.is_empty()).then_some(keys),
            allocatable: count,
        };
        self.change_drivers(|drivers| {
            match drivers.iter_mut().find(|known| known.name == entry.name) {
                Some(known) => *known = entry.clone(),
                None => drivers.push(entry.clone()),
            };
        })
        .await
    }

    async fn remove_driver(&self, name: &str) -> Result<(), ClusterError> {
        let _turn = self.turn.lock().await;
        self.change_drivers(|drivers| drivers.retain(|known| known.name != name)).await?;
        self.note_on_node(name, None, json!({})).await
    }

    async fn resized(&self, namespace: &str, claim: &str, capacity: &str) -> Result<(), ClusterError> {
        let api: Api<PersistentVolumeClaim> = Api::namespaced(self.client.clone(), namespace);
        let found = bounded(api.get(claim)).await?;
        let conditions = found.status.and_then(|status| status.conditions).unwrap_or_default();
        let over = |kind: &str| matches!(kind, "Resizing" | "FileSystemResizePending");
        let left: Vec<_> = conditions.into_iter().filter(|condition| !over(&condition.type_)).collect();
        let patch = json!({ "status": { "capacity": { "storage": capacity }, "conditions": left } });
        bounded(api.patch_status(claim, &PatchParams::default(), &Patch::Merge(patch))).await.map(drop)
    }
}

/// Gives volumes that no pod has back to their drivers, now and then, until `shutdown`.
pub(crate) async fn give_back_leftovers(shared: Arc<Shared>, shutdown: CancellationToken) {
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(LEFTOVERS) => {}
        }
        shared.storage.unstage_leftovers().await;
    }
}
