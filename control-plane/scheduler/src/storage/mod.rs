//! Claims, volumes and classes as far as they decide where a pod can run: what is known of them, kept up to date event by event,
//! with what was promised to pods that have just been given a node. Pure.

mod judge;
mod progress;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ObjectReference, PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::{CSIDriver, CSIStorageCapacity, StorageClass};
use oarlock_machinery::volumes::{self, SELECTED_NODE};
use oarlock_machinery::{Key, Selector};

pub(crate) use judge::{Choice, Needs};
pub(crate) use progress::{Progress, Written, version};

use crate::pod::PodInfo;

/// How much a provisioner can make of a class on some of the nodes.
#[derive(Debug)]
struct Room {
    class: String,
    bytes: Option<i64>,
    /// None where no node is concerned.
    nodes: Option<Selector>,
}

/// What is known of storage.
#[derive(Debug, Default)]
pub(crate) struct Storage {
    claims: HashMap<Key, Arc<PersistentVolumeClaim>>,
    volumes: BTreeMap<String, Arc<PersistentVolume>>,
    classes: HashMap<String, Arc<StorageClass>>,
    /// Drivers that tell how much room they have.
    measuring: HashSet<String>,
    rooms: HashMap<Key, Room>,
    /// As they will be once what was promised is written. Each is left alone until the API shows it, or it is taken back.
    promised_volumes: HashMap<String, Arc<PersistentVolume>>,
    promised_claims: HashMap<Key, Arc<PersistentVolumeClaim>>,
}

impl Storage {
    pub fn put_claim(&mut self, mut claim: PersistentVolumeClaim) {
        let key = Key::of(&claim);
        claim.metadata.managed_fields = None;
        if selected_node(&claim).is_some() || volumes::is_bound(&claim) {
            self.promised_claims.remove(&key);
        }
        self.claims.insert(key, Arc::new(claim));
    }

    pub fn remove_claim(&mut self, key: &Key) {
        self.claims.remove(key);
        self.promised_claims.remove(key);
    }

    pub fn put_volume(&mut self, name: String, mut volume: PersistentVolume) {
        volume.metadata.managed_fields = None;
        if volume.spec.as_ref().is_some_and(|spec| spec.claim_ref.is_some()) {
            self.promised_volumes.remove(&name);
        }
        self.volumes.insert(name, Arc::new(volume));
    }

    pub fn remove_volume(&mut self, name: &str) {
        self.volumes.remove(name);
        self.promised_volumes.remove(name);
    }

    pub fn put_class(&mut self, name: String, class: StorageClass) {
        self.classes.insert(name, Arc::new(class));
    }

    pub fn remove_class(&mut self, name: &str) {
        self.classes.remove(name);
    }

    pub fn put_driver(&mut self, name: String, driver: &CSIDriver) {
        if driver.spec.storage_capacity == Some(true) {
            self.measuring.insert(name);
        } else {
            self.measuring.remove(&name);
        }
    }

    pub fn remove_driver(&mut self, name: &str) {
        self.measuring.remove(name);
    }

    pub fn put_room(&mut self, capacity: &CSIStorageCapacity) {
        let most = capacity.maximum_volume_size.as_ref().or(capacity.capacity.as_ref());
        let room = Room {
            class: capacity.storage_class_name.clone(),
            bytes: most.map(oarlock_machinery::quantity::value),
            nodes: capacity.node_topology.as_ref().and_then(|topology| Selector::compile(Some(topology)).ok()),
        };
        self.rooms.insert(Key::of(capacity), room);
    }

    pub fn remove_room(&mut self, key: &Key) {
        self.rooms.remove(key);
    }

    fn claim(&self, key: &Key) -> Option<&Arc<PersistentVolumeClaim>> {
        self.promised_claims.get(key).or_else(|| self.claims.get(key))
    }

    fn volume(&self, name: &str) -> Option<&Arc<PersistentVolume>> {
        self.promised_volumes.get(name).or_else(|| self.volumes.get(name))
    }

