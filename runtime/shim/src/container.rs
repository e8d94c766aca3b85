//! One container as its shim knows it. The life of a container:
//!
//! ```text
//!            helper done          start             freezer
//! Creating ──────────────▶ Created ─────▶ Running ◀────────▶ Paused
//!    │ failed: removed        │              │                  │
//!    ▼                        ▼  first process ended            ▼
//!  (gone)                  Stopped ◀─────────┴──────────────────┘
//!                             │ delete
//!                             ▼
//!                           (gone)
//! ```

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Instant;

use nix::unistd::Pid;
use oarlock_cgroup::OomWatch;
use oarlock_shim_api::{ContainerState, ContainerStatus, ErrorKind, ExitRecord, RemoteError};

use crate::server::ReplyTo;
use crate::stdio::Stdio;

/// Where it is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    Creating,
    Created,
    Running,
    Paused,
    Stopped,
}

#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) status: Status,
    pub(crate) first: Option<Process>,
    pub(crate) exit: Option<ExitRecord>,
    pub(crate) stdio: Stdio,
    pub(crate) oom: Option<OomWatch>,
    pub(crate) cgroup: Option<String>,
    pub(crate) private_pid_namespace: bool,
    pub(crate) start_hooks: bool,
    pub(crate) oci_runtime: Option<PathBuf>,
    pub(crate) execs: Vec<Exec>,
    /// A helper works on it.
    pub(crate) busy: bool,
    /// Removed but for its first process, which is still to be reaped.
    pub(crate) removed: bool,
    /// Who waits for it to be gone. A call that finds another one at work joins it, or follows it.
    pub(crate) removers: Vec<ReplyTo>,
    /// Its first process has ended; announced when the log is on disk, or then at the latest.
    pub(crate) ended: Option<Ended>,
    /// Answered when the log has been opened anew, in this order.
    pub(crate) reopening: VecDeque<ReplyTo>,
}

/// How a first process ended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ended {
    pub(crate) exit_code: i32,
    pub(crate) signal: Option<i32>,
    pub(crate) at_nanos: i64,
    pub(crate) deadline: Instant,
}

/// A child of the shim, with a handle that outlasts its number.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: Pid,
    pub(crate) handle: OwnedFd,
}

/// A process run in a container beside its first.
#[derive(Debug)]
pub(crate) struct Exec {
    pub(crate) id: String,
    /// None while its helper is at work.
    pub(crate) process: Option<Process>,
    pub(crate) terminal: Option<OwnedFd>,
}

impl Container {
    /// Refuses while a helper works on it.
    pub(crate) fn check_idle(&self) -> Result<(), RemoteError> {
        if !self.busy && !self.removed {
            return Ok(());
        }
        let message = format!("another operation on container {} is under way", self.id);
        Err(RemoteError::new(ErrorKind::InvalidState, message))
    }

    /// Refuses unless it is in one of these states.
    pub(crate) fn check_status(&self, wanted: &[Status]) -> Result<(), RemoteError> {
        if wanted.contains(&self.status) {
            return Ok(());
        }
        let message = format!("container {} is {}", self.id, self.status.name());
        Err(RemoteError::new(ErrorKind::InvalidState, message))
    }

    pub(crate) fn state(&self) -> Option<ContainerState> {
        let status = match self.status {
            Status::Creating => return None,
            Status::Created => ContainerStatus::Created,
            Status::Running => ContainerStatus::Running,
            Status::Paused => ContainerStatus::Paused,
            Status::Stopped => ContainerStatus::Stopped,
        };
        let pid = self.first.as_ref().map_or(0, |process| process.pid.as_raw());
        Some(ContainerState { id: self.id.clone(), pid, status, exit: self.exit })
    }
}

impl Status {
    fn name(self) -> &'static str {
        match self {
            Status::Creating => "being created",
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Stopped => "stopped",
        }
    }
}
