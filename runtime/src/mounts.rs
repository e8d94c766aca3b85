//! Mounts and directories below the run directory: made, looked up, taken away. Never removes across a mount.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use oarlock_images::Rootfs;

use crate::error::Error;
use crate::idmap::{self, Owner};

/// Longest option string mount(2) takes: one page, with its end.
const OPTIONS_MAX: usize = 4095;
const REMOVAL_TRIES: usize = 8;

/// Mounts a container's root file system. In a user namespace everything in it belongs to whom it belongs to there.
pub(crate) fn overlay(rootfs: &Rootfs, target: &Path, owner: Option<&Owner>) -> Result<(), Error> {
    fs::create_dir_all(target).map_err(Error::io("create", target))?;
    if let Some(owner) = owner {
        let upper = &rootfs.upper;
        let (uid, gid) = owner.root();
        chown(upper, Some(uid), Some(gid)).map_err(Error::io("change the owner of", upper))?;
    }
    let (lower, staged) = layers_for(&rootfs.lower, target, owner)?;
    let options =
        format!("lowerdir={},upperdir={},workdir={}", joined(&lower), escape(&rootfs.upper), escape(&rootfs.work));
    // A container's own layer is never mounted a second time, so the disk need not have it: without `volatile` every unmount
    // waits for all that anybody has written to the file system of the layers. Kernels before 5.10 do not know it.
    let mounted = overlay_with(&format!("{options},volatile"), target, MsFlags::empty())
        .or_else(|_| overlay_with(&options, target, MsFlags::empty()));
    staged.map_or(Ok(()), |staged| remove_tree(&staged)).and(mounted)
}

/// Layers as an overlay is to see them: with mapped owners they are views, in a directory that is removed once the overlay,
/// which keeps views of its own, is there.
fn layers_for(
    layers: &[PathBuf],
    target: &Path,
    owner: Option<&Owner>,
) -> Result<(Vec<PathBuf>, Option<PathBuf>), Error> {
    let Some(owner) = owner else { return Ok((layers.to_vec(), None)) };
    let staging = target.with_extension("lower");
    let views: Vec<PathBuf> = (0..layers.len()).map(|index| staging.join(index.to_string())).collect();
    for (layer, view) in layers.iter().zip(&views) {
        idmap::place(layer, view, Some(owner.namespace()), false)?;
    }
    Ok((views, Some(staging)))
}

