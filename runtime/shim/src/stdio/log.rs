//! The container's log file in CRI form: `<time> <stream> <F or P> <text>`, one line each.
//!
//! A line of more than 16 KiB is cut into parts tagged `P`, the last one `F`. What has not yet ended with a newline waits;
//! at end of stream the rest is written as `F`.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::clock;

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
    file: File,
    pending: [Vec<u8>; 2],
    failing: bool,
}

impl Log {
    /// Opens or makes the file; a symbolic link in its place is refused.
    pub(crate) fn open(path: &Path) -> io::Result<Log> {
        Ok(Log { path: path.into(), file: open(path)?, pending: [Vec::new(), Vec::new()], failing: false })
    }

    /// Opens the path anew. The old file keeps all lines written so far; on failure it stays in use.
    pub(crate) fn reopen(&mut self) -> io::Result<()> {
        self.file = open(&self.path)?;
        self.failing = false;
        Ok(())
    }

    /// Takes output as it came; writes every line that it completes.
    pub(crate) fn append(&mut self, stream: Stream, text: &[u8]) {
        let mut lines = Vec::new();
        split(&mut self.pending[stream as usize], stream, text, clock::now_nanos(), &mut lines);
        self.write(&lines);
    }

    /// The stream has ended: writes what lacks a newline.
    pub(crate) fn finish(&mut self, stream: Stream) {
        let rest = std::mem::take(&mut self.pending[stream as usize]);
        if !rest.is_empty() {
            let mut lines = Vec::new();
            push_line(&mut lines, clock::now_nanos(), stream, true, &[&rest]);
            self.write(&lines);
        }
    }

    /// A full disk costs log lines, never the container; it is said once.
    fn write(&mut self, lines: &[u8]) {
        if lines.is_empty() {
            return;
        }
        match self.file.write_all(lines) {
            Ok(()) => self.failing = false,
            Err(error) => {
                if !self.failing {
                    eprintln!("cannot write log {}: {error}", self.path.display());
                }
                self.failing = true;
            }
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    let flags = nix::libc::O_NOFOLLOW | nix::libc::O_CLOEXEC | nix::libc::O_NOCTTY;
    let file = OpenOptions::new().append(true).create(true).mode(0o640).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    Ok(file)
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
        let mut log = Log::open(&path).unwrap();
        log.append(Stream::Stdout, b"one\ntw");
        std::fs::rename(&path, &old).unwrap();
        log.append(Stream::Stdout, b"o\n");
        log.reopen().unwrap();
        log.append(Stream::Stderr, b"three");
        log.finish(Stream::Stderr);
        assert!(std::fs::read_to_string(&old).unwrap().ends_with("stdout F two\n"));
        assert!(std::fs::read_to_string(&path).unwrap().ends_with("stderr F three\n"));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(Log::open(&link).is_err());
    }
}
