//! A mount namespace for the making of one container in which the other pods' mounts are not.
//!
//! The engine reads the table of all mounts more than a dozen times a container, and the container's first process copies and
//! drops all of them: with a hundred pods that was a quarter of all work. All pods' mounts lie below one mount point, which the
//! daemon makes for this. So this process takes the directories that the specification names there aside, leaves the host's mount
//! namespace, detaches everything below that point at once and puts the directories back.
//!
//! ```text
//! /run/oarlock             a mount of its own           detached
//!   sandboxes/<this pod>     namespaces, shm        ─▶    put back
//!   containers/<this one>    root file system       ─▶    put back
//!   …/<all others>                                        gone, here only
//! ```
//!
//! A container that may look at that directory or at what it lies in, that passes mounts to the host, or whose hooks run in the
//! host's namespace, is made with everything in sight as before.
#![allow(unsafe_code, reason = "open_tree and move_mount have no wrapper")]

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::libc;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use oci_spec::runtime::{Mount, Spec};

/// Leaves the host's mount namespace, unless the container needs to be made in it, and says whether it did. `bundle` is kept in sight, as is
/// everything below `point` that the specification names.
///
/// # Errors
/// Only when this process can no longer go on as it is; a kernel that cannot do it is no error.
pub(super) fn from_other_pods(point: &Path, bundle: &Path, spec: &Spec) -> io::Result<bool> {
    let resolved = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let Some(kept) = plan(point, bundle, spec, resolved, Path::is_dir) else {
        return Ok(false);
    };
    // The daemon may have taken the mount away, or somebody else.
    if !is_mount_point(point) {
        return Ok(false);
    }
    let Ok(trees) = kept.iter().map(|path| take_aside(path)).collect::<io::Result<Vec<OwnedFd>>>() else {
        return Ok(false);
    };
    if unshare(CloneFlags::CLONE_NEWNS).is_err() {
        return Ok(false);
    }
    // What happens here stays here; what the host mounts later still arrives, for containers that are to hear of it.
    mount(None::<&Path>, "/", None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>)?;
    umount2(point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?;
    kept.iter().zip(&trees).try_for_each(|(path, tree)| put_back(tree, path)).map(|()| true)
}

/// What has to stay in sight below `point`: each entry two levels below it that is named. None: everything has to. Pure but for the two
/// questions about paths.
fn plan(
    point: &Path,
    bundle: &Path,
    spec: &Spec,
    resolved: impl Fn(&Path) -> PathBuf,
    is_directory: impl Fn(&Path) -> bool,
) -> Option<BTreeSet<PathBuf>> {
    let linux = spec.linux().as_ref();
    let passes_mounts_on = linux.and_then(|linux| linux.rootfs_propagation().as_deref()) == Some("shared");
    if passes_mounts_on || spec.hooks().is_some() {
        return None;
    }
    let mut kept = BTreeSet::from([entry_of(point, &resolved(bundle))?]);
    let sources =
        spec.mounts().iter().flatten().filter(|mount| is_bind(mount)).filter_map(|mount| mount.source().clone());
    for source in sources.map(|source| resolved(&source)) {
        if point.starts_with(&source) {
            return None;
        }
        if source.starts_with(point) && is_directory(&source) || entry_of(point, &source).is_some() {
            kept.insert(entry_of(point, &source)?);
        }
    }
    let namespaces = linux.and_then(|linux| linux.namespaces().as_deref()).unwrap_or_default();
    let root = spec.root().as_ref().map(oci_spec::runtime::Root::path);
    for path in namespaces.iter().filter_map(|namespace| namespace.path().as_ref()).chain(root) {
        kept.extend(entry_of(point, &resolved(path)));
    }
    Some(kept)
}

fn is_bind(mount: &Mount) -> bool {
    mount.options().iter().flatten().any(|option| matches!(option.as_str(), "bind" | "rbind"))
}

/// `point/a/b` of a path at or below it.
fn entry_of(point: &Path, path: &Path) -> Option<PathBuf> {
    let mut parts = path.strip_prefix(point).ok()?.components();
    Some(point.join(parts.next()?).join(parts.next()?))
}

fn is_mount_point(path: &Path) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { return false };
    // SAFETY: an all-zero value is a valid one of this plain C struct.
    let mut status: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is a C string, and both it and the structure live over the call.
    let done =
        unsafe { libc::statx(libc::AT_FDCWD, path.as_ptr(), libc::AT_SYMLINK_NOFOLLOW, libc::STATX_TYPE, &mut status) };
    done == 0 && status.stx_attributes & libc::STATX_ATTR_MOUNT_ROOT as u64 != 0
}

