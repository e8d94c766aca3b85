//! Other OCI runtimes (crun, runc) by their command line, and hooks: programs run in a helper child.
//!
//! They make, start and delete; everything else is the shim's own as for the built-in engine: execs, signals, freezing,
//! limits, statistics and the watch for lack of memory go by process handles and cgroups.
#![allow(unsafe_code, reason = "a runtime that outlives its helper is killed with it")]

use std::ffi::{CStr, CString};
use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::libc;
use nix::mount::{MntFlags, MsFlags};
use nix::sched::CloneFlags;
use nix::sys::stat::Mode;
use oarlock_cgroup::{Cgroup, Layout};
use oarlock_shim_api::{ErrorKind, RemoteError};
use oci_spec::runtime::{Hook, Spec};

use super::create::{CreateJob, listen, receive_master};
use super::{adapted_bundle, failed, io_failed};
use crate::forked::{Finished, Report};

const HOOK_LIMIT: Duration = Duration::from_secs(30);
/// Nothing in our specifications is younger, and releases still in use refuse what they do not know.
const VERSION: &str = "1.0.2";
const POLL: Duration = Duration::from_millis(5);

/// An OCI runtime binary with its state directory.
pub(crate) struct External {
    pub(crate) binary: PathBuf,
    pub(crate) root: PathBuf,
    /// A mount that it is not to see.
    hidden: Option<CString>,
}

impl External {
    /// State of other runtimes is kept apart from the built-in engine's.
    pub(crate) fn new(binary: &Path, container_root: &Path) -> External {
        let name = binary.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let root = container_root.join(format!(".{name}"));
        External { binary: binary.into(), root, hidden: unified_beside_version_1() }
    }

    fn command(&self, log: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        let hidden = self.hidden.clone();
        // SAFETY: system calls on memory that was ready before the fork. What the runtime leaves behind does not inherit
        // the signal.
        unsafe {
            command.pre_exec(move || {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
                hidden.as_deref().map_or(Ok(()), hide)
            });
        }
        command.arg("--root").arg(&self.root).arg("--log").arg(log).args(["--log-format", "json"]).args(arguments);
        command.stdin(Stdio::null());
        command
    }

