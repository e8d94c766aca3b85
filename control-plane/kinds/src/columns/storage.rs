//! The columns of volumes, claims, their classes and drivers, and of certificate signing requests.

use super::{AGE, NAME, age, column, name, or, wide};
use crate::access::{boolean, list, text};
use crate::columns::time;
use crate::kind::Column;
use jiff::Timestamp;
use serde_json::Value;

/// `RWO,ROX`, as kubectl has always shown access modes.
fn modes(object: &Value, pointer: &str) -> String {
    let short = |mode: &Value| match mode.as_str().unwrap_or_default() {
        "ReadWriteOnce" => "RWO".to_owned(),
        "ReadOnlyMany" => "ROX".to_owned(),
        "ReadWriteMany" => "RWX".to_owned(),
        "ReadWriteOncePod" => "RWOP".to_owned(),
        other => other.to_owned(),
    };
    list(object, pointer).iter().map(short).collect::<Vec<_>>().join(",")
}

pub(crate) const PERSISTENT_VOLUME: &[Column] = &[
    NAME,
    column("Capacity", "string", "How large the volume is."),
    column("Access Modes", "string", "Ways in which the volume can be mounted."),
    column("Reclaim Policy", "string", "What happens to the volume when its claim goes."),
    column("Status", "string", "Available, Bound, Released or Failed."),
    column("Claim", "string", "The claim that has the volume."),
    column("StorageClass", "string", "The class of the volume."),
    column("VolumeAttributesClass", "string", "The class of the volume's attributes."),
    column("Reason", "string", "Why the volume is in its state."),
    AGE,
    wide("VolumeMode", "Filesystem or Block."),
];

pub(crate) fn persistent_volume(object: &Value, now: Timestamp) -> Vec<Value> {
    let claim = match (text(object, "/spec/claimRef/namespace"), text(object, "/spec/claimRef/name")) {
        ("", "") => String::new(),
        (namespace, name) => format!("{namespace}/{name}"),
    };
    let phase = text(object, "/status/phase");
    let deleted = object.pointer("/metadata/deletionTimestamp").is_some();
    vec![
        name(object),
        Value::from(text(object, "/spec/capacity/storage")),
        Value::from(modes(object, "/spec/accessModes")),
        Value::from(text(object, "/spec/persistentVolumeReclaimPolicy")),
        Value::from(if deleted { "Terminating" } else { phase }),
        Value::from(claim),
        Value::from(text(object, "/spec/storageClassName")),
        Value::from(or(text(object, "/spec/volumeAttributesClassName"), "<unset>")),
        Value::from(text(object, "/status/reason")),
        age(object, now),
        Value::from(or(text(object, "/spec/volumeMode"), "<unset>")),
    ]
}

pub(crate) const PERSISTENT_VOLUME_CLAIM: &[Column] = &[
    NAME,
    column("Status", "string", "Pending, Bound or Lost."),
    column("Volume", "string", "The volume that the claim has."),
    column("Capacity", "string", "How large the volume is."),
    column("Access Modes", "string", "Ways in which the volume can be mounted."),
    column("StorageClass", "string", "The class of volumes asked for."),
    column("VolumeAttributesClass", "string", "The class of the volume's attributes."),
    AGE,
    wide("VolumeMode", "Filesystem or Block."),
];

pub(crate) fn persistent_volume_claim(object: &Value, now: Timestamp) -> Vec<Value> {
    let deleted = object.pointer("/metadata/deletionTimestamp").is_some();
    let volume = text(object, "/spec/volumeName");
    let bound = !volume.is_empty();
    vec![
        name(object),
        Value::from(if deleted { "Terminating" } else { text(object, "/status/phase") }),
        Value::from(volume),
        Value::from(if bound { text(object, "/status/capacity/storage") } else { "" }),
        Value::from(if bound { modes(object, "/status/accessModes") } else { String::new() }),
        Value::from(text(object, "/spec/storageClassName")),
        Value::from(or(text(object, "/spec/volumeAttributesClassName"), "<unset>")),
        age(object, now),
        Value::from(or(text(object, "/spec/volumeMode"), "<unset>")),
    ]
}

pub(crate) const STORAGE_CLASS: &[Column] = &[
    NAME,
    column("Provisioner", "string", "Who makes volumes of the class."),
    column("ReclaimPolicy", "string", "What happens to volumes when their claims go."),
    column("VolumeBindingMode", "string", "When claims are given volumes."),
    column("AllowVolumeExpansion", "string", "Whether volumes can grow."),
    AGE,
];

