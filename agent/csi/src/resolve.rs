//! From a pod's volume to where it comes from: claim, persistent volume, and what a driver must be told of it. Pure.

use std::collections::BTreeMap;
use std::path::PathBuf;

use k8s_openapi::api::core::v1::{
    CSIPersistentVolumeSource, CSIVolumeSource, PersistentVolume, PersistentVolumeClaim, Pod, SecretReference, Volume,
};
use sha2::{Digest, Sha256};

use crate::error::CsiError;

/// A volume's origin.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Origin {
    Driver(Box<DriverVolume>),
    /// A directory of the node itself.
    Directory {
        path: PathBuf,
        read_only: bool,
        group: bool,
    },
    /// A block device of the node itself.
    Device {
        path: PathBuf,
        read_only: bool,
    },
}

/// A volume that a driver has.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct DriverVolume {
    pub driver: String,
    pub handle: String,
    /// The persistent volume's name, or the pod's for a volume of the pod's own.
    pub name: String,
    pub ephemeral: bool,
    /// A raw block device rather than a file system.
    pub block: bool,
    pub read_only: bool,
    pub fs_type: String,
    pub attributes: BTreeMap<String, String>,
    pub mount_options: Vec<String>,
    pub access_modes: Vec<String>,
    pub stage_secret: Option<SecretReference>,
    pub publish_secret: Option<SecretReference>,
    pub expand_secret: Option<SecretReference>,
    /// Namespace and name of the claim, and its capacity with that of the volume.
    pub claim: Option<(String, String)>,
    pub claim_capacity: Option<String>,
    pub volume_capacity: Option<String>,
}

pub(crate) fn sha256(text: &str) -> String {
    Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The name of the VolumeAttachment that an attacher makes.
pub(crate) fn attachment_name(handle: &str, driver: &str, node: &str) -> String {
    format!("csi-{}", sha256(&format!("{handle}{driver}{node}")))
}

/// The claim that a volume is of; None for volumes that have none. True when the claim must be the pod's own.
pub(crate) fn claim_of(pod: &Pod, volume: &Volume) -> Option<(String, bool)> {
    if let Some(claim) = &volume.persistent_volume_claim {
        return Some((claim.claim_name.clone(), false));
    }
    let pod_name = pod.metadata.name.as_deref().unwrap_or_default();
    volume.ephemeral.as_ref().map(|_| (format!("{pod_name}-{}", volume.name), true))
}

/// A volume that the pod itself describes.
pub(crate) fn inline(pod: &Pod, volume: &Volume, source: &CSIVolumeSource) -> DriverVolume {
    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
    let namespace = pod.metadata.namespace.clone();
    let secret = source.node_publish_secret_ref.as_ref();
    DriverVolume {
        driver: source.driver.clone(),
        handle: format!("csi-{}", sha256(&format!("{uid}{}", volume.name))),
        name: volume.name.clone(),
        ephemeral: true,
        read_only: source.read_only.unwrap_or(false),
        fs_type: source.fs_type.clone().unwrap_or_default(),
        attributes: source.volume_attributes.clone().unwrap_or_default(),
        publish_secret: secret.map(|secret| SecretReference { name: Some(secret.name.clone()), namespace }),
        ..Default::default()
    }
}

/// The claim, if it can be used by the pod; its volume's name.
pub(crate) fn check_claim(pod: &Pod, claim: &PersistentVolumeClaim, own: bool) -> Result<String, String> {
    let owners = claim.metadata.owner_references.iter().flatten();
    if own && !owners.into_iter().any(|owner| Some(&owner.uid) == pod.metadata.uid.as_ref()) {
        let of = |name: &Option<String>| name.clone().unwrap_or_default();
        return Err(format!(
            "PVC {}/{} was not created for pod {}/{} (pod is not owner)",
            of(&claim.metadata.namespace),
            of(&claim.metadata.name),
            of(&pod.metadata.namespace),
            of(&pod.metadata.name)
        ));
    }
    if claim.metadata.deletion_timestamp.is_some() && claim.metadata.finalizers.as_ref().is_none_or(Vec::is_empty) {
        return Err("PVC is being deleted".to_owned());
    }
    let bound = claim.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Bound");
    let volume = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone()).filter(|name| !name.is_empty());
    match volume.filter(|_| bound) {
        Some(volume) => Ok(volume),
        None => Err("PVC is not bound".to_owned()),
    }
}

