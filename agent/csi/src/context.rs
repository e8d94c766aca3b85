//! What a driver is told with a volume: capability, context, and how the pod's group comes to it. Pure.

use std::collections::{BTreeMap, HashMap};

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::storage::v1::CSIDriverSpec;
use oarlock_proto::csi;
use oarlock_proto::csi::volume_capability::access_mode::Mode;
use oarlock_proto::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};

use crate::client::{Abilities, Ability};
use crate::resolve::DriverVolume;

/// How the pod's fsGroup reaches the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Group {
    None,
    /// The driver mounts with it.
    Mounted(u32),
    /// The agent gives the files to it.
    Given(u32),
}

pub(crate) fn group(pod: &Pod, volume: &DriverVolume, driver: &CSIDriverSpec, abilities: &Abilities) -> Group {
    let context = pod.spec.as_ref().and_then(|spec| spec.security_context.as_ref());
    let Some(gid) = context.and_then(|context| context.fs_group).and_then(|gid| u32::try_from(gid).ok()) else {
        return Group::None;
    };
    let single = |mode: &String| mode == "ReadWriteOnce" || mode == "ReadWriteOncePod";
    let applies = match driver.fs_group_policy.as_deref() {
        Some("None") => false,
        Some("File") => true,
        _ => !volume.fs_type.is_empty() && volume.access_modes.iter().any(single),
    };
    if volume.block {
        return Group::None;
    }
    if abilities.can(Ability::VolumeMountGroup) {
        return Group::Mounted(gid);
    }
    if applies && !volume.read_only { Group::Given(gid) } else { Group::None }
}

pub(crate) fn capability(volume: &DriverVolume, abilities: &Abilities, group: Group) -> csi::VolumeCapability {
    let single = abilities.can(Ability::SingleNodeMultiWriter);
    let mode = match volume.access_modes.first().map(String::as_str) {
        Some("ReadOnlyMany") => Mode::MultiNodeReaderOnly,
        Some("ReadWriteMany") => Mode::MultiNodeMultiWriter,
        Some("ReadWriteOncePod") if single => Mode::SingleNodeSingleWriter,
        _ if single => Mode::SingleNodeMultiWriter,
        _ => Mode::SingleNodeWriter,
    };
    let mount = MountVolume {
        fs_type: volume.fs_type.clone(),
        mount_flags: volume.mount_options.clone(),
        volume_mount_group: match group {
            Group::Mounted(gid) => gid.to_string(),
            _ => String::new(),
        },
    };
    let access = match volume.block {
        true => AccessType::Block(BlockVolume {}),
        false => AccessType::Mount(mount),
    };
    csi::VolumeCapability { access_type: Some(access), access_mode: Some(AccessMode { mode: mode as i32 }) }
}

/// The volume's attributes, with those of the pod where the driver asks for them.
pub(crate) fn context(pod: &Pod, volume: &DriverVolume, driver: &CSIDriverSpec) -> HashMap<String, String> {
    let mut context: HashMap<String, String> = volume.attributes.clone().into_iter().collect();
    if driver.pod_info_on_mount != Some(true) {
        return context;
    }
    let of = |text: &Option<String>| text.clone().unwrap_or_default();
    let account = pod.spec.as_ref().map(|spec| of(&spec.service_account_name)).unwrap_or_default();
    for (name, value) in [
        ("pod.name", of(&pod.metadata.name)),
        ("pod.namespace", of(&pod.metadata.namespace)),
        ("pod.uid", of(&pod.metadata.uid)),
        ("serviceAccount.name", account),
    ] {
        context.insert(format!("csi.storage.k8s.io/{name}"), value);
    }
    let modes = driver.volume_lifecycle_modes.iter().flatten();
    if modes.into_iter().any(|mode| mode == "Ephemeral") {
        context.insert("csi.storage.k8s.io/ephemeral".to_owned(), volume.ephemeral.to_string());
    }
    context
}