    /// `create`: the runtime leaves the container's first process behind, which the shim adopts.
    pub(crate) fn create(mut self, job: CreateJob) -> Finished {
        let directory = adapted_bundle(&job.state_dir, &job.container_id);
        let mut spec =
            Spec::load(job.bundle.join("config.json")).map_err(|error| failed("load config.json", &error))?;
        let place = super::adapt::locate(&mut spec, &job.bundle, &job.container_id)
            .map_err(|error| RemoteError::new(ErrorKind::Invalid, super::chain(&error)))?;
        if let Some(scope) = &place.scope {
            leave_to_systemd(&mut spec, scope);
        }
        // Its mounts are to reach the host, so it has to see the host's.
        if spec.linux().as_ref().and_then(|linux| linux.rootfs_propagation().as_deref()) == Some("shared") {
            self.hidden = None;
        }
        let private_pid_namespace = super::adapt::has_private_pids(&spec);
        spec.set_version(VERSION.to_owned());
        spec.save(directory.join("config.json")).map_err(|error| failed("save the specification", &error))?;
        let own = std::process::id() as i32;
        if place.scope.is_none() {
            // Bound into the container before the runtime may have made them; and in hierarchies that it does not know.
            let group = Cgroup::new(&place.cgroup).map_err(|error| failed("name the cgroup", &error))?;
            group.create().map_err(|error| failed("create the cgroup", &error))?;
            group.attach_without_controllers(own).map_err(|error| failed("join the cgroup", &error))?;
        }
        super::create::own_streams(&job.ends, &spec);
        let (log, pid_file) = (directory.join("runtime.log"), directory.join("pid"));
        let by_systemd: &[&str] = if place.scope.is_some() { &["--systemd-cgroup"] } else { &[] };
        let mut command = self.command(&log, &[by_systemd, &["create", "--bundle"]].concat());
        command.arg(&directory).arg("--pid-file").arg(&pid_file);
        let console = if job.terminal { Some(listen(&directory)?) } else { None };
        let opened = fs::File::open(&directory).map_err(io_failed("open the container's directory"))?;
        if console.is_some() {
            // A socket address holds 107 bytes, the path may be longer.
            command.arg("--console-socket").arg(format!("/proc/{own}/fd/{}/console.sock", opened.as_raw_fd()));
        }
        command.arg(&job.container_id);
        command.stdin(job.ends.stdin.map_or_else(Stdio::null, Stdio::from));
        command.stdout(job.ends.stdout.map_or_else(Stdio::null, Stdio::from));
        command.stderr(job.ends.stderr.map_or_else(Stdio::null, Stdio::from));
        // The program inherits it where the specification names none.
        nix::sys::stat::umask(Mode::from_bits_truncate(0o022));
        run(command, "create", &log)?;
        let text = fs::read_to_string(&pid_file).map_err(io_failed("read the container's pid"))?;
        let pid = text.trim().parse().map_err(|error| failed("read the container's pid", &error))?;
        let fds = console.map(|console| receive_master(&console)).transpose()?.into_iter().collect();
        Ok((Report { pid, cgroup: Some(place.cgroup), private_pid_namespace, start_hooks: true, secluded: false }, fds))
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

/// The version 2 hierarchy of a host that has both and gives it controllers: crun refuses such a host, though all that our
/// containers use is on version 1.
fn unified_beside_version_1() -> Option<CString> {
    let layout = Layout::host().ok().filter(|layout| !layout.is_v2())?;
    let has_controllers =
        |path: &&PathBuf| fs::read_to_string(path.join("cgroup.controllers")).is_ok_and(|list| !list.trim().is_empty());
    CString::new(layout.hierarchies().iter().find(has_controllers)?.as_os_str().as_encoded_bytes()).ok()
}

/// Takes a mount out of this process's sight, and nobody else's.
fn hide(mount: &CStr) -> std::io::Result<()> {
    nix::sched::unshare(CloneFlags::CLONE_NEWNS)?;
    nix::mount::mount(None::<&CStr>, c"/", None::<&CStr>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&CStr>)?;
    Ok(nix::mount::umount2(mount, MntFlags::MNT_DETACH)?)
}

/// The runtime makes the scope. crun would put a group of its own into it, and execs of ours beside that group; the kernel
/// takes processes on one of both levels only.
fn leave_to_systemd(spec: &mut Spec, scope: &str) {
    if let Some(mut linux) = spec.linux().clone() {
        linux.set_cgroups_path(Some(scope.into()));
        spec.set_linux(Some(linux));
    }
    let mut annotations = spec.annotations().clone().unwrap_or_default();
    annotations.insert("run.oci.systemd.subgroup".to_owned(), String::new());
    spec.set_annotations(Some(annotations));
}

fn run(mut command: Command, verb: &str, log: &Path) -> Result<(), RemoteError> {
    let status = command.status().map_err(io_failed("run the OCI runtime"))?;
    if status.success() {
        return Ok(());
    }
    let message = last_message(log).unwrap_or_else(|| status.to_string());
    Err(RemoteError::new(kind_of(&message), format!("OCI runtime {verb} failed: {message}")))
}

/// What runc and crun say of a program that cannot be run.
fn kind_of(message: &str) -> ErrorKind {
    let message = message.to_ascii_lowercase();
    let of_program = message.contains("exec") || message.contains("$path");
    if of_program && (message.contains("not found") || message.contains("no such file or directory")) {
        ErrorKind::ExecutableNotFound
    } else if of_program && (message.contains("permission denied") || message.contains("is a directory")) {
        ErrorKind::NotExecutable
    } else {
        ErrorKind::Engine
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_other_runtimes_say_of_programs_is_understood() {
        let missing =
            r#"runc create failed: unable to start container process: exec: "x": executable file not found in $PATH"#;
        assert_eq!(kind_of(missing), ErrorKind::ExecutableNotFound);
        assert_eq!(
            kind_of("executable file `x` not found in $PATH: No such file or directory"),
            ErrorKind::ExecutableNotFound
        );
        assert_eq!(
            kind_of("unable to start container process: exec: \"/x\": permission denied"),
            ErrorKind::NotExecutable
        );
        assert_eq!(kind_of("mount `/a` to `b`: No such file or directory"), ErrorKind::Engine);
    }
}
