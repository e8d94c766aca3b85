//! The mount system calls, behind a trait so that everything else is tested without root.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// How a tmpfs is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tmpfs {
    /// None leaves the kernel's default, half of the memory.
    pub size_bytes: Option<u64>,
    /// Mode of the root directory.
    pub mode: u32,
    pub gid: Option<u32>,
}

impl Tmpfs {
    fn options(self) -> String {
        let mut options = format!("mode={:o}", self.mode);
        if let Some(size) = self.size_bytes {
            options.push_str(&format!(",size={size}"));
        }
        if let Some(gid) = self.gid {
            options.push_str(&format!(",gid={gid}"));
        }
        options
    }
}

/// How a file system of huge pages is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HugePages {
    pub page_bytes: u64,
    /// Mode of the root directory.
    pub mode: u32,
    pub gid: Option<u32>,
}

impl HugePages {
    fn options(self) -> String {
        let group = self.gid.map(|gid| format!(",gid={gid}")).unwrap_or_default();
        format!("pagesize={},mode={:o}{group}", self.page_bytes, self.mode)
    }
}

/// Mounts, unmounts, and knows what is mounted.
pub(crate) trait Mounter: Send + Sync {
    fn tmpfs(&self, target: &Path, tmpfs: Tmpfs) -> io::Result<()>;
    fn huge_pages(&self, target: &Path, pages: HugePages) -> io::Result<()>;
    /// Binds what `source` refers to (a file or a directory) onto `target`.
    fn bind(&self, source: BorrowedFd<'_>, target: &Path) -> io::Result<()>;
    /// Takes all mounts off `target`; success when there is none.
    fn unmount(&self, target: &Path) -> io::Result<()>;
    fn is_mount_point(&self, path: &Path) -> io::Result<bool>;
    /// Mount points at or below `path` (which has no symbolic link in it), deepest last.
    fn mounts_below(&self, path: &Path) -> io::Result<Vec<PathBuf>>;
}

/// The kernel's own.
pub(crate) struct KernelMounter;

/// How many mounts stacked on one directory are taken off before giving up.
const STACK_LIMIT: usize = 64;

impl Mounter for KernelMounter {
    fn tmpfs(&self, target: &Path, tmpfs: Tmpfs) -> io::Result<()> {
        mount(Some("tmpfs"), target, Some("tmpfs"), MsFlags::empty(), Some(tmpfs.options().as_str()))?;
        Ok(())
    }

    fn huge_pages(&self, target: &Path, pages: HugePages) -> io::Result<()> {
        mount(Some("nodev"), target, Some("hugetlbfs"), MsFlags::empty(), Some(pages.options().as_str()))?;
        Ok(())
    }