/// What the bound volume is.
pub(crate) fn of_volume(
    volume: &Volume,
    claim: &PersistentVolumeClaim,
    found: &PersistentVolume,
) -> Result<Origin, String> {
    let name = found.metadata.name.clone().unwrap_or_default();
    let spec = found.spec.clone().unwrap_or_default();
    let claimed = spec.claim_ref.as_ref().and_then(|reference| reference.uid.as_deref());
    if claimed != claim.metadata.uid.as_deref() {
        return Err(format!("PV {name}'s claimRef points to wrong PVC"));
    }
    let block = spec.volume_mode.as_deref() == Some("Block");
    let read_only = volume.persistent_volume_claim.as_ref().and_then(|source| source.read_only).unwrap_or(false);
    if let Some(source) = &spec.csi {
        let driver = of_driver(&name, source, &spec, claim, read_only);
        return Ok(Origin::Driver(Box::new(driver)));
    }
    if let Some(local) = &spec.local {
        let path = local.path.clone().into();
        return Ok(match block {
            true => Origin::Device { path, read_only },
            false => Origin::Directory { path, read_only, group: true },
        });
    }
    if let Some(host) = spec.host_path.as_ref().filter(|_| !block) {
        return Ok(Origin::Directory { path: host.path.clone().into(), read_only, group: false });
    }
    Err(format!("PV {name} is of a kind that this node does not support"))
}

fn of_driver(
    name: &str,
    source: &CSIPersistentVolumeSource,
    spec: &k8s_openapi::api::core::v1::PersistentVolumeSpec,
    claim: &PersistentVolumeClaim,
    read_only: bool,
) -> DriverVolume {
    let storage = |amounts: Option<&BTreeMap<String, _>>| {
        let amount: Option<&k8s_openapi::apimachinery::pkg::api::resource::Quantity> = amounts?.get("storage");
        amount.map(|amount| amount.0.clone())
    };
    DriverVolume {
        driver: source.driver.clone(),
        handle: source.volume_handle.clone(),
        name: name.to_owned(),
        ephemeral: false,
        block: spec.volume_mode.as_deref() == Some("Block"),
        read_only: read_only || source.read_only.unwrap_or(false),
        fs_type: source.fs_type.clone().unwrap_or_default(),
        attributes: source.volume_attributes.clone().unwrap_or_default(),
        mount_options: spec.mount_options.clone().unwrap_or_default(),
        access_modes: spec.access_modes.clone().unwrap_or_default(),
        stage_secret: source.node_stage_secret_ref.clone(),
        publish_secret: source.node_publish_secret_ref.clone(),
        expand_secret: source.node_expand_secret_ref.clone(),
        claim: claim.metadata.namespace.clone().zip(claim.metadata.name.clone()),
        claim_capacity: storage(claim.status.as_ref().and_then(|status| status.capacity.as_ref())),
        volume_capacity: storage(spec.capacity.as_ref()),
    }
}

impl Origin {
    fn is_block(&self) -> bool {
        match self {
            Origin::Driver(volume) => volume.block,
            Origin::Directory { .. } => false,
            Origin::Device { .. } => true,
        }
    }

    /// A device is no file system to mount, and the other way round.
    pub(crate) fn refuse_wrong_use(&self, pod: &Pod, name: &str) -> Result<(), CsiError> {
        let spec = pod.spec.iter();
        let containers = spec.flat_map(|spec| spec.init_containers.iter().flatten().chain(&spec.containers));
        let (mut mounted, mut as_device) = (false, false);
        for container in containers {
            mounted |= container.volume_mounts.iter().flatten().any(|mount| mount.name == name);
            as_device |= container.volume_devices.iter().flatten().any(|device| device.name == name);
        }
        match self.is_block() {
            true if mounted => {
                Err(CsiError::Refused(format!("volume {name} has volumeMode Block, but is specified in volumeMounts")))
            }
            false if as_device => Err(CsiError::Refused(format!(
                "volume {name} has volumeMode Filesystem, but is specified in volumeDevices"
            ))),
            _ => Ok(()),
        }
    }
}

/// Whether the volume has grown and its file system has not.
pub(crate) fn to_grow(volume: &DriverVolume) -> Option<i64> {
    let bytes = |text: &Option<String>| text.as_deref().and_then(oarlock_quantity::units);
    let (has, is) = (bytes(&volume.claim_capacity)?, bytes(&volume.volume_capacity)?);
    (is > has).then_some(is)
}

