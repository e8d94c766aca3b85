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
/// detached at once; finishes what a daemon that died began. Returns its path without links; None when it is not there and may not begin, or when
/// something is mounted below already, which would be hidden.
pub(crate) fn set_apart(directory: &Path, may_begin: bool) -> Result<Option<PathBuf>, Error> {
    let point = fs::canonicalize(directory).map_err(Error::io("look at", directory))?;
    let table = fs::read("/proc/thread-self/mountinfo").map_err(Error::io("read", "/proc/thread-self/mountinfo"))?;
    let change = |flags| mount(None::<&str>, &point, None::<&str>, flags, None::<&str>);
    // Two steps: as a peer of what it lies on, each mount below it would be there twice.
    let with_own_peers = || change(MsFlags::MS_PRIVATE).and_then(|()| change(MsFlags::MS_SHARED));
    let made = match apartness(&table, &point) {
        Apartness::Whole => Ok(()),
        Apartness::Begun => with_own_peers(),
        Apartness::None if may_begin && !has_mounts_below(&table, &point) => {
            mount(Some(&point), &point, None::<&str>, MsFlags::MS_BIND, None::<&str>).and_then(|()| with_own_peers())
        }
        Apartness::None => return Ok(None),
    };
    made.map_err(mounting(&point))?;
    Ok(Some(point))
}

/// Ends what [`set_apart`] began, if nothing is mounted below. What the mount lay on stays, also where that is a mount.
pub(crate) fn give_up_apart(point: &Path) -> Result<(), Error> {
    let table = fs::read("/proc/thread-self/mountinfo").map_err(Error::io("read", "/proc/thread-self/mountinfo"))?;
    if apartness(&table, point) == Apartness::None || has_mounts_below(&table, point) {
        return Ok(());
    }
    let failed = |errno: Errno| Error::Io { operation: "unmount", path: point.to_owned(), source: errno.into() };
    umount2(point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).map_err(failed)
}

/// How far a directory is a mount that shows itself.
#[derive(Debug, PartialEq, Eq)]
enum Apartness {
    None,
    /// Without peers, or with those of what it lies on.
    Begun,
    Whole,
}

fn has_mounts_below(table: &[u8], point: &Path) -> bool {
    points_in(table).iter().any(|mounted| mounted != point && mounted.starts_with(point))
}

/// Whether the mount on `point` is one of the directory that is below it.
fn apartness(table: &[u8], point: &Path) -> Apartness {
    let lines: Vec<Vec<&[u8]>> =
        table.split(|byte| *byte == b'\n').map(|line| line.split(|byte| *byte == b' ').collect()).collect();
    let place = |line: &Vec<&[u8]>| line.get(4).map(|field| unescape(field));
    let mut here = lines.iter().filter(|line| place(line).as_deref() == Some(point)).rev();
    let Some(own) = here.next() else { return Apartness::None };
    let around = |line: &&Vec<&[u8]>| place(line).is_some_and(|other| other != point && point.starts_with(other));
    let depth = |line: &&Vec<&[u8]>| place(line).map(|path| path.components().count());
    let Some(outer) = here.next().or_else(|| lines.iter().filter(around).max_by_key(depth)) else {
        return Apartness::None;
    };
    let inner = place(outer).and_then(|outer| point.strip_prefix(outer).map(Path::to_owned).ok()).unwrap_or_default();
    let expected =
        outer.get(3).map(|root| if inner.as_os_str().is_empty() { unescape(root) } else { unescape(root).join(inner) });
    if own.get(2) != outer.get(2) || own.get(3).map(|root| unescape(root)) != expected {
        return Apartness::None;
    }
    let peers = |line: &Vec<&[u8]>| {
        let optional = line.iter().skip(6).take_while(|field| **field != b"-");
        optional.filter(|field| field.starts_with(b"shared:")).map(|field| field.to_vec()).next()
    };
    match peers(own) {
        Some(own) if peers(outer) != Some(own.clone()) => Apartness::Whole,
        _ => Apartness::Begun,
    }
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
            // A mount that this process may not take away is there still.
            if idmap::is_mount_point(path).unwrap_or(false) {
                return Err(Error::io("unmount", path)(io::ErrorKind::ResourceBusy.into()));
            }
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
    Ok(all_mount_points()?.into_iter().filter(|point| point.starts_with(root)).collect())
}

/// Where anything is mounted in this thread's mount namespace, with blanks and such as they are.
pub fn all_mount_points() -> Result<Vec<PathBuf>, Error> {
    let table = fs::read("/proc/thread-self/mountinfo").map_err(Error::io("read", "/proc/thread-self/mountinfo"))?;
    Ok(points_in(&table))
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
5 2 0:2 /elsewhere /run/bound rw shared:5 - tmpfs tmpfs rw
6 2 0:2 /peer /run/peer rw shared:2 - tmpfs tmpfs rw
7 2 0:2 /private /run/private rw - tmpfs tmpfs rw
8 2 0:10 / /run/twice rw shared:6 - tmpfs tmpfs rw
9 8 0:10 / /run/twice rw shared:7 - tmpfs tmpfs rw
10 9 0:11 / /run/twice/below rw shared:8 - tmpfs tmpfs rw
";
        let of = |path: &str| apartness(table, Path::new(path));
        assert_eq!([of("/run/pods"), of("/run/twice")], [Apartness::Whole, Apartness::Whole]);
        assert_eq!([of("/run/peer"), of("/run/private")], [Apartness::Begun, Apartness::Begun], "a daemon died");
        for other in ["/run/own", "/run/bound", "/run", "/run/none"] {
            assert_eq!(of(other), Apartness::None, "{other}");
        }
        assert!(has_mounts_below(table, Path::new("/run/twice")) && !has_mounts_below(table, Path::new("/run/pods")));
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
