//! Publishes a payload so that readers see either all of the old files or all of the new ones.
//!
//! ```text
//! volume/..2026_11_21_03_50_03.123456789/a/b   the files, in a directory that is never changed once it is current
//! volume/..data -> ..2026_11_21_03_50_03.123456789
//! volume/a -> ..data/a                          one link for each first path component
//! ```
//!
//! An update writes a new timestamped directory and renames a new `..data` link over the old one. Only this writer changes
//! the volume: such volumes are mounted read-only.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use jiff::Timestamp;

use crate::error::VolumeError;
use crate::payload::{Payload, check_no_nesting};

const DATA: &str = "..data";
const NEW_DATA: &str = "..data_tmp";

/// Makes `volume` show exactly `payload`. `finish` is run on the new directory before it becomes current (ownership).
/// Gives whether anything was published.
pub(crate) fn publish(
    volume: &Path,
    payload: &Payload,
    now: Timestamp,
    finish: impl FnOnce(&Path) -> Result<(), VolumeError>,
) -> Result<bool, VolumeError> {
    check_no_nesting(payload)?;
    let current = current_directory(volume)?;
    let unchanged = match &current {
        Some(name) => holds(&volume.join(name), payload).map_err(|e| VolumeError::io("compare", volume, e))?,
        None => false,
    };
    let current = if unchanged {
        current
    } else {
        let fresh = create_directory(volume, now)?;
        let path = volume.join(&fresh);
        let written = write_files(&path, payload).and_then(|()| finish(&path)).and_then(|()| switch(volume, &fresh));
        if let Err(error) = written {
            let _ = fs::remove_dir_all(&path);
            return Err(error);
        }
        Some(fresh)
    };
    link_names(volume, payload)?;
    remove_stale(volume, payload, current.as_ref())?;
    Ok(!unchanged)
}

/// The directory that `..data` names, when it names one of ours that exists.
fn current_directory(volume: &Path) -> Result<Option<OsString>, VolumeError> {
    let link = volume.join(DATA);
    let target = match fs::read_link(&link) {
        Ok(target) => target.into_os_string(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(VolumeError::io("read link", &link, error)),
    };
    let plain = target.as_bytes().starts_with(b"..") && target.len() > 2 && !target.as_bytes().contains(&b'/');
    Ok((plain && volume.join(&target).is_dir()).then_some(target))
}

/// Whether a directory holds exactly the payload's files and bytes.
fn holds(directory: &Path, payload: &Payload) -> io::Result<bool> {
    let mut found = BTreeSet::new();
    list_files(directory, Path::new(""), &mut found)?;
    if !found.iter().eq(payload.keys()) {
        return Ok(false);
    }
    for (path, file) in payload {
        if fs::read(directory.join(path))? != file.data {
            return Ok(false);
        }
    }
    Ok(true)
}

fn list_files(root: &Path, relative: &Path, found: &mut BTreeSet<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(root.join(relative))? {
        let entry = entry?;
        let path = relative.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            list_files(root, &path, found)?;
        } else {
            found.insert(path);
        }
    }
    Ok(())
}

/// Makes the next timestamped directory.
fn create_directory(volume: &Path, now: Timestamp) -> Result<OsString, VolumeError> {
    let stamp = now.strftime("..%Y_%m_%d_%H_%M_%S").to_string();
    let nanos = now.subsec_nanosecond().unsigned_abs();
    for attempt in 0..1000u32 {
        let name = format!("{stamp}.{:09}", (nanos.wrapping_add(attempt)) % 1_000_000_000);
        let path = volume.join(&name);
        match fs::create_dir(&path) {
            Ok(()) => {
                fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
                    .map_err(|e| VolumeError::io("set the mode of", &path, e))?;
                return Ok(name.into());
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(VolumeError::io("create", &path, error)),
        }
    }
    Err(VolumeError::io("create", volume, io::Error::from(io::ErrorKind::AlreadyExists)))
}

fn write_files(directory: &Path, payload: &Payload) -> Result<(), VolumeError> {
    for (path, file) in payload {
        let path = directory.join(path);
        if let Some(parent) = path.parent() {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(parent)
                .map_err(|e| VolumeError::io("create", parent, e))?;
        }
        let mut handle = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(|e| VolumeError::io("create", &path, e))?;
        io::Write::write_all(&mut handle, &file.data).map_err(|e| VolumeError::io("write", &path, e))?;
        if let Some(uid) = file.owner_uid {
            std::os::unix::fs::fchown(&handle, Some(uid), None)
                .map_err(|e| VolumeError::io("change the owner of", &path, e))?;
        }
        // After the owner, and past the umask.
        handle
            .set_permissions(fs::Permissions::from_mode(file.mode))
            .map_err(|e| VolumeError::io("set the mode of", &path, e))?;
    }
    Ok(())
}

/// The one rename that readers see.
fn switch(volume: &Path, directory: &OsString) -> Result<(), VolumeError> {
    let (new, data) = (volume.join(NEW_DATA), volume.join(DATA));
    match fs::remove_file(&new) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(VolumeError::io("remove", &new, error)),
    }
    symlink(directory, &new).map_err(|e| VolumeError::io("create link", &new, e))?;
    fs::rename(&new, &data).map_err(|e| VolumeError::io("rename", &new, e))
}

/// First path components, which are what users see in the volume.
fn visible_names(payload: &Payload) -> BTreeSet<OsString> {
    payload.keys().filter_map(|path| path.components().next()).map(|part| part.as_os_str().to_os_string()).collect()
}

