//! User namespaces, and the other namespaces that belong to them.
//!
//! Only a process of one thread can make a user namespace, so a child is forked for it. It makes all namespaces with one
//! call, the user namespace first, so that the others belong to it; waits while its identities are mapped from outside;
//! sets the namespaces up as their root; and ends once they are held by a pin or a descriptor. Between fork and end it
//! makes system calls only, with memory that was ready before: another thread of the parent may have held a lock.
#![allow(unsafe_code, reason = "fork in a process of several threads, and raw credential calls in the child")]

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, pipe2};

use crate::{NetnsError, Result, bring_loopback_up};

/// The child answers at once or never.
const LIMIT_MILLISECONDS: u16 = 10_000;

/// A range of identities: from `inside` on in the namespace, from `outside` on in the one around it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdRange {
    pub inside: u32,
    pub outside: u32,
    pub length: u32,
}

/// Who is who in a user namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UserMappings {
    pub uids: Vec<IdRange>,
    pub gids: Vec<IdRange>,
}

impl UserMappings {
    fn text(ranges: &[IdRange]) -> String {
        ranges.iter().map(|range| format!("{} {} {}\n", range.inside, range.outside, range.length)).collect()
    }
}

/// What the child does inside, all in memory before the fork.
#[derive(Debug, Default)]
pub(crate) struct SetUp {
    pub(crate) loopback: bool,
    pub(crate) hostname: Option<String>,
    /// Files below `/proc/sys` with what is written to them.
    pub(crate) files: Vec<(CString, Vec<u8>)>,
}

/// What the child was at when it failed, as a byte on its pipe.
const STEP_NAMESPACES: u8 = 1;
const STEP_ROOT: u8 = 2;
const STEP_LOOPBACK: u8 = 3;
const STEP_HOSTNAME: u8 = 4;
/// Files follow, by position.
const STEP_FILES: u8 = 5;

/// A user namespace with these mappings and nobody in it; it lives as long as the descriptor.
pub fn user_namespace(mappings: &UserMappings) -> Result<OwnedFd> {
    with_namespaces(mappings, CloneFlags::empty(), &SetUp::default(), |pid| {
        let path = format!("/proc/{pid}/ns/user");
        let file = File::open(&path).map_err(|source| NetnsError::Open { path: path.into(), source })?;
        Ok(file.into())
    })
}

/// Makes a user namespace and `others` belonging to it, and calls `hold` with a process that is in all of them.
pub(crate) fn with_namespaces<T>(
    mappings: &UserMappings,
    others: CloneFlags,
    set_up: &SetUp,
    hold: impl FnOnce(Pid) -> Result<T>,
) -> Result<T> {
    let failed = |errno: nix::Error| NetnsError::Unshare(errno.into());
    let (go_reader, go_writer) = pipe2(OFlag::O_CLOEXEC).map_err(failed)?;
    let (done_reader, done_writer) = pipe2(OFlag::O_CLOEXEC).map_err(failed)?;
    // SAFETY: the child calls only what is safe between fork and end (see `inside`) and leaves by _exit.
    match unsafe { fork() }.map_err(failed)? {
        ForkResult::Child => {
            // Its own copies would keep both pipes open after the parent's end.
            // SAFETY: closes numbers of this process that are not used again.
            unsafe {
                libc::close(go_writer.as_raw_fd());
                libc::close(done_reader.as_raw_fd());
            }
            inside(others, set_up, &go_reader, &done_writer);
            // SAFETY: ends this process only.
            unsafe { libc::_exit(0) }
        }
        ForkResult::Parent { child } => {
            drop((go_reader, done_writer));
            let outcome = outside(child, mappings, set_up, File::from(go_writer), File::from(done_reader), hold);
            // It ends by itself; after an error it may still wait.
            let _ = kill(child, Signal::SIGKILL);
            let _ = waitpid(child, None);
            outcome
        }
    }
}

fn outside<T>(
    child: Pid,
    mappings: &UserMappings,
    set_up: &SetUp,
    mut go: File,
    mut done: File,
    hold: impl FnOnce(Pid) -> Result<T>,
) -> Result<T> {
    answer(&mut done, set_up)?;
    for (file, ranges) in [("uid_map", &mappings.uids), ("gid_map", &mappings.gids)] {
        let path = format!("/proc/{child}/{file}");
        fs::write(&path, UserMappings::text(ranges))
            .map_err(|source| NetnsError::Identities { mapping: UserMappings::text(ranges), source })?;
    }
    go.write_all(b"m").map_err(NetnsError::Unshare)?;
    answer(&mut done, set_up)?;
    hold(child)
}

