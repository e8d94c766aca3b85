//! PersistentVolumes, PersistentVolumeClaims, StorageClasses, CSIDrivers, CSINodes, CSIStorageCapacities and VolumeAttachments.

use super::metadata::{label_selector, object_meta, object_meta_update};
use super::{Errors, field, is_set, names, part};
use crate::FieldError;
use crate::access::{entries, equal, list};
use oarlock_schema::quantity::Quantity;
use serde_json::Value;

const MODES: &[&str] = &["ReadOnlyMany", "ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"];
const SOURCES: &[&str] = &[
    "awsElasticBlockStore",
    "azureDisk",
    "azureFile",
    "cephfs",
    "cinder",
    "csi",
    "fc",
    "flexVolume",
    "flocker",
    "gcePersistentDisk",
    "glusterfs",
    "hostPath",
    "iscsi",
    "local",
    "nfs",
    "photonPersistentDisk",
    "portworxVolume",
    "quobyte",
    "rbd",
    "scaleIO",
    "storageos",
    "vsphereVolume",
];

fn access_modes(errors: &mut Errors, spec: &Value) {
    let modes = list(spec, "/accessModes");
    if modes.is_empty() {
        errors.required("spec.accessModes");
    }
    for mode in modes.iter().filter_map(Value::as_str).filter(|mode| !MODES.contains(mode)) {
        errors.not_supported("spec.accessModes", mode, MODES);
    }
    let alone = modes.iter().any(|mode| mode == "ReadWriteOncePod") && modes.len() > 1;
    if alone {
        errors.forbidden("spec.accessModes", "may not use ReadWriteOncePod with other access modes");
    }
}

fn storage(errors: &mut Errors, path: &str, amounts: &Value) {
    match amounts.get("storage") {
        None => errors.required(format!("{path}[storage]")),
        Some(amount) => {
            if Quantity::from_json(amount).is_ok_and(|amount| amount.sign() <= 0) {
                errors.invalid(format!("{path}[storage]"), amount.clone(), "must be greater than zero");
            }
        }
    }
}

fn volume_parts(errors: &mut Errors, object: &Value) {
    let spec = part(object, "spec");
    access_modes(errors, spec);
    if entries(spec, "/capacity").next().is_none() {
        errors.required("spec.capacity");
    } else {
        storage(errors, "spec.capacity", part(spec, "capacity"));
    }
    let sources: Vec<&&str> = SOURCES.iter().filter(|source| is_set(spec, source)).collect();
    match sources.as_slice() {
        [] => errors.required_as("spec", "must specify a volume type"),
        [_] => {}
        [_, more @ ..] => {
            for source in more {
                errors.forbidden(format!("spec.{source}"), "may not specify more than 1 volume type");
            }
        }
    }
    let csi = part(spec, "csi");
    if is_set(spec, "csi") {
        for name in ["driver", "volumeHandle"].into_iter().filter(|name| field(csi, name).is_empty()) {
            errors.required(format!("spec.csi.{name}"));
        }
    }
    if is_set(spec, "local") {
        if field(part(spec, "local"), "path").is_empty() {
            errors.required("spec.local.path");
        }
        if !is_set(spec, "nodeAffinity") {
            errors.required_as("spec.nodeAffinity", "Local volume requires node affinity");
        }
    }
    let policy = field(spec, "persistentVolumeReclaimPolicy");
    let policies = ["Delete", "Recycle", "Retain"];
    if !policy.is_empty() && !policies.contains(&policy) {
        errors.not_supported("spec.persistentVolumeReclaimPolicy", policy, &policies);
    }
}

pub(crate) fn persistent_volume(object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta(&mut errors, object, false, names::dns_subdomain);
    volume_parts(&mut errors, object);
    errors.0
}