    fn all_volumes(&self) -> impl Iterator<Item = &Arc<PersistentVolume>> + Clone {
        self.volumes.iter().map(|(name, volume)| self.promised_volumes.get(name).unwrap_or(volume))
    }

    /// What the pod's claims need of a node, or why the pod can run nowhere, in upstream's words.
    pub fn needs(&self, pod: &PodInfo) -> Result<Needs<'_>, String> {
        let mut needs = Needs::of(self);
        for name in &pod.claims {
            let key = Key::new(pod.key.namespace.clone(), name.clone());
            let claim = self.claim(&key).ok_or_else(|| format!("persistentvolumeclaim {name:?} not found"))?;
            if claim.metadata.deletion_timestamp.is_some() {
                return Err(format!("persistentvolumeclaim {name:?} is being deleted"));
            }
            if claim.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Lost") {
                return Err(format!("persistentvolumeclaim {name:?} bound to non-existent persistentvolume"));
            }
            match volumes::volume_name(claim) {
                Some(volume) if volumes::is_bound(claim) => needs.add_bound(volume),
                None if self.is_patient(claim) => needs.add_open(key, claim),
                _ => return Err("pod has unbound immediate PersistentVolumeClaims".to_owned()),
            }
        }
        needs.sort();
        Ok(needs)
    }

    /// Whether the claim's class has it wait for a pod with a node.
    fn is_patient(&self, claim: &PersistentVolumeClaim) -> bool {
        let class = self.classes.get(volumes::class_name(claim));
        class.is_some_and(|class| class.volume_binding_mode.as_deref() == Some("WaitForFirstConsumer"))
    }

    /// Counts a choice as written before it is, so that no other pod is promised the same.
    pub fn promise(&mut self, choice: &Choice) {
        for (volume, key) in &choice.bind {
            let (Some(volume), Some(claim)) = (self.volumes.get(volume), self.claims.get(key)) else { continue };
            let mut promised = PersistentVolume::clone(volume);
            promised.spec.get_or_insert_default().claim_ref = Some(reference(claim));
            let name = promised.metadata.name.clone().unwrap_or_default();
            self.promised_volumes.insert(name, Arc::new(promised));
        }
        for key in &choice.provision {
            let Some(claim) = self.claims.get(key) else { continue };
            let mut promised = PersistentVolumeClaim::clone(claim);
            let annotations = promised.metadata.annotations.get_or_insert_default();
            annotations.insert(SELECTED_NODE.to_owned(), choice.node.clone());
            self.promised_claims.insert(key.clone(), Arc::new(promised));
        }
    }

    /// Takes back what was promised; what the API shows meanwhile stays.
    pub fn take_back(&mut self, choice: &Choice) {
        for (volume, _) in &choice.bind {
            self.promised_volumes.remove(volume);
        }
        for key in &choice.provision {
            self.promised_claims.remove(key);
        }
    }

    /// The volume of a choice as the API has it, and its claim.
    pub fn pair(&self, volume: &str, key: &Key) -> Option<(Arc<PersistentVolume>, Arc<PersistentVolumeClaim>)> {
        Some((self.volumes.get(volume)?.clone(), self.claims.get(key)?.clone()))
    }

    /// The claim as the API has it.
    pub fn known_claim(&self, key: &Key) -> Option<Arc<PersistentVolumeClaim>> {
        self.claims.get(key).cloned()
    }
}

/// The node that a scheduler has chosen for the claim.
fn selected_node(claim: &PersistentVolumeClaim) -> Option<&str> {
    claim.metadata.annotations.as_ref()?.get(SELECTED_NODE).map(String::as_str)
}

/// How a volume names its claim.
pub(crate) fn reference(claim: &PersistentVolumeClaim) -> ObjectReference {
    ObjectReference {
        kind: Some("PersistentVolumeClaim".to_owned()),
        api_version: Some("v1".to_owned()),
        namespace: claim.metadata.namespace.clone(),
        name: claim.metadata.name.clone(),
        uid: claim.metadata.uid.clone(),
        resource_version: claim.metadata.resource_version.clone(),
        field_path: None,
    }
}

#[cfg(test)]
pub(crate) mod tests;
