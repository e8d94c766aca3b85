//! Opening log files without following links that a container with a mount of the log directory could have planted.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};

use super::watch::DirectoryWatch;
use crate::backend::LogFile;

/// An open log with its directory.
#[derive(Debug)]
pub(crate) struct LogReader {
    pub(super) directory: OwnedFd,
    pub(super) name: OsString,
    pub(super) file: File,
}

/// Opens a container's current log file.
pub(crate) async fn open(log: &LogFile) -> io::Result<LogReader> {
    let path = log.path.clone();
    tokio::task::spawn_blocking(move || LogReader::open(&path)).await.map_err(io::Error::other)?
}

impl LogReader {
    /// The pod logs root is resolved as the host has it; pod directory, container directory and file must be what they seem.
    fn open(path: &Path) -> io::Result<LogReader> {
        let invalid = || io::Error::new(io::ErrorKind::InvalidInput, "the log path has too few parts");
        let container = path.parent().ok_or_else(invalid)?;
        let root = container.parent().and_then(Path::parent).ok_or_else(invalid)?;
        let name = path.file_name().ok_or_else(invalid)?.to_os_string();
        let directory = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root_fd = openat2(AT_FDCWD, root, OpenHow::new().flags(directory | OFlag::O_PATH))?;
        let relative = container.strip_prefix(root).map_err(|_| invalid())?;
        let directory = openat2(&root_fd, relative, beneath(directory | OFlag::O_RDONLY))?;
        let file = open_file(&directory, &name)?;
        Ok(LogReader { directory, name, file })
    }

    /// Opens what has the log's name now; None when that is the file in hand or nothing.
    pub(super) fn successor(&self) -> io::Result<Option<File>> {
        let file = match open_file(&self.directory, &self.name) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let (new, old) = (file.metadata()?, self.file.metadata()?);
        Ok(((new.ino(), new.dev()) != (old.ino(), old.dev())).then_some(file))
    }

    /// Events of everything in the log's directory.
    pub(super) fn watch(&self) -> io::Result<DirectoryWatch> {
        DirectoryWatch::new(self.directory.as_fd())
    }
}

fn beneath(flags: OFlag) -> OpenHow {
    OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS)
}

/// Only a regular file; a FIFO is not waited for.
fn open_file(directory: &OwnedFd, name: &std::ffi::OsStr) -> io::Result<File> {
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let file = File::from(openat2(directory, name, beneath(flags))?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the log is not a regular file"));
    }
    Ok(file)
}
