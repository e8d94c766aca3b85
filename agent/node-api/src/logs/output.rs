//! From log lines to what the client is sent: filters, timestamps, joined pieces, limits. Pure.

use bytes::{Bytes, BytesMut};
use jiff::Timestamp;

use super::line::{self, Stream};

/// A line longer than this that does not end is skipped.
const LINE_LIMIT_BYTES: usize = 1024 * 1024;

/// Which streams are wanted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Streams {
    #[default]
    All,
    Stdout,
    Stderr,
}

/// What a log request asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct LogOptions {
    pub follow: bool,
    pub timestamps: bool,
    pub tail_lines: Option<u64>,
    pub since: Option<Timestamp>,
    pub limit_bytes: Option<u64>,
    pub streams: Streams,
}

/// Turns the bytes of a log file into output.
pub(crate) struct Renderer {
    timestamps: bool,
    since: Option<Timestamp>,
    streams: Streams,
    left_bytes: Option<u64>,
    /// The beginning of a line whose end has not been read yet.
    pending: BytesMut,
    skipping: bool,
    /// Whether the last piece of each stream went on.
    continued: [bool; 2],
}

impl Renderer {
    pub fn new(options: &LogOptions) -> Self {
        Self {
            timestamps: options.timestamps,
            since: options.since,
            streams: options.streams,
            left_bytes: options.limit_bytes,
            pending: BytesMut::new(),
            skipping: false,
            continued: [false; 2],
        }
    }

    /// Whether the limit is reached: nothing more will come out.
    pub fn is_full(&self) -> bool {
        self.left_bytes == Some(0)
    }

    /// Another file begins: an unfinished line of the last one is dropped.
    pub fn new_file(&mut self) {
        self.pending.clear();
        self.skipping = false;
    }

    /// Takes the next bytes of the file; gives what is to be sent.
    pub fn push(&mut self, mut data: &[u8]) -> Bytes {
        let mut out = BytesMut::new();
        while let Some(end) = data.iter().position(|byte| *byte == b'\n') {
            let (head, tail) = data.split_at(end);
            data = &tail[1..];
            if std::mem::take(&mut self.skipping) {
                continue;
            }
            if self.pending.is_empty() {
                self.line(head, &mut out);
            } else {
                self.pending.extend_from_slice(head);
                let whole = std::mem::take(&mut self.pending);
                self.line(&whole, &mut out);
            }
            if self.is_full() {
                return out.freeze();
            }
        }
        if !self.skipping {
            self.pending.extend_from_slice(data);
            if self.pending.len() > LINE_LIMIT_BYTES {
                self.pending.clear();
                self.skipping = true;
            }
        }
        out.freeze()
    }

    fn line(&mut self, line: &[u8], out: &mut BytesMut) {
        let Some(line) = line::parse(line) else { return };
        let wanted = match self.streams {
            Streams::All => true,
            Streams::Stdout => line.stream == Stream::Stdout,
            Streams::Stderr => line.stream == Stream::Stderr,
        };
        if !wanted {
            return;
        }
        if let Some(since) = self.since {
            match line.timestamp() {
                // Lines come in order: the rest is wanted too.
                Some(time) if time >= since => self.since = None,
                _ => return,
            }
        }
        let continues = std::mem::replace(&mut self.continued[line.stream as usize], !line.full);
        if self.timestamps && !continues {
            self.put(line.time, out);
            self.put(b" ", out);
        }
        self.put(line.content, out);
        if line.full {
            self.put(b"\n", out);
        }
    }

    fn put(&mut self, data: &[u8], out: &mut BytesMut) {
        let length = match &mut self.left_bytes {
            None => data.len(),
            Some(left) => {
                let length = data.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= length as u64;
                length
            }
        };
        out.extend_from_slice(&data[..length]);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LOG: &[u8] = b"2026-01-01T00:00:01Z stdout F one\n2026-01-01T00:00:02Z stdout P tw\n\
        2026-01-01T00:00:03Z stderr F err\n2026-01-01T00:00:03Z stdout F o\nrubbish\n2026-01-01T00:00:04Z stdout F \n";

    fn render(options: LogOptions, data: &[u8]) -> String {
        String::from_utf8(Renderer::new(&options).push(data).to_vec()).unwrap()
    }

    #[test]
    fn pieces_are_joined_and_rubbish_is_left_out() {
        let stdout = LogOptions { streams: Streams::Stdout, ..Default::default() };
        assert_eq!(render(stdout, LOG), "one\ntwo\n\n");
        let stderr = LogOptions { streams: Streams::Stderr, ..Default::default() };
        assert_eq!(render(stderr, LOG), "err\n");
    }

    #[test]
    fn timestamps_stand_before_whole_lines() {
        let options = LogOptions { timestamps: true, streams: Streams::Stdout, ..Default::default() };
        let expected = "2026-01-01T00:00:01Z one\n2026-01-01T00:00:02Z two\n2026-01-01T00:00:04Z \n";
        assert_eq!(render(options, LOG), expected);
    }

    #[test]
    fn since_and_limit_cut() {
        let since = Some("2026-01-01T00:00:03Z".parse().unwrap());
        assert_eq!(render(LogOptions { since, ..Default::default() }, LOG), "err\no\n\n");
        let mut renderer = Renderer::new(&LogOptions { limit_bytes: Some(5), ..Default::default() });
        assert_eq!(&renderer.push(LOG)[..], b"one\nt");
        assert!(renderer.is_full());
    }

    #[test]
    fn a_line_without_end_takes_no_memory() {
        let mut renderer = Renderer::new(&LogOptions::default());
        for _ in 0..100 {
            assert!(renderer.push(&[b'x'; 100_000]).is_empty());
            assert!(renderer.pending.len() <= LINE_LIMIT_BYTES + 100_000);
        }
        assert_eq!(&renderer.push(b"x\n2026-01-01T00:00:01Z stdout F one\n")[..], b"one\n");
    }

    proptest! {
        #[test]
        fn it_does_not_matter_how_the_file_is_cut(cuts in prop::collection::vec(0usize..200, 0..8)) {
            let whole = render(LogOptions::default(), LOG);
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(LOG.len())).collect();
            cuts.extend([0, LOG.len()]);
            cuts.sort();
            let mut renderer = Renderer::new(&LogOptions::default());
            let pieces: Vec<u8> = cuts.windows(2).flat_map(|pair| renderer.push(&LOG[pair[0]..pair[1]]).to_vec()).collect();
            prop_assert_eq!(String::from_utf8(pieces).unwrap(), whole);
        }
    }
}
