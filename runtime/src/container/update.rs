//! Changes the limits of containers.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::sync::Arc;

use oarlock_cgroup::{Cgroup, Limits};
use oarlock_failpoint::step;
use oarlock_proto::cri;

use super::{bundle, state_error};
use crate::core::Core;
use crate::error::Error;
use crate::groups;
use crate::nri::Further;
use crate::record::ContainerPhase;
use crate::spec::{HostFacts, resources};
use crate::state::{Container, blocking};

/// A group whose processes fork all the time is left with the few that came last.
const SCORE_ROUNDS_MAX: usize = 8;

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
            let score = (update.oom_score_adj != 0).then(|| resources::oom_score_adj(Some(&merged), &core.host));
            let limited = move || {
                groups::limit(&group, &limits)?;
                score.map_or(Ok(()), |score| give_score(&group, score))
            };
            blocking("a control group", limited).await?;
            step("limits are written");
            container.change(&core.records, move |record| record.resources = merged).await.map(drop)
        }
        _ => Err(state_error(&record, "change its limits")),
    }
}

/// Gives all processes of a control group, present and forked meanwhile, a new score. One that the kernel refuses stays
/// as it is, as when a container starts.
fn give_score(group: &str, score: i32) -> Result<(), Error> {
    let failed = |source| Error::Cgroup { operation: "list", group: group.to_owned(), source };
    let cgroup = Cgroup::new(group).map_err(failed)?;
    let mut done = BTreeSet::new();
    for _ in 0..SCORE_ROUNDS_MAX {
        let mut opened = Vec::new();
        for pid in cgroup.pids().map_err(failed)? {
            if done.insert(pid)
                && let Ok(file) = OpenOptions::new().write(true).open(format!("/proc/{pid}/oom_score_adj"))
            {
                opened.push((pid, file));
            }
        }
        if opened.is_empty() {
            return Ok(());
        }
        // The open file belongs to one process; a number that is still in the group was not somebody else's.
        let members = cgroup.pids().map_err(failed)?;
        for (pid, mut file) in opened.into_iter().filter(|(pid, _)| members.contains(pid)) {
            if let Err(error) = file.write_all(score.to_string().as_bytes()) {
                tracing::debug!(group, pid, score, %error, "a process keeps its oom_score_adj");
            }
        }
    }
    Ok(())
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
        hugepages: update
            .hugepage_limits
            .iter()
            .filter(|_| host.hugetlb)
            .map(|limit| (limit.page_size.clone(), limit.limit))
            .collect(),
        unified: update.unified.clone().into_iter().collect(),
        ..Limits::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn huge_pages_are_written_where_there_is_a_controller() {
        let limit = cri::HugepageLimit { page_size: "2MB".to_owned(), limit: 4 << 20 };
        let update =
            cri::LinuxContainerResources { hugepage_limits: vec![limit], ..cri::LinuxContainerResources::default() };
        let with = HostFacts { hugetlb: true, ..HostFacts::default() };
        let written = limits(&update, &update, &with).hugepages;
        assert_eq!(written.into_iter().collect::<Vec<_>>(), [("2MB".to_owned(), 4 << 20)]);
        assert!(limits(&update, &update, &HostFacts::default()).hugepages.is_empty());
    }

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
