//! Propagation of single mounts, which the engine ignores: it gives every mount what the root has.
//!
//! Done between create and start: the container's first process waits, and a helper enters its mount namespace.
#![allow(unsafe_code, reason = "fork, to enter a mount namespace and leave it by ending")]

use std::path::{Path, PathBuf};

use nix::libc;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use oarlock_shim_api::{ErrorKind, RemoteError};
use oci_spec::runtime::Spec;

use super::{failed, io_failed};

/// Gives every mount of the specification the propagation its options name.
pub(super) fn apply(spec: &Spec, pid: i32) -> Result<(), RemoteError> {
    let changes = plan(spec);
    if changes.is_empty() {
        return Ok(());
    }
    let namespace =
        std::fs::File::open(format!("/proc/{pid}/ns/mnt")).map_err(io_failed("open the mount namespace"))?;
    // SAFETY: this helper has one thread.
    match unsafe { fork() }.map_err(|errno| failed("fork", &errno))? {
        ForkResult::Child => {
            let done = setns(&namespace, CloneFlags::CLONE_NEWNS).is_ok()
                && changes
                    .iter()
                    .all(|(path, flags)| mount(None::<&Path>, path, None::<&str>, *flags, None::<&str>).is_ok());
            // SAFETY: ends this process only.
            unsafe { libc::_exit(i32::from(!done)) }
        }
        ForkResult::Parent { child } => match waitpid(child, None) {
            Ok(WaitStatus::Exited(_, 0)) => Ok(()),
            _ => Err(RemoteError::new(ErrorKind::Engine, "cannot set the propagation of a mount")),
        },
    }
}

/// Which mounts differ from what they got from the root. Pure.
fn plan(spec: &Spec) -> Vec<(PathBuf, MsFlags)> {
    let root = spec.linux().as_ref().and_then(|linux| linux.rootfs_propagation().clone());
    let inherited = match root.as_deref() {
        Some("shared") => MsFlags::MS_SHARED,
        Some("private") => MsFlags::MS_PRIVATE,
        _ => MsFlags::MS_SLAVE,
    };
    let mut changes = Vec::new();
    for mount in spec.mounts().iter().flatten() {
        for option in mount.options().iter().flatten() {
            let Some(flags) = flags_of(option) else { continue };
            // Only binds of host paths have peers to hear from; a fresh file system is private to the container.
            let is_bind = mount.options().iter().flatten().any(|option| matches!(option.as_str(), "bind" | "rbind"));
            if is_bind && !flags.contains(inherited) {
                changes.push((mount.destination().clone(), flags));
            }
        }
    }
    changes
}

fn flags_of(option: &str) -> Option<MsFlags> {
    Some(match option {
        "private" => MsFlags::MS_PRIVATE,
        "rprivate" => MsFlags::MS_PRIVATE | MsFlags::MS_REC,
        "slave" => MsFlags::MS_SLAVE,
        "rslave" => MsFlags::MS_SLAVE | MsFlags::MS_REC,
        "shared" => MsFlags::MS_SHARED,
        "rshared" => MsFlags::MS_SHARED | MsFlags::MS_REC,
        "unbindable" => MsFlags::MS_UNBINDABLE,
        "runbindable" => MsFlags::MS_UNBINDABLE | MsFlags::MS_REC,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_binds_that_differ_from_the_root_are_changed() {
        let json = serde_json::json!({
            "ociVersion": "1.0.2",
            "mounts": [
                {"destination": "/a", "source": "/x", "options": ["rbind", "rprivate"]},
                {"destination": "/b", "source": "/x", "options": ["rbind", "rslave"]},
                {"destination": "/c", "source": "/x", "options": ["rbind", "rshared"]},
                {"destination": "/proc", "type": "proc", "source": "proc", "options": ["private"]}
            ],
            "linux": {"rootfsPropagation": "shared"}
        });
        let spec: Spec = serde_json::from_value(json).unwrap();
        let expected = [
            (PathBuf::from("/a"), MsFlags::MS_PRIVATE | MsFlags::MS_REC),
            (PathBuf::from("/b"), MsFlags::MS_SLAVE | MsFlags::MS_REC),
        ];
        assert_eq!(plan(&spec), expected);
    }
}