fn link_names(volume: &Path, payload: &Payload) -> Result<(), VolumeError> {
    for name in visible_names(payload) {
        let link = volume.join(&name);
        match symlink(Path::new(DATA).join(&name), &link) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(VolumeError::io("create link", &link, error)),
        }
    }
    Ok(())
}

/// Removes links whose file is gone and timestamped directories that are not current.
fn remove_stale(volume: &Path, payload: &Payload, current: Option<&OsString>) -> Result<(), VolumeError> {
    let visible = visible_names(payload);
    let entries = fs::read_dir(volume).map_err(|e| VolumeError::io("list", volume, e))?;
    for entry in entries {
        let entry = entry.map_err(|e| VolumeError::io("list", volume, e))?;
        let name = entry.file_name();
        if name == DATA || Some(&name) == current || visible.contains(&name) {
            continue;
        }
        let path = entry.path();
        let is_dir = entry.file_type().map_err(|e| VolumeError::io("look at", &path, e))?.is_dir();
        let ours = name.as_bytes().starts_with(b"..");
        let removed = match (is_dir, ours) {
            (true, true) => fs::remove_dir_all(&path),
            (false, _) => fs::remove_file(&path),
            // A directory that a missing subPath made: its container may still use it.
            (true, false) => Ok(()),
        };
        removed.map_err(|e| VolumeError::io("remove", &path, e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::payload::insert;

    fn payload(files: &[(&str, &str)]) -> Payload {
        let mut payload = Payload::new();
        for (path, data) in files {
            insert(&mut payload, path, data.as_bytes().to_vec(), 0o640).unwrap();
        }
        payload
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + second).unwrap()
    }

    fn put(volume: &Path, files: &[(&str, &str)], second: i64) -> bool {
        publish(volume, &payload(files), at(second), |_| Ok(())).unwrap()
    }

    fn names(volume: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(volume).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn files_are_seen_through_two_links() {
        let dir = tempfile::tempdir().unwrap();
        assert!(put(dir.path(), &[("a", "1"), ("sub/b", "2")], 0));
        assert_eq!(fs::read_to_string(dir.path().join("a")).unwrap(), "1");
        assert_eq!(fs::read_to_string(dir.path().join("sub/b")).unwrap(), "2");
        assert_eq!(fs::read_link(dir.path().join("sub")).unwrap(), Path::new("..data/sub"));
        assert_eq!(fs::metadata(dir.path().join("a")).unwrap().mode() & 0o777, 0o640);
        assert!(fs::read_link(dir.path().join(DATA)).unwrap().to_str().unwrap().starts_with("..2023_11_14_"));
    }

    #[test]
    fn same_content_publishes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        assert!(put(dir.path(), &[("a", "1")], 0));
        let before = fs::read_link(dir.path().join(DATA)).unwrap();
        assert!(!put(dir.path(), &[("a", "1")], 5));
        assert_eq!(fs::read_link(dir.path().join(DATA)).unwrap(), before);
    }

    #[test]
    fn update_replaces_adds_and_removes() {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), &[("a", "1"), ("old/x", "x")], 0);
        assert!(put(dir.path(), &[("a", "2"), ("new", "n")], 1));
        assert_eq!(fs::read_to_string(dir.path().join("a")).unwrap(), "2");
        let names = names(dir.path());
        assert_eq!(names.len(), 4, "{names:?}");
        assert_eq!(&names[1..], ["..data", "a", "new"]);
    }

    #[test]
    fn an_empty_payload_is_a_volume_too() {
        let dir = tempfile::tempdir().unwrap();
        assert!(put(dir.path(), &[], 0));
        assert!(!put(dir.path(), &[], 1));
        put(dir.path(), &[("late", "x")], 2);
        assert_eq!(fs::read_to_string(dir.path().join("late")).unwrap(), "x");
    }

    #[test]
    fn what_a_crash_left_is_cleaned() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("..2020_01_01_00_00_00.5/half")).unwrap();
        symlink("..2020_01_01_00_00_00.5", dir.path().join(NEW_DATA)).unwrap();
        put(dir.path(), &[("a", "1")], 0);
        assert_eq!(names(dir.path()).len(), 3);
        // A crash after the rename and before the links.
        fs::remove_file(dir.path().join("a")).unwrap();
        assert!(!put(dir.path(), &[("a", "1")], 1));
        assert_eq!(fs::read_to_string(dir.path().join("a")).unwrap(), "1");
    }

    #[test]
    fn a_failure_before_the_switch_leaves_the_old_content() {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), &[("a", "1")], 0);
        let failed =
            publish(dir.path(), &payload(&[("a", "2")]), at(1), |_| Err(VolumeError::Invalid { message: "no".into() }));
        assert!(failed.is_err());
        assert_eq!(fs::read_to_string(dir.path().join("a")).unwrap(), "1");
        assert_eq!(names(dir.path()).len(), 3);
    }

    #[test]
    fn a_reader_holding_the_old_directory_never_sees_a_mixture() {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), &[("a", "1"), ("b", "1")], 0);
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for version in 1..200 {
                    let text = version.to_string();
                    put(dir.path(), &[("a", &text), ("b", &text)], version);
                }
                stop.store(true, std::sync::atomic::Ordering::Relaxed);
            });
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                // One look at the link, then both files from the directory it named.
                let current = dir.path().join(fs::read_link(dir.path().join(DATA)).unwrap());
                let (a, b) = (fs::read_to_string(current.join("a")), fs::read_to_string(current.join("b")));
                if let (Ok(a), Ok(b)) = (a, b) {
                    assert_eq!(a, b);
                }
            }
        });
    }
}
