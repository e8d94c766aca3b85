//! The container's log file in CRI form: `<time> <stream> <F or P> <text>`, one line each.
//!
//! A line of more than 16 KiB is cut into parts tagged `P`, the last one `F`. What has not yet ended with a newline waits;
//! at end of stream the rest is written as `F`. How it gets to the disk is in `writer.rs`.

use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::{Mode, SFlag, fstat};

use super::clock;
use super::writer::{BACKLOG_BYTES_MAX, Done, Sink, Writer};
use crate::poll::{Poller, Token};

/// Longest text of one log line.
pub(crate) const LINE_BYTES_MAX: usize = 16 * 1024;

/// Which output a text came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    fn name(self) -> &'static [u8] {
        match self {
            Stream::Stdout => b"stdout",
            Stream::Stderr => b"stderr",
        }
    }
}

/// A log being written.
#[derive(Debug)]
pub(crate) struct Log {
    path: PathBuf,
    writer: Writer,
    pending: [Vec<u8>; 2],
    failing: bool,
    reopened: Vec<io::Result<()>>,
}

impl Log {
    /// Opens or makes the file; a symbolic link in its place is refused.
    pub(crate) fn open(path: &Path) -> io::Result<Log> {
        let name = CString::new(path.as_os_str().as_bytes())?;
        let file = open(&name)?;
        Ok(Log {
            path: path.into(),
            writer: Writer::new(LogFile { file, path: name })?,
            pending: [Vec::new(), Vec::new()],
            failing: false,
            reopened: Vec::new(),
        })
    }

    /// Has the path opened anew. The old file keeps all lines written so far; on failure it stays in use. What came of it
    /// is in [`Log::take_reopened`], in the order of the calls.
    pub(crate) fn reopen(&mut self) -> io::Result<()> {
        self.writer.reopen()
    }

    pub(crate) fn take_reopened(&mut self) -> Vec<io::Result<()>> {
        std::mem::take(&mut self.reopened)
    }

    /// Takes output as it came; every line that it completes is to be written.
    pub(crate) fn append(&mut self, stream: Stream, text: &[u8]) {
        let pending = &mut self.pending[stream as usize];
        self.writer.fill(|out| split(pending, stream, text, clock::now_nanos(), out));
    }

    /// The stream has ended: what lacks a newline is to be written, as a part of a line: readers add a newline to whole ones.
    pub(crate) fn finish(&mut self, stream: Stream) {
        let rest = std::mem::take(&mut self.pending[stream as usize]);
        if !rest.is_empty() {
            self.writer.fill(|out| push_line(out, clock::now_nanos(), stream, false, &[&rest]));
        }
    }

    /// Has written what is to be written. Events come as `token`.
    pub(crate) fn go_on(&mut self, poller: &Poller, token: Token) {
        let done = self.writer.go_on(poller, token);
        self.note(done);
    }

    /// Waits until everything is written; false if it takes longer than `limit`.
    pub(crate) fn flush(&mut self, poller: &Poller, token: Token, limit: Duration) -> bool {
        let (flushed, done) = self.writer.flush(poller, token, limit);
        self.note(done);
        flushed
    }

    /// A full disk costs log lines, never the container; it is said once.
    fn note(&mut self, done: Vec<Done>) {
        for done in done {
            match done {
                Done::Written(Ok(())) => self.failing = false,
                Done::Written(Err(errno)) => {
                    if !self.failing {
                        eprintln!("cannot write log {}: {errno}", self.path.display());
                    }
                    self.failing = true;
                }
                Done::Reopened(result) => {
                    self.failing &= result.is_err();
                    self.reopened.push(result.map_err(io::Error::from));
                }
            }
        }
    }

    /// No more fits into memory: the container is to wait.
    pub(crate) fn is_full(&self) -> bool {
        self.writer.backlog_bytes() >= BACKLOG_BYTES_MAX
    }

    /// There is room for much more.
    pub(crate) fn has_room(&self) -> bool {
        self.writer.backlog_bytes() < BACKLOG_BYTES_MAX / 2
    }

    /// Everything is written.
    pub(crate) fn is_idle(&self) -> bool {
        self.writer.is_idle()
    }

    /// Bytes that are only in memory.
    pub(crate) fn backlog_bytes(&self) -> usize {
        self.writer.backlog_bytes()
    }

    /// Nobody will read it any more and there is no memory for it: drops all but what is being written. Returns how much.
    pub(crate) fn abandon(&mut self) -> usize {
        self.writer.abandon()
    }

    /// Events come as `token` from now on.
    pub(crate) fn watch_as(&self, poller: &Poller, token: Token) {
        self.writer.watch_as(poller, token);
    }

    /// Gives memory back.
    pub(crate) fn rest(&mut self, poller: &Poller) {
        self.writer.rest(poller);
    }
}

/// The file, and the name to open it by again.
struct LogFile {
    file: OwnedFd,
    path: CString,
}

