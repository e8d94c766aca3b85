//! fsGroup: group ownership and mode bits of a volume.
//!
//! Everything is done on descriptors that were opened without following links or leaving the volume, so a container that
//! still writes into the volume cannot point the walk elsewhere.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{FchmodatFlags, FileStat, Mode, SFlag, fchmodat, fstat};
use nix::unistd::{Gid, fchownat};

use crate::error::VolumeError;

/// Whether a volume whose root already looks right is walked again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ChangePolicy {
    Always,
    OnRootMismatch,
}

/// The group to give, and how far its rights go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FsGroup {
    pub gid: u32,
    pub read_only: bool,
}

/// Directories nested deeper than this are not walked: nothing that we make is so deep.
const DEPTH_LIMIT: usize = 128;

impl FsGroup {
    /// The mode that a file or directory of `mode` gets.
    fn mode(self, mode: u32, is_dir: bool) -> u32 {
        let readable = if self.read_only { 0o440 } else { 0o660 };
        mode | readable | if is_dir { 0o2110 } else { 0 }
    }

    fn fits(self, stat: &FileStat) -> bool {
        let mode = stat.st_mode & 0o7777;
        stat.st_gid == self.gid && mode == self.mode(mode, true)
    }
}

/// Gives the volume at `root` to the group.
pub(crate) fn apply(root: &Path, group: FsGroup, policy: ChangePolicy) -> Result<(), VolumeError> {
    let how = OpenHow::new().flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW);
    let fd = openat2(AT_FDCWD, root, how).map_err(|e| VolumeError::io("open", root, e))?;
    let stat = fstat(&fd).map_err(|e| VolumeError::io("look at", root, e))?;
    if policy == ChangePolicy::OnRootMismatch && group.fits(&stat) {
        return Ok(());
    }
    // The root last: with OnRootMismatch a walk that was cut off is done again.
    children(fd.as_fd(), group, 0).map_err(|e| VolumeError::io("change the group of", root, e))?;
    change(fd.as_fd(), &stat, group).map_err(|e| VolumeError::io("change the group of", root, e))
}

fn children(directory: BorrowedFd<'_>, group: FsGroup, depth: usize) -> nix::Result<()> {
    if depth > DEPTH_LIMIT {
        return Err(Errno::ELOOP);
    }
    let mut listing = nix::dir::Dir::from_fd(directory.try_clone_to_owned().map_err(|_| Errno::EMFILE)?)?;
    for entry in listing.iter() {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_XDEV);
        let child: OwnedFd = match openat2(directory, name, how) {
            Ok(child) => child,
            Err(Errno::ENOENT) => continue,
            Err(error) => return Err(error),
        };
        let stat = fstat(&child)?;
        match SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) {
            SFlag::S_IFLNK => {}
            SFlag::S_IFDIR => {
                let how = OpenHow::new()
                    .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
                    .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_XDEV);
                let readable = openat2(&child, ".", how)?;
                children(readable.as_fd(), group, depth + 1)?;
                change(child.as_fd(), &stat, group)?;
            }
            _ => change(child.as_fd(), &stat, group)?,
        }
    }
    Ok(())
}

/// Group first: a change of owner clears setgid.
fn change(fd: BorrowedFd<'_>, stat: &FileStat, group: FsGroup) -> nix::Result<()> {
    if stat.st_gid != group.gid {
        fchownat(fd, "", None, Some(Gid::from_raw(group.gid)), AtFlags::AT_EMPTY_PATH)?;
    }
    let is_dir = stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFDIR.bits();
    let mode = group.mode(stat.st_mode & 0o7777, is_dir);
    // The magic link names exactly the file behind the descriptor, also for O_PATH ones.
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    fchmodat(AT_FDCWD, path.as_str(), Mode::from_bits_truncate(mode), FchmodatFlags::FollowSymlink)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    fn own_gid() -> u32 {
        nix::unistd::getegid().as_raw()
    }

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().mode() & 0o7777
    }

    fn tree() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("d")).unwrap();
        for file in ["f", "d/g", "outside"] {
            fs::write(dir.path().join(file), "").unwrap();
            fs::set_permissions(dir.path().join(file), fs::Permissions::from_mode(0o600)).unwrap();
        }
        fs::set_permissions(dir.path().join("d"), fs::Permissions::from_mode(0o700)).unwrap();
        symlink(dir.path().join("outside"), dir.path().join("d/link")).unwrap();
        dir
    }

    #[test]
    fn writable_volumes_get_group_write_and_setgid() {
        let dir = tree();
        apply(&dir.path().join("d"), FsGroup { gid: own_gid(), read_only: false }, ChangePolicy::Always).unwrap();
        assert_eq!(mode(&dir.path().join("d")), 0o2770);
        assert_eq!(mode(&dir.path().join("d/g")), 0o660);
        assert_eq!(mode(&dir.path().join("outside")), 0o600, "a link is never followed");
    }

    #[test]
    fn read_only_volumes_get_group_read_only() {
        let dir = tree();
        apply(dir.path(), FsGroup { gid: own_gid(), read_only: true }, ChangePolicy::Always).unwrap();
        assert_eq!(mode(&dir.path().join("f")), 0o640);
        assert_eq!(mode(&dir.path().join("d")), 0o2750);
    }

    #[test]
    fn on_root_mismatch_leaves_a_fitting_volume_alone() {
        let dir = tree();
        let group = FsGroup { gid: own_gid(), read_only: false };
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o2770)).unwrap();
        apply(dir.path(), group, ChangePolicy::OnRootMismatch).unwrap();
        assert_eq!(mode(&dir.path().join("f")), 0o600);
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
        apply(dir.path(), group, ChangePolicy::OnRootMismatch).unwrap();
        assert_eq!(mode(&dir.path().join("f")), 0o660);
    }
}
