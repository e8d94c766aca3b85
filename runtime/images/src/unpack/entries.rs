//! The archive's entries, one by one. Long names and extended headers are read here rather than by the tar crate, which
//! would take an entry's word for how much memory its name needs.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, UtimensatFlags, fchmodat, futimens, mkdirat, mknodat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchownat, linkat, symlinkat};
use tar::{Archive, Entry, EntryType};
use xattr::FileExt;

use super::tree::{Place, Tree, shorten};
use super::{Content, Limits, damaged};
use crate::ImageError;

const HEADER_BYTES_MAX: u64 = 1 << 20;
const WHITEOUT: &str = ".wh.";
const OPAQUE: &str = ".wh..wh..opq";
const OPAQUE_XATTR: &str = "trusted.overlay.opaque";

/// What extended headers said about the entry that follows.
#[derive(Debug, Default)]
struct Extended {
    path: Option<PathBuf>,
    link: Option<PathBuf>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<i64>,
    xattrs: Vec<(String, Vec<u8>)>,
}

/// One entry with everything that was said about it.
struct Item<'a, 'r, R: Read> {
    entry: &'a mut Entry<'r, R>,
    path: PathBuf,
    link: Option<PathBuf>,
    owner: (u32, u32),
    mode: Mode,
    mtime: i64,
    xattrs: Vec<(String, Vec<u8>)>,
}

/// Unpacks every entry; returns bytes written and entries made.
pub(super) fn unpack_all(
    source: &mut impl Read,
    tree: &Tree,
    content: Content,
    limits: Limits,
) -> Result<(u64, u64), ImageError> {
    let mut archive = Archive::new(source);
    let mut extended = Extended::default();
    let (mut bytes, mut count) = (0u64, 0u64);
    // Directories get their times last: filling them changes these. Keyed by path, so a repeated entry counts once.
    let mut dir_times: BTreeMap<PathBuf, i64> = BTreeMap::new();
    for entry in archive.entries().map_err(damaged)?.raw(true) {
        let mut entry = entry.map_err(damaged)?;
        count += 1;
        if count > limits.entries {
            return Err(ImageError::LimitExceeded { what: "number of entries" });
        }
        if read_extended(&mut entry, &mut extended)? {
            continue;
        }
        let mut item = item(&mut entry, std::mem::take(&mut extended))?;
        if item.entry.header().entry_type() == EntryType::Directory {
            dir_times.insert(item.path.clone(), item.mtime);
        }
        bytes += unpack_one(&mut item, tree, content)?;
        if bytes > limits.bytes {
            return Err(ImageError::LimitExceeded { what: "unpacked size" });
        }
    }
    for (path, mtime) in dir_times.into_iter().rev() {
        if let Some(place) = tree.place(&path)?
            && place.kind() == Some(SFlag::S_IFDIR)
        {
            let _ = set_time(&place, mtime);
        }
    }
    Ok((bytes, count))
}

/// True when the entry was only a header for the next.
fn read_extended<R: Read>(entry: &mut Entry<'_, R>, extended: &mut Extended) -> Result<bool, ImageError> {
    match entry.header().entry_type() {
        EntryType::GNULongName => extended.path = Some(name(read_header(entry)?)),
        EntryType::GNULongLink => extended.link = Some(name(read_header(entry)?)),
        EntryType::XHeader => read_pax(&read_header(entry)?, extended)?,
        EntryType::XGlobalHeader => drop(read_header(entry)?),
        EntryType::GNUSparse => return Err(ImageError::Damaged { what: "sparse entries are not supported".into() }),
        _ => return Ok(false),
    }
    Ok(true)
}

fn read_header<R: Read>(entry: &mut Entry<'_, R>) -> Result<Vec<u8>, ImageError> {
    if entry.size() > HEADER_BYTES_MAX {
        return Err(ImageError::LimitExceeded { what: "header size" });
    }
    let mut bytes = Vec::new();
    entry.take(HEADER_BYTES_MAX).read_to_end(&mut bytes).map_err(damaged)?;
    Ok(bytes)
}

fn name(mut bytes: Vec<u8>) -> PathBuf {
    while bytes.last() == Some(&0) {
        bytes.pop();
    }
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}

fn read_pax(bytes: &[u8], extended: &mut Extended) -> Result<(), ImageError> {
    for record in tar::PaxExtensions::new(bytes) {
        let record = record.map_err(damaged)?;
        let (Ok(key), value) = (record.key(), record.value_bytes()) else {
            return Err(ImageError::Damaged { what: "unreadable extended header".into() });
        };
        let text = || std::str::from_utf8(value).unwrap_or_default();
        match key {
            "path" => extended.path = Some(name(value.to_vec())),
            "linkpath" => extended.link = Some(name(value.to_vec())),
            "uid" => extended.uid = text().parse().ok(),
            "gid" => extended.gid = text().parse().ok(),
            "mtime" => extended.mtime = text().split('.').next().and_then(|seconds| seconds.parse().ok()),
            "size" => return Err(ImageError::LimitExceeded { what: "size of one file (8 GiB)" }),
            key => {
                if let Some(attribute) = key.strip_prefix("SCHILY.xattr.") {
                    extended.xattrs.push((attribute.to_owned(), value.to_vec()));
                }
            }
        }
    }
    Ok(())
}

