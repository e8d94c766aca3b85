//! The files of a shim's state directory. Written by the shim (temporary file, fsync, rename), read by the daemon.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// How a container's first process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// The exit status, or 128 + signal.
    pub exit_code: i32,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// The kernel killed a process of the container for want of memory during its life.
    pub oom_killed: bool,
    /// Since the Unix epoch.
    pub finished_at_nanos: i64,
}

/// Who the shim is. A pid alone may have been given to another process since; pid and start time may not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShimRecord {
    pub sandbox_id: String,
    pub pid: i32,
    /// Field 22 of `/proc/PID/stat`: clock ticks after boot.
    pub start_time: u64,
    /// The first process of the pod's shared PID namespace, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid_namespace_init: Option<i32>,
}

impl ShimRecord {
    /// Whether that very process still runs (a zombie does not).
    pub fn is_alive(&self) -> bool {
        process_start_time(self.pid) == Some(self.start_time)
    }
}

/// Reading or writing a record failed.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file could not be read or written.
    #[error("cannot {operation} {}", path.display())]
    Io {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The file is not what this version writes.
    #[error("{} is damaged", path.display())]
    Damaged {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
}

/// `<state_dir>/shim.sock`
pub fn socket_path(state_dir: &Path) -> PathBuf {
    state_dir.join("shim.sock")
}

/// `<state_dir>/shim.json`
pub fn shim_record_path(state_dir: &Path) -> PathBuf {
    state_dir.join("shim.json")
}

/// `<state_dir>/containers/<id>`
pub fn container_dir(state_dir: &Path, container_id: &str) -> PathBuf {
    state_dir.join("containers").join(container_id)
}

/// `<state_dir>/containers/<id>/exit.json`
pub fn exit_record_path(state_dir: &Path, container_id: &str) -> PathBuf {
    container_dir(state_dir, container_id).join("exit.json")
}

/// The exit record of a container, if it has ended. Works without a living shim.
pub fn read_exit_record(state_dir: &Path, container_id: &str) -> Result<Option<ExitRecord>, RecordError> {
    read_json(&exit_record_path(state_dir, container_id))
}

/// The shim's own record, if one was ever written there.
pub fn read_shim_record(state_dir: &Path) -> Result<Option<ShimRecord>, RecordError> {
    read_json(&shim_record_path(state_dir))
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>, RecordError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(RecordError::Io { operation: "read", path: path.into(), source }),
    };
    let value = serde_json::from_slice(&bytes).map_err(|source| RecordError::Damaged { path: path.into(), source })?;
    Ok(Some(value))
}

/// Replaces a file so that a reader, even after a power cut, sees the old or the new content whole.
pub fn write_atomically(path: &Path, content: &[u8]) -> Result<(), RecordError> {
    let temporary = path.with_extension("tmp");
    let failed = |operation, source| RecordError::Io { operation, path: path.into(), source };
    let mut file = File::create(&temporary).map_err(|source| failed("create", source))?;
    file.write_all(content).and_then(|()| file.sync_all()).map_err(|source| failed("write", source))?;
    fs::rename(&temporary, path).map_err(|source| failed("rename", source))?;
    if let Some(parent) = path.parent() {
        File::open(parent).and_then(|dir| dir.sync_all()).map_err(|source| failed("sync directory of", source))?;
    }
    Ok(())
}

/// When a process started, in clock ticks after boot; None if it is gone or only a zombie is left.
pub fn process_start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let after_name = &stat[stat.rfind(')')? + 1..];
    let mut fields = after_name.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X" | "x") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_a_recycled_pid_is_not_alive() {
        let pid = std::process::id() as i32;
        let start_time = process_start_time(pid).expect("this process runs");
        let mut record = ShimRecord { sandbox_id: "s".into(), pid, start_time, pid_namespace_init: None };
        assert!(record.is_alive());
        record.start_time += 1;
        assert!(!record.is_alive());
    }

    #[test]
    fn a_missing_exit_record_is_none_and_a_damaged_one_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read_exit_record(dir.path(), "c").unwrap().is_none());
        let record = ExitRecord { exit_code: 137, signal: Some(9), oom_killed: true, finished_at_nanos: 5 };
        fs::create_dir_all(container_dir(dir.path(), "c")).unwrap();
        write_atomically(&exit_record_path(dir.path(), "c"), &serde_json::to_vec(&record).unwrap()).unwrap();
        assert_eq!(read_exit_record(dir.path(), "c").unwrap(), Some(record));
        fs::write(exit_record_path(dir.path(), "c"), b"{").unwrap();
        assert!(matches!(read_exit_record(dir.path(), "c"), Err(RecordError::Damaged { .. })));
    }
}
