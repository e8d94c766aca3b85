//! Adjustments of the process, of annotations and of hooks.

use std::collections::BTreeMap;

use oarlock_nri::api::{self, ContainerAdjustment, IoPrioClass, LinuxSchedulerFlag, LinuxSchedulerPolicy};
use oarlock_nri::marked_for_removal;
use oci_spec::runtime::{
    self as oci, Hook, HookBuilder, Hooks, LinuxIOPriorityBuilder, PosixRlimit, PosixRlimitBuilder, Process,
    SchedulerBuilder, Spec,
};

use super::{named, parse};
use crate::spec::{HostFacts, SpecError};

pub(super) fn annotations(spec: &mut Spec, wanted: &BTreeMap<String, String>) {
    let mut annotations = spec.annotations().clone().unwrap_or_default();
    for key in wanted.keys().filter_map(|key| marked_for_removal(key)) {
        annotations.remove(key);
    }
    let set = wanted.iter().filter(|(key, _)| marked_for_removal(key).is_none());
    annotations.extend(set.map(|(key, value)| (key.clone(), value.clone())));
    spec.set_annotations(Some(annotations));
}

pub(super) fn adjust(spec: &mut Spec, wanted: &ContainerAdjustment, host: &HostFacts) -> Result<(), SpecError> {
    let Some(mut process) = spec.process().clone() else { return Ok(()) };
    if !wanted.args.is_empty() {
        process.set_args(Some(wanted.args.clone()));
    }
    environment(&mut process, &wanted.env);
    rlimits(&mut process, &wanted.rlimits)?;
    if let Some(linux) = &wanted.linux {
        if let Some(score) = linux.oom_score_adj {
            let score = i32::try_from(score.value).ok().filter(|score| (-1000..=1000).contains(score));
            let score = score.ok_or_else(|| {
                SpecError::invalid(named("linux.oom_score_adj"), "is not between -1000 and 1000".to_owned())
            })?;
            process.set_oom_score_adj(Some(host.oom_score_adj_floor.map_or(score, |floor| score.max(floor))));
        }
        if let Some(priority) = linux.io_priority {
            io_priority(&mut process, priority)?;
        }
        if let Some(scheduler) = &linux.scheduler {
            self::scheduler(&mut process, scheduler)?;
        }
    }
    spec.set_process(Some(process));
    Ok(())
}

/// A variable that exists keeps its place.
fn environment(process: &mut Process, wanted: &[api::KeyValue]) {
    let mut env = process.env().clone().unwrap_or_default();
    let name = |variable: &str| variable.split('=').next().unwrap_or_default().to_owned();
    for key in wanted.iter().filter_map(|variable| marked_for_removal(&variable.key)) {
        env.retain(|known| name(known) != key);
    }
    for variable in wanted.iter().filter(|variable| marked_for_removal(&variable.key).is_none()) {
        let new = format!("{}={}", variable.key, variable.value);
        match env.iter_mut().find(|known| name(known) == variable.key) {
            Some(known) => *known = new,
            None => env.push(new),
        }
    }
    process.set_env(Some(env));
}

