//! What a pod's manifest asks of its volumes. Pure.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::{Container, Pod, PodSecurityContext, Volume, VolumeMount};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::error::VolumeError;
use crate::layout::VolumeKind;
use crate::manager::PodFacts;
use crate::ownership::{ChangePolicy, FsGroup};
use crate::place::Medium;

/// Regular and init containers.
fn containers(pod: &Pod) -> impl Iterator<Item = &Container> {
    pod.spec.iter().flat_map(|spec| spec.init_containers.iter().flatten().chain(&spec.containers))
}

/// The mounts of a container of any sort, by its name.
pub(crate) fn mounts_of<'a>(pod: &'a Pod, container: &str) -> Option<&'a [VolumeMount]> {
    let regular = containers(pod).find(|c| c.name == container).map(|c| c.volume_mounts.as_deref());
    let ephemeral = || {
        let spec = pod.spec.as_ref()?;
        let found = spec.ephemeral_containers.iter().flatten().find(|c| c.name == container)?;
        Some(found.volume_mounts.as_deref())
    };
    regular.or_else(ephemeral).map(Option::unwrap_or_default)
}

/// The volumes that some container mounts, in the manifest's order. Others are left alone, as upstream has it.
pub(crate) fn used_volumes(pod: &Pod) -> Result<Vec<&Volume>, VolumeError> {
    let Some(spec) = &pod.spec else { return Ok(Vec::new()) };
    let ephemeral = spec.ephemeral_containers.iter().flatten().flat_map(|c| c.volume_mounts.iter().flatten());
    let mounts = containers(pod).flat_map(|c| c.volume_mounts.iter().flatten()).chain(ephemeral);
    let devices = containers(pod).flat_map(|c| c.volume_devices.iter().flatten());
    let names = mounts.map(|mount| mount.name.as_str()).chain(devices.map(|device| device.name.as_str()));
    let names: BTreeSet<&str> = names.collect();
    let volumes: Vec<&Volume> =
        spec.volumes.iter().flatten().filter(|volume| names.contains(volume.name.as_str())).collect();
    match names.iter().find(|name| volumes.iter().all(|volume| volume.name != **name)) {
        Some(name) => Err(VolumeError::UnknownVolume { volume: name.to_string() }),
        None => Ok(volumes),
    }
}

pub(crate) fn find_volume<'a>(pod: &'a Pod, name: &str) -> Result<&'a Volume, VolumeError> {
    let volumes = pod.spec.as_ref().and_then(|spec| spec.volumes.as_deref()).unwrap_or_default();
    volumes
        .iter()
        .find(|volume| volume.name == name)
        .ok_or_else(|| VolumeError::UnknownVolume { volume: name.to_string() })
}

fn security(pod: &Pod) -> Option<&PodSecurityContext> {
    pod.spec.as_ref()?.security_context.as_ref()
}

/// The pod's fsGroup as it applies to a kind of volume.
pub(crate) fn fs_group(pod: &Pod, kind: VolumeKind) -> Option<FsGroup> {
    let gid = u32::try_from(security(pod)?.fs_group?).ok()?;
    match kind {
        VolumeKind::HostPath | VolumeKind::External => None,
        VolumeKind::EmptyDir => Some(FsGroup { gid, read_only: false }),
        _ => Some(FsGroup { gid, read_only: true }),
    }
}

pub(crate) fn change_policy(pod: &Pod) -> ChangePolicy {
    match security(pod).and_then(|context| context.fs_group_change_policy.as_deref()) {
        Some("OnRootMismatch") => ChangePolicy::OnRootMismatch,
        _ => ChangePolicy::Always,
    }
}

/// The one user that all containers run as, when the manifest names one; token files can then belong to it.
pub(crate) fn common_user(pod: &Pod) -> Option<u32> {
    let of_pod = security(pod).and_then(|context| context.run_as_user);
    let mut users = containers(pod).map(|c| c.security_context.as_ref().and_then(|s| s.run_as_user).or(of_pod));
    let first = users.next()??;
    users.all(|user| user == Some(first)).then(|| u32::try_from(first).ok()).flatten()
}

