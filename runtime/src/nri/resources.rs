//! Resources between the three forms that they have: CRI's, the OCI specification's, and plugins'. Pure.

use oarlock_nri::api;
use oarlock_proto::cri;
use oci_spec::runtime as oci;

use crate::spec::SpecError;

/// What plugins may set of a container that runs and CRI has no word for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Further {
    pub pids_max: Option<i64>,
    pub memory_reservation_bytes: Option<i64>,
}

/// CRI's resources as plugins see them.
pub(crate) fn of_cri(resources: &cri::LinuxContainerResources) -> api::LinuxResources {
    let unsigned = |value: i64| u64::try_from(value).ok().map(|value| api::OptionalUInt64 { value });
    let signed = |value: i64| Some(api::OptionalInt64 { value });
    let pages = resources.hugepage_limits.iter();
    api::LinuxResources {
        cpu: Some(api::LinuxCpu {
            shares: unsigned(resources.cpu_shares),
            quota: signed(resources.cpu_quota),
            period: unsigned(resources.cpu_period),
            cpus: resources.cpuset_cpus.clone(),
            mems: resources.cpuset_mems.clone(),
            ..api::LinuxCpu::default()
        }),
        memory: Some(api::LinuxMemory {
            limit: signed(resources.memory_limit_in_bytes),
            ..api::LinuxMemory::default()
        }),
        hugepage_limits: pages
            .map(|limit| api::HugepageLimit { page_size: limit.page_size.clone(), limit: limit.limit })
            .collect(),
        unified: resources.unified.clone().into_iter().collect(),
        ..api::LinuxResources::default()
    }
}

/// What a plugin sets, in CRI's words; what it leaves alone is zero or empty, which is CRI's word for that.
pub(crate) fn to_cri(resources: &api::LinuxResources) -> cri::LinuxContainerResources {
    let unsigned =
        |value: &Option<api::OptionalUInt64>| value.map_or(0, |v| i64::try_from(v.value).unwrap_or(i64::MAX));
    let signed = |value: &Option<api::OptionalInt64>| value.map_or(0, |v| v.value);
    let cpu = resources.cpu.clone().unwrap_or_default();
    let memory = resources.memory.unwrap_or_default();
    cri::LinuxContainerResources {
        cpu_shares: unsigned(&cpu.shares),
        cpu_quota: signed(&cpu.quota),
        cpu_period: unsigned(&cpu.period),
        cpuset_cpus: cpu.cpus,
        cpuset_mems: cpu.mems,
        memory_limit_in_bytes: signed(&memory.limit),
        memory_swap_limit_in_bytes: signed(&memory.swap),
        hugepage_limits: resources
            .hugepage_limits
            .iter()
            .map(|limit| cri::HugepageLimit { page_size: limit.page_size.clone(), limit: limit.limit })
            .collect(),
        unified: resources.unified.clone().into_iter().collect(),
        ..cri::LinuxContainerResources::default()
    }
}

/// What CRI has no word for. What cannot be changed of a container that exists is refused.
pub(crate) fn to_further(resources: &api::LinuxResources) -> Result<Further, SpecError> {
    let memory = resources.memory.unwrap_or_default();
    let cpu = resources.cpu.clone().unwrap_or_default();
    let refused = [
        ("memory.kernel", memory.kernel.is_some()),
        ("memory.kernel_tcp", memory.kernel_tcp.is_some()),
        ("memory.swappiness", memory.swappiness.is_some()),
        ("memory.disable_oom_killer", memory.disable_oom_killer.is_some()),
        ("memory.use_hierarchy", memory.use_hierarchy.is_some()),
        ("cpu.realtime_runtime", cpu.realtime_runtime.is_some()),
        ("cpu.realtime_period", cpu.realtime_period.is_some()),
        ("blockio_class", resources.blockio_class.is_some()),
        ("rdt_class", resources.rdt_class.is_some()),
        ("devices", !resources.devices.is_empty()),
    ];
    if let Some((field, _)) = refused.into_iter().find(|(_, set)| *set) {
        let reason = "it cannot be changed of a container that exists";
        return Err(SpecError::unsupported(format!("update.linux.resources.{field}"), reason));
    }
    Ok(Further {
        pids_max: resources.pids.map(|pids| pids.limit),
        memory_reservation_bytes: memory.reservation.map(|reservation| reservation.value),
    })
}

