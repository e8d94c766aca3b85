//! The tree of cgroups that pods live in: `kubepods`, `kubepods/burstable`, `kubepods/besteffort`, and one for each pod.
//!
//! With the systemd driver they are slices: `kubepods.slice`, `kubepods-burstable.slice` in it, and so on. Their limits are
//! told to systemd, which would undo others, and written to their files as well, as not all of them are properties. All
//! calls block.

use k8s_openapi::api::core::v1::Pod;
use oarlock_cgroup::{Cgroup, CgroupError, Limits, Unit, expand_slice, slice_name};
use oarlock_systemd::Systemd;

use crate::node::capacity::Capacity;
use crate::spec::resources::{Qos, cpu_quota, cpu_shares, pod_limits, pod_requests, qos_of};
use crate::{Config, spec};

/// A pod cgroup that cannot be made or removed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PodCgroupError {
    #[error(transparent)]
    Files(#[from] CgroupError),
    #[error("cannot {operation} {slice}")]
    Systemd {
        operation: &'static str,
        slice: String,
        #[source]
        source: oarlock_systemd::Error,
    },
}

/// Names, makes and removes pod cgroups.
#[derive(Debug, Clone)]
pub(crate) struct PodCgroups {
    /// Cgroup above `kubepods`; empty for the root.
    pub root: String,
    /// False leaves cgroups to the runtime altogether.
    pub enabled: bool,
    /// The cgroups are slices of systemd.
    pub systemd: bool,
    /// What all pods together may use: CPU in thousandths, and memory in bytes where some is reserved for others.
    pub all_cpu_milli: i64,
    pub all_memory_bytes: Option<i64>,
    /// The most processes of a pod.
    pub pids_max: Option<i64>,
    /// The period of CPU limits in microseconds; None when they are not enforced.
    pub cpu_period_us: Option<u64>,
}

impl PodCgroups {
    pub(crate) fn of(config: &Config, capacity: &Capacity) -> Self {
        let whole = |name: &str| capacity.capacity.get(name).copied().unwrap_or(0);
        let reserved = |amount: u64| i64::try_from(amount).unwrap_or(i64::MAX);
        let memory = whole("memory") / 1000 - reserved(config.reserved_memory_bytes);
        let period = u64::try_from(config.cpu_cfs_quota_period.as_micros()).unwrap_or(100_000);
        Self {
            root: config.cgroup_root.clone(),
            enabled: config.cgroups_per_qos,
            systemd: config.systemd_cgroups,
            all_cpu_milli: whole("cpu") - reserved(config.reserved_cpu_millis),
            all_memory_bytes: Some(memory)
                .filter(|bytes| config.enforce_pods && config.reserved_memory_bytes > 0 && *bytes > 0),
            pids_max: config.pod_pids_limit,
            cpu_period_us: config.cpu_cfs_quota.then_some(period),
        }
    }

    /// The path of a pod's cgroup; without a pod that of its class.
    fn path(&self, qos: Qos, uid: Option<&str>) -> String {
        let mut parts: Vec<&str> = self.root.split('/').filter(|part| !part.is_empty()).collect();
        parts.push("kubepods");
        match qos {
            Qos::Guaranteed => {}
            Qos::Burstable => parts.push("burstable"),
            Qos::BestEffort => parts.push("besteffort"),
        }
        let pod = uid.map(|uid| format!("pod{uid}"));
        parts.extend(pod.as_deref());
        let plain = || parts.join("/");
        if self.systemd { expand_slice(&slice_name(&parts)).unwrap_or_else(plain) } else { plain() }
    }

    /// What the runtime is told as the sandbox's cgroup parent.
    pub(crate) fn parent(&self, pod: &Pod) -> String {
        match self.enabled {
            true => format!("/{}", self.path(qos_of(pod), Some(spec::pod_uid(pod)))),
            false => String::new(),
        }
    }

    /// Makes the upper levels.
    pub(crate) fn ensure_tree(&self) -> Result<(), PodCgroupError> {
        if !self.enabled {
            return Ok(());
        }
        let shares = |milli: i64| u64::try_from(cpu_shares(milli)).ok();
        let all = Limits {
            cpu_shares: shares(self.all_cpu_milli),
            memory_limit_bytes: Some(self.all_memory_bytes.unwrap_or(-1)),
            ..Default::default()
        };
        // That of Guaranteed pods holds the other two as well.
        set(&self.path(Qos::Guaranteed, None), &all)?;
        set(&self.path(Qos::Burstable, None), &Limits::default())?;
        set(&self.path(Qos::BestEffort, None), &Limits { cpu_shares: Some(2), ..Default::default() })
    }

