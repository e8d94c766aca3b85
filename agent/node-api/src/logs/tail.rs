//! Where the last lines of a log begin, found from its end.

use std::io;
use std::os::unix::fs::FileExt;

use super::line;

const BLOCK_BYTES: u64 = 64 * 1024;

/// The offset of the last `wanted` lines of the first `length` bytes. A line in pieces counts as one.
pub(crate) fn start_of_last(file: &impl ReadAt, length: u64, wanted: u64) -> io::Result<u64> {
    if wanted == 0 {
        return Ok(length);
    }
    // `tail` holds the file from `from` up to the start of the earliest line that was looked at.
    let (mut from, mut tail) = (length, Vec::new());
    let mut found = 0u64;
    let mut start = length;
    loop {
        // Whole lines in `tail` from its end; its first may lack its beginning.
        while let Some((begin, text)) = last_line(&tail, from == 0) {
            let ends_line = line::parse(text).is_none_or(|line| line.full);
            if ends_line || start == length {
                if found == wanted {
                    return Ok(start);
                }
                found += 1;
            }
            start = from + begin as u64;
            tail.truncate(begin);
        }
        if from == 0 {
            return Ok(0);
        }
        let block = from.min(BLOCK_BYTES);
        let mut earlier = vec![0; block as usize];
        file.read_exact_at(&mut earlier, from - block)?;
        earlier.append(&mut tail);
        tail = earlier;
        from -= block;
    }
}

/// The last line of `text` and where it begins; None when its beginning is not in `text`.
fn last_line(text: &[u8], is_whole: bool) -> Option<(usize, &[u8])> {
    if text.is_empty() {
        return None;
    }
    let body = text.strip_suffix(b"\n").unwrap_or(text);
    match body.iter().rposition(|byte| *byte == b'\n') {
        Some(newline) => Some((newline + 1, &body[newline + 1..])),
        None => is_whole.then_some((0, body)),
    }
}

/// Reading at an offset.
pub(crate) trait ReadAt {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}

impl ReadAt for std::fs::File {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buffer, offset)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use proptest::prelude::*;

    use super::*;

    struct Memory(Vec<u8>, Cell<usize>);

    impl ReadAt for Memory {
        fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
            self.1.set(self.1.get() + buffer.len());
            buffer.copy_from_slice(&self.0[offset as usize..offset as usize + buffer.len()]);
            Ok(())
        }
    }

    fn tail(text: &str, wanted: u64) -> String {
        let memory = Memory(text.as_bytes().to_vec(), Cell::new(0));
        let start = start_of_last(&memory, text.len() as u64, wanted).unwrap();
        text[start as usize..].to_string()
    }

    fn entry(tag: &str, content: &str) -> String {
        format!("2026-01-01T00:00:01Z stdout {tag} {content}\n")
    }

    #[test]
    fn the_last_lines_are_found() {
        let text: String = (0..10).map(|n| entry("F", &n.to_string())).collect();
        assert_eq!(tail(&text, 2), entry("F", "8") + &entry("F", "9"));
        assert_eq!(tail(&text, 0), "");
        assert_eq!(tail(&text, 100), text);
        assert_eq!(tail("", 5), "");
    }

    #[test]
    fn a_line_in_pieces_counts_once() {
        let pieces = entry("P", "a") + &entry("P", "b") + &entry("F", "c");
        let text = entry("F", "first") + &pieces;
        assert_eq!(tail(&text, 1), pieces);
        let unfinished = entry("F", "first") + &entry("F", "second") + &entry("P", "a") + &entry("P", "b");
        assert_eq!(tail(&unfinished, 1), entry("P", "a") + &entry("P", "b"));
        assert_eq!(tail(&unfinished, 2), entry("F", "second") + &entry("P", "a") + &entry("P", "b"));
    }

    #[test]
    fn a_large_file_is_not_read_whole() {
        let text: String = (0..200_000).map(|n| entry("F", &n.to_string())).collect();
        let memory = Memory(text.clone().into_bytes(), Cell::new(0));
        let start = start_of_last(&memory, text.len() as u64, 10).unwrap();
        assert_eq!(text[start as usize..].lines().count(), 10);
        assert_eq!(memory.1.get(), BLOCK_BYTES as usize);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Lines long enough that some tails reach over several blocks.
        #[test]
        fn it_agrees_with_reading_from_the_start(lengths in prop::collection::vec(0usize..6000, 0..60), wanted in 0u64..70) {
            let lines: Vec<String> = lengths.iter().map(|length| entry("F", &"x".repeat(*length))).collect();
            let skipped = lines.len().saturating_sub(wanted as usize);
            prop_assert_eq!(tail(&lines.concat(), wanted), lines[skipped..].concat());
        }
    }
}
