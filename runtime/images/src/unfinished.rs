//! What a pull that was cut off leaves for the next one: bytes of blobs that have come so far, and layers that are unpacked
//! but belong to no image yet.
//!
//! Neither is trusted: bytes count by the digest of the whole blob, and both are forgotten after a reboot, since only the
//! kernel's cache is sure to have them. Owns no decision about what is fetched.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;

use crate::{ImageError, files};

/// Smaller blobs are fetched again sooner than they are kept.
const BLOB_BYTES_MIN: u64 = 256 << 10;
/// What nobody came back for.
pub(crate) const STALE_AFTER: Duration = Duration::from_secs(24 * 3600);

/// The directories of unfinished work.
#[derive(Debug)]
pub(crate) struct Unfinished {
    parts: PathBuf,
    layers: PathBuf,
    /// Digests that somebody fetches; a second one fetches for itself alone.
    fetching: Arc<Mutex<BTreeSet<String>>>,
    /// Layers that pulls wait to put in place, and how many do.
    held: Arc<Mutex<BTreeMap<String, usize>>>,
}

impl Unfinished {
    /// Opens `<root>/unfinished`, and clears away what is of another boot or stale.
    pub(crate) fn open(root: &Path) -> Result<Unfinished, ImageError> {
        let all = root.join("unfinished");
        let path = "/proc/sys/kernel/random/boot_id";
        let boot = fs::read_to_string(path).map_err(ImageError::io("read", path))?;
        let home = all.join(boot.trim());
        for name in files::names(&all).into_iter().filter(|name| name != boot.trim()) {
            files::remove_dir(&all.join(name))?;
        }
        let unfinished = Unfinished {
            parts: home.join("parts"),
            layers: home.join("layers"),
            fetching: Arc::default(),
            held: Arc::default(),
        };
        for directory in [&unfinished.parts, &unfinished.layers] {
            fs::create_dir_all(directory).map_err(ImageError::io("create", directory))?;
        }
        unfinished.collect(STALE_AFTER);
        Ok(unfinished)
    }

    /// Where a layer waits for its image.
    pub(crate) fn layer(&self, chain_id: &str) -> PathBuf {
        self.layers.join(bare(chain_id))
    }

    /// Holds a layer, so that nobody else removes it.
    pub(crate) fn hold(&self, chain_id: &str) -> Held {
        *self.held.lock().entry(chain_id.to_owned()).or_default() += 1;
        Held { chain_id: chain_id.to_owned(), held: self.held.clone() }
    }

    /// What there is of a blob, for whoever fetches the rest. None if it is not worth keeping, or cannot be kept.
    pub(crate) fn part(&self, digest: &str, size_bytes: u64) -> Option<Part> {
        if size_bytes < BLOB_BYTES_MIN || !self.fetching.lock().insert(digest.to_owned()) {
            return None;
        }
        let claim = Claim { digest: digest.to_owned(), fetching: self.fetching.clone() };
        let path = self.parts.join(bare(digest));
        let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let file = opened.and_then(|file| {
            let arrived = file.metadata()?.len();
            // More than there can be is not of this blob.
            let arrived = if arrived > size_bytes { 0 } else { arrived };
            file.set_len(arrived)?;
            Ok((file, arrived))
        });
        match file {
            Ok((file, arrived)) => Some(Part { path, file: Some(file), arrived, kept: false, _claim: claim }),
            Err(error) => {
                tracing::debug!(digest, %error, "what comes of a blob is not kept");
                None
            }
        }
    }

    /// Removes what has been left alone for that long. What somebody fetches is being written to.
    pub(crate) fn collect(&self, stale_after: Duration) {
        let now = SystemTime::now();
        for directory in [&self.parts, &self.layers] {
            for name in files::names(directory) {
                let path = directory.join(&name);
                let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
                let age = metadata.modified().ok().and_then(|changed| now.duration_since(changed).ok());
                let busy = self.fetching.lock().iter().any(|digest| bare(digest) == name)
                    || self.held.lock().keys().any(|chain_id| bare(chain_id) == name);
                if busy || age.is_none_or(|age| age < stale_after) {
                    continue;
                }
                let removed = if metadata.is_dir() { files::remove_dir(&path) } else { files::remove_file(&path) };
                if let Err(error) = removed {
                    tracing::warn!(path = %path.display(), %error, "unfinished work could not be removed");
                }
            }
        }
    }
}

/// The digest as a file's name; digests are checked before they come here.
fn bare(digest: &str) -> &str {
    digest.trim_start_matches("sha256:")
}

/// A share in a layer.
#[derive(Debug)]
pub(crate) struct Held {
    chain_id: String,
    held: Arc<Mutex<BTreeMap<String, usize>>>,
}

