//! Ending containers: everything by cgroup, nothing by remembered pid, so that a recycled pid is never signalled.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use oarlock_cgroup::Cgroup;
use oarlock_shim_api::{ErrorKind, RemoteError};
use oci_spec::runtime::Spec;

use super::{adapted_bundle, failed, io_failed, scope};
use crate::forked::Finished;

const REMOVAL_TRIES: usize = 8;

/// What to remove.
pub(crate) struct RemoveJob {
    pub(crate) container_id: String,
    pub(crate) state_dir: PathBuf,
    pub(crate) container_root: PathBuf,
    /// Another runtime has run its hooks.
    pub(crate) hooks_done: bool,
}

/// Kills what is left of a container and removes its cgroups and files. Every step is taken even if one fails, and
/// what is gone already is a success.
pub(crate) fn remove(job: &RemoveJob) -> Finished {
    let directory = adapted_bundle(&job.state_dir, &job.container_id);
    let mut failures = Vec::new();
    let mut note = |result: Result<(), RemoteError>| failures.extend(result.err());
    match Spec::load(directory.join("config.json")) {
        Ok(spec) => {
            note(remove_cgroup(&spec));
            if !job.hooks_done {
                note(run_poststop(&spec, &job.container_root.join(&job.container_id)));
            }
        }
        // Creation did not get as far as to make anything.
        Err(_) if !directory.join("config.json").exists() => {}
        Err(error) => note(Err(failed("read the container's specification", &error))),
    }
    note(remove_dir(&job.container_root.join(&job.container_id)));
    note(remove_dir(&directory));
    if failures.is_empty() {
        return Ok(Default::default());
    }
    let texts: Vec<String> = failures.into_iter().map(|error| error.message).collect();
    Err(RemoteError::new(ErrorKind::Engine, texts.join("; ")))
}

fn remove_cgroup(spec: &Spec) -> Result<(), RemoteError> {
    let path = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().clone());
    let Some(path) = path else { return Ok(()) };
    let cgroup = Cgroup::new(&path.to_string_lossy()).map_err(|error| failed("name the cgroup", &error))?;
    cgroup.kill().map_err(|error| failed("kill the container's processes", &error))?;
    scope::stop(cgroup.path())?;
    cgroup.remove().map_err(|error| failed("remove the cgroup", &error))
}

fn run_poststop(spec: &Spec, root: &Path) -> Result<(), RemoteError> {
    let hooks = spec.hooks().as_ref().and_then(|hooks| hooks.poststop().clone()).unwrap_or_default();
    if hooks.is_empty() {
        return Ok(());
    }
    let state = fs::read(root.join("state.json")).unwrap_or_default();
    hooks.iter().try_for_each(|hook| super::external::run_hook(hook, &state))
}

/// The shim may be putting the end of a process it has just reaped on record there: what appears during the removal is
/// removed as well.
fn remove_dir(path: &Path) -> Result<(), RemoteError> {
    for _ in 0..REMOVAL_TRIES {
        match fs::remove_dir_all(path) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io_failed(&format!("remove {}", path.display()))(error));
            }
            _ => return Ok(()),
        }
    }
    Err(io_failed(&format!("remove {}", path.display()))(io::ErrorKind::DirectoryNotEmpty.into()))
}

/// Kills all that is left after the first process of a container without a PID namespace of its own has ended.
pub(crate) fn sweep(cgroup: &str) -> Finished {
    let cgroup = Cgroup::new(cgroup).map_err(|error| failed("name the cgroup", &error))?;
    cgroup.kill().map_err(|error| failed("kill the container's processes", &error))?;
    Ok(Default::default())
}

/// Signals every process of a container.
pub(crate) fn signal_all(cgroup: &str, signal: i32) -> Finished {
    let invalid = |_| RemoteError::new(ErrorKind::Invalid, format!("no signal has number {signal}"));
    let signal = Signal::try_from(signal).map_err(invalid)?;
    let cgroup = Cgroup::new(cgroup).map_err(|error| failed("name the cgroup", &error))?;
    if signal == Signal::SIGKILL {
        cgroup.kill().map_err(|error| failed("kill the container's processes", &error))?;
    } else {
        cgroup.signal(signal).map_err(|error| failed("signal the container's processes", &error))?;
    }
    Ok(Default::default())
}

/// Freezes or thaws a container.
pub(crate) fn set_frozen(cgroup: &str, frozen: bool) -> Finished {
    let cgroup = Cgroup::new(cgroup).map_err(|error| failed("name the cgroup", &error))?;
    let done = if frozen { cgroup.freeze() } else { cgroup.thaw() };
    done.map_err(|error| failed(if frozen { "freeze the container" } else { "thaw the container" }, &error))?;
    Ok(Default::default())
}
