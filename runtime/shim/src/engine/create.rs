//! Creating a container with libcontainer, in a helper child.
//!
//! libcontainer may only be called in a process of one thread, and changes that process (oom score, dumpable, working
//! directory): a fresh child for each call is both. The child leaves behind the container's first process, waiting on
//! the notify socket and adopted by the shim when the child ends.
#![allow(unsafe_code, reason = "session keyring and oom score need raw calls")]

use std::fs;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use libcontainer::container::Container;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use nix::libc;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, fchown};
use oarlock_cgroup::{Cgroup, Layout};
use oarlock_shim_api::{ErrorKind, RemoteError};
use oci_spec::runtime::{LinuxIdMapping, Spec};

use super::adapt::{self, Facts};
use super::executor::{Confinement, NOT_EXECUTABLE_MARK, NOT_FOUND_MARK, Program};
use super::{adapted_bundle, chain, failed, io_failed, propagation, scope, seclude};
use crate::forked::{Finished, Report};
use crate::seccomp;
use crate::stdio::ContainerEnds;

/// What to create.
pub(crate) struct CreateJob {
    pub(crate) container_id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) state_dir: PathBuf,
    pub(crate) container_root: PathBuf,
    /// All pods' mounts lie below this mount point.
    pub(crate) mounts_below: Option<PathBuf>,
    pub(crate) terminal: bool,
    pub(crate) ends: ContainerEnds,
}

/// Makes the container up to the point where it waits for its start.
pub(crate) fn create(job: CreateJob) -> Finished {
    let layout = Layout::host().map_err(|error| failed("look at the cgroup mounts", &error))?;
    let mut spec = Spec::load(job.bundle.join("config.json"))
        .map_err(|error| RemoteError::new(ErrorKind::Invalid, format!("cannot load config.json: {}", chain(&error))))?;
    let facts = adapt::adapt(&mut spec, &job.bundle, &job.container_id, layout)
        .map_err(|error| RemoteError::new(ErrorKind::Invalid, chain(&error)))?;
    if facts.terminal != job.terminal {
        return Err(RemoteError::new(ErrorKind::Invalid, "process.terminal and the request disagree"));
    }
    let adapted = adapted_bundle(&job.state_dir, &job.container_id);
    let program = confine(&mut spec, &job.container_root, &adapted)?;
    spec.save(adapted.join("config.json")).map_err(|error| failed("save the specification", &error))?;

    // Before this process takes on what the container inherits.
    let scope = scope::start(&facts.place, &job.container_id, &spec)?;
    prepare_process(layout, &facts, &job.container_id)?;
    confine_devices(layout, &facts.place.cgroup, &spec)?;
    own_streams(&job.ends, &spec);
    let console = if job.terminal { Some(listen(&adapted)?) } else { None };
    let secluded = match &job.mounts_below {
        Some(point) => seclude::from_other_pods(point, &job.bundle, &spec)
            .map_err(io_failed("leave the host's mount namespace"))?,
        None => false,
    };
    let container = build(job, &adapted, program)?;
    let pid = container
        .pid()
        .map(|pid| pid.as_raw())
        .ok_or_else(|| RemoteError::new(ErrorKind::Engine, "the container has no process"))?;
    // The container's first process is in it now.
    drop(scope);
    let mut fds = Vec::new();
    if let Some(console) = console {
        fds.push(receive_master(&console)?);
        let _ = fs::remove_file(adapted.join("console.sock"));
    }
    propagation::apply(&spec, pid)?;
    let report = Report {
        pid,
        cgroup: Some(facts.place.cgroup),
        private_pid_namespace: facts.private_pid_namespace,
        start_hooks: facts.start_hooks,
        secluded,
    };
    Ok((report, fds))
}

/// What the container inherits from this process.
fn prepare_process(layout: &Layout, facts: &Facts, container_id: &str) -> Result<(), RemoteError> {
    let cgroup = Cgroup::with_layout(layout, &facts.place.cgroup).map_err(|error| failed("name the cgroup", &error))?;
    cgroup.create().map_err(|error| failed("create the cgroup", &error))?;
    // The engine moves processes only in hierarchies with controllers.
    cgroup.attach_without_controllers(std::process::id() as i32).map_err(|error| failed("join the cgroup", &error))?;
    // Shims are protected from the OOM killer, containers are not. Going below one's own score takes a capability that
    // even root may lack: the score then stays.
    let score = facts.oom_score.unwrap_or(0);
    if fs::write("/proc/self/oom_score_adj", score.to_string()).is_err() && score > 0 {
        return Err(RemoteError::new(ErrorKind::Engine, format!("cannot set oom_score_adj to {score}")));
    }
    join_session_keyring(container_id);
    nix::sys::stat::umask(Mode::from_bits_truncate(0o022));
    Ok(())
}

/// On version 1 the engine does it.
fn confine_devices(layout: &Layout, cgroup: &str, spec: &Spec) -> Result<(), RemoteError> {
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let rules = resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
    if !layout.is_v2() || rules.is_empty() {
        return Ok(());
    }
    let root = layout.hierarchies().first().map(|mount| mount.join(cgroup));
    let directory = root.ok_or_else(|| RemoteError::new(ErrorKind::Engine, "no cgroup hierarchy"))?;
    super::devices::confine(&directory, rules).map_err(io_failed("restrict the use of devices"))
}

/// Keys of one container are not another's. Kernels without keyrings, or at their quota, do without.
fn join_session_keyring(container_id: &str) {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_long = 1;
    if let Ok(name) = std::ffi::CString::new(format!("_ses.{container_id}")) {
        // SAFETY: the name is a C string that lives over the call.
        unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr()) };
    }
}

