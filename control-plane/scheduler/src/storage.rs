//! Claims, volumes and classes as far as they decide where a pod can run. Pure.

use std::collections::{HashMap, HashSet};

use k8s_openapi::api::core::v1::{NodeSelector, PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::StorageClass;
use oarlock_machinery::Key;

use crate::pod::PodInfo;

#[derive(Debug)]
struct Claim {
    /// The volume that it is bound to.
    volume: Option<String>,
    class: String,
    is_lost: bool,
    is_leaving: bool,
}

/// What is known of storage, kept up to date event by event.
#[derive(Debug, Default)]
pub(crate) struct Storage {
    claims: HashMap<Key, Claim>,
    /// Where each volume can be had; None where that is anywhere.
    volumes: HashMap<String, Option<NodeSelector>>,
    /// The classes whose claims wait for a pod that has a node.
    patient: HashSet<String>,
}

impl Storage {
    pub fn put_claim(&mut self, claim: &PersistentVolumeClaim) {
        let spec = claim.spec.as_ref();
        let phase = claim.status.as_ref().and_then(|status| status.phase.as_deref());
        let volume = spec.and_then(|spec| spec.volume_name.clone()).filter(|name| !name.is_empty());
        let seen = Claim {
            volume: volume.filter(|_| phase == Some("Bound")),
            class: spec.and_then(|spec| spec.storage_class_name.clone()).unwrap_or_default(),
            is_lost: phase == Some("Lost"),
            is_leaving: claim.metadata.deletion_timestamp.is_some(),
        };
        self.claims.insert(Key::of(claim), seen);
    }

    pub fn remove_claim(&mut self, key: &Key) {
        self.claims.remove(key);
    }

    pub fn put_volume(&mut self, name: String, volume: PersistentVolume) {
        let place = volume.spec.and_then(|spec| spec.node_affinity?.required);
        self.volumes.insert(name, place);
    }

    pub fn remove_volume(&mut self, name: &str) {
        self.volumes.remove(name);
    }

    pub fn put_class(&mut self, name: String, class: &StorageClass) {
        if class.volume_binding_mode.as_deref() == Some("WaitForFirstConsumer") {
            self.patient.insert(name);
        } else {
            self.patient.remove(&name);
        }
    }

    pub fn remove_class(&mut self, name: &str) {
        self.patient.remove(name);
    }

    /// Where the volumes of a pod's claims can be had, or why the pod can run nowhere, in upstream's words. Claims that wait for a
    /// pod with a node bind it to none.
    pub fn places(&self, pod: &PodInfo) -> Result<Vec<&NodeSelector>, String> {
        let mut places = Vec::new();
        for name in &pod.claims {
            let key = Key::new(pod.key.namespace.clone(), name.clone());
            let claim = self.claims.get(&key).ok_or_else(|| format!("persistentvolumeclaim {name:?} not found"))?;
            if claim.is_leaving {
                return Err(format!("persistentvolumeclaim {name:?} is being deleted"));
            }
            if claim.is_lost {
                return Err(format!("persistentvolumeclaim {name:?} bound to non-existent persistentvolume"));
            }
            match &claim.volume {
                Some(volume) => {
                    let place = self.volumes.get(volume).ok_or("pod has claims that are bound to unknown volumes")?;
                    places.extend(place);
                }
                None if self.patient.contains(&claim.class) => {}
                None => return Err("pod has unbound immediate PersistentVolumeClaims".to_owned()),
            }
        }
        Ok(places)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::cache::tests::pod;

    pub(crate) fn claim(name: &str, class: &str, volume: &str, phase: &str) -> PersistentVolumeClaim {
        let value = json!({"metadata": {"name": name, "namespace": "default"},
            "spec": {"storageClassName": class, "volumeName": volume}, "status": {"phase": phase}});
        serde_json::from_value(value).unwrap()
    }

    pub(crate) fn user(name: &str, claims: &[&str]) -> std::sync::Arc<PodInfo> {
        let volumes: Vec<Value> =
            claims.iter().map(|claim| json!({"name": claim, "persistentVolumeClaim": {"claimName": claim}})).collect();
        pod(name, json!({"spec": {"volumes": volumes}}))
    }

    pub(crate) fn volume_at(node: &str) -> PersistentVolume {
        let term = json!({"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}]});
        let affinity = json!({"required": {"nodeSelectorTerms": [term]}});
        serde_json::from_value(json!({"metadata": {}, "spec": {"nodeAffinity": affinity}})).unwrap()
    }

    #[test]
    fn a_pod_waits_for_its_claims_unless_they_wait_for_it() {
        let mut storage = Storage::default();
        let said = |storage: &Storage| storage.places(&user("p", &["data"])).map(|places| places.len());
        assert_eq!(said(&storage), Err("persistentvolumeclaim \"data\" not found".to_owned()));
        storage.put_claim(&claim("data", "local", "", "Pending"));
        assert_eq!(said(&storage), Err("pod has unbound immediate PersistentVolumeClaims".to_owned()));
        let class =
            |mode: &str| serde_json::from_value(json!({"provisioner": "p", "volumeBindingMode": mode})).unwrap();
        storage.put_class("local".to_owned(), &class("WaitForFirstConsumer"));
        assert_eq!(said(&storage), Ok(0));
        storage.put_class("local".to_owned(), &class("Immediate"));
        assert!(said(&storage).is_err());
        storage.put_claim(&claim("data", "local", "v", "Bound"));
        assert!(said(&storage).is_err(), "the volume is not known yet");
        storage.put_volume("v".to_owned(), volume_at("a"));
        assert_eq!(said(&storage), Ok(1));
        storage.put_claim(&claim("data", "local", "v", "Lost"));
        assert!(said(&storage).unwrap_err().ends_with("bound to non-existent persistentvolume"));
    }
}
