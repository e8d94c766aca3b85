//! Running one more process in a container, in a helper child. Not the engine's exec: that applies no seccomp filter
//! and stays outside user namespaces.
//!
//! ```text
//! helper: limits, oom score ─▶ cgroup ─▶ namespaces ─▶ fork ─▶ wait for "executed" or an error, report, end
//!                                                        └▶ child: session, terminal, directory, user, capabilities,
//!                                                           seccomp, execute        (adopted by the shim)
//! ```
#![allow(unsafe_code, reason = "fork, and moving descriptors to the standard numbers")]

pub(crate) mod credentials;
pub(crate) mod lookup;
mod terminal;

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::libc;
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{ForkResult, Gid, Uid, chdir, fchown, fork, pipe2, setsid};
use oarlock_cgroup::Cgroup;
use oarlock_shim_api::{ErrorKind, RemoteError};
use oci_spec::runtime::Process;

pub(crate) use terminal::resize;

use crate::engine::{failed, io_failed};
use crate::forked::{Finished, Report};
use crate::seccomp;
use crate::stdio::ContainerEnds;

/// What to run, where.
pub(crate) struct ExecJob {
    /// The container's first process. The shim has not reaped it, so the number is still its own.
    pub(crate) init: i32,
    pub(crate) init_handle: OwnedFd,
    pub(crate) cgroup: Option<String>,
    /// The shim's directory of the container, with its specification.
    pub(crate) directory: PathBuf,
    pub(crate) container_root: PathBuf,
    /// The process as JSON.
    pub(crate) process: String,
    pub(crate) terminal: bool,
    pub(crate) ends: ContainerEnds,
}