/// A specification's resources as plugins see them.
#[allow(deprecated, reason = "plugins are shown every limit")]
pub(crate) fn of_oci(resources: &oci::LinuxResources) -> api::LinuxResources {
    let signed = |value: Option<i64>| value.map(|value| api::OptionalInt64 { value });
    let unsigned = |value: Option<u64>| value.map(|value| api::OptionalUInt64 { value });
    let flag = |value: Option<bool>| value.map(|value| api::OptionalBool { value });
    api::LinuxResources {
        memory: resources.memory().as_ref().map(|memory| api::LinuxMemory {
            limit: signed(memory.limit()),
            reservation: signed(memory.reservation()),
            swap: signed(memory.swap()),
            kernel: signed(memory.kernel()),
            kernel_tcp: signed(memory.kernel_tcp()),
            swappiness: unsigned(memory.swappiness()),
            disable_oom_killer: flag(memory.disable_oom_killer()),
            use_hierarchy: flag(memory.use_hierarchy()),
        }),
        cpu: resources.cpu().as_ref().map(|cpu| api::LinuxCpu {
            shares: unsigned(cpu.shares()),
            quota: signed(cpu.quota()),
            period: unsigned(cpu.period()),
            realtime_runtime: signed(cpu.realtime_runtime()),
            realtime_period: unsigned(cpu.realtime_period()),
            cpus: cpu.cpus().clone().unwrap_or_default(),
            mems: cpu.mems().clone().unwrap_or_default(),
        }),
        hugepage_limits: resources
            .hugepage_limits()
            .iter()
            .flatten()
            .map(|limit| api::HugepageLimit {
                page_size: limit.page_size().clone(),
                limit: u64::try_from(limit.limit()).unwrap_or(u64::MAX),
            })
            .collect(),
        unified: resources.unified().clone().unwrap_or_default().into_iter().collect(),
        devices: resources.devices().iter().flatten().map(rule).collect(),
        pids: resources.pids().as_ref().map(|pids| api::LinuxPids { limit: pids.limit() }),
        ..api::LinuxResources::default()
    }
}

fn rule(rule: &oci::LinuxDeviceCgroup) -> api::LinuxDeviceCgroup {
    let signed = |value: Option<i64>| value.map(|value| api::OptionalInt64 { value });
    api::LinuxDeviceCgroup {
        allow: rule.allow(),
        r#type: rule.typ().map(|kind| kind.as_str().to_owned()).unwrap_or_default(),
        major: signed(rule.major()),
        minor: signed(rule.minor()),
        access: rule.access().clone().unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_plugin_sets_comes_back_in_cris_words_and_nothing_else_does() {
        let wanted = api::LinuxResources {
            cpu: Some(api::LinuxCpu {
                shares: Some(api::OptionalUInt64 { value: 512 }),
                cpus: "0-1".into(),
                ..api::LinuxCpu::default()
            }),
            pids: Some(api::LinuxPids { limit: 10 }),
            ..api::LinuxResources::default()
        };
        let expected = cri::LinuxContainerResources {
            cpu_shares: 512,
            cpuset_cpus: "0-1".into(),
            ..cri::LinuxContainerResources::default()
        };
        assert_eq!(to_cri(&wanted), expected);
        assert_eq!(to_further(&wanted).unwrap(), Further { pids_max: Some(10), memory_reservation_bytes: None });
    }

    #[test]
    fn a_class_is_not_changed_of_a_container_that_exists() {
        let class = Some(api::OptionalString { value: "gold".into() });
        let wanted = api::LinuxResources { rdt_class: class, ..api::LinuxResources::default() };
        assert!(to_further(&wanted).unwrap_err().to_string().contains("rdt_class"));
    }
}
