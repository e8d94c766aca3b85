//! Short-lived children that do what must not happen in the shim itself: entering namespaces, allocating much, blocking,
//! and everything that calls the container engine.
//!
//! A child does one job, sends one report over a SEQPACKET channel and ends. One that dies without a report, however
//! it dies, closes the channel: that is a clean error, never a hang.
#![allow(unsafe_code, reason = "fork, and closing descriptors by number in the child")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, sigaction, sigprocmask};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::{ForkResult, Pid, fork};
use oarlock_shim_api::frame;
use oarlock_shim_api::{ErrorKind, RemoteError};
use serde::{Deserialize, Serialize};

/// What a job tells on success.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Report {
    /// The process made, if the job makes one.
    pub(crate) pid: i32,
    /// The container's cgroup, relative.
    pub(crate) cgroup: Option<String>,
    /// The container has a PID namespace that dies with its first process.
    pub(crate) private_pid_namespace: bool,
    /// Starting has to go through the engine, for its hooks.
    pub(crate) start_hooks: bool,
    /// The container was made out of sight of other pods' mounts.
    pub(crate) secluded: bool,
}

/// A finished job: its report, and descriptors (the terminal).
pub(crate) type Finished = Result<(Report, Vec<OwnedFd>), RemoteError>;

/// A child at work.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) pid: Pid,
    pub(crate) channel: OwnedFd,
}

/// Runs a job in a child. Of the shim's descriptors only `keep` stay open in it, at their numbers.
///
/// The job owns what it was given: dropping it in the parent closes the parent's copies.
pub(crate) fn spawn(keep: &[RawFd], job: impl FnOnce() -> Finished) -> io::Result<Running> {
    spawn_in(None, keep, job)
}

/// As [`spawn`], with the child born in a group of the version 2 hierarchy if the kernel lets it be.
pub(crate) fn spawn_in(
    birthplace: Option<BorrowedFd<'_>>,
    keep: &[RawFd],
    job: impl FnOnce() -> Finished,
) -> io::Result<Running> {
    let kind = SockType::SeqPacket;
    let (ours, theirs) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
    // SAFETY: of this process's threads only this one allocates or locks now (see `stdio/writer.rs`), so the child, which
    // has no other, may do so as it likes.
    match unsafe { fork_in(birthplace) }? {
        ForkResult::Parent { child } => Ok(Running { pid: child, channel: ours }),
        ForkResult::Child => {
            let mut kept = keep.to_vec();
            kept.push(theirs.as_raw_fd());
            // Whatever happens, the shim's own loop must not go on in this process.
            let _ = catch_unwind(AssertUnwindSafe(|| {
                close_all_but(&mut kept);
                reset_signals();
                report(theirs.as_fd(), job());
            }));
            // SAFETY: ends this process without running the parent's destructors.
            unsafe { libc::_exit(0) }
        }
    }
}

/// fork(2), into a cgroup where that is wanted and possible: moving a process there later waits for the kernel.
///
/// # Safety
/// As for fork: no other thread of this process may be allocating or hold a lock that the child needs.
pub(crate) unsafe fn fork_in(birthplace: Option<BorrowedFd<'_>>) -> nix::Result<ForkResult> {
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    if let Some(group) = birthplace {
        // SAFETY: an all-zero value is a valid one of this plain C struct.
        let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
        arguments.flags = CLONE_INTO_CGROUP;
        arguments.exit_signal = libc::SIGCHLD as u64;
        arguments.cgroup = group.as_raw_fd() as u64;
        // SAFETY: without a stack of its own and without shared memory the child goes on as after fork.
        let result = unsafe { libc::syscall(libc::SYS_clone3, &arguments, size_of::<libc::clone_args>()) };
        match result {
            0 => return Ok(ForkResult::Child),
            pid if pid > 0 => return Ok(ForkResult::Parent { child: Pid::from_raw(pid as i32) }),
            // An older kernel, or a group that takes no processes now.
            _ => {}
        }
    }
    // SAFETY: the caller's promise.
    unsafe { fork() }
}

