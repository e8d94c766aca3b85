//! The tree of cgroups that pods live in: `kubepods`, `kubepods/burstable`, `kubepods/besteffort`, and one for each pod.
//!
//! With the systemd driver the runtime makes the slices; this module then only names them. All calls block on files.

use k8s_openapi::api::core::v1::Pod;
use oarlock_cgroup::{Cgroup, CgroupError, Limits};

use crate::node::capacity::Capacity;
use crate::spec::resources::{Qos, cpu_quota, cpu_shares, pod_limits, pod_requests, qos_of};
use crate::{Config, spec};

/// Names, makes and removes pod cgroups.
#[derive(Debug, Clone)]
pub(crate) struct PodCgroups {
    /// Cgroup above `kubepods`; empty for the root.
    pub root: String,
    /// False leaves cgroups to the runtime altogether.
    pub enabled: bool,
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
            systemd: false,
            all_cpu_milli: whole("cpu") - reserved(config.reserved_cpu_millis),
            all_memory_bytes: Some(memory)
                .filter(|bytes| config.enforce_pods && config.reserved_memory_bytes > 0 && *bytes > 0),
            pids_max: config.pod_pids_limit,
            cpu_period_us: config.cpu_cfs_quota.then_some(period),
        }
    }

    fn path(&self, qos: Qos, uid: &str) -> String {
        let root = self.root.trim_matches('/');
        let base = if root.is_empty() { "kubepods".to_owned() } else { format!("{root}/kubepods") };
        match qos {
            Qos::Guaranteed => format!("{base}/pod{uid}"),
            Qos::Burstable => format!("{base}/burstable/pod{uid}"),
            Qos::BestEffort => format!("{base}/besteffort/pod{uid}"),
        }
    }

    /// What the runtime is told as the sandbox's cgroup parent.
    pub(crate) fn parent(&self, pod: &Pod) -> String {
        let (qos, uid) = (qos_of(pod), spec::pod_uid(pod));
        if !self.enabled {
            return String::new();
        }
        if !self.systemd {
            return format!("/{}", self.path(qos, uid));
        }
        let pod_part = format!("pod{}", uid.replace('-', "_"));
        match qos {
            Qos::Guaranteed => format!("/kubepods.slice/kubepods-{pod_part}.slice"),
            Qos::Burstable => {
                format!("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-{pod_part}.slice")
            }
            Qos::BestEffort => {
                format!("/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-{pod_part}.slice")
            }
        }
    }

    /// Makes the upper levels.
    pub(crate) fn ensure_tree(&self) -> Result<(), CgroupError> {
        if !self.enabled || self.systemd {
            return Ok(());
        }
        for qos in [Qos::Guaranteed, Qos::Burstable, Qos::BestEffort] {
            Cgroup::new(&self.class(qos))?.create()?;
        }
        let shares = |milli: i64| u64::try_from(cpu_shares(milli)).ok();
        Cgroup::new(&self.class(Qos::Guaranteed))?.set_limits(&Limits {
            cpu_shares: shares(self.all_cpu_milli),
            memory_limit_bytes: Some(self.all_memory_bytes.unwrap_or(-1)),
            ..Default::default()
        })?;
        Cgroup::new(&self.class(Qos::BestEffort))?.set_limits(&Limits { cpu_shares: Some(2), ..Default::default() })
    }

    /// The group that holds the pods of a class; that of Guaranteed ones holds the other two as well.
    fn class(&self, qos: Qos) -> String {
        self.path(qos, "").trim_end_matches("/pod").to_owned()
    }

    /// Gives burstable pods together the CPU weight of what they ask for.
    pub(crate) fn weigh_burstable(&self, requested_milli: i64) -> Result<(), CgroupError> {
        if !self.enabled || self.systemd {
            return Ok(());
        }
        let cpu_shares = u64::try_from(cpu_shares(requested_milli)).ok();
        Cgroup::new(&self.class(Qos::Burstable))?.set_limits(&Limits { cpu_shares, ..Default::default() })
    }

    /// Makes the pod's cgroup with its limits. Idempotent.
    pub(crate) fn create(&self, pod: &Pod) -> Result<(), CgroupError> {
        if !self.enabled || self.systemd {
            return Ok(());
        }
        let group_path = self.path(qos_of(pod), spec::pod_uid(pod));
        let group = Cgroup::new(&group_path)?;
        group.create()?;
        let (requests, limits) = (pod_requests(pod), pod_limits(pod));
        let shares = cpu_shares(requests.get("cpu").copied().unwrap_or(0));
        let cpu = limits.get("cpu").copied().zip(self.cpu_period_us);
        group.set_limits(&Limits {
            cpu_shares: u64::try_from(shares).ok(),
            cpu_quota_us: cpu.map(|(milli, period)| cpu_quota(milli, period)),
            cpu_period_us: cpu.map(|(_, period)| period),
            pids_max: self.pids_max,
            memory_limit_bytes: limits.get("memory").map(|milli| milli / 1000).filter(|bytes| *bytes > 0),
            ..Default::default()
        })
    }

    /// Removes the pod's cgroup, whatever its class was. Nothing there is success.
    pub(crate) fn remove(&self, uid: &str) -> Result<(), CgroupError> {
        if !self.enabled || self.systemd || uid.is_empty() {
            return Ok(());
        }
        let mut result = Ok(());
        for qos in [Qos::Guaranteed, Qos::Burstable, Qos::BestEffort] {
            let group_path = self.path(qos, uid);
            let removed =
                Cgroup::new(&group_path).and_then(|group| if group.exists() { group.remove() } else { Ok(()) });
            result = result.and(removed);
        }
        result
    }
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
        cgroups.enabled = false;
        assert_eq!(cgroups.parent(&pod), "");
    }
}
