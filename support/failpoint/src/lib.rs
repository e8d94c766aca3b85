//! Places at which a test kills a daemon as a power cut would: between any two things that it does to the world.
//!
//! Whoever changes the world in steps names each with [`step`]. In daily use that costs one load of a constant. A test starts
//! the daemon with [`VARIABLE`] set to a number, and at the step of that number the process kills itself with SIGKILL: nothing
//! is flushed, dropped or told. Going through all numbers goes through all places, without a list to keep.
//!
//! Owns no knowledge of what the steps are.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The number of the step at which to die, from 1; unset or not a number, none.
pub const VARIABLE: &str = "OARLOCK_DIE_AT_STEP";

static FATAL: OnceLock<Option<u64>> = OnceLock::new();
static TAKEN: AtomicU64 = AtomicU64::new(0);

/// The process is about to do the next thing, after what `name` says.
pub fn step(name: &str) {
    let read = || std::env::var(VARIABLE).ok()?.parse().ok();
    let Some(fatal) = *FATAL.get_or_init(read) else { return };
    let number = TAKEN.fetch_add(1, Ordering::Relaxed) + 1;
    if number == fatal {
        eprintln!("dies at step {number}: {name}");
        let _ = kill(Pid::this(), Signal::SIGKILL);
        // The signal may take a moment; nothing more may happen meanwhile.
        loop {
            std::thread::park();
        }
    }
}