/// A quantity as bytes.
fn bytes(quantity: &Quantity) -> Option<u64> {
    oarlock_quantity::units(&quantity.0).and_then(|bytes| u64::try_from(bytes).ok())
}

/// The size of a memory-backed volume: what it asks for, but no more than the pod or the node may use.
pub(crate) fn memory_size_bytes(pod: &Pod, volume: &Volume, facts: &PodFacts) -> Option<u64> {
    let asked = volume
        .empty_dir
        .as_ref()
        .and_then(|source| source.size_limit.as_ref())
        .and_then(bytes)
        .filter(|size| *size > 0);
    let node = Some(facts.allocatable.memory_bytes).filter(|size| *size > 0);
    [asked, pod_memory_limit_bytes(pod), node].into_iter().flatten().min()
}

/// The sum of the containers' memory limits, when every one has a limit.
fn pod_memory_limit_bytes(pod: &Pod) -> Option<u64> {
    let limit = |container: &Container| {
        let quantity = container.resources.as_ref()?.limits.as_ref()?.get("memory")?;
        bytes(quantity).filter(|size| *size > 0)
    };
    let spec = pod.spec.as_ref()?;
    let is_sidecar = |container: &&Container| container.restart_policy.as_deref() == Some("Always");
    let sidecars = spec.init_containers.iter().flatten().filter(is_sidecar);
    let mut total: u64 = 0;
    for container in spec.containers.iter().chain(sidecars) {
        total = total.saturating_add(limit(container)?);
    }
    let init = spec.init_containers.iter().flatten().filter(|c| !is_sidecar(c)).filter_map(limit).max();
    Some(total.max(init.unwrap_or(0))).filter(|size| *size > 0)
}

/// What an emptyDir is kept in. Huge pages are of the size that the medium names, or of the only one that the pod asks for.
pub(crate) fn empty_dir_medium(pod: &Pod, volume: &Volume, facts: &PodFacts) -> Result<Medium, VolumeError> {
    let asked = volume.empty_dir.as_ref().and_then(|source| source.medium.as_deref()).unwrap_or_default();
    let refused = |problem: String| VolumeError::Medium { volume: volume.name.clone(), problem };
    let named = match asked {
        "" => return Ok(Medium::Disk),
        "Memory" => return Ok(Medium::Memory { size_bytes: memory_size_bytes(pod, volume, facts) }),
        "HugePages" => None,
        other => {
            let size = other.strip_prefix("HugePages-").and_then(page_bytes);
            Some(size.ok_or_else(|| refused(format!("medium {other:?} is none of emptyDir")))?)
        }
    };
    let mut sizes = huge_page_sizes(pod);
    sizes.retain(|size| named.is_none_or(|named| named == *size));
    match sizes.len() {
        1 => Ok(Medium::HugePages { page_bytes: sizes.pop_first().unwrap_or_default() }),
        0 => Err(refused(format!("medium {asked}: no container asks for huge pages of that size"))),
        _ => Err(refused(format!("medium {asked} names no size, and containers ask for huge pages of several"))),
    }
}

fn page_bytes(size: &str) -> Option<u64> {
    bytes(&Quantity(size.to_owned())).filter(|size| *size > 0)
}

