//! What is mounted where in a container, in which order and with which options.

use std::path::{Path, PathBuf};

use oarlock_proto::cri::{self, MountPropagation};
use oci_spec::runtime::{Mount, MountBuilder};

use super::{HostFacts, SpecError};

/// Files and directories of the sandbox that its containers see; None where the container keeps its image's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SandboxFiles {
    pub resolv_conf: Option<PathBuf>,
    pub hostname: Option<PathBuf>,
    pub shm: Option<PathBuf>,
}

/// A volume of the container, its source found and ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Volume {
    pub destination: PathBuf,
    pub source: PathBuf,
    pub readonly: bool,
    pub recursive_readonly: bool,
    pub propagation: MountPropagation,
}

/// Everything that decides a container's mounts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Inputs<'a> {
    pub files: &'a SandboxFiles,
    pub volumes: &'a [Volume],
    pub privileged: bool,
    /// The container's control group, relative to each hierarchy's root.
    pub cgroup: &'a str,
    pub host: &'a HostFacts,
    pub readonly_rootfs: bool,
}

/// Checks one mount as asked for, before anybody looks at the file system.
pub(crate) fn check(mount: &cri::Mount) -> Result<MountPropagation, SpecError> {
    let field = format!("mounts[{}]", mount.container_path);
    if !mount.container_path.starts_with('/') {
        return Err(SpecError::invalid(field, "container_path is not absolute"));
    }
    let climbs = Path::new(&mount.container_path).components().any(|part| part.as_os_str() == "..");
    if climbs || clean(Path::new(&mount.container_path)) == Path::new("/") {
        return Err(SpecError::invalid(field, "container_path must lead below the root, without `..`"));
    }
    let propagation = MountPropagation::try_from(mount.propagation)
        .map_err(|_| SpecError::invalid(&field, format!("unknown propagation {}", mount.propagation)))?;
    super::namespace::mount_mapping(mount)?;
    if let Some(option) = mount.mount_options.first() {
        return Err(SpecError::unsupported(field, format!("mount option {option:?} is not known to this runtime")));
    }
    let image = mount.image.as_ref().is_some_and(|image| !image.image.is_empty());
    match (image, mount.host_path.is_empty()) {
        (false, true) => return Err(SpecError::invalid(field, "neither host_path nor image is set")),
        (true, true) if !mount.readonly => return Err(SpecError::invalid(field, "an image is mounted read-only")),
        (true, false) => return Err(SpecError::invalid(field, "host_path and image exclude each other")),
        (false, false) if !mount.host_path.starts_with('/') => {
            return Err(SpecError::invalid(field, "host_path is not absolute"));
        }
        _ => {}
    }
    if mount.recursive_read_only && !(mount.readonly && propagation == MountPropagation::PropagationPrivate) {
        return Err(SpecError::invalid(field, "recursive_read_only needs readonly and private propagation"));
    }
    Ok(propagation)
}

/// The mounts of a container, parents before children; a volume replaces what we would put at the same place.
pub(crate) fn for_container(inputs: &Inputs<'_>) -> Vec<Mount> {
    let mut mounts = own(inputs);
    mounts.extend(inputs.volumes.iter().map(volume));
    let mut kept: Vec<Mount> = Vec::with_capacity(mounts.len());
    for (index, mount) in mounts.iter().enumerate() {
        let replaced = mounts[index + 1..].iter().any(|later| clean(later.destination()) == clean(mount.destination()));
        if !replaced {
            kept.push(mount.clone());
        }
    }
    // Stable, so equals keep the order in which they were asked for.
    kept.sort_by_key(|mount| clean(mount.destination()).components().count());
    kept
}

/// The propagation of the root mount that lets every volume's own propagation work.
pub(crate) fn rootfs_propagation(volumes: &[Volume]) -> Option<&'static str> {
    let any = |wanted| volumes.iter().any(|volume| volume.propagation == wanted);
    if any(MountPropagation::PropagationBidirectional) {
        Some("shared")
    } else if any(MountPropagation::PropagationHostToContainer) {
        Some("slave")
    } else {
        None
    }
}

fn own(inputs: &Inputs<'_>) -> Vec<Mount> {
    let sys = if inputs.privileged { "rw" } else { "ro" };
    let mut mounts = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", sys]),
    ];
    mounts.extend(cgroups(inputs));
    let etc = if inputs.readonly_rootfs { "ro" } else { "rw" };
    let files = [(&inputs.files.resolv_conf, "/etc/resolv.conf"), (&inputs.files.hostname, "/etc/hostname")];
    for (source, destination) in files {
        if let Some(source) = source {
            mounts.push(bind(destination, source, &["rbind", "rprivate", etc]));
        }
    }
    if let Some(shm) = &inputs.files.shm {
        mounts.push(bind("/dev/shm", shm, &["rbind", "rprivate", "rw", "nosuid", "noexec", "nodev"]));
    }
    mounts
}

