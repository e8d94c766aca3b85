//! Limits: CRI's resources to the OCI runtime specification's, and one set of resources laid over another.

use std::collections::HashMap;

use oarlock_proto::cri;
use oci_spec::runtime::{
    LinuxCpuBuilder, LinuxDeviceCgroup, LinuxHugepageLimit, LinuxHugepageLimitBuilder, LinuxMemoryBuilder,
    LinuxPidsBuilder, LinuxResources, LinuxResourcesBuilder,
};

use super::{HostFacts, SpecError};
use crate::nri::Further;

const FIELD: &str = "linux.resources";

/// Refuses what makes no sense and what this host cannot do.
pub(crate) fn check(resources: &cri::LinuxContainerResources, host: &HostFacts) -> Result<(), SpecError> {
    let invalid = |field: &str, problem: String| Err(SpecError::invalid(format!("{FIELD}.{field}"), problem));
    if resources.cpu_period < 0 || (resources.cpu_period > 0 && !(1_000..=1_000_000).contains(&resources.cpu_period)) {
        return invalid("cpu_period", format!("{} is not between 1000 and 1000000 microseconds", resources.cpu_period));
    }
    if resources.cpu_shares < 0 {
        return invalid("cpu_shares", format!("{} is negative", resources.cpu_shares));
    }
    if !(-1000..=1000).contains(&resources.oom_score_adj) {
        return invalid("oom_score_adj", format!("{} is not between -1000 and 1000", resources.oom_score_adj));
    }
    let (memory, swap) = (resources.memory_limit_in_bytes, resources.memory_swap_limit_in_bytes);
    if swap > 0 && memory > 0 && swap < memory {
        return invalid("memory_swap_limit_in_bytes", format!("{swap} is less than the memory limit {memory}"));
    }
    for (field, list) in [("cpuset_cpus", &resources.cpuset_cpus), ("cpuset_mems", &resources.cpuset_mems)] {
        if !is_cpu_list(list) {
            return invalid(field, format!("{list:?} is not a list of ranges"));
        }
    }
    if !resources.unified.is_empty() && !host.cgroup_v2 {
        let reason = "this host has version 1 control groups".to_owned();
        return Err(SpecError::unsupported(format!("{FIELD}.unified"), reason));
    }
    if let Some(key) =
        resources.unified.keys().find(|key| key.contains('/') || key.starts_with("cgroup.") || !key.contains('.'))
    {
        return invalid("unified", format!("{key:?} is not a controller's file"));
    }
    if let Some(limit) = resources.hugepage_limits.iter().find(|limit| limit.limit > 0 && !host.hugetlb) {
        let field = format!("{FIELD}.hugepage_limits[{}]", limit.page_size);
        return Err(SpecError::unsupported(field, "this host has no hugetlb cgroup controller"));
    }
    Ok(())
}

/// The limits that a container's cgroup starts with; `devices` is the device access list.
pub(crate) fn to_oci(
    resources: Option<&cri::LinuxContainerResources>,
    devices: Vec<LinuxDeviceCgroup>,
    host: &HostFacts,
) -> Result<LinuxResources, SpecError> {
    let none = cri::LinuxContainerResources::default();
    let resources = resources.unwrap_or(&none);
    check(resources, host)?;
    let mut builder = LinuxResourcesBuilder::default().devices(devices);
    let failed = |error: oci_spec::OciSpecError| SpecError::invalid(FIELD, error.to_string());

    let mut cpu = LinuxCpuBuilder::default();
    if resources.cpu_shares > 0 {
        cpu = cpu.shares(resources.cpu_shares.unsigned_abs());
    }
    if resources.cpu_quota != 0 {
        cpu = cpu.quota(resources.cpu_quota);
    }
    if resources.cpu_period > 0 {
        cpu = cpu.period(resources.cpu_period.unsigned_abs());
    }
    if !resources.cpuset_cpus.is_empty() {
        cpu = cpu.cpus(resources.cpuset_cpus.clone());
    }
    if !resources.cpuset_mems.is_empty() {
        cpu = cpu.mems(resources.cpuset_mems.clone());
    }
    builder = builder.cpu(cpu.build().map_err(failed)?);

    let mut memory = LinuxMemoryBuilder::default();
    if resources.memory_limit_in_bytes != 0 {
        memory = memory.limit(resources.memory_limit_in_bytes);
    }
    if let Some(swap) = swap_limit(resources, host) {
        memory = memory.swap(swap);
    }
    builder = builder.memory(memory.build().map_err(failed)?);

    let pages = hugepages(resources, host).map_err(failed)?;
    if !pages.is_empty() {
        builder = builder.hugepage_limits(pages);
    }
    if !resources.unified.is_empty() {
        builder = builder.unified(resources.unified.clone().into_iter().collect::<HashMap<_, _>>());
    }
    builder.build().map_err(failed)
}