/// A directory with all that is mounted in it, without a place.
fn take_aside(path: &Path) -> io::Result<OwnedFd> {
    const OPEN_TREE_CLONE: libc::c_uint = 1;
    let path = CString::new(path.as_os_str().as_bytes())?;
    let flags = OPEN_TREE_CLONE | (libc::O_CLOEXEC | libc::AT_RECURSIVE | libc::AT_SYMLINK_NOFOLLOW) as libc::c_uint;
    // SAFETY: the path is a C string that lives over the call.
    let tree = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    let tree = i32::try_from(tree).ok().filter(|tree| *tree >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just made this descriptor for this process.
    Ok(unsafe { OwnedFd::from_raw_fd(tree) })
}

fn put_back(tree: &OwnedFd, path: &Path) -> io::Result<()> {
    const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 4;
    let path = CString::new(path.as_os_str().as_bytes())?;
    let (from, here) = (tree.as_raw_fd(), libc::AT_FDCWD);
    // SAFETY: both paths are C strings that live over the call.
    let moved = unsafe {
        libc::syscall(libc::SYS_move_mount, from, c"".as_ptr(), here, path.as_ptr(), MOVE_MOUNT_F_EMPTY_PATH)
    };
    if moved < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const POINT: &str = "/run/pods";

    fn kept(change: impl FnOnce(&mut Value)) -> Option<Vec<String>> {
        let mut spec = json!({
            "ociVersion": "1.0.2",
            "root": {"path": "/run/pods/containers/c1/rootfs"},
            "mounts": [
                {"destination": "/dev/shm", "source": "/run/pods/sandboxes/s1/shm", "options": ["bind"]},
                {"destination": "/data", "source": "/srv/data", "options": ["rbind"]},
                {"destination": "/socket", "source": "/run/pods/runtime.sock", "options": ["rbind"]},
                {"destination": "/proc", "type": "proc", "source": "proc"},
            ],
            "linux": {"namespaces": [{"type": "network", "path": "/run/pods/sandboxes/s1/ns/net"}, {"type": "mount"}]},
        });
        change(&mut spec);
        let spec: Spec = serde_json::from_value(spec).unwrap();
        let bundle = Path::new("/run/pods/containers/c1");
        let is_directory = |path: &Path| !path.to_string_lossy().ends_with(".sock");
        let kept = plan(Path::new(POINT), bundle, &spec, Path::to_owned, is_directory)?;
        Some(kept.into_iter().map(|path| path.display().to_string()).collect())
    }

    #[test]
    fn what_the_container_is_made_of_stays_in_sight() {
        assert_eq!(kept(|_| ()).unwrap(), ["/run/pods/containers/c1", "/run/pods/sandboxes/s1"]);
        let other = kept(|spec| spec["mounts"][1]["source"] = json!("/run/pods/sandboxes/s2/ns"));
        assert!(other.unwrap().contains(&"/run/pods/sandboxes/s2".to_owned()));
    }

    #[test]
    fn a_container_that_looks_at_the_host_or_changes_its_mounts_sees_all() {
        for source in ["/", "/run", "/run/pods", "/run/pods/sandboxes"] {
            assert_eq!(kept(|spec| spec["mounts"][1]["source"] = json!(source)), None, "{source}");
        }
        assert_eq!(kept(|spec| spec["linux"]["rootfsPropagation"] = json!("shared")), None);
        assert_eq!(kept(|spec| spec["hooks"] = json!({"createRuntime": [{"path": "/bin/hook"}]})), None);
    }
}
