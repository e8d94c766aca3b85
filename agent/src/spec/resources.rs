//! Requests and limits: QoS classes, a pod's sums, and the runtime's cgroup values. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use oarlock_proto::cri;

/// Whole units, rounded up; 0 for what is no quantity.
pub(crate) fn value(quantity: &Quantity) -> i64 {
    oarlock_quantity::units(&quantity.0).unwrap_or(0)
}

/// Thousandths, rounded up; 0 for what is no quantity.
pub(crate) fn milli_value(quantity: &Quantity) -> i64 {
    oarlock_quantity::milli(&quantity.0).unwrap_or(0)
}

/// A pod's quality-of-service class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Qos {
    Guaranteed,
    Burstable,
    BestEffort,
}

impl Qos {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Qos::Guaranteed => "Guaranteed",
            Qos::Burstable => "Burstable",
            Qos::BestEffort => "BestEffort",
        }
    }
}

/// Thousandths of each resource.
pub(crate) type Amounts = BTreeMap<String, i64>;

/// The class that the API has noted, or what requests and limits make it.
pub(crate) fn qos_of(pod: &Pod) -> Qos {
    match pod.status.as_ref().and_then(|status| status.qos_class.as_deref()) {
        Some("Guaranteed") => return Qos::Guaranteed,
        Some("Burstable") => return Qos::Burstable,
        Some("BestEffort") => return Qos::BestEffort,
        _ => {}
    }
    compute_qos(pod)
}

fn compute_qos(pod: &Pod) -> Qos {
    let Some(spec) = &pod.spec else { return Qos::BestEffort };
    let none = ResourceRequirements::default();
    let all: Vec<&ResourceRequirements> = match &spec.resources {
        Some(resources) => vec![resources],
        None => {
            let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
            containers.map(|container| container.resources.as_ref().unwrap_or(&none)).collect()
        }
    };
    let compute = |list: &Option<BTreeMap<String, Quantity>>, name: &str| {
        list.as_ref().and_then(|list| list.get(name)).map(milli_value).filter(|amount| *amount > 0)
    };
    let (mut any, mut guaranteed) = (false, true);
    for resources in all {
        for name in ["cpu", "memory"] {
            let limit = compute(&resources.limits, name);
            let request = compute(&resources.requests, name).or(limit);
            any |= request.is_some() || limit.is_some();
            guaranteed &= limit.is_some() && request == limit;
        }
    }
    match (any, guaranteed) {
        (false, _) => Qos::BestEffort,
        (true, true) => Qos::Guaranteed,
        (true, false) => Qos::Burstable,
    }
}

/// What the pod asks the node for: main containers and sidecars together, or the largest init step if that is more.
pub(crate) fn pod_requests(pod: &Pod) -> Amounts {
    sum(pod, |resources| {
        let mut requests = resources.requests.clone().unwrap_or_default();
        for (name, limit) in resources.limits.iter().flatten() {
            requests.entry(name.clone()).or_insert_with(|| limit.clone());
        }
        requests
    })
}

/// The sum of the pod's limits. A resource that some container leaves open is absent.
pub(crate) fn pod_limits(pod: &Pod) -> Amounts {
    let mut limits = sum(pod, |resources| resources.limits.clone().unwrap_or_default());
    if let Some(spec) = &pod.spec {
        let pod_level = spec.resources.as_ref().and_then(|resources| resources.limits.clone()).unwrap_or_default();
        let sidecars = spec.init_containers.iter().flatten().filter(|c| c.restart_policy.as_deref() == Some("Always"));
        let all: Vec<&Container> = spec.containers.iter().chain(sidecars).collect();
        limits.retain(|name, _| {
            let bounded = |c: &&Container| {
                c.resources.as_ref().and_then(|r| r.limits.as_ref()).is_some_and(|limits| limits.contains_key(name))
            };
            pod_level.contains_key(name) || all.iter().all(bounded)
        });
    }
    limits
}