/// The resources in force written over those of a specification, whose other limits stay.
pub(crate) fn renew(
    current: &LinuxResources,
    resources: &cri::LinuxContainerResources,
    host: &HostFacts,
) -> Result<LinuxResources, SpecError> {
    let wanted = to_oci(Some(resources), Vec::new(), host)?;
    let mut renewed = current.clone();
    if let Some(wanted) = wanted.cpu() {
        let mut cpu = current.cpu().clone().unwrap_or_default();
        cpu.set_shares(wanted.shares()).set_quota(wanted.quota()).set_period(wanted.period());
        cpu.set_cpus(wanted.cpus().clone()).set_mems(wanted.mems().clone());
        renewed.set_cpu(Some(cpu));
    }
    if let Some(wanted) = wanted.memory() {
        let mut memory = current.memory().unwrap_or_default();
        memory.set_limit(wanted.limit()).set_swap(wanted.swap());
        renewed.set_memory(Some(memory));
    }
    renewed.set_hugepage_limits(wanted.hugepage_limits().clone());
    renewed.set_unified(wanted.unified().clone());
    Ok(renewed)
}

/// What plugins set beside CRI's resources.
pub(crate) fn further(mut resources: LinuxResources, further: Further) -> Result<LinuxResources, SpecError> {
    if let Some(limit) = further.pids_max {
        let pids = LinuxPidsBuilder::default().limit(limit).build();
        resources.set_pids(Some(pids.map_err(|error| SpecError::invalid(FIELD, error.to_string()))?));
    }
    if let Some(reservation) = further.memory_reservation_bytes {
        let mut memory = resources.memory().unwrap_or_default();
        memory.set_reservation(Some(reservation));
        resources.set_memory(Some(memory));
    }
    Ok(resources)
}

/// Memory and swap together: a container with a memory limit and no word on swap gets no swap.
pub(crate) fn swap_limit(resources: &cri::LinuxContainerResources, host: &HostFacts) -> Option<i64> {
    match (resources.memory_swap_limit_in_bytes, resources.memory_limit_in_bytes) {
        _ if !host.swap_accounting => None,
        (0, memory) if memory > 0 => Some(memory),
        (0, _) => None,
        (swap, _) => Some(swap),
    }
}

fn hugepages(
    resources: &cri::LinuxContainerResources,
    host: &HostFacts,
) -> Result<Vec<LinuxHugepageLimit>, oci_spec::OciSpecError> {
    // The agent sends a limit of zero for every page size; a host without the controller has nothing to limit.
    let limits = resources.hugepage_limits.iter().filter(|_| host.hugetlb);
    limits
        .map(|limit| {
            LinuxHugepageLimitBuilder::default()
                .page_size(limit.page_size.clone())
                .limit(i64::try_from(limit.limit).unwrap_or(i64::MAX))
                .build()
        })
        .collect()
}

/// The oom_score_adj to give: the wanted one, raised to what this process may give.
pub(crate) fn oom_score_adj(resources: Option<&cri::LinuxContainerResources>, host: &HostFacts) -> i32 {
    let wanted = resources.map_or(0, |resources| i32::try_from(resources.oom_score_adj).unwrap_or(0));
    host.oom_score_adj_floor.map_or(wanted, |floor| wanted.max(floor))
}

