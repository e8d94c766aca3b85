//! One group: its life, members and limits.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::limits::{self, Write};
use crate::oom::OomWatch;
use crate::stats::{self, Stats};
use crate::{CgroupError, Layout, Limits, path};

/// How long a kill or a removal waits for processes to be gone.
const GONE_LIMIT: Duration = Duration::from_secs(5);
const FREEZE_LIMIT: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_micros(500);

/// A group, which may or may not exist yet.
#[derive(Debug, Clone)]
pub struct Cgroup<'a> {
    layout: &'a Layout,
    path: String,
}

impl Cgroup<'static> {
    /// The group of that path on this host. Systemd names are translated (see [`crate::translate`]).
    pub fn new(path: &str) -> Result<Self, CgroupError> {
        Cgroup::with_layout(Layout::host()?, path)
    }
}

impl<'a> Cgroup<'a> {
    /// The group of that path in a layout one has already.
    pub fn with_layout(layout: &'a Layout, path: &str) -> Result<Self, CgroupError> {
        Ok(Cgroup { layout, path: path::translate(path)? })
    }

    /// A group within this one.
    pub fn child(&self, name: &str) -> Result<Cgroup<'a>, CgroupError> {
        let name = path::clean(name).ok_or_else(|| CgroupError::BadPath { path: name.to_owned() })?;
        Ok(Cgroup { layout: self.layout, path: format!("{}/{name}", self.path) })
    }

    /// The path relative to each hierarchy's mount point.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The layout it lies in.
    pub fn layout(&self) -> &'a Layout {
        self.layout
    }

    /// The group's directory in a controller's hierarchy.
    pub fn dir_of(&self, controller: &str) -> Option<PathBuf> {
        self.layout.controller(controller).map(|mount| mount.join(&self.path))
    }

    fn dirs(&self) -> impl Iterator<Item = PathBuf> + '_ {
        self.layout.hierarchies.iter().map(|mount| mount.join(&self.path))
    }

    /// The directory that tells who is a member.
    fn membership_dir(&self) -> PathBuf {
        let mount = ["pids", "memory", "freezer", "cpu"].iter().find_map(|name| self.layout.controller(name));
        mount.unwrap_or(&self.layout.hierarchies[0]).join(&self.path)
    }

    /// Whether it exists in any hierarchy.
    pub fn exists(&self) -> bool {
        self.dirs().any(|dir| dir.is_dir())
    }

    /// Makes the group and its parents in every hierarchy, with all controllers enabled for it. Idempotent.
    pub fn create(&self) -> Result<(), CgroupError> {
        if self.layout.is_v2() {
            return self.create_v2(&self.layout.hierarchies[0]);
        }
        let cpuset = self.layout.controller("cpuset");
        for mount in &self.layout.hierarchies {
            if Some(mount.as_path()) == cpuset {
                self.create_cpuset_v1(mount)?;
            } else {
                make_dirs(&mount.join(&self.path))?;
            }
        }
        Ok(())
    }

    /// Makes the group and its parents only in the hierarchies without controllers of a version 1 or hybrid host:
    /// the named `systemd` one and the unified one.
    pub fn create_without_controllers(&self) -> Result<(), CgroupError> {
        self.bare_dirs().try_for_each(|dir| make_dirs(&dir))
    }

    fn bare_dirs(&self) -> impl Iterator<Item = PathBuf> + '_ {
        let mounts = self.layout.hierarchies.iter();
        let bare = mounts.filter(|mount| !self.layout.controllers.values().any(|used| used == *mount));
        bare.map(|mount| mount.join(&self.path))
    }

    /// A version 1 cpuset accepts no process until its CPUs and memory nodes are filled in, top down.
    fn create_cpuset_v1(&self, mount: &Path) -> Result<(), CgroupError> {
        let mut dir = mount.to_path_buf();
        for part in self.path.split('/') {
            let parent = dir.clone();
            dir.push(part);
            make_dirs(&dir)?;
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if read(&dir.join(file))?.trim().is_empty() {
                    write(&dir.join(file), read(&parent.join(file))?.trim())?;
                }
            }
        }
        Ok(())
    }

    /// Controllers work in a version 2 group only if every parent passes them on.
    fn create_v2(&self, mount: &Path) -> Result<(), CgroupError> {
        let mut dir = mount.to_path_buf();
        for part in self.path.split('/') {
            for controller in self.layout.controllers.keys() {
                let enabled = read(&dir.join("cgroup.subtree_control"))?;
                if enabled.split_ascii_whitespace().any(|name| name == controller) {
                    continue;
                }
                // One that cannot be enabled (busy, or not passed on to us) shows when a limit needs it.
                let _ = fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"));
            }
            dir.push(part);
            make_dirs(&dir)?;
        }
        Ok(())
    }

    /// Sets limits on an existing group, new or in use.
    pub fn set_limits(&self, limits: &Limits) -> Result<(), CgroupError> {
        let writes = if self.layout.is_v2() {
            limits.writes_v2()
        } else {
            let memory_now =
                limits.memory_limit_bytes.and_then(|_| self.read_number("memory", "memory.limit_in_bytes"));
            limits.writes_v1(memory_now)
        };
        writes.iter().try_for_each(|write| self.set(write))
    }

    fn set(&self, item: &Write) -> Result<(), CgroupError> {
        let dir = match item.controller {
            "unified" => self.layout.hierarchies[0].join(&self.path),
            controller => self.dir_of(controller).ok_or(CgroupError::NoController { controller })?,
        };
        if path::clean(&item.file).as_deref() != Some(&item.file) || item.file.contains('/') {
            return Err(CgroupError::BadPath { path: item.file.clone() });
        }
        let file = dir.join(&item.file);
        match fs::write(&file, &item.value) {
            Ok(()) => Ok(()),
            // Kernels without swap accounting, or that do not count reserved pages, have no such file and need none.
            Err(error)
                if error.kind() == io::ErrorKind::NotFound
                    && (is_swap(&item.file) || item.file.contains(limits::RESERVED)) =>
            {
                Ok(())
            }
            Err(source) => Err(CgroupError::Limit { path: file, value: item.value.clone(), source }),
        }
    }

    /// Moves a process, with all its threads, into the group in every hierarchy.
    pub fn attach(&self, pid: i32) -> Result<(), CgroupError> {
        self.dirs().try_for_each(|dir| attach_in(&dir, pid))
    }

    /// Moves the calling process, which has one thread, into the group in every hierarchy.
    ///
    /// Moving any process takes a lock for which the kernel waits a grace period, some milliseconds. On version 1 a thread that
    /// moves itself does without; on version 2 a process can be born in its group (see [`Cgroup::birthplace`]), and then
    /// nothing is left to do here.
    pub fn join(&self) -> Result<(), CgroupError> {
        let own = std::process::id() as i32;
        self.dirs().try_for_each(|dir| {
            if is_unified(&dir) {
                if self.is_home_of_caller() { Ok(()) } else { attach_in(&dir, own) }
            } else {
                fs::write(dir.join("tasks"), "0").or_else(|_| attach_in(&dir, own))
            }
        })
    }

    /// The group's directory in the version 2 hierarchy, for clone3 with CLONE_INTO_CGROUP; None without such a hierarchy.
    pub fn birthplace(&self) -> Option<File> {
        let dir = self.dirs().find(|dir| is_unified(dir))?;
        File::open(dir).ok()
    }

    /// Whether the calling process is in this very group of the version 2 hierarchy.
    fn is_home_of_caller(&self) -> bool {
        let text = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let path = text.lines().find_map(|line| line.strip_prefix("0::/"));
        path.is_some_and(|path| path == self.path)
    }

    /// Moves a process only in the hierarchies without controllers (see [`Cgroup::create_without_controllers`]).
    pub fn attach_without_controllers(&self, pid: i32) -> Result<(), CgroupError> {
        self.bare_dirs().try_for_each(|dir| attach_in(&dir, pid))
    }

    /// The processes of the group and of all groups within; empty if it does not exist.
    pub fn pids(&self) -> Result<Vec<i32>, CgroupError> {
        let mut pids = BTreeSet::new();
        collect_pids(&self.membership_dir(), &mut pids)?;
        Ok(pids.into_iter().collect())
    }

    /// What it uses; zeros where the host does not count.
    pub fn stats(&self) -> Result<Stats, CgroupError> {
        stats::read(self)
    }

    /// How often the kernel killed a process of the group for want of memory.
    pub fn oom_kills(&self) -> u64 {
        let file = if self.layout.is_v2() { "memory.events" } else { "memory.oom_control" };
        self.read_text("memory", file).and_then(|text| stats::keyed(&text, "oom_kill")).unwrap_or(0)
    }

    /// A descriptor that becomes readable when the group runs out of memory. Arm it before the first program runs.
    pub fn watch_oom(&self) -> Result<OomWatch, CgroupError> {
        let dir = self.dir_of("memory").ok_or(CgroupError::NoController { controller: "memory" })?;
        OomWatch::arm(&dir, self.layout.is_v2())
    }

    pub(crate) fn read_text(&self, controller: &str, file: &str) -> Option<String> {
        fs::read_to_string(self.dir_of(controller)?.join(file)).ok()
    }

    pub(crate) fn read_number(&self, controller: &str, file: &str) -> Option<u64> {
        self.read_text(controller, file)?.trim().parse().ok()
    }

    /// Stops every process of the group from running, and waits until all have stopped.
    pub fn freeze(&self) -> Result<(), CgroupError> {
        self.set_frozen(true)
    }

    /// Lets frozen processes run again.
    pub fn thaw(&self) -> Result<(), CgroupError> {
        self.set_frozen(false)
    }

    fn set_frozen(&self, frozen: bool) -> Result<(), CgroupError> {
        if self.layout.is_v2() {
            let dir = self.layout.hierarchies[0].join(&self.path);
            write(&dir.join("cgroup.freeze"), if frozen { "1" } else { "0" })?;
            let wanted = u64::from(frozen);
            let events = dir.join("cgroup.events");
            return wait_until(&events, || Ok(stats::keyed(&read(&events)?, "frozen") == Some(wanted)));
        }
        let dir = self.dir_of("freezer").ok_or(CgroupError::NoController { controller: "freezer" })?;
        let state = dir.join("freezer.state");
        let wanted = if frozen { "FROZEN" } else { "THAWED" };
        // A freeze can stay half done while processes are being born; writing again completes it.
        wait_until(&state, || {
            write(&state, wanted)?;
            Ok(read(&state)?.trim() == wanted)
        })
    }

    /// Kills every process of the group and of those within, and waits until none is left (zombies of other parents
    /// do not count). A group that does not exist is a success.
    pub fn kill(&self) -> Result<(), CgroupError> {
        let deadline = Instant::now() + GONE_LIMIT;
        if self.layout.is_v2() {
            let dir = self.layout.hierarchies[0].join(&self.path);
            // Linux 5.14 kills a whole tree at once; older ones, and threaded groups, take the loop below.
            let _ = fs::write(dir.join("cgroup.kill"), "1");
        }
        loop {
            let living: Vec<i32> = self.present()?.into_iter().filter(|pid| !is_zombie(*pid)).collect();
            if living.is_empty() {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(CgroupError::StillRunning { path: self.path.clone(), pids: living });
            }
            self.kill_members()?;
            thread::sleep(POLL);
        }
    }

    /// As [`Cgroup::pids`], with those that are members only where there are no controllers: what a hook of a creation that
    /// was broken off has started, for one.
    fn present(&self) -> Result<BTreeSet<i32>, CgroupError> {
        let mut pids = BTreeSet::new();
        collect_pids(&self.membership_dir(), &mut pids)?;
        self.bare_dirs().try_for_each(|dir| collect_pids(&dir, &mut pids))?;
        Ok(pids)
    }

    fn kill_members(&self) -> Result<(), CgroupError> {
        let sent = self.send(Signal::SIGKILL, || self.present());
        // Also thaws what somebody else had frozen: only then can it die.
        let _ = self.thaw();
        sent
    }

    /// Sends a signal to every process of the group and of those within. One that is removed meanwhile has none left.
    pub fn signal(&self, signal: Signal) -> Result<(), CgroupError> {
        self.send(signal, || Ok(self.pids()?.into_iter().collect()))
    }

    /// Frozen processes neither fork nor exit, so the list read between is exact and no pid in it can be recycled.
    fn send(
        &self,
        signal: Signal,
        list: impl FnOnce() -> Result<BTreeSet<i32>, CgroupError>,
    ) -> Result<(), CgroupError> {
        let frozen = self.freeze().is_ok();
        let pids = list();
        for pid in pids.iter().flatten() {
            let _ = kill(Pid::from_raw(*pid), signal);
        }
        match if frozen { self.thaw() } else { Ok(()) } {
            Err(error) if !error.is_gone() => Err(error),
            _ => pids.map(drop),
        }
    }

    /// Removes the group and all groups within from every hierarchy. Succeeds when there is none. Processes must
    /// have been killed; ones that are still on their way out are waited for.
    pub fn remove(&self) -> Result<(), CgroupError> {
        let deadline = Instant::now() + GONE_LIMIT;
        self.dirs().try_for_each(|dir| remove_tree(&dir, deadline))
    }
}

