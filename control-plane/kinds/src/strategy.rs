//! What create and update do to an object before validation: status is the server's on create, each of spec and
//! status keeps still while the other is written, and `metadata.generation` counts changes of the desired state.

use crate::access::{boolean, child, integer, keep, keep_metadata, list, remove, same, set, set_default, text};
use serde_json::{Value, json};

fn set_generation(object: &mut Value, generation: i64) {
    if let Some(metadata) = child(object, "metadata") {
        set(metadata, "generation", generation);
    }
}

fn bump_generation(new: &mut Value, old: &Value, changed: bool) {
    let generation = integer(old, "/metadata/generation").unwrap_or(0);
    match generation + i64::from(changed) {
        0 => {}
        generation => set_generation(new, generation),
    }
}

/// Kinds with a spec, a status and a generation.
pub(crate) fn workload_create(object: &mut Value) {
    set(object, "status", json!({}));
    set_generation(object, 1);
}

pub(crate) fn workload_update(new: &mut Value, old: &Value) {
    keep(new, old, "status");
    let changed = !same(new, old, "/spec");
    bump_generation(new, old, changed);
}

/// A Deployment's annotations count as desired state too.
pub(crate) fn deployment_update(new: &mut Value, old: &Value) {
    keep(new, old, "status");
    let changed = !same(new, old, "/spec") || !same(new, old, "/metadata/annotations");
    bump_generation(new, old, changed);
}

pub(crate) fn workload_status(new: &mut Value, old: &Value) {
    keep(new, old, "spec");
    keep_metadata(new, old, "labels");
    keep_metadata(new, old, "generation");
}

/// Kinds whose status update may change metadata too.
pub(crate) fn plain_status(new: &mut Value, old: &Value) {
    keep(new, old, "spec");
    keep_metadata(new, old, "generation");
}

pub(crate) fn keep_status(new: &mut Value, old: &Value) {
    keep(new, old, "status");
}

pub(crate) fn namespace_create(object: &mut Value) {
    set(object, "status", json!({"phase": "Active"}));
    if let Some(spec) = child(object, "spec") {
        set_default(spec, "finalizers", json!([]));
        if let Some(finalizers) = spec.get_mut("finalizers").and_then(Value::as_array_mut)
            && !finalizers.iter().any(|item| item == "kubernetes")
        {
            finalizers.push(json!("kubernetes"));
        }
    }
}

/// Finalizers of the spec change through the finalize subresource only.
pub(crate) fn namespace_update(new: &mut Value, old: &Value) {
    keep(new, old, "spec");
    keep(new, old, "status");
}

pub(crate) fn pod_create(object: &mut Value) {
    let mut status = json!({"phase": "Pending", "qosClass": qos_class(object)});
    if !list(object, "/spec/schedulingGates").is_empty() {
        status["conditions"] = json!([{"type": "PodScheduled", "status": "False", "reason": "SchedulingGated",
            "message": "Scheduling is blocked due to non-empty scheduling gates"}]);
    }
    set(object, "status", status);
    set_generation(object, 1);
}

pub(crate) fn pod_update(new: &mut Value, old: &Value) {
    keep(new, old, "status");
    let changed = !same(new, old, "/spec");
    bump_generation(new, old, changed);
}

pub(crate) fn pod_status(new: &mut Value, old: &Value) {
    keep(new, old, "spec");
    keep_metadata(new, old, "ownerReferences");
    keep_metadata(new, old, "generation");
    if text(new, "/status/qosClass").is_empty() {
        let class = qos_class(old);
        if let Some(status) = child(new, "status") {
            set(status, "qosClass", class);
        }
    }
}

/// `Guaranteed`, `Burstable` or `BestEffort`, from CPU and memory of all containers.
pub(crate) fn qos_class(pod: &Value) -> &'static str {
    const COMPUTE: [&str; 2] = ["cpu", "memory"];
    let mut any = false;
    let mut guaranteed = true;
    let containers = list(pod, "/spec/containers").iter().chain(list(pod, "/spec/initContainers"));
    for container in containers {
        let amount = |kind: &str, name: &str| {
            let value = container.pointer(&format!("/resources/{kind}/{name}"))?;
            oarlock_schema::quantity::Quantity::from_json(value).ok().filter(|quantity| quantity.sign() > 0)
        };
        for name in COMPUTE {
            let (request, limit) = (amount("requests", name), amount("limits", name));
            any |= request.is_some() || limit.is_some();
            guaranteed &= limit.is_some() && (request.is_none() || request == limit);
        }
    }
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

