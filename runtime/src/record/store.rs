//! The files of the records.
//!
//! A record is written to a temporary file and renamed, so a reader sees the old one or the new one whole, whatever
//! kills the daemon. The disk's own cache is flushed behind the caller's back (one thread, the newest state of a file
//! only): a power cut ends every sandbox anyway, and a record that it tore is found by its checks at the next start,
//! together with what the sandbox left on disk. Waiting for the disk would cost milliseconds a step.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use oarlock_failpoint::step;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Paths waiting to be flushed; beyond it the newest are left to the kernel's own write-back.
const FLUSH_QUEUE_MAX: usize = 4096;

/// Reading or writing a record failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordError {
    #[error("cannot {operation} {}", path.display())]
    Io {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot encode {}", path.display())]
    Encode {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
}

/// Which records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Sandbox,
    Container,
}

impl Kind {
    fn directory(self) -> &'static str {
        match self {
            Kind::Sandbox => "sandboxes",
            Kind::Container => "containers",
        }
    }
}

/// The directory of records.
#[derive(Debug)]
pub(crate) struct Store {
    root: PathBuf,
    flush: SyncSender<PathBuf>,
}

impl Store {
    /// Opens or makes the directory.
    pub(crate) fn open(root: &Path) -> Result<Store, RecordError> {
        for kind in [Kind::Sandbox, Kind::Container] {
            let path = root.join(kind.directory());
            fs::create_dir_all(&path).map_err(|source| RecordError::Io { operation: "create", path, source })?;
        }
        let (flush, queue) = sync_channel(FLUSH_QUEUE_MAX);
        std::thread::Builder::new()
            .name("record-flush".to_owned())
            .spawn(move || flush_all(&queue))
            .map_err(|source| RecordError::Io { operation: "start a thread for", path: root.to_owned(), source })?;
        Ok(Store { root: root.to_owned(), flush })
    }

    /// Writes a record. Blocks for the file system's cache, not for the disk.
    pub(crate) fn write<T: Serialize>(&self, kind: Kind, id: &str, record: &T) -> Result<(), RecordError> {
        let path = self.path(kind, id);
        let bytes = serde_json::to_vec(record).map_err(|source| RecordError::Encode { path: path.clone(), source })?;
        let temporary = path.with_extension("tmp");
        step("before a record is written");
        let written = (|| {
            // Environments hold secrets.
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
            file.write_all(&bytes)?;
            step("a record's temporary file is written");
            fs::rename(&temporary, &path)
        })();
        if let Err(source) = written {
            let _ = fs::remove_file(&temporary);
            return Err(RecordError::Io { operation: "write", path, source });
        }
        let _ = self.flush.try_send(path);
        step("a record is written");
        Ok(())
    }

    /// Removes a record; one that is gone counts as removed.
    pub(crate) fn remove(&self, kind: Kind, id: &str) -> Result<(), RecordError> {
        let path = self.path(kind, id);
        step("before a record is removed");
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(RecordError::Io { operation: "remove", path, source })
            }
            _ => {
                step("a record is removed");
                Ok(())
            }
        }
    }

    /// All records that can be read. A torn one is put aside with the suffix `.broken` and reported; its sandbox is then
    /// unknown, and what it left is cleared away as such.
    pub(crate) fn load<T: DeserializeOwned>(&self, kind: Kind) -> Result<Vec<T>, RecordError> {
        let directory = self.root.join(kind.directory());
        let failed = |source| RecordError::Io { operation: "list", path: directory.clone(), source };
        let mut records = Vec::new();
        for entry in fs::read_dir(&directory).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            match path.extension().and_then(|extension| extension.to_str()) {
                Some("json") => {}
                Some("tmp") => {
                    let _ = fs::remove_file(&path);
                    continue;
                }
                _ => continue,
            }
            let bytes =
                fs::read(&path).map_err(|source| RecordError::Io { operation: "read", path: path.clone(), source })?;
            match serde_json::from_slice(&bytes) {
                Ok(record) => records.push(record),
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "record is damaged and put aside");
                    let _ = fs::rename(&path, path.with_extension("broken"));
                }
            }
        }
        Ok(records)
    }

    fn path(&self, kind: Kind, id: &str) -> PathBuf {
        self.root.join(kind.directory()).join(format!("{id}.json"))
    }
}

fn flush_all(queue: &Receiver<PathBuf>) {
    while let Ok(first) = queue.recv() {
        let mut paths = BTreeSet::from([first]);
        paths.extend(queue.try_iter());
        for path in paths {
            // Gone since: nothing to keep.
            if let Ok(file) = File::open(&path) {
                let _ = file.sync_data();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_survives_reopening_and_a_torn_one_is_put_aside() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        store.write(Kind::Sandbox, "a", &"first").unwrap();
        store.write(Kind::Sandbox, "a", &"second").unwrap();
        fs::write(directory.path().join("sandboxes/b.json"), b"{\"half").unwrap();
        fs::write(directory.path().join("sandboxes/c.tmp"), b"").unwrap();
        let reopened = Store::open(directory.path()).unwrap();
        assert_eq!(reopened.load::<String>(Kind::Sandbox).unwrap(), ["second"]);
        assert!(directory.path().join("sandboxes/b.broken").exists());
        assert!(!directory.path().join("sandboxes/c.tmp").exists());
        reopened.remove(Kind::Sandbox, "a").unwrap();
        reopened.remove(Kind::Sandbox, "a").unwrap();
        assert!(reopened.load::<String>(Kind::Sandbox).unwrap().is_empty());
    }

    #[test]
    fn nobody_else_may_read_a_record() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        store.write(Kind::Container, "a", &1).unwrap();
        let mode = fs::metadata(directory.path().join("containers/a.json")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
