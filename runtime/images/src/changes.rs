//! What a container has changed of its image, as a layer in tar form: its upper directory, with what it removed told by
//! whiteouts as the image specification has them. Blocks.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};
use tar::{Builder, EntryType, Header};

const WHITEOUT: &str = ".wh.";
const OPAQUE: &str = ".wh..wh..opq";
const OPAQUE_ATTRIBUTE: &str = "trusted.overlay.opaque";

/// Writes the changes and gives back the writer.
pub(crate) fn write<W: Write>(upper: &Path, out: W) -> io::Result<W> {
    let mut archive = Builder::new(out);
    let mut pending = vec![PathBuf::new()];
    while let Some(inside) = pending.pop() {
        let directory = upper.join(&inside);
        if is_opaque(&directory) && !inside.as_os_str().is_empty() {
            empty(&mut archive, &inside.join(OPAQUE))?;
        }
        let mut entries = fs::read_dir(&directory)?.collect::<io::Result<Vec<_>>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let path = inside.join(entry.file_name());
            // What vanishes meanwhile was not there at the end.
            let Ok(metadata) = fs::symlink_metadata(entry.path()) else { continue };
            add(&mut archive, &entry.path(), &path, &metadata)?;
            if metadata.is_dir() {
                pending.push(path);
            }
        }
    }
    archive.into_inner()
}

fn add<W: Write>(archive: &mut Builder<W>, file: &Path, path: &Path, metadata: &fs::Metadata) -> io::Result<()> {
    let kind = metadata.file_type();
    if kind.is_char_device() && metadata.rdev() == 0 {
        let name = path.file_name().unwrap_or_default();
        let marked = [WHITEOUT.as_bytes(), name.as_bytes()].concat();
        return empty(archive, &path.with_file_name(std::ffi::OsStr::from_bytes(&marked)));
    }
    let mut header = Header::new_gnu();
    header.set_metadata(metadata);
    header.set_size(0);
    if kind.is_file() {
        // A file that grows while it is read is cut at the length that the header tells.
        let source = File::open(file)?;
        let length = source.metadata()?.len();
        header.set_size(length);
        return archive.append_data(&mut header, path, Padded { source, left: length });
    }
    if kind.is_symlink() {
        header.set_entry_type(EntryType::Symlink);
        return archive.append_link(&mut header, path, fs::read_link(file)?);
    }
    if kind.is_socket() {
        return Ok(());
    }
    if kind.is_char_device() || kind.is_block_device() {
        header.set_device_major(major(metadata.rdev()) as u32)?;
        header.set_device_minor(minor(metadata.rdev()) as u32)?;
    }
    archive.append_data(&mut header, path, io::empty())
}

fn empty<W: Write>(archive: &mut Builder<W>, path: &Path) -> io::Result<()> {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::Regular);
    header.set_mode(0o644);
    header.set_size(0);
    archive.append_data(&mut header, path, io::empty())
}

fn is_opaque(directory: &Path) -> bool {
    xattr::get(directory, OPAQUE_ATTRIBUTE).is_ok_and(|value| value.as_deref() == Some(b"y"))
}

/// As many bytes as were announced, whatever has become of the file.
struct Padded {
    source: File,
    left: u64,
}

impl io::Read for Padded {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let mut count = self.source.read(&mut buffer[..room])?;
        if count == 0 {
            buffer[..room].fill(0);
            count = room;
        }
        self.left -= count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_directories_and_links_come_out_as_they_are() {
        let temp = tempfile::tempdir().unwrap();
        let upper = temp.path().join("upper");
        fs::create_dir_all(upper.join("etc/deep")).unwrap();
        fs::write(upper.join("etc/deep/file"), "content").unwrap();
        std::os::unix::fs::symlink("deep/file", upper.join("etc/link")).unwrap();
        let bytes = write(&upper, Vec::new()).unwrap();
        let out = temp.path().join("out");
        tar::Archive::new(bytes.as_slice()).unpack(&out).unwrap();
        assert_eq!(fs::read_to_string(out.join("etc/link")).unwrap(), "content");
    }
}