pub(crate) fn service_create(object: &mut Value) {
    set(object, "status", json!({"loadBalancer": {}}));
}

fn needs_cluster_ip(service: &Value) -> bool {
    matches!(text(service, "/spec/type"), "ClusterIP" | "NodePort" | "LoadBalancer")
}

fn needs_node_port(service: &Value) -> bool {
    match text(service, "/spec/type") {
        "NodePort" => true,
        "LoadBalancer" => boolean(service, "/spec/allocateLoadBalancerNodePorts") != Some(false),
        _ => false,
    }
}

/// Allocated addresses and ports stay when an update leaves them out, and go when the type no longer has them.
pub(crate) fn service_update(new: &mut Value, old: &Value) {
    keep(new, old, "status");
    let (had_ip, has_ip) = (needs_cluster_ip(old), needs_cluster_ip(new));
    let same_type = text(new, "/spec/type") == text(old, "/spec/type");
    let ports_needed = needs_node_port(old) && needs_node_port(new);
    let type_lost_ports = needs_node_port(old) && !needs_node_port(new);
    let Some(spec) = child(new, "spec") else { return };
    let old_spec = &old["spec"];
    if had_ip && has_ip {
        if text(spec, "/clusterIP").is_empty() {
            keep(spec, old_spec, "clusterIP");
        }
        let same_ip = text(spec, "/clusterIP") == text(old_spec, "/clusterIP");
        if same_ip {
            for field in ["clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
                if spec.get(field).is_none_or(|value| value.as_array().is_some_and(Vec::is_empty)) {
                    keep(spec, old_spec, field);
                }
            }
        }
    } else if had_ip && !has_ip {
        for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
            if spec.get(field) == old_spec.get(field) {
                remove(spec, field);
            }
        }
    }
    if ports_needed {
        keep_node_ports(spec, old_spec);
        if same_type && spec.get("healthCheckNodePort").is_none() {
            keep(spec, old_spec, "healthCheckNodePort");
        }
    } else if type_lost_ports {
        drop_old_node_ports(spec, old_spec);
    }
    if !same_type {
        drop_fields_of_old_type(spec, old_spec);
    }
}

fn keep_node_ports(spec: &mut Value, old_spec: &Value) {
    let mut used: Vec<i64> = list(spec, "/ports").iter().filter_map(|port| integer(port, "/nodePort")).collect();
    let identity = |port: &Value| (text(port, "/protocol").to_owned(), integer(port, "/port"));
    for port in crate::access::elements_mut(spec, "ports") {
        if integer(port, "/nodePort").unwrap_or(0) != 0 {
            continue;
        }
        let before = list(old_spec, "/ports").iter().find(|old| identity(old) == identity(port));
        if let Some(number) = before.and_then(|old| integer(old, "/nodePort"))
            && number != 0
            && !used.contains(&number)
        {
            used.push(number);
            set(port, "nodePort", number);
        }
    }
}

fn drop_old_node_ports(spec: &mut Value, old_spec: &Value) {
    let old: Vec<i64> = list(old_spec, "/ports").iter().filter_map(|port| integer(port, "/nodePort")).collect();
    for port in crate::access::elements_mut(spec, "ports") {
        if integer(port, "/nodePort").is_some_and(|number| old.contains(&number)) {
            remove(port, "nodePort");
        }
    }
}

fn drop_fields_of_old_type(spec: &mut Value, old_spec: &Value) {
    let kind = text(spec, "/type").to_owned();
    let mut gone: Vec<&str> = Vec::new();
    if kind != "LoadBalancer" {
        gone.extend(["allocateLoadBalancerNodePorts", "loadBalancerClass"]);
    }
    if !matches!(kind.as_str(), "NodePort" | "LoadBalancer") {
        gone.extend(["externalTrafficPolicy", "healthCheckNodePort"]);
    }
    if kind == "ExternalName" {
        gone.push("internalTrafficPolicy");
    } else {
        gone.push("externalName");
    }
    for field in gone {
        if spec.get(field) == old_spec.get(field) {
            remove(spec, field);
        }
    }
}

