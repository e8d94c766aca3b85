//! Running code inside a namespace: on a thread that is born for it and dies with it, or, in a process of one thread, on that thread,
//! which goes back.

use std::fs::File;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::Duration;

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::fstatfs;

use crate::{NetnsError, Result};

/// The magic number of the file system that namespace files live on.
const NSFS_MAGIC: i64 = 0x6e73_6673;

/// Runs `work` inside the namespace pinned at (or found at) `path`, of whatever type it is, and waits.
///
/// Sockets that `work` opens stay in that namespace when they are handed back.
///
/// # Errors
/// When the file cannot be opened, is no namespace, or cannot be entered, and when `work` panics.
pub fn run_in<T: Send>(path: &Path, work: impl FnOnce() -> T + Send) -> Result<T> {
    let file = open(path)?;
    run_in_fd(file.as_fd(), work).map_err(|error| match error {
        NetnsError::Enter { source, .. } => NetnsError::Enter { path: path.to_owned(), source },
        other => other,
    })
}

/// As [`run_in`] for a namespace that is open already.
pub fn run_in_fd<T: Send>(namespace: BorrowedFd<'_>, work: impl FnOnce() -> T + Send) -> Result<T> {
    on_fresh_thread(|| {
        enter(namespace)?;
        Ok(work())
    })?
}

/// Runs `work` inside the open network namespace as [`run_in_fd`] does, but on the calling thread when the process has no other:
/// a program that lives for a millisecond saves a tenth of it.
///
/// # Errors
/// As [`run_in_fd`]. The process ends when its own namespace cannot be entered again, because nothing that it would do from then
/// on would happen where it was meant to.
pub fn visit_network<T: Send>(namespace: BorrowedFd<'_>, work: impl FnOnce() -> T + Send) -> Result<T> {
    let home = Path::new("/proc/thread-self/ns/net");
    if !is_only_thread() {
        return run_in_fd(namespace, work);
    }
    let home = File::open(home).map_err(|source| NetnsError::Open { path: home.to_owned(), source })?;
    setns(namespace, CloneFlags::CLONE_NEWNET)
        .map_err(|errno| NetnsError::Enter { path: "an open file".into(), source: errno.into() })?;
    let outcome = catch_unwind(AssertUnwindSafe(work));
    if setns(&home, CloneFlags::CLONE_NEWNET).is_err() {
        std::process::abort();
    }
    outcome.map_err(|_| NetnsError::Panicked)
}

/// Whether the process has one thread, by the links of the directory that lists them. Unknown counts as no.
fn is_only_thread() -> bool {
    const WITHOUT_THREADS: u64 = 2;
    std::fs::metadata("/proc/self/task").is_ok_and(|tasks| tasks.nlink() == WITHOUT_THREADS + 1)
}

fn enter(namespace: BorrowedFd<'_>) -> Result<()> {
    setns(namespace, CloneFlags::empty())
        .map_err(|errno| NetnsError::Enter { path: "an open file".into(), source: errno.into() })
}

/// Runs `work` inside a new network namespace that nothing pins; it ends when the last socket made in it is closed.
/// `lo` is up.
pub fn run_in_new<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T> {
    on_fresh_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| NetnsError::Unshare(errno.into()))?;
        crate::bring_loopback_up()?;
        Ok(work())
    })?
}

/// Connects to `address` from inside the network namespace at `path`: a port-forward's way in.
///
/// The outer error is about the namespace, the inner one about the connection.
pub fn tcp_connect_in(path: &Path, address: SocketAddr, timeout: Duration) -> Result<io::Result<TcpStream>> {
    run_in(path, || TcpStream::connect_timeout(&address, timeout))
}

pub(crate) fn open(path: &Path) -> Result<File> {
    let file = File::open(path).map_err(|source| NetnsError::Open { path: path.to_owned(), source })?;
    let magic = fstatfs(&file)
        .map_err(|errno| NetnsError::Open { path: path.to_owned(), source: errno.into() })?
        .filesystem_type();
    if magic.0 == NSFS_MAGIC { Ok(file) } else { Err(NetnsError::NotANamespace { path: path.to_owned() }) }
}

pub(crate) fn on_fresh_thread<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T> {
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("netns".to_owned())
            .stack_size(512 << 10)
            .spawn_scoped(scope, work)
            .map_err(NetnsError::Thread)?
            .join()
            .map_err(|_| NetnsError::Panicked)
    })
}
