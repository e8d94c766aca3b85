//! The blocking file-system work of one pod: making volume directories, publishing payloads, binding subPaths, tearing down.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use nix::sys::stat::{SFlag, fstat};

use crate::error::VolumeError;
use crate::layout::{PodDir, VolumeKind, is_own_mount_point, relative_volume};
use crate::mounter::{HugePages, Mounter, Tmpfs};
use crate::ownership::{self, ChangePolicy, FsGroup};
use crate::payload::Payload;
use crate::{atomic, ledger, removal, subpath};

/// Mode of the directories above volumes, which containers never see.
const OUTER_MODE: u32 = 0o750;

/// What a volume's files are kept in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Medium {
    Disk,
    /// A tmpfs, of this size when it is known.
    Memory {
        size_bytes: Option<u64>,
    },
    HugePages {
        page_bytes: u64,
    },
}

/// How one volume's directory is to be.
#[derive(Debug, Clone)]
pub(crate) struct Shape {
    pub kind: VolumeKind,
    pub name: String,
    pub mode: u32,
    pub medium: Medium,
    pub group: Option<FsGroup>,
    pub policy: ChangePolicy,
}

/// One pod's place in the file system.
#[derive(Clone)]
pub(crate) struct Place {
    pub dir: PodDir,
    pub mounter: Arc<dyn Mounter>,
}

impl Place {
    /// Makes the volume's directory ready; one that is there already is left as it is. Gives its path.
    pub fn make(&self, shape: &Shape) -> Result<PathBuf, VolumeError> {
        let path = self.dir.volume(shape.kind, &shape.name)?;
        make_outer(path.parent().unwrap_or(&self.dir.path))?;
        if !is_dir(&path)? {
            make_fresh(&path, shape)?;
        }
        if shape.medium == Medium::Disk {
            return Ok(path);
        }
        if self.mounter.is_mount_point(&path).map_err(|e| VolumeError::io("look at", &path, e))? {
            return Ok(path);
        }
        let relative = relative_volume(shape.kind, &shape.name)?;
        self.note(&relative)?;
        let group_bits = shape.group.map_or(0, |group| if group.read_only { 0o2550 } else { 0o2770 });
        let (mode, gid) = (shape.mode | group_bits, shape.group.map(|group| group.gid));
        let mounted = match shape.medium {
            Medium::Disk => Ok(()),
            Medium::Memory { size_bytes } => self.mounter.tmpfs(&path, Tmpfs { size_bytes, mode, gid }),
            Medium::HugePages { page_bytes } => self.mounter.huge_pages(&path, HugePages { page_bytes, mode, gid }),
        };
        mounted.map_err(|e| VolumeError::io("mount the volume's medium on", &path, e))?;
        Ok(path)
    }

    /// Makes the volume's directory and shows exactly `payload` in it.
    pub fn publish(&self, shape: &Shape, payload: &Payload, now: Timestamp) -> Result<bool, VolumeError> {
        let path = self.make(shape)?;
        atomic::publish(&path, payload, now, |fresh| match shape.group {
            Some(group) => ownership::apply(fresh, group, ChangePolicy::Always),
            None => Ok(()),
        })
    }

    /// Binds `sub_path` of the volume at `base` to a place of its own; gives that place. An earlier bind there is replaced:
    /// a container that still uses it has its own copy of the mount.
    pub fn bind_sub_path(&self, base: &Path, sub_path: &str, target: &Path) -> Result<PathBuf, VolumeError> {
        let volume = target.iter().nth(1).unwrap_or_default().to_string_lossy().into_owned();
        let source = subpath::open(base, sub_path).map_err(|error| VolumeError::SubPath {
            volume,
            sub_path: sub_path.to_string(),
            reason: error.to_string(),
        })?;
        let path = self.dir.path.join(target);
        make_outer(path.parent().unwrap_or(&self.dir.path))?;
        self.note(target)?;
        self.mounter.unmount(&path).map_err(|e| VolumeError::io("unmount", &path, e))?;
        make_bind_target(&path, &source)?;
        use std::os::fd::AsFd;
        self.mounter.bind(source.as_fd(), &path).map_err(|e| VolumeError::io("bind subPath to", &path, e))?;
        Ok(path)
    }

