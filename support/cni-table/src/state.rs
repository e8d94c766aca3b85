//! Records of what the plugins wrote, in files that live as long as the kernel's tables do.
//!
//! In `<directory>/<number of the network namespace>/`, below `/run` and so gone with the machine's next start:
//! - `<network and attachment>.<plugin>`: the owner and its parts, as JSON. It is there before the kernel is told and goes
//!   after the kernel has forgotten, so a kill in between leaves a record that DEL or GC takes away.
//! - `lock`: held by every plugin while it changes both, with others; alone by whoever compares records with the kernel.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use nix::fcntl::{Flock, FlockArg};
use oarlock_nft::Netlink;
use serde::{Deserialize, Serialize};

use crate::owner::Owner;
use crate::part::Part;
use crate::{Result, TableError};

/// Where the plugins keep records unless their configuration names another directory (`stateDir`).
pub const STATE_DIR: &str = "/run/oarlock-cni";
const LOCK: &str = "lock";

/// The records of one network namespace, locked for as long as this lives.
#[derive(Debug)]
pub struct State {
    directory: PathBuf,
    _lock: Flock<File>,
}

/// What one plugin wrote for one attachment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub owner: String,
    pub parts: Vec<Part>,
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TableError {
    move |source| TableError::File { operation, path: path.to_owned(), source }
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The directory of the network namespace that `kernel` speaks to.
fn directory_of(state_dir: &Path, kernel: &Netlink) -> Result<PathBuf> {
    if let Some(number) = kernel.namespace_number() {
        return Ok(state_dir.join(number.to_string()));
    }
    // Before Linux 5.14 there is only the number of the namespace's file, which a later one can have again.
    let own = Path::new("/proc/thread-self/ns/net");
    let metadata = fs::metadata(own).map_err(failed("look at", own))?;
    Ok(state_dir.join(format!("file-{}", metadata.ino())))
}

impl State {
    /// Opens, makes if need be, and locks together with others.
    pub fn open(state_dir: &Path, kernel: &Netlink) -> Result<State> {
        let directory = directory_of(state_dir, kernel)?;
        if let Some(state) = State::lock(&directory, FlockArg::LockShared)? {
            return Ok(state);
        }
        DirBuilder::new().recursive(true).mode(0o700).create(&directory).map_err(failed("create", &directory))?;
        let state = State::lock(&directory, FlockArg::LockShared)?;
        state.ok_or_else(|| failed("open", &directory)(io::ErrorKind::NotFound.into()))
    }

    /// As [`State::open`], or nothing when nothing was ever recorded.
    pub fn open_existing(state_dir: &Path, kernel: &Netlink) -> Result<Option<State>> {
        State::lock(&directory_of(state_dir, kernel)?, FlockArg::LockShared)
    }

    /// As [`State::open_existing`], once nobody else has it open.
    pub fn open_alone(state_dir: &Path, kernel: &Netlink) -> Result<Option<State>> {
        State::lock(&directory_of(state_dir, kernel)?, FlockArg::LockExclusive)
    }

    /// Removes every record of the network namespace, for whoever takes the tables away for good.
    pub fn remove(state_dir: &Path, kernel: &Netlink) -> Result<()> {
        match State::open_alone(state_dir, kernel)? {
            Some(state) => {
                absent_is_fine(fs::remove_dir_all(&state.directory)).map_err(failed("remove", &state.directory))
            }
            None => Ok(()),
        }
    }

    fn lock(directory: &Path, how: FlockArg) -> Result<Option<State>> {
        let path = directory.join(LOCK);
        let file = match File::options().create(true).truncate(false).write(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("open", &path)(error)),
        };
        let lock = Flock::lock(file, how).map_err(|(_, errno)| failed("lock", &path)(errno.into()))?;
        Ok(Some(State { directory: directory.to_owned(), _lock: lock }))
    }

    fn path(&self, owner: &Owner, plugin: &str) -> PathBuf {
        self.directory.join(format!("{}.{plugin}", owner.key()))
    }

    /// Puts on record what `plugin` is about to write for `owner`, in the place of what it wrote before.
    pub fn record(&self, owner: &Owner, plugin: &str, parts: &[Part]) -> Result<()> {
        let path = self.path(owner, plugin);
        let record = Record { owner: owner.as_str().to_owned(), parts: parts.to_vec() };
        // Hidden until it is whole; a second call for the same attachment is not to be expected, and harmless.
        let new = self.directory.join(format!(".{}.{plugin}", owner.key()));
        let write = || -> io::Result<()> {
            fs::write(&new, serde_json::to_vec(&record)?)?;
            fs::rename(&new, &path)
        };
        write().map_err(failed("write", &path))
    }

    /// What `plugin` wrote for `owner`, if that is on record.
    pub fn parts(&self, owner: &Owner, plugin: &str) -> Option<Vec<Part>> {
        let record: Record = serde_json::from_slice(&fs::read(self.path(owner, plugin)).ok()?).ok()?;
        Some(record.parts)
    }

    /// Forgets what `plugin` wrote for `owner`; nothing is fine too.
    pub fn forget(&self, owner: &Owner, plugin: &str) -> Result<()> {
        let path = self.path(owner, plugin);
        absent_is_fine(fs::remove_file(&path)).map_err(failed("remove", &path))
    }

    /// Forgets what `plugin` wrote for attachments to `network` that are none of `valid`.
    pub fn keep_only(&self, network: &str, valid: &[Owner], plugin: &str) -> Result<()> {
        let ending = format!(".{plugin}");
        for path in self.files()? {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let key = name.trim_start_matches('.').strip_suffix(&ending);
            if key.is_some_and(|key| Owner::is_stale(key, network, valid)) {
                absent_is_fine(fs::remove_file(&path)).map_err(failed("remove", &path))?;
            }
        }
        Ok(())
    }

    fn files(&self) -> Result<Vec<PathBuf>> {
        let entries = fs::read_dir(&self.directory).map_err(failed("list", &self.directory))?;
        entries.map(|entry| entry.map(|entry| entry.path()).map_err(failed("list", &self.directory))).collect()
    }

    /// Every record that can be read, the oldest first. Others may be a newer version's, and are left alone.
    pub(crate) fn records(&self) -> Result<Vec<Record>> {
        let mut found: Vec<(SystemTime, PathBuf, Record)> = Vec::new();
        for path in self.files()? {
            if path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b".")) {
                continue;
            }
            let read = || -> Option<(SystemTime, Record)> {
                let record = serde_json::from_slice(&fs::read(&path).ok()?).ok()?;
                Some((fs::metadata(&path).ok()?.modified().ok()?, record))
            };
            if let Some((time, record)) = read() {
                found.push((time, path, record));
            }
        }
        found.sort_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));
        Ok(found.into_iter().map(|(_, _, record)| record).collect())
    }
}
