//! A directory tree that cannot be left: every operation goes through a directory descriptor that the kernel resolved
//! within the root.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::sys::stat::{Mode, SFlag, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::ImageError;

const DEPTH_MAX: usize = 128;
const NAME_BYTES_MAX: usize = 255;

/// The root.
#[derive(Debug)]
pub(crate) struct Tree {
    root: OwnedFd,
}

/// A directory within a tree and a name in it.
pub(crate) struct Place {
    pub(crate) dir: OwnedFd,
    pub(crate) name: OsString,
}

impl Tree {
    pub(crate) fn open(path: &Path) -> Result<Tree, ImageError> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root =
            nix::fcntl::open(path, flags, Mode::empty()).map_err(|errno| ImageError::io("open", path)(errno.into()))?;
        Ok(Tree { root })
    }

    /// Where an entry goes; missing parents are made (0755). `None` for the root itself.
    pub(crate) fn place(&self, path: &Path) -> Result<Option<Place>, ImageError> {
        let parts = clean(path)?;
        let Some((name, parents)) = parts.split_last() else { return Ok(None) };
        let parent: PathBuf = parents.iter().collect();
        let dir = match self.dir(&parent) {
            Ok(dir) => dir,
            Err(Errno::ENOENT) => self.make_parents(path, parents)?,
            Err(errno) => return Err(refused(path, errno)),
        };
        Ok(Some(Place { dir, name: name.clone() }))
    }

    /// Opens a directory, following links within the root.
    fn dir(&self, path: &Path) -> Result<OwnedFd, Errno> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        self.resolve(path, OFlag::O_PATH | OFlag::O_DIRECTORY)
    }

    fn resolve(&self, path: &Path, flags: OFlag) -> Result<OwnedFd, Errno> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS | ResolveFlag::RESOLVE_NO_XDEV);
        // EAGAIN: a rename raced with the resolution.
        for _ in 0..32 {
            match openat2(&self.root, path, how) {
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                other => return other,
            }
        }
        Err(Errno::EAGAIN)
    }

    fn make_parents(&self, path: &Path, parents: &[OsString]) -> Result<OwnedFd, ImageError> {
        let mut so_far = PathBuf::new();
        let mut dir = self.dir(&so_far).map_err(|errno| refused(path, errno))?;
        for part in parents {
            match mkdirat(&dir, part.as_os_str(), Mode::from_bits_truncate(0o755)) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(errno) => return Err(refused(path, errno)),
            }
            so_far.push(part);
            dir = self.dir(&so_far).map_err(|errno| refused(path, errno))?;
        }
        Ok(dir)
    }

    /// Opens a file for reading, following links within the root.
    pub(crate) fn read(&self, path: &Path) -> Result<File, ImageError> {
        let parts: PathBuf = clean(path)?.iter().collect();
        let file = self.resolve(&parts, OFlag::O_RDONLY | OFlag::O_NONBLOCK).map_err(|errno| ImageError::Damaged {
            what: format!("{} cannot be read: {}", path.display(), errno.desc()),
        })?;
        let file = File::from(file);
        let is_file = file.metadata().is_ok_and(|meta| meta.is_file());
        is_file.then_some(file).ok_or_else(|| ImageError::Damaged { what: format!("{} is not a file", path.display()) })
    }
}

impl Place {
    pub(crate) fn kind(&self) -> Option<SFlag> {
        let status = fstatat(&self.dir, self.name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW).ok()?;
        Some(SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT)
    }

    /// Removes what an earlier entry of the archive put here.
    pub(crate) fn clear(&self) -> io::Result<()> {
        match unlinkat(&self.dir, self.name.as_os_str(), UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(Errno::EISDIR) => remove_dir(self.dir.as_fd(), &self.name, 0),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Opens the directory itself, never a link to one.
    pub(crate) fn open_dir(&self) -> io::Result<OwnedFd> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        Ok(openat(&self.dir, self.name.as_os_str(), flags, Mode::empty())?)
    }
}

fn remove_dir(parent: std::os::fd::BorrowedFd<'_>, name: &OsStr, depth: usize) -> io::Result<()> {
    if depth > DEPTH_MAX {
        return Err(Errno::ELOOP.into());
    }
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let dir = openat(parent, name, flags, Mode::empty())?;
    let mut listing = Dir::from_fd(dir.try_clone()?)?;
    let names: Vec<OsString> = listing
        .iter()
        .flatten()
        .map(|entry| OsStr::from_bytes(entry.file_name().to_bytes()).to_owned())
        .filter(|name| name != "." && name != "..")
        .collect();
    for child in names {
        match unlinkat(&dir, child.as_os_str(), UnlinkatFlags::NoRemoveDir) {
            Err(Errno::EISDIR) => remove_dir(dir.as_fd(), &child, depth + 1)?,
            other => other?,
        }
    }
    Ok(unlinkat(parent, name, UnlinkatFlags::RemoveDir)?)
}

/// The names of a path in order. Leading slashes mean the root; `..` and absurd lengths are refused.
fn clean(path: &Path) -> Result<Vec<OsString>, ImageError> {
    let hostile = |why| ImageError::HostileEntry { entry: shorten(path), why };
    let mut parts = Vec::new();
    for part in path.components() {
        match part {
            Component::Normal(name) if name.len() > NAME_BYTES_MAX => return Err(hostile("a name is too long")),
            Component::Normal(name) => parts.push(name.to_owned()),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir => return Err(hostile("the path climbs with \"..\"")),
            Component::Prefix(_) => return Err(hostile("not a path")),
        }
    }
    if parts.len() > DEPTH_MAX {
        return Err(hostile("the path is too deep"));
    }
    Ok(parts)
}

pub(super) fn shorten(path: &Path) -> String {
    path.to_string_lossy().chars().take(200).collect()
}

fn refused(path: &Path, errno: Errno) -> ImageError {
    let why = match errno {
        Errno::ELOOP => "links lead in a circle",
        Errno::EXDEV => "the path leaves the layer",
        Errno::ENOTDIR => "a parent is not a directory",
        Errno::ENOENT => "a parent is a dangling link",
        _ => return ImageError::Io { operation: "unpack", path: path.into(), source: errno.into() },
    };
    ImageError::HostileEntry { entry: shorten(path), why }
}