/// Files of that name are in version 2 groups only.
fn is_unified(dir: &Path) -> bool {
    dir.join("cgroup.type").exists() || dir.join("cgroup.controllers").exists()
}

fn is_swap(file: &str) -> bool {
    matches!(file, "memory.memsw.limit_in_bytes" | "memory.swap.max")
}

fn is_zombie(pid: i32) -> bool {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => {
            let state = stat.rfind(')').and_then(|end| stat[end + 1..].split_ascii_whitespace().next());
            matches!(state, Some("Z" | "X"))
        }
        Err(_) => true,
    }
}

fn attach_in(dir: &Path, pid: i32) -> Result<(), CgroupError> {
    let file = dir.join("cgroup.procs");
    // A version 2 group that is just being set up can be busy for a moment.
    for _ in 0..5 {
        match fs::write(&file, pid.to_string()) {
            Err(error) if error.raw_os_error() == Some(Errno::EINVAL as i32) => thread::sleep(POLL),
            Ok(()) => return Ok(()),
            Err(source) => return Err(CgroupError::Io { operation: "attach a process through", path: file, source }),
        }
    }
    let source = io::Error::from(Errno::EINVAL);
    Err(CgroupError::Io { operation: "attach a process through", path: file, source })
}

/// Makes a directory and what is missing above it. Whatever the process's mask, everybody may look into it: containers read
/// their limits as whoever they run as.
fn make_dirs(dir: &Path) -> Result<(), CgroupError> {
    let missing: Vec<&Path> = dir.ancestors().take_while(|one| !one.is_dir()).collect();
    let make = |one: &Path| match fs::create_dir(one) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made.and_then(|()| fs::set_permissions(one, fs::Permissions::from_mode(0o755))),
    };
    let made = missing.into_iter().rev().try_for_each(make);
    made.map_err(|source| CgroupError::Io { operation: "create", path: dir.into(), source })
}

