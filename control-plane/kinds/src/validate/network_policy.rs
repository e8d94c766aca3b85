//! NetworkPolicies.

use super::metadata::{label_selector, object_meta, object_meta_update};
use super::{Errors, field, is_set, names, net, part};
use crate::FieldError;
use crate::access::{integer, list};
use serde_json::Value;

const PROTOCOLS: &[&str] = &["SCTP", "TCP", "UDP"];
const PORTS: std::ops::RangeInclusive<i64> = 1..=65_535;

pub(crate) fn network_policy(object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta(&mut errors, object, true, names::dns_subdomain);
    specification(&mut errors, object);
    errors.0
}

pub(crate) fn network_policy_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    specification(&mut errors, new);
    errors.0
}

fn specification(errors: &mut Errors, object: &Value) {
    let spec = part(object, "spec");
    label_selector(errors, part(spec, "podSelector"), "spec.podSelector");
    for (direction, peers) in [("ingress", "from"), ("egress", "to")] {
        for (index, rule) in list(spec, &format!("/{direction}")).iter().enumerate() {
            let path = format!("spec.{direction}[{index}]");
            for (index, port) in list(rule, "/ports").iter().enumerate() {
                policy_port(errors, port, &format!("{path}.ports[{index}]"));
            }
            for (index, one) in list(rule, &format!("/{peers}")).iter().enumerate() {
                peer(errors, one, &format!("{path}.{peers}[{index}]"));
            }
        }
    }
    let types = list(spec, "/policyTypes");
    if types.len() > 2 {
        errors.invalid(
            "spec.policyTypes",
            part(spec, "policyTypes").clone(),
            "may not specify more than two policyTypes",
        );
        return;
    }
    for (index, one) in types.iter().enumerate() {
        let text = one.as_str().unwrap_or_default();
        if !matches!(text, "Ingress" | "Egress") {
            errors.not_supported(format!("spec.policyTypes[{index}]"), text, &["Egress", "Ingress"]);
        }
    }
}

fn policy_port(errors: &mut Errors, port: &Value, path: &str) {
    let protocol = field(port, "protocol");
    if is_set(port, "protocol") && !PROTOCOLS.contains(&protocol) {
        errors.not_supported(format!("{path}.protocol"), protocol, PROTOCOLS);
    }
    let number = integer(port, "/port");
    if let Some(number) = number
        && !PORTS.contains(&number)
    {
        errors.invalid(format!("{path}.port"), number, "must be between 1 and 65535, inclusive");
    }
    let name = field(port, "port");
    if !name.is_empty() {
        errors.each(&format!("{path}.port"), name, names::port_name(name));
    }
    let Some(end) = integer(port, "/endPort") else { return };
    let path = format!("{path}.endPort");
    match number {
        Some(first) if end < first => errors.invalid(path, end, "must be greater than or equal to `port`"),
        Some(_) if !PORTS.contains(&end) => errors.invalid(path, end, "must be between 1 and 65535, inclusive"),
        Some(_) => {}
        None if name.is_empty() => errors.invalid(path, end, "may not be specified when `port` is not specified"),
        None => errors.invalid(path, end, "may not be specified when `port` is non-numeric"),
    }
}

fn peer(errors: &mut Errors, peer: &Value, path: &str) {
    let mut kinds = 0;
    for name in ["podSelector", "namespaceSelector"] {
        if is_set(peer, name) {
            kinds |= 1;
            label_selector(errors, part(peer, name), &format!("{path}.{name}"));
        }
    }
    if is_set(peer, "ipBlock") {
        kinds += 2;
        block(errors, part(peer, "ipBlock"), &format!("{path}.ipBlock"));
    }
    match kinds {
        0 => errors.required_as(path, "must specify a peer"),
        3 => errors.forbidden(path, "may not specify both ipBlock and another peer"),
        _ => {}
    }
}

fn block(errors: &mut Errors, block: &Value, path: &str) {
    let cidr = field(block, "cidr");
    if cidr.is_empty() {
        errors.required(format!("{path}.cidr"));
        return;
    }
    net::cidr(errors, &format!("{path}.cidr"), cidr);
    for (index, except) in list(block, "/except").iter().filter_map(Value::as_str).enumerate() {
        let path = format!("{path}.except[{index}]");
        net::cidr(errors, &path, except);
        let (Ok(whole), Ok(part)) = (cidr.parse::<ipnet::IpNet>(), except.parse::<ipnet::IpNet>()) else { continue };
        if !whole.contains(&part) || whole == part {
            errors.invalid(path, except, format!("must be a strict subset of `cidr`: {cidr}"));
        }
    }
}
