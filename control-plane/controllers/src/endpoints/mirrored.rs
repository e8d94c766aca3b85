//! The EndpointSlices of an Endpoints object that somebody else keeps: one for each family and set of ports. Pure.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{EndpointAddress, EndpointPort as Port, Endpoints};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt;

use super::SERVICE_NAME_LABEL;
use super::plan::Plan;
use super::slices::MANAGED_BY_LABEL;
use crate::owners::controller_reference;

/// More addresses of a set of ports than these are left out.
pub(super) const MAX_ADDRESSES: usize = 1000;
const MANAGED_BY: &str = "endpointslicemirroring-controller.k8s.io";
const SKIP_LABEL: &str = "endpointslice.kubernetes.io/skip-mirror";
const LEADER_ANNOTATION: &str = "control-plane.alpha.kubernetes.io/leader";
/// What says something about the object that it is on, and nothing about its copy.
const OWN_ANNOTATIONS: [&str; 2] = [super::trigger::ANNOTATION, "kubectl.kubernetes.io/last-applied-configuration"];

pub(super) fn is_ours(slice: &EndpointSlice) -> bool {
    slice.labels().get(MANAGED_BY_LABEL).is_some_and(|manager| manager == MANAGED_BY)
}

/// Whether whoever keeps the object wants slices of it.
pub(super) fn is_wanted(endpoints: &Endpoints) -> bool {
    let skips = endpoints.labels().get(SKIP_LABEL).is_some_and(|skip| skip == "true");
    !skips && !endpoints.annotations().contains_key(LEADER_ANNOTATION)
}

/// How many addresses the slices do not have.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct LeftOut {
    /// Those that are none.
    pub invalid: usize,
    /// All of them.
    pub all: usize,
}

/// Name, protocol, number and application protocol of each port.
type Ports = BTreeSet<(String, String, i32, Option<String>)>;

pub(super) fn plan(endpoints: &Endpoints, existing: &[Arc<EndpointSlice>]) -> (Plan, LeftOut) {
    let (mut plan, mut left_out) = (Plan::default(), LeftOut::default());
    let mut wanted: BTreeMap<(&str, Ports), Vec<Endpoint>> = BTreeMap::new();
    for (ports, addresses) in repacked(endpoints) {
        let (mut count, total) = (0, addresses.len());
        for (address, is_ready) in addresses {
            if count == MAX_ADDRESSES {
                break;
            }
            let family = match address.ip.parse() {
                Ok(IpAddr::V4(_)) => "IPv4",
                Ok(IpAddr::V6(_)) => "IPv6",
                Err(_) => {
                    left_out.invalid += 1;
                    continue;
                }
            };
            count += 1;
            wanted.entry((family, ports.clone())).or_default().push(endpoint(address, is_ready));
        }
        left_out.all += total - count;
    }
    let mut current: BTreeMap<(&str, Ports), Vec<&Arc<EndpointSlice>>> = BTreeMap::new();
    for slice in existing.iter().filter(|slice| slice.metadata.deletion_timestamp.is_none()) {
        current.entry((slice.address_type.as_str(), ports_of(slice))).or_default().push(slice);
    }
    let mut fresh = Vec::new();
    for ((family, ports), list) in wanted {
        let mut slices = current.remove(&(family, ports.clone())).unwrap_or_default();
        slices.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
        let new = slice_of(endpoints, family, &ports, list);
        match slices.split_first() {
            None => fresh.push(new),
            Some((first, others)) => {
                plan.delete.extend(others.iter().map(|slice| (*slice).clone()));
                if !is_same(first, &new) {
                    plan.update.push(over(first, new));
                }
            }
        }
    }
    plan.delete.extend(current.into_values().flatten().cloned());
    // What would go takes the place of what would come, so that there is no moment without any. The family of a slice is fixed.
    for new in fresh {
        match plan.delete.iter().position(|old| old.address_type == new.address_type) {
            Some(position) => plan.update.push(over(&plan.delete.swap_remove(position), new)),
            None => plan.create.push(new),
        }
    }
    (plan, left_out)
}

/// An address in an Endpoints object, and whether it is ready.
type Listed<'a> = (&'a EndpointAddress, bool);

/// The addresses by all the ports that they have, in whichever subsets those are.
fn repacked(endpoints: &Endpoints) -> BTreeMap<Ports, Vec<Listed<'_>>> {
    let mut order: Vec<Listed<'_>> = Vec::new();
    let mut ports: BTreeMap<(&str, Option<&str>, bool), Ports> = BTreeMap::new();
    for subset in endpoints.subsets.iter().flatten() {
        let ready = subset.addresses.iter().flatten().map(|address| (address, true));
        let unready = subset.not_ready_addresses.iter().flatten().map(|address| (address, false));
        for (address, is_ready) in ready.chain(unready) {
            let known = ports.entry(identity((address, is_ready))).or_insert_with(|| {
                order.push((address, is_ready));
                Ports::new()
            });
            known.extend(subset.ports.iter().flatten().map(port));
        }
    }
    let mut by_ports: BTreeMap<Ports, Vec<Listed<'_>>> = BTreeMap::new();
    for listed in order {
        if let Some(ports) = ports.get(&identity(listed)) {
            by_ports.entry(ports.clone()).or_default().push(listed);
        }
    }
    // Who is ready and not, at the same ports, is ready.
    for list in by_ports.values_mut() {
        list.sort_by_key(|(_, is_ready)| !is_ready);
        let mut seen = HashSet::new();
        list.retain(|(address, _)| seen.insert((address.ip.as_str(), uid(address))));
    }
    by_ports
}