/// Version 2: the kernel's own view from inside a cgroup namespace. Version 1: a tmpfs with the container's own groups
/// bound into it, because a mount of type cgroup there would be writable.
fn cgroups(inputs: &Inputs<'_>) -> Vec<Mount> {
    let access = if inputs.privileged { "rw" } else { "ro" };
    if inputs.host.cgroup_v2 {
        return vec![mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", access])];
    }
    if inputs.host.cgroup_v1_hierarchies.is_empty() {
        return Vec::new();
    }
    let mut mounts =
        vec![mount("/sys/fs/cgroup", "tmpfs", "tmpfs", &["nosuid", "noexec", "nodev", "mode=755", "size=64k"])];
    for hierarchy in &inputs.host.cgroup_v1_hierarchies {
        let Some(name) = hierarchy.file_name() else { continue };
        let source = hierarchy.join(inputs.cgroup.trim_start_matches('/'));
        let destination = Path::new("/sys/fs/cgroup").join(name);
        mounts.push(bind(destination, &source, &["rbind", "rprivate", "nosuid", "noexec", "nodev", access]));
    }
    mounts
}

fn volume(volume: &Volume) -> Mount {
    let propagation = match volume.propagation {
        MountPropagation::PropagationPrivate => "rprivate",
        MountPropagation::PropagationHostToContainer => "rslave",
        MountPropagation::PropagationBidirectional => "rshared",
    };
    let access = match (volume.readonly, volume.recursive_readonly) {
        (false, _) => "rw",
        (true, false) => "ro",
        (true, true) => "rro",
    };
    bind(&volume.destination, &volume.source, &["rbind", propagation, access])
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Mount {
    build(Path::new(destination), kind, Path::new(source), options)
}

fn bind(destination: impl AsRef<Path>, source: &Path, options: &[&str]) -> Mount {
    build(destination.as_ref(), "bind", source, options)
}

fn build(destination: &Path, kind: &str, source: &Path, options: &[&str]) -> Mount {
    MountBuilder::default()
        .destination(destination)
        .typ(kind)
        .source(source)
        .options(options.iter().map(|option| (*option).to_owned()).collect::<Vec<_>>())
        .build()
        .unwrap_or_default()
}

/// The path without `.` and doubled slashes.
pub(crate) fn clean(path: &Path) -> PathBuf {
    path.components().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs<'a>(volumes: &'a [Volume], host: &'a HostFacts, files: &'a SandboxFiles) -> Inputs<'a> {
        Inputs { files, volumes, privileged: false, cgroup: "/kubepods/pod1/c1", host, readonly_rootfs: false }
    }

    fn at<'a>(mounts: &'a [Mount], destination: &str) -> Vec<&'a Mount> {
        mounts.iter().filter(|mount| mount.destination() == Path::new(destination)).collect()
    }

    fn volume_at(destination: &str) -> Volume {
        Volume {
            destination: destination.into(),
            source: "/src".into(),
            readonly: false,
            recursive_readonly: false,
            propagation: MountPropagation::PropagationPrivate,
        }
    }

    #[test]
    fn a_volume_replaces_our_own_mount_and_parents_come_first() {
        let files = SandboxFiles { resolv_conf: Some("/r".into()), ..SandboxFiles::default() };
        let volumes = [volume_at("/a/b/c"), volume_at("/etc//resolv.conf"), volume_at("/a")];
        let mounts = for_container(&inputs(&volumes, &HostFacts::default(), &files));
        assert_eq!(
            mounts.iter().filter(|mount| clean(mount.destination()) == Path::new("/etc/resolv.conf")).count(),
            1
        );
        let position = |path: &str| mounts.iter().position(|mount| mount.destination() == Path::new(path)).unwrap();
        assert!(position("/a") < position("/a/b/c"));
        assert!(position("/dev") < position("/dev/pts"));
    }

    #[test]
    fn version_1_groups_are_bound_read_only_and_never_mounted_as_type_cgroup() {
        let host = HostFacts { cgroup_v1_hierarchies: vec!["/sys/fs/cgroup/memory".into()], ..HostFacts::default() };
        let mounts = for_container(&inputs(&[], &host, &SandboxFiles::default()));
        assert!(mounts.iter().all(|mount| mount.typ().as_deref() != Some("cgroup")));
        let memory = at(&mounts, "/sys/fs/cgroup/memory")[0];
        assert_eq!(memory.source().as_deref(), Some(Path::new("/sys/fs/cgroup/memory/kubepods/pod1/c1")));
        assert!(memory.options().as_ref().unwrap().contains(&"ro".to_owned()));
    }

    #[test]
    fn one_bidirectional_volume_makes_the_root_shared() {
        let mut one = volume_at("/v");
        assert_eq!(rootfs_propagation(std::slice::from_ref(&one)), None);
        one.propagation = MountPropagation::PropagationBidirectional;
        assert_eq!(rootfs_propagation(&[volume_at("/w"), one]), Some("shared"));
    }

    #[test]
    fn what_cannot_be_honoured_is_refused() {
        let good = cri::Mount { container_path: "/v".into(), host_path: "/h".into(), ..cri::Mount::default() };
        assert!(check(&good).is_ok());
        let with = |change: fn(&mut cri::Mount)| {
            let mut mount = good.clone();
            change(&mut mount);
            check(&mount)
        };
        assert!(with(|m| m.container_path = "v".into()).is_err());
        assert!(with(|m| m.container_path = "/v/../..".into()).is_err());
        assert!(with(|m| m.container_path = "/./".into()).is_err());
        assert!(with(|m| m.host_path = "h".into()).is_err());
        assert!(with(|m| m.recursive_read_only = true).is_err());
        assert!(with(|m| m.image = Some(cri::ImageSpec { image: "i".into(), ..cri::ImageSpec::default() })).is_err());
        assert!(with(|m| m.mount_options = vec!["noexec".into()]).is_err());
        assert!(with(|m| m.uid_mappings = vec![cri::IdMapping::default()]).is_err());
    }
}