/// The sizes of huge pages, in bytes, that anything in the pod asks for.
fn huge_page_sizes(pod: &Pod) -> BTreeSet<u64> {
    let of_pod = pod.spec.as_ref().and_then(|spec| spec.resources.as_ref());
    let all = containers(pod).filter_map(|container| container.resources.as_ref()).chain(of_pod);
    let named = all.flat_map(|resources| {
        let lists = [&resources.requests, &resources.limits];
        lists.into_iter().flatten().flat_map(|list| list.keys())
    });
    named.filter_map(|name| page_bytes(name.strip_prefix("hugepages-")?)).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::manager::Allocatable;

    fn pod(spec: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p", "uid": "u"}, "spec": spec})).unwrap()
    }

    #[test]
    fn only_mounted_volumes_are_used() {
        let pod = pod(json!({
            "containers": [{"name": "c", "volumeMounts": [{"name": "a", "mountPath": "/a"}]}],
            "volumes": [{"name": "a", "emptyDir": {}}, {"name": "b", "nfs": {"path": "/", "server": "s"}}],
        }));
        let names: Vec<&str> = used_volumes(&pod).unwrap().iter().map(|volume| volume.name.as_str()).collect();
        assert_eq!(names, ["a"]);
    }

    #[test]
    fn a_mount_of_a_missing_volume_is_named() {
        let pod = pod(json!({"containers": [{"name": "c", "volumeMounts": [{"name": "gone", "mountPath": "/a"}]}]}));
        assert!(used_volumes(&pod).unwrap_err().to_string().contains("\"gone\""));
    }

    #[test]
    fn the_common_user_needs_agreement() {
        let user = |spec| common_user(&pod(spec));
        assert_eq!(user(json!({"containers": [{"name": "c"}]})), None);
        assert_eq!(user(json!({"securityContext": {"runAsUser": 7}, "containers": [{"name": "c"}]})), Some(7));
        let differing = json!({"securityContext": {"runAsUser": 7},
            "containers": [{"name": "c"}, {"name": "d", "securityContext": {"runAsUser": 8}}]});
        assert_eq!(user(differing), None);
        let partly = json!({"containers": [{"name": "c", "securityContext": {"runAsUser": 8}}, {"name": "d"}]});
        assert_eq!(user(partly), None);
    }

    #[test]
    fn memory_volumes_never_exceed_pod_or_node() {
        let facts =
            PodFacts { allocatable: Allocatable { memory_bytes: 1 << 30, ..Default::default() }, ..Default::default() };
        let size = |limit: Option<&str>, asked: Option<&str>| {
            let pod = pod(json!({
                "containers": [{"name": "c", "resources": {"limits": limit.map(|l| json!({"memory": l}))}}],
                "volumes": [{"name": "a", "emptyDir": {"medium": "Memory", "sizeLimit": asked}}],
            }));
            let volume = find_volume(&pod, "a").unwrap().clone();
            memory_size_bytes(&pod, &volume, &facts)
        };
        assert_eq!(size(None, None), Some(1 << 30));
        assert_eq!(size(Some("64Mi"), None), Some(64 << 20));
        assert_eq!(size(Some("64Mi"), Some("16Mi")), Some(16 << 20));
        assert_eq!(size(None, Some("4Gi")), Some(1 << 30));
    }

    #[test]
    fn huge_pages_are_of_the_size_that_is_named_or_asked_for() {
        let medium = |medium: &str, sizes: &[&str]| {
            let limits: serde_json::Map<_, _> =
                sizes.iter().map(|size| (format!("hugepages-{size}"), json!("1Gi"))).collect();
            let pod = pod(json!({"containers": [{"name": "c", "resources": {"limits": limits}}],
                "volumes": [{"name": "a", "emptyDir": {"medium": medium}}]}));
            let volume = find_volume(&pod, "a").unwrap().clone();
            empty_dir_medium(&pod, &volume, &PodFacts::default()).map_err(|error| error.to_string())
        };
        let pages = |page_bytes| Ok(Medium::HugePages { page_bytes });
        assert_eq!(medium("HugePages", &["2Mi"]), pages(2 << 20));
        assert_eq!(medium("HugePages-1Gi", &["2Mi", "1Gi"]), pages(1 << 30));
        assert!(medium("HugePages", &["2Mi", "1Gi"]).unwrap_err().contains("of several"));
        assert!(medium("HugePages", &[]).unwrap_err().contains("no container asks"));
        assert!(medium("HugePages-1Gi", &["2Mi"]).unwrap_err().contains("no container asks"));
        assert!(medium("Tape", &["2Mi"]).unwrap_err().contains("\"Tape\""));
    }
}
