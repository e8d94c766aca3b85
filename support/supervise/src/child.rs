//! One supervised child process: started, watched, started again with back-off, and ended by signal and deadline.
//!
//! ```text
//!            spawn                exit, not stopping
//!  Waiting ─────────▶ Running ───────────────────────▶ Waiting (back-off)
//!                        │ stop asked: SIGTERM, then SIGKILL after the grace period
//!                        ▼
//!                     Stopped
//! ```
#![allow(unsafe_code, reason = "pre_exec sets the parent-death signal and a process group between fork and exec")]

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How fast a child that keeps ending is started again.
#[derive(Clone, Copy, Debug)]
pub struct RestartPolicy {
    /// The delay before the first new start; doubled for each further one.
    pub initial: Duration,
    /// The longest delay.
    pub max: Duration,
    /// A child that lived this long starts again with the initial delay.
    pub reset_after: Duration,
    /// Between SIGTERM and SIGKILL when the child is stopped.
    pub grace: Duration,
    /// A child that ends with this code is not started again (64: bad configuration).
    pub fatal_exit_code: i32,
}

impl Default for RestartPolicy {
    fn default() -> Self {
        Self {
            initial: Duration::from_millis(50),
            max: Duration::from_secs(5),
            reset_after: Duration::from_secs(10),
            grace: Duration::from_secs(10),
            fatal_exit_code: 64,
        }
    }
}

/// What a child is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChildState {
    /// Not running; a start is due.
    Waiting,
    /// Running with this pid. `starts` counts from 1.
    Running { pid: u32, starts: u32 },
    /// Ended as asked.
    Stopped,
}

/// Why supervision gave up.
#[derive(Debug, thiserror::Error)]
pub enum ChildError {
    #[error("cannot start {name} ({program})")]
    Spawn {
        name: String,
        program: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot open the log of {name}")]
    Log {
        name: String,
        #[source]
        source: io::Error,
    },
    #[error("{name} refused its configuration (exit code {code}); its log {log} says why")]
    Configuration { name: String, code: i32, log: PathBuf },
    #[error("cannot wait for {name}")]
    Wait {
        name: String,
        #[source]
        source: io::Error,
    },
}

/// What to run and how.
#[derive(Clone, Debug)]
pub struct Child {
    pub name: String,
    pub program: PathBuf,
    pub arguments: Vec<OsString>,
    pub environment: Vec<(OsString, OsString)>,
    /// Standard output and error are appended to this file.
    pub log: PathBuf,
    pub policy: RestartPolicy,
}

impl Child {
    /// Runs the child until `shutdown`, telling `state` every change. Returns once it has ended as asked, or with the error
    /// that makes a further start pointless.
    pub async fn run(self, state: watch::Sender<ChildState>, shutdown: CancellationToken) -> Result<(), ChildError> {
        let mut starts = 0u32;
        let mut delay = self.policy.initial;
        while !shutdown.is_cancelled() {
            let mut process = self.spawn()?;
            starts += 1;
            let pid = process.id().unwrap_or_default();
            let started = Instant::now();
            state.send_replace(ChildState::Running { pid, starts });
            let status = tokio::select! {
                status = process.wait() => status.map_err(|source| ChildError::Wait { name: self.name.clone(), source })?,
                () = shutdown.cancelled() => {
                    self.stop(&mut process, pid).await;
                    break;
                }
            };
            if status.code() == Some(self.policy.fatal_exit_code) {
                return Err(ChildError::Configuration {
                    name: self.name,
                    code: self.policy.fatal_exit_code,
                    log: self.log,
                });
            }
            if started.elapsed() >= self.policy.reset_after {
                delay = self.policy.initial;
            }
            tracing::warn!(
                child = self.name,
                pid,
                code = status.code(),
                signal = status.signal(),
                delay_ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX),
                "child ended and will be started again"
            );
            state.send_replace(ChildState::Waiting);
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                () = shutdown.cancelled() => break,
            }
            delay = (delay * 2).min(self.policy.max);
        }
        state.send_replace(ChildState::Stopped);
        Ok(())
    }

    /// Starts the process in a group of its own (a terminal's Ctrl-C reaches the supervisor only) that ends with the
    /// supervisor.
    fn spawn(&self) -> Result<tokio::process::Child, ChildError> {
        let log_error = |source| ChildError::Log { name: self.name.clone(), source };
        let log = File::options().create(true).append(true).open(&self.log).map_err(log_error)?;
        let errors = log.try_clone().map_err(log_error)?;
        let mut command = tokio::process::Command::new(&self.program);
        command
            .args(&self.arguments)
            .envs(self.environment.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .process_group(0);
        // SAFETY: prctl is async-signal-safe and touches no memory of the parent.
        unsafe {
            command.pre_exec(|| nix::sys::prctl::set_pdeathsig(Signal::SIGTERM).map_err(io::Error::from));
        }
        command.spawn().map_err(|source| ChildError::Spawn {
            name: self.name.clone(),
            program: self.program.clone(),
            source,
        })
    }

    async fn stop(&self, process: &mut tokio::process::Child, pid: u32) {
        if let Ok(raw) = i32::try_from(pid)
            && raw > 0
        {
            let _ = kill(Pid::from_raw(raw), Signal::SIGTERM);
        }
        if tokio::time::timeout(self.policy.grace, process.wait()).await.is_err() {
            tracing::warn!(child = self.name, pid, "child ignored SIGTERM and is killed");
            let _ = process.start_kill();
            let _ = process.wait().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn child(directory: &std::path::Path, script: &str) -> Child {
        Child {
            name: "test".to_owned(),
            program: "/bin/sh".into(),
            arguments: vec!["-c".into(), script.into()],
            environment: Vec::new(),
            log: directory.join("log"),
            policy: RestartPolicy { initial: Duration::from_millis(1), ..RestartPolicy::default() },
        }
    }

    #[tokio::test]
    async fn a_killed_child_comes_back_and_ends_when_asked() {
        let directory = tempfile::tempdir().expect("tempdir");
        let (sender, mut state) = watch::channel(ChildState::Waiting);
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(child(directory.path(), "exec sleep 1000").run(sender, shutdown.clone()));
        let running = |wanted: u32| move |state: &ChildState| matches!(state, ChildState::Running { starts, .. } if *starts == wanted);
        let first = state.wait_for(running(1)).await.expect("state").clone();
        let ChildState::Running { pid, .. } = first else { unreachable!("wait_for said running") };
        kill(Pid::from_raw(i32::try_from(pid).expect("pid")), Signal::SIGKILL).expect("kill");
        state.wait_for(running(2)).await.expect("state");
        shutdown.cancel();
        task.await.expect("join").expect("a requested stop is no failure");
        assert_eq!(*state.borrow(), ChildState::Stopped);
    }

    #[tokio::test]
    async fn bad_configuration_is_not_tried_again() {
        let directory = tempfile::tempdir().expect("tempdir");
        let (sender, _state) = watch::channel(ChildState::Waiting);
        let error = child(directory.path(), "echo 'unknown field' >&2; exit 64")
            .run(sender, CancellationToken::new())
            .await
            .expect_err("exit code 64 is final");
        assert!(matches!(error, ChildError::Configuration { code: 64, .. }), "{error}");
        assert_eq!(std::fs::read_to_string(directory.path().join("log")).expect("log"), "unknown field\n");
    }
}