fn sum(pod: &Pod, list: impl Fn(&ResourceRequirements) -> BTreeMap<String, Quantity>) -> Amounts {
    let Some(spec) = &pod.spec else { return Amounts::new() };
    let amounts = |container: &Container| -> Amounts {
        let all = container.resources.as_ref().map(&list).unwrap_or_default();
        all.iter().map(|(name, quantity)| (name.clone(), milli_value(quantity))).collect()
    };
    let mut total = Amounts::new();
    for container in &spec.containers {
        add(&mut total, &amounts(container));
    }
    let mut sidecars = Amounts::new();
    let mut largest = Amounts::new();
    for init in spec.init_containers.iter().flatten() {
        let mut step = amounts(init);
        if init.restart_policy.as_deref() == Some("Always") {
            add(&mut sidecars, &step);
            step = Amounts::new();
        }
        add(&mut step, &sidecars);
        for (name, amount) in step {
            let entry = largest.entry(name).or_default();
            *entry = (*entry).max(amount);
        }
    }
    add(&mut total, &sidecars);
    for (name, amount) in largest {
        let entry = total.entry(name).or_default();
        *entry = (*entry).max(amount);
    }
    if let Some(resources) = &spec.resources {
        for (name, quantity) in list(resources) {
            total.insert(name, milli_value(&quantity));
        }
    }
    for (name, quantity) in spec.overhead.iter().flatten() {
        *total.entry(name.clone()).or_default() += milli_value(quantity);
    }
    total
}

fn add(total: &mut Amounts, more: &Amounts) {
    for (name, amount) in more {
        *total.entry(name.clone()).or_default() += amount;
    }
}

/// cpu.shares for a request.
pub(crate) fn cpu_shares(milli: i64) -> i64 {
    if milli <= 0 { 2 } else { (milli.saturating_mul(1024) / 1000).clamp(2, 262_144) }
}

/// cpu.cfs_quota_us for a limit and a period; 0 is none.
pub(crate) fn cpu_quota(milli: i64, period_us: u64) -> i64 {
    let period = i64::try_from(period_us).unwrap_or(100_000);
    if milli <= 0 { 0 } else { (milli.saturating_mul(period) / 1000).max(1000) }
}

/// How readily the kernel kills a container for memory: never before system daemons, best effort first.
pub(crate) fn oom_score_adj(pod: &Pod, container: &Container, node_memory_bytes: i64) -> i64 {
    let critical = pod.spec.as_ref().and_then(|spec| spec.priority).is_some_and(|priority| priority >= 2_000_000_000);
    if critical {
        return -997;
    }
    match qos_of(pod) {
        Qos::Guaranteed => -997,
        Qos::BestEffort => 1000,
        Qos::Burstable => {
            let request = amount(container, "memory").0.unwrap_or(0);
            (1000 - 1000 * request / node_memory_bytes.max(1)).clamp(3, 999)
        }
    }
}

/// Request (or limit in its place) and limit of a resource, whole units (thousandths for cpu).
fn amount(container: &Container, name: &str) -> (Option<i64>, Option<i64>) {
    let of = |list: Option<&BTreeMap<String, Quantity>>| {
        let quantity = list?.get(name)?;
        Some(if name == "cpu" { milli_value(quantity) } else { value(quantity) })
    };
    let resources = container.resources.as_ref();
    let limit = of(resources.and_then(|r| r.limits.as_ref()));
    (of(resources.and_then(|r| r.requests.as_ref())).or(limit), limit)
}

/// What of the node bears on a container's cgroup values.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NodeLimits {
    pub memory_bytes: i64,
    /// The period of CPU limits in microseconds; None when they are not enforced.
    pub cpu_period_us: Option<u64>,
    pub swap: Swap,
}