    fn bind(&self, source: BorrowedFd<'_>, target: &Path) -> io::Result<()> {
        let source = format!("/proc/self/fd/{}", source.as_raw_fd());
        mount(Some(source.as_str()), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        Ok(())
    }

    fn unmount(&self, target: &Path) -> io::Result<()> {
        for _ in 0..STACK_LIMIT {
            match umount2(target, MntFlags::UMOUNT_NOFOLLOW) {
                Ok(()) => {}
                Err(Errno::EINVAL | Errno::ENOENT | Errno::ENOTDIR) => return Ok(()),
                Err(Errno::EBUSY) => umount2(target, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH)?,
                Err(error) => return Err(error.into()),
            }
        }
        Err(io::Error::other("too many mounts on one directory"))
    }

    fn is_mount_point(&self, path: &Path) -> io::Result<bool> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(true) };
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        let parent = match openat2(AT_FDCWD, parent, OpenHow::new().flags(flags | OFlag::O_DIRECTORY)) {
            Ok(parent) => parent,
            Err(Errno::ENOENT) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let how = OpenHow::new()
            .flags(flags | OFlag::O_NOFOLLOW)
            .resolve(ResolveFlag::RESOLVE_NO_XDEV | ResolveFlag::RESOLVE_BENEATH);
        match openat2(&parent, name, how) {
            Ok(_) | Err(Errno::ENOENT) => Ok(false),
            Err(Errno::EXDEV) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }

    fn mounts_below(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
        Ok(mount_points_below(&std::fs::read("/proc/thread-self/mountinfo")?, path))
    }
}

/// Picks the mount points at or below `path` out of a mountinfo file, parents before children.
fn mount_points_below(mountinfo: &[u8], path: &Path) -> Vec<PathBuf> {
    use std::os::unix::ffi::OsStringExt;
    let mut found: Vec<PathBuf> = mountinfo
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(|field| PathBuf::from(std::ffi::OsString::from_vec(unescape(field))))
        .filter(|point| point.starts_with(path))
        .collect();
    found.sort();
    found
}

/// Undoes the kernel's `\040` escapes.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = (byte == b'\\' && tail.len() >= 3)
            .then(|| std::str::from_utf8(&tail[..3]).ok().and_then(|digits| u8::from_str_radix(digits, 8).ok()))
            .flatten();
        match octal {
            Some(value) => {
                out.push(value);
                rest = &tail[3..];
            }
            None => {
                out.push(byte);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
pub(crate) mod fake {
    //! A mounter that only takes notes.

    use std::collections::BTreeMap;
    use std::sync::Mutex;

    use super::*;

    #[derive(Debug, Clone, PartialEq, Eq)]
    pub(crate) enum Mounted {
        Tmpfs(Tmpfs),
        HugePages(HugePages),
        /// The path that the bound descriptor referred to.
        Bind(PathBuf),
    }

    #[derive(Default)]
    pub(crate) struct FakeMounter {
        pub mounts: Mutex<BTreeMap<PathBuf, Mounted>>,
    }

    impl Mounter for FakeMounter {
        fn tmpfs(&self, target: &Path, tmpfs: Tmpfs) -> io::Result<()> {
            self.mounts.lock().unwrap().insert(target.to_path_buf(), Mounted::Tmpfs(tmpfs));
            Ok(())
        }

        fn huge_pages(&self, target: &Path, pages: HugePages) -> io::Result<()> {
            self.mounts.lock().unwrap().insert(target.to_path_buf(), Mounted::HugePages(pages));
            Ok(())
        }

        fn bind(&self, source: BorrowedFd<'_>, target: &Path) -> io::Result<()> {
            let path = std::fs::read_link(format!("/proc/self/fd/{}", source.as_raw_fd()))?;
            self.mounts.lock().unwrap().insert(target.to_path_buf(), Mounted::Bind(path));
            Ok(())
        }

        fn unmount(&self, target: &Path) -> io::Result<()> {
            self.mounts.lock().unwrap().remove(target);
            Ok(())
        }

        fn is_mount_point(&self, path: &Path) -> io::Result<bool> {
            Ok(self.mounts.lock().unwrap().contains_key(path))
        }

        fn mounts_below(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
            Ok(self.mounts.lock().unwrap().keys().filter(|point| point.starts_with(path)).cloned().collect())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_is_read_with_its_escapes() {
        let text = b"22 1 8:1 / / rw - ext4 /dev/sda rw\n\
            30 22 0:40 / /pods/u/volumes/e/a\\040b rw shared:1 - tmpfs tmpfs rw\n\
            31 22 0:41 / /pods/u rw - tmpfs tmpfs rw\n32 22 0:42 / /pods/u2 rw - tmpfs tmpfs rw\n";
        let found = mount_points_below(text, Path::new("/pods/u"));
        assert_eq!(found, [PathBuf::from("/pods/u"), PathBuf::from("/pods/u/volumes/e/a b")]);
    }

    #[test]
    fn the_kernels_mount_points_are_recognised() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("plain")).unwrap();
        assert!(KernelMounter.is_mount_point(Path::new("/proc")).unwrap());
        assert!(!KernelMounter.is_mount_point(&dir.path().join("plain")).unwrap());
        assert!(!KernelMounter.is_mount_point(&dir.path().join("absent")).unwrap());
    }
}