/// Waits for the child: a step and the error number it met, zero for none.
fn answer(done: &mut File, set_up: &SetUp) -> Result<()> {
    let mut fds = [PollFd::new(std::os::fd::AsFd::as_fd(done), PollFlags::POLLIN)];
    let ready =
        poll(&mut fds, PollTimeout::from(LIMIT_MILLISECONDS)).map_err(|errno| NetnsError::Unshare(errno.into()))?;
    if ready == 0 {
        return Err(NetnsError::Unshare(io::ErrorKind::TimedOut.into()));
    }
    let mut message = [0; 6];
    done.read_exact(&mut message).map_err(NetnsError::Unshare)?;
    let [step, file, number @ ..] = message;
    let source = match i32::from_ne_bytes(number) {
        0 => return Ok(()),
        number => io::Error::from_raw_os_error(number),
    };
    Err(match step {
        STEP_ROOT => NetnsError::Identities { mapping: "0".to_owned(), source },
        STEP_LOOPBACK => NetnsError::Loopback(source),
        STEP_HOSTNAME => NetnsError::Hostname { name: set_up.hostname.clone().unwrap_or_default(), source },
        STEP_FILES => {
            let (path, value) = set_up.files.get(usize::from(file)).cloned().unwrap_or_default();
            NetnsError::Sysctl {
                name: path.to_string_lossy().into_owned(),
                value: String::from_utf8_lossy(&value).into_owned(),
                source,
            }
        }
        _ => NetnsError::Unshare(source),
    })
}

/// The child. No allocation, no locks.
fn inside(others: CloneFlags, set_up: &SetUp, go: &OwnedFd, done: &OwnedFd) {
    // SAFETY: takes numbers only. A parent that is killed takes this process along.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) };
    let made = unshare(CloneFlags::CLONE_NEWUSER | others);
    if !tell(done, STEP_NAMESPACES, 0, made.err().map_or(0, |errno| errno as i32)) || made.is_err() {
        return;
    }
    let mut mapped = [0; 1];
    if !matches!(nix::unistd::read(go, &mut mapped), Ok(1)) {
        return;
    }
    let (step, file, error) = match become_root_and_set_up(set_up) {
        Ok(()) => (0, 0, 0),
        Err((step, file, error)) => (step, file, error.raw_os_error().unwrap_or(libc::EIO)),
    };
    if tell(done, step, file, error) {
        // Until the parent has hold of the namespaces: it then closes the pipe, or kills.
        let _ = nix::unistd::read(go, &mut mapped);
    }
}

fn tell(done: &OwnedFd, step: u8, file: u8, error: i32) -> bool {
    let mut message = [step, file, 0, 0, 0, 0];
    message[2..].copy_from_slice(&error.to_ne_bytes());
    matches!(nix::unistd::write(done, &message), Ok(6))
}

fn become_root_and_set_up(set_up: &SetUp) -> Result<(), (u8, u8, io::Error)> {
    let check = |step, result: libc::c_long| {
        if result < 0 { Err((step, 0, io::Error::last_os_error())) } else { Ok(()) }
    };
    // SAFETY: raw calls that take numbers only: the C library's versions would talk to threads that are not here.
    unsafe {
        check(STEP_ROOT, libc::syscall(libc::SYS_setresgid, 0, 0, 0))?;
        check(STEP_ROOT, libc::syscall(libc::SYS_setresuid, 0, 0, 0))?;
    }
    if set_up.loopback {
        bring_loopback_up().map_err(|error| match error {
            NetnsError::Loopback(source) => (STEP_LOOPBACK, 0, source),
            _ => (STEP_LOOPBACK, 0, io::Error::from_raw_os_error(libc::EIO)),
        })?;
    }
    if let Some(name) = &set_up.hostname {
        // SAFETY: pointer and length are those of the name.
        let result = unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) };
        check(STEP_HOSTNAME, result.into())?;
    }
    for (index, (path, value)) in set_up.files.iter().enumerate() {
        let failed = || (STEP_FILES, u8::try_from(index).unwrap_or(u8::MAX), io::Error::last_os_error());
        // SAFETY: the path is a C string; the buffer lives over the call; the descriptor is this function's own.
        unsafe {
            let file = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
            if file < 0 {
                return Err(failed());
            }
            let written = libc::write(file, value.as_ptr().cast(), value.len());
            if written < 0 {
                return Err(failed());
            }
            libc::close(file);
        }
    }
    Ok(())
}
