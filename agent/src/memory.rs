//! What a burst of pods took of memory goes back to the kernel. The allocator keeps free pages between pages in use, so a
//! hundred pods that started at once cost as much for weeks as they did for three seconds.
#![allow(unsafe_code, reason = "mallopt, mallinfo and malloc_trim have no safe form")]

use std::time::Duration;

use nix::libc;
use tokio_util::sync::CancellationToken;

const LOOK: Duration = Duration::from_secs(10);
/// Less than this is not worth the walk over all free memory.
const WORTH_BYTES: usize = 1 << 20;

/// One arena for all threads: a few workers do not get in each other's way, and what one frees another can use. To be called
/// before there are threads.
pub fn share_one_arena() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets a parameter of the allocator, which takes its lock.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Gives free memory back where there is much more or less of it than when that was done last.
pub(crate) async fn give_back(end: CancellationToken) {
    let mut known = 0;
    loop {
        tokio::select! {
            () = end.cancelled() => return,
            () = tokio::time::sleep(LOOK) => {}
        }
        if free_bytes().abs_diff(known) >= WORTH_BYTES {
            trim();
            known = free_bytes();
        }
    }
}

/// What the allocator holds that nobody uses, given back or not.
#[cfg(target_env = "gnu")]
fn free_bytes() -> usize {
    // SAFETY: only looks, under the allocator's own locks.
    let info = unsafe { libc::mallinfo() };
    // The counter is an int that wraps.
    info.fordblks as u32 as usize
}

#[cfg(target_env = "gnu")]
fn trim() {
    // SAFETY: malloc_trim has no requirements, and is safe to call from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(not(target_env = "gnu"))]
fn free_bytes() -> usize {
    0
}

#[cfg(not(target_env = "gnu"))]
fn trim() {}
