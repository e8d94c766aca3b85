//! The mount ledger of one pod: every mount point is written down before anything is mounted on it.
//!
//! One JSON line a record, appended and synced; a torn last line (a crash while writing) is not an error, since nothing was
//! mounted for it yet. Paths are relative to the pod's directory.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::layout::is_contained;

#[derive(Serialize, Deserialize)]
struct Record {
    mount: PathBuf,
}

/// Reads the ledger; an absent one is empty.
pub(crate) fn read(path: &Path) -> io::Result<Vec<PathBuf>> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut mounts: Vec<PathBuf> = Vec::new();
    for line in text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let Ok(record) = serde_json::from_slice::<Record>(line) else { continue };
        if is_contained(&record.mount) && !mounts.contains(&record.mount) {
            mounts.push(record.mount);
        }
    }
    Ok(mounts)
}

/// Notes the intent to mount at `mount`; does nothing when that is noted already.
pub(crate) fn note(path: &Path, mount: &Path) -> io::Result<()> {
    if read(path)?.iter().any(|noted| noted == mount) {
        return Ok(());
    }
    let mut line = serde_json::to_vec(&Record { mount: mount.to_path_buf() })?;
    // A leading newline ends a line that an earlier crash may have torn.
    line.insert(0, b'\n');
    line.push(b'\n');
    let mut file: File =
        OpenOptions::new().create(true).append(true).mode(0o600).custom_flags(libc::O_NOFOLLOW).open(path)?;
    file.write_all(&line)?;
    file.sync_data()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_noted_is_read_back_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        assert!(read(&path).unwrap().is_empty());
        note(&path, Path::new("volumes/a")).unwrap();
        note(&path, Path::new("volumes/b")).unwrap();
        note(&path, Path::new("volumes/a")).unwrap();
        assert_eq!(read(&path).unwrap(), [PathBuf::from("volumes/a"), PathBuf::from("volumes/b")]);
    }

    #[test]
    fn a_torn_line_loses_only_itself() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        note(&path, Path::new("a")).unwrap();
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"mount\":\"b").unwrap();
        note(&path, Path::new("c")).unwrap();
        assert_eq!(read(&path).unwrap(), [PathBuf::from("a"), PathBuf::from("c")]);
    }

    #[test]
    fn paths_that_climb_out_are_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        std::fs::write(&path, "{\"mount\":\"../../etc\"}\n{\"mount\":\"/etc\"}\n{\"mount\":\"ok\"}\n").unwrap();
        assert_eq!(read(&path).unwrap(), [PathBuf::from("ok")]);
    }
}
