//! The Endpoints object of a Service, for clients that do not read EndpointSlices. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{EndpointAddress, EndpointPort, EndpointSubset, Endpoints, Pod, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt;

use super::{backends, families};
use crate::pods::{is_ready, is_terminal, is_terminating};

/// More addresses than this are left out, and the object says so.
const MAX_ADDRESSES: usize = 1000;
const MANAGED_BY_LABEL: &str = "endpoints.kubernetes.io/managed-by";
const MANAGED_BY: &str = "endpoint-controller";
const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";
const OVER_CAPACITY: &str = "endpoints.kubernetes.io/over-capacity";

pub(super) fn is_ours(endpoints: &Endpoints) -> bool {
    endpoints.labels().get(MANAGED_BY_LABEL).is_some_and(|manager| manager == MANAGED_BY)
}

type Ports = Vec<(String, String, i32, Option<String>)>;

pub(super) fn plan(service: &Service, pods: &[Arc<Pod>]) -> Endpoints {
    // Endpoints are of one family only: the Service's first.
    let first = service.spec.as_ref().and_then(|spec| spec.ip_families.as_ref()).and_then(|families| families.first());
    let family = first.map(String::as_str).or(families(service).into_iter().next()).unwrap_or("IPv4");
    let mut subsets: BTreeMap<Ports, EndpointSubset> = BTreeMap::new();
    let (mut count, mut truncated) = (0, false);
    for pod in pods.iter().filter(|pod| !is_terminal(pod)) {
        let tolerated = backends::publishes_unready(service);
        let Some(ip) = backends::address(pod, family).filter(|_| tolerated || !is_terminating(pod)) else { continue };
        if count == MAX_ADDRESSES {
            truncated = true;
            break;
        }
        let ports = backends::ports(service).iter().filter_map(|port| {
            let number = backends::target_port(pod, port)?;
            let name = port.name.clone().unwrap_or_default();
            Some((name, backends::protocol(port).to_owned(), number, port.app_protocol.clone()))
        });
        let ports: Ports = ports.collect();
        if ports.is_empty() && !backends::is_headless(service) {
            continue;
        }
        count += 1;
        let address = EndpointAddress {
            ip: ip.to_owned(),
            hostname: backends::hostname(pod, service),
            node_name: backends::node(pod),
            target_ref: Some(backends::target(pod)),
        };
        let subset = subsets.entry(ports.clone()).or_insert_with(|| subset(&ports));
        let list = match tolerated || is_ready(pod) {
            true => &mut subset.addresses,
            false => &mut subset.not_ready_addresses,
        };
        list.get_or_insert_default().push(address);
    }
    let mut labels = service.labels().clone();
    labels.insert(MANAGED_BY_LABEL.to_owned(), MANAGED_BY.to_owned());
    labels.remove(HEADLESS_LABEL);
    if backends::is_headless(service) {
        labels.insert(HEADLESS_LABEL.to_owned(), String::new());
    }
    Endpoints {
        metadata: ObjectMeta {
            name: Some(service.name_any()),
            namespace: service.namespace(),
            labels: Some(labels),
            annotations: truncated.then(|| BTreeMap::from([(OVER_CAPACITY.to_owned(), "truncated".to_owned())])),
            ..Default::default()
        },
        subsets: (!subsets.is_empty()).then(|| subsets.into_values().collect()),
    }
}

fn subset(ports: &Ports) -> EndpointSubset {
    let ports: Vec<EndpointPort> = ports
        .iter()
        .map(|(name, protocol, port, app_protocol)| EndpointPort {
            name: (!name.is_empty()).then(|| name.clone()),
            protocol: Some(protocol.clone()),
            port: *port,
            app_protocol: app_protocol.clone(),
        })
        .collect();
    EndpointSubset { ports: (!ports.is_empty()).then_some(ports), ..Default::default() }
}

/// Whether `existing` says what `wanted` says.
pub(super) fn same(existing: &Endpoints, wanted: &Endpoints) -> bool {
    let list = |endpoints: &Endpoints| endpoints.subsets.clone().unwrap_or_default();
    let mut shown = list(existing);
    // Servers may fill in parts of the reference that are not ours.
    for address in shown
        .iter_mut()
        .flat_map(|subset| subset.addresses.iter_mut().flatten().chain(subset.not_ready_addresses.iter_mut().flatten()))
    {
        if let Some(target) = &mut address.target_ref {
            target.resource_version = None;
        }
    }
    let truncated = |endpoints: &Endpoints| endpoints.annotations().contains_key(OVER_CAPACITY);
    shown == list(wanted) && existing.labels() == wanted.labels() && truncated(existing) == truncated(wanted)
}

/// `wanted` in the place of `existing`.
pub(super) fn over(existing: &Endpoints, wanted: Endpoints) -> Endpoints {
    let mut result = existing.clone();
    result.metadata.labels = wanted.metadata.labels;
    result.annotations_mut().remove(OVER_CAPACITY);
    result.annotations_mut().extend(wanted.metadata.annotations.unwrap_or_default());
    result.subsets = wanted.subsets;
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn ready_and_unready_pods_are_told_apart() {
        let service: Service = serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "ns"},
            "spec": {"selector": {"app": "a"}, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]},
        }))
        .unwrap();
        let pod = |name: &str, ready: &str| -> Arc<Pod> {
            let value = json!({
                "metadata": {"name": name, "namespace": "ns"}, "spec": {"containers": []},
                "status": {"phase": "Running", "podIP": "10.0.0.1",
                           "conditions": [{"type": "Ready", "status": ready}]},
            });
            Arc::new(serde_json::from_value(value).unwrap())
        };
        let planned = plan(&service, &[pod("a", "True"), pod("b", "False")]);
        let subset = &planned.subsets.as_ref().unwrap()[0];
        assert_eq!(subset.addresses.as_ref().unwrap().len(), 1);
        assert_eq!(subset.not_ready_addresses.as_ref().unwrap().len(), 1);
        assert_eq!(subset.ports.as_ref().unwrap()[0].port, 8080);
        assert!(same(&planned, &planned) && is_ours(&planned));
        assert_eq!(plan(&service, &[]).subsets, None);
    }
}
