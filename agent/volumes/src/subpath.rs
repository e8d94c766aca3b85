//! subPath: resolves a path inside a volume so that no link can lead out of it, and gives it as a descriptor.
//!
//! The descriptor is what gets bound, so whatever a container does to the volume between the check and the mount is
//! without effect. Links inside the volume are followed as long as they stay inside.

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, fchmod, fstat, mkdirat};

use crate::layout::is_contained;

/// Tries against a file system that changes underneath (openat2 answers EAGAIN).
const ATTEMPTS: usize = 64;

/// Why a subPath cannot be had.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum SubPathError {
    #[error("it must be relative and must not contain '..'")]
    Climbs,
    #[error("it leads out of the volume")]
    Escapes,
    #[error("{0}")]
    Os(Errno),
}

impl From<Errno> for SubPathError {
    fn from(error: Errno) -> Self {
        match error {
            Errno::EXDEV | Errno::ELOOP => SubPathError::Escapes,
            other => SubPathError::Os(other),
        }
    }
}

/// Opens `sub_path` inside the volume at `root` (O_PATH), making missing directories with the root's mode.
pub(crate) fn open(root: &Path, sub_path: &str) -> Result<OwnedFd, SubPathError> {
    let path = Path::new(sub_path);
    if !is_contained(path) || sub_path.contains('\0') {
        return Err(SubPathError::Climbs);
    }
    let root = openat2(AT_FDCWD, root, OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC))?;
    match beneath(&root, path) {
        Err(SubPathError::Os(Errno::ENOENT)) => create(&root, path),
        other => other,
    }
}

/// Reads a regular file inside the volume at `root`; None when it is not there. More than `most` bytes are an error.
pub(crate) fn read(root: &Path, path: &str, most: usize) -> Result<Option<Vec<u8>>, SubPathError> {
    let relative = Path::new(path);
    if !is_contained(relative) || path.contains('\0') {
        return Err(SubPathError::Climbs);
    }
    let root = openat2(AT_FDCWD, root, OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC))?;
    // Not blocking, should it be a pipe.
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let file = match openat2(&root, relative, how) {
        Ok(file) => std::fs::File::from(file),
        Err(Errno::ENOENT) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let os = |error: std::io::Error| SubPathError::Os(Errno::from_raw(error.raw_os_error().unwrap_or(0)));
    if !file.metadata().map_err(os)?.is_file() {
        return Err(SubPathError::Os(Errno::EINVAL));
    }
    let mut bytes = Vec::new();
    file.take(most as u64 + 1).read_to_end(&mut bytes).map_err(os)?;
    if bytes.len() > most { Err(SubPathError::Os(Errno::EFBIG)) } else { Ok(Some(bytes)) }
}

fn beneath(root: &OwnedFd, path: &Path) -> Result<OwnedFd, SubPathError> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    for _ in 0..ATTEMPTS {
        match openat2(root, path, how) {
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            other => return Ok(other?),
        }
    }
    Err(SubPathError::Os(Errno::EAGAIN))
}

/// Walks the part that exists, then makes the rest one directory at a time.
fn create(root: &OwnedFd, path: &Path) -> Result<OwnedFd, SubPathError> {
    let mode = Mode::from_bits_truncate(fstat(root)?.st_mode & 0o7777);
    let mut current = root.try_clone().map_err(|_| SubPathError::Os(Errno::EMFILE))?;
    let mut walked = std::path::PathBuf::new();
    let mut made = false;
    for part in path.components().filter(|part| *part != Component::CurDir) {
        walked.push(part);
        if !made {
            // From the root each time: links that exist may lead anywhere inside the volume.
            match beneath(root, &walked) {
                Ok(next) => {
                    current = next;
                    continue;
                }
                Err(SubPathError::Os(Errno::ENOENT)) => made = true,
                Err(error) => return Err(error),
            }
        }
        current = make_child(&current, part.as_os_str(), mode)?;
    }
    Ok(current)
}

