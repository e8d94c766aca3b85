//! Daemons beside the pods: holding their cgroups to what is reserved for them, and what pods may use of swap.
//!
//! The groups are the administrator's. They have to be there; nothing is moved into them or out.

use std::sync::Arc;

use oarlock_cgroup::{Cgroup, CgroupError, Layout, Limits, Unit};
use oarlock_systemd::Systemd;

use crate::recorder::Level;
use crate::shared::Shared;
use crate::spec::resources::{SWAP_MAX, Swap, cpu_shares};

/// A group of daemons and what they may use at most; what is None is left as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnforcedGroup {
    /// `system` or `kube`, as events show it.
    pub whose: &'static str,
    pub cgroup: String,
    pub cpu_millis: Option<u64>,
    pub memory_bytes: Option<u64>,
    pub pids: Option<u64>,
}

/// A group that cannot be held to its reservation.
#[derive(Debug, thiserror::Error)]
pub enum ReservedError {
    #[error("{whose} reserved cgroup {cgroup} does not exist")]
    Missing { whose: &'static str, cgroup: String },
    #[error("set limits of {whose} reserved cgroup {cgroup}")]
    Limits {
        whose: &'static str,
        cgroup: String,
        #[source]
        source: CgroupError,
    },
    #[error("tell systemd the limits of {whose} reserved cgroup {cgroup}")]
    Systemd {
        whose: &'static str,
        cgroup: String,
        #[source]
        source: oarlock_systemd::Error,
    },
}

impl EnforcedGroup {
    fn limits(&self) -> Limits {
        let signed = |amount: u64| i64::try_from(amount).unwrap_or(i64::MAX);
        Limits {
            cpu_shares: self.cpu_millis.and_then(|milli| u64::try_from(cpu_shares(signed(milli))).ok()),
            memory_limit_bytes: self.memory_bytes.map(signed),
            pids_max: self.pids.map(signed),
            ..Default::default()
        }
    }

    /// Where cgroups are made `by_systemd` it is told as well, so that it does not undo it. Blocks.
    fn enforce(&self, by_systemd: bool) -> Result<(), ReservedError> {
        let (whose, cgroup) = (self.whose, self.cgroup.clone());
        let failed = |source| ReservedError::Limits { whose, cgroup: cgroup.clone(), source };
        let group = Cgroup::new(&self.cgroup).map_err(failed)?;
        if !group.exists() {
            return Err(ReservedError::Missing { whose, cgroup: cgroup.clone() });
        }
        if let Some(unit) = Unit::at(group.path()).filter(|_| by_systemd) {
            let properties = oarlock_systemd::of_limits(&self.limits());
            let told = Systemd::connect().and_then(|mut systemd| systemd.set_properties(&unit.name, &properties));
            told.map_err(|source| ReservedError::Systemd { whose, cgroup: cgroup.clone(), source })?;
        }
        group.set_limits(&self.limits()).map_err(failed)
    }
}

/// Holds every group to its reservation.
pub(crate) async fn enforce(shared: &Arc<Shared>) -> Result<(), ReservedError> {
    let by_systemd = shared.cgroups.load().systemd;
    for group in shared.config.enforced.clone() {
        let (whose, cgroup) = (group.whose, group.cgroup.clone());
        let done = tokio::task::spawn_blocking(move || group.enforce(by_systemd)).await;
        let node = &shared.config.node_name;
        match done.unwrap_or_else(|_| Err(ReservedError::Missing { whose, cgroup: cgroup.clone() })) {
            Ok(()) => {
                let text = format!("Updated limits on {whose} reserved cgroup {cgroup}");
                shared.recorder.node(node, Level::Normal, "NodeAllocatableEnforced", text);
            }
            Err(error) => {
                let text = format!("Failed to enforce {whose} reserved cgroup limits on {cgroup:?}: {error}");
                shared.recorder.node(node, Level::Warning, "FailedNodeAllocatableEnforcement", text);
                return Err(error);
            }
        }
    }
    Ok(())
}

/// What containers may use of swap; `limited` is the node's, where Burstable pods share it. Blocks.
pub(crate) fn swap(limited: Option<i64>) -> Swap {
    let bounded = Layout::host().is_ok_and(|layout| layout.is_v2() && swap_is_bounded(layout));
    swap_of(bounded, limited)
}

fn swap_of(bounded: bool, limited: Option<i64>) -> Swap {
    match (bounded, limited) {
        (false, _) => Swap::WithMemory,
        (true, None) => Swap::Nothing,
        (true, Some(node_bytes)) => Swap::Share { node_bytes },
    }
}

/// Whether the kernel bounds swap by group: the root has no such file, the agent's own group has.
fn swap_is_bounded(layout: &Layout) -> bool {
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = own.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/").trim_start_matches('/').to_owned();
    let Some(root) = layout.controller("memory") else { return false };
    let below = std::fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
    below.chain([root.join(own)]).any(|group| group.join(SWAP_MAX).exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_reserved_is_bounded() {
        let mut group = EnforcedGroup {
            whose: "system",
            cgroup: "/system.slice".into(),
            cpu_millis: Some(500),
            memory_bytes: Some(1 << 30),
            pids: None,
        };
        let expected = Limits { cpu_shares: Some(512), memory_limit_bytes: Some(1 << 30), ..Default::default() };
        assert_eq!(group.limits(), expected);
        group.memory_bytes = None;
        assert_eq!(group.limits().memory_limit_bytes, None);
        group.cgroup = "/there-is-no-such-group".into();
        let refused = group.enforce(false).unwrap_err().to_string();
        assert_eq!(refused, "system reserved cgroup /there-is-no-such-group does not exist");
    }

    #[test]
    fn swap_needs_version_2_and_a_word_of_the_administrator() {
        assert_eq!(swap_of(false, Some(9)), Swap::WithMemory);
        assert_eq!(swap_of(true, None), Swap::Nothing);
        assert_eq!(swap_of(true, Some(9)), Swap::Share { node_bytes: 9 });
    }
}
