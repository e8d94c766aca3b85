//! Where things lie below the pods directory. Pure; the same layout as upstream's kubelet.

use std::path::{Component, Path, PathBuf};

use k8s_openapi::api::core::v1::{Pod, Volume};

use crate::error::VolumeError;

/// The kinds of volume that are made here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum VolumeKind {
    EmptyDir,
    HostPath,
    ConfigMap,
    Secret,
    DownwardApi,
    Projected,
    /// An image: the runtime mounts it.
    Image,
    /// A claim, or a driver's volume: not made here.
    External,
}

impl VolumeKind {
    /// Which kind a volume is; an error names any other kind.
    pub fn of(volume: &Volume) -> Result<VolumeKind, VolumeError> {
        let kinds = [
            (volume.empty_dir.is_some(), VolumeKind::EmptyDir),
            (volume.host_path.is_some(), VolumeKind::HostPath),
            (volume.config_map.is_some(), VolumeKind::ConfigMap),
            (volume.secret.is_some(), VolumeKind::Secret),
            (volume.downward_api.is_some(), VolumeKind::DownwardApi),
            (volume.projected.is_some(), VolumeKind::Projected),
            (volume.persistent_volume_claim.is_some(), VolumeKind::External),
            (volume.ephemeral.is_some(), VolumeKind::External),
            (volume.csi.is_some(), VolumeKind::External),
            (volume.image.is_some(), VolumeKind::Image),
        ];
        if let Some((_, kind)) = kinds.into_iter().find(|(present, _)| *present) {
            return Ok(kind);
        }
        match source_name(volume) {
            None => Ok(VolumeKind::EmptyDir),
            Some(kind) => Err(VolumeError::Unsupported { volume: volume.name.clone(), kind }),
        }
    }

    /// The escaped plugin directory below `volumes`.
    fn directory(self) -> &'static str {
        match self {
            VolumeKind::EmptyDir => "kubernetes.io~empty-dir",
            VolumeKind::HostPath => "kubernetes.io~host-path",
            VolumeKind::ConfigMap => "kubernetes.io~configmap",
            VolumeKind::Secret => "kubernetes.io~secret",
            VolumeKind::DownwardApi => "kubernetes.io~downward-api",
            VolumeKind::Projected => "kubernetes.io~projected",
            VolumeKind::Image => "kubernetes.io~image",
            VolumeKind::External => "kubernetes.io~csi",
        }
    }
}

/// The field that holds the volume's source, as the manifest spells it.
fn source_name(volume: &Volume) -> Option<String> {
    let value = serde_json::to_value(volume).ok()?;
    value.as_object()?.keys().find(|key| *key != "name").cloned()
}

/// A pod's own directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodDir {
    pub uid: String,
    pub path: PathBuf,
}

impl PodDir {
    pub fn new(pods_root: &Path, uid: &str) -> Result<PodDir, VolumeError> {
        if !is_plain_name(uid) {
            return Err(VolumeError::NoUid { pod: uid.to_string() });
        }
        Ok(PodDir { uid: uid.to_string(), path: pods_root.join(uid) })
    }

    pub fn of(pods_root: &Path, pod: &Pod) -> Result<PodDir, VolumeError> {
        PodDir::new(pods_root, pod.metadata.uid.as_deref().unwrap_or_default())
    }

    pub fn ledger(&self) -> PathBuf {
        self.path.join("oarlock-mounts")
    }

    pub fn volume(&self, kind: VolumeKind, name: &str) -> Result<PathBuf, VolumeError> {
        Ok(self.path.join(relative_volume(kind, name)?))
    }

    /// Where the subPath mount number `index` of `container` is kept, relative to the pod's directory.
    pub fn relative_sub_path(volume: &str, container: &str, index: usize) -> Result<PathBuf, VolumeError> {
        for name in [volume, container] {
            if !is_plain_name(name) {
                return Err(VolumeError::Invalid { message: format!("{name:?} cannot be part of a path") });
            }
        }
        Ok(Path::new("volume-subpaths").join(volume).join(container).join(index.to_string()))
    }
}

/// A volume's directory, relative to the pod's.
pub(crate) fn relative_volume(kind: VolumeKind, name: &str) -> Result<PathBuf, VolumeError> {
    if !is_plain_name(name) {
        return Err(VolumeError::Invalid { message: format!("volume name {name:?} cannot be part of a path") });
    }
    Ok(Path::new("volumes").join(kind.directory()).join(name))
}

/// Whether a mount at this path (relative to the pod's directory) is one that a kubelet makes for a volume:
/// `volumes/<plugin>/<name>` of the kinds above, or `volume-subpaths/<volume>/<container>/<index>`.
pub(crate) fn is_own_mount_point(relative: &Path) -> bool {
    const PLUGINS: [&str; 5] = [
        "kubernetes.io~empty-dir",
        "kubernetes.io~configmap",
        "kubernetes.io~secret",
        "kubernetes.io~downward-api",
        "kubernetes.io~projected",
    ];
    let parts: Vec<&str> = relative.components().filter_map(|part| part.as_os_str().to_str()).collect();
    match parts.as_slice() {
        ["volumes", plugin, _name] => PLUGINS.contains(plugin),
        ["volume-subpaths", _volume, _container, _index] => true,
        _ => false,
    }
}

/// Whether a name is one path component and nothing else.
pub(crate) fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= 253 && name != "." && name != ".." && !name.contains(['/', '\0', '\n'])
}

/// Whether a path is relative and stays below where it starts, judged by its text.
pub(crate) fn is_contained(path: &Path) -> bool {
    path.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::NFSVolumeSource;

    use super::*;

    #[test]
    fn unsupported_volume_is_named_with_its_kind() {
        let volume = Volume {
            name: "data".into(),
            nfs: Some(NFSVolumeSource { path: "/".into(), server: "s".into(), ..Default::default() }),
            ..Default::default()
        };
        let message = VolumeKind::of(&volume).unwrap_err().to_string();
        assert!(message.contains("\"data\"") && message.contains("nfs"), "{message}");
    }

    #[test]
    fn volume_without_a_source_is_an_empty_dir() {
        assert_eq!(VolumeKind::of(&Volume { name: "a".into(), ..Default::default() }).unwrap(), VolumeKind::EmptyDir);
    }

    #[test]
    fn paths_are_upstreams() {
        let dir = PodDir::new(Path::new("/pods"), "u-1").unwrap();
        assert_eq!(
            dir.volume(VolumeKind::EmptyDir, "cache").unwrap(),
            Path::new("/pods/u-1/volumes/kubernetes.io~empty-dir/cache")
        );
        assert_eq!(PodDir::relative_sub_path("v", "c", 2).unwrap(), Path::new("volume-subpaths/v/c/2"));
    }

    #[test]
    fn hostile_names_never_reach_the_file_system() {
        for uid in ["", ".", "..", "a/b", "../x", "a\0b"] {
            assert!(PodDir::new(Path::new("/pods"), uid).is_err(), "{uid:?}");
        }
        assert!(relative_volume(VolumeKind::EmptyDir, "../../etc").is_err());
    }

    #[test]
    fn own_mount_points_are_told_from_foreign_ones() {
        assert!(is_own_mount_point(Path::new("volumes/kubernetes.io~empty-dir/a")));
        assert!(is_own_mount_point(Path::new("volume-subpaths/v/c/0")));
        assert!(!is_own_mount_point(Path::new("volumes/kubernetes.io~empty-dir/a/inner")));
        assert!(!is_own_mount_point(Path::new("volumes/kubernetes.io~csi/a")));
        assert!(!is_own_mount_point(Path::new("etc-hosts")));
    }
}
