//! The columns of Services, Endpoints, EndpointSlices and NetworkPolicies.

use super::{AGE, NAME, SELECTOR, age, column, first_three, label_selector, labels, name, or};
use crate::access::{integer, list, text};
use crate::kind::Column;
use jiff::Timestamp;
use serde_json::Value;

pub(crate) const SERVICE: &[Column] = &[
    NAME,
    column("Type", "string", "How the service is exposed."),
    column("Cluster-IP", "string", "Address inside the cluster."),
    column("External-IP", "string", "Addresses outside the cluster."),
    column("Port(s)", "string", "Ports, with node ports where there are any."),
    AGE,
    SELECTOR,
];

pub(crate) fn service(object: &Value, now: Timestamp) -> Vec<Value> {
    let cluster_ip = or(text(object, "/spec/clusterIPs/0"), text(object, "/spec/clusterIP"));
    vec![
        name(object),
        Value::from(text(object, "/spec/type")),
        Value::from(or(cluster_ip, "<none>")),
        Value::from(external_address(object)),
        Value::from(or(&ports(object), "<none>")),
        age(object, now),
        Value::from(labels(object.pointer("/spec/selector"))),
    ]
}

pub(crate) const NETWORK_POLICY: &[Column] =
    &[NAME, column("Pod-Selector", "string", "The pods that the policy is about."), AGE];

pub(crate) fn network_policy(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![name(object), Value::from(label_selector(object.pointer("/spec/podSelector"))), age(object, now)]
}

fn external_address(object: &Value) -> String {
    let mut addresses: Vec<String> = Vec::new();
    match text(object, "/spec/type") {
        "ExternalName" => return text(object, "/spec/externalName").to_owned(),
        "LoadBalancer" => {
            for ingress in list(object, "/status/loadBalancer/ingress") {
                let address = or(text(ingress, "/ip"), text(ingress, "/hostname"));
                if !address.is_empty() {
                    addresses.push(address.to_owned());
                }
            }
            addresses.sort();
            addresses.dedup();
        }
        _ => {}
    }
    addresses.extend(list(object, "/spec/externalIPs").iter().filter_map(Value::as_str).map(str::to_owned));
    match (addresses.is_empty(), text(object, "/spec/type")) {
        (true, "LoadBalancer") => "<pending>".to_owned(),
        (true, _) => "<none>".to_owned(),
        _ => addresses.join(","),
    }
}

fn ports(object: &Value) -> String {
    let port = |port: &Value| {
        let (number, protocol) = (integer(port, "/port").unwrap_or(0), text(port, "/protocol"));
        match integer(port, "/nodePort").unwrap_or(0) {
            0 => format!("{number}/{protocol}"),
            node_port => format!("{number}:{node_port}/{protocol}"),
        }
    };
    list(object, "/spec/ports").iter().map(port).collect::<Vec<_>>().join(",")
}

pub(crate) const ENDPOINTS: &[Column] = &[NAME, column("Endpoints", "string", "Addresses and ports."), AGE];

fn host_port(address: &str, port: i64) -> String {
    if address.contains(':') { format!("[{address}]:{port}") } else { format!("{address}:{port}") }
}

pub(crate) fn endpoints(object: &Value, now: Timestamp) -> Vec<Value> {
    let mut shown = Vec::new();
    for subset in list(object, "/subsets") {
        let addresses = || list(subset, "/addresses").iter().map(|address| text(address, "/ip"));
        let ports = list(subset, "/ports");
        if ports.is_empty() {
            shown.extend(addresses().map(str::to_owned));
        }
        for port in ports {
            let number = integer(port, "/port").unwrap_or(0);
            shown.extend(addresses().map(|address| host_port(address, number)));
        }
    }
    let cell = if list(object, "/subsets").is_empty() { "<none>".to_owned() } else { first_three(&shown) };
    vec![name(object), Value::from(cell), age(object, now)]
}

pub(crate) const ENDPOINT_SLICE: &[Column] = &[
    NAME,
    column("AddressType", "string", "Kind of the addresses."),
    column("Ports", "string", "Ports of every endpoint."),
    column("Endpoints", "string", "Addresses of the endpoints."),
    AGE,
];

pub(crate) fn endpoint_slice(object: &Value, now: Timestamp) -> Vec<Value> {
    let port = |port: &Value| match integer(port, "/port") {
        Some(number) => number.to_string(),
        None => or(text(port, "/name"), "*").to_owned(),
    };
    let ports: Vec<String> = list(object, "/ports").iter().map(port).collect();
    let addresses: Vec<String> = list(object, "/endpoints")
        .iter()
        .flat_map(|endpoint| list(endpoint, "/addresses"))
        .filter_map(Value::as_str)
        .map(str::to_owned)
        .collect();
    vec![
        name(object),
        Value::from(text(object, "/addressType")),
        Value::from(or(&first_three(&ports), "<unset>")),
        Value::from(or(&first_three(&addresses), "<unset>")),
        age(object, now),
    ]
}
