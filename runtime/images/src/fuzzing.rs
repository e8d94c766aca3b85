//! What a fuzzer does to the unpacking of layers: makes an archive of any bytes, unpacks it beside a file that must stay as it
//! is, and panics when something outside the target was touched.
//!
//! Plain bytes would seldom get past the checksum of the first header. So all but a few inputs are read as a list of
//! entries whose kinds, names and extended headers come from those that have been used in attacks.

use std::fs::{self, Metadata};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use crate::unpack::{Content, Limits, unpack};

const LIMITS: Limits = Limits { entries: 200, bytes: 1 << 20, ratio: 100, ratio_from_bytes: 1 << 16 };
const CANARY: &[u8] = b"this file is outside";
/// Most entries have one of these names and, if they are links, lead to one of those places, so that they meet.
const MEETING: &[&str] = &["a", "b", "a/b", "a/outside", "b/a", "outside", "a/c", ".wh.a"];
const PLACES: &[&str] = &["..", "../outside", "/", "/outside", "a", "b", "../..", "."];
const NAMES: &[&str] = &[
    "a/b/c",
    "./a",
    "a//b",
    ".",
    "",
    "/",
    "/..",
    "a/../../outside",
    "../target2/x",
    "a/./../b",
    ".wh.b",
    "a/.wh.b",
    ".wh..wh..opq",
    "a/.wh..wh..opq",
    ".wh.",
    ".wh...",
    ".wh.../outside",
    "/proc/self/root/outside",
    "a\0b",
    "a/b/../../../outside",
];
const KEYS: &[&str] = &[
    "path",
    "linkpath",
    "size",
    "uid",
    "gid",
    "mtime",
    "SCHILY.xattr.user.a",
    "SCHILY.xattr.trusted.overlay.opaque",
    "SCHILY.xattr.trusted.overlay.redirect",
    "SCHILY.xattr.security.capability",
    "GNU.sparse.major",
    "GNU.sparse.name",
];
const KINDS: &[u8] = b"00001122225555012534678\x00LKxgSMN";

/// One input. Any behaviour but a result, an error, or touching nothing outside is a panic.
pub fn unpack_layer(data: &[u8]) {
    let (first, rest) = data.split_first().unwrap_or((&0, &[]));
    let archive = match first % 16 {
        0 => rest.to_vec(),
        _ => archive(&mut Input(rest)),
    };
    let content = if first & 16 == 0 { Content::Layer } else { Content::Blobs };
    let Ok(home) = tempfile::tempdir() else { return };
    let outside = home.path().join("outside");
    if fs::write(&outside, CANARY).is_err() {
        return;
    }
    let before = facts(&outside);
    let mut results = Vec::new();
    for name in ["target", "target2"] {
        let target = home.path().join(name);
        if fs::create_dir(&target).is_err() {
            return;
        }
        results.push(unpack(archive.as_slice(), &target, content, LIMITS).map_err(|error| error.to_string()));
        assert_eq!(fs::read(&outside).ok().as_deref(), Some(CANARY), "the file outside has other contents");
        assert_eq!(facts(&outside), before, "the file outside was changed");
        let mut found: Vec<_> =
            fs::read_dir(home.path()).into_iter().flatten().flatten().map(|e| e.file_name()).collect();
        found.sort();
        assert_eq!(found.len(), results.len() + 1, "something is outside: {found:?}");
    }
    assert_eq!(results.first(), results.get(1), "the same bytes gave two results");
    if let Some(Ok(unpacked)) = results.first() {
        assert!(unpacked.entries <= LIMITS.entries && unpacked.bytes <= LIMITS.bytes, "{unpacked:?}");
    }
}

/// What a link, a write, a change of mode, owner or time would show in.
fn facts(path: &Path) -> Option<(u64, u32, u32, u32, i64, i64)> {
    let of = |data: Metadata| {
        (data.nlink(), data.permissions().mode(), data.uid(), data.gid(), data.mtime(), data.mtime_nsec())
    };
    fs::symlink_metadata(path).ok().map(of)
}