/// Runs the process; returns once its program has been executed.
pub(crate) fn exec(job: ExecJob) -> Finished {
    let process: Process = serde_json::from_str(&job.process)
        .map_err(|error| RemoteError::new(ErrorKind::Invalid, format!("cannot read the process: {error}")))?;
    let filter = seccomp::of_container(&job.container_root, &job.directory)
        .map_err(|error| failed("prepare the seccomp filter", &error))?;
    // Limits and score belong to this process until the child inherits them; lowering the score may be refused.
    if let Some(score) = process.oom_score_adj() {
        let _ = fs::write("/proc/self/oom_score_adj", score.to_string());
    } else if let Ok(score) = fs::read_to_string(format!("/proc/{}/oom_score_adj", job.init)) {
        let _ = fs::write("/proc/self/oom_score_adj", score.trim());
    }
    if let Some(cgroup) = &job.cgroup {
        let joined = Cgroup::new(cgroup).and_then(|cgroup| cgroup.join());
        joined.map_err(|error| failed("join the container's cgroup", &error))?;
    }
    let user = (process.user().uid(), process.user().gid());
    let (uid, gid) = (on_host(job.init, "uid_map", user.0), on_host(job.init, "gid_map", user.1));
    for end in [&job.ends.stdin, &job.ends.stdout, &job.ends.stderr].into_iter().flatten() {
        let _ = fchown(end, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
    }
    let null = fs::OpenOptions::new().read(true).write(true).open("/dev/null").map_err(io_failed("open /dev/null"))?;
    enter_namespaces(job.init, &job.init_handle)?;
    let terminal = if job.terminal { Some(terminal::open(user).map_err(io_failed("open a terminal"))?) } else { None };
    if let (Some(pair), Some(size)) = (&terminal, process.console_size()) {
        let cells = |number: u64| u16::try_from(number).unwrap_or(u16::MAX);
        terminal::resize(&pair.master, cells(size.width()), cells(size.height()))
            .map_err(io_failed("set the terminal's size"))?;
    }
    let (error_reader, error_writer) = pipe2(OFlag::O_CLOEXEC).map_err(|errno| failed("make a pipe", &errno))?;
    // SAFETY: this helper has one thread.
    match unsafe { fork() }.map_err(|errno| failed("fork", &errno))? {
        ForkResult::Child => {
            let streams =
                Streams { terminal: terminal.as_ref().map(|pair| &pair.slave), ends: &job.ends, null: null.as_fd() };
            let error = become_process(&process, filter.as_ref(), &streams);
            let _ = fs::File::from(error_writer).write_all(&serde_json::to_vec(&error).unwrap_or_default());
            // SAFETY: ends this process only.
            unsafe { libc::_exit(if error.kind == ErrorKind::ExecutableNotFound { 127 } else { 126 }) }
        }
        ForkResult::Parent { child } => {
            drop(error_writer);
            let mut text = Vec::new();
            fs::File::from(error_reader)
                .take(64 * 1024)
                .read_to_end(&mut text)
                .map_err(io_failed("hear from the new process"))?;
            if text.is_empty() {
                let report = Report { pid: child.as_raw(), ..Report::default() };
                return Ok((report, terminal.map(|pair| pair.master).into_iter().collect()));
            }
            let _ = nix::sys::wait::waitpid(child, None);
            Err(serde_json::from_slice(&text)
                .unwrap_or_else(|_| RemoteError::new(ErrorKind::HelperDied, "the new process died before its program")))
        }
    }
}

/// An identity inside the container as this process knows it.
fn on_host(init: i32, map: &str, id: u32) -> u32 {
    let text = fs::read_to_string(format!("/proc/{init}/{map}")).unwrap_or_default();
    mapped(&text, id).unwrap_or(id)
}

fn mapped(map: &str, id: u32) -> Option<u32> {
    map.lines().find_map(|line| {
        let mut numbers = line.split_ascii_whitespace().map(|number| number.parse::<u32>().ok());
        let (inside, outside, length) = (numbers.next()??, numbers.next()??, numbers.next()??);
        let offset = id.checked_sub(inside).filter(|offset| *offset < length)?;
        outside.checked_add(offset)
    })
}

/// Joins every namespace of the container that differs from this process's.
fn enter_namespaces(init: i32, handle: &OwnedFd) -> Result<(), RemoteError> {
    let kinds = [
        ("user", CloneFlags::CLONE_NEWUSER),
        ("mnt", CloneFlags::CLONE_NEWNS),
        ("pid", CloneFlags::CLONE_NEWPID),
        ("net", CloneFlags::CLONE_NEWNET),
        ("ipc", CloneFlags::CLONE_NEWIPC),
        ("uts", CloneFlags::CLONE_NEWUTS),
        ("cgroup", CloneFlags::CLONE_NEWCGROUP),
    ];
    let id = |process: &str, kind: &str| {
        fs::metadata(format!("/proc/{process}/ns/{kind}")).map(|meta| (meta.dev(), meta.ino()))
    };
    let mut wanted = CloneFlags::empty();
    for (kind, flag) in kinds {
        let theirs = id(&init.to_string(), kind).map_err(io_failed("look at the container's namespaces"))?;
        if id("self", kind).ok() != Some(theirs) {
            wanted |= flag;
        }
    }
    // Another handle for the same process: what it names cannot have been recycled.
    setns(handle, wanted).map_err(|errno| failed("enter the container's namespaces", &errno))?;
    if wanted.contains(CloneFlags::CLONE_NEWUSER) {
        // SAFETY: take numbers only; raw, as this process has one thread.
        unsafe {
            libc::syscall(libc::SYS_setresgid, 0, 0, 0);
            libc::syscall(libc::SYS_setresuid, 0, 0, 0);
        }
    }
    Ok(())
}

struct Streams<'a> {
    terminal: Option<&'a OwnedFd>,
    ends: &'a ContainerEnds,
    null: BorrowedFd<'a>,
}