fn read(file: &Path) -> Result<String, CgroupError> {
    fs::read_to_string(file).map_err(|source| CgroupError::Io { operation: "read", path: file.into(), source })
}

fn write(file: &Path, value: &str) -> Result<(), CgroupError> {
    fs::write(file, value).map_err(|source| CgroupError::Io { operation: "write", path: file.into(), source })
}

fn wait_until(what: &Path, mut done: impl FnMut() -> Result<bool, CgroupError>) -> Result<(), CgroupError> {
    let deadline = Instant::now() + FREEZE_LIMIT;
    while !done()? {
        if Instant::now() > deadline {
            let source = io::ErrorKind::TimedOut.into();
            return Err(CgroupError::Io { operation: "wait for a change of", path: what.into(), source });
        }
        thread::sleep(POLL);
    }
    Ok(())
}

fn subdirs(dir: &Path) -> Result<Vec<PathBuf>, CgroupError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if is_gone(&error) => return Ok(Vec::new()),
        Err(source) => return Err(CgroupError::Io { operation: "list", path: dir.into(), source }),
    };
    let dirs = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    Ok(dirs.map(|entry| entry.path()).collect())
}

/// A group that vanishes under a reader answers ENOENT or ENODEV.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(code) if code == Errno::ENOENT as i32 || code == Errno::ENODEV as i32)
}

