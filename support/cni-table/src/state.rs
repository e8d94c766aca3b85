//! Records of what the plugins wrote, in files that live as long as the kernel's tables do.
//!
//! In `<directory>/<number of the network namespace>/`, below `/run` and so gone with the machine's next start:
//! - `<network and attachment>.<plugin>`: the owner and its parts, as JSON. It is there before the kernel is told and goes
//!   after the kernel has forgotten, so a kill in between leaves a record that DEL or GC takes away.
//! - `lock`: held by every plugin while it changes both, with others; alone by whoever compares records with the kernel, or
//!   removes the directory because nothing is on record. Who waited for it then finds that the file is not in its place any
//!   more, and begins again.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use oarlock_nft::Netlink;
use serde::{Deserialize, Serialize};

use crate::owner::Owner;
use crate::part::Part;
use crate::{Result, TableError};

/// Where the plugins keep records unless their configuration names another directory (`stateDir`).
pub const STATE_DIR: &str = "/run/oarlock-cni";
const LOCK: &str = "lock";
/// How long others may remove the directory again and again before one has it, and how soon one looks again.
const OPEN_LIMIT: Duration = Duration::from_secs(10);
const OPEN_PAUSE: Duration = Duration::from_micros(100);

/// The records of one network namespace, locked for as long as this lives.
#[derive(Debug)]
pub struct State {
    directory: PathBuf,
    lock: Flock<File>,
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

/// What removing a directory says: it may be in use again, or somebody's mount point.
fn in_use_is_fine(result: io::Result<()>) -> io::Result<()> {
    use io::ErrorKind::{DirectoryNotEmpty, ResourceBusy};
    match result {
        Err(error) if matches!(error.kind(), DirectoryNotEmpty | ResourceBusy) => Ok(()),
        other => absent_is_fine(other),
    }
}

/// Opens a directory's file of the lock, if there is the directory.
fn open_lock(path: &Path) -> Result<Option<File>> {
    match File::options().create(true).truncate(false).write(true).open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("open", path)(error)),
    }
}

/// Whether the file is what others find at its path, or was removed while one waited for it.
fn is_in_place(file: &File, path: &Path) -> bool {
    let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let found = fs::metadata(path).map(identity);
    found.is_ok_and(|found| file.metadata().map(identity).is_ok_and(|own| own == found))
}

/// With others who remove what one waits for, again and again.
#[derive(Debug, Default)]
struct Patience {
    tries: u32,
    until: Option<Instant>,
}

impl Patience {
    /// Pauses before every try but the first two; false when there have been enough.
    fn lasts(&mut self) -> bool {
        let until = *self.until.get_or_insert_with(|| Instant::now() + OPEN_LIMIT);
        self.tries += 1;
        if self.tries > 2 {
            std::thread::sleep(OPEN_PAUSE);
        }
        Instant::now() < until
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
        State::open_at(&directory_of(state_dir, kernel)?)
    }

