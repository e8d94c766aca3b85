//! Services.

use super::metadata::{labels, object_meta, object_meta_update};
use super::{Errors, check_port, check_port_or_name, field, is_set, names, net, part};
use crate::FieldError;
use crate::access::{integer, list};
use serde_json::{Value, json};
use std::collections::HashSet;

const MOST_AFFINITY_SECONDS: i64 = 86_400;

pub(crate) fn service(object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta(&mut errors, object, true, names::dns_1035_label);
    service_spec(&mut errors, part(object, "spec"));
    errors.0
}

pub(crate) fn service_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    let (spec, before) = (part(new, "spec"), part(old, "spec"));
    cluster_ip_stays(&mut errors, spec, before);
    if needs_health_check(spec)
        && needs_health_check(before)
        && integer(spec, "/healthCheckNodePort") != integer(before, "/healthCheckNodePort")
    {
        errors.forbidden("spec.healthCheckNodePort", super::IMMUTABLE);
    }
    service_spec(&mut errors, spec);
    errors.0
}

/// Addresses of a service in their list form, whichever field gives them.
fn cluster_ips(spec: &Value) -> Vec<&str> {
    let plural: Vec<&str> = list(spec, "/clusterIPs").iter().filter_map(Value::as_str).collect();
    let single = field(spec, "clusterIP");
    match plural.as_slice() {
        [] if !single.is_empty() => vec![single],
        _ => plural,
    }
}

fn is_headless(spec: &Value) -> bool {
    cluster_ips(spec).first() == Some(&"None")
}

fn cluster_ip_stays(errors: &mut Errors, spec: &Value, before: &Value) {
    if field(spec, "type") == "ExternalName" || field(before, "type") == "ExternalName" {
        return;
    }
    let (mut new, old) = (cluster_ips(spec), cluster_ips(before));
    let single = field(spec, "clusterIP");
    if !single.is_empty()
        && single != field(before, "clusterIP")
        && let Some(first) = new.first_mut()
    {
        *first = single;
    }
    let path = "spec.clusterIPs[0]";
    if new.is_empty() && !old.is_empty() {
        errors.invalid(path, json!(new), "primary clusterIP can not be unset");
        return;
    }
    for (index, address) in old.iter().enumerate() {
        if new.get(index).is_some_and(|now| now != address) {
            errors.invalid(format!("spec.clusterIPs[{index}]"), json!(new), "may not change once set");
        }
    }
}

