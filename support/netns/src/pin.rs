//! Pinned namespaces: files under a directory that keep net, ipc, uts and user namespaces alive without any process.
//!
//! A pin is an empty file with the namespace bind-mounted on it. Removal detaches the mount and unlinks the file, and
//! an absent pin is as good as a removed one, so removal can be repeated after a crash at any point.

use std::ffi::CString;
use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use crate::thread::{on_fresh_thread, open};
use crate::user::{self, SetUp, UserMappings};
use crate::{NetnsError, Result, bring_loopback_up};

/// Which namespaces to make and how to set them up.
#[derive(Debug, Clone, Default)]
pub struct PinOptions {
    /// Make a network namespace, with `lo` up.
    pub net: bool,
    /// Make an IPC namespace.
    pub ipc: bool,
    /// Make a UTS namespace.
    pub uts: bool,
    /// The hostname of the new UTS namespace; ignored without `uts`.
    pub hostname: Option<String>,
    /// Sysctls (`net.ipv4.ip_unprivileged_port_start`, `kernel.msgmax` …) as name and value. Only names that belong to
    /// a namespace made here are accepted: `net.*` with `net`; `kernel.shm*`, `kernel.msg*`, `kernel.sem` and
    /// `fs.mqueue.*` with `ipc`; `kernel.domainname` with `uts`.
    pub sysctls: Vec<(String, String)>,
    /// Make a user namespace with these mappings, to which the others belong.
    pub user: Option<UserMappings>,
}

/// Namespaces pinned in one directory, as `user`, `net`, `ipc` and `uts`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pins {
    pub user: Option<PathBuf>,
    pub net: Option<PathBuf>,
    pub ipc: Option<PathBuf>,
    pub uts: Option<PathBuf>,
}

impl Pins {
    /// Makes the wanted namespaces on one fresh thread, sets them up and pins them in `directory`, which is made when
    /// absent. After an error nothing stays behind.
    pub fn create(directory: &Path, options: &PinOptions) -> Result<Pins> {
        check_sysctls(options)?;
        fs::create_dir_all(directory).map_err(|source| NetnsError::Pin { path: directory.to_owned(), source })?;
        let wanted = |on: bool, name: &str| on.then(|| directory.join(name));
        let pins = Pins {
            user: wanted(options.user.is_some(), "user"),
            net: wanted(options.net, "net"),
            ipc: wanted(options.ipc, "ipc"),
            uts: wanted(options.uts, "uts"),
        };
        make(&pins, options)?;
        Ok(pins)
    }

    /// The pins that exist in `directory`.
    pub fn open(directory: &Path) -> Pins {
        let existing = |name: &str| Some(directory.join(name)).filter(|path| is_pinned(path));
        Pins { user: existing("user"), net: existing("net"), ipc: existing("ipc"), uts: existing("uts") }
    }

    /// Removes all pins in `directory` and the directory if it is empty then. What is gone already counts as removed;
    /// every step is taken, and the first failure is returned.
    pub fn remove(directory: &Path) -> Result<()> {
        let results = ["net", "ipc", "uts", "user"].map(|name| remove_pinned(&directory.join(name)));
        let _ = fs::remove_dir(directory);
        results.into_iter().collect()
    }
}

/// Makes a network namespace with `lo` up and pins it at `path`, whose directory is made when absent.
///
/// # Errors
/// [`NetnsError::AlreadyPinned`] when a namespace is pinned there already. After an error nothing stays behind.
pub fn create_pinned(path: &Path) -> Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).map_err(|source| NetnsError::Pin { path: directory.to_owned(), source })?;
    }
    make(&Pins { net: Some(path.to_owned()), ..Pins::default() }, &PinOptions { net: true, ..PinOptions::default() })
}

/// Removes the namespace pinned at `path`; an absent file counts as removed.
pub fn remove_pinned(path: &Path) -> Result<()> {
    let failed = |source: io::Error| NetnsError::Unpin { path: path.to_owned(), source };
    // A crash between two attempts can leave several mounts on one file; each is detached.
    loop {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::EINVAL) => break,
            Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(()),
            Err(errno) => return Err(failed(errno.into())),
        }
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(error)),
        _ => Ok(()),
    }
}

/// Whether `path` is a namespace file.
pub fn is_pinned(path: &Path) -> bool {
    open(path).is_ok()
}

fn make(pins: &Pins, options: &PinOptions) -> Result<()> {
    let pairs = [
        (&pins.net, CloneFlags::CLONE_NEWNET, "net"),
        (&pins.ipc, CloneFlags::CLONE_NEWIPC, "ipc"),
        (&pins.uts, CloneFlags::CLONE_NEWUTS, "uts"),
    ];
    let mut wanted: Vec<Wanted<'_>> =
        pairs.into_iter().filter_map(|(path, flag, name)| Some((path.as_deref()?, flag, name))).collect();
    if let Some((path, ..)) = wanted.iter().find(|(path, ..)| is_pinned(path)) {
        return Err(NetnsError::AlreadyPinned { path: path.to_path_buf() });
    }
    let flags = wanted.iter().fold(CloneFlags::empty(), |flags, (_, flag, _)| flags | *flag);
    if let (Some(mappings), Some(path)) = (&options.user, pins.user.as_deref()) {
        wanted.push((path, CloneFlags::CLONE_NEWUSER, "user"));
        return pinned_or_none(&wanted, make_owned(mappings, flags, options, &wanted));
    }
    let made = on_fresh_thread(|| {
        unshare(flags).map_err(|errno| NetnsError::Unshare(errno.into()))?;
        set_up(options)?;
        // This thread is the new namespaces' only member, so its own entry in /proc is what has to be pinned.
        wanted.iter().try_for_each(|(path, _, name)| pin(path, &Path::new("/proc/thread-self/ns").join(name)))
    })
    .and_then(|inner| inner);
    pinned_or_none(&wanted, made)
}