fn uid(address: &EndpointAddress) -> Option<&str> {
    address.target_ref.as_ref()?.uid.as_deref()
}

fn identity((address, is_ready): Listed<'_>) -> (&str, Option<&str>, bool) {
    (address.ip.as_str(), uid(address), is_ready)
}

fn port(port: &Port) -> (String, String, i32, Option<String>) {
    let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
    (port.name.clone().unwrap_or_default(), protocol, port.port, port.app_protocol.clone())
}

fn ports_of(slice: &EndpointSlice) -> Ports {
    let port = |port: &EndpointPort| {
        let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
        (port.name.clone().unwrap_or_default(), protocol, port.port.unwrap_or(0), port.app_protocol.clone())
    };
    slice.ports.iter().flatten().map(port).collect()
}

fn endpoint(address: &EndpointAddress, is_ready: bool) -> Endpoint {
    Endpoint {
        addresses: vec![address.ip.clone()],
        conditions: Some(EndpointConditions { ready: Some(is_ready), ..EndpointConditions::default() }),
        hostname: address.hostname.clone().filter(|hostname| !hostname.is_empty()),
        node_name: address.node_name.clone(),
        target_ref: address.target_ref.clone(),
        ..Endpoint::default()
    }
}

fn slice_of(endpoints: &Endpoints, family: &str, ports: &Ports, list: Vec<Endpoint>) -> EndpointSlice {
    let mut labels = endpoints.labels().clone();
    labels.insert(SERVICE_NAME_LABEL.to_owned(), endpoints.name_any());
    labels.insert(MANAGED_BY_LABEL.to_owned(), MANAGED_BY.to_owned());
    let mut annotations = endpoints.annotations().clone();
    annotations.retain(|name, _| !OWN_ANNOTATIONS.contains(&name.as_str()));
    let port = |(name, protocol, number, app_protocol): &(String, String, i32, Option<String>)| EndpointPort {
        name: Some(name.clone()),
        protocol: Some(protocol.clone()),
        port: Some(*number),
        app_protocol: app_protocol.clone(),
    };
    EndpointSlice {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}-", endpoints.name_any())),
            namespace: endpoints.namespace(),
            labels: Some(labels),
            annotations: (!annotations.is_empty()).then_some(annotations),
            owner_references: Some(vec![controller_reference(endpoints)]),
            ..ObjectMeta::default()
        },
        address_type: family.to_owned(),
        endpoints: Some(list),
        ports: (!ports.is_empty()).then(|| ports.iter().map(port).collect()),
    }
}

/// Whether `existing` says what `wanted` says; both are of the same family and ports.
fn is_same(existing: &EndpointSlice, wanted: &EndpointSlice) -> bool {
    let sorted = |slice: &EndpointSlice| {
        let mut list = slice.endpoints.clone().unwrap_or_default();
        list.sort_by(|a, b| (&a.addresses, &a.hostname).cmp(&(&b.addresses, &b.hostname)));
        list
    };
    existing.labels() == wanted.labels()
        && existing.annotations() == wanted.annotations()
        && existing.metadata.owner_references == wanted.metadata.owner_references
        && sorted(existing) == sorted(wanted)
}

