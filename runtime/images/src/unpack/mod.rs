//! Unpacks one layer: a stream of bytes that nobody vouches for becomes a directory, and nothing outside it is touched.
//!
//! Every path is resolved by the kernel relative to the layer's root (`openat2` with `RESOLVE_IN_ROOT`), so links, be they
//! absolute, dangling or climbing, lead to places inside the layer or to an error. What the archive claims about sizes is
//! checked against limits before memory or disk is spent.

mod entries;
mod tree;

use std::cell::Cell;
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
        Limits { entries: 2_000_000, bytes: 128 << 30, ratio: 500, ratio_from_bytes: 1 << 30 }
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
    let packed_count = Cell::new(0);
    let mut packed = Counting::new(source, &packed_count);
    let mut start = [0; 4];
    let got = read_start(&mut packed, &mut start)?;
    let whole = io::Cursor::new(start[..got].to_vec()).chain(&mut packed);
    let whole = BufReader::with_capacity(128 * 1024, whole);
    let bounds = Bounds { limits, packed: &packed_count };
    let (diff_id, bytes, entries) = match start {
        [0x1f, 0x8b, ..] => extract(flate2::bufread::MultiGzDecoder::new(whole), target, content, bounds)?,
        [0x28, 0xb5, 0x2f, 0xfd] => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(whole).map_err(damaged)?;
            // 128 MiB of window is the most any compressor uses by default.
            decoder.window_log_max(27).map_err(damaged)?;
            extract(decoder, target, content, bounds)?
        }
        _ => extract(whole, target, content, bounds)?,
    };
    // What follows the archive still belongs to the digest.
    io::copy(&mut packed, &mut io::sink()).map_err(damaged)?;
    Ok(Unpacked { digest: packed.finish(), diff_id, packed_bytes: packed_count.get(), bytes, entries })
}

#[derive(Clone, Copy)]
struct Bounds<'a> {
    limits: Limits,
    packed: &'a Cell<u64>,
}

fn extract(
    source: impl Read,
    target: &Path,
    content: Content,
    bounds: Bounds<'_>,
) -> Result<(String, u64, u64), ImageError> {
    let unpacked = Cell::new(0);
    let mut plain = Bounded { inner: Counting::new(source, &unpacked), bounds };
    let tree = Tree::open(target)?;
    let (bytes, entries) = entries::unpack_all(&mut plain, &tree, content, bounds.limits)?;
    io::copy(&mut plain, &mut io::sink()).map_err(damaged)?;
    Ok((plain.inner.finish(), bytes, entries))
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
    match error.kind() {
        io::ErrorKind::FileTooLarge => ImageError::LimitExceeded { what: "unpacked size" },
        io::ErrorKind::QuotaExceeded => ImageError::LimitExceeded { what: "compression ratio" },
        _ => ImageError::Damaged { what: error.to_string() },
    }
}

/// Hashes and counts what passes.
struct Counting<'a, R> {
    inner: R,
    hash: Sha256,
    count: &'a Cell<u64>,
}

impl<'a, R> Counting<'a, R> {
    fn new(inner: R, count: &'a Cell<u64>) -> Self {
        Counting { inner, hash: Sha256::new(), count }
    }

    fn finish(self) -> String {
        digest_of(self.hash)
    }
}

impl<R: Read> Read for Counting<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hash.update(&buffer[..count]);
        self.count.set(self.count.get() + count as u64);
        Ok(count)
    }
}

/// Ends in an error past a number of bytes, or of bytes for each packed one, whatever the archive's headers say.
struct Bounded<'a, R> {
    inner: Counting<'a, R>,
    bounds: Bounds<'a>,
}

impl<R: Read> Read for Bounded<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let (limits, count) = (self.bounds.limits, self.inner.count.get());
        if count > limits.bytes {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        if count > limits.ratio_from_bytes && count / limits.ratio > self.bounds.packed.get() {
            return Err(io::ErrorKind::QuotaExceeded.into());
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

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn bomb(bytes: usize) -> Vec<u8> {
        let mut archive = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, "zeros", io::repeat(0).take(bytes as u64)).unwrap();
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        packed.write_all(&archive.into_inner().unwrap()).unwrap();
        packed.finish().unwrap()
    }

    #[test]
    fn a_bomb_is_stopped_while_it_goes_off() {
        let target = tempfile::tempdir().unwrap();
        let small = Limits { ratio_from_bytes: 1 << 20, ratio: 100, ..Limits::default() };
        let result = unpack(bomb(4 << 20).as_slice(), target.path(), Content::Blobs, small);
        assert!(matches!(result, Err(ImageError::LimitExceeded { what: "compression ratio" })), "{result:?}");
        assert!(std::fs::metadata(target.path().join("zeros")).unwrap().len() < 2 << 20);
        let target = tempfile::tempdir().unwrap();
        let few = Limits { bytes: 1 << 20, ..Limits::default() };
        let result = unpack(bomb(4 << 20).as_slice(), target.path(), Content::Blobs, few);
        assert!(matches!(result, Err(ImageError::LimitExceeded { what: "unpacked size" })), "{result:?}");
        let target = tempfile::tempdir().unwrap();
        let none = Limits { entries: 0, ..Limits::default() };
        let result = unpack(bomb(1).as_slice(), target.path(), Content::Blobs, none);
        assert!(matches!(result, Err(ImageError::LimitExceeded { what: "number of entries" })), "{result:?}");
    }

    #[test]
    fn digests_are_of_the_packed_and_of_the_plain_bytes() {
        let target = tempfile::tempdir().unwrap();
        let packed = bomb(1000);
        let done = unpack(packed.as_slice(), target.path(), Content::Blobs, Limits::default()).unwrap();
        assert_eq!(done.digest, crate::manifest::digest(&packed));
        assert_ne!(done.diff_id, done.digest);
        assert_eq!((done.bytes, done.entries), (1000, 1));
        let mut cut = packed.clone();
        cut.truncate(packed.len() / 2);
        let target = tempfile::tempdir().unwrap();
        assert!(unpack(cut.as_slice(), target.path(), Content::Blobs, Limits::default()).is_err());
    }
}