impl DriverVolume {
    pub(crate) fn refuse_wrong_lifecycle(&self, modes: &[String]) -> Result<(), CsiError> {
        let mode = if self.ephemeral { "Ephemeral" } else { "Persistent" };
        let supported = if modes.is_empty() { mode == "Persistent" } else { modes.iter().any(|known| known == mode) };
        if supported {
            return Ok(());
        }
        let only = if modes.is_empty() { vec!["Persistent".to_owned()] } else { modes.to_vec() };
        let message = format!("volume mode {mode:?} not supported by driver {} (only supports {only:?})", self.driver);
        Err(CsiError::Refused(message))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod() -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "n", "uid": "u"}})).unwrap()
    }

    fn claim(extra: serde_json::Value) -> PersistentVolumeClaim {
        let mut claim = json!({"metadata": {"name": "c", "namespace": "n", "uid": "cu"}, "spec": {"volumeName": "pv"},
            "status": {"phase": "Bound", "capacity": {"storage": "1Gi"}}});
        for (key, value) in extra.as_object().unwrap() {
            claim[key] = value.clone();
        }
        serde_json::from_value(claim).unwrap()
    }

    #[test]
    fn a_claim_that_cannot_be_used_says_why() {
        assert_eq!(check_claim(&pod(), &claim(json!({})), false), Ok("pv".to_owned()));
        let unbound = claim(json!({"status": {"phase": "Pending"}}));
        assert_eq!(check_claim(&pod(), &unbound, false), Err("PVC is not bound".to_owned()));
        let foreign = check_claim(&pod(), &claim(json!({})), true).unwrap_err();
        assert_eq!(foreign, "PVC n/c was not created for pod n/p (pod is not owner)");
    }

    #[test]
    fn a_volume_of_another_claim_is_refused() {
        let volume: Volume =
            serde_json::from_value(json!({"name": "v", "persistentVolumeClaim": {"claimName": "c"}})).unwrap();
        let pv = |uid: &str| -> PersistentVolume {
            serde_json::from_value(json!({"metadata": {"name": "pv"}, "spec": {"claimRef": {"uid": uid},
                "capacity": {"storage": "2Gi"}, "mountOptions": ["noatime"], "accessModes": ["ReadWriteOnce"],
                "csi": {"driver": "d.io", "volumeHandle": "h", "fsType": "ext4"}}}))
            .unwrap()
        };
        let wrong = of_volume(&volume, &claim(json!({})), &pv("other")).unwrap_err();
        assert_eq!(wrong, "PV pv's claimRef points to wrong PVC");
        let Origin::Driver(found) = of_volume(&volume, &claim(json!({})), &pv("cu")).unwrap() else {
            panic!("a driver's volume")
        };
        assert_eq!((found.handle.as_str(), found.fs_type.as_str(), to_grow(&found)), ("h", "ext4", Some(2 << 30)));
    }

    #[test]
    fn a_device_is_not_mounted_and_a_file_system_is_no_device() {
        let volume: Volume =
            serde_json::from_value(json!({"name": "v", "persistentVolumeClaim": {"claimName": "c"}})).unwrap();
        let origin = |mode: &str, source: serde_json::Value| {
            let mut spec = json!({"claimRef": {"uid": "cu"}, "volumeMode": mode});
            spec.as_object_mut().unwrap().extend(source.as_object().unwrap().clone());
            let found = serde_json::from_value(json!({"metadata": {"name": "pv"}, "spec": spec})).unwrap();
            of_volume(&volume, &claim(json!({})), &found)
        };
        let csi = json!({"csi": {"driver": "d.io", "volumeHandle": "h"}});
        let local = json!({"local": {"path": "/dev/sdx"}});
        let with = |field: &str| -> Pod {
            serde_json::from_value(json!({"spec": {"containers": [{"name": "c", field: [
                {"name": "v", "mountPath": "/x", "devicePath": "/dev/x"}]}]}}))
            .unwrap()
        };
        let used = |origin: &Origin, field: &str| origin.refuse_wrong_use(&with(field), "v").map_err(|e| e.to_string());
        for (source, device) in [(&csi, false), (&local, true)] {
            let block = origin("Block", source.clone()).unwrap();
            assert_eq!(matches!(block, Origin::Device { .. }), device);
            assert!(used(&block, "volumeDevices").is_ok());
            assert_eq!(
                used(&block, "volumeMounts"),
                Err("volume v has volumeMode Block, but is specified in volumeMounts".to_owned())
            );
            let files = origin("Filesystem", source.clone()).unwrap();
            assert!(used(&files, "volumeMounts").is_ok());
            assert_eq!(
                used(&files, "volumeDevices"),
                Err("volume v has volumeMode Filesystem, but is specified in volumeDevices".to_owned())
            );
        }
        assert!(origin("Block", json!({"hostPath": {"path": "/x"}})).is_err());
    }

    #[test]
    fn names_are_those_that_attachers_and_drivers_expect() {
        assert_eq!(attachment_name("h", "d", "n").len(), 68);
        let source = CSIVolumeSource { driver: "d".into(), ..Default::default() };
        let volume = Volume { name: "v".into(), ..Default::default() };
        let inline = inline(&pod(), &volume, &source);
        assert_eq!(inline.handle, format!("csi-{}", sha256("uv")));
        assert!(inline.refuse_wrong_lifecycle(&[]).is_err());
        assert!(inline.refuse_wrong_lifecycle(&["Ephemeral".into()]).is_ok());
    }
}
