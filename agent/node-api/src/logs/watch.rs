//! Waiting for anything to happen in a directory.
#![allow(unsafe_code, reason = "registering a descriptor with the event loop asserts that it stays open")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;

/// Events of everything in one directory.
pub(super) struct DirectoryWatch {
    events: AsyncFd<OwnedFd>,
}

impl DirectoryWatch {
    pub fn new(directory: BorrowedFd<'_>) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        let flags = AddWatchFlags::IN_MODIFY
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_DELETE_SELF;
        inotify.add_watch(format!("/proc/self/fd/{}", directory.as_raw_fd()).as_str(), flags)?;
        // SAFETY: the `OwnedFd` is a valid descriptor, and `AsyncFd` owns it from here on: nothing replaces or closes it.
        let events = unsafe { AsyncFd::register(OwnedFd::from(inotify))? };
        Ok(Self { events })
    }

    /// Completes when something has happened since the last call; several events count as one. Cancel safe.
    pub async fn changed(&self) -> io::Result<()> {
        let mut buffer = [0; 16 * 1024];
        loop {
            let mut ready = self.events.readable().await?;
            match nix::unistd::read(self.events.get_ref(), &mut buffer) {
                Ok(_) => return Ok(()),
                Err(Errno::EAGAIN) => ready.clear_ready(),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}
