//! [`DeviceLedger`]: which container has which devices, and what the plugin said of them. Its text is the checkpoint file of
//! upstream's kubelet. Pure.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use oarlock_allocation::devices::Ids;
use oarlock_proto::deviceplugin::ContainerAllocateResponse;
use prost::Message;
use serde::{Deserialize, Serialize};

/// What a container was given of one resource.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Given {
    /// The devices by NUMA node; those without one under -1.
    pub by_node: BTreeMap<i64, Ids>,
    pub answer: ContainerAllocateResponse,
}

impl Given {
    pub fn ids(&self) -> Ids {
        self.by_node.values().flatten().cloned().collect()
    }
}

/// Who has which devices: by pod UID, container and resource.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct DeviceLedger {
    given: BTreeMap<String, BTreeMap<String, BTreeMap<String, Given>>>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct File {
    data: Data,
    #[serde(default)]
    checksum: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Data {
    pod_device_entries: Option<Vec<Entry>>,
    registered_devices: Option<BTreeMap<String, Option<BTreeSet<String>>>>,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    #[serde(rename = "PodUID")]
    pod: String,
    #[serde(rename = "ContainerName")]
    container: String,
    #[serde(rename = "ResourceName")]
    resource: String,
    #[serde(rename = "DeviceIDs")]
    devices: BTreeMap<i64, Ids>,
    #[serde(rename = "AllocResp", default)]
    answer: Option<String>,
}

impl DeviceLedger {
    pub fn of(&self, pod: &str, container: &str, resource: &str) -> Option<&Given> {
        self.given.get(pod)?.get(container)?.get(resource)
    }

    /// Everything that one container has, by resource.
    pub fn container(&self, pod: &str, container: &str) -> impl Iterator<Item = (&str, &Given)> {
        let resources = self.given.get(pod).and_then(|containers| containers.get(container));
        resources.into_iter().flatten().map(|(resource, given)| (resource.as_str(), given))
    }

    pub fn give(&mut self, pod: &str, container: &str, resource: &str, given: Given) {
        let containers = self.given.entry(pod.to_owned()).or_default();
        containers.entry(container.to_owned()).or_default().insert(resource.to_owned(), given);
    }

    /// Devices of a resource that somebody has.
    pub fn in_use(&self, resource: &str) -> Ids {
        let containers = self.given.values().flat_map(BTreeMap::values);
        containers.filter_map(|resources| resources.get(resource)).flat_map(Given::ids).collect()
    }

    pub fn pods(&self) -> impl Iterator<Item = &str> {
        self.given.keys().map(String::as_str)
    }

    pub fn has(&self, pod: &str) -> bool {
        self.given.contains_key(pod)
    }

    pub fn release(&mut self, pod: &str) {
        self.given.remove(pod);
    }

    /// The checkpoint, with the devices that plugins have registered.
    pub fn text(&self, registered: BTreeMap<String, Ids>) -> String {
        let mut entries = Vec::new();
        for (pod, containers) in &self.given {
            for (container, resources) in containers {
                for (resource, given) in resources {
                    entries.push(Entry {
                        pod: pod.clone(),
                        container: container.clone(),
                        resource: resource.clone(),
                        devices: given.by_node.clone(),
                        answer: Some(STANDARD.encode(given.answer.encode_to_vec())),
                    });
                }
            }
        }
        let registered = registered.into_iter().map(|(resource, ids)| (resource, Some(ids))).collect();
        let data = Data { pod_device_entries: Some(entries), registered_devices: Some(registered) };
        serde_json::to_string(&File { data, checksum: 0 }).unwrap_or_default()
    }

    /// Reads a checkpoint: who has what, and the resources that were registered.
    pub fn read(text: &str) -> Result<(Self, Vec<String>), serde_json::Error> {
        let data = serde_json::from_str::<File>(text)?.data;
        let mut ledger = Self::default();
        for entry in data.pod_device_entries.unwrap_or_default() {
            let bytes = entry.answer.and_then(|text| STANDARD.decode(text).ok()).unwrap_or_default();
            let answer = ContainerAllocateResponse::decode(bytes.as_slice()).unwrap_or_default();
            ledger.give(&entry.pod, &entry.container, &entry.resource, Given { by_node: entry.devices, answer });
        }
        Ok((ledger, data.registered_devices.unwrap_or_default().into_keys().collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_reads_back_with_what_the_plugin_said() {
        let mut ledger = DeviceLedger::default();
        let answer = ContainerAllocateResponse { envs: [("A".into(), "1".into())].into(), ..Default::default() };
        let by_node = BTreeMap::from([(0, Ids::from(["d1".to_owned()]))]);
        ledger.give("u", "c", "example.com/card", Given { by_node, answer });
        let text = ledger.text(BTreeMap::from([("example.com/card".to_owned(), Ids::from(["d1".to_owned()]))]));
        assert!(text.contains(r#""PodUID":"u""#) && text.contains(r#""DeviceIDs":{"0":["d1"]}"#), "{text}");
        let (again, registered) = DeviceLedger::read(&text).unwrap();
        assert_eq!((again.clone(), registered), (ledger, vec!["example.com/card".to_owned()]));
        assert_eq!(again.in_use("example.com/card"), Ids::from(["d1".to_owned()]));
        assert!(DeviceLedger::read("{").is_err());
    }

    #[test]
    fn another_kubelets_checkpoint_is_read() {
        let text = r#"{"Data":{"PodDeviceEntries":null,"RegisteredDevices":{"r.io/x":null}},"Checksum":3}"#;
        assert_eq!(DeviceLedger::read(text).unwrap(), (DeviceLedger::default(), vec!["r.io/x".to_owned()]));
    }
}