    fn open_at(directory: &Path) -> Result<State> {
        let mut patience = Patience::default();
        while patience.lasts() {
            if let Some(state) = State::lock(directory, FlockArg::LockShared)? {
                return Ok(state);
            }
            // Whoever removes what is empty may come in between, and others who make it.
            match DirBuilder::new().recursive(true).mode(0o700).create(directory) {
                Err(error) if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists) => {
                    return Err(failed("create", directory)(error));
                }
                _ => {}
            }
        }
        Err(failed("open", directory)(io::ErrorKind::NotFound.into()))
    }

    /// As [`State::open`], or nothing when nothing is recorded.
    pub fn open_existing(state_dir: &Path, kernel: &Netlink) -> Result<Option<State>> {
        State::lock(&directory_of(state_dir, kernel)?, FlockArg::LockShared)
    }

    /// As [`State::open_existing`], once nobody else has it open.
    pub fn open_alone(state_dir: &Path, kernel: &Netlink) -> Result<Option<State>> {
        State::lock(&directory_of(state_dir, kernel)?, FlockArg::LockExclusive)
    }

    /// Removes every record of the network namespace, for whoever takes the tables away for good, and below `state_dir` all
    /// that is empty, with itself.
    pub fn remove(state_dir: &Path, kernel: &Netlink) -> Result<()> {
        if let Some(state) = State::open_alone(state_dir, kernel)? {
            state.remove_directory()?;
        }
        let entries = match fs::read_dir(state_dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(failed("list", state_dir)(error)),
        };
        for entry in entries {
            let entry = entry.map_err(failed("list", state_dir))?;
            // Others' namespaces have theirs here. One that is in use is seen to by whoever uses it.
            if entry.file_type().is_ok_and(|kind| kind.is_dir())
                && let Some(state) = State::lock_if_free(&entry.path())?
            {
                state.remove_if_empty()?;
            }
        }
        in_use_is_fine(fs::remove_dir(state_dir)).map_err(failed("remove", state_dir))
    }

    /// Unlocks, and removes the directory when nothing is on record and nobody else has it open.
    pub fn close(self) -> Result<()> {
        if self.has_records()? {
            return Ok(());
        }
        match self.lock.relock(FlockArg::LockExclusiveNonblock) {
            Ok(()) => self.remove_if_empty(),
            // The lock is lost with that: of several the last one is alone.
            Err(Errno::EWOULDBLOCK) => Ok(()),
            Err(errno) => Err(failed("lock", &self.directory.join(LOCK))(errno.into())),
        }
    }

    /// As [`State::close`], for whoever is alone.
    pub(crate) fn remove_if_empty(self) -> Result<()> {
        // While one lock became the other, somebody may have put something on record, or removed everything.
        if !is_in_place(&self.lock, &self.directory.join(LOCK)) || self.has_records()? {
            return Ok(());
        }
        self.remove_directory()
    }

    /// For whoever is alone: removes everything.
    fn remove_directory(self) -> Result<()> {
        let lock = self.directory.join(LOCK);
        // The lock comes last: without its file others make another, and the directory is theirs.
        let files = self.files()?.into_iter().filter(|path| *path != lock);
        for path in files.chain([lock.clone()]) {
            absent_is_fine(fs::remove_file(&path)).map_err(failed("remove", &path))?;
        }
        in_use_is_fine(fs::remove_dir(&self.directory)).map_err(failed("remove", &self.directory))
    }

    /// Whether anything is on record, be it in a newer version's words. What is half written is none.
    fn has_records(&self) -> Result<bool> {
        for entry in fs::read_dir(&self.directory).map_err(failed("list", &self.directory))? {
            let name = entry.map_err(failed("list", &self.directory))?.file_name();
            if name != LOCK && !name.as_encoded_bytes().starts_with(b".") {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn lock(directory: &Path, how: FlockArg) -> Result<Option<State>> {
        let path = directory.join(LOCK);
        let mut patience = Patience::default();
        while patience.lasts() {
            let Some(file) = open_lock(&path)? else { return Ok(None) };
            let lock = Flock::lock(file, how).map_err(|(_, errno)| failed("lock", &path)(errno.into()))?;
            if is_in_place(&lock, &path) {
                return Ok(Some(State { directory: directory.to_owned(), lock }));
            }
        }
        Err(failed("lock", &path)(io::ErrorKind::NotFound.into()))
    }

    /// Alone, if nobody has it open.
    fn lock_if_free(directory: &Path) -> Result<Option<State>> {
        let path = directory.join(LOCK);
        let Some(file) = open_lock(&path)? else { return Ok(None) };
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(State { directory: directory.to_owned(), lock })),
            Err((_, Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, errno)) => Err(failed("lock", &path)(errno.into())),
        }
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    fn alone(directory: &Path) -> Option<State> {
        State::lock(directory, FlockArg::LockExclusive).unwrap()
    }

    #[test]
    fn the_last_one_on_record_takes_the_directory_along() {
        let temporary = tempfile::tempdir().unwrap();
        let directory = temporary.path().join("state/7");
        let owners = ["a", "b"].map(|container| Owner::new("net", container, "eth0"));
        for owner in &owners {
            State::open_at(&directory).unwrap().record(owner, "bridge", &[]).unwrap();
        }
        let forget = |owner| {
            let state = State::open_at(&directory).unwrap();
            state.forget(owner, "bridge").unwrap();
            state.close().unwrap();
        };
        forget(&owners[0]);
        assert!(alone(&directory).is_some_and(|state| state.parts(&owners[1], "bridge").is_some()));
        // Somebody else is about to write.
        let other = State::open_at(&directory).unwrap();
        forget(&owners[1]);
        other.record(&owners[0], "bridge", &[]).unwrap();
        drop(other);
        forget(&owners[0]);
        assert!(!directory.exists());
    }

    #[test]
    fn what_is_not_understood_stays_and_what_is_half_written_does_not() {
        let temporary = tempfile::tempdir().unwrap();
        let directory = temporary.path().join("7");
        drop(State::open_at(&directory).unwrap());
        fs::write(directory.join("0-0.newer"), "?").unwrap();
        alone(&directory).unwrap().remove_if_empty().unwrap();
        assert!(directory.join("0-0.newer").exists());
        fs::rename(directory.join("0-0.newer"), directory.join(".0-0.newer")).unwrap();
        alone(&directory).unwrap().remove_if_empty().unwrap();
        assert!(!directory.exists());
    }

    #[test]
    fn no_record_is_lost_while_others_remove_the_directory() {
        let temporary = tempfile::tempdir().unwrap();
        let directory = temporary.path().join("7");
        let is_done = AtomicBool::new(false);
        let come_and_go = |container: &str| {
            let owner = Owner::new("net", container, "eth0");
            for round in 0..500 {
                State::open_at(&directory).unwrap().record(&owner, "bridge", &[]).unwrap();
                let state = State::open_at(&directory).unwrap();
                assert!(state.parts(&owner, "bridge").is_some(), "{container}: {round}");
                state.forget(&owner, "bridge").unwrap();
                state.close().unwrap();
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_done.load(Ordering::Relaxed) {
                    alone(&directory).into_iter().for_each(|state| state.remove_if_empty().unwrap());
                }
            });
            let threads = ["a", "b", "c"].map(|container| scope.spawn(move || come_and_go(container)));
            let ended = threads.map(|thread| thread.join());
            is_done.store(true, Ordering::Relaxed);
            assert!(ended.iter().all(Result::is_ok));
        });
        assert!(!directory.exists());
    }
}
