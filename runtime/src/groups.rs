//! Control groups made, limited and removed: by their files, and where a group is that of a systemd unit through systemd as
//! well, so that it never undoes what was done.
//!
//! Which groups are units shows by their paths ([`Unit::at`]), which are on record: what one driver has made is removed
//! under the other. All calls block.

use std::time::{Duration, Instant};

use oarlock_cgroup::{Cgroup, CgroupError, Limits, Unit};
use oarlock_failpoint::step;
use oarlock_systemd::Systemd;

use crate::config::CgroupDriver;
use crate::error::Error;

const SYSTEMD_PATIENCE: Duration = Duration::from_secs(10);
const SYSTEMD_PAUSE: Duration = Duration::from_millis(500);

/// Whether groups are to be made through systemd, on a host whose unified hierarchy has the controllers or not.
pub(crate) fn by_systemd(wanted: CgroupDriver, cgroup_v2: bool) -> Result<bool, Error> {
    let obstacle = || {
        if !cgroup_v2 {
            return Some("systemd needs a host with control groups of version 2 alone".to_owned());
        }
        if !oarlock_systemd::is_running() {
            return Some("systemd has to be the host's service manager, and is not running".to_owned());
        }
        match ask_version() {
            Ok(version) => {
                tracing::info!(%version, "control groups are made through systemd");
                None
            }
            Err(error) => Some(format!("systemd does not answer: {}", crate::error::chain(&error))),
        }
    };
    match wanted {
        CgroupDriver::Cgroupfs => Ok(false),
        CgroupDriver::Auto => Ok(obstacle().is_none()),
        CgroupDriver::Systemd => match obstacle() {
            None => Ok(true),
            Some(problem) => Err(Error::Configuration { field: "cgroup_driver", problem }),
        },
    }
}

/// A systemd that is busy, as it is while a machine starts, is asked again: what it is taken for now holds for all pods.
fn ask_version() -> Result<String, oarlock_systemd::Error> {
    let deadline = Instant::now() + SYSTEMD_PATIENCE;
    loop {
        match Systemd::connect().and_then(|mut systemd| systemd.version()) {
            Err(_) if Instant::now() < deadline => std::thread::sleep(SYSTEMD_PAUSE),
            asked => return asked,
        }
    }
}

fn failed(operation: &'static str, group: &str) -> impl Fn(CgroupError) -> Error {
    move |source| Error::Cgroup { operation, group: group.to_owned(), source }
}

fn refused(operation: &'static str, unit: &Unit) -> impl Fn(oarlock_systemd::Error) -> Error {
    move |source| Error::Systemd { operation, unit: unit.name.clone(), source }
}

/// Makes the group of a sandbox. A slice that is not ours is its maker's, or comes with the first scope in it.
pub(crate) fn create(group: &str, ours: bool) -> Result<(), Error> {
    match Unit::at(group) {
        Some(slice) if ours => {
            let started = Systemd::connect()
                .and_then(|mut systemd| systemd.start_slice(&slice.name, "a pod of the Oarlock runtime", &[]));
            started.map_err(refused("start", &slice))
        }
        Some(_) => Ok(()),
        None => Cgroup::new(group).and_then(|group| group.create()).map_err(failed("create", group)),
    }
}

/// Sets limits. The files say it exactly; properties are what systemd sets after them, whenever it is loaded anew.
pub(crate) fn limit(group: &str, limits: &Limits) -> Result<(), Error> {
    if let Some(unit) = Unit::at(group) {
        let properties = oarlock_systemd::of_limits(limits);
        let set = Systemd::connect().and_then(|mut systemd| systemd.set_properties(&unit.name, &properties));
        set.map_err(refused("limit", &unit))?;
    }
    Cgroup::new(group).and_then(|group| group.set_limits(limits)).map_err(failed("limit", group))
}

/// Kills what is left in a group and removes it, and its unit.
pub(crate) fn remove(group: &str) -> Result<(), Error> {
    let cgroup = Cgroup::new(group).map_err(failed("name", group))?;
    let unit = Unit::at(group).filter(|_| oarlock_systemd::is_running());
    // A scope ends with its last process; only a slice can be there without a group.
    if !cgroup.exists() && !unit.as_ref().is_some_and(Unit::is_slice) {
        return Ok(());
    }
    cgroup.kill().map_err(failed("kill", group))?;
    step("what was left in a control group is killed");
    if let Some(unit) = unit {
        Systemd::connect().and_then(|mut systemd| systemd.stop(&unit.name)).map_err(refused("stop", &unit))?;
        step("the unit of a control group is stopped");
    }
    cgroup.remove().map_err(failed("remove", group))
}