/// How much swap containers may use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Swap {
    /// Bounded together with memory, where memory is (control groups version 1), or not bounded at all.
    #[default]
    WithMemory,
    /// None.
    Nothing,
    /// A share of the node's, as large as the container's share of memory that it asks for; of Burstable pods only.
    Share { node_bytes: i64 },
}

/// The file of control groups version 2 that bounds swap alone.
pub(crate) const SWAP_MAX: &str = "memory.swap.max";

/// The most swap of a container; None where there is no bound beside memory's.
fn swap_max(pod: &Pod, container: &Container, node: NodeLimits) -> Option<i64> {
    let node_bytes = match node.swap {
        Swap::WithMemory => return None,
        Swap::Nothing => return Some(0),
        Swap::Share { node_bytes } => node_bytes,
    };
    let critical = pod.spec.as_ref().and_then(|spec| spec.priority).is_some_and(|priority| priority >= 2_000_000_000);
    let (request, limit) = amount(container, "memory");
    let request = request.filter(|request| *request > 0 && Some(*request) != limit);
    let Some(request) = request.filter(|_| qos_of(pod) == Qos::Burstable && !critical) else { return Some(0) };
    let share = i128::from(request) * i128::from(node_bytes) / i128::from(node.memory_bytes.max(1));
    Some(i64::try_from(share).unwrap_or(i64::MAX))
}