pub(crate) fn persistent_volume_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    volume_parts(&mut errors, new);
    let (spec, before) = (part(new, "spec"), part(old, "spec"));
    if SOURCES.iter().any(|source| !equal(spec.get(*source), before.get(*source))) {
        errors.forbidden("spec.persistentvolumesource", "spec.persistentvolumesource is immutable after creation");
    }
    errors.immutable("spec.volumeMode", spec.get("volumeMode"), before.get("volumeMode"));
    if is_set(before, "nodeAffinity") && !equal(spec.get("nodeAffinity"), before.get("nodeAffinity")) {
        errors.invalid("spec.nodeAffinity", part(spec, "nodeAffinity").clone(), super::IMMUTABLE);
    }
    errors.0
}

fn claim_parts(errors: &mut Errors, object: &Value) {
    let spec = part(object, "spec");
    access_modes(errors, spec);
    storage(errors, "spec.resources", part(part(spec, "resources"), "requests"));
    let mode = field(spec, "volumeMode");
    if !mode.is_empty() && !["Block", "Filesystem"].contains(&mode) {
        errors.not_supported("spec.volumeMode", mode, &["Block", "Filesystem"]);
    }
    let class = field(spec, "storageClassName");
    if !class.is_empty() {
        errors.each("spec.storageClassName", class, names::dns_subdomain(class));
    }
}

pub(crate) fn persistent_volume_claim(object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta(&mut errors, object, true, names::dns_subdomain);
    claim_parts(&mut errors, object);
    errors.0
}

/// A claim may be given a volume once, and grow; nothing else of it changes.
pub(crate) fn persistent_volume_claim_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    claim_parts(&mut errors, new);
    let bound = crate::access::text(old, "/status/phase") == "Bound";
    let fixed = |object: &Value| {
        let mut spec = part(object, "spec").clone();
        if let Some(spec) = spec.as_object_mut() {
            if field(part(old, "spec"), "volumeName").is_empty() {
                spec.remove("volumeName");
            }
            spec.remove("volumeAttributesClassName");
            if bound && let Some(requests) = spec.get_mut("resources").and_then(|r| r.get_mut("requests")) {
                requests.as_object_mut().map(|requests| requests.remove("storage"));
            }
        }
        spec
    };
    if !equal(Some(&fixed(new)), Some(&fixed(old))) {
        let detail =
            "spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims";
        errors.forbidden("spec", detail);
    }
    let request = |object: &Value| {
        let amount = object.pointer("/spec/resources/requests/storage")?;
        Quantity::from_json(amount).ok().map(|amount| amount.value())
    };
    let had = old
        .pointer("/status/capacity/storage")
        .and_then(|amount| Quantity::from_json(amount).ok())
        .map_or(0, |amount| amount.value());
    if let (Some(now), Some(before)) = (request(new), request(old))
        && now < before
        && now <= had
    {
        errors.forbidden("spec.resources.requests.storage", "field can not be less than status.capacity");
    }
    errors.0
}

fn class_parts(errors: &mut Errors, object: &Value) {
    if field(object, "provisioner").is_empty() {
        errors.required("provisioner");
    }
    let modes = ["Immediate", "WaitForFirstConsumer"];
    errors.one_of("volumeBindingMode".to_owned(), field(object, "volumeBindingMode"), &modes);
    errors.one_of("reclaimPolicy".to_owned(), field(object, "reclaimPolicy"), &["Delete", "Retain"]);
}

pub(crate) fn storage_class(object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta(&mut errors, object, false, names::dns_subdomain);
    class_parts(&mut errors, object);
    errors.0
}

pub(crate) fn storage_class_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    class_parts(&mut errors, new);
    for (name, detail) in [
        ("parameters", "updates to parameters are forbidden."),
        ("provisioner", "updates to provisioner are forbidden."),
        ("reclaimPolicy", "updates to reclaimPolicy are forbidden."),
    ] {
        if !equal(new.get(name), old.get(name)) {
            errors.forbidden(name, detail);
        }
    }
    errors.immutable("volumeBindingMode", new.get("volumeBindingMode"), old.get("volumeBindingMode"));
    errors.0
}

