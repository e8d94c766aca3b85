//! Room for groups inside a container that has a cgroup namespace of its own on a version 2 host.
//!
//! There the root of what can be seen is an ordinary group with the container's processes in it, and the kernel passes
//! controllers on only from groups without processes. So they move to a group beside those that are made later.

use std::fs;
use std::path::Path;

use crate::{CgroupError, Layout};

/// The group that takes the container's processes.
const LEAF: &str = "init";
/// Processes may start others while they are moved.
const ROUNDS: usize = 32;

/// Makes room if it is needed; tells whether processes were moved. Can be repeated, and by several daemons at once.
pub fn make_room() -> Result<bool, CgroupError> {
    let layout = Layout::host()?;
    let Some(root) = layout.hierarchies().first().filter(|_| layout.is_v2()) else { return Ok(false) };
    // The root of a machine has no type, may have processes, and is not ours to clear.
    if !root.join("cgroup.type").exists() {
        return Ok(false);
    }
    clear(root)
}

fn clear(root: &Path) -> Result<bool, CgroupError> {
    let leaf = root.join(LEAF);
    let mut moved = false;
    for _ in 0..ROUNDS {
        let members = members(root)?;
        if members.is_empty() {
            return Ok(moved);
        }
        match fs::create_dir(&leaf) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(CgroupError::Io { operation: "create", path: leaf, source: error });
            }
            _ => {}
        }
        for member in members {
            // One that ended meanwhile needs no place.
            moved |= fs::write(leaf.join("cgroup.procs"), &member).is_ok();
        }
    }
    let source = std::io::Error::other("processes stay in it, so that no controller can be used in groups below it");
    Err(CgroupError::Io { operation: "clear", path: root.into(), source })
}

fn members(group: &Path) -> Result<Vec<String>, CgroupError> {
    let path = group.join("cgroup.procs");
    let text = fs::read_to_string(&path).map_err(|source| CgroupError::Io { operation: "read", path, source })?;
    Ok(text.lines().map(str::to_owned).collect())
}
