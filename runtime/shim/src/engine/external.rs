//! Other OCI runtimes (crun, runc) by their command line, and hooks: programs run in a helper child.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use oarlock_shim_api::{ErrorKind, RemoteError};
use oci_spec::runtime::{Hook, Spec};

use super::create::{CreateJob, listen, receive_master};
use super::{adapted_bundle, failed, io_failed};
use crate::forked::{Finished, Report};

const HOOK_LIMIT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(5);

/// An OCI runtime binary with its state directory.
pub(crate) struct External {
    pub(crate) binary: PathBuf,
    pub(crate) root: PathBuf,
}

impl External {
    /// State of other runtimes is kept apart from the built-in engine's.
    pub(crate) fn new(binary: &Path, container_root: &Path) -> External {
        let name = binary.file_name().unwrap_or_default().to_string_lossy().into_owned();
        External { binary: binary.into(), root: container_root.join(format!(".{name}")) }
    }

    fn command(&self, log: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.arg("--root").arg(&self.root).arg("--log").arg(log).args(["--log-format", "json"]).args(arguments);
        command.stdin(Stdio::null());
        command
    }

    /// `create`: the runtime leaves the container's first process behind, which the shim adopts.
    pub(crate) fn create(&self, job: CreateJob) -> Finished {
        let directory = adapted_bundle(&job.state_dir, &job.container_id);
        let mut spec =
            Spec::load(job.bundle.join("config.json")).map_err(|error| failed("load config.json", &error))?;
        let cgroup = super::adapt::locate(&mut spec, &job.bundle, &job.container_id)
            .map_err(|error| RemoteError::new(ErrorKind::Invalid, super::chain(&error)))?;
        spec.save(directory.join("config.json")).map_err(|error| failed("save the specification", &error))?;
        let (log, pid_file) = (directory.join("runtime.log"), directory.join("pid"));
        let mut command = self.command(&log, &["create", "--bundle"]);
        command.arg(&directory).arg("--pid-file").arg(&pid_file);
        let console = if job.terminal { Some(listen(&directory)?) } else { None };
        if console.is_some() {
            command.arg("--console-socket").arg(directory.join("console.sock"));
        }
        command.arg(&job.container_id);
        command.stdin(job.ends.stdin.map_or_else(Stdio::null, Stdio::from));
        command.stdout(job.ends.stdout.map_or_else(Stdio::null, Stdio::from));
        command.stderr(job.ends.stderr.map_or_else(Stdio::null, Stdio::from));
        run(command, "create", &log)?;
        let text = fs::read_to_string(&pid_file).map_err(io_failed("read the container's pid"))?;
        let pid = text.trim().parse().map_err(|error| failed("read the container's pid", &error))?;
        let fds = console.map(|console| receive_master(&console)).transpose()?.into_iter().collect();
        Ok((Report { pid, cgroup: Some(cgroup), private_pid_namespace: true, start_hooks: true }, fds))
    }

    /// A command that takes only the container's id, such as `start`, `pause` and `resume`.
    pub(crate) fn simple(&self, verb: &str, state_dir: &Path, container_id: &str) -> Finished {
        let log = adapted_bundle(state_dir, container_id).join("runtime.log");
        let mut command = self.command(&log, &[verb, container_id]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        run(command, verb, &log)?;
        Ok(Default::default())
    }

    /// `delete --force`, where the runtime still knows the container.
    pub(crate) fn delete(&self, state_dir: &Path, container_id: &str) -> Result<(), RemoteError> {
        if !self.root.join(container_id).exists() {
            let _ = fs::remove_dir(&self.root);
            return Ok(());
        }
        let log = adapted_bundle(state_dir, container_id).join("runtime.log");
        let mut command = self.command(&log, &["delete", "--force", container_id]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let deleted = run(command, "delete", &log);
        // Only when it was the last one.
        let _ = fs::remove_dir(&self.root);
        deleted
    }
}

fn run(mut command: Command, verb: &str, log: &Path) -> Result<(), RemoteError> {
    let status = command.status().map_err(io_failed("run the OCI runtime"))?;
    if status.success() {
        return Ok(());
    }
    let message = last_message(log).unwrap_or_else(|| status.to_string());
    let kind = if message.contains("executable file not found") || message.contains("no such file or directory") {
        ErrorKind::ExecutableNotFound
    } else {
        ErrorKind::Engine
    };
    Err(RemoteError::new(kind, format!("OCI runtime {verb} failed: {message}")))
}

/// The last error in a log of JSON lines.
fn last_message(log: &Path) -> Option<String> {
    let text = fs::read_to_string(log).ok()?;
    let line: serde_json::Value = serde_json::from_str(text.lines().last()?).ok()?;
    Some(line.get("msg")?.as_str()?.to_owned())
}

/// Runs a hook with the container's state on its standard input.
pub(super) fn run_hook(hook: &Hook, state: &[u8]) -> Result<(), RemoteError> {
    let arguments = hook.args().clone().unwrap_or_default();
    let mut command = Command::new(hook.path());
    command.args(arguments.iter().skip(1)).env_clear();
    for (name, value) in hook.env().iter().flatten().filter_map(|entry| entry.split_once('=')) {
        command.env(name, value);
    }
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(io_failed("run a hook"))?;
    if let Some(mut stdin) = child.stdin.take() {
        let _ = stdin.write_all(state);
    }
    let limit = hook.timeout().and_then(|seconds| u64::try_from(seconds).ok()).map_or(HOOK_LIMIT, Duration::from_secs);
    wait_hook(child, limit)
}

fn wait_hook(mut child: Child, limit: Duration) -> Result<(), RemoteError> {
    let deadline = Instant::now() + limit;
    let status = loop {
        match child.try_wait().map_err(io_failed("wait for a hook"))? {
            Some(status) => break status,
            None if Instant::now() > deadline => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(RemoteError::new(ErrorKind::TimedOut, "a hook took too long"));
            }
            None => std::thread::sleep(POLL),
        }
    };
    if status.success() {
        return Ok(());
    }
    let mut text = String::new();
    if let Some(stderr) = child.stderr.take() {
        let _ = stderr.take(1024).read_to_string(&mut text);
    }
    Err(RemoteError::new(ErrorKind::Engine, format!("a hook failed ({status}): {}", text.trim())))
}