/// Kinds without a status whose generation counts every change beside metadata.
pub(crate) fn generation_create(object: &mut Value) {
    set_generation(object, 1);
}

pub(crate) fn generation_update(new: &mut Value, old: &Value) {
    let changed = ["addressType", "endpoints", "ports", "value", "globalDefault", "description", "preemptionPolicy"]
        .iter()
        .any(|field| !crate::access::equal(new.get(*field), old.get(*field)));
    bump_generation(new, old, changed);
}

/// Volumes and claims wait for each other from the start.
pub(crate) fn pending_create(object: &mut Value) {
    set(object, "status", json!({"phase": "Pending"}));
}

/// A request for a certificate is never changed; what becomes of it is in its status.
pub(crate) fn certificate_create(object: &mut Value) {
    set(object, "status", json!({}));
}

pub(crate) fn certificate_update(new: &mut Value, old: &Value) {
    keep(new, old, "spec");
    keep(new, old, "status");
}

pub(crate) fn certificate_status(new: &mut Value, old: &Value) {
    keep(new, old, "spec");
}

/// Who attaches reports by the status alone.
pub(crate) fn attachment_create(object: &mut Value) {
    set(object, "status", json!({"attached": false}));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_moves_with_the_spec_only() {
        let old = json!({"metadata": {"generation": 3}, "spec": {"replicas": 1}, "status": {"replicas": 1}});
        let mut new = json!({"metadata": {"generation": 3}, "spec": {"replicas": 1}, "status": {"replicas": 9}});
        workload_update(&mut new, &old);
        assert_eq!(new, old);
        new["spec"]["replicas"] = json!(2);
        workload_update(&mut new, &old);
        assert_eq!(new["metadata"]["generation"], 4);
    }

    #[test]
    fn a_status_update_leaves_spec_and_labels() {
        let old = json!({"metadata": {"labels": {"a": "b"}}, "spec": {"replicas": 1}});
        let mut new = json!({"metadata": {"labels": {"c": "d"}}, "spec": {"replicas": 7}, "status": {"replicas": 1}});
        workload_status(&mut new, &old);
        assert_eq!(
            new,
            json!({"metadata": {"labels": {"a": "b"}}, "spec": {"replicas": 1}, "status": {"replicas": 1}})
        );
    }

    #[test]
    fn quality_of_service_follows_requests_and_limits() {
        let pod = |resources: Value| json!({"spec": {"containers": [{"resources": resources}]}});
        assert_eq!(qos_class(&pod(json!({}))), "BestEffort");
        assert_eq!(qos_class(&pod(json!({"requests": {"cpu": "1"}}))), "Burstable");
        let full = json!({"cpu": "1", "memory": "1Gi"});
        assert_eq!(qos_class(&pod(json!({"requests": full, "limits": full}))), "Guaranteed");
        assert_eq!(qos_class(&pod(json!({"limits": {"cpu": "1"}}))), "Burstable");
    }

    #[test]
    fn a_service_keeps_its_address_and_ports_when_they_are_left_out() {
        let old = json!({"spec": {"type": "NodePort", "clusterIP": "10.43.0.9", "clusterIPs": ["10.43.0.9"],
            "ports": [{"port": 80, "protocol": "TCP", "nodePort": 30080}]}});
        let mut new = json!({"spec": {"type": "NodePort", "ports": [{"port": 80, "protocol": "TCP"}, {"port": 81, "protocol": "TCP"}]}});
        service_update(&mut new, &old);
        assert_eq!(new["spec"]["clusterIP"], "10.43.0.9");
        assert_eq!(new["spec"]["ports"][0]["nodePort"], 30080);
        assert!(new["spec"]["ports"][1].get("nodePort").is_none());
        new["spec"]["type"] = json!("ClusterIP");
        service_update(&mut new, &old);
        assert!(new["spec"]["ports"][0].get("nodePort").is_none());
        assert_eq!(new["spec"]["clusterIP"], "10.43.0.9");
    }
}
