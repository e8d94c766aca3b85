//! Hearing of a lack of memory: an eventfd on version 1, inotify on version 2.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use crate::CgroupError;
use crate::stats::keyed;

/// Readable when the group's memory ran out. The file that counts is kept open, so it can be read to the last.
#[derive(Debug)]
pub struct OomWatch {
    notifier: OwnedFd,
    counter: File,
    path: PathBuf,
    seen: u64,
}

impl OomWatch {
    pub(crate) fn arm(dir: &Path, v2: bool) -> Result<Self, CgroupError> {
        let path = dir.join(if v2 { "memory.events" } else { "memory.oom_control" });
        let io = |operation, source| CgroupError::Io { operation, path: path.clone(), source };
        let counter = File::open(&path).map_err(|source| io("open", source))?;
        let notifier: OwnedFd = if v2 {
            let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)
                .map_err(|errno| io("watch", errno.into()))?;
            inotify.add_watch(&path, AddWatchFlags::IN_MODIFY).map_err(|errno| io("watch", errno.into()))?;
            inotify.into()
        } else {
            let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
                .map_err(|errno| io("watch", errno.into()))?;
            let line = format!("{} {}", event.as_raw_fd(), counter.as_raw_fd());
            let control = OpenOptions::new().write(true).open(dir.join("cgroup.event_control"));
            control.and_then(|mut file| file.write_all(line.as_bytes())).map_err(|source| io("watch", source))?;
            event.into()
        };
        let seen = read_kills(&path).unwrap_or(0);
        Ok(OomWatch { notifier, counter, path, seen })
    }

    /// Takes what made the descriptor readable; tells how many kills there were since the last call.
    pub fn take(&mut self) -> u64 {
        let mut buffer = [0; 512];
        loop {
            match nix::unistd::read(&self.notifier, &mut buffer) {
                Ok(0) => break,
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => break,
            }
        }
        let now = self.kills();
        let new = now.saturating_sub(self.seen);
        self.seen = self.seen.max(now);
        new
    }

    /// All kills counted so far.
    pub fn kills(&self) -> u64 {
        let mut buffer = [0; 512];
        match nix::sys::uio::pread(&self.counter, &mut buffer, 0) {
            Ok(count) => keyed(&String::from_utf8_lossy(&buffer[..count]), "oom_kill").unwrap_or(self.seen),
            Err(_) => read_kills(&self.path).unwrap_or(self.seen),
        }
    }
}

impl AsFd for OomWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.notifier.as_fd()
    }
}

fn read_kills(path: &Path) -> Option<u64> {
    keyed(&fs::read_to_string(path).ok()?, "oom_kill")
}