type Wanted<'a> = (&'a Path, CloneFlags, &'static str);

fn pinned_or_none(wanted: &[Wanted<'_>], made: Result<()>) -> Result<()> {
    if made.is_err() {
        for (path, ..) in wanted {
            let _ = remove_pinned(path);
        }
    }
    made
}

/// Namespaces that belong to a user namespace of their own.
fn make_owned(mappings: &UserMappings, others: CloneFlags, options: &PinOptions, wanted: &[Wanted<'_>]) -> Result<()> {
    let file = |(name, value): &(String, String)| {
        let path = CString::new(sysctl_path(name)?.as_os_str().as_encoded_bytes());
        Ok((path.map_err(|_| NetnsError::SysctlName { name: name.clone() })?, value.clone().into_bytes()))
    };
    let set_up = SetUp {
        loopback: options.net,
        hostname: options.hostname.clone().filter(|_| options.uts),
        files: options.sysctls.iter().map(file).collect::<Result<_>>()?,
    };
    user::with_namespaces(mappings, others, &set_up, |pid| {
        let directory = PathBuf::from(format!("/proc/{pid}/ns"));
        wanted.iter().try_for_each(|(path, _, name)| pin(path, &directory.join(name)))
    })
}

fn set_up(options: &PinOptions) -> Result<()> {
    if options.net {
        bring_loopback_up()?;
    }
    if let Some(name) = options.hostname.as_ref().filter(|_| options.uts) {
        nix::unistd::sethostname(name)
            .map_err(|errno| NetnsError::Hostname { name: name.clone(), source: errno.into() })?;
    }
    for (name, value) in &options.sysctls {
        fs::write(sysctl_path(name)?, value).map_err(|source| NetnsError::Sysctl {
            name: name.clone(),
            value: value.clone(),
            source,
        })?;
    }
    Ok(())
}

fn pin(path: &Path, namespace: &Path) -> Result<()> {
    let failed = |source: io::Error| NetnsError::Pin { path: path.to_owned(), source };
    OpenOptions::new().write(true).create(true).truncate(false).open(path).map_err(failed)?;
    mount(Some(namespace), path, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(|errno| failed(errno.into()))
}

fn check_sysctls(options: &PinOptions) -> Result<()> {
    for (name, _) in &options.sysctls {
        sysctl_path(name)?;
        let dotted = name.replace('/', ".");
        let ipc = ["kernel.shm", "kernel.msg", "fs.mqueue."].iter().any(|prefix| dotted.starts_with(prefix))
            || dotted == "kernel.sem";
        let allowed = (options.net && dotted.starts_with("net."))
            || (options.ipc && ipc)
            || (options.uts && dotted == "kernel.domainname");
        if !allowed {
            return Err(NetnsError::SysctlName { name: name.clone() });
        }
    }
    Ok(())
}

/// The file of a sysctl under either spelling: `net.ipv4.ip_forward` or `net/ipv4/ip_forward` (the second allows dots
/// inside interface names).
fn sysctl_path(name: &str) -> Result<PathBuf> {
    let parts: Vec<&str> = if name.contains('/') { name.split('/').collect() } else { name.split('.').collect() };
    let sound = |part: &&str| !part.is_empty() && *part != "." && *part != ".." && !part.contains('\0');
    if parts.len() < 2 || !parts.iter().all(sound) {
        return Err(NetnsError::SysctlName { name: name.to_owned() });
    }
    Ok(Path::new("/proc/sys").join(parts.join("/")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sysctl_name_cannot_leave_proc_sys() {
        for name in ["", "net", "net..ipv4", "net/../../etc/passwd", "net/./x", "/etc/passwd"] {
            assert!(matches!(sysctl_path(name), Err(NetnsError::SysctlName { .. })), "{name}");
        }
        assert_eq!(
            sysctl_path("net/ipv4/conf/eth0.1/rp_filter").unwrap(),
            Path::new("/proc/sys/net/ipv4/conf/eth0.1/rp_filter")
        );
    }

    #[test]
    fn a_sysctl_of_a_shared_namespace_is_refused() {
        let with = |net, ipc, name: &str| {
            check_sysctls(&PinOptions { net, ipc, sysctls: vec![(name.into(), "1".into())], ..PinOptions::default() })
        };
        assert!(with(true, false, "net.ipv4.ip_forward").is_ok());
        assert!(with(false, true, "net.ipv4.ip_forward").is_err());
        assert!(with(true, true, "kernel.msgmax").is_ok());
        assert!(with(true, false, "kernel.msgmax").is_err());
        assert!(with(true, true, "kernel.core_pattern").is_err());
        assert!(with(true, true, "vm.overcommit_memory").is_err());
    }
}
