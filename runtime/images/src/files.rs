//! Small file work: atomic writes, temporary directories, sizes. Everything the store commits goes through here.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use oarlock_failpoint::step;

use crate::{ImageError, Usage};

/// Replaces a file so that after a power cut the old or the new content is there whole.
pub(crate) fn write_atomically(path: &Path, content: &[u8]) -> Result<(), ImageError> {
    let temporary = path.with_extension("tmp");
    let mut file = File::create(&temporary).map_err(ImageError::io("create", &temporary))?;
    file.write_all(content).and_then(|()| file.sync_all()).map_err(ImageError::io("write", &temporary))?;
    step("an image file's temporary is written");
    fs::rename(&temporary, path).map_err(ImageError::io("rename", &temporary))?;
    step("an image file is in place");
    sync_parent(path)
}

/// Makes the directory entry of a file or directory last.
pub(crate) fn sync_parent(path: &Path) -> Result<(), ImageError> {
    let Some(parent) = path.parent() else { return Ok(()) };
    File::open(parent).and_then(|dir| dir.sync_all()).map_err(ImageError::io("sync", parent))
}

/// Writes everything of the path's file system to the disk.
pub(crate) fn sync_file_system(path: &Path) -> Result<(), ImageError> {
    let dir = File::open(path).map_err(ImageError::io("open", path))?;
    nix::unistd::syncfs(dir.as_fd()).map_err(|errno| ImageError::io("sync", path)(errno.into()))
}

/// A directory for unfinished work; removed when dropped.
#[derive(Debug)]
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new(parent: &Path) -> Result<Scratch, ImageError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let path = parent.join(format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
        fs::create_dir_all(&path).map_err(ImageError::io("create", &path))?;
        Ok(Scratch(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Removes a directory tree; gone already is fine.
pub(crate) fn remove_dir(path: &Path) -> Result<(), ImageError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(ImageError::io("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Removes a file; gone already is fine.
pub(crate) fn remove_file(path: &Path) -> Result<(), ImageError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(ImageError::io("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Disk space and inodes of a tree, without following links or crossing mounts. What vanishes meanwhile counts nothing.
pub(crate) fn usage(path: &Path) -> Usage {
    let mut total = Usage::default();
    let Ok(root) = fs::symlink_metadata(path) else { return total };
    let mut pending = vec![path.to_path_buf()];
    total.inodes += 1;
    total.bytes += root.blocks() * 512;
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            if meta.dev() != root.dev() {
                continue;
            }
            total.inodes += 1;
            // A file of several names is counted in parts.
            total.bytes += meta.blocks() * 512 / if meta.is_dir() { 1 } else { meta.nlink().max(1) };
            if meta.is_dir() {
                pending.push(entry.path());
            }
        }
    }
    total
}

/// Names in a directory; a missing one has none.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}
