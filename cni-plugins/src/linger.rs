//! Ending without waiting for the kernel to tidy up.
//!
//! Whoever closes an nf_tables socket waits until everything that was deleted through whatever socket has been freed, which
//! takes a grace period of RCU: 20 ms and more, for each pod that ends. The deletion itself is done long before. So sockets
//! through which something was deleted stay open to the end, and a child that holds nothing else closes them last. Whoever
//! deletes a link waits likewise, and leaves that to a child too.
#![allow(unsafe_code, reason = "fork in a process of one thread; the child does nothing but wait and end")]

use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use oarlock_netlink::{Connection, NetlinkError};
use oarlock_nft::Netlink;

/// The unlisting of a link takes a millisecond, and waits where many go at once. Runtimes give a plugin 30 s and more.
const UNLIST_TIMEOUT: Duration = Duration::from_secs(25);
const LOOK_INTERVAL: Duration = Duration::from_micros(50);

static KEPT: AtomicBool = AtomicBool::new(false);

/// Leaves the socket open until the process ends.
pub fn keep_open(kernel: Netlink) {
    std::mem::forget(kernel);
    KEPT.store(true, Ordering::Relaxed);
}

/// A link that a child is deleting.
pub struct Deletion {
    /// None where no child could be made and the link is deleted already.
    child: Option<Pid>,
    connection: Connection,
    index: u32,
}

/// Begins to delete a link. A child asks the kernel, which first makes sure that nobody uses the link (a millisecond) and
/// then frees it (10 ms and more). `connection` is in the link's namespace; until the child has ended, only it reads there.
pub fn begin_deletion(mut connection: Connection, index: u32) -> oarlock_netlink::Result<Deletion> {
    // SAFETY: this process has one thread, and the child does one request and ends.
    let child = match unsafe { fork() } {
        Ok(ForkResult::Child) => {
            for number in [0, 1, 2] {
                // SAFETY: the numbers are this child's own; nothing uses them after this.
                unsafe { libc::close(number) };
            }
            let deleted = connection.delete_link(index);
            // SAFETY: ends the child at once, without running what belongs to the parent's end.
            unsafe { libc::_exit(i32::from(deleted.is_err())) }
        }
        Ok(ForkResult::Parent { child }) => Some(child),
        Err(_) => {
            connection.delete_link(index)?;
            None
        }
    };
    Ok(Deletion { child, connection, index })
}

impl Deletion {
    /// Returns as soon as nobody can find the link any more; the child waits for the rest. Whoever changes links after this
    /// waits for it too, in the kernel.
    pub fn finish(mut self) -> oarlock_netlink::Result<()> {
        let Some(child) = self.child else { return Ok(()) };
        let begin = Instant::now();
        while self.connection.has_link(self.index)? {
            if !matches!(waitpid(child, Some(WaitPidFlag::WNOHANG)), Ok(WaitStatus::StillAlive)) {
                // Said by the kernel to this process, so that its reason is told.
                return self.connection.delete_link(self.index);
            }
            if begin.elapsed() > UNLIST_TIMEOUT {
                return Err(NetlinkError::Receive { operation: "delete a link", source: ErrorKind::TimedOut.into() });
            }
            // Others' changes of links come first where many go at once.
            std::thread::sleep(LOOK_INTERVAL.max(begin.elapsed() / 8));
        }
        Ok(())
    }
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
