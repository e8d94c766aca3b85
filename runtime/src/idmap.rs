//! Id-mapped mounts: a second view of a directory or file in which every owner is another one.
//!
//! The other raw calls about mounts are here too. Such a view is made without a place and then moved to one (open_tree, mount_setattr, move_mount). Which kernels and file
//! systems can do it is found out by trying. Owns no decision about what is mapped.
#![allow(unsafe_code, reason = "the mount calls that have no wrapper")]

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use oarlock_netns::{IdRange, UserMappings, user_namespace};

use crate::error::Error;
use crate::spec::namespace::{Range, UserMapping};

const OPEN_TREE_CLONE: libc::c_uint = 1;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 4;
const MOUNT_ATTR_RDONLY: u64 = 0x1;
const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;

/// First release whose overlay takes id-mapped layers.
const RELEASE: (u32, u32) = (5, 19);

#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

impl UserMapping {
    pub(crate) fn mappings(&self) -> UserMappings {
        let range = |range: Range| IdRange { inside: range.inside, outside: range.outside, length: range.length };
        UserMappings { uids: vec![range(self.uid)], gids: vec![range(self.gid)] }
    }
}

/// A user namespace and who is who in it.
#[derive(Debug)]
pub(crate) struct Owner {
    namespace: OwnedFd,
    mapping: UserMapping,
}

impl Owner {
    /// That of a sandbox, pinned.
    pub(crate) fn pinned(path: &Path, mapping: UserMapping) -> Result<Owner, Error> {
        let file = fs::File::open(path).map_err(Error::io("open", path))?;
        Ok(Owner { namespace: file.into(), mapping })
    }

    /// One just for this mapping.
    pub(crate) fn of(mapping: UserMapping) -> Result<Owner, Error> {
        let failed = |error: oarlock_netns::NetnsError| io::Error::other(crate::error::chain(&error));
        let namespace = user_namespace(&mapping.mappings())
            .map_err(failed)
            .map_err(Error::io("make a user namespace for", "a mount"))?;
        Ok(Owner { namespace, mapping })
    }

    pub(crate) fn namespace(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }

    pub(crate) fn mapping(&self) -> UserMapping {
        self.mapping
    }

    /// Its root on the host.
    pub(crate) fn root(&self) -> (u32, u32) {
        (self.mapping.uid.outside, self.mapping.gid.outside)
    }
}

/// A view of `source` that has no place yet. `below`: with what is mounted below it.
pub(crate) fn clone_tree(source: &Path, below: bool) -> io::Result<OwnedFd> {
    let path = CString::new(source.as_os_str().as_encoded_bytes())?;
    let below = if below { libc::AT_RECURSIVE as libc::c_uint } else { 0 };
    let flags = OPEN_TREE_CLONE | libc::O_CLOEXEC as libc::c_uint | below;
    // SAFETY: the path is a C string that lives over the call.
    let tree = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    if tree < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for this process.
    Ok(unsafe { OwnedFd::from_raw_fd(tree as i32) })
}

/// Maps the owners in a view as the user namespace does.
pub(crate) fn map(tree: &OwnedFd, user_namespace: BorrowedFd<'_>) -> io::Result<()> {
    set(tree, MOUNT_ATTR_IDMAP, user_namespace.as_raw_fd() as u64)
}

pub(crate) fn make_readonly(tree: &OwnedFd) -> io::Result<()> {
    set(tree, MOUNT_ATTR_RDONLY, 0)
}

fn set(tree: &OwnedFd, set: u64, user_namespace: u64) -> io::Result<()> {
    let attributes = MountAttributes { set, clear: 0, propagation: 0, user_namespace };
    let size = size_of::<MountAttributes>();
    // SAFETY: the path is empty and the attributes live over the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &attributes as *const MountAttributes,
            size,
        )
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether something is mounted on `path`, which may be a link: it is not followed. Since Linux 5.8.
pub(crate) fn is_mount_point(path: &Path) -> io::Result<bool> {
    let path = CString::new(path.as_os_str().as_encoded_bytes())?;
    let flags = libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT;
    // SAFETY: an all-zero value is a valid one of this plain C struct.
    let mut status: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is a C string, and both it and the structure live over the call.
    let done = unsafe { libc::statx(libc::AT_FDCWD, path.as_ptr(), flags, libc::STATX_TYPE, &mut status) };
    let mount_root = libc::STATX_ATTR_MOUNT_ROOT as u64;
    match done {
        0 if status.stx_attributes_mask & mount_root == 0 => Err(io::ErrorKind::Unsupported.into()),
        0 => Ok(status.stx_attributes & mount_root != 0),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives a view its place, which exists and is of the same kind.
pub(crate) fn attach(tree: &OwnedFd, target: &Path) -> io::Result<()> {
    let target = CString::new(target.as_os_str().as_encoded_bytes())?;
    // SAFETY: both paths are C strings that live over the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Puts a view of `source` at `target`, which is made: a file for a file, else a directory.
pub(crate) fn place(source: &Path, target: &Path, mapped: Option<BorrowedFd<'_>>, below: bool) -> Result<(), Error> {
    let kind = fs::metadata(source).map_err(Error::io("look at", source))?;
    if kind.is_dir() {
        fs::create_dir_all(target).map_err(Error::io("create", target))?;
    } else {
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        }
        fs::File::create(target).map_err(Error::io("create", target))?;
    }
    let tree = clone_tree(source, below).map_err(Error::io("make a view of", source))?;
    if let Some(namespace) = mapped {
        map(&tree, namespace).map_err(Error::io("map the owners of", source))?;
    }
    attach(&tree, target).map_err(Error::io("mount at", target))
}

/// Why pods cannot have user namespaces here; None where they can. `directory` lies where images are.
pub(crate) fn obstacle(directory: &Path) -> Option<String> {
    let release =
        nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default();
    if !at_least(&release, RELEASE) {
        return Some(format!("kernel {release} cannot mount layers with mapped owners"));
    }
    let range = Range { inside: 0, outside: 65536, length: 65536 };
    let namespace = match user_namespace(&UserMapping { uid: range, gid: range }.mappings()) {
        Ok(namespace) => namespace,
        Err(error) => return Some(crate::error::chain(&error)),
    };
    let tried = clone_tree(directory, false).and_then(|tree| map(&tree, namespace.as_fd()));
    tried.err().map(|error| format!("the file system of {} cannot map owners: {error}", directory.display()))
}

/// Whether a kernel release is that one or later.
pub(crate) fn at_least(release: &str, wanted: (u32, u32)) -> bool {
    let mut numbers = release.split(|letter: char| !letter.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= wanted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases_compare_by_number() {
        assert!(at_least("5.12.0", (5, 12)) && at_least("6.1.0-18-amd64", (5, 12)));
        assert!(!at_least("5.9.1", (5, 12)) && !at_least("", (5, 12)));
    }
}
