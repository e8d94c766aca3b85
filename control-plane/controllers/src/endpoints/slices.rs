//! The EndpointSlices of a Service: at most [`MAX_ENDPOINTS`] in each, and as few writes as possible when pods come
//! and go. Pure.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::{
    Endpoint, EndpointConditions, EndpointHints, EndpointPort, EndpointSlice, ForNode, ForZone,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt;

use super::plan::Plan;
use super::{SERVICE_NAME_LABEL, backends, families, topology};
use crate::owners::controller_reference;
use crate::pods::{is_ready, is_terminal, is_terminating};

pub(super) const MAX_ENDPOINTS: usize = 100;
pub(super) const MANAGED_BY_LABEL: &str = "endpointslice.kubernetes.io/managed-by";
const MANAGED_BY: &str = "endpointslice-controller.k8s.io";
const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";

pub(super) fn is_ours(slice: &EndpointSlice) -> bool {
    slice.labels().get(MANAGED_BY_LABEL).is_some_and(|manager| manager == MANAGED_BY)
}

/// Slices are grouped by what all their endpoints have in common.
type Group = (String, Vec<(String, String, i32, Option<String>)>);

fn group_of(slice: &EndpointSlice) -> Group {
    let ports = slice.ports.iter().flatten().map(|port| {
        let name = port.name.clone().unwrap_or_default();
        (name, port.protocol.clone().unwrap_or_default(), port.port.unwrap_or(0), port.app_protocol.clone())
    });
    let mut ports: Vec<_> = ports.collect();
    ports.sort();
    (slice.address_type.clone(), ports)
}

/// `shares` are the zones' shares of the cluster's processors, where they are known and the Service's endpoints are to be
/// meant for zones by them.
pub(super) fn plan(
    service: &Service,
    pods: &[Arc<Pod>],
    existing: &[Arc<EndpointSlice>],
    zone_of: impl Fn(&str) -> Option<String>,
    shares: Option<&BTreeMap<String, f64>>,
) -> Plan {
    let mut wanted: BTreeMap<Group, Vec<Endpoint>> = BTreeMap::new();
    for family in families(service) {
        for pod in pods.iter().filter(|pod| !is_terminal(pod)) {
            let Some(address) = backends::address(pod, family) else { continue };
            let ports = backends::ports(service).iter().filter_map(|port| {
                let number = backends::target_port(pod, port)?;
                let name = port.name.clone().unwrap_or_default();
                Some((name, backends::protocol(port).to_owned(), number, port.app_protocol.clone()))
            });
            let mut ports: Vec<_> = ports.collect();
            ports.sort();
            let endpoint = endpoint(service, pod, address, &zone_of);
            wanted.entry((family.to_owned(), ports)).or_default().push(endpoint);
        }
    }
    if let Some(shares) = shares {
        families(service).into_iter().for_each(|family| allot(family, &mut wanted, shares));
    }
    let mut current: BTreeMap<Group, Vec<&Arc<EndpointSlice>>> = BTreeMap::new();
    for slice in existing.iter().filter(|slice| slice.metadata.deletion_timestamp.is_none()) {
        current.entry(group_of(slice)).or_default().push(slice);
    }
    // A Service that nothing backs still shows one empty slice of each family.
    for family in families(service) {
        if !wanted.keys().any(|group| group.0 == family) {
            wanted.insert((family.to_owned(), Vec::new()), Vec::new());
        }
    }
    let labels = labels(service);
    let mut plan = Plan::default();
    for (group, endpoints) in wanted {
        let slices = current.remove(&group).unwrap_or_default();
        plan_group(&mut plan, service, &labels, &group, endpoints, slices);
    }
    plan.delete.extend(current.into_values().flatten().cloned());
    plan
}

