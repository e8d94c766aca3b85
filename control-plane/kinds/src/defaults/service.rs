//! Defaults of Services, of the endpoints behind them, and of NetworkPolicies. Cluster addresses and node ports are allocated by the server.

use crate::access::{child, elements_mut, remove, set, set_default, set_default_text, text};
use serde_json::{Value, json};

/// Three hours, the stickiness of `ClientIP` affinity.
const AFFINITY_SECONDS: i64 = 10_800;

/// The protocol of ports, and the directions that the policy is about.
pub(crate) fn network_policy(object: &mut Value) {
    let Some(spec) = child(object, "spec") else { return };
    for direction in ["ingress", "egress"] {
        for rule in elements_mut(spec, direction) {
            for port in elements_mut(rule, "ports") {
                set_default_text(port, "protocol", "TCP");
            }
        }
    }
    let filled = |name: &str| spec.get(name).and_then(Value::as_array).is_some_and(|list| !list.is_empty());
    if !filled("policyTypes") {
        let types = if filled("egress") { json!(["Ingress", "Egress"]) } else { json!(["Ingress"]) };
        set(spec, "policyTypes", types);
    }
}

pub(crate) fn service(object: &mut Value) {
    let Some(spec) = child(object, "spec") else { return };
    set_default_text(spec, "sessionAffinity", "None");
    if spec["sessionAffinity"] == "None" {
        remove(spec, "sessionAffinityConfig");
    } else if let Some(config) = child(spec, "sessionAffinityConfig").and_then(|config| child(config, "clientIP")) {
        set_default(config, "timeoutSeconds", AFFINITY_SECONDS);
    }
    set_default_text(spec, "type", "ClusterIP");
    let kind = text(spec, "/type").to_owned();
    let external_ips = spec.get("externalIPs").and_then(Value::as_array).is_some_and(|ips| !ips.is_empty());
    if matches!(kind.as_str(), "NodePort" | "LoadBalancer") || (kind == "ClusterIP" && external_ips) {
        set_default_text(spec, "externalTrafficPolicy", "Cluster");
    }
    if matches!(kind.as_str(), "ClusterIP" | "NodePort" | "LoadBalancer") {
        set_default_text(spec, "internalTrafficPolicy", "Cluster");
    }
    if kind == "LoadBalancer" {
        set_default(spec, "allocateLoadBalancerNodePorts", true);
    }
    for port in elements_mut(spec, "ports") {
        set_default_text(port, "protocol", "TCP");
        let target = port.get("targetPort");
        if target.is_none_or(|target| target == &json!(0) || target == &json!("")) {
            let number = port.get("port").cloned().unwrap_or_default();
            set(port, "targetPort", number);
        }
    }
}

pub(crate) fn endpoints(object: &mut Value) {
    for subset in elements_mut(object, "subsets") {
        for port in elements_mut(subset, "ports") {
            set_default_text(port, "protocol", "TCP");
        }
    }
}

pub(crate) fn endpoint_slice(object: &mut Value) {
    for port in elements_mut(object, "ports") {
        set_default(port, "name", "");
        set_default(port, "protocol", "TCP");
    }
}
