//! One line of a CRI log: `<RFC 3339 time> <stream> <tags> <content>`. Pure.

use jiff::Timestamp;

/// Which stream a line was written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

/// A parsed line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Line<'a> {
    /// As it stands in the file.
    pub time: &'a [u8],
    pub stream: Stream,
    /// False for a piece of a line that goes on.
    pub full: bool,
    pub content: &'a [u8],
}

impl Line<'_> {
    pub fn timestamp(&self) -> Option<Timestamp> {
        std::str::from_utf8(self.time).ok()?.parse().ok()
    }
}

/// Parses a line given without its newline; None when it is not one.
pub(crate) fn parse(line: &[u8]) -> Option<Line<'_>> {
    let (time, rest) = word(line)?;
    let (stream, rest) = word(rest)?;
    // A line with empty content may lack the last blank.
    let (tags, content) = word(rest).unwrap_or((rest, &[]));
    let stream = match stream {
        b"stdout" => Stream::Stdout,
        b"stderr" => Stream::Stderr,
        _ => return None,
    };
    let full = match tags.split(|byte| *byte == b':').next()? {
        b"F" => true,
        b"P" => false,
        _ => return None,
    };
    let dated = time.len() >= 20 && time[0].is_ascii_digit() && time.get(10) == Some(&b'T');
    dated.then_some(Line { time, stream, full, content })
}

fn word(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let blank = text.iter().position(|byte| *byte == b' ')?;
    Some((&text[..blank], &text[blank + 1..]))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines_are_taken_apart() {
        let line = parse(b"2026-01-02T03:04:05.123456789Z stdout F hello  world ").unwrap();
        assert_eq!((line.stream, line.full, line.content), (Stream::Stdout, true, &b"hello  world "[..]));
        assert_eq!(line.timestamp().unwrap().to_string(), "2026-01-02T03:04:05.123456789Z");
        let piece = parse(b"2026-01-02T03:04:05.1+02:00 stderr P:x part").unwrap();
        assert_eq!((piece.stream, piece.full, piece.content), (Stream::Stderr, false, &b"part"[..]));
        assert_eq!(parse(b"2026-01-02T03:04:05Z stdout F ").unwrap().content, b"");
        assert_eq!(parse(b"2026-01-02T03:04:05Z stdout F").unwrap().content, b"");
    }

    #[test]
    fn other_lines_are_not_lines() {
        for text in ["", "hello", "x stdout F y", "2026-01-02T03:04:05Z stdin F y", "2026-01-02T03:04:05Z stdout Q y"] {
            assert_eq!(parse(text.as_bytes()), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = parse(&bytes);
        }
    }
}
