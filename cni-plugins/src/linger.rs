//! Ending without waiting for the kernel to tidy up.
//!
//! Whoever closes an nf_tables socket waits until everything that was deleted through whatever socket has been freed, which
//! takes a grace period of RCU: 20 ms and more, for each pod that ends. The deletion itself is done long before. So sockets
//! through which something was deleted stay open to the end, and a child that holds nothing else closes them last.
#![allow(unsafe_code, reason = "fork in a process of one thread; the child does nothing but wait and end")]

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::unistd::{ForkResult, fork};
use oarlock_nft::Netlink;

static KEPT: AtomicBool = AtomicBool::new(false);

/// Leaves the socket open until the process ends.
pub fn keep_open(kernel: Netlink) {
    std::mem::forget(kernel);
    KEPT.store(true, Ordering::Relaxed);
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
