//! Finds and prepares what is mounted into a container: paths of the host, images, and volumes that its image declares.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::OFlag;
use oarlock_images::Rootfs;
use oarlock_proto::cri::{self, MountPropagation};

use super::ids::open_inside;
use crate::core::Core;
use crate::error::Error;
use crate::idmap::{self, Owner};
use crate::mounts;
use crate::record::ContainerRecord;
use crate::spec::SpecError;
use crate::spec::image::Defaults;
use crate::spec::mount::{self, Volume, clean};
use crate::spec::namespace::mount_mapping;

/// Names the layers of the image that is mounted as the container's n-th mount.
pub(super) fn image_key(container: &str, index: usize) -> String {
    format!("{container}-image-{index}")
}

/// Notes which image each image mount stands for, so that a tag that moves changes nothing for the container.
pub(super) fn resolve_images(core: &Core, mounts: &mut [cri::Mount]) -> Result<(), Error> {
    for image in mounts.iter_mut().filter_map(|mount| mount.image.as_mut()).filter(|image| !image.image.is_empty()) {
        let found = core.images.status(&image.image);
        image.image_ref = found.ok_or_else(|| Error::NoImage { reference: image.image.clone() })?.id;
    }
    Ok(())
}

/// Layers of the images that the container mounts, by position.
pub(super) async fn prepare_images(core: &Arc<Core>, record: &ContainerRecord) -> Result<Vec<(usize, Rootfs)>, Error> {
    let mut prepared = Vec::new();
    for (index, wanted) in record.config.mounts.iter().enumerate() {
        let Some(image) = image_of(wanted) else { continue };
        prepared.push((index, core.images.prepare_rootfs(&image.image_ref, &image_key(&record.id, index)).await?));
    }
    Ok(prepared)
}

/// Mounts them, for reading only.
pub(super) fn mount_images(
    core: &Core,
    record: &ContainerRecord,
    images: &[(usize, Rootfs)],
    owner: Option<&Owner>,
) -> Result<(), Error> {
    let paths = core.paths.bundle(&record.id);
    images
        .iter()
        .try_for_each(|(index, rootfs)| mounts::overlay_readonly(&rootfs.lower, &paths.image_mount(*index), owner))
}

fn image_of(mount: &cri::Mount) -> Option<&cri::ImageSpec> {
    mount.image.as_ref().filter(|image| !image.image.is_empty())
}

/// The sources of all of a container's volumes.
pub(super) fn find(
    core: &Core,
    record: &ContainerRecord,
    defaults: &Defaults,
    owner: Option<&Owner>,
) -> Result<Vec<Volume>, Error> {
    let paths = core.paths.bundle(&record.id);
    let mut volumes = declared(core, record, defaults)?;
    for (index, volume) in volumes.iter_mut().enumerate() {
        if let Some(owner) = owner {
            volume.source = view(&volume.source, &paths.volume(&format!("declared-{index}")), Some(owner))?;
        }
    }
    for (index, wanted) in record.config.mounts.iter().enumerate() {
        let propagation = mount::check(wanted)?;
        let source = match image_of(wanted) {
            Some(_) => inside_image(&paths.image_mount(index), wanted)?,
            None => {
                let source = on_host(wanted, propagation)?;
                mapped(wanted, source, &paths.volume(&index.to_string()), owner)?
            }
        };
        volumes.push(Volume {
            destination: wanted.container_path.clone().into(),
            source,
            readonly: wanted.readonly,
            recursive_readonly: wanted.recursive_read_only,
            propagation,
        });
    }
    Ok(volumes)
}

/// What to bind for a path of the host: a view with mapped owners if the mount asks for it. In a user namespace it is always
/// a view, because root there may not be able to walk to the path itself.
fn mapped(wanted: &cri::Mount, source: PathBuf, target: &Path, owner: Option<&Owner>) -> Result<PathBuf, Error> {
    let mapping = mount_mapping(wanted)?;
    if owner.is_some() && wanted.propagation == MountPropagation::PropagationBidirectional as i32 {
        let reason = "mounts made in a user namespace cannot reach the host";
        return Err(SpecError::unsupported(format!("mounts[{}].propagation", wanted.container_path), reason).into());
    }
    match (mapping, owner) {
        (None, None) => Ok(source),
        (None, Some(_)) => view(&source, target, None),
        (Some(mapping), Some(owner)) if owner.mapping() == mapping => view(&source, target, Some(owner)),
        (Some(mapping), _) => view(&source, target, Some(&Owner::of(mapping)?)),
    }
}

/// Made once: the specification is written anew when resources change.
pub(super) fn view(source: &Path, target: &Path, owner: Option<&Owner>) -> Result<PathBuf, Error> {
    if !target.exists() {
        idmap::place(source, target, owner.map(Owner::namespace), true)?;
    }
    Ok(target.to_owned())
}

/// The real path on the host; it has to exist, on a mount that can do the propagation asked for.
fn on_host(wanted: &cri::Mount, propagation: MountPropagation) -> Result<PathBuf, Error> {
    let invalid = |problem: String| SpecError::invalid(format!("mounts[{}]", wanted.container_path), problem);
    let source = fs::canonicalize(&wanted.host_path)
        .map_err(|error| invalid(format!("host path {:?} cannot be used: {error}", wanted.host_path)))?;
    if propagation != MountPropagation::PropagationPrivate {
        let (point, shared, slave) = mounts::propagation_of(&source)?;
        let host = wanted.host_path.as_str();
        if propagation == MountPropagation::PropagationBidirectional && !shared {
            return Err(invalid(format!("path {host:?} is mounted on {point:?} but it is not a shared mount")).into());
        }
        if !shared && !slave {
            return Err(invalid(format!(
                "path {host:?} is mounted on {point:?} but it is not a shared or slave mount"
            ))
            .into());
        }
    }
    Ok(source)
}