/// Becomes the process; returns only on failure.
fn become_process(process: &Process, filter: Option<&seccomp::Program>, streams: &Streams<'_>) -> RemoteError {
    let engine = |operation: &str, error: &dyn std::error::Error| failed(&format!("exec: {operation}"), error);
    let prepared = (|| {
        setsid().map_err(|errno| engine("make a session", &errno))?;
        connect(streams).map_err(|error| engine("connect the standard streams", &error))?;
        credentials::set_limits(process.rlimits().as_deref().unwrap_or_default())
            .map_err(|error| engine("set limits", &error))?;
        let mask = process.user().umask().unwrap_or(0o022);
        umask(Mode::from_bits_truncate(mask));
        if let Some(profile) = process.apparmor_profile().as_deref().filter(|profile| !profile.is_empty()) {
            confine(profile).map_err(|error| engine("apply the AppArmor profile", &error))?;
        }
        let entered = enter_directory(process.cwd());
        mark_close_on_exec();
        let no_new_privileges = process.no_new_privileges() == Some(true);
        if no_new_privileges {
            credentials::set_no_new_privileges().map_err(|error| engine("set no_new_privs", &error))?;
        }
        // Without no_new_privs loading takes a capability that may be dropped next.
        if let Some(filter) = filter.filter(|_| !no_new_privileges) {
            seccomp::load(filter).map_err(|error| engine("apply the seccomp filter", &error))?;
        }
        credentials::become_user(process.user(), process.capabilities().as_ref())
            .map_err(|error| engine("become the user", &error))?;
        // A directory that only the user may enter (or only root): one of the two tries succeeds.
        if entered.is_err() {
            enter_directory(process.cwd())
                .map_err(|error| engine(&format!("chdir to cwd ({:?})", process.cwd()), &error))?;
        }
        if let Some(filter) = filter.filter(|_| no_new_privileges) {
            seccomp::load(filter).map_err(|error| engine("apply the seccomp filter", &error))?;
        }
        Ok(())
    })();
    if let Err(error) = prepared {
        return error;
    }
    if let Some(home) = lookup::home_of(process.user().uid()) {
        lookup::remember_home(&home);
    }
    let args = process.args().as_deref().unwrap_or_default();
    let error = lookup::execute(args, process.env().as_deref().unwrap_or_default());
    let kind = if error.is_not_found() { ErrorKind::ExecutableNotFound } else { ErrorKind::NotExecutable };
    RemoteError::new(kind, format!("exec failed: {error}"))
}

fn connect(streams: &Streams<'_>) -> io::Result<()> {
    if let Some(slave) = streams.terminal {
        terminal::take_control(slave)?;
    }
    let ends = streams.ends;
    for (number, end) in [(0, &ends.stdin), (1, &ends.stdout), (2, &ends.stderr)] {
        let source = streams.terminal.or(end.as_ref()).map_or(streams.null, AsFd::as_fd);
        // SAFETY: the helper keeps its own ends above the standard numbers, so nothing in use is replaced.
        if unsafe { libc::dup2(source.as_raw_fd(), number) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Changes into a directory and makes sure that it lies within this root: a path through a leaked descriptor could
/// name a directory outside.
fn enter_directory(path: &Path) -> io::Result<()> {
    chdir(path)?;
    let now = nix::unistd::getcwd()?;
    // The kernel marks a directory out of reach of the root.
    if now.is_absolute() && !now.starts_with("(unreachable)") {
        return Ok(());
    }
    Err(io::Error::other("the working directory is outside the container"))
}

/// Nothing but the standard streams reaches the program. Marked rather than closed: the error pipe is still needed.
fn mark_close_on_exec() {
    const CLOSE_RANGE_CLOEXEC: libc::c_uint = 4;
    // SAFETY: takes numbers only.
    unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, CLOSE_RANGE_CLOEXEC) };
}

/// Newer kernels keep AppArmor's attributes in a directory of their own.
fn confine(profile: &str) -> io::Result<()> {
    let text = format!("exec {profile}");
    fs::write("/proc/self/attr/apparmor/exec", &text).or_else(|_| fs::write("/proc/self/attr/exec", &text))
}

#[cfg(test)]
mod tests {
    use super::mapped;

    #[test]
    fn identities_are_found_in_the_kernel_s_table() {
        let whole = "         0          0 4294967295\n";
        let two = "         0     100000       1000\n      1000     500000         10\n";
        assert_eq!(mapped(whole, 77), Some(77));
        assert_eq!((mapped(two, 999), mapped(two, 1009), mapped(two, 1010)), (Some(100_999), Some(500_009), None));
    }
}
