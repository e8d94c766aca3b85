//! Starting a shim so that it outlives the daemon: the shim detaches itself (its own session, adopted by init), and
//! reports over a pipe once it listens.
#![allow(unsafe_code, reason = "descriptors are registered with tokio")]

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::fcntl::OFlag;
use tokio::io::unix::AsyncFd;

use crate::{ShimError, read_shim_record};

const READY_LIMIT: Duration = Duration::from_secs(20);

/// How to start a pod's shim.
#[derive(Debug, Clone)]
pub struct SpawnOptions {
    /// The `oarlock-shim` binary.
    pub shim_binary: PathBuf,
    /// Names the pod in the process list.
    pub sandbox_id: String,
    /// Per pod, made if missing: `shim.sock`, `shim.json`, `shim.log`, `containers/<id>/exit.json`.
    pub state_dir: PathBuf,
    /// Where the container engine keeps its state; may be shared by all pods.
    pub container_root: PathBuf,
    /// A mount point below which all pods' mounts lie, two levels down: containers are made without sight of others'.
    pub mounts_below: Option<PathBuf>,
    /// Make one PID namespace for the whole pod and pin it at this path (a file that is created).
    pub shared_pid_namespace: Option<PathBuf>,
    /// The pod's user namespace, to which a shared PID namespace then belongs.
    pub user_namespace: Option<PathBuf>,
    /// The shim's own cgroup, relative to the cgroup root, such as `oarlock/shims`; created if missing. In the form
    /// `slice:prefix:name` it is a systemd scope, shared with the shims that are in it.
    pub cgroup: Option<String>,
}

/// Runs the binary and waits until it says that it listens.
pub(crate) async fn launch(options: &SpawnOptions) -> Result<(), ShimError> {
    if let Some(record) = read_shim_record(&options.state_dir).map_err(ShimError::Record)?
        && record.is_alive()
    {
        return Err(ShimError::AlreadyRunning { state_dir: options.state_dir.clone(), pid: record.pid });
    }
    std::fs::create_dir_all(&options.state_dir)
        .map_err(|source| ShimError::Io { operation: "create the shim's state directory", source })?;
    let (ready, ready_writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
        .map_err(|errno| ShimError::Io { operation: "make a pipe", source: errno.into() })?;
    let mut child = command(options, ready_writer)
        .spawn()
        .map_err(|source| ShimError::Spawn { binary: options.shim_binary.clone(), source })?;
    let report = tokio::time::timeout(READY_LIMIT, read_report(ready)).await;
    if report.is_err() {
        let _ = child.start_kill();
    }
    // The first process only forks the real shim and ends at once.
    let _ = tokio::time::timeout(READY_LIMIT, child.wait()).await;
    match report {
        Err(_) => Err(ShimError::TimedOut { operation: "start-up", limit: READY_LIMIT }),
        Ok(Err(source)) => Err(ShimError::Io { operation: "read the shim's report", source }),
        Ok(Ok(text)) if text == "ready" => Ok(()),
        Ok(Ok(text)) if text.is_empty() => Err(ShimError::Startup { message: last_log_line(&options.state_dir) }),
        Ok(Ok(message)) => Err(ShimError::Startup { message }),
    }
}

/// The shim reports on its standard output, and closes itself what it inherits beyond that: so nothing has to run between fork and exec, and
/// the daemon's memory need not be copied for it.
fn command(options: &SpawnOptions, ready: OwnedFd) -> tokio::process::Command {
    let mut command = tokio::process::Command::new(&options.shim_binary);
    command.arg("--sandbox-id").arg(&options.sandbox_id);
    command.arg("--state-dir").arg(&options.state_dir);
    command.arg("--container-root").arg(&options.container_root);
    if let Some(path) = &options.mounts_below {
        command.arg("--mounts-below").arg(path);
    }
    if let Some(path) = &options.shared_pid_namespace {
        command.arg("--pid-namespace").arg(path);
    }
    if let Some(path) = &options.user_namespace {
        command.arg("--user-namespace").arg(path);
    }
    if let Some(cgroup) = &options.cgroup {
        command.arg("--cgroup").arg(cgroup);
    }
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into()));
    command.stdin(Stdio::null()).stdout(Stdio::from(ready)).stderr(Stdio::null());
    command
}

/// Lets the current tokio runtime watch a descriptor.
pub(crate) fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd keeps its number and stays open for as long as the AsyncFd owns it.
    unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)
}

async fn read_report(ready: OwnedFd) -> io::Result<String> {
    let ready = watch(ready)?;
    let mut text = Vec::new();
    let mut buffer = [0; 512];
    loop {
        let mut guard = ready.readable().await?;
        match guard.try_io(|fd| nix::unistd::read(fd.get_ref(), &mut buffer).map_err(io::Error::from)) {
            Ok(Ok(0)) => return Ok(String::from_utf8_lossy(&text).into_owned()),
            Ok(Ok(count)) => text.extend_from_slice(&buffer[..count]),
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(error)) => return Err(error),
            Err(_not_ready) => {}
        }
    }
}

fn last_log_line(state_dir: &Path) -> String {
    std::fs::read_to_string(state_dir.join("shim.log"))
        .ok()
        .and_then(|log| log.lines().last().map(str::to_owned))
        .unwrap_or_else(|| "it ended without a report".into())
}
