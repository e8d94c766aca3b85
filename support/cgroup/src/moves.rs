//! Moves of processes without their wait.
//!
//! The kernel takes a lock of the whole machine to move a process, and lets an RCU grace period (6 to 20 ms) pass before it gives
//! it to the first of several movers; those who come within the next one get it at once.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::Layout;

/// Takes and returns the lock by moving the calling process to where it is.
#[derive(Debug)]
pub struct MoveLock {
    procs: File,
}

impl MoveLock {
    /// None where the caller's group cannot be seen or written to: then moves wait.
    pub fn of_caller() -> Option<MoveLock> {
        let layout = Layout::host().ok()?;
        let text = fs::read_to_string("/proc/self/cgroup").ok()?;
        let directory = caller_directory(&text, layout)?;
        let procs = OpenOptions::new().write(true).open(directory.join("cgroup.procs")).ok()?;
        Some(MoveLock { procs })
    }

    /// Makes the next moves on this machine quick, for about a grace period. Blocks for one if none was made just before.
    pub fn touch(&self) -> io::Result<()> {
        // The calling process, whatever its number is in this namespace.
        (&self.procs).write_all(b"0")
    }
}

/// The caller's group in the unified hierarchy, which all but plain version 1 hosts have.
fn caller_directory(own_groups: &str, layout: &Layout) -> Option<PathBuf> {
    let path = own_groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let mount = layout.hierarchies().iter().find(|mount| is_unified(mount))?;
    // A group outside the caller's cgroup namespace is shown with leading `..`.
    (!path.starts_with("..")).then(|| mount.join(path))
}

fn is_unified(mount: &Path) -> bool {
    mount.join("cgroup.controllers").exists()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Version;

    #[test]
    fn the_callers_group_is_the_one_of_the_unified_hierarchy() {
        let root = tempfile::tempdir().unwrap();
        let unified = root.path().join("unified");
        fs::create_dir(&unified).unwrap();
        fs::write(unified.join("cgroup.controllers"), "").unwrap();
        let layout = Layout {
            version: Version::Hybrid,
            hierarchies: vec![root.path().join("memory"), unified.clone()],
            controllers: Default::default(),
        };
        let directory = |text| caller_directory(text, &layout);
        assert_eq!(directory("5:memory:/other\n0::/oarlock/runtime\n"), Some(unified.join("oarlock/runtime")));
        assert_eq!(directory("0::/\n"), Some(unified.join("")));
        assert_eq!(directory("0::/../outside\n"), None);
        assert_eq!(directory("5:memory:/only\n"), None);
    }
}