/// Means the ready endpoints of a family for zones, all or none of them.
fn allot(family: &str, wanted: &mut BTreeMap<Group, Vec<Endpoint>>, shares: &BTreeMap<String, f64>) {
    let of_family = wanted.iter_mut().filter(|(group, _)| group.0 == family).flat_map(|(_, endpoints)| endpoints);
    let is_ready = |endpoint: &Endpoint| endpoint.conditions.as_ref().and_then(|all| all.ready) == Some(true);
    let mut ready: Vec<&mut Endpoint> = of_family.filter(|endpoint| is_ready(endpoint)).collect();
    let zones: Vec<Option<&str>> = ready.iter().map(|endpoint| endpoint.zone.as_deref()).collect();
    let Some(meant) = topology::allot(&zones, shares) else { return };
    for (endpoint, zone) in ready.iter_mut().zip(meant) {
        endpoint.hints = Some(EndpointHints { for_zones: Some(vec![ForZone { name: zone }]), for_nodes: None });
    }
}

fn plan_group(
    plan: &mut Plan,
    service: &Service,
    labels: &BTreeMap<String, String>,
    group: &Group,
    endpoints: Vec<Endpoint>,
    mut slices: Vec<&Arc<EndpointSlice>>,
) {
    slices.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
    let identity = |endpoint: &Endpoint| endpoint.target_ref.as_ref().and_then(|target| target.uid.clone());
    let keep_empty = endpoints.is_empty();
    let mut missing: Vec<(Option<String>, Endpoint)> = endpoints.into_iter().map(|e| (identity(&e), e)).collect();
    let mut index: HashMap<Option<String>, usize> =
        missing.iter().enumerate().map(|(position, (uid, _))| (uid.clone(), position)).collect();
    let mut placed = vec![false; missing.len()];
    // First every endpoint stays where it is.
    let mut drafts: Vec<(&Arc<EndpointSlice>, Vec<Endpoint>, bool)> = Vec::new();
    for slice in slices {
        let mut kept = Vec::new();
        let mut changed = slice.labels() != labels;
        for old in slice.endpoints.iter().flatten() {
            match index.remove(&identity(old)) {
                Some(position) => {
                    let new = &missing[position].1;
                    changed |= !same_endpoint(old, new);
                    kept.push(new.clone());
                    placed[position] = true;
                }
                None => changed = true,
            }
        }
        drafts.push((slice, kept, changed));
    }
    let mut position = 0;
    missing.retain(|_| {
        position += 1;
        !placed[position - 1]
    });
    let mut missing: Vec<Endpoint> = missing.into_iter().map(|(_, endpoint)| endpoint).collect();
    // Newcomers go to slices that are written anyway, then to the first with room for all, then to new ones.
    for (_, kept, changed) in drafts.iter_mut().filter(|draft| draft.2 && !draft.1.is_empty()) {
        fill(kept, &mut missing);
        *changed = true;
    }
    if !missing.is_empty() && missing.len() < MAX_ENDPOINTS {
        let room = drafts.iter_mut().find(|draft| draft.1.len() + missing.len() <= MAX_ENDPOINTS);
        if let Some((_, kept, changed)) = room {
            fill(kept, &mut missing);
            *changed = true;
        }
    }
    let mut empty_kept = false;
    for (slice, kept, changed) in drafts {
        if kept.is_empty() && (!keep_empty || empty_kept) {
            plan.delete.push(slice.clone());
            continue;
        }
        empty_kept |= kept.is_empty();
        if changed {
            let mut slice = (**slice).clone();
            slice.metadata.labels = Some(labels.clone());
            slice.endpoints = Some(kept);
            plan.update.push(slice);
        }
    }
    if keep_empty && !empty_kept {
        plan.create.push(new_slice(service, labels, group, Vec::new()));
    }
    while !missing.is_empty() {
        let rest = missing.split_off(missing.len().min(MAX_ENDPOINTS));
        plan.create.push(new_slice(service, labels, group, missing));
        missing = rest;
    }
}

fn fill(slice: &mut Vec<Endpoint>, missing: &mut Vec<Endpoint>) {
    let room = MAX_ENDPOINTS.saturating_sub(slice.len()).min(missing.len());
    slice.extend(missing.drain(..room));
}

fn same_endpoint(a: &Endpoint, b: &Endpoint) -> bool {
    let strip = |endpoint: &Endpoint| {
        let mut endpoint = endpoint.clone();
        endpoint.deprecated_topology = None;
        if let Some(target) = &mut endpoint.target_ref {
            target.resource_version = None;
        }
        endpoint
    };
    strip(a) == strip(b)
}