/// Mounts layers for reading only.
pub(crate) fn overlay_readonly(layers: &[PathBuf], target: &Path, owner: Option<&Owner>) -> Result<(), Error> {
    fs::create_dir_all(target).map_err(Error::io("create", target))?;
    if let ([only], Some(owner)) = (layers, owner) {
        let tree = idmap::clone_tree(only, false).map_err(Error::io("make a view of", only))?;
        let made = idmap::map(&tree, owner.namespace())
            .and_then(|()| idmap::make_readonly(&tree))
            .and_then(|()| idmap::attach(&tree, target));
        return made.map_err(Error::io("mount with mapped owners", only));
    }
    if let [only] = layers {
        mount(Some(only), target, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(mounting(target))?;
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        return mount(None::<&str>, target, None::<&str>, flags, None::<&str>).map_err(mounting(target));
    }
    let (lower, staged) = layers_for(layers, target, owner)?;
    let mounted = overlay_with(&format!("lowerdir={}", joined(&lower)), target, MsFlags::MS_RDONLY);
    staged.map_or(Ok(()), |staged| remove_tree(&staged)).and(mounted)
}

fn overlay_with(options: &str, target: &Path, flags: MsFlags) -> Result<(), Error> {
    if options.len() > OPTIONS_MAX {
        let source = io::Error::other("the image has too many layers for one mount");
        return Err(Error::Io { operation: "mount", path: target.to_owned(), source });
    }
    let options = CString::new(options).map_err(|error| Error::Io {
        operation: "mount",
        path: target.to_owned(),
        source: error.into(),
    })?;
    mount(Some("overlay"), target, Some("overlay"), flags, Some(options.as_c_str())).map_err(mounting(target))
}

fn joined(layers: &[PathBuf]) -> String {
    layers.iter().map(|layer| escape(layer)).collect::<Vec<_>>().join(":")
}

/// Overlay separates layers by colons and options by commas.
fn escape(path: &Path) -> String {
    path.display().to_string().replace('\\', "\\\\").replace(':', "\\:").replace(',', "\\,")
}

/// Mounts a sandbox's shared memory, with its root as the owner.
pub(crate) fn shm(target: &Path, size_bytes: u64, (uid, gid): (u32, u32)) -> Result<(), Error> {
    fs::create_dir_all(target).map_err(Error::io("create", target))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let options = format!("mode=1777,size={size_bytes},uid={uid},gid={gid}");
    mount(Some("shm"), target, Some("tmpfs"), flags, Some(options.as_str())).map_err(mounting(target))
}

fn mounting(target: &Path) -> impl FnOnce(Errno) -> Error {
    let path = target.to_owned();
    move |errno| Error::Io { operation: "mount", path, source: errno.into() }
}

/// Makes `directory` a mount point that shows itself, with peers of its own, so that all that is mounted below it later can be
/// detached at once. Returns its path without links; None when there already are mounts below it and nothing may begin.
pub(crate) fn set_apart(directory: &Path, may_begin: bool) -> Result<Option<PathBuf>, Error> {
    let point = fs::canonicalize(directory).map_err(Error::io("look at", directory))?;
    let table = fs::read("/proc/thread-self/mountinfo").map_err(Error::io("read", "/proc/thread-self/mountinfo"))?;
    if shows_itself(&table, &point) {
        return Ok(Some(point));
    }
    if !may_begin {
        return Ok(None);
    }
    let failed = mounting(&point);
    let change = |flags| mount(None::<&str>, &point, None::<&str>, flags, None::<&str>);
    let made = mount(Some(&point), &point, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        // Two steps: as a peer of what it lies on, each mount below it would be there twice.
        .and_then(|()| change(MsFlags::MS_PRIVATE))
        .and_then(|()| change(MsFlags::MS_SHARED));
    made.map(|()| Some(point.clone())).map_err(failed)
}

/// Ends what [`set_apart`] began, if nothing is mounted below.
pub(crate) fn give_up_apart(point: &Path) -> Result<(), Error> {
    if mount_points(point)?.iter().all(|mounted| mounted == point) { unmount(point) } else { Ok(()) }
}

/// Whether `point` is a mount of a directory that has the same path in the file system of the mount around it.
fn shows_itself(table: &[u8], point: &Path) -> bool {
    let field = |line: &[u8], index| line.split(|byte| *byte == b' ').nth(index).map(unescape);
    let lines = || table.split(|byte| *byte == b'\n');
    let Some(own) = lines().rfind(|line| field(line, 4).as_deref() == Some(point)) else { return false };
    let around = |line: &&[u8]| field(line, 4).is_some_and(|other| other != point && point.starts_with(other));
    let Some(outer) = lines().filter(around).max_by_key(|line| field(line, 4).map(|path| path.components().count()))
    else {
        return false;
    };
    let (Some(root), Some(outer_point)) = (field(outer, 3), field(outer, 4)) else { return false };
    let Ok(inner) = point.strip_prefix(outer_point) else { return false };
    field(own, 2) == field(outer, 2) && field(own, 3) == Some(root.join(inner))
}

/// Detaches everything mounted on `target`; nothing there is as good.
pub(crate) fn unmount(target: &Path) -> Result<(), Error> {
    loop {
        match umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT | Errno::ENOTDIR) => return Ok(()),
            Err(errno) => {
                return Err(Error::Io { operation: "unmount", path: target.to_owned(), source: errno.into() });
            }
        }
    }
}

/// Unmounts everything at and below `root`, deepest first, then removes the tree. What is gone already is as good.
pub(crate) fn remove_tree(root: &Path) -> Result<(), Error> {
    if fs::symlink_metadata(root).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
        return Ok(());
    }
    let mut points = mount_points(root)?;
    points.sort_by_key(|point| std::cmp::Reverse(point.components().count()));
    for point in &points {
        unmount(point)?;
    }
    // Removing must never follow into something still mounted.
    if let Some(left) = mount_points(root)?.first() {
        let source = io::Error::from(io::ErrorKind::ResourceBusy);
        return Err(Error::Io { operation: "unmount", path: left.clone(), source });
    }
    for _ in 0..REMOVAL_TRIES {
        match fs::remove_dir_all(root) {
            // A shim that a dead daemon had just started may still be putting files there: it ends when it notices.
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(Error::io("remove", root)(error)),
            _ => return Ok(()),
        }
    }
    Err(Error::io("remove", root)(io::ErrorKind::DirectoryNotEmpty.into()))
}

/// As [`remove_tree`], for a directory in which nobody but the runtime makes anything: each directory is asked whether something is
/// mounted on it. The table of all mounts, which has lines of every pod, is not read.
pub(crate) fn remove_own_tree(root: &Path) -> Result<(), Error> {
    for _ in 0..REMOVAL_TRIES {
        match remove_entry(root) {
            // As above: a shim that had just been started.
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::DirectoryNotEmpty => {}
            outcome => return outcome,
        }
    }
    Err(Error::io("remove", root)(io::ErrorKind::DirectoryNotEmpty.into()))
}

