//! Where the hierarchies of this host are mounted and which controllers each has.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use crate::CgroupError;

/// Where cgroup file systems are mounted by every init system there is.
const DEFAULT_ROOT: &str = "/sys/fs/cgroup";

/// Which interface the controllers are used through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// One hierarchy a controller.
    V1,
    /// As V1, with a unified hierarchy beside it that has no controllers.
    Hybrid,
    /// One unified hierarchy.
    V2,
}

/// The hierarchies of a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    pub(crate) version: Version,
    /// The mount points, each once; `memory` and the like map to one of them.
    pub(crate) hierarchies: Vec<PathBuf>,
    pub(crate) controllers: BTreeMap<String, PathBuf>,
}

impl Layout {
    /// This host's layout, looked up once.
    pub fn host() -> Result<&'static Layout, CgroupError> {
        static HOST: OnceLock<Layout> = OnceLock::new();
        match HOST.get() {
            Some(layout) => Ok(layout),
            None => {
                let layout = Layout::detect(Path::new(DEFAULT_ROOT))?;
                Ok(HOST.get_or_init(|| layout))
            }
        }
    }

    /// The layout of the cgroup mounts under `root`.
    pub fn detect(root: &Path) -> Result<Layout, CgroupError> {
        let not_mounted = || CgroupError::NotMounted { root: root.into() };
        if statfs(root).map_err(|_| not_mounted())?.filesystem_type() == CGROUP2_SUPER_MAGIC {
            return Ok(Layout::unified(root.into(), &read_controllers(root)));
        }
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").map_err(|source| CgroupError::Io {
            operation: "read",
            path: "/proc/self/mountinfo".into(),
            source,
        })?;
        Layout::from_mountinfo(&mountinfo, root).ok_or_else(not_mounted)
    }

    fn unified(root: PathBuf, controllers: &[String]) -> Layout {
        let controllers = controllers.iter().map(|name| (name.clone(), root.clone())).collect();
        Layout { version: Version::V2, hierarchies: vec![root], controllers }
    }

    /// Reads version 1 and hybrid mounts: `… <root> <mount point> <options> … - cgroup <source> <super options>`.
    fn from_mountinfo(mountinfo: &str, root: &Path) -> Option<Layout> {
        let mut layout = Layout { version: Version::V1, hierarchies: Vec::new(), controllers: BTreeMap::new() };
        for line in mountinfo.lines() {
            let Some((mount, kind)) = line.split_once(" - ") else { continue };
            let Some(point) = mount.split(' ').nth(4).map(Path::new).filter(|point| point.starts_with(root)) else {
                continue;
            };
            let mut kind = kind.split(' ');
            match kind.next() {
                Some("cgroup2") => layout.version = Version::Hybrid,
                Some("cgroup") => {
                    let options = kind.nth(1).unwrap_or_default();
                    for name in options.split(',').filter(|name| is_controller(name)) {
                        layout.controllers.entry(name.to_owned()).or_insert_with(|| point.into());
                    }
                }
                _ => continue,
            }
            if !layout.hierarchies.iter().any(|known| known == point) {
                layout.hierarchies.push(point.into());
            }
        }
        (!layout.hierarchies.is_empty()).then_some(layout)
    }

    /// How controllers are used here.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Whether the unified hierarchy has the controllers.
    pub fn is_v2(&self) -> bool {
        self.version == Version::V2
    }

    /// The mount points of all hierarchies.
    pub fn hierarchies(&self) -> &[PathBuf] {
        &self.hierarchies
    }

    /// The mount point of a controller's hierarchy, such as `memory`; None where the host lacks it.
    pub fn controller(&self, name: &str) -> Option<&Path> {
        self.controllers.get(name).map(PathBuf::as_path)
    }
}

fn is_controller(option: &str) -> bool {
    !matches!(option, "rw" | "ro" | "clone_children" | "xattr" | "noprefix" | "favordynmods" | "nofavordynmods")
        && !option.contains('=')
        && !option.is_empty()
}

fn read_controllers(dir: &Path) -> Vec<String> {
    let text = fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default();
    text.split_ascii_whitespace().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
24 1 0:22 / /sys rw - sysfs sysfs rw
26 24 0:24 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
27 26 0:25 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct
28 26 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
29 26 0:27 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
30 26 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate
31 26 0:26 / /elsewhere/memory rw - cgroup cgroup rw,memory
";

    #[test]
    fn a_hybrid_host_has_named_and_unified_hierarchies_beside_its_controllers() {
        let layout = Layout::from_mountinfo(HYBRID, Path::new("/sys/fs/cgroup")).unwrap();
        assert_eq!(layout.version(), Version::Hybrid);
        assert_eq!(layout.hierarchies().len(), 4);
        assert_eq!(layout.controller("cpuacct"), Some(Path::new("/sys/fs/cgroup/cpu,cpuacct")));
        assert_eq!(layout.controller("memory"), Some(Path::new("/sys/fs/cgroup/memory")));
        assert_eq!(layout.controller("systemd"), None);
        assert_eq!(layout.controller("pids"), None);
    }

    #[test]
    fn no_mounts_is_no_layout() {
        assert!(Layout::from_mountinfo("24 1 0:22 / /sys rw - sysfs sysfs rw", Path::new("/sys/fs/cgroup")).is_none());
    }
}
