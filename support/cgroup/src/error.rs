//! What can go wrong with a control group.

use std::io;
use std::path::PathBuf;

use nix::errno::Errno;

/// A failed operation on a control group.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// No cgroup file system is mounted where it belongs.
    #[error("no cgroup file system is mounted at {}", root.display())]
    NotMounted { root: PathBuf },
    /// The path would leave the cgroup mount.
    #[error("cgroup path {path:?} is not a plain relative path")]
    BadPath { path: String },
    /// A cgroup file or directory could not be used.
    #[error("cannot {operation} {}", path.display())]
    Io {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A limit was refused by the kernel.
    #[error("cannot write {value:?} to {}", path.display())]
    Limit {
        path: PathBuf,
        value: String,
        #[source]
        source: io::Error,
    },
    /// A limit that this host has no controller for.
    #[error("this host has no {controller} cgroup controller")]
    NoController { controller: &'static str },
    /// Processes that were told to die are still there.
    #[error("{} processes of cgroup {path} did not end", pids.len())]
    StillRunning { path: String, pids: Vec<i32> },
}

impl CgroupError {
    /// The system error number behind it, if there is one.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            CgroupError::Io { source, .. } | CgroupError::Limit { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }

    /// The group went away meanwhile: its files answer ENOENT or ENODEV.
    pub fn is_gone(&self) -> bool {
        let gone = [Errno::ENOENT, Errno::ENODEV].map(|errno| errno as i32);
        self.raw_os_error().is_some_and(|code| gone.contains(&code))
    }
}