    /// Unmounts what is ours, then removes the pod's directory. Nothing is deleted while anything is mounted below it.
    pub fn tear_down(&self, pods_root: &Path) -> Result<(), VolumeError> {
        let root = match fs::canonicalize(pods_root) {
            Ok(root) => root,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(VolumeError::io("resolve", pods_root, error)),
        };
        let pod = root.join(&self.dir.uid);
        if fs::symlink_metadata(&pod).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            return Ok(());
        }
        self.unmount_all(&pod)?;
        removal::remove_tree(&root, &self.dir.uid)
    }

    fn unmount_all(&self, pod: &Path) -> Result<(), VolumeError> {
        let noted = ledger::read(&self.dir.ledger()).map_err(|e| VolumeError::io("read", &self.dir.ledger(), e))?;
        let points = self.mounter.mounts_below(pod).map_err(|e| VolumeError::io("list mounts below", pod, e))?;
        let is_ours = |point: &PathBuf| {
            let Ok(relative) = point.strip_prefix(pod) else { return false };
            noted.iter().any(|mount| mount == relative) || is_own_mount_point(relative)
        };
        let (ours, foreign): (Vec<PathBuf>, Vec<PathBuf>) = points.into_iter().partition(is_ours);
        let mut errors: Vec<VolumeError> =
            foreign.iter().map(|path| VolumeError::ForeignMount { path: path.clone() }).collect();
        for point in ours.iter().rev().filter(|point| !foreign.iter().any(|path| path.starts_with(point))) {
            if let Err(error) = self.mounter.unmount(point) {
                errors.push(VolumeError::io("unmount", point, error));
            }
        }
        VolumeError::gather(errors)?;
        let left = self.mounter.mounts_below(pod).map_err(|e| VolumeError::io("list mounts below", pod, e))?;
        VolumeError::gather(left.into_iter().map(|path| VolumeError::ForeignMount { path }).collect())
    }

    fn note(&self, relative: &Path) -> Result<(), VolumeError> {
        let path = self.dir.ledger();
        ledger::note(&path, relative).map_err(|e| VolumeError::io("write", &path, e))
    }
}

fn make_outer(path: &Path) -> Result<(), VolumeError> {
    fs::DirBuilder::new().recursive(true).mode(OUTER_MODE).create(path).map_err(|e| VolumeError::io("create", path, e))
}

fn is_dir(path: &Path) -> Result<bool, VolumeError> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => Ok(true),
        Ok(_) => Err(VolumeError::io("use", path, io::Error::from(io::ErrorKind::NotADirectory))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(VolumeError::io("look at", path, error)),
    }
}

/// Makes the directory under another name and renames it, so that one that is there is complete.
fn make_fresh(path: &Path, shape: &Shape) -> Result<(), VolumeError> {
    // No volume name starts with a dot.
    let fresh = path.with_file_name(format!(".{}.new", shape.name));
    match fs::remove_dir(&fresh) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(VolumeError::io("remove", &fresh, error)),
    }
    fs::create_dir(&fresh).map_err(|e| VolumeError::io("create", &fresh, e))?;
    fs::set_permissions(&fresh, fs::Permissions::from_mode(shape.mode))
        .map_err(|e| VolumeError::io("set the mode of", &fresh, e))?;
    if let Some(group) = shape.group {
        ownership::apply(&fresh, group, shape.policy)?;
    }
    fs::rename(&fresh, path).map_err(|e| VolumeError::io("rename", &fresh, e))
}

/// Makes the file or directory to bind onto, of the same sort as the source.
fn make_bind_target(path: &Path, source: &OwnedFd) -> Result<(), VolumeError> {
    let stat = fstat(source).map_err(|e| VolumeError::io("look at the source for", path, e))?;
    let wants_dir = stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFDIR.bits();
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() == wants_dir && !metadata.is_symlink() => return Ok(()),
        Ok(metadata) => {
            let removed = if metadata.is_dir() { fs::remove_dir(path) } else { fs::remove_file(path) };
            removed.map_err(|e| VolumeError::io("remove", path, e))?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(VolumeError::io("look at", path, error)),
    }
    let made = if wants_dir {
        fs::DirBuilder::new().mode(OUTER_MODE).create(path)
    } else {
        fs::OpenOptions::new().write(true).create_new(true).mode(0o640).open(path).map(drop)
    };
    made.map_err(|e| VolumeError::io("create", path, e))
}