fn service_spec(errors: &mut Errors, spec: &Value) {
    let kind = field(spec, "type");
    if list(spec, "/ports").is_empty() && !is_headless(spec) && kind != "ExternalName" {
        errors.required("spec.ports");
    }
    match kind {
        "LoadBalancer" | "NodePort" if is_headless(spec) => {
            let detail = format!("may not be set to 'None' for {kind} services");
            errors.invalid("spec.clusterIPs[0]", "None", detail);
        }
        "ExternalName" => external_name(errors, spec),
        _ => {}
    }
    ports(errors, spec);
    labels(errors, part(spec, "selector"), "spec.selector");
    affinity(errors, spec);
    addresses(errors, spec);
    errors.one_of("spec.type".to_owned(), kind, &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"]);
    load_balancer(errors, spec);
    traffic(errors, spec);
}

fn external_name(errors: &mut Errors, spec: &Value) {
    let detail = "may not be set for ExternalName services";
    if !cluster_ips(spec).is_empty() {
        errors.forbidden("spec.clusterIPs", detail);
    }
    if !list(spec, "/ipFamilies").is_empty() {
        errors.forbidden("spec.ipFamilies", detail);
    }
    if is_set(spec, "ipFamilyPolicy") {
        errors.forbidden("spec.ipFamilyPolicy", detail);
    }
    let name = field(spec, "externalName");
    match name.strip_suffix('.').unwrap_or(name) {
        "" => errors.required("spec.externalName"),
        name => errors.each("spec.externalName", name, names::dns_subdomain(name)),
    }
}

fn ports(errors: &mut Errors, spec: &Value) {
    let ports = list(spec, "/ports");
    let (mut names_seen, mut numbers, mut node_ports) = (HashSet::new(), HashSet::new(), HashSet::new());
    for (index, port) in ports.iter().enumerate() {
        let path = format!("spec.ports[{index}]");
        let (name, protocol) = (field(port, "name"), field(port, "protocol"));
        let number = integer(port, "/port").unwrap_or(0);
        if !name.is_empty() {
            errors.each(&format!("{path}.name"), name, names::dns_label(name));
            if !names_seen.insert(name) {
                errors.duplicate(format!("{path}.name"), name);
            }
        } else if ports.len() > 1 {
            errors.required(format!("{path}.name"));
        }
        check_port(errors, format!("{path}.port"), number);
        errors.one_of(format!("{path}.protocol"), protocol, &["SCTP", "TCP", "UDP"]);
        check_port_or_name(errors, &format!("{path}.targetPort"), part(port, "targetPort"));
        if is_set(port, "appProtocol") {
            let name = field(port, "appProtocol");
            errors.each(&format!("{path}.appProtocol"), name, names::qualified_name(name));
        }
        if !numbers.insert((protocol, number)) {
            errors.duplicate(&path, json!({"protocol": protocol, "port": number}));
        }
        let node_port = integer(port, "/nodePort").unwrap_or(0);
        if node_port != 0 {
            if field(spec, "type") == "ClusterIP" {
                errors.forbidden(format!("{path}.nodePort"), "may not be used when `type` is 'ClusterIP'");
            }
            if !node_ports.insert((protocol, node_port)) {
                errors.duplicate(format!("{path}.nodePort"), node_port);
            }
        }
    }
}

fn affinity(errors: &mut Errors, spec: &Value) {
    let affinity = field(spec, "sessionAffinity");
    errors.one_of("spec.sessionAffinity".to_owned(), affinity, &["ClientIP", "None"]);
    let path = "spec.sessionAffinityConfig";
    match affinity {
        "ClientIP" => {
            let timeout = integer(spec, "/sessionAffinityConfig/clientIP/timeoutSeconds");
            match timeout {
                None => errors.required_as(path, "when session affinity type is ClientIP"),
                Some(seconds) if !(1..=MOST_AFFINITY_SECONDS).contains(&seconds) => {
                    let detail = format!("must be greater than 0 and less than {MOST_AFFINITY_SECONDS}");
                    errors.invalid(format!("{path}.clientIP.timeoutSeconds"), seconds, detail);
                }
                Some(_) => {}
            }
        }
        "None" if is_set(spec, "sessionAffinityConfig") => {
            errors.forbidden(path, "must not be set when session affinity is None");
        }
        _ => {}
    }
}

fn addresses(errors: &mut Errors, spec: &Value) {
    let ips = cluster_ips(spec);
    let single = field(spec, "clusterIP");
    if !single.is_empty() && ips.first().is_some_and(|first| *first != single) {
        errors.invalid("spec.clusterIPs", json!(ips), "first value must match `clusterIP`");
    }
    if ips.len() > 1 && ips.contains(&"None") {
        errors.invalid("spec.clusterIPs", json!(ips), "'None' must be the first and only value");
    }
    if ips.len() > 2 {
        errors.invalid("spec.clusterIPs", json!(ips), "may only hold up to 2 values");
    }
    for (index, address) in ips.iter().enumerate().filter(|(_, address)| **address != "None") {
        net::ip(errors, &format!("spec.clusterIPs[{index}]"), address);
    }
    for (index, family) in list(spec, "/ipFamilies").iter().filter_map(Value::as_str).enumerate() {
        if !matches!(family, "IPv4" | "IPv6") {
            errors.not_supported(format!("spec.ipFamilies[{index}]"), family, &["IPv4", "IPv6"]);
        }
    }
    let policy = field(spec, "ipFamilyPolicy");
    let policies = &["PreferDualStack", "RequireDualStack", "SingleStack"];
    if !policy.is_empty() && !policies.contains(&policy) {
        errors.not_supported("spec.ipFamilyPolicy", policy, policies);
    }
    for (index, address) in list(spec, "/externalIPs").iter().filter_map(Value::as_str).enumerate() {
        net::not_special(errors, &format!("spec.externalIPs[{index}]"), address);
    }
}

fn load_balancer(errors: &mut Errors, spec: &Value) {
    let is_balanced = field(spec, "type") == "LoadBalancer";
    let detail = "may only be used when `type` is 'LoadBalancer'";
    let ranges = list(spec, "/loadBalancerSourceRanges");
    if !ranges.is_empty() && !is_balanced {
        errors.forbidden("spec.LoadBalancerSourceRanges", detail);
    }
    for (index, range) in ranges.iter().filter_map(Value::as_str).enumerate() {
        net::cidr(errors, &format!("spec.LoadBalancerSourceRanges[{index}]"), range.trim());
    }
    for name in ["allocateLoadBalancerNodePorts", "loadBalancerClass"] {
        if is_set(spec, name) && !is_balanced {
            errors.forbidden(format!("spec.{name}"), detail);
        }
    }
}

fn is_external(spec: &Value) -> bool {
    match field(spec, "type") {
        "LoadBalancer" | "NodePort" => true,
        "ClusterIP" => !list(spec, "/externalIPs").is_empty(),
        _ => false,
    }
}

fn needs_health_check(spec: &Value) -> bool {
    field(spec, "type") == "LoadBalancer" && field(spec, "externalTrafficPolicy") == "Local"
}

fn traffic(errors: &mut Errors, spec: &Value) {
    let policies = &["Cluster", "Local"];
    let external = field(spec, "externalTrafficPolicy");
    if is_external(spec) {
        errors.one_of("spec.externalTrafficPolicy".to_owned(), external, policies);
    } else if !external.is_empty() {
        let detail = "may only be set for externally-accessible services";
        errors.invalid("spec.externalTrafficPolicy", external, detail);
    }
    let health = integer(spec, "/healthCheckNodePort").unwrap_or(0);
    if health != 0 && !needs_health_check(spec) {
        let detail = "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'";
        errors.invalid("spec.healthCheckNodePort", health, detail);
    }
    let internal = field(spec, "internalTrafficPolicy");
    if !internal.is_empty() && !policies.contains(&internal) {
        errors.not_supported("spec.internalTrafficPolicy", internal, policies);
    }
    let distributions = &["PreferClose", "PreferSameNode", "PreferSameZone"];
    let distribution = field(spec, "trafficDistribution");
    if is_set(spec, "trafficDistribution") && !distributions.contains(&distribution) {
        errors.not_supported("spec.trafficDistribution", distribution, distributions);
    }
}
