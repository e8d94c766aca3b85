//! Adjustments of resources: what plugins set laid over what the specification has.

use oarlock_nri::api;
use oci_spec::runtime::{
    LinuxCpu, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType, LinuxHugepageLimitBuilder, LinuxMemory,
    LinuxPidsBuilder, LinuxResources,
};

use super::{named, parse};
use crate::nri::to_cri;
use crate::spec::{HostFacts, SpecError, resources};

pub(super) fn adjust(
    target: &mut LinuxResources,
    wanted: &api::LinuxResources,
    host: &HostFacts,
) -> Result<(), SpecError> {
    resources::check(&to_cri(wanted), host)?;
    if let Some(class) = wanted.blockio_class.as_ref().filter(|class| !class.value.is_empty()) {
        let reason = format!("this runtime knows no class {:?}", class.value);
        return Err(SpecError::unsupported(named("linux.resources.blockio_class"), reason));
    }
    if let Some(cpu) = &wanted.cpu {
        target.set_cpu(Some(lay_cpu(target.cpu().clone().unwrap_or_default(), cpu)));
    }
    if let Some(memory) = &wanted.memory {
        target.set_memory(Some(lay_memory(target.memory().unwrap_or_default(), memory, host)));
    }
    let mut pages = target.hugepage_limits().clone().unwrap_or_default();
    for limit in wanted.hugepage_limits.iter().filter(|_| host.hugetlb) {
        pages.retain(|known| known.page_size() != &limit.page_size);
        let limit = LinuxHugepageLimitBuilder::default()
            .page_size(limit.page_size.clone())
            .limit(i64::try_from(limit.limit).unwrap_or(i64::MAX))
            .build();
        pages.push(limit.map_err(|error| SpecError::invalid(named("linux.resources"), error.to_string()))?);
    }
    target.set_hugepage_limits(Some(pages).filter(|pages| !pages.is_empty()));
    if !wanted.unified.is_empty() {
        let mut unified = target.unified().clone().unwrap_or_default();
        unified.extend(wanted.unified.clone());
        target.set_unified(Some(unified));
    }
    if let Some(pids) = wanted.pids {
        let limit = LinuxPidsBuilder::default().limit(pids.limit.max(-1)).build();
        target.set_pids(Some(limit.map_err(|error| SpecError::invalid(named("linux.resources"), error.to_string()))?));
    }
    if !wanted.devices.is_empty() {
        let mut rules = target.devices().clone().unwrap_or_default();
        rules.extend(wanted.devices.iter().map(rule).collect::<Result<Vec<_>, _>>()?);
        target.set_devices(Some(rules));
    }
    Ok(())
}

fn lay_cpu(mut target: LinuxCpu, wanted: &api::LinuxCpu) -> LinuxCpu {
    if let Some(shares) = wanted.shares {
        target.set_shares(Some(shares.value));
    }
    if let Some(quota) = wanted.quota {
        target.set_quota(Some(quota.value));
    }
    if let Some(period) = wanted.period {
        target.set_period(Some(period.value));
    }
    if let Some(runtime) = wanted.realtime_runtime {
        target.set_realtime_runtime(Some(runtime.value));
    }
    if let Some(period) = wanted.realtime_period {
        target.set_realtime_period(Some(period.value));
    }
    if !wanted.cpus.is_empty() {
        target.set_cpus(Some(wanted.cpus.clone()));
    }
    if !wanted.mems.is_empty() {
        target.set_mems(Some(wanted.mems.clone()));
    }
    target
}

/// A limit alone leaves no swap, as everywhere.
#[allow(deprecated, reason = "plugins may still limit the kernel's memory")]
fn lay_memory(mut target: LinuxMemory, wanted: &api::LinuxMemory, host: &HostFacts) -> LinuxMemory {
    if let Some(limit) = wanted.limit.filter(|limit| limit.value != 0) {
        target.set_limit(Some(limit.value));
        if host.swap_accounting {
            target.set_swap(Some(limit.value));
        }
    }
    if let Some(swap) = wanted.swap.filter(|_| host.swap_accounting) {
        target.set_swap(Some(swap.value));
    }
    if let Some(reservation) = wanted.reservation {
        target.set_reservation(Some(reservation.value));
    }
    if let Some(kernel) = wanted.kernel {
        target.set_kernel(Some(kernel.value));
    }
    if let Some(kernel) = wanted.kernel_tcp {
        target.set_kernel_tcp(Some(kernel.value));
    }
    if let Some(swappiness) = wanted.swappiness {
        target.set_swappiness(Some(swappiness.value));
    }
    if let Some(disable) = wanted.disable_oom_killer {
        target.set_disable_oom_killer(Some(disable.value));
    }
    if let Some(hierarchy) = wanted.use_hierarchy {
        target.set_use_hierarchy(Some(hierarchy.value));
    }
    target
}

pub(super) fn rule(wanted: &api::LinuxDeviceCgroup) -> Result<LinuxDeviceCgroup, SpecError> {
    let field = "linux.resources.devices";
    let kind: LinuxDeviceType = match wanted.r#type.as_str() {
        "" => LinuxDeviceType::A,
        kind => parse(field, kind)?,
    };
    let access = if wanted.access.is_empty() { "rwm" } else { &wanted.access };
    if access.chars().any(|letter| !"rwm".contains(letter)) {
        return Err(SpecError::invalid(named(field), format!("access {access:?} is not of r, w and m")));
    }
    let mut builder = LinuxDeviceCgroupBuilder::default().allow(wanted.allow).typ(kind).access(access);
    if let Some(major) = wanted.major {
        builder = builder.major(major.value);
    }
    if let Some(minor) = wanted.minor {
        builder = builder.minor(minor.value);
    }
    builder.build().map_err(|error| SpecError::invalid(named(field), error.to_string()))
}