fn rlimits(process: &mut Process, wanted: &[api::PosixRlimit]) -> Result<(), SpecError> {
    if wanted.is_empty() {
        return Ok(());
    }
    let mut limits: Vec<PosixRlimit> = process.rlimits().clone().unwrap_or_default();
    for limit in wanted {
        let kind = parse::<oci::PosixRlimitType>("rlimits", &limit.r#type)?;
        let limit = PosixRlimitBuilder::default().typ(kind).hard(limit.hard).soft(limit.soft).build();
        let limit = limit.map_err(|error| SpecError::invalid(named("rlimits"), error.to_string()))?;
        limits.retain(|known| known.typ() != limit.typ());
        limits.push(limit);
    }
    process.set_rlimits(Some(limits));
    Ok(())
}

fn io_priority(process: &mut Process, wanted: api::LinuxIoPriority) -> Result<(), SpecError> {
    let field = "linux.io_priority";
    let class = match wanted.class() {
        IoPrioClass::IoprioClassNone => {
            process.set_io_priority(None);
            return Ok(());
        }
        class => parse::<oci::IOPriorityClass>(field, class.as_str_name())?,
    };
    let priority = LinuxIOPriorityBuilder::default().class(class).priority(i64::from(wanted.priority)).build();
    process.set_io_priority(Some(priority.map_err(|error| SpecError::invalid(named(field), error.to_string()))?));
    Ok(())
}

fn scheduler(process: &mut Process, wanted: &api::LinuxScheduler) -> Result<(), SpecError> {
    let field = "linux.scheduler";
    let policy = match wanted.policy() {
        LinuxSchedulerPolicy::SchedNone => {
            process.set_scheduler(None);
            return Ok(());
        }
        policy => parse::<oci::LinuxSchedulerPolicy>(field, policy.as_str_name())?,
    };
    let flag = |flag: &i32| {
        let known = LinuxSchedulerFlag::try_from(*flag)
            .map_err(|_| SpecError::invalid(named(field), format!("flag {flag} is not known")))?;
        parse::<oci::LinuxSchedulerFlag>(field, known.as_str_name())
    };
    let mut builder = SchedulerBuilder::default().policy(policy).nice(wanted.nice).priority(wanted.priority);
    if !wanted.flags.is_empty() {
        builder = builder.flags(wanted.flags.iter().map(flag).collect::<Result<Vec<_>, _>>()?);
    }
    // Only a deadline has these, and the kernel takes them for nothing else.
    if wanted.policy() == LinuxSchedulerPolicy::SchedDeadline {
        builder = builder.runtime(wanted.runtime).deadline(wanted.deadline).period(wanted.period);
    }
    let scheduler = builder.build().map_err(|error| SpecError::invalid(named(field), error.to_string()))?;
    process.set_scheduler(Some(scheduler));
    Ok(())
}

#[allow(deprecated, reason = "plugins still add prestart hooks")]
pub(super) fn hooks(spec: &mut Spec, wanted: Option<&api::Hooks>) -> Result<(), SpecError> {
    let Some(wanted) = wanted.filter(|wanted| **wanted != api::Hooks::default()) else { return Ok(()) };
    let mut hooks: Hooks = spec.hooks().clone().unwrap_or_default();
    let with = |known: &Option<Vec<Hook>>, new: &[api::Hook]| -> Result<Option<Vec<Hook>>, SpecError> {
        if new.is_empty() {
            return Ok(known.clone());
        }
        let new = new.iter().map(hook).collect::<Result<Vec<_>, _>>()?;
        Ok(Some(known.iter().flatten().cloned().chain(new).collect()))
    };
    hooks.set_prestart(with(hooks.prestart(), &wanted.prestart)?);
    hooks.set_create_runtime(with(hooks.create_runtime(), &wanted.create_runtime)?);
    hooks.set_create_container(with(hooks.create_container(), &wanted.create_container)?);
    hooks.set_start_container(with(hooks.start_container(), &wanted.start_container)?);
    hooks.set_poststart(with(hooks.poststart(), &wanted.poststart)?);
    hooks.set_poststop(with(hooks.poststop(), &wanted.poststop)?);
    spec.set_hooks(Some(hooks));
    Ok(())
}

fn hook(wanted: &api::Hook) -> Result<Hook, SpecError> {
    if !wanted.path.starts_with('/') {
        return Err(SpecError::invalid(named("hooks"), format!("path {:?} is not absolute", wanted.path)));
    }
    let mut builder = HookBuilder::default().path(&wanted.path);
    if !wanted.args.is_empty() {
        builder = builder.args(wanted.args.clone());
    }
    if !wanted.env.is_empty() {
        builder = builder.env(wanted.env.clone());
    }
    if let Some(timeout) = wanted.timeout {
        builder = builder.timeout(timeout.value);
    }
    builder.build().map_err(|error| SpecError::invalid(named("hooks"), error.to_string()))
}
