//! Deletes a directory tree without ever following a link or crossing a mount point.
//!
//! Every step works on descriptors opened with openat2 (beneath, no links, no other mount), so neither a hostile tree nor
//! a mount that appears meanwhile can lead the walk elsewhere. Depth is bounded: deeper directories are first moved up.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2, renameat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::error::VolumeError;

/// Beyond this depth a directory is moved to the top of the tree instead of being descended into.
const DEPTH_LIMIT: usize = 48;
/// Rounds over one directory whose content keeps coming back.
const ROUND_LIMIT: usize = 1000;

/// Removes `name` in `parent` with all below it. Success when it is not there.
pub(crate) fn remove_tree(parent: &Path, name: &str) -> Result<(), VolumeError> {
    let path = parent.join(name);
    let how = OpenHow::new().flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC);
    let parent_fd = match openat2(AT_FDCWD, parent, how) {
        Ok(fd) => fd,
        Err(Errno::ENOENT) => return Ok(()),
        Err(error) => return Err(VolumeError::io("open", parent, error)),
    };
    let name = CString::new(name).map_err(|_| VolumeError::NoUid { pod: name.to_string() })?;
    let outcome = open_child(parent_fd.as_fd(), &name).and_then(|tree| {
        let mut walk = Walk { top: tree.try_clone().map_err(|_| Errno::EMFILE)?, moved: 0 };
        walk.empty(tree, 0)?;
        unlinkat(&parent_fd, name.as_c_str(), UnlinkatFlags::RemoveDir)
    });
    match outcome {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(Errno::EXDEV | Errno::EBUSY) => Err(VolumeError::ForeignMount { path }),
        Err(error) => Err(VolumeError::io("remove", &path, error)),
    }
}

struct Walk {
    top: OwnedFd,
    moved: u64,
}

impl Walk {
    /// Removes everything in `directory`.
    fn empty(&mut self, directory: OwnedFd, depth: usize) -> nix::Result<()> {
        for _ in 0..ROUND_LIMIT {
            let mut listing = Dir::from_fd(open_child(directory.as_fd(), c".")?)?;
            let mut found = false;
            for entry in listing.iter() {
                let entry = entry?;
                let name = entry.file_name();
                if name == c"." || name == c".." {
                    continue;
                }
                found = true;
                self.remove(directory.as_fd(), name, entry.file_type(), depth)?;
            }
            if !found {
                return Ok(());
            }
        }
        Err(Errno::ENOTEMPTY)
    }

    fn remove(&mut self, directory: BorrowedFd<'_>, name: &CStr, kind: Option<Type>, depth: usize) -> nix::Result<()> {
        if !matches!(kind, Some(Type::Directory) | None) {
            return gone_is_fine(unlinkat(directory, name, UnlinkatFlags::NoRemoveDir));
        }
        let child = match open_child(directory, name) {
            Ok(child) => child,
            // Not a directory after all.
            Err(Errno::ENOTDIR | Errno::ELOOP) => {
                return gone_is_fine(unlinkat(directory, name, UnlinkatFlags::NoRemoveDir));
            }
            other => return gone_is_fine(other.map(drop)),
        };
        if depth >= DEPTH_LIMIT {
            drop(child);
            self.moved += 1;
            let moved = CString::new(format!("..moved-{}", self.moved)).map_err(|_| Errno::EINVAL)?;
            return gone_is_fine(renameat(directory, name, &self.top, moved.as_c_str()));
        }
        self.empty(child, depth + 1)?;
        gone_is_fine(unlinkat(directory, name, UnlinkatFlags::RemoveDir))
    }
}

fn gone_is_fine(outcome: nix::Result<()>) -> nix::Result<()> {
    match outcome {
        Err(Errno::ENOENT) => Ok(()),
        other => other,
    }
}

fn open_child(directory: BorrowedFd<'_>, name: &CStr) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV);
    openat2(directory, name, how)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_are_removed_and_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("pod/a/b")).unwrap();
        fs::create_dir(dir.path().join("kept")).unwrap();
        fs::write(dir.path().join("kept/file"), "x").unwrap();
        symlink(dir.path().join("kept"), dir.path().join("pod/a/link")).unwrap();
        fs::write(dir.path().join("pod/a/b/file"), "x").unwrap();
        remove_tree(dir.path(), "pod").unwrap();
        assert!(!dir.path().join("pod").exists());
        assert!(dir.path().join("kept/file").exists());
        remove_tree(dir.path(), "pod").unwrap();
    }

    #[test]
    fn a_link_in_place_of_the_tree_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("kept")).unwrap();
        fs::write(dir.path().join("kept/file"), "x").unwrap();
        symlink(dir.path().join("kept"), dir.path().join("pod")).unwrap();
        assert!(remove_tree(dir.path(), "pod").is_err());
        assert!(dir.path().join("kept/file").exists());
    }

    #[test]
    fn a_very_deep_tree_needs_neither_stack_nor_descriptors() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("pod")).unwrap();
        let mut fd = openat2(
            AT_FDCWD,
            &dir.path().join("pod"),
            OpenHow::new().flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC),
        )
        .unwrap();
        for _ in 0..5000 {
            nix::sys::stat::mkdirat(&fd, "d", nix::sys::stat::Mode::S_IRWXU).unwrap();
            fd = openat2(&fd, "d", OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC)).unwrap();
        }
        remove_tree(dir.path(), "pod").unwrap();
        assert!(!dir.path().join("pod").exists());
    }
}