fn driver_parts(errors: &mut Errors, object: &Value) {
    let spec = part(object, "spec");
    let policies = ["File", "None", "ReadWriteOnceWithFSType"];
    errors.one_of("spec.fsGroupPolicy".to_owned(), field(spec, "fsGroupPolicy"), &policies);
    for mode in list(spec, "/volumeLifecycleModes").iter().filter_map(Value::as_str) {
        if !["Ephemeral", "Persistent"].contains(&mode) {
            errors.not_supported("spec.volumeLifecycleModes", mode, &["Ephemeral", "Persistent"]);
        }
    }
    let mut seen = Vec::new();
    for (place, request) in list(spec, "/tokenRequests").iter().enumerate() {
        let audience = field(request, "audience");
        if seen.contains(&audience) {
            errors.duplicate(format!("spec.tokenRequests[{place}].audience"), audience);
        }
        seen.push(audience);
        let seconds = request.get("expirationSeconds").and_then(Value::as_i64);
        if seconds.is_some_and(|seconds| seconds < 600) {
            let detail = "may not specify a duration less than 10 minutes";
            errors.invalid(format!("spec.tokenRequests[{place}].expirationSeconds"), seconds.unwrap_or(0), detail);
        }
    }
}

pub(crate) fn csi_driver(object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta(&mut errors, object, false, names::dns_subdomain);
    driver_parts(&mut errors, object);
    errors.0
}

pub(crate) fn csi_driver_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    driver_parts(&mut errors, new);
    let (spec, before) = (part(new, "spec"), part(old, "spec"));
    for name in ["attachRequired", "fsGroupPolicy", "volumeLifecycleModes"] {
        errors.immutable(&format!("spec.{name}"), spec.get(name), before.get(name));
    }
    errors.0
}

fn node_drivers(errors: &mut Errors, object: &Value) {
    let mut seen = Vec::new();
    for (place, driver) in list(object, "/spec/drivers").iter().enumerate() {
        let path = format!("spec.drivers[{place}]");
        let name = field(driver, "name");
        for required in ["name", "nodeID"].into_iter().filter(|name| field(driver, name).is_empty()) {
            errors.required(format!("{path}.{required}"));
        }
        if seen.contains(&name) {
            errors.duplicate(format!("{path}.name"), name);
        }
        seen.push(name);
    }
}

pub(crate) fn csi_node(object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta(&mut errors, object, false, names::dns_subdomain);
    node_drivers(&mut errors, object);
    errors.0
}

pub(crate) fn csi_node_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    node_drivers(&mut errors, new);
    errors.0
}

pub(crate) fn csi_storage_capacity(object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta(&mut errors, object, true, names::dns_subdomain);
    capacity_parts(&mut errors, object);
    errors.0
}

fn capacity_parts(errors: &mut Errors, object: &Value) {
    let class = field(object, "storageClassName");
    for detail in names::dns_subdomain(class) {
        errors.invalid("storageClassName", class, &detail);
    }
    label_selector(errors, part(object, "nodeTopology"), "nodeTopology");
    for name in ["capacity", "maximumVolumeSize"] {
        if let Some(amount) = object.get(name).filter(|amount| Quantity::from_json(amount).is_ok_and(|q| q.sign() < 0))
        {
            errors.invalid(name, amount.clone(), "must be greater than or equal to 0");
        }
    }
}

pub(crate) fn csi_storage_capacity_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    capacity_parts(&mut errors, new);
    for name in ["nodeTopology", "storageClassName"] {
        errors.immutable(name, new.get(name), old.get(name));
    }
    errors.0
}

pub(crate) fn volume_attachment(object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta(&mut errors, object, false, names::dns_subdomain);
    let spec = part(object, "spec");
    for name in ["attacher", "nodeName"].into_iter().filter(|name| field(spec, name).is_empty()) {
        errors.required(format!("spec.{name}"));
    }
    let source = part(spec, "source");
    if !is_set(source, "persistentVolumeName") && !is_set(source, "inlineVolumeSpec") {
        errors.required_as("spec.source", "must specify exactly one of inlineVolumeSpec and persistentVolumeName");
    }
    errors.0
}

pub(crate) fn volume_attachment_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    errors.immutable("spec", new.get("spec"), old.get("spec"));
    errors.0
}