/// `wanted` in the place of `existing`.
fn over(existing: &EndpointSlice, wanted: EndpointSlice) -> EndpointSlice {
    let mut result = existing.clone();
    result.metadata.labels = wanted.metadata.labels;
    result.metadata.annotations = wanted.metadata.annotations;
    result.metadata.owner_references = wanted.metadata.owner_references;
    result.endpoints = wanted.endpoints;
    result.ports = wanted.ports;
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn endpoints(subsets: Value) -> Endpoints {
        let meta = json!({"name": "db", "namespace": "ns", "uid": "e", "labels": {"team": "x"}, "annotations": {
            "note": "n", OWN_ANNOTATIONS[0]: "t", OWN_ANNOTATIONS[1]: "{}",
        }});
        serde_json::from_value(json!({"metadata": meta, "subsets": subsets})).unwrap()
    }

    /// The slices that a plan leads to.
    fn carried_out(endpoints: &Endpoints) -> Vec<Arc<EndpointSlice>> {
        let (plan, _) = plan(endpoints, &[]);
        let named = plan.create.into_iter().enumerate().map(|(number, mut slice)| {
            slice.metadata.name = Some(format!("db-{number}"));
            Arc::new(slice)
        });
        named.collect()
    }

    #[test]
    fn each_family_and_set_of_ports_is_a_slice() {
        let web = json!({"name": "web", "port": 80, "protocol": "TCP"});
        let dns = json!({"name": "dns", "port": 53, "protocol": "UDP"});
        let all = endpoints(json!([
            {"addresses": [{"ip": "192.0.2.1", "hostname": "a", "nodeName": "n"}, {"ip": "2001:db8::1"}, {"ip": "no"}],
             "notReadyAddresses": [{"ip": "192.0.2.2"}], "ports": [web]},
            {"addresses": [{"ip": "192.0.2.1", "hostname": "a", "nodeName": "n"}], "ports": [dns]},
        ]));
        let slices = carried_out(&all);
        let shown: BTreeSet<_> = slices
            .iter()
            .map(|slice| {
                let ports: Vec<i32> = slice.ports.iter().flatten().filter_map(|port| port.port).collect();
                let list = slice.endpoints.iter().flatten();
                let ready = |one: &Endpoint| one.conditions.as_ref().unwrap().ready.unwrap();
                let list: Vec<_> = list.map(|one| (one.addresses[0].clone(), ready(one))).collect();
                (slice.address_type.clone(), ports, list)
            })
            .collect();
        let one = |family: &str, ports: &[i32], address: &str, ready| {
            (family.to_owned(), ports.to_vec(), vec![(address.to_owned(), ready)])
        };
        // The address with both ports is one endpoint.
        let wanted = BTreeSet::from([
            one("IPv4", &[53, 80], "192.0.2.1", true),
            one("IPv4", &[80], "192.0.2.2", false),
            one("IPv6", &[80], "2001:db8::1", true),
        ]);
        assert_eq!(shown, wanted);
        assert_eq!(plan(&all, &slices).1, LeftOut { invalid: 1, all: 1 });
        let metadata = &slices[0].metadata;
        assert_eq!(metadata.annotations, Some(BTreeMap::from([("note".to_owned(), "n".to_owned())])));
        assert_eq!(metadata.labels.as_ref().unwrap()["team"], "x");
        let owner = &metadata.owner_references.as_ref().unwrap()[0];
        assert_eq!((owner.kind.as_str(), owner.uid.as_str(), owner.controller), ("Endpoints", "e", Some(true)));
        let named = slices.iter().flat_map(|slice| slice.endpoints.iter().flatten());
        assert!(named.clone().any(|one| one.hostname.as_deref() == Some("a") && one.node_name.as_deref() == Some("n")));
        let (again, _) = plan(&all, &slices);
        assert!(again.create.is_empty() && again.update.is_empty() && again.delete.is_empty(), "{again:?}");
    }

    #[test]
    fn other_ports_change_the_slice_that_is_there() {
        let of = |port: i32| endpoints(json!([{"addresses": [{"ip": "192.0.2.1"}], "ports": [{"port": port}]}]));
        let slices = carried_out(&of(80));
        let (changed, _) = plan(&of(81), &slices);
        assert!(changed.create.is_empty() && changed.delete.is_empty(), "{changed:?}");
        assert_eq!(changed.update[0].metadata.name.as_deref(), Some("db-0"));
        assert_eq!(changed.update[0].ports.as_ref().unwrap()[0].port, Some(81));
        // A slice is of one family for ever.
        let other = endpoints(json!([{"addresses": [{"ip": "2001:db8::1"}], "ports": [{"port": 80}]}]));
        let (changed, _) = plan(&other, &slices);
        assert_eq!((changed.create.len(), changed.update.len(), changed.delete.len()), (1, 0, 1));
        assert_eq!(plan(&endpoints(json!([])), &slices).0.delete.len(), 1);
    }

    #[test]
    fn a_thousand_addresses_are_all() {
        let addresses: Vec<Value> =
            (0..1200).map(|number| json!({"ip": format!("192.0.{}.{}", number / 250, number % 250)})).collect();
        let (planned, left_out) = plan(&endpoints(json!([{"addresses": addresses, "ports": [{"port": 80}]}])), &[]);
        assert_eq!(planned.create[0].endpoints.as_ref().unwrap().len(), MAX_ADDRESSES);
        assert_eq!((planned.create.len(), left_out), (1, LeftOut { invalid: 0, all: 200 }));
    }

    #[test]
    fn leaders_and_those_who_say_so_are_not_mirrored() {
        let mut all = endpoints(json!([]));
        assert!(is_wanted(&all));
        all.labels_mut().insert(SKIP_LABEL.to_owned(), "false".to_owned());
        assert!(is_wanted(&all));
        all.labels_mut().insert(SKIP_LABEL.to_owned(), "true".to_owned());
        assert!(!is_wanted(&all));
        all.labels_mut().clear();
        all.annotations_mut().insert(LEADER_ANNOTATION.to_owned(), "{}".to_owned());
        assert!(!is_wanted(&all));
    }
}