/// Lays an update over what is in force; zero and empty mean "as it is".
pub(crate) fn updated(
    current: &cri::LinuxContainerResources,
    update: &cri::LinuxContainerResources,
) -> cri::LinuxContainerResources {
    let mut merged = current.clone();
    let number = |new: i64, old: &mut i64| {
        if new != 0 {
            *old = new;
        }
    };
    number(update.cpu_period, &mut merged.cpu_period);
    number(update.cpu_quota, &mut merged.cpu_quota);
    number(update.cpu_shares, &mut merged.cpu_shares);
    number(update.memory_limit_in_bytes, &mut merged.memory_limit_in_bytes);
    number(update.memory_swap_limit_in_bytes, &mut merged.memory_swap_limit_in_bytes);
    number(update.oom_score_adj, &mut merged.oom_score_adj);
    if !update.cpuset_cpus.is_empty() {
        merged.cpuset_cpus.clone_from(&update.cpuset_cpus);
    }
    if !update.cpuset_mems.is_empty() {
        merged.cpuset_mems.clone_from(&update.cpuset_mems);
    }
    for limit in &update.hugepage_limits {
        merged.hugepage_limits.retain(|known| known.page_size != limit.page_size);
        merged.hugepage_limits.push(limit.clone());
    }
    merged.unified.extend(update.unified.clone());
    merged
}

fn is_cpu_list(list: &str) -> bool {
    list.is_empty()
        || list.split(',').all(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            matches!((first.parse::<u16>(), last.parse::<u16>()), (Ok(first), Ok(last)) if first <= last)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resources(change: impl FnOnce(&mut cri::LinuxContainerResources)) -> cri::LinuxContainerResources {
        let mut resources = cri::LinuxContainerResources::default();
        change(&mut resources);
        resources
    }

    #[test]
    fn a_memory_limit_alone_leaves_no_swap() {
        let host = HostFacts { swap_accounting: true, ..HostFacts::default() };
        let limited = resources(|r| r.memory_limit_in_bytes = 100);
        let oci = to_oci(Some(&limited), Vec::new(), &host).unwrap();
        let memory = oci.memory().as_ref().unwrap();
        assert_eq!((memory.limit(), memory.swap()), (Some(100), Some(100)));
        let without = to_oci(Some(&limited), Vec::new(), &HostFacts::default()).unwrap();
        assert_eq!(without.memory().as_ref().unwrap().swap(), None);
    }

    #[test]
    fn hugepages_of_size_zero_pass_where_there_is_no_controller_and_others_do_not() {
        let limit = |limit| cri::HugepageLimit { page_size: "2MB".into(), limit };
        assert!(check(&resources(|r| r.hugepage_limits = vec![limit(0)]), &HostFacts::default()).is_ok());
        assert!(check(&resources(|r| r.hugepage_limits = vec![limit(1)]), &HostFacts::default()).is_err());
    }

    #[test]
    fn nonsense_is_refused() {
        let host = HostFacts { cgroup_v2: true, ..HostFacts::default() };
        for bad in [
            resources(|r| r.cpu_period = 5),
            resources(|r| r.cpuset_cpus = "0-".into()),
            resources(|r| r.cpuset_cpus = "3-1".into()),
            resources(|r| r.oom_score_adj = 1001),
            resources(|r| r.unified = [("../memory.max".into(), "1".into())].into()),
            resources(|r| (r.memory_limit_in_bytes, r.memory_swap_limit_in_bytes) = (10, 5)),
        ] {
            assert!(check(&bad, &host).is_err(), "{bad:?}");
        }
        assert!(check(&resources(|r| r.cpuset_cpus = "0-1,3".into()), &host).is_ok());
    }

    #[test]
    fn an_update_changes_only_what_it_names() {
        let merged = updated(
            &resources(|r| (r.cpu_shares, r.memory_limit_in_bytes) = (2, 100)),
            &resources(|r| r.memory_limit_in_bytes = 200),
        );
        assert_eq!((merged.cpu_shares, merged.memory_limit_in_bytes), (2, 200));
    }

    #[test]
    fn a_refused_oom_score_is_raised_to_what_is_allowed() {
        let host = HostFacts { oom_score_adj_floor: Some(0), ..HostFacts::default() };
        assert_eq!(oom_score_adj(Some(&resources(|r| r.oom_score_adj = -998)), &host), 0);
        assert_eq!(oom_score_adj(Some(&resources(|r| r.oom_score_adj = 900)), &host), 900);
        assert_eq!(oom_score_adj(Some(&resources(|r| r.oom_score_adj = -998)), &HostFacts::default()), -998);
    }
}
