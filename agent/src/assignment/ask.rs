//! What a pod's containers ask for themselves. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod};

use super::AssignmentConfig;
use crate::spec;
use crate::spec::resources::{Qos, milli_value, qos_of, value};

/// How a container's part relates to those of others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sort {
    /// Ends before the next one starts.
    Init,
    /// Stays: a sidecar or a main container.
    Lasting,
}

/// One container's wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ask {
    pub pod: String,
    pub container: String,
    pub sort: Sort,
    /// Whole processors.
    pub cpus: Option<usize>,
    /// Bytes by kind.
    pub memory: BTreeMap<String, u64>,
    /// Devices by resource.
    pub devices: BTreeMap<String, usize>,
}

impl Ask {
    pub(super) fn is_empty(&self) -> bool {
        self.cpus.is_none() && self.memory.is_empty() && self.devices.is_empty()
    }
}

/// The wants of every container in the order of their start. `is_device` says which resources plugins have.
pub(super) fn of(pod: &Pod, config: &AssignmentConfig, is_device: impl Fn(&str) -> bool) -> Vec<Ask> {
    let Some(spec) = &pod.spec else { return Vec::new() };
    // Sums for the whole pod say nothing of single containers.
    let exact = qos_of(pod) == Qos::Guaranteed && spec.resources.is_none();
    let init = spec.init_containers.iter().flatten().map(|container| {
        let stays = container.restart_policy.as_deref() == Some("Always");
        (container, if stays { Sort::Lasting } else { Sort::Init })
    });
    let all = init.chain(spec.containers.iter().map(|container| (container, Sort::Lasting)));
    let ask = |(container, sort): (&Container, Sort)| Ask {
        pod: spec::pod_uid(pod).to_owned(),
        container: container.name.clone(),
        sort,
        cpus: whole_cpus(container).filter(|_| exact && config.cpu_static),
        memory: if exact && config.memory_static { memory(container) } else { BTreeMap::new() },
        devices: devices(container, &is_device),
    };
    all.map(ask).collect()
}

/// The processors that a container asks for, if that is a whole number.
fn whole_cpus(container: &Container) -> Option<usize> {
    let resources = container.resources.as_ref()?;
    let of = |list: &Option<BTreeMap<String, _>>| list.as_ref().and_then(|list| list.get("cpu")).map(milli_value);
    let milli = of(&resources.requests).or_else(|| of(&resources.limits))?;
    (milli > 0 && milli % 1000 == 0).then(|| usize::try_from(milli / 1000).ok()).flatten()
}

fn memory(container: &Container) -> BTreeMap<String, u64> {
    let limits = container.resources.as_ref().and_then(|resources| resources.limits.as_ref());
    let kinds = limits.into_iter().flatten().filter(|(name, _)| *name == "memory" || name.starts_with("hugepages-"));
    kinds.map(|(name, size)| (name.clone(), u64::try_from(value(size)).unwrap_or(0))).filter(|(_, s)| *s > 0).collect()
}

fn devices(container: &Container, is_device: impl Fn(&str) -> bool) -> BTreeMap<String, usize> {
    let limits = container.resources.as_ref().and_then(|resources| resources.limits.as_ref());
    let known = limits.into_iter().flatten().filter(|(name, _)| is_device(name));
    known
        .map(|(name, count)| (name.clone(), usize::try_from(value(count)).unwrap_or(0)))
        .filter(|(_, c)| *c > 0)
        .collect()
}

/// The whole pod as one: what lasts together, or the largest init step where that is more.
pub(super) fn together(asks: &[Ask]) -> Ask {
    let mut lasting = (0, BTreeMap::new(), BTreeMap::new());
    let mut most = (0, BTreeMap::new(), BTreeMap::new());
    fn add<V: Copy + std::ops::AddAssign + Default>(total: &mut BTreeMap<String, V>, more: &BTreeMap<String, V>) {
        for (name, amount) in more {
            *total.entry(name.clone()).or_default() += *amount;
        }
    }
    fn raise<V: Copy + Ord + Default>(most: &mut BTreeMap<String, V>, step: &BTreeMap<String, V>) {
        for (name, amount) in step {
            let entry = most.entry(name.clone()).or_default();
            *entry = (*entry).max(*amount);
        }
    }
    for ask in asks {
        let mut step: (usize, BTreeMap<String, u64>, BTreeMap<String, usize>) = lasting.clone();
        step.0 += ask.cpus.unwrap_or(0);
        add(&mut step.1, &ask.memory);
        add(&mut step.2, &ask.devices);
        most.0 = most.0.max(step.0);
        raise(&mut most.1, &step.1);
        raise(&mut most.2, &step.2);
        if ask.sort == Sort::Lasting {
            lasting = step;
        }
    }
    Ask {
        pod: asks.first().map(|ask| ask.pod.clone()).unwrap_or_default(),
        container: String::new(),
        sort: Sort::Lasting,
        cpus: Some(most.0).filter(|count| *count > 0),
        memory: most.1,
        devices: most.2,
    }
}
