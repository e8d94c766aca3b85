//! Defaults of volumes, claims, their classes and drivers.

use crate::access::{child, set_default, set_default_text};
use serde_json::{Value, json};

pub(crate) fn persistent_volume(object: &mut Value) {
    if let Some(spec) = child(object, "spec") {
        set_default_text(spec, "persistentVolumeReclaimPolicy", "Retain");
        set_default_text(spec, "volumeMode", "Filesystem");
        if let Some(host) = spec.get_mut("hostPath").filter(|host| host.is_object()) {
            set_default(host, "type", "");
        }
    }
}

pub(crate) fn persistent_volume_claim(object: &mut Value) {
    if let Some(spec) = child(object, "spec") {
        set_default_text(spec, "volumeMode", "Filesystem");
    }
}

pub(crate) fn storage_class(object: &mut Value) {
    set_default_text(object, "reclaimPolicy", "Delete");
    set_default_text(object, "volumeBindingMode", "Immediate");
}

pub(crate) fn csi_driver(object: &mut Value) {
    if let Some(spec) = child(object, "spec") {
        set_default(spec, "attachRequired", true);
        set_default_text(spec, "fsGroupPolicy", "ReadWriteOnceWithFSType");
        for name in ["podInfoOnMount", "requiresRepublish", "seLinuxMount", "storageCapacity"] {
            set_default(spec, name, false);
        }
        set_default(spec, "volumeLifecycleModes", json!(["Persistent"]));
    }
}