impl Sink for LogFile {
    fn write(&mut self, mut bytes: &[u8]) -> nix::Result<()> {
        while !bytes.is_empty() {
            match nix::unistd::write(&self.file, bytes) {
                Ok(0) => return Err(Errno::EIO),
                Ok(count) => bytes = &bytes[count..],
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    fn reopen(&mut self) -> nix::Result<()> {
        self.file = open(&self.path)?;
        Ok(())
    }
}

/// Only a regular file will do.
fn open(path: &CString) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_WRONLY | OFlag::O_APPEND | OFlag::O_CREAT | OFlag::O_NOFOLLOW;
    // Not blocking: a pipe in the file's place would have the caller wait for a reader.
    let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
    let file = nix::fcntl::open(path.as_c_str(), flags, Mode::from_bits_truncate(0o640))?;
    let kind = SFlag::from_bits_truncate(fstat(&file)?.st_mode & SFlag::S_IFMT.bits());
    if kind == SFlag::S_IFREG { Ok(file) } else { Err(Errno::EINVAL) }
}

/// Cuts `text`, preceded by what is pending, into complete log lines; what remains is pending.
fn split(pending: &mut Vec<u8>, stream: Stream, text: &[u8], nanos: i64, out: &mut Vec<u8>) {
    let mut rest = text;
    while !rest.is_empty() {
        let room = LINE_BYTES_MAX - pending.len();
        match rest.iter().take(room + 1).position(|byte| *byte == b'\n') {
            Some(end) => {
                push_line(out, nanos, stream, true, &[pending, &rest[..end]]);
                pending.clear();
                rest = &rest[end + 1..];
            }
            // A line of just the maximum waits for its newline, so that it is not followed by an empty part.
            None if rest.len() > room => {
                push_line(out, nanos, stream, false, &[pending, &rest[..room]]);
                pending.clear();
                rest = &rest[room..];
            }
            None => {
                pending.extend_from_slice(rest);
                rest = &[];
            }
        }
    }
    if pending.is_empty() {
        // Most containers are quiet most of the time: give the memory back.
        *pending = Vec::new();
    }
}

fn push_line(out: &mut Vec<u8>, nanos: i64, stream: Stream, full: bool, parts: &[&[u8]]) {
    clock::push_rfc3339(nanos, out);
    out.push(b' ');
    out.extend_from_slice(stream.name());
    out.extend_from_slice(if full { b" F " } else { b" P " });
    for part in parts {
        out.extend_from_slice(part);
    }
    out.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(chunks: &[&[u8]]) -> (Vec<(String, usize)>, Vec<u8>) {
        let (mut pending, mut out) = (Vec::new(), Vec::new());
        for chunk in chunks {
            split(&mut pending, Stream::Stdout, chunk, 0, &mut out);
        }
        let text = String::from_utf8(out).unwrap();
        let parsed = text.lines().map(|line| {
            let mut fields = line.splitn(4, ' ').skip(2);
            (fields.next().unwrap().to_owned(), fields.next().unwrap_or_default().len())
        });
        (parsed.collect(), pending)
    }

    #[test]
    fn lines_are_joined_over_reads_and_a_partial_one_waits() {
        let (lines, pending) = lines(&[b"a\nbb", b"b\n\nrest"]);
        assert_eq!(lines, [("F".into(), 1), ("F".into(), 3), ("F".into(), 0)]);
        assert_eq!(pending, b"rest");
    }

    #[test]
    fn a_long_line_is_cut_into_parts_and_none_is_empty() {
        let exact = [vec![b'x'; LINE_BYTES_MAX], b"\n".to_vec()].concat();
        assert_eq!(lines(&[&exact]).0, [("F".into(), LINE_BYTES_MAX)]);
        let longer = [vec![b'x'; 2 * LINE_BYTES_MAX + 5], b"\n".to_vec()].concat();
        let expected = [("P".into(), LINE_BYTES_MAX), ("P".into(), LINE_BYTES_MAX), ("F".into(), 5)];
        assert_eq!(lines(&[&longer]).0, expected);
        let bytewise: Vec<&[u8]> = longer.chunks(1).collect();
        assert_eq!(lines(&bytewise).0, expected);
    }

    #[test]
    fn a_rotated_log_loses_no_line_and_a_link_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (path, old) = (dir.path().join("0.log"), dir.path().join("0.log.old"));
        let (mut log, poller) = (Log::open(&path).unwrap(), Poller::new().unwrap());
        let flush = |log: &mut Log| assert!(log.flush(&poller, Token::Log(0), Duration::from_secs(20)));
        log.append(Stream::Stdout, b"one\ntw");
        flush(&mut log);
        std::fs::rename(&path, &old).unwrap();
        log.append(Stream::Stdout, b"o\n");
        log.reopen().unwrap();
        log.append(Stream::Stderr, b"three");
        log.finish(Stream::Stderr);
        flush(&mut log);
        assert!(matches!(log.take_reopened()[..], [Ok(())]));
        assert!(std::fs::read_to_string(&old).unwrap().ends_with("stdout F two\n"));
        assert!(std::fs::read_to_string(&path).unwrap().ends_with("stderr P three\n"));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(Log::open(&link).is_err());
    }
}
