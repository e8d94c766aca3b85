//! Resources as integers: what a pod asks for, what a node has. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, PodSpec};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use oarlock_machinery::quantity;

/// CPU in thousandths of a core, memory and disk in bytes, everything else in pieces.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Resources {
    pub cpu_milli: i64,
    pub memory_bytes: i64,
    pub ephemeral_bytes: i64,
    pub extended: BTreeMap<String, i64>,
}

type Quantities = BTreeMap<String, Quantity>;

/// What a container that asks for nothing is taken to use when nodes are compared.
const DEFAULT_CPU_MILLI: i64 = 100;
const DEFAULT_MEMORY_BYTES: i64 = 200 * 1024 * 1024;

impl Resources {
    pub fn from_quantities(quantities: Option<&Quantities>) -> Self {
        let mut resources = Self::default();
        for (name, amount) in quantities.into_iter().flatten() {
            match name.as_str() {
                "cpu" => resources.cpu_milli = quantity::milli(amount),
                "memory" => resources.memory_bytes = quantity::value(amount),
                "ephemeral-storage" => resources.ephemeral_bytes = quantity::value(amount),
                "pods" => {}
                _ => drop(resources.extended.insert(name.clone(), quantity::value(amount))),
            }
        }
        resources
    }

    fn zip(&mut self, other: &Self, with: impl Fn(i64, i64) -> i64) {
        self.cpu_milli = with(self.cpu_milli, other.cpu_milli);
        self.memory_bytes = with(self.memory_bytes, other.memory_bytes);
        self.ephemeral_bytes = with(self.ephemeral_bytes, other.ephemeral_bytes);
        for (name, amount) in &other.extended {
            let mine = self.extended.entry(name.clone()).or_default();
            *mine = with(*mine, *amount);
        }
    }

    pub fn add(&mut self, other: &Self) {
        self.zip(other, i64::saturating_add);
    }

    pub fn subtract(&mut self, other: &Self) {
        self.zip(other, i64::saturating_sub);
        self.extended.retain(|_, amount| *amount != 0);
    }

    pub fn raise_to(&mut self, other: &Self) {
        self.zip(other, i64::max);
    }

    fn extended(&self, name: &str) -> i64 {
        self.extended.get(name).copied().unwrap_or(0)
    }

    /// Names of what is asked for here and does not fit into `capacity` beside `used`.
    pub fn insufficient(&self, used: &Self, capacity: &Self) -> Vec<String> {
        let mut missing = Vec::new();
        let plain = [
            ("cpu", self.cpu_milli, used.cpu_milli, capacity.cpu_milli),
            ("memory", self.memory_bytes, used.memory_bytes, capacity.memory_bytes),
            ("ephemeral-storage", self.ephemeral_bytes, used.ephemeral_bytes, capacity.ephemeral_bytes),
        ];
        for (name, wanted, used, capacity) in plain {
            if wanted > 0 && wanted > capacity.saturating_sub(used) {
                missing.push(name.to_owned());
            }
        }
        for (name, wanted) in &self.extended {
            if *wanted > 0 && *wanted > capacity.extended(name).saturating_sub(used.extended(name)) {
                missing.push(name.clone());
            }
        }
        missing
    }
}

/// What a whole pod asks for: the containers together, or the hungriest moment of initialisation if that is more.
/// Sidecars (init containers that keep running) count in both. Overhead comes on top.
pub(crate) fn pod_requests(spec: &PodSpec) -> Resources {
    sum(spec, |container| {
        Resources::from_quantities(container.resources.as_ref().and_then(|resources| resources.requests.as_ref()))
    })
}

/// As [`pod_requests`], with an assumed use for containers that ask for nothing.
pub(crate) fn pod_use(spec: &PodSpec) -> Resources {
    sum(spec, |container| {
        let requests = container.resources.as_ref().and_then(|resources| resources.requests.as_ref());
        let mut resources = Resources::from_quantities(requests);
        let asks = |name: &str| requests.is_some_and(|requests| requests.contains_key(name));
        if !asks("cpu") {
            resources.cpu_milli = DEFAULT_CPU_MILLI;
        }
        if !asks("memory") {
            resources.memory_bytes = DEFAULT_MEMORY_BYTES;
        }
        resources
    })
}