fn inside_image(root: &Path, wanted: &cri::Mount) -> Result<PathBuf, Error> {
    if wanted.image_sub_path.is_empty() {
        return Ok(root.to_owned());
    }
    let invalid =
        |problem: String| SpecError::invalid(format!("mounts[{}].image_sub_path", wanted.container_path), problem);
    let path = Path::new(&wanted.image_sub_path);
    if path.is_absolute() || path.components().any(|part| part.as_os_str() == "..") {
        return Err(invalid(format!("{:?} does not stay in the image", wanted.image_sub_path)).into());
    }
    let found = open_inside(root, path, OFlag::O_PATH)
        .map_err(|errno| invalid(format!("{:?} is not in the image: {}", wanted.image_sub_path, errno.desc())))?;
    // The image cannot change under its read-only mount, so the name stays true.
    let name = PathBuf::from(format!("/proc/thread-self/fd/{}", found.as_raw_fd()));
    fs::read_link(&name).map_err(Error::io("resolve", name))
}

/// A directory of its own for each volume that the image declares and the configuration does not mount over, filled with
/// what the image has there.
fn declared(core: &Core, record: &ContainerRecord, defaults: &Defaults) -> Result<Vec<Volume>, Error> {
    let root = core.paths.container_volumes(&record.id);
    let rootfs = core.paths.bundle(&record.id).rootfs();
    let mut volumes = Vec::new();
    for (index, path) in defaults.volumes.iter().enumerate() {
        let destination = clean(Path::new(path));
        let mounted = record.config.mounts.iter().any(|mount| clean(Path::new(&mount.container_path)) == destination);
        let climbs = destination.components().any(|part| part.as_os_str() == "..");
        if mounted || climbs || !destination.is_absolute() || destination == Path::new("/") {
            continue;
        }
        let source = root.join(index.to_string());
        if !source.exists() {
            fill(&rootfs, &destination, &source)?;
        }
        volumes.push(Volume {
            destination,
            source,
            readonly: false,
            recursive_readonly: false,
            propagation: MountPropagation::PropagationPrivate,
        });
    }
    Ok(volumes)
}

fn fill(rootfs: &Path, inside: &Path, target: &Path) -> Result<(), Error> {
    let partial = target.with_extension("partial");
    mounts::remove_tree(&partial)?;
    fs::create_dir_all(&partial).map_err(Error::io("create", &partial))?;
    if let Ok(source) = open_inside(rootfs, inside, OFlag::O_PATH | OFlag::O_DIRECTORY) {
        // Nothing runs in the container yet, so what is below the descriptor holds still.
        let source = PathBuf::from(format!("/proc/thread-self/fd/{}", source.as_raw_fd())).join(".");
        copy_tree(&source, &partial).map_err(Error::io("copy the image's content to", &partial))?;
    }
    fs::rename(&partial, target).map_err(Error::io("rename to", target))
}

/// Copies directories, files and links with their owners and modes; sockets, pipes and devices stay behind.
fn copy_tree(source: &Path, target: &Path) -> io::Result<()> {
    let metadata = fs::metadata(source)?;
    for entry in fs::read_dir(source)? {
        let entry = entry?;
        let (from, to) = (entry.path(), target.join(entry.file_name()));
        let metadata = fs::symlink_metadata(&from)?;
        if metadata.is_dir() {
            fs::create_dir(&to)?;
            copy_tree(&from, &to)?;
        } else if metadata.is_symlink() {
            symlink(fs::read_link(&from)?, &to)?;
            lchown(&to, Some(metadata.uid()), Some(metadata.gid()))?;
        } else if metadata.is_file() {
            fs::copy(&from, &to)?;
            chown(&to, Some(metadata.uid()), Some(metadata.gid()))?;
            fs::set_permissions(&to, fs::Permissions::from_mode(metadata.mode() & 0o7777))?;
        }
    }
    chown(target, Some(metadata.uid()), Some(metadata.gid()))?;
    fs::set_permissions(target, fs::Permissions::from_mode(metadata.mode() & 0o7777))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_declared_volume_starts_with_what_the_image_has_there() {
        let directory = tempfile::tempdir().unwrap();
        let rootfs = directory.path().join("rootfs");
        fs::create_dir_all(rootfs.join("data/deep")).unwrap();
        fs::write(rootfs.join("data/deep/file"), "x").unwrap();
        symlink("/outside", rootfs.join("data/link")).unwrap();
        fs::set_permissions(rootfs.join("data"), fs::Permissions::from_mode(0o750)).unwrap();
        let target = directory.path().join("0");
        fill(&rootfs, Path::new("/data"), &target).unwrap();
        assert_eq!(fs::read_to_string(target.join("deep/file")).unwrap(), "x");
        assert_eq!(fs::read_link(target.join("link")).unwrap(), Path::new("/outside"));
        assert_eq!(fs::metadata(&target).unwrap().mode() & 0o777, 0o750);
        let empty = directory.path().join("1");
        fill(&rootfs, Path::new("/not/there"), &empty).unwrap();
        assert_eq!(fs::read_dir(&empty).unwrap().count(), 0);
    }

    #[test]
    fn a_host_path_that_does_not_exist_is_refused_by_name() {
        let wanted =
            cri::Mount { container_path: "/v".into(), host_path: "/there/is/no/such".into(), ..cri::Mount::default() };
        let error = on_host(&wanted, MountPropagation::PropagationPrivate).unwrap_err();
        assert!(error.full_message().contains("/there/is/no/such"));
    }
}