/// The input, taken from the front; zeros when it is used up.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken.to_vec()
    }

    fn name(&mut self, usual: &[&str]) -> Vec<u8> {
        let choice = usize::from(self.byte());
        match choice % 8 {
            0 => self.bytes(choice / 8),
            1 => NAMES[choice / 8 % NAMES.len()].as_bytes().to_vec(),
            _ => usual[choice / 8 % usual.len()].as_bytes().to_vec(),
        }
    }
}

fn archive(input: &mut Input<'_>) -> Vec<u8> {
    let mut archive = Vec::new();
    while !input.0.is_empty() && archive.len() < 1 << 16 {
        entry(input, &mut archive);
    }
    archive.resize(archive.len() + 1024, 0);
    archive
}

fn entry(input: &mut Input<'_>, archive: &mut Vec<u8>) {
    let kind = KINDS[input.byte() as usize % KINDS.len()];
    let (name, link) = (input.name(MEETING), input.name(PLACES));
    let content = match kind {
        b'x' | b'g' => records(input),
        b'L' | b'K' => input.name(MEETING),
        _ => {
            let count = usize::from(input.byte() % 8);
            input.bytes(count)
        }
    };
    let odd = input.byte();
    // The claimed size is the true one, but for some that lie.
    let size = if odd & 0x1f == 1 { u64::from(input.byte()) << (odd >> 3) } else { content.len() as u64 };
    let mut header = if odd & 1 == 0 { tar::Header::new_ustar() } else { tar::Header::new_gnu() };
    let old = header.as_old_mut();
    old.name[..name.len().min(100)].copy_from_slice(&name[..name.len().min(100)]);
    old.linkname[..link.len().min(100)].copy_from_slice(&link[..link.len().min(100)]);
    old.linkflag = [kind];
    header.set_size(size);
    header.set_mode(u32::from(input.byte()) << 4 | u32::from(odd));
    header.set_uid(u64::from(odd));
    header.set_gid(u64::from(odd));
    header.set_mtime(u64::from(odd) << (odd & 0x3f));
    header.set_cksum();
    archive.extend_from_slice(header.as_bytes());
    archive.extend_from_slice(&content);
    archive.resize(archive.len().next_multiple_of(512), 0);
}

/// Extended headers: `<length> <key>=<value>\n`.
fn records(input: &mut Input<'_>) -> Vec<u8> {
    let mut all = Vec::new();
    for _ in 0..input.byte() % 4 {
        let key = KEYS[input.byte() as usize % KEYS.len()];
        let value = input.name(PLACES);
        let body = key.len() + value.len() + 3;
        let length = body + body.to_string().len();
        let length = body + length.to_string().len();
        all.extend_from_slice(format!("{length} {key}=").as_bytes());
        all.extend_from_slice(&value);
        all.push(b'\n');
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_become_archives_that_can_be_read() {
        let mut input = Input(&[10, 2, 2, 0, 0, 0]);
        let bytes = archive(&mut input);
        let mut read = tar::Archive::new(bytes.as_slice());
        let entries: Vec<_> = read.entries().unwrap().map(Result::unwrap).map(|e| e.header().entry_type()).collect();
        assert_eq!(entries, [tar::EntryType::Directory]);
        let record = records(&mut Input(&[1, 0, 18]));
        assert_eq!(record, b"9 path=/\n");
    }

    /// The same two thousand archives each time; `cargo xtask fuzz` looks for others.
    #[test]
    fn no_archive_reaches_outside() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..2_000 {
            let mut data = Vec::new();
            for _ in 0..1 + (state >> 7) % 24 {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                data.extend_from_slice(&state.to_le_bytes());
            }
            unpack_layer(&data);
        }
    }
}
