//! Header blocks: name/value pairs in one zlib stream a direction, primed with the protocol's dictionary.
//!
//! What comes out of the decompressor is bounded, so that a small frame cannot become a large allocation.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::dictionary::DICTIONARY;

/// Bytes of one decompressed block.
const BLOCK_LIMIT: usize = 64 * 1024;
/// Pairs of one block.
const PAIR_LIMIT: u32 = 128;

/// Header pairs; names are lower case.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Headers(pub Vec<(String, String)>);

impl Headers {
    /// The first value of a name (given in lower case).
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(candidate, _)| candidate == name).map(|(_, value)| value.as_str())
    }

    #[cfg(test)]
    pub fn of(pairs: &[(&str, &str)]) -> Headers {
        Headers(pairs.iter().map(|(name, value)| (name.to_ascii_lowercase(), value.to_string())).collect())
    }
}

/// What is wrong with a header block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HeaderError {
    #[error("header block does not decompress")]
    Compression,
    #[error("header block is too large")]
    TooLarge,
    #[error("header block is malformed")]
    Malformed,
}

/// Decompresses the blocks of one direction, in order.
pub(crate) struct HeaderReader {
    inflate: Decompress,
}

impl HeaderReader {
    pub fn new() -> Self {
        Self { inflate: Decompress::new(true) }
    }

    pub fn read(&mut self, block: &[u8]) -> Result<Headers, HeaderError> {
        parse(&self.decompress(block)?)
    }

    fn decompress(&mut self, mut input: &[u8]) -> Result<Vec<u8>, HeaderError> {
        let mut out = Vec::new();
        let mut chunk = [0u8; 4096];
        loop {
            let (before_in, before_out) = (self.inflate.total_in(), self.inflate.total_out());
            let step = self.inflate.decompress(input, &mut chunk, FlushDecompress::Sync);
            let used = (self.inflate.total_in() - before_in) as usize;
            let made = (self.inflate.total_out() - before_out) as usize;
            input = input.get(used..).ok_or(HeaderError::Compression)?;
            if out.len() + made > BLOCK_LIMIT {
                return Err(HeaderError::TooLarge);
            }
            out.extend_from_slice(&chunk[..made]);
            match step {
                Err(error) if error.needs_dictionary().is_some() => {
                    self.inflate.set_dictionary(DICTIONARY).map_err(|_| HeaderError::Compression)?;
                }
                Err(_) => return Err(HeaderError::Compression),
                // The stream goes on for as long as the session does.
                Ok(Status::StreamEnd) => return Err(HeaderError::Compression),
                Ok(_) if input.is_empty() && made < chunk.len() => return Ok(out),
                Ok(_) if used == 0 && made == 0 => return Err(HeaderError::Compression),
                Ok(_) => {}
            }
        }
    }
}

fn parse(mut block: &[u8]) -> Result<Headers, HeaderError> {
    let count = number(&mut block)?;
    if count > PAIR_LIMIT {
        return Err(HeaderError::TooLarge);
    }
    let mut pairs = Vec::new();
    for _ in 0..count {
        let name = text(&mut block)?.to_ascii_lowercase();
        let value = text(&mut block)?;
        pairs.push((name, value));
    }
    if block.is_empty() { Ok(Headers(pairs)) } else { Err(HeaderError::Malformed) }
}

fn number(input: &mut &[u8]) -> Result<u32, HeaderError> {
    let (head, rest) = input.split_first_chunk::<4>().ok_or(HeaderError::Malformed)?;
    *input = rest;
    Ok(u32::from_be_bytes(*head))
}

fn text(input: &mut &[u8]) -> Result<String, HeaderError> {
    let length = number(input)? as usize;
    let (text, rest) = input.split_at_checked(length).ok_or(HeaderError::Malformed)?;
    *input = rest;
    String::from_utf8(text.to_vec()).map_err(|_| HeaderError::Malformed)
}

/// Compresses the blocks of one direction, in order.
pub(crate) struct HeaderWriter {
    deflate: Compress,
}

impl HeaderWriter {
    pub fn new() -> Self {
        let mut deflate = Compress::new(Compression::fast(), true);
        deflate.set_dictionary(DICTIONARY).expect("a fresh compressor takes a dictionary");
        Self { deflate }
    }

    pub fn write(&mut self, headers: &Headers) -> Vec<u8> {
        let mut plain = Vec::new();
        plain.extend_from_slice(&(headers.0.len() as u32).to_be_bytes());
        for (name, value) in &headers.0 {
            for text in [name, value] {
                plain.extend_from_slice(&(text.len() as u32).to_be_bytes());
                plain.extend_from_slice(text.as_bytes());
            }
        }
        self.compress(&plain)
    }

    fn compress(&mut self, mut input: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(input.len() + 64);
        loop {
            let before = self.deflate.total_in();
            out.reserve(256);
            self.deflate
                .compress_vec(input, &mut out, FlushCompress::Sync)
                .expect("compressing into a growing buffer does not fail");
            input = &input[(self.deflate.total_in() - before) as usize..];
            if input.is_empty() && out.len() < out.capacity() {
                return out;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn blocks_come_back_in_order() {
        let (mut writer, mut reader) = (HeaderWriter::new(), HeaderReader::new());
        for round in 0..50 {
            let headers = Headers::of(&[("streamType", "stdin"), ("requestID", &round.to_string()), ("empty", "")]);
            assert_eq!(reader.read(&writer.write(&headers)).unwrap(), headers);
        }
    }

    #[test]
    fn a_block_written_by_zlib_itself_is_read() {
        // zlib.compressobj(zdict=DICTIONARY) of {"streamtype": "stdin"}, flushed with Z_SYNC_FLUSH.
        let block = include_bytes!("testdata/python-zlib-block.bin");
        let headers = HeaderReader::new().read(block).unwrap();
        assert_eq!(headers, Headers::of(&[("streamtype", "stdin"), ("port", "8080")]));
    }

    #[test]
    fn a_bomb_is_refused() {
        let mut writer = HeaderWriter::new();
        let block = writer.write(&Headers::of(&[("a", &"x".repeat(10_000_000))]));
        assert!(block.len() < 200_000);
        assert_eq!(HeaderReader::new().read(&block).unwrap_err(), HeaderError::TooLarge);
    }

    proptest! {
        #[test]
        fn any_headers_survive(pairs in prop::collection::vec(("[a-z]{1,20}", ".{0,200}"), 0..20)) {
            let headers = Headers(pairs);
            let block = HeaderWriter::new().write(&headers);
            prop_assert_eq!(HeaderReader::new().read(&block).unwrap(), headers);
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = HeaderReader::new().read(&bytes);
            let _ = parse(&bytes);
        }
    }
}