pub(crate) fn storage_class(object: &Value, now: Timestamp) -> Vec<Value> {
    const DEFAULT: &str = "/metadata/annotations/storageclass.kubernetes.io~1is-default-class";
    let shown = match text(object, DEFAULT) {
        "true" => format!("{} (default)", text(object, "/metadata/name")),
        _ => text(object, "/metadata/name").to_owned(),
    };
    vec![
        Value::from(shown),
        Value::from(text(object, "/provisioner")),
        Value::from(or(text(object, "/reclaimPolicy"), "Delete")),
        Value::from(or(text(object, "/volumeBindingMode"), "Immediate")),
        Value::from(boolean(object, "/allowVolumeExpansion").unwrap_or(false).to_string()),
        age(object, now),
    ]
}

pub(crate) const CSI_DRIVER: &[Column] = &[
    NAME,
    column("AttachRequired", "boolean", "Whether volumes are attached before they are mounted."),
    column("PodInfoOnMount", "boolean", "Whether the driver is told of pods."),
    column("StorageCapacity", "boolean", "Whether the scheduler looks at capacities."),
    column("TokenRequests", "string", "Audiences of tokens that the driver is given."),
    column("RequiresRepublish", "boolean", "Whether the driver is asked again and again."),
    column("Modes", "string", "Kinds of volumes that the driver has."),
    AGE,
];

pub(crate) fn csi_driver(object: &Value, now: Timestamp) -> Vec<Value> {
    let flag = |field: &str| Value::from(boolean(object, &format!("/spec/{field}")).unwrap_or(false));
    let list_of = |pointer: &str, of: &dyn Fn(&Value) -> String| {
        let all: Vec<String> = list(object, pointer).iter().map(of).collect();
        Value::from(if all.is_empty() { "<unset>".to_owned() } else { all.join(",") })
    };
    vec![
        name(object),
        Value::from(boolean(object, "/spec/attachRequired").unwrap_or(true)),
        flag("podInfoOnMount"),
        flag("storageCapacity"),
        list_of("/spec/tokenRequests", &|request| text(request, "/audience").to_owned()),
        flag("requiresRepublish"),
        list_of("/spec/volumeLifecycleModes", &|mode| mode.as_str().unwrap_or_default().to_owned()),
        age(object, now),
    ]
}

pub(crate) const CSI_NODE: &[Column] = &[NAME, column("Drivers", "integer", "How many drivers the node has."), AGE];

pub(crate) fn csi_node(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![name(object), Value::from(list(object, "/spec/drivers").len()), age(object, now)]
}

pub(crate) const CSI_STORAGE_CAPACITY: &[Column] = &[
    NAME,
    column("StorageClassName", "string", "The class whose volumes are meant."),
    column("Capacity", "string", "How much there is room for."),
];

pub(crate) fn csi_storage_capacity(object: &Value, _now: Timestamp) -> Vec<Value> {
    vec![
        name(object),
        Value::from(text(object, "/storageClassName")),
        Value::from(or(text(object, "/capacity"), "<unset>")),
    ]
}

pub(crate) const VOLUME_ATTACHMENT: &[Column] = &[
    NAME,
    column("Attacher", "string", "Who attaches."),
    column("PV", "string", "The volume."),
    column("Node", "string", "The node."),
    column("Attached", "boolean", "Whether it is attached."),
    AGE,
];

pub(crate) fn volume_attachment(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![
        name(object),
        Value::from(text(object, "/spec/attacher")),
        Value::from(text(object, "/spec/source/persistentVolumeName")),
        Value::from(text(object, "/spec/nodeName")),
        Value::from(boolean(object, "/status/attached").unwrap_or(false)),
        age(object, now),
    ]
}

pub(crate) const CERTIFICATE_SIGNING_REQUEST: &[Column] = &[
    NAME,
    AGE,
    column("SignerName", "string", "Who is to sign."),
    column("Requestor", "string", "Who asks."),
    column("RequestedDuration", "string", "How long the certificate is to be good for."),
    column("Condition", "string", "What has become of the request."),
];

pub(crate) fn certificate_signing_request(object: &Value, now: Timestamp) -> Vec<Value> {
    let duration = object.pointer("/spec/expirationSeconds").and_then(Value::as_i64);
    let mut shown = String::new();
    let (mut approved, mut denied, mut failed) = (false, false, false);
    for condition in list(object, "/status/conditions") {
        match text(condition, "/type") {
            "Approved" => approved = true,
            "Denied" => denied = true,
            "Failed" => failed = true,
            _ => {}
        }
    }
    shown.push_str(match (denied, approved) {
        (true, _) => "Denied",
        (false, true) => "Approved",
        _ => "Pending",
    });
    if failed {
        shown.push_str(",Failed");
    }
    if !text(object, "/status/certificate").is_empty() {
        shown.push_str(",Issued");
    }
    vec![
        name(object),
        age(object, now),
        Value::from(text(object, "/spec/signerName")),
        Value::from(text(object, "/spec/username")),
        Value::from(duration.map_or("<none>".to_owned(), |seconds| time::human_duration(seconds * 1000))),
        Value::from(shown),
    ]
}
