//! Changes the limits of containers.

use std::sync::Arc;

use oarlock_cgroup::{Cgroup, Limits};
use oarlock_failpoint::step;
use oarlock_proto::cri;

use super::{bundle, state_error};
use crate::core::Core;
use crate::error::Error;
use crate::nri::Further;
use crate::record::ContainerPhase;
use crate::spec::{HostFacts, resources};
use crate::state::{Container, blocking};

/// Lays `update` over what is in force. Zero and empty fields stay as they are. `further` is what plugins want beside it.
pub(crate) async fn update(
    core: &Arc<Core>,
    container: &Arc<Container>,
    update: &cri::LinuxContainerResources,
    further: Further,
) -> Result<(), Error> {
    resources::check(update, &core.host)?;
    let _alone = container.operation.lock().await;
    let record = container.record();
    let merged = resources::updated(&record.resources, update);
    resources::check(&merged, &core.host)?;
    match record.phase {
        ContainerPhase::Created => {
            let changed = container.change(&core.records, move |record| record.resources = merged).await?;
            bundle::limit(core, &changed, further).await
        }
        ContainerPhase::Running => {
            let (group, limits) = (record.cgroup.clone(), limits(&merged, update, &core.host));
            let limits = Limits {
                pids_max: further.pids_max,
                memory_reservation_bytes: further.memory_reservation_bytes,
                ..limits
            };
            blocking("a control group", move || apply(&group, &limits)).await?;
            step("limits are written");
            container.change(&core.records, move |record| record.resources = merged).await.map(drop)
        }
        _ => Err(state_error(&record, "change its limits")),
    }
}

/// Writes limits to a control group.
pub(crate) fn apply(group: &str, limits: &Limits) -> Result<(), Error> {
    let failed = |source| Error::Cgroup { operation: "limit", group: group.to_owned(), source };
    Cgroup::new(group).map_err(failed)?.set_limits(limits).map_err(failed)
}

/// What to write for an update: only what it names, with values that depend on one another taken together.
pub(crate) fn limits(
    merged: &cri::LinuxContainerResources,
    update: &cri::LinuxContainerResources,
    host: &HostFacts,
) -> Limits {
    let number = |value: i64| (value != 0).then_some(value);
    let unsigned = |value: i64| number(value).and_then(|value| u64::try_from(value).ok());
    let text = |value: &String| (!value.is_empty()).then(|| value.clone());
    let memory = update.memory_limit_in_bytes != 0 || update.memory_swap_limit_in_bytes != 0;
    let cpu = update.cpu_quota != 0 || update.cpu_period != 0;
    Limits {
        cpu_shares: unsigned(update.cpu_shares),
        cpu_quota_us: number(merged.cpu_quota).filter(|_| cpu),
        cpu_period_us: unsigned(merged.cpu_period).filter(|_| cpu),
        cpuset_cpus: text(&update.cpuset_cpus),
        cpuset_mems: text(&update.cpuset_mems),
        memory_limit_bytes: number(merged.memory_limit_in_bytes).filter(|_| memory),
        memory_swap_bytes: resources::swap_limit(merged, host).filter(|_| memory),
        unified: update.unified.clone().into_iter().collect(),
        ..Limits::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_period_takes_the_quota_along_and_nothing_else() {
        let merged = cri::LinuxContainerResources {
            cpu_period: 50_000,
            cpu_quota: 10_000,
            memory_limit_in_bytes: 1,
            ..cri::LinuxContainerResources::default()
        };
        let update = cri::LinuxContainerResources { cpu_period: 50_000, ..cri::LinuxContainerResources::default() };
        let limits = limits(&merged, &update, &HostFacts::default());
        assert_eq!(
            (limits.cpu_quota_us, limits.cpu_period_us, limits.memory_limit_bytes),
            (Some(10_000), Some(50_000), None)
        );
    }
}