/// The runtime's cgroup values of one container.
pub(crate) fn linux_resources(pod: &Pod, container: &Container, node: NodeLimits) -> cri::LinuxContainerResources {
    let (cpu_request, cpu_limit) = amount(container, "cpu");
    let (_, memory_limit) = amount(container, "memory");
    let quota = cpu_limit.filter(|milli| *milli > 0).zip(node.cpu_period_us);
    let mut hugepage_limits: Vec<cri::HugepageLimit> = Vec::new();
    for (name, quantity) in container.resources.as_ref().and_then(|r| r.limits.as_ref()).into_iter().flatten() {
        if let Some(size) = name.strip_prefix("hugepages-") {
            let page_size = format!("{}B", size.trim_end_matches('i'));
            hugepage_limits.push(cri::HugepageLimit { page_size, limit: value(quantity).max(0) as u64 });
        }
    }
    cri::LinuxContainerResources {
        cpu_period: quota.map_or(0, |(_, period)| i64::try_from(period).unwrap_or(0)),
        cpu_quota: quota.map_or(0, |(milli, period)| cpu_quota(milli, period)),
        cpu_shares: cpu_shares(cpu_request.unwrap_or(0)),
        memory_limit_in_bytes: memory_limit.unwrap_or(0),
        memory_swap_limit_in_bytes: match node.swap {
            Swap::WithMemory => memory_limit.unwrap_or(0),
            Swap::Nothing | Swap::Share { .. } => 0,
        },
        oom_score_adj: oom_score_adj(pod, container, node.memory_bytes),
        hugepage_limits,
        unified: swap_max(pod, container, node)
            .map(|most| (SWAP_MAX.to_owned(), most.to_string()))
            .into_iter()
            .collect(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(spec: serde_json::Value) -> Pod {
        serde_json::from_value(serde_json::json!({"metadata": {"name": "p"}, "spec": spec})).expect("a pod")
    }

    fn container(requests: serde_json::Value, limits: serde_json::Value) -> serde_json::Value {
        serde_json::json!({"name": "c", "resources": {"requests": requests, "limits": limits}})
    }

    #[test]
    fn qos_follows_requests_and_limits() {
        let none = serde_json::json!({});
        let both = serde_json::json!({"cpu": "1", "memory": "1Gi"});
        let cpu = serde_json::json!({"cpu": "1"});
        for (requests, limits, qos) in [
            (&none, &none, Qos::BestEffort),
            (&both, &both, Qos::Guaranteed),
            (&none, &both, Qos::Guaranteed),
            (&cpu, &none, Qos::Burstable),
            (&cpu, &both, Qos::Guaranteed),
            (&both, &cpu, Qos::Burstable),
        ] {
            let pod = pod(serde_json::json!({"containers": [container(requests.clone(), limits.clone())]}));
            assert_eq!(qos_of(&pod), qos, "{requests} {limits}");
        }
    }

    #[test]
    fn the_largest_init_step_counts_with_the_sidecars_before_it() {
        let spec = serde_json::json!({
            "initContainers": [
                {"name": "s", "restartPolicy": "Always", "resources": {"requests": {"cpu": "100m"}}},
                {"name": "i", "resources": {"requests": {"cpu": "1"}}},
            ],
            "containers": [{"name": "c", "resources": {"requests": {"cpu": "300m"}}}],
        });
        assert_eq!(pod_requests(&pod(spec))["cpu"], 1100);
    }

    #[test]
    fn an_open_limit_leaves_the_pod_open() {
        let spec = serde_json::json!({"containers": [
            {"name": "a", "resources": {"limits": {"memory": "1Mi", "cpu": "1"}}},
            {"name": "b", "resources": {"limits": {"cpu": "500m"}}},
        ]});
        let limits = pod_limits(&pod(spec));
        assert_eq!(limits.get("memory"), None);
        assert_eq!(limits["cpu"], 1500);
    }

    #[test]
    fn cgroup_values_are_those_of_upstream() {
        let pod = pod(serde_json::json!({"containers": [
            container(serde_json::json!({"cpu": "250m", "memory": "64Mi"}), serde_json::json!({"cpu": "500m", "memory": "128Mi"}))
        ]}));
        let first = &pod.spec.as_ref().unwrap().containers[0];
        let resources = linux_resources(
            &pod,
            first,
            NodeLimits { memory_bytes: 1 << 30, cpu_period_us: Some(100_000), swap: Swap::WithMemory },
        );
        assert_eq!((resources.cpu_shares, resources.cpu_quota, resources.cpu_period), (256, 50_000, 100_000));
        assert_eq!(resources.memory_limit_in_bytes, 128 << 20);
        assert_eq!(resources.oom_score_adj, 1000 - 1000 * (64 << 20) / (1 << 30));
    }

    #[test]
    fn swap_is_shared_out_by_the_memory_that_burstable_containers_ask_for() {
        let most = |requests: serde_json::Value, limits: serde_json::Value, priority: i64, swap: Swap| {
            let pod = pod(serde_json::json!({"priority": priority, "containers": [container(requests, limits),
                {"name": "other", "resources": {"requests": {"cpu": "1"}}}]}));
            let first = &pod.spec.as_ref().unwrap().containers[0];
            let node = NodeLimits { memory_bytes: 4 << 30, cpu_period_us: None, swap };
            let resources = linux_resources(&pod, first, node);
            (resources.unified.get(SWAP_MAX).cloned(), resources.memory_swap_limit_in_bytes)
        };
        let share = Swap::Share { node_bytes: 2 << 30 };
        let memory = |size: &str| serde_json::json!({"memory": size});
        let none = serde_json::json!({});
        let bytes = |bytes: i64| (Some(bytes.to_string()), 0);
        assert_eq!(most(memory("1Gi"), memory("2Gi"), 0, share), bytes(512 << 20));
        assert_eq!(most(memory("1Gi"), none.clone(), 0, share), bytes(512 << 20));
        assert_eq!(most(memory("1Gi"), memory("1Gi"), 0, share), bytes(0), "its memory is certain");
        assert_eq!(most(none.clone(), none.clone(), 0, share), bytes(0), "it asks for none");
        assert_eq!(most(memory("1Gi"), none.clone(), 2_000_000_000, share), bytes(0), "critical");
        assert_eq!(most(memory("1Gi"), none.clone(), 0, Swap::Nothing), bytes(0));
        assert_eq!(most(memory("1Gi"), memory("2Gi"), 0, Swap::WithMemory), (None, 2 << 30));
    }
}
