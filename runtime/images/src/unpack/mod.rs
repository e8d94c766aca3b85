//! Unpacks one layer: a stream of bytes that nobody vouches for becomes a directory, and nothing outside it is touched.
//!
//! Every path is resolved by the kernel relative to the layer's root (`openat2` with `RESOLVE_IN_ROOT`), so links, be they
//! absolute, dangling or climbing, lead to places inside the layer or to an error. What the archive claims about sizes is
//! checked against limits before memory or disk is spent.

mod entries;
mod tree;

use std::io::{self, BufReader, Read};
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::ImageError;
pub(crate) use tree::Tree;

/// Bounds on what one layer may hold.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) entries: u64,
    pub(crate) bytes: u64,
    /// Unpacked bytes for each packed byte, looked at once [`Limits::ratio_from_bytes`] are unpacked.
    pub(crate) ratio: u64,
    pub(crate) ratio_from_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { entries: 2_000_000, bytes: 128 << 30, ratio: 1000, ratio_from_bytes: 256 << 20 }
    }
}

/// Whose files and device entries are taken as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    /// A layer: owners, whiteouts, extended attributes.
    Layer,
    /// An archive of blobs: plain files and directories are all that counts.
    Blobs,
}

/// What was unpacked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unpacked {
    /// Digest of the bytes as they came.
    pub(crate) digest: String,
    /// Digest of the uncompressed archive.
    pub(crate) diff_id: String,
    pub(crate) packed_bytes: u64,
    pub(crate) bytes: u64,
    pub(crate) entries: u64,
}

/// Unpacks `source`, plain or compressed by gzip or zstd, into the empty directory `target`. Reads to the end.
pub(crate) fn unpack(
    source: impl Read,
    target: &Path,
    content: Content,
    limits: Limits,
) -> Result<Unpacked, ImageError> {
    let mut packed = Counting::new(source);
    let mut start = [0; 4];
    let got = read_start(&mut packed, &mut start)?;
    let whole = io::Cursor::new(start[..got].to_vec()).chain(&mut packed);
    let whole = BufReader::with_capacity(128 * 1024, whole);
    let (diff_id, bytes, entries) = match start {
        [0x1f, 0x8b, ..] => extract(flate2::bufread::MultiGzDecoder::new(whole), target, content, limits)?,
        [0x28, 0xb5, 0x2f, 0xfd] => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(whole).map_err(damaged)?;
            // 128 MiB of window is the most any compressor uses by default.
            decoder.window_log_max(27).map_err(damaged)?;
            extract(decoder, target, content, limits)?
        }
        _ => extract(whole, target, content, limits)?,
    };
    // What follows the archive still belongs to the digest.
    io::copy(&mut packed, &mut io::sink()).map_err(damaged)?;
    let packed_bytes = packed.count;
    check_ratio(bytes, packed_bytes, limits)?;
    Ok(Unpacked { digest: packed.finish(), diff_id, packed_bytes, bytes, entries })
}

fn extract(
    source: impl Read,
    target: &Path,
    content: Content,
    limits: Limits,
) -> Result<(String, u64, u64), ImageError> {
    let mut plain = Bounded { inner: Counting::new(source), limit: limits.bytes };
    let tree = Tree::open(target)?;
    let (bytes, entries) = entries::unpack_all(&mut plain, &tree, content, limits)?;
    io::copy(&mut plain, &mut io::sink()).map_err(damaged)?;
    Ok((plain.inner.finish(), bytes, entries))
}

fn check_ratio(bytes: u64, packed: u64, limits: Limits) -> Result<(), ImageError> {
    if bytes > limits.ratio_from_bytes && bytes / limits.ratio > packed {
        return Err(ImageError::LimitExceeded { what: "compression ratio" });
    }
    Ok(())
}

fn read_start(source: &mut impl Read, start: &mut [u8; 4]) -> Result<usize, ImageError> {
    let mut got = 0;
    while got < start.len() {
        match source.read(&mut start[got..]).map_err(damaged)? {
            0 => break,
            count => got += count,
        }
    }
    Ok(got)
}

/// An I/O error while reading: the limits speak through one of their own.
pub(crate) fn damaged(error: io::Error) -> ImageError {
    if error.kind() == io::ErrorKind::FileTooLarge {
        return ImageError::LimitExceeded { what: "unpacked size" };
    }
    ImageError::Damaged { what: error.to_string() }
}

/// Hashes and counts what passes.
struct Counting<R> {
    inner: R,
    hash: Sha256,
    count: u64,
}

impl<R> Counting<R> {
    fn new(inner: R) -> Self {
        Counting { inner, hash: Sha256::new(), count: 0 }
    }

    fn finish(self) -> String {
        digest_of(self.hash)
    }
}

impl<R: Read> Read for Counting<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hash.update(&buffer[..count]);
        self.count += count as u64;
        Ok(count)
    }
}

/// Ends in an error past a number of bytes, whatever the archive's headers say.
struct Bounded<R> {
    inner: Counting<R>,
    limit: u64,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.inner.count > self.limit {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.inner.read(buffer)
    }
}

/// `sha256:` and the hexadecimal digits.
pub(crate) fn digest_of(hash: Sha256) -> String {
    let mut text = String::with_capacity(71);
    text.push_str("sha256:");
    for byte in hash.finalize() {
        text.push_str(&format!("{byte:02x}"));
    }
    text
}
