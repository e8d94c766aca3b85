//! Reads the user database of an image, never leaving its root file system whatever links it holds.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::Mode;
use oarlock_proto::cri;

use crate::error::Error;
use crate::spec::user::{self, Identity};

/// Most of a user database that is read.
const DATABASE_BYTES_MAX: u64 = 1 << 20;

/// Finds out as whom the container runs.
pub(super) fn look_up(rootfs: &Path, config: &cri::ContainerConfig, image_user: &str) -> Result<Identity, Error> {
    let context = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let wanted = user::wanted(context, image_user)?;
    let passwd = read(rootfs, "etc/passwd")?;
    let group = read(rootfs, "etc/group")?;
    let none = Vec::new();
    let supplemental = context.map_or(&none, |context| &context.supplemental_groups);
    let policy = context.map_or(0, |context| context.supplemental_groups_policy);
    let policy = cri::SupplementalGroupsPolicy::try_from(policy).unwrap_or(cri::SupplementalGroupsPolicy::Merge);
    Ok(user::resolve(&wanted, &passwd, &group, supplemental, policy)?)
}

fn read(rootfs: &Path, name: &str) -> Result<String, Error> {
    let path = rootfs.join(name);
    // Not blocking: an image may have a pipe there.
    let opened = open_inside(rootfs, Path::new(name), OFlag::O_RDONLY | OFlag::O_NONBLOCK);
    let file = match opened {
        Ok(file) => File::from(file),
        Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Ok(String::new()),
        Err(errno) => return Err(Error::io("open", path)(errno.into())),
    };
    let metadata = file.metadata().map_err(Error::io("read", &path))?;
    if !metadata.is_file() || metadata.len() > DATABASE_BYTES_MAX {
        let source = io::Error::other("not a regular file of a sensible size");
        return Err(Error::Io { operation: "read", path, source });
    }
    let mut bytes = Vec::new();
    file.take(DATABASE_BYTES_MAX).read_to_end(&mut bytes).map_err(Error::io("read", &path))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Opens a path as a process would whose root is `root`.
pub(super) fn open_inside(root: &Path, path: &Path, flags: OFlag) -> Result<OwnedFd, Errno> {
    let root = open(root, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let relative = path.strip_prefix("/").unwrap_or(path);
    openat2(root.as_fd(), relative, how)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_out_of_the_image_leads_back_into_it() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("etc")).unwrap();
        std::os::unix::fs::symlink("/../../../../etc/passwd.own", directory.path().join("etc/passwd")).unwrap();
        std::fs::write(directory.path().join("etc/passwd.own"), "inside:x:5:5::/:/bin/sh\n").unwrap();
        assert_eq!(read(directory.path(), "etc/passwd").unwrap(), "inside:x:5:5::/:/bin/sh\n");
        assert_eq!(read(directory.path(), "etc/group").unwrap(), "");
    }

    #[test]
    fn something_else_than_a_file_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(directory.path().join("etc/passwd")).unwrap();
        assert!(read(directory.path(), "etc/passwd").is_err());
    }
}