impl Held {
    /// Whether nobody else holds the layer.
    pub(crate) fn is_last(&self) -> bool {
        self.held.lock().get(&self.chain_id) == Some(&1)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut held = self.held.lock();
        if let Some(count) = held.get_mut(&self.chain_id) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.chain_id);
            }
        }
    }
}

#[derive(Debug)]
struct Claim {
    digest: String,
    fetching: Arc<Mutex<BTreeSet<String>>>,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.fetching.lock().remove(&self.digest);
    }
}

/// The first bytes of a blob. Removed when dropped, unless it is worth another try.
#[derive(Debug)]
pub(crate) struct Part {
    path: PathBuf,
    /// None once it cannot be written to any more.
    file: Option<File>,
    arrived: u64,
    kept: bool,
    _claim: Claim,
}

impl Part {
    /// How many bytes are there.
    pub(crate) fn arrived(&self) -> u64 {
        self.arrived
    }

    /// The whole blob: what is there, then `rest`, which is kept as it comes.
    pub(crate) fn read<R: Read>(&mut self, rest: R) -> io::Result<Whole<'_, R>> {
        let mut before = None;
        if let Some(file) = &mut self.file {
            file.seek(SeekFrom::Start(0))?;
            before = Some(file.try_clone()?.take(self.arrived));
        }
        Ok(Whole { before, rest, part: self })
    }

    /// Leaves the bytes for another try.
    pub(crate) fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if !self.kept {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A blob that is read from its first byte, wherever its bytes are.
pub(crate) struct Whole<'a, R> {
    before: Option<io::Take<File>>,
    rest: R,
    part: &'a mut Part,
}

impl<R: Read> Read for Whole<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(before) = &mut self.before {
            let count = before.read(buffer)?;
            if count > 0 || buffer.is_empty() {
                return Ok(count);
            }
            if before.limit() > 0 {
                return Err(io::Error::other("what had come of a blob is gone"));
            }
            // The clone shares its place with the file, which is now at its end.
            self.before = None;
        }
        let count = self.rest.read(buffer)?;
        if let Some(file) = &mut self.part.file {
            match file.write_all(&buffer[..count]) {
                Ok(()) => {
                    self.part.arrived += count as u64;
                }
                // A full disk: the pull may fit all the same, without what only saves time.
                Err(_) => {
                    let _ = file.set_len(self.part.arrived);
                    self.part.file = None;
                }
            }
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = BLOB_BYTES_MIN;

    #[test]
    fn bytes_that_came_are_read_again_and_the_rest_is_added() {
        let temp = tempfile::tempdir().unwrap();
        let unfinished = Unfinished::open(temp.path()).unwrap();
        let mut first = unfinished.part("sha256:aa", SIZE).unwrap();
        // Somebody who comes meanwhile fetches for himself.
        assert!(unfinished.part("sha256:aa", SIZE).is_none());
        let mut out = Vec::new();
        first.read(&b"one "[..]).unwrap().read_to_end(&mut out).unwrap();
        first.keep();
        let again = Unfinished::open(temp.path()).unwrap();
        let mut second = again.part("sha256:aa", SIZE).unwrap();
        assert_eq!(second.arrived(), 4);
        out.clear();
        second.read(&b"two"[..]).unwrap().read_to_end(&mut out).unwrap();
        assert_eq!((out.as_slice(), second.arrived()), (&b"one two"[..], 7));
        drop(second);
        assert_eq!(again.part("sha256:aa", SIZE).unwrap().arrived(), 0);
    }

    #[test]
    fn what_is_stale_or_of_another_boot_or_too_long_is_forgotten() {
        let temp = tempfile::tempdir().unwrap();
        let unfinished = Unfinished::open(temp.path()).unwrap();
        fs::create_dir_all(temp.path().join("unfinished/another-boot/parts")).unwrap();
        fs::write(unfinished.parts.join("aa"), vec![0; SIZE as usize + 1]).unwrap();
        fs::create_dir_all(unfinished.layer("sha256:bb").join("fs")).unwrap();
        let unfinished = Unfinished::open(temp.path()).unwrap();
        assert!(!temp.path().join("unfinished/another-boot").exists());
        let part = unfinished.part("sha256:aa", SIZE).unwrap();
        assert_eq!(part.arrived(), 0);
        unfinished.collect(Duration::ZERO);
        assert!(unfinished.parts.join("aa").exists(), "somebody fetches it");
        assert!(!unfinished.layer("sha256:bb").exists());
        part.keep();
        unfinished.collect(Duration::ZERO);
        assert!(!unfinished.parts.join("aa").exists());
    }
}