fn endpoint(service: &Service, pod: &Pod, address: &str, zone_of: impl Fn(&str) -> Option<String>) -> Endpoint {
    let (serving, terminating) = (is_ready(pod), is_terminating(pod));
    let ready = backends::publishes_unready(service) || (serving && !terminating);
    let node = backends::node(pod);
    let zone = node.as_deref().and_then(zone_of);
    Endpoint {
        addresses: vec![address.to_owned()],
        conditions: Some(EndpointConditions {
            ready: Some(ready),
            serving: Some(serving || backends::publishes_unready(service)),
            terminating: Some(terminating),
        }),
        hostname: backends::hostname(pod, service),
        hints: if ready { hints(service, zone.as_deref(), node.as_deref()) } else { None },
        zone,
        node_name: node,
        target_ref: Some(backends::target(pod)),
        ..Default::default()
    }
}

/// Whom the endpoint is meant for, where the Service prefers near ones: its own zone, and for the nearest its own node.
fn hints(service: &Service, zone: Option<&str>, node: Option<&str>) -> Option<EndpointHints> {
    // The annotation wins, and then all endpoints together decide.
    if topology::is_automatic(service) {
        return None;
    }
    let distribution = service.spec.as_ref()?.traffic_distribution.as_deref()?;
    let for_zones = || zone.map(|zone| vec![ForZone { name: zone.to_owned() }]);
    match distribution {
        "PreferClose" | "PreferSameZone" => Some(EndpointHints { for_zones: Some(for_zones()?), for_nodes: None }),
        "PreferSameNode" => {
            let for_nodes = Some(vec![ForNode { name: node?.to_owned() }]);
            Some(EndpointHints { for_zones: for_zones(), for_nodes })
        }
        _ => None,
    }
}

fn labels(service: &Service) -> BTreeMap<String, String> {
    let mut labels = service.labels().clone();
    labels.remove(HEADLESS_LABEL);
    if backends::is_headless(service) {
        labels.insert(HEADLESS_LABEL.to_owned(), String::new());
    }
    labels.insert(SERVICE_NAME_LABEL.to_owned(), service.name_any());
    labels.insert(MANAGED_BY_LABEL.to_owned(), MANAGED_BY.to_owned());
    labels
}

