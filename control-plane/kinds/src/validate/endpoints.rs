//! Endpoints and EndpointSlices.

use super::metadata::{object_meta, object_meta_update};
use super::{Errors, check_port, field, is_set, names, net, part};
use crate::FieldError;
use crate::access::{integer, list};
use serde_json::Value;
use std::collections::HashSet;

const PROTOCOLS: &[&str] = &["SCTP", "TCP", "UDP"];

pub(crate) fn endpoints(object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta(&mut errors, object, true, names::dns_subdomain);
    subsets(&mut errors, object);
    errors.0
}

pub(crate) fn endpoints_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    subsets(&mut errors, new);
    errors.0
}

fn subsets(errors: &mut Errors, object: &Value) {
    for (index, subset) in list(object, "/subsets").iter().enumerate() {
        let path = format!("subsets[{index}]");
        let (ready, not_ready) = (list(subset, "/addresses"), list(subset, "/notReadyAddresses"));
        if ready.is_empty() && not_ready.is_empty() {
            errors.required_as(&path, "must specify `addresses` or `notReadyAddresses`");
        }
        for (name, addresses) in [("addresses", ready), ("notReadyAddresses", not_ready)] {
            for (index, address) in addresses.iter().enumerate() {
                let path = format!("{path}.{name}[{index}]");
                net::not_special(errors, &format!("{path}.ip"), field(address, "ip"));
                let host = field(address, "hostname");
                if !host.is_empty() {
                    errors.each(&format!("{path}.hostname"), host, names::dns_label(host));
                }
                if is_set(address, "nodeName") {
                    let node = field(address, "nodeName");
                    errors.each(&format!("{path}.nodeName"), node, names::dns_subdomain(node));
                }
            }
        }
        let ports = list(subset, "/ports");
        for (index, port) in ports.iter().enumerate() {
            let path = format!("{path}.ports[{index}]");
            let name = field(port, "name");
            if name.is_empty() && ports.len() > 1 {
                errors.required(format!("{path}.name"));
            } else if !name.is_empty() {
                errors.each(&format!("{path}.name"), name, names::dns_label(name));
            }
            check_port(errors, format!("{path}.port"), integer(port, "/port").unwrap_or(0));
            errors.one_of(format!("{path}.protocol"), field(port, "protocol"), PROTOCOLS);
        }
    }
}

const MOST_ENDPOINTS: usize = 1000;
const MOST_ADDRESSES: usize = 100;
const MOST_PORTS: usize = 20_000;

pub(crate) fn endpoint_slice(object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta(&mut errors, object, true, names::dns_subdomain);
    slice(&mut errors, object);
    errors.0
}

pub(crate) fn endpoint_slice_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    slice(&mut errors, new);
    errors.immutable("addressType", new.get("addressType"), old.get("addressType"));
    errors.0
}

fn slice(errors: &mut Errors, object: &Value) {
    let family = field(object, "addressType");
    errors.one_of("addressType".to_owned(), family, &["FQDN", "IPv4", "IPv6"]);
    let endpoints = list(object, "/endpoints");
    if endpoints.len() > MOST_ENDPOINTS {
        errors.push(FieldError::too_many("endpoints", endpoints.len(), MOST_ENDPOINTS));
        return;
    }
    for (index, endpoint) in endpoints.iter().enumerate() {
        slice_endpoint(errors, endpoint, family, &format!("endpoints[{index}]"));
    }
    let ports = list(object, "/ports");
    if ports.len() > MOST_PORTS {
        errors.push(FieldError::too_many("ports", ports.len(), MOST_PORTS));
        return;
    }
    let mut seen = HashSet::new();
    for (index, port) in ports.iter().enumerate() {
        let path = format!("ports[{index}]");
        let name = field(port, "name");
        if !name.is_empty() {
            errors.each(&format!("{path}.name"), name, names::dns_label(name));
        }
        if !seen.insert(name) {
            errors.duplicate(format!("{path}.name"), name);
        }
        if let Some(number) = integer(port, "/port") {
            check_port(errors, format!("{path}.port"), number);
        }
        errors.one_of(format!("{path}.protocol"), field(port, "protocol"), PROTOCOLS);
    }
}

fn slice_endpoint(errors: &mut Errors, endpoint: &Value, family: &str, path: &str) {
    let addresses: Vec<&str> = list(endpoint, "/addresses").iter().filter_map(Value::as_str).collect();
    let in_addresses = format!("{path}.addresses");
    if addresses.is_empty() {
        errors.required_as(&in_addresses, "must contain at least 1 address");
    }
    if addresses.len() > MOST_ADDRESSES {
        errors.push(FieldError::too_many(&in_addresses, addresses.len(), MOST_ADDRESSES));
    }
    for (index, address) in addresses.iter().enumerate() {
        let path = format!("{in_addresses}[{index}]");
        match family {
            "IPv4" if address.parse::<std::net::Ipv4Addr>().is_err() => {
                errors.invalid(path, *address, "must be an IPv4 address");
            }
            "IPv6" if address.parse::<std::net::Ipv6Addr>().is_err() => {
                errors.invalid(path, *address, "must be an IPv6 address");
            }
            "IPv4" | "IPv6" => net::not_special(errors, &path, address),
            "FQDN" => errors.each(&path, address, names::dns_subdomain(address)),
            _ => {}
        }
    }
    for (name, rule) in [("hostname", names::dns_label as names::NameRule), ("nodeName", names::dns_subdomain)] {
        if is_set(endpoint, name) {
            let value = field(endpoint, name);
            errors.each(&format!("{path}.{name}"), value, rule(value));
        }
    }
    for (key, value) in crate::access::entries(part(endpoint, "deprecatedTopology"), "") {
        errors.each(&format!("{path}.deprecatedTopology"), key, names::qualified_name(key));
        let value = value.as_str().unwrap_or_default();
        errors.each(&format!("{path}.deprecatedTopology"), value, names::label_value(value));
    }
}
