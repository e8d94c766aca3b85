//! Defaults of Deployments and ReplicaSets.

use super::pod_spec;
use crate::access::{child, set_default, set_default_text};
use serde_json::{Value, json};

pub(crate) fn deployment(object: &mut Value) {
    let Some(spec) = child(object, "spec") else { return };
    set_default(spec, "replicas", 1);
    set_default(spec, "revisionHistoryLimit", 10);
    set_default(spec, "progressDeadlineSeconds", 600);
    if let Some(strategy) = child(spec, "strategy") {
        set_default_text(strategy, "type", "RollingUpdate");
        if strategy["type"] == "RollingUpdate"
            && let Some(rolling) = child(strategy, "rollingUpdate")
        {
            set_default(rolling, "maxUnavailable", "25%");
            set_default(rolling, "maxSurge", "25%");
        }
    }
    template(spec);
}

pub(crate) fn replica_set(object: &mut Value) {
    let Some(spec) = child(object, "spec") else { return };
    set_default(spec, "replicas", 1);
    template(spec);
}

fn template(spec: &mut Value) {
    let Some(template) = spec.get_mut("template") else { return };
    set_default(template, "metadata", json!({}));
    if let Some(spec) = child(template, "spec") {
        pod_spec(spec);
    }
}