/// Where a driver finds the pod's tokens.
pub(crate) const TOKENS: &str = "csi.storage.k8s.io/serviceAccount.tokens";

/// Tokens by audience, as drivers read them.
pub(crate) fn tokens(issued: &BTreeMap<String, oarlock_volumes::IssuedToken>) -> String {
    let shown = issued.iter().map(|(audience, token)| {
        let expires = token.expires_at.to_string();
        (audience.clone(), serde_json::json!({ "token": token.token, "expirationTimestamp": expires }))
    });
    serde_json::Value::Object(shown.collect()).to_string()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod() -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "n", "uid": "u"},
            "spec": {"containers": [], "serviceAccountName": "a", "securityContext": {"fsGroup": 7}}}))
        .unwrap()
    }

    fn volume(fs_type: &str, mode: &str) -> DriverVolume {
        DriverVolume { fs_type: fs_type.into(), access_modes: vec![mode.into()], ..Default::default() }
    }

    #[test]
    fn the_group_follows_the_drivers_policy() {
        let policy = |text: &str| CSIDriverSpec { fs_group_policy: Some(text.into()), ..Default::default() };
        let none = Abilities::default();
        let of = |volume: &DriverVolume, driver: &CSIDriverSpec| group(&pod(), volume, driver, &none);
        assert_eq!(of(&volume("ext4", "ReadWriteOnce"), &Default::default()), Group::Given(7));
        assert_eq!(of(&volume("", "ReadWriteOnce"), &Default::default()), Group::None);
        assert_eq!(of(&volume("ext4", "ReadWriteMany"), &Default::default()), Group::None);
        assert_eq!(of(&volume("", "ReadWriteMany"), &policy("File")), Group::Given(7));
        assert_eq!(of(&volume("ext4", "ReadWriteOnce"), &policy("None")), Group::None);
        let mounts: Abilities = [Ability::VolumeMountGroup].into_iter().collect();
        let mounted = group(&pod(), &volume("ext4", "ReadWriteOnce"), &policy("File"), &mounts);
        assert_eq!(mounted, Group::Mounted(7));
        let Some(AccessType::Mount(mount)) = capability(&volume("ext4", ""), &mounts, mounted).access_type else {
            panic!("a mount")
        };
        assert_eq!(mount.volume_mount_group, "7");
    }

    #[test]
    fn access_modes_have_finer_names_for_drivers_that_know_them() {
        let fine: Abilities = [Ability::SingleNodeMultiWriter].into_iter().collect();
        let mode = |abilities: &Abilities, mode: &str| {
            capability(&volume("", mode), abilities, Group::None).access_mode.unwrap().mode
        };
        let plain = Abilities::default();
        assert_eq!(mode(&plain, "ReadWriteOncePod"), Mode::SingleNodeWriter as i32);
        assert_eq!(mode(&fine, "ReadWriteOncePod"), Mode::SingleNodeSingleWriter as i32);
        assert_eq!(mode(&fine, "ReadWriteOnce"), Mode::SingleNodeMultiWriter as i32);
        assert_eq!(mode(&plain, "ReadOnlyMany"), Mode::MultiNodeReaderOnly as i32);
    }

    #[test]
    fn a_driver_that_asks_is_told_of_the_pod() {
        let mut volume = volume("", "ReadWriteOnce");
        volume.attributes.insert("a".into(), "1".into());
        assert_eq!(context(&pod(), &volume, &Default::default()).len(), 1);
        let driver = CSIDriverSpec {
            pod_info_on_mount: Some(true),
            volume_lifecycle_modes: Some(vec!["Persistent".into(), "Ephemeral".into()]),
            ..Default::default()
        };
        let told = context(&pod(), &volume, &driver);
        assert_eq!(told["csi.storage.k8s.io/pod.uid"], "u");
        assert_eq!(told["csi.storage.k8s.io/serviceAccount.name"], "a");
        assert_eq!(told["csi.storage.k8s.io/ephemeral"], "false");
    }
}