fn new_slice(
    service: &Service,
    labels: &BTreeMap<String, String>,
    group: &Group,
    endpoints: Vec<Endpoint>,
) -> EndpointSlice {
    let ports = group.1.iter().map(|(name, protocol, port, app_protocol)| EndpointPort {
        name: Some(name.clone()),
        protocol: Some(protocol.clone()),
        port: Some(*port),
        app_protocol: app_protocol.clone(),
    });
    let ports: Vec<EndpointPort> = ports.collect();
    EndpointSlice {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}-", service.name_any())),
            namespace: service.namespace(),
            labels: Some(labels.clone()),
            owner_references: Some(vec![controller_reference(service)]),
            ..Default::default()
        },
        address_type: group.0.clone(),
        endpoints: Some(endpoints),
        ports: (!ports.is_empty()).then_some(ports),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn service(spec: Value) -> Service {
        let mut spec = spec;
        spec["selector"] = json!({"app": "a"});
        serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "ns", "uid": "s", "labels": {"team": "x"}}, "spec": spec,
        }))
        .unwrap()
    }

    fn pod(number: usize, ready: bool, terminating: bool) -> Arc<Pod> {
        let deleted = terminating.then_some("2026-01-01T00:00:00Z");
        Arc::new(
            serde_json::from_value(json!({
                "metadata": {"name": format!("p{number}"), "namespace": "ns", "uid": format!("u{number}"),
                             "deletionTimestamp": deleted},
                "spec": {"nodeName": "n", "hostname": "h", "subdomain": "web", "containers": [
                    {"name": "c", "ports": [{"name": "http", "containerPort": 8000 + number % 2}]}]},
                "status": {"phase": "Running", "podIP": format!("10.0.{}.{}", number / 250, number % 250),
                           "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]},
            }))
            .unwrap(),
        )
    }

    fn plan_of(service: &Service, pods: &[Arc<Pod>], existing: &[Arc<EndpointSlice>]) -> Plan {
        plan(service, pods, existing, |_| Some("z1".into()), None)
    }

    /// Carries a plan out, as the API would.
    fn carry_out(plan: Plan, existing: &[Arc<EndpointSlice>], serial: &mut usize) -> Vec<Arc<EndpointSlice>> {
        let mut all: BTreeMap<String, Arc<EndpointSlice>> =
            existing.iter().map(|slice| (slice.name_any(), slice.clone())).collect();
        for mut slice in plan.create {
            *serial += 1;
            slice.metadata.name = Some(format!("web-{serial:05}"));
            all.insert(slice.name_any(), Arc::new(slice));
        }
        for slice in plan.update {
            all.insert(slice.name_any(), Arc::new(slice));
        }
        for slice in plan.delete {
            all.remove(&slice.name_any());
        }
        all.into_values().collect()
    }

    #[test]
    fn conditions_follow_readiness_and_termination() {
        let service = service(json!({"ports": [{"port": 80, "targetPort": 8080}]}));
        let pods = [pod(0, true, false), pod(1, false, false), pod(2, true, true)];
        let plan = plan_of(&service, &pods, &[]);
        let shown: Vec<_> = plan.create[0]
            .endpoints
            .as_ref()
            .unwrap()
            .iter()
            .map(|endpoint| {
                let conditions = endpoint.conditions.clone().unwrap();
                (conditions.ready.unwrap(), conditions.serving.unwrap(), conditions.terminating.unwrap())
            })
            .collect();
        assert_eq!(shown, [(true, true, false), (false, false, false), (false, true, true)]);
        let first = &plan.create[0].endpoints.as_ref().unwrap()[0];
        assert_eq!((first.hostname.as_deref(), first.zone.as_deref()), (Some("h"), Some("z1")));
        assert_eq!(plan.create[0].labels()["team"], "x");
        assert_eq!(plan.create[0].labels()[SERVICE_NAME_LABEL], "web");
    }

    #[test]
    fn near_endpoints_are_meant_for_their_own_zone_or_node() {
        let pods = [pod(0, true, false), pod(1, false, false)];
        let hints = |distribution: Option<&str>, zone: Option<&str>| {
            let service = service(json!({"ports": [{"port": 80}], "trafficDistribution": distribution}));
            let plan = plan(&service, &pods, &[], |_| zone.map(str::to_owned), None);
            let shown = plan.create[0].endpoints.as_ref().unwrap().iter().map(|endpoint| endpoint.hints.clone());
            let [ready, not_ready] = shown.collect::<Vec<_>>().try_into().unwrap();
            assert_eq!(not_ready, None, "only ready endpoints are meant for anybody");
            serde_json::to_value(ready).unwrap()
        };
        let (zone, node) = (json!([{"name": "z1"}]), json!([{"name": "n"}]));
        assert_eq!(hints(None, Some("z1")), Value::Null);
        for distribution in ["PreferClose", "PreferSameZone"] {
            assert_eq!(hints(Some(distribution), Some("z1")), json!({"forZones": zone}));
            assert_eq!(hints(Some(distribution), None), Value::Null);
        }
        assert_eq!(hints(Some("PreferSameNode"), Some("z1")), json!({"forZones": zone, "forNodes": node}));
        assert_eq!(hints(Some("PreferSameNode"), None), json!({"forNodes": node}));
    }

    #[test]
    fn with_mode_auto_the_ready_endpoints_are_meant_for_zones_by_their_shares() {
        let mut service = service(json!({"ports": [{"port": 80}], "trafficDistribution": "PreferSameNode"}));
        let pods = [pod(0, true, false), pod(1, true, false), pod(2, false, false)];
        let shares = BTreeMap::from([("z1".to_owned(), 0.5), ("z2".to_owned(), 0.5)]);
        service.annotations_mut().insert("service.kubernetes.io/topology-mode".into(), "Auto".into());
        let hints = |pods: &[Arc<Pod>], shares| {
            let plan = plan(&service, pods, &[], |_| Some("z1".into()), shares);
            let endpoints = plan.create.iter().flat_map(|slice| slice.endpoints.clone().unwrap());
            let name = |hints: EndpointHints| hints.for_zones.unwrap()[0].name.clone();
            endpoints.map(|endpoint| endpoint.hints.map(name)).collect::<Vec<_>>()
        };
        let both = vec![Some("z1".to_owned()), Some("z2".to_owned()), None];
        assert_eq!(hints(&pods, Some(&shares)), both);
        assert_eq!(hints(&pods, None), [None, None, None], "nothing is known of the zones");
        assert_eq!(hints(&pods[..1], Some(&shares)), [None], "too few");
    }

    #[test]
    fn a_service_that_prefers_near_endpoints_from_now_on_is_written_once_more() {
        let plain = service(json!({"ports": [{"port": 80}]}));
        let slices = carry_out(plan_of(&plain, &[pod(0, true, false)], &[]), &[], &mut 0);
        let near = service(json!({"ports": [{"port": 80}], "trafficDistribution": "PreferSameZone"}));
        assert_eq!(plan_of(&near, &[pod(0, true, false)], &slices).update.len(), 1);
    }

    #[test]
    fn publish_not_ready_makes_every_endpoint_ready() {
        let service = service(json!({"ports": [{"port": 80}], "publishNotReadyAddresses": true, "clusterIP": "None"}));
        let plan = plan_of(&service, &[pod(1, false, false)], &[]);
        assert_eq!(plan.create[0].endpoints.as_ref().unwrap()[0].conditions.as_ref().unwrap().ready, Some(true));
        assert!(plan.create[0].labels().contains_key(HEADLESS_LABEL));
    }

    #[test]
    fn pods_that_name_different_ports_go_to_different_slices() {
        let service = service(json!({"ports": [{"name": "web", "port": 80, "targetPort": "http"}]}));
        let plan = plan_of(&service, &[pod(0, true, false), pod(1, true, false)], &[]);
        let mut ports: Vec<_> = plan.create.iter().map(|s| s.ports.as_ref().unwrap()[0].port.unwrap()).collect();
        ports.sort_unstable();
        assert_eq!(ports, [8000, 8001]);
    }

    #[test]
    fn a_service_without_pods_has_one_empty_slice() {
        let service = service(json!({"ports": [{"port": 80}]}));
        let plan = plan_of(&service, &[], &[]);
        assert_eq!(plan.create.len(), 1);
        let mut serial = 0;
        let slices = carry_out(plan, &[], &mut serial);
        let again = plan_of(&service, &[], &slices);
        assert!(again.create.is_empty() && again.update.is_empty() && again.delete.is_empty());
    }

    #[test]
    fn one_pod_more_is_one_write() {
        let service = service(json!({"ports": [{"port": 80}]}));
        let pods: Vec<_> = (0..250).map(|n| pod(n, true, false)).collect();
        let mut serial = 0;
        let slices = carry_out(plan_of(&service, &pods[..249], &[]), &[], &mut serial);
        assert_eq!(slices.len(), 3);
        let plan = plan_of(&service, &pods, &slices);
        assert_eq!((plan.create.len(), plan.update.len(), plan.delete.len()), (0, 1, 0));
    }

    proptest! {
        #[test]
        fn slices_always_end_up_with_exactly_the_pods(steps in proptest::collection::vec(
            proptest::collection::btree_set(0usize..260, 0..220), 1..5)) {
            let service = service(json!({"ports": [{"port": 80}]}));
            let (mut slices, mut serial) = (Vec::new(), 0);
            for step in steps {
                let pods: Vec<_> = step.iter().map(|n| pod(*n, true, false)).collect();
                slices = carry_out(plan_of(&service, &pods, &slices), &slices, &mut serial);
                let mut shown: Vec<String> = Vec::new();
                for slice in &slices {
                    let endpoints = slice.endpoints.as_deref().unwrap_or_default();
                    prop_assert!(endpoints.len() <= MAX_ENDPOINTS);
                    shown.extend(endpoints.iter().map(|e| e.target_ref.as_ref().unwrap().name.clone().unwrap()));
                }
                shown.sort();
                let mut names: Vec<String> = step.iter().map(|n| format!("p{n}")).collect();
                names.sort();
                prop_assert_eq!(shown, names);
                let again = plan_of(&service, &pods, &slices);
                prop_assert!(again.create.is_empty() && again.update.is_empty() && again.delete.is_empty());
            }
        }
    }
}