fn remove_entry(path: &Path) -> Result<(), Error> {
    let kind = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(Error::io("look at", path))?.file_type(),
    };
    match idmap::is_mount_point(path) {
        Ok(false) => {}
        Ok(true) => {
            unmount(path)?;
            return remove_entry(path);
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("look at", path)(error)),
    }
    let removed = if kind.is_dir() {
        for entry in fs::read_dir(path).map_err(Error::io("list", path))? {
            remove_entry(&entry.map_err(Error::io("list", path))?.path())?;
        }
        fs::remove_dir(path)
    } else {
        fs::remove_file(path)
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}

/// The mount points at and below `root` in this thread's mount namespace.
fn mount_points(root: &Path) -> Result<Vec<PathBuf>, Error> {
    let table = fs::read("/proc/thread-self/mountinfo").map_err(Error::io("read", "/proc/thread-self/mountinfo"))?;
    Ok(points_in(&table).into_iter().filter(|point| point.starts_with(root)).collect())
}

fn points_in(table: &[u8]) -> Vec<PathBuf> {
    let lines = table.split(|byte| *byte == b'\n');
    lines.filter_map(|line| line.split(|byte| *byte == b' ').nth(4)).map(unescape).collect()
}

/// Whether the mount that `path` lies on passes events to its peers (`shared`), or receives them (`slave`).
pub(crate) fn propagation_of(path: &Path) -> Result<(PathBuf, bool, bool), Error> {
    let table = fs::read("/proc/thread-self/mountinfo").map_err(Error::io("read", "/proc/thread-self/mountinfo"))?;
    Ok(propagation_in(&table, path))
}

fn propagation_in(table: &[u8], path: &Path) -> (PathBuf, bool, bool) {
    let mut best = (PathBuf::from("/"), false, false);
    let mut depth = 0;
    for line in table.split(|byte| *byte == b'\n') {
        let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
        let Some(point) = fields.get(4).map(|field| unescape(field)) else { continue };
        let length = point.components().count();
        // Of several mounts on one point the last one listed is the one seen.
        if path.starts_with(&point) && length >= depth {
            let optional = fields[6..].iter().take_while(|field| **field != b"-").collect::<Vec<_>>();
            let has = |prefix: &[u8]| optional.iter().any(|field| field.starts_with(prefix));
            depth = length;
            best = (point, has(b"shared:"), has(b"master:"));
        }
    }
    best
}

/// The kernel writes blanks and backslashes of paths as three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let code = tail
            .get(..3)
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|text| u8::from_str_radix(text, 8).ok());
        match (first, code) {
            (b'\\', Some(byte)) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    PathBuf::from(std::ffi::OsStr::from_bytes(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"\
1 0 8:1 / / rw shared:1 - ext4 /dev/a rw
2 1 0:2 / /mnt/with\\040blank rw - tmpfs tmpfs rw
3 1 0:3 / /mnt/slave rw master:7 - tmpfs tmpfs rw
";

    #[test]
    fn the_longest_mount_point_decides() {
        assert_eq!(propagation_in(TABLE, Path::new("/etc")), ("/".into(), true, false));
        assert_eq!(propagation_in(TABLE, Path::new("/mnt/slave/x")), ("/mnt/slave".into(), false, true));
        assert_eq!(points_in(TABLE)[1], Path::new("/mnt/with blank"));
    }

    #[test]
    fn a_directory_that_shows_itself_is_told_from_one_that_holds_something_else() {
        let table = b"\
1 0 8:1 / / rw shared:1 - ext4 /dev/a rw
2 1 0:2 / /run rw shared:2 - tmpfs tmpfs rw
3 2 0:2 /pods /run/pods rw shared:3 - tmpfs tmpfs rw
4 2 0:9 / /run/own rw shared:4 - tmpfs tmpfs rw
5 2 0:2 /elsewhere /run/bound rw shared:2 - tmpfs tmpfs rw
";
        assert!(shows_itself(table, Path::new("/run/pods")));
        for other in ["/run/own", "/run/bound", "/run", "/run/none"] {
            assert!(!shows_itself(table, Path::new(other)), "{other}");
        }
    }

    #[test]
    fn separators_in_paths_are_escaped() {
        assert_eq!(joined(&["/a:b".into(), "/c,d".into()]), "/a\\:b:/c\\,d");
    }

    #[test]
    fn removing_what_is_not_there_succeeds() {
        let directory = tempfile::tempdir().unwrap();
        remove_tree(&directory.path().join("nothing")).unwrap();
        fs::create_dir_all(directory.path().join("a/b")).unwrap();
        remove_tree(&directory.path().join("a")).unwrap();
        assert!(!directory.path().join("a").exists());
    }
}