    /// Gives burstable pods together the CPU weight of what they ask for.
    pub(crate) fn weigh_burstable(&self, requested_milli: i64) -> Result<(), PodCgroupError> {
        if !self.enabled {
            return Ok(());
        }
        let cpu_shares = u64::try_from(cpu_shares(requested_milli)).ok();
        set(&self.path(Qos::Burstable, None), &Limits { cpu_shares, ..Default::default() })
    }

    /// Makes the pod's cgroup with its limits. Idempotent.
    pub(crate) fn create(&self, pod: &Pod) -> Result<(), PodCgroupError> {
        if !self.enabled {
            return Ok(());
        }
        let (requests, limits) = (pod_requests(pod), pod_limits(pod));
        let shares = cpu_shares(requests.get("cpu").copied().unwrap_or(0));
        let cpu = limits.get("cpu").copied().zip(self.cpu_period_us);
        let limits = Limits {
            cpu_shares: u64::try_from(shares).ok(),
            cpu_quota_us: cpu.map(|(milli, period)| cpu_quota(milli, period)),
            cpu_period_us: cpu.map(|(_, period)| period),
            pids_max: self.pids_max,
            memory_limit_bytes: limits.get("memory").map(|milli| milli / 1000).filter(|bytes| *bytes > 0),
            ..Default::default()
        };
        set(&self.path(qos_of(pod), Some(spec::pod_uid(pod))), &limits)
    }

    /// Removes the pod's cgroup, whatever its class was, and whichever driver made it. Nothing there is success.
    pub(crate) fn remove(&self, uid: &str) -> Result<(), PodCgroupError> {
        if !self.enabled || uid.is_empty() {
            return Ok(());
        }
        let mut result = Ok(());
        for systemd in [false, true] {
            let named = PodCgroups { systemd, ..self.clone() };
            for qos in [Qos::Guaranteed, Qos::Burstable, Qos::BestEffort] {
                result = result.and(remove(&named.path(qos, Some(uid))));
            }
        }
        result
    }
}

/// Makes a cgroup, with systemd where it is a slice, and sets its limits.
fn set(path: &str, limits: &Limits) -> Result<(), PodCgroupError> {
    if let Some(slice) = Unit::at(path) {
        let properties = oarlock_systemd::of_limits(limits);
        let started = Systemd::connect()
            .and_then(|mut systemd| systemd.start_slice(&slice.name, "pods of the Oarlock agent", &properties));
        started.map_err(|source| PodCgroupError::Systemd { operation: "start", slice: slice.name, source })?;
    }
    let group = Cgroup::new(path)?;
    group.create()?;
    Ok(group.set_limits(limits)?)
}

fn remove(path: &str) -> Result<(), PodCgroupError> {
    let group = Cgroup::new(path)?;
    if !group.exists() {
        return Ok(());
    }
    if let Some(slice) = Unit::at(path) {
        let stopped = Systemd::connect().and_then(|mut systemd| systemd.stop(&slice.name));
        stopped.map_err(|source| PodCgroupError::Systemd { operation: "stop", slice: slice.name, source })?;
    }
    Ok(group.remove()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_are_named_as_upstream_names_them() {
        let pod: Pod = serde_json::from_value(serde_json::json!({"metadata": {"name": "p", "uid": "a-b"},
            "spec": {"containers": [{"name": "c", "resources": {"requests": {"cpu": "1"}}}]}}))
        .expect("a pod");
        let mut cgroups = PodCgroups::of(&Config::new("n", "127.0.0.1".parse().unwrap()), &Capacity::default());
        assert_eq!(cgroups.parent(&pod), "/kubepods/burstable/poda-b");
        cgroups.systemd = true;
        assert_eq!(cgroups.parent(&pod), "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-poda_b.slice");
        cgroups.root = "/node/sub-tree".to_owned();
        let slices =
            "/node.slice/node-sub_tree.slice/node-sub_tree-kubepods.slice/node-sub_tree-kubepods-burstable.slice";
        assert_eq!(cgroups.parent(&pod), format!("{slices}/node-sub_tree-kubepods-burstable-poda_b.slice"));
        cgroups.systemd = false;
        assert_eq!(cgroups.parent(&pod), "/node/sub-tree/kubepods/burstable/poda-b");
        cgroups.enabled = false;
        assert_eq!(cgroups.parent(&pod), "");
    }
}
