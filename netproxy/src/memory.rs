//! Giving memory back to the kernel after a large piece of work.
#![allow(unsafe_code, reason = "malloc_trim has no safe form")]

/// Gives free memory back. The allocator keeps what reading tens of thousands of objects took, which a proxy that then sits
/// idle for weeks does not need.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim has no requirements, and is safe to call from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}