fn sum(spec: &PodSpec, of: impl Fn(&Container) -> Resources) -> Resources {
    let mut running = Resources::default();
    let (mut sidecars, mut peak) = (Resources::default(), Resources::default());
    for container in spec.init_containers.iter().flatten() {
        let own = of(container);
        if container.restart_policy.as_deref() == Some("Always") {
            sidecars.add(&own);
            peak.raise_to(&sidecars);
        } else {
            let mut moment = sidecars.clone();
            moment.add(&own);
            peak.raise_to(&moment);
        }
    }
    spec.containers.iter().for_each(|container| running.add(&of(container)));
    running.add(&sidecars);
    running.raise_to(&peak);
    // Requests of the pod as a whole take the place of the containers' where they are given.
    let whole = spec.resources.as_ref().and_then(|resources| resources.requests.as_ref());
    for (name, amount) in whole.into_iter().flatten() {
        match name.as_str() {
            "cpu" => running.cpu_milli = quantity::milli(amount),
            "memory" => running.memory_bytes = quantity::value(amount),
            _ => {}
        }
    }
    running.add(&Resources::from_quantities(spec.overhead.as_ref()));
    running
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn requests(spec: Value) -> Resources {
        pod_requests(&serde_json::from_value(spec).unwrap())
    }

    fn container(cpu: &str, restart: Option<&str>) -> Value {
        json!({"name": "c", "restartPolicy": restart, "resources": {"requests": {"cpu": cpu}}})
    }

    #[test]
    fn containers_add_up_and_overhead_comes_on_top() {
        let spec = json!({"containers": [container("100m", None), container("1", None)], "overhead": {"cpu": "10m"}});
        assert_eq!(requests(spec).cpu_milli, 1110);
    }

    #[test]
    fn initialisation_counts_where_it_is_the_peak() {
        let init = |init: Value| requests(json!({"containers": [container("100m", None)], "initContainers": init}));
        assert_eq!(init(json!([container("1", None), container("2", None)])).cpu_milli, 2000);
        assert_eq!(init(json!([container("50m", None)])).cpu_milli, 100);
        // A sidecar runs beside what comes after it.
        assert_eq!(init(json!([container("200m", Some("Always")), container("1", None)])).cpu_milli, 1200);
        assert_eq!(init(json!([container("1", None), container("200m", Some("Always"))])).cpu_milli, 1000);
        assert_eq!(init(json!([container("200m", Some("Always"))])).cpu_milli, 300);
    }

    #[test]
    fn insufficient_names_what_is_missing() {
        let of = |value: Value| Resources::from_quantities(Some(&serde_json::from_value(value).unwrap()));
        let capacity = of(json!({"cpu": "2", "memory": "1Gi", "example.com/gpu": "1"}));
        let used = of(json!({"cpu": "1500m"}));
        let wanted = of(json!({"cpu": "600m", "memory": "2Gi", "example.com/gpu": "1", "example.com/fpga": "1"}));
        assert_eq!(wanted.insufficient(&used, &capacity), ["cpu", "memory", "example.com/fpga"]);
        assert!(Resources::default().insufficient(&used, &Resources::default()).is_empty());
    }

    proptest! {
        #[test]
        fn what_is_added_can_be_taken_away(amounts in proptest::collection::vec((0i64..1000, 0i64..1000, 0i64..5), 0..20)) {
            let mut total = Resources::default();
            let all: Vec<Resources> = amounts.iter().map(|(cpu, memory, gpu)| Resources {
                cpu_milli: *cpu, memory_bytes: *memory, ephemeral_bytes: 0,
                extended: BTreeMap::from([("gpu".to_owned(), *gpu)]),
            }).collect();
            all.iter().for_each(|one| total.add(one));
            all.iter().for_each(|one| total.subtract(one));
            prop_assert_eq!(total, Resources::default());
        }
    }
}
