//! Termination messages: the file a container may leave behind, or the end of its log.
//!
//! The file is the container's to write, so it is opened without following a link and never read past a limit.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// The most that is taken from the file, and from the log.
const MAX_BYTES: u64 = 4096;
const MAX_LOG_BYTES: u64 = 2048;
const MAX_LOG_LINES: usize = 80;

/// The message in `file`; when that is empty and a log is given, the log's last lines. None when there is nothing.
pub(crate) fn read_message(file: &Path, log: Option<&Path>) -> Option<String> {
    let own = tail(file, MAX_BYTES).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    match own.filter(|text| !text.is_empty()) {
        Some(text) => Some(text),
        None => log_tail(log?),
    }
}

fn open(path: &Path) -> Option<File> {
    let flags = nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK | nix::libc::O_CLOEXEC;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).ok()?;
    file.metadata().ok()?.is_file().then_some(file)
}

fn tail(path: &Path, limit: u64) -> Option<Vec<u8>> {
    let mut file = open(path)?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(limit))).ok()?;
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// The text of the last lines of a CRI log.
fn log_tail(path: &Path) -> Option<String> {
    // Time stamp and stream name come on top of each line's text.
    let raw = tail(path, MAX_LOG_BYTES + 64 * MAX_LOG_LINES as u64)?;
    let raw = String::from_utf8_lossy(&raw);
    let lines: Vec<&str> = raw.lines().collect();
    let from = lines.len().saturating_sub(MAX_LOG_LINES);
    let mut text = String::new();
    for line in &lines[from..] {
        let mut parts = line.splitn(4, ' ');
        let (Some(_), Some("stdout" | "stderr"), Some(tag)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        text.push_str(parts.next().unwrap_or_default());
        if !tag.starts_with('P') {
            text.push('\n');
        }
    }
    let mut start = text.len().saturating_sub(MAX_LOG_BYTES as usize);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    let text = text[start..].to_owned();
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_wins_and_the_log_stands_in() {
        let dir = tempfile::tempdir().expect("a directory");
        let (file, log) = (dir.path().join("message"), dir.path().join("0.log"));
        std::fs::write(&file, "").unwrap();
        std::fs::write(
            &log,
            "2026-01-01T00:00:00Z stdout F one\n2026-01-01T00:00:01Z stderr P tw\n2026-01-01T00:00:01Z stderr F o\n",
        )
        .unwrap();
        assert_eq!(read_message(&file, None), None);
        assert_eq!(read_message(&file, Some(&log)).as_deref(), Some("one\ntwo\n"));
        std::fs::write(&file, "DONE").unwrap();
        assert_eq!(read_message(&file, Some(&log)).as_deref(), Some("DONE"));
    }

    #[test]
    fn only_the_end_of_a_large_file_is_taken_and_links_are_not_followed() {
        let dir = tempfile::tempdir().expect("a directory");
        let (file, link) = (dir.path().join("message"), dir.path().join("link"));
        std::fs::write(&file, "x".repeat(10_000) + "end").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let message = read_message(&file, None).expect("a message");
        assert_eq!(message.len(), 4096);
        assert!(message.ends_with("end"));
        assert_eq!(read_message(&link, None), None);
    }
}
