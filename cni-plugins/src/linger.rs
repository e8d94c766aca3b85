//! Ending without waiting for the kernel to tidy up.
//!
//! Whoever closes an nf_tables socket waits until everything that was deleted through whatever socket has been freed, which
//! takes a grace period of RCU: 20 ms and more, for each pod that ends. The deletion itself is done long before. So sockets
//! through which something was deleted stay open to the end, and a child that holds nothing else closes them last. Whoever
//! deletes a link waits likewise, and leaves that to a child too.
#![allow(unsafe_code, reason = "fork in a process of one thread; the child does nothing but wait and end")]

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use oarlock_netlink::Connection;
use oarlock_nft::Netlink;

/// The unlisting of a link takes a millisecond; this only bounds what should never happen.
const UNLIST_TIMEOUT: Duration = Duration::from_secs(10);
const LOOK_INTERVAL: Duration = Duration::from_micros(100);

static KEPT: AtomicBool = AtomicBool::new(false);

/// Leaves the socket open until the process ends.
pub fn keep_open(kernel: Netlink) {
    std::mem::forget(kernel);
    KEPT.store(true, Ordering::Relaxed);
}

/// Deletes a link and returns as soon as nobody can find it any more. A child waits for the rest, in which the kernel makes
/// sure that nobody uses it: 10 ms and more. `sockets` are two in the link's namespace: the child works with the first
/// while this process looks with the second.
pub fn delete_link(sockets: &mut [Connection; 2], index: u32) -> oarlock_netlink::Result<()> {
    let [worker, looker] = sockets;
    // SAFETY: this process has one thread, and the child does one request and ends.
    let child = match unsafe { fork() } {
        Ok(ForkResult::Child) => {
            for number in [0, 1, 2] {
                // SAFETY: the numbers are this child's own; nothing uses them after this.
                unsafe { libc::close(number) };
            }
            let deleted = worker.delete_link(index);
            // SAFETY: ends the child at once, without running what belongs to the parent's end.
            unsafe { libc::_exit(i32::from(deleted.is_err())) }
        }
        Ok(ForkResult::Parent { child }) => child,
        Err(_) => return looker.delete_link(index),
    };
    let begin = Instant::now();
    while looker.link_by_index(index)?.is_some() {
        let has_ended = !matches!(waitpid(child, Some(WaitPidFlag::WNOHANG)), Ok(WaitStatus::StillAlive));
        if has_ended || begin.elapsed() > UNLIST_TIMEOUT {
            // Said by the kernel to this process, so that its reason is told.
            return looker.delete_link(index);
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
    Ok(())
}

/// Lets a child close the sockets that were kept. To be called last, with the answer written.
pub fn leave_to_child() {
    if !KEPT.load(Ordering::Relaxed) {
        return;
    }
    // Made after the sockets, so it has a higher number, and this process closes it after them when it ends.
    let Ok((ended, alive)) = nix::unistd::pipe() else { return };
    // SAFETY: this process has one thread, and the child makes only system calls before it ends.
    match unsafe { fork() } {
        Ok(ForkResult::Child) => {
            for number in [0, 1, 2, alive.as_raw_fd()] {
                // SAFETY: the numbers are this child's own; nothing uses them after this.
                unsafe { libc::close(number) };
            }
            let mut byte = [0];
            // Ends when the parent has.
            let _ = nix::unistd::read(&ended, &mut byte);
            // SAFETY: ends the child at once, without running what belongs to the parent's end.
            unsafe { libc::_exit(0) }
        }
        // Without a child this process waits itself, as it would have without this module.
        Ok(ForkResult::Parent { .. }) | Err(_) => {
            std::mem::forget(alive);
        }
    }
}
