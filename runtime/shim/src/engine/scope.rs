//! The systemd scope of a container: started before its first process is, stopped when its last one is gone.
//!
//! A scope starts with a process in it and ends with the last one, and the container's first process is born by the engine
//! into a group that has to be there. So a process that does nothing holds the scope open until then. It is neither counted
//! in the container nor held to the container's limits for longer than that, as this helper would be. When the helper is
//! killed it dies as well, and the scope with it: an attempt that was cut off leaves nothing.
#![allow(unsafe_code, reason = "forks a process that only waits")]

use std::collections::BTreeMap;

use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork};
use oarlock_cgroup::{Limits, Unit};
use oarlock_shim_api::RemoteError;
use oarlock_systemd::{Scope, Systemd};
use oci_spec::runtime::{LinuxResources, Spec};

use super::adapt::Place;
use super::{failed, io_failed};

/// A process that waits for its end, which comes with this value's.
pub(super) struct Holder(Pid);

impl Holder {
    fn new() -> nix::Result<Holder> {
        let helper = nix::unistd::getpid().as_raw();
        // SAFETY: a helper has one thread; the child calls nothing but async-signal-safe functions.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => Ok(Holder(child)),
            // SAFETY: numbers only; the descriptors are copies, of which this process needs none.
            ForkResult::Child => unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
                // A helper that was killed before that is nobody's parent any more.
                if libc::getppid() != helper {
                    libc::_exit(1);
                }
                libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0);
                loop {
                    libc::pause();
                }
            },
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGKILL);
        let _ = waitpid(self.0, None);
    }
}

/// Starts the scope of a container, if it is to have one, with the limits of its specification. One that was left by an
/// attempt before is ended first.
pub(super) fn start(place: &Place, container_id: &str, spec: &Spec) -> Result<Option<Holder>, RemoteError> {
    let Some(unit) = Unit::at(&place.cgroup).filter(|_| place.scope.is_some()) else { return Ok(None) };
    let holder = Holder::new().map_err(|errno| io_failed("fork")(errno.into()))?;
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let scope = Scope {
        name: &unit.name,
        slice: &unit.slice,
        description: &format!("container {container_id}"),
        pids: vec![holder.0.as_raw() as u32],
        properties: oarlock_systemd::of_limits(&limits(resources)),
    };
    let started = Systemd::connect().and_then(|mut systemd| systemd.start_scope(&scope));
    started.map_err(|error| failed(&format!("start the systemd scope {}", unit.name), &error))?;
    Ok(Some(holder))
}

/// Ends the scope at this path, whose processes are dead, and what systemd knows of it.
pub(super) fn stop(cgroup: &str) -> Result<(), RemoteError> {
    let Some(unit) = Unit::at(cgroup).filter(|_| oarlock_systemd::is_running()) else { return Ok(()) };
    let stopped = Systemd::connect().and_then(|mut systemd| systemd.stop(&unit.name));
    stopped.map_err(|error| failed(&format!("stop the systemd scope {}", unit.name), &error))
}

/// The limits of a specification. Where it has none on processes there is to be none: systemd's own default is one.
fn limits(resources: Option<&LinuxResources>) -> Limits {
    let cpu = resources.and_then(|resources| resources.cpu().clone()).unwrap_or_default();
    let memory = resources.and_then(|resources| *resources.memory()).unwrap_or_default();
    let pids = resources.and_then(|resources| resources.pids().as_ref()).map_or(-1, |pids| pids.limit());
    let unified = resources.and_then(|resources| resources.unified().clone()).unwrap_or_default();
    Limits {
        cpu_shares: cpu.shares(),
        cpu_quota_us: cpu.quota(),
        cpu_period_us: cpu.period(),
        cpuset_cpus: cpu.cpus().clone(),
        cpuset_mems: cpu.mems().clone(),
        memory_limit_bytes: memory.limit(),
        memory_swap_bytes: memory.swap(),
        memory_reservation_bytes: memory.reservation(),
        pids_max: Some(if pids > 0 { pids } else { -1 }),
        hugepages: BTreeMap::new(),
        unified: unified.into_iter().collect(),
    }
}

#[cfg(test)]
mod tests {
    use oarlock_systemd::Value;

    use super::*;

    #[test]
    fn a_specification_without_limits_is_free_of_systemds_own() {
        assert_eq!(oarlock_systemd::of_limits(&limits(None)), [("TasksMax", Value::U64(u64::MAX))]);
    }

    #[test]
    fn all_limits_of_a_specification_that_systemd_has_are_told() {
        let resources = serde_json::json!({
            "cpu": {"shares": 512, "quota": 50_000, "period": 100_000, "cpus": "1"},
            "memory": {"limit": 64 << 20, "swap": 64 << 20}, "pids": {"limit": 7},
            "unified": {"memory.high": "1048576"}});
        let resources: LinuxResources = serde_json::from_value(resources).unwrap();
        let named = oarlock_systemd::of_limits(&limits(Some(&resources)));
        let names: Vec<&str> = named.iter().map(|(name, _)| *name).collect();
        let expected = [
            "CPUWeight",
            "CPUQuotaPeriodUSec",
            "CPUQuotaPerSecUSec",
            "MemoryMax",
            "MemorySwapMax",
            "TasksMax",
            "AllowedCPUs",
            "MemoryHigh",
        ];
        assert_eq!(names, expected);
    }

    #[test]
    fn a_holder_ends_with_its_value() {
        let holder = Holder::new().unwrap();
        let pid = holder.0;
        assert!(kill(pid, None).is_ok());
        drop(holder);
        assert!(kill(pid, None).is_err());
    }
}