/// A program that does not run as root can open `/dev/stdout` only if the pipe is its own.
pub(super) fn own_streams(ends: &ContainerEnds, spec: &Spec) {
    let Some(user) = spec.process().as_ref().map(oci_spec::runtime::Process::user) else { return };
    let (uid, gid) = (user.uid(), user.gid());
    let linux = spec.linux().as_ref();
    let uid = on_host(uid, linux.and_then(|linux| linux.uid_mappings().as_deref()).unwrap_or_default());
    let gid = on_host(gid, linux.and_then(|linux| linux.gid_mappings().as_deref()).unwrap_or_default());
    for end in [&ends.stdin, &ends.stdout, &ends.stderr].into_iter().flatten() {
        let _ = fchown(end, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
    }
}

/// Takes the filter, and the capabilities that go with it, out of the engine's hands.
fn confine(spec: &mut Spec, container_root: &Path, directory: &Path) -> Result<Program, RemoteError> {
    let filter = seccomp::for_container(container_root, directory, spec)
        .map_err(|error| failed("prepare the seccomp filter", &error))?;
    let (Some(filter), Some(mut process)) = (filter, spec.process().clone()) else { return Ok(Program::default()) };
    let capabilities = process.capabilities().clone();
    let no_new_privileges = process.no_new_privileges() == Some(true);
    process.set_capabilities(None);
    spec.set_process(Some(process));
    if let Some(mut linux) = spec.linux().clone() {
        linux.set_seccomp(None);
        spec.set_linux(Some(linux));
    }
    Ok(Program(Some(Rc::new(Confinement { filter, capabilities, no_new_privileges }))))
}

/// An identity of the container as the host knows it; without a mapping they are the same.
fn on_host(id: u32, mappings: &[LinuxIdMapping]) -> u32 {
    let holds =
        |mapping: &&LinuxIdMapping| id >= mapping.container_id() && id - mapping.container_id() < mapping.size();
    mappings.iter().find(holds).map_or(id, |mapping| mapping.host_id().saturating_add(id - mapping.container_id()))
}

fn build(job: CreateJob, adapted: &Path, program: Program) -> Result<Container, RemoteError> {
    let null = || fs::OpenOptions::new().read(true).write(true).open("/dev/null").map(OwnedFd::from);
    let engine = |error: libcontainer::error::LibcontainerError| translate(&chain(&error));
    let mut builder = ContainerBuilder::new(job.container_id, SyscallType::default())
        .validate_id()
        .map_err(engine)?
        .with_root_path(job.container_root)
        .map_err(engine)?
        .with_executor(program);
    if job.terminal {
        builder = builder.with_console_socket(Some(adapted.join("console.sock")));
    } else {
        let open = || null().map_err(io_failed("open /dev/null"));
        builder = builder.with_stdin(job.ends.stdin.map_or_else(open, Ok)?);
        builder = builder.with_stdout(job.ends.stdout.map_or_else(open, Ok)?);
        builder = builder.with_stderr(job.ends.stderr.map_or_else(open, Ok)?);
    }
    builder.as_init(adapted).with_systemd(false).with_detach(true).build().map_err(engine)
}

/// Gives engine errors the words users know.
fn translate(text: &str) -> RemoteError {
    for (mark, kind) in
        [(NOT_FOUND_MARK, ErrorKind::ExecutableNotFound), (NOT_EXECUTABLE_MARK, ErrorKind::NotExecutable)]
    {
        if let Some((_, rest)) = text.split_once(mark) {
            // The engine quotes the message with its own: ours ends at the line or with its own text.
            let message = rest.split("\",").next().unwrap_or(rest).trim_end_matches(['"', ')', '\n']);
            return RemoteError::new(kind, message.replace("\\\"", "\""));
        }
    }
    if text.contains("already exists") {
        return RemoteError::new(ErrorKind::AlreadyExists, text);
    }
    RemoteError::new(ErrorKind::Engine, format!("cannot create the container: {text}"))
}

/// The engine connects here and sends the terminal's master.
pub(super) fn listen(dir: &Path) -> Result<UnixListener, RemoteError> {
    let dir_fd = fs::File::open(dir).map_err(io_failed("open the container's directory"))?;
    let _ = fs::remove_file(dir.join("console.sock"));
    // Through the descriptor: a socket address holds 107 bytes, the path may be longer.
    UnixListener::bind(format!("/proc/self/fd/{}/console.sock", dir_fd.as_raw_fd()))
        .map_err(io_failed("listen for the terminal"))
}

pub(super) fn receive_master(console: &UnixListener) -> Result<OwnedFd, RemoteError> {
    let (stream, _) = console.accept().map_err(io_failed("accept the terminal"))?;
    let mut buffer = [0; 4096];
    let mut control = nix::cmsg_space!([i32; 1]);
    let mut iov = [IoSliceMut::new(&mut buffer)];
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut iov, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)
        .map_err(|errno| failed("receive the terminal", &errno))?;
    for item in message.cmsgs().map_err(|errno| failed("receive the terminal", &errno))? {
        if let ControlMessageOwned::ScmRights(fds) = item
            && let Some(fd) = fds.first()
        {
            // SAFETY: the kernel has just made this descriptor for this process.
            return Ok(unsafe { OwnedFd::from_raw_fd(*fd) });
        }
    }
    Err(RemoteError::new(ErrorKind::Engine, "the engine sent no terminal"))
}

/// Starts through the engine, for containers with poststart hooks.
pub(crate) fn start_with_hooks(container_root: &Path, container_id: &str) -> Finished {
    let mut container =
        Container::load(container_root.join(container_id)).map_err(|error| failed("load the container", &error))?;
    container.start().map_err(|error| failed("start the container", &error))?;
    Ok(Default::default())
}
