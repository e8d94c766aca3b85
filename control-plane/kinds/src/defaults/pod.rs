//! Defaults of pods and pod templates.

use super::container;
use crate::access::{child, elements_mut, remove, set, set_default, set_default_text, text};
use serde_json::{Value, json};

/// A Pod: its spec, and requests from limits, which templates do not get.
pub(crate) fn pod(object: &mut Value) {
    if let Some(spec) = child(object, "spec") {
        pod_spec(spec);
        set_default(spec, "enableServiceLinks", true);
        for list in ["initContainers", "containers"] {
            for container in elements_mut(spec, list) {
                container::requests_from_limits(container);
            }
        }
        host_ports(spec);
    }
    if let Some(status) = object.get_mut("status") {
        pod_addresses(status, "podIP", "podIPs");
        pod_addresses(status, "hostIP", "hostIPs");
    }
}

/// On the host's network every container port is a host port. Templates are left as they are.
fn host_ports(spec: &mut Value) {
    if spec.get("hostNetwork").and_then(Value::as_bool) != Some(true) {
        return;
    }
    for list in ["initContainers", "containers"] {
        for container in elements_mut(spec, list) {
            for port in elements_mut(container, "ports") {
                let number = port.get("containerPort").cloned().unwrap_or_default();
                set_default(port, "hostPort", number);
            }
        }
    }
}

/// The singular address is the first of the plural, whichever of the two was given.
fn pod_addresses(status: &mut Value, single: &str, plural: &str) {
    let first = text(status, &format!("/{plural}/0/ip")).to_owned();
    let given = status.get(single).and_then(Value::as_str).unwrap_or_default().to_owned();
    if first.is_empty() && !given.is_empty() {
        set(status, plural, json!([{"ip": given}]));
    } else if given.is_empty() && !first.is_empty() {
        set(status, single, first);
    }
}

/// What pods and templates share.
pub(crate) fn pod_spec(spec: &mut Value) {
    if !spec.is_object() {
        return;
    }
    set_default_text(spec, "restartPolicy", "Always");
    set_default_text(spec, "dnsPolicy", "ClusterFirst");
    set_default_text(spec, "schedulerName", "default-scheduler");
    set_default(spec, "terminationGracePeriodSeconds", 30);
    set_default(spec, "securityContext", json!({}));
    service_account(spec);
    for list in ["initContainers", "containers", "ephemeralContainers"] {
        for item in elements_mut(spec, list) {
            container::container(item);
        }
    }
    for item in elements_mut(spec, "volumes") {
        volume(item);
    }
}

/// `serviceAccount` is the old name of `serviceAccountName`; both are written.
fn service_account(spec: &mut Value) {
    let name = [text(spec, "/serviceAccountName"), text(spec, "/serviceAccount")]
        .into_iter()
        .find(|name| !name.is_empty())
        .map(str::to_owned);
    match name {
        Some(name) => {
            set(spec, "serviceAccountName", name.clone());
            set(spec, "serviceAccount", name);
        }
        None => {
            remove(spec, "serviceAccount");
        }
    }
}

const DEFAULT_MODE: i64 = 0o644;

fn volume(volume: &mut Value) {
    let Value::Object(map) = volume else { return };
    if map.keys().all(|key| key == "name") {
        map.insert("emptyDir".to_owned(), json!({}));
    }
    for source in ["secret", "configMap", "downwardAPI", "projected"] {
        if let Some(source) = map.get_mut(source) {
            set_default(source, "defaultMode", DEFAULT_MODE);
        }
    }
    if let Some(source) = map.get_mut("hostPath") {
        set_default(source, "type", "");
    }
    if let Some(source) = map.get_mut("downwardAPI") {
        downward_items(source);
    }
    if let Some(source) = map.get_mut("projected") {
        for projection in elements_mut(source, "sources") {
            if let Some(token) = projection.get_mut("serviceAccountToken") {
                set_default(token, "expirationSeconds", 3600);
            }
            if let Some(downward) = projection.get_mut("downwardAPI") {
                downward_items(downward);
            }
        }
    }
    if let Some(source) = map.get_mut("iscsi") {
        set_default_text(source, "iscsiInterface", "default");
    }
    if let Some(image) = map.get_mut("image") {
        let policy = container::pull_policy(text(image, "/reference"));
        set_default_text(image, "pullPolicy", policy);
    }
    if let Some(spec) = map.get_mut("ephemeral").and_then(|source| source.pointer_mut("/volumeClaimTemplate/spec")) {
        set_default(spec, "volumeMode", "Filesystem");
    }
}

fn downward_items(source: &mut Value) {
    for item in elements_mut(source, "items") {
        container::field_source(item);
    }
}