fn make_child(parent: &OwnedFd, name: &std::ffi::OsStr, mode: Mode) -> Result<OwnedFd, SubPathError> {
    let fresh = match mkdirat(parent, name, Mode::S_IRWXU) {
        Ok(()) => true,
        Err(Errno::EEXIST) => false,
        Err(error) => return Err(error.into()),
    };
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH);
    let child = openat2(parent, name, how)?;
    if fresh {
        fchmod(child.as_fd(), mode)?;
    }
    Ok(child)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::path::PathBuf;

    use super::*;

    fn resolved(fd: &OwnedFd) -> PathBuf {
        fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap()
    }

    #[test]
    fn missing_directories_are_made_with_the_volumes_mode() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let fd = open(dir.path(), "a/b").unwrap();
        assert_eq!(resolved(&fd), dir.path().canonicalize().unwrap().join("a/b"));
        assert_eq!(fs::metadata(dir.path().join("a/b")).unwrap().permissions().mode() & 0o777, 0o777);
    }

    #[test]
    fn files_and_inner_links_are_resolved() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("..v1")).unwrap();
        fs::write(dir.path().join("..v1/key"), "x").unwrap();
        symlink("..v1", dir.path().join("..data")).unwrap();
        symlink("..data/key", dir.path().join("key")).unwrap();
        let fd = open(dir.path(), "key").unwrap();
        assert_eq!(resolved(&fd), dir.path().canonicalize().unwrap().join("..v1/key"));
    }

    #[test]
    fn nothing_leads_out_of_the_volume() {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("volume");
        fs::create_dir(&volume).unwrap();
        fs::create_dir(dir.path().join("secret")).unwrap();
        symlink("/etc", volume.join("absolute")).unwrap();
        symlink("../secret", volume.join("relative")).unwrap();
        symlink("loop", volume.join("loop")).unwrap();
        for path in ["absolute", "absolute/passwd", "relative", "relative/new", "loop"] {
            assert_eq!(open(&volume, path).unwrap_err(), SubPathError::Escapes, "{path}");
        }
        for path in ["..", "../secret", "a/../../secret", "/etc"] {
            assert_eq!(open(&volume, path).unwrap_err(), SubPathError::Climbs, "{path}");
        }
        assert!(!dir.path().join("secret/new").exists());
    }

    #[test]
    fn a_dangling_link_is_not_written_through() {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("volume");
        fs::create_dir(&volume).unwrap();
        symlink("../made", volume.join("out")).unwrap();
        assert!(open(&volume, "out/x").is_err());
        assert!(!dir.path().join("made").exists());
    }

    #[test]
    fn swapping_links_never_wins() {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("volume");
        fs::create_dir_all(volume.join("real")).unwrap();
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        let outside = outside.canonicalize().unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let spare = volume.join("spare");
                    let _ = fs::rename(volume.join("real"), &spare);
                    let _ = symlink(&outside, volume.join("real"));
                    let _ = fs::remove_file(volume.join("real"));
                    let _ = fs::remove_dir_all(volume.join("real"));
                    let _ = fs::rename(&spare, volume.join("real"));
                }
            });
            for _ in 0..2000 {
                if let Ok(fd) = open(&volume, "real/inner") {
                    assert!(!resolved(&fd).starts_with(&outside));
                }
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    }

    #[test]
    fn a_file_is_read_only_inside_the_volume() {
        let dir = tempfile::tempdir().expect("a directory");
        let root = dir.path().join("volume");
        std::fs::create_dir(&root).unwrap();
        std::fs::write(dir.path().join("secret"), "outside").unwrap();
        std::fs::write(root.join("file"), "A='1'").unwrap();
        std::os::unix::fs::symlink("file", root.join("inner")).unwrap();
        std::os::unix::fs::symlink("../secret", root.join("outer")).unwrap();
        assert_eq!(read(&root, "file", 10), Ok(Some(b"A='1'".to_vec())));
        assert_eq!(read(&root, "inner", 10), Ok(Some(b"A='1'".to_vec())));
        assert_eq!(read(&root, "absent", 10), Ok(None));
        assert_eq!(read(&root, "outer", 10), Err(SubPathError::Escapes));
        assert_eq!(read(&root, "../secret", 10), Err(SubPathError::Climbs));
        assert_eq!(read(&root, "file", 4), Err(SubPathError::Os(Errno::EFBIG)));
        assert_eq!(read(&root, ".", 4), Err(SubPathError::Os(Errno::EINVAL)));
    }
}