fn item<'a, 'r, R: Read>(entry: &'a mut Entry<'r, R>, extended: Extended) -> Result<Item<'a, 'r, R>, ImageError> {
    let header = entry.header();
    let id = |value: io::Result<u64>| value.ok().and_then(|id| u32::try_from(id).ok()).unwrap_or(0);
    let owner = (extended.uid.unwrap_or_else(|| id(header.uid())), extended.gid.unwrap_or_else(|| id(header.gid())));
    let mode = Mode::from_bits_truncate(header.mode().map_err(damaged)? & 0o7777);
    let mtime =
        extended.mtime.unwrap_or_else(|| header.mtime().ok().and_then(|time| time.try_into().ok()).unwrap_or(0));
    let path = match extended.path {
        Some(path) => path,
        None => entry.path().map_err(damaged)?.into_owned(),
    };
    let link = match extended.link {
        Some(link) => Some(link),
        None => entry.link_name().map_err(damaged)?.map(|link| link.into_owned()),
    };
    if path.as_os_str().as_bytes().contains(&0) || path.as_os_str().len() > 4096 {
        return Err(ImageError::HostileEntry { entry: shorten(&path), why: "not a file name" });
    }
    Ok(Item { entry, path, link, owner, mode, mtime, xattrs: extended.xattrs })
}

fn unpack_one<R: Read>(item: &mut Item<'_, '_, R>, tree: &Tree, content: Content) -> Result<u64, ImageError> {
    let failed = ImageError::io("unpack", item.path.clone());
    let kind = item.entry.header().entry_type();
    let place = match tree.place(&item.path)? {
        Some(place) => place,
        None if kind == EntryType::Directory => return Ok(0),
        None => return Err(hostile(item, "it would replace the root")),
    };
    if content == Content::Layer && place.name.as_bytes().starts_with(WHITEOUT.as_bytes()) {
        whiteout(item, &place)?;
        return Ok(0);
    }
    let made = match kind {
        EntryType::Directory => make_dir(&place).map(|()| 0),
        EntryType::Regular | EntryType::Continuous => return write_file(item, &place, content),
        EntryType::Symlink => {
            let target = item.link.clone().ok_or_else(|| hostile(item, "a link without a target"))?;
            place.clear().and_then(|()| Ok(symlinkat(&target, &place.dir, place.name.as_os_str())?)).map(|()| 0)
        }
        EntryType::Link => return hard_link(item, tree, &place).map(|()| 0),
        EntryType::Fifo if content == Content::Layer => make_fifo(&place).map(|()| 0),
        // Device nodes: a container gets its devices from its runtime, and one here could stand for the host's disk, or
        // (0, 0) pass for a whiteout.
        _ => return Ok(0),
    };
    made.map_err(failed)?;
    finish(item, &place, content)?;
    Ok(0)
}

fn hostile<R: Read>(item: &Item<'_, '_, R>, why: &'static str) -> ImageError {
    ImageError::HostileEntry { entry: shorten(&item.path), why }
}

/// `.wh.name` hides `name` of the layers below; `.wh..wh..opq` hides all they have in this directory.
fn whiteout<R: Read>(item: &Item<'_, '_, R>, place: &Place) -> Result<(), ImageError> {
    if place.name == OPAQUE {
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&place.dir));
        return xattr::set_deref(path, OPAQUE_XATTR, b"y").map_err(ImageError::io("mark as opaque", item.path.clone()));
    }
    let hidden = OsStr::from_bytes(&place.name.as_bytes()[WHITEOUT.len()..]);
    if hidden.is_empty() || hidden == "." || hidden == ".." {
        return Err(hostile(item, "not a whiteout"));
    }
    if hidden.as_bytes().starts_with(WHITEOUT.as_bytes()) {
        return Ok(()); // bookkeeping of other file systems
    }
    match mknodat(&place.dir, hidden, SFlag::S_IFCHR, Mode::empty(), 0) {
        // The layer has an entry of that name itself: that one counts.
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(errno) => Err(ImageError::io("hide", item.path.clone())(errno.into())),
    }
}

fn make_dir(place: &Place) -> io::Result<()> {
    if place.kind() == Some(SFlag::S_IFDIR) {
        return Ok(());
    }
    place.clear()?;
    Ok(mkdirat(&place.dir, place.name.as_os_str(), Mode::from_bits_truncate(0o700))?)
}

fn make_fifo(place: &Place) -> io::Result<()> {
    place.clear()?;
    Ok(mknodat(&place.dir, place.name.as_os_str(), SFlag::S_IFIFO, Mode::from_bits_truncate(0o600), 0)?)
}