fn report(channel: BorrowedFd<'_>, finished: Finished) {
    let (outcome, fds) = match finished {
        Ok((report, fds)) => (Ok(report), fds),
        Err(error) => (Err(error), Vec::new()),
    };
    if let Ok(body) = serde_json::to_vec(&outcome) {
        let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        let _ = frame::send(channel, &body, &borrowed);
    }
}

/// What a child reported, if it has; `None` while it is still at work.
pub(crate) fn poll(channel: BorrowedFd<'_>, scratch: &mut Vec<u8>) -> Option<Finished> {
    let died = || RemoteError::new(ErrorKind::HelperDied, "the helper process died before it could report");
    match frame::receive(channel, scratch) {
        Err(frame::FrameError::WouldBlock) => None,
        Err(_) => Some(Err(died())),
        Ok(received) => Some(match serde_json::from_slice::<Result<Report, RemoteError>>(&received.body) {
            Ok(outcome) => outcome.map(|report| (report, received.fds)),
            Err(_) => Err(died()),
        }),
    }
}

/// Closes everything above standard error except the numbers given.
fn close_all_but(kept: &mut Vec<RawFd>) {
    kept.retain(|fd| *fd > 2);
    kept.sort_unstable();
    kept.dedup();
    let mut next = 3;
    for fd in kept.iter() {
        close_range(next, *fd - 1);
        next = fd + 1;
    }
    close_range(next, RawFd::MAX);
}

fn close_range(first: RawFd, last: RawFd) {
    if first <= last {
        // SAFETY: the child's copies of the shim's descriptors are never used again; destructors do not run.
        unsafe { libc::syscall(libc::SYS_close_range, first as libc::c_uint, last as libc::c_uint, 0) };
    }
}

/// A container must not inherit the shim's blocked or ignored signals. SIGPIPE stays ignored up to the program itself (see
/// [`default_signals`]): a hook that does not read what it is told must not end the helper.
fn reset_signals() {
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        // SAFETY: restores default actions, no handler involved.
        let _ = unsafe { sigaction(signal, &default) };
    }
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
}

/// Last of all before a program is executed: every signal has its default action, also those that the C library keeps to itself
/// and through its own call would not give back.
pub(crate) fn default_signals() {
    const SIGNALS: libc::c_long = 64;
    // The kernel's structure of handler, flags, restorer (where there is one) and mask; all zero is the default action.
    let default = [0u64; 4];
    for signal in 1..=SIGNALS {
        // SAFETY: the kernel reads the structure and writes nothing; no handler is involved.
        unsafe {
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), std::ptr::null_mut::<u64>(), 8usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn wait_for(running: &Running) -> Finished {
        let mut scratch = Vec::new();
        let mut fds = [nix::poll::PollFd::new(running.channel.as_fd(), nix::poll::PollFlags::POLLIN)];
        let limit = Duration::from_secs(20);
        nix::poll::poll(&mut fds, u16::try_from(limit.as_millis()).unwrap()).unwrap();
        poll(running.channel.as_fd(), &mut scratch).unwrap()
    }

    #[test]
    fn a_child_that_dies_or_panics_is_an_error_not_a_hang() {
        let died = spawn(&[], || {
            nix::sys::signal::raise(Signal::SIGKILL).unwrap();
            Ok(Default::default())
        });
        assert_eq!(wait_for(&died.unwrap()).unwrap_err().kind, ErrorKind::HelperDied);
        let panicked = spawn(&[], || std::panic::resume_unwind(Box::new("no report")));
        assert_eq!(wait_for(&panicked.unwrap()).unwrap_err().kind, ErrorKind::HelperDied);
    }

    #[test]
    fn reports_and_errors_arrive_as_they_were() {
        let report = Report { pid: 42, cgroup: Some("a/b".into()), ..Report::default() };
        let sent = report.clone();
        let running = spawn(&[], move || Ok((sent, Vec::new()))).unwrap();
        assert_eq!(wait_for(&running).unwrap().0, report);
        let error = RemoteError::new(ErrorKind::Engine, "x".repeat(100_000));
        let sent = error.clone();
        let running = spawn(&[], move || Err(sent)).unwrap();
        assert_eq!(wait_for(&running).unwrap_err(), error);
    }
}
