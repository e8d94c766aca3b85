//! Resources: what of them an answer sets, and one set of them laid over another.

use crate::api::{Field, LinuxCpu, LinuxMemory, LinuxResources};
use crate::error::Error;
use crate::owners::Owners;

/// Claims all that `wanted` sets.
pub(super) fn claim(owners: &mut Owners, container: &str, wanted: &LinuxResources, plugin: &str) -> Result<(), Error> {
    for (field, set) in fields(wanted) {
        if set {
            owners.claim(container, field, plugin)?;
        }
    }
    for limit in &wanted.hugepage_limits {
        owners.claim_entry(container, Field::HugepageLimits, &limit.page_size, plugin)?;
    }
    for key in wanted.unified.keys() {
        owners.claim_entry(container, Field::CgroupsUnified, key, plugin)?;
    }
    Ok(())
}

fn fields(wanted: &LinuxResources) -> Vec<(Field, bool)> {
    let (memory, cpu) = (wanted.memory.unwrap_or_default(), wanted.cpu.clone().unwrap_or_default());
    vec![
        (Field::MemLimit, memory.limit.is_some()),
        (Field::MemReservation, memory.reservation.is_some()),
        (Field::MemSwapLimit, memory.swap.is_some()),
        (Field::MemKernelLimit, memory.kernel.is_some()),
        (Field::MemTcpLimit, memory.kernel_tcp.is_some()),
        (Field::MemSwappiness, memory.swappiness.is_some()),
        (Field::MemDisableOomKiller, memory.disable_oom_killer.is_some()),
        (Field::MemUseHierarchy, memory.use_hierarchy.is_some()),
        (Field::CpuShares, cpu.shares.is_some()),
        (Field::CpuQuota, cpu.quota.is_some()),
        (Field::CpuPeriod, cpu.period.is_some()),
        (Field::CpuRealtimeRuntime, cpu.realtime_runtime.is_some()),
        (Field::CpuRealtimePeriod, cpu.realtime_period.is_some()),
        (Field::CpuSetCpUs, !cpu.cpus.is_empty()),
        (Field::CpuSetMems, !cpu.mems.is_empty()),
        (Field::BlockioClass, wanted.blockio_class.is_some()),
        (Field::RdtClass, wanted.rdt_class.is_some()),
        (Field::PidsLimit, wanted.pids.is_some()),
    ]
}

/// Lays `wanted` over `target`.
pub(super) fn lay_over(target: &mut LinuxResources, wanted: &LinuxResources) {
    if let Some(memory) = &wanted.memory {
        lay_memory(target.memory.get_or_insert_default(), memory);
    }
    if let Some(cpu) = &wanted.cpu {
        lay_cpu(target.cpu.get_or_insert_default(), cpu);
    }
    for limit in &wanted.hugepage_limits {
        target.hugepage_limits.retain(|known| known.page_size != limit.page_size);
        target.hugepage_limits.push(limit.clone());
    }
    target.unified.extend(wanted.unified.clone());
    target.devices.extend(wanted.devices.iter().cloned());
    set(&mut target.blockio_class, &wanted.blockio_class);
    set(&mut target.rdt_class, &wanted.rdt_class);
    set(&mut target.pids, &wanted.pids);
}

fn lay_memory(target: &mut LinuxMemory, wanted: &LinuxMemory) {
    set(&mut target.limit, &wanted.limit);
    set(&mut target.reservation, &wanted.reservation);
    set(&mut target.swap, &wanted.swap);
    set(&mut target.kernel, &wanted.kernel);
    set(&mut target.kernel_tcp, &wanted.kernel_tcp);
    set(&mut target.swappiness, &wanted.swappiness);
    set(&mut target.disable_oom_killer, &wanted.disable_oom_killer);
    set(&mut target.use_hierarchy, &wanted.use_hierarchy);
}

fn lay_cpu(target: &mut LinuxCpu, wanted: &LinuxCpu) {
    set(&mut target.shares, &wanted.shares);
    set(&mut target.quota, &wanted.quota);
    set(&mut target.period, &wanted.period);
    set(&mut target.realtime_runtime, &wanted.realtime_runtime);
    set(&mut target.realtime_period, &wanted.realtime_period);
    for (target, wanted) in [(&mut target.cpus, &wanted.cpus), (&mut target.mems, &wanted.mems)] {
        if !wanted.is_empty() {
            target.clone_from(wanted);
        }
    }
}

fn set<T: Clone>(target: &mut Option<T>, wanted: &Option<T>) {
    if wanted.is_some() {
        target.clone_from(wanted);
    }
}