fn write_file<R: Read>(item: &mut Item<'_, '_, R>, place: &Place, content: Content) -> Result<u64, ImageError> {
    let failed = |source| ImageError::Io { operation: "unpack", path: item.path.clone(), source };
    place.clear().map_err(failed)?;
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let file = openat(&place.dir, place.name.as_os_str(), flags, Mode::from_bits_truncate(0o600))
        .map_err(|errno| failed(errno.into()))?;
    let mut file = File::from(file);
    let written = copy(item.entry, &mut file, &item.path)?;
    if written != item.entry.size() {
        return Err(ImageError::Damaged { what: format!("{} is cut short", item.path.display()) });
    }
    finish(item, place, content)?;
    // After the owner: a change of that drops capabilities.
    if content == Content::Layer {
        for (name, value) in attributes(&item.xattrs) {
            file.set_xattr(name, value).map_err(ImageError::io("set an attribute of", item.path.clone()))?;
        }
    }
    let time = TimeSpec::new(item.mtime, 0);
    let _ = futimens(&file, &time, &time);
    Ok(written)
}

/// Reading and writing fail differently: one is the archive's fault, the other the disk's.
fn copy<R: Read>(from: &mut Entry<'_, R>, to: &mut File, path: &Path) -> Result<u64, ImageError> {
    let mut buffer = vec![0; 64 * 1024];
    let mut total = 0;
    loop {
        let count = match from.read(&mut buffer) {
            Ok(0) => return Ok(total),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(damaged(error)),
        };
        io::Write::write_all(to, &buffer[..count]).map_err(ImageError::io("write", path))?;
        total += count as u64;
    }
}

fn hard_link<R: Read>(item: &Item<'_, '_, R>, tree: &Tree, place: &Place) -> Result<(), ImageError> {
    let target = item.link.clone().ok_or_else(|| hostile(item, "a link without a target"))?;
    let source = tree.place(&target)?.ok_or_else(|| hostile(item, "a hard link to the root"))?;
    match source.kind() {
        None => return Err(hostile(item, "a hard link to what the layer does not have")),
        Some(SFlag::S_IFDIR) => return Err(hostile(item, "a hard link to a directory")),
        Some(_) => {}
    }
    let same = {
        let of =
            |place: &Place| nix::sys::stat::fstatat(&place.dir, place.name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW);
        matches!((of(&source), of(place)), (Ok(a), Ok(b)) if (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino))
    };
    if same {
        return Ok(());
    }
    let failed = ImageError::io("link", item.path.clone());
    place
        .clear()
        .and_then(|()| {
            Ok(linkat(&source.dir, source.name.as_os_str(), &place.dir, place.name.as_os_str(), AtFlags::empty())?)
        })
        .map_err(failed)
}

/// Attributes an image may carry. Not `trusted.`: overlay reads its own there, and a layer could forge them.
fn attributes(all: &[(String, Vec<u8>)]) -> impl Iterator<Item = (&str, &[u8])> {
    let allowed = |name: &str| name == "security.capability" || name.starts_with("user.");
    all.iter().filter(move |(name, _)| allowed(name)).map(|(name, value)| (name.as_str(), value.as_slice()))
}

/// Owner, mode (after the owner: changing that clears set-user-id) and time.
fn finish<R: Read>(item: &Item<'_, '_, R>, place: &Place, content: Content) -> Result<(), ImageError> {
    if content == Content::Blobs {
        return Ok(());
    }
    let failed = |errno: Errno| ImageError::io("set the owner or mode of", item.path.clone())(errno.into());
    let name = place.name.as_os_str();
    let kind = item.entry.header().entry_type();
    let (uid, gid) = (Uid::from_raw(item.owner.0), Gid::from_raw(item.owner.1));
    fchownat(&place.dir, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW).map_err(failed)?;
    if kind != EntryType::Symlink {
        // Not a link: it was made, or found to be a directory, just now, in a tree that only this thread writes.
        fchmodat(&place.dir, name, item.mode, FchmodatFlags::FollowSymlink).map_err(failed)?;
    }
    if kind == EntryType::Directory {
        let dir: OwnedFd = place.open_dir().map_err(ImageError::io("open", item.path.clone()))?;
        let dir = File::from(dir);
        for (name, value) in attributes(&item.xattrs) {
            dir.set_xattr(name, value).map_err(ImageError::io("set an attribute of", item.path.clone()))?;
        }
    } else if kind != EntryType::Regular {
        let _ = set_time(place, item.mtime);
    }
    Ok(())
}

fn set_time(place: &Place, mtime: i64) -> io::Result<()> {
    let time = TimeSpec::new(mtime, 0);
    Ok(utimensat(place.dir.as_fd(), place.name.as_os_str(), &time, &time, UtimensatFlags::NoFollowSymlink)?)
}