fn collect_pids(dir: &Path, pids: &mut BTreeSet<i32>) -> Result<(), CgroupError> {
    match fs::read_to_string(dir.join("cgroup.procs")) {
        Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 0)),
        Err(error) if is_gone(&error) => return Ok(()),
        // A threaded version 2 group lists its processes at the domain's root only.
        Err(error) if error.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => {}
        Err(source) => return Err(CgroupError::Io { operation: "read members in", path: dir.into(), source }),
    }
    subdirs(dir)?.iter().try_for_each(|child| collect_pids(child, pids))
}

fn remove_tree(dir: &Path, deadline: Instant) -> Result<(), CgroupError> {
    loop {
        match fs::remove_dir(dir) {
            Ok(()) => return Ok(()),
            Err(error) if is_gone(&error) => return Ok(()),
            Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32) && Instant::now() < deadline => {
                for child in subdirs(dir)? {
                    remove_tree(&child, deadline)?;
                }
                if has_members(dir) {
                    thread::sleep(POLL);
                }
            }
            Err(source) => return Err(CgroupError::Io { operation: "remove", path: dir.into(), source }),
        }
    }
}

fn has_members(dir: &Path) -> bool {
    fs::read_to_string(dir.join("cgroup.procs")).is_ok_and(|text| !text.is_empty())
}
