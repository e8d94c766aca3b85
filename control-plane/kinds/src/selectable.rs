//! Fields beside name and namespace that field selectors may name, with their values.

use crate::access::{boolean, text};
use serde_json::Value;

type Fields = Vec<(&'static str, String)>;

fn strings(object: &Value, fields: &[(&'static str, &str)]) -> Fields {
    fields.iter().map(|(field, pointer)| (*field, text(object, pointer).to_owned())).collect()
}

pub(crate) fn pod(object: &Value) -> Fields {
    let mut fields = strings(
        object,
        &[
            ("spec.nodeName", "/spec/nodeName"),
            ("spec.restartPolicy", "/spec/restartPolicy"),
            ("spec.schedulerName", "/spec/schedulerName"),
            ("spec.serviceAccountName", "/spec/serviceAccountName"),
            ("status.phase", "/status/phase"),
            ("status.podIP", "/status/podIP"),
            ("status.nominatedNodeName", "/status/nominatedNodeName"),
        ],
    );
    fields.push(("spec.hostNetwork", (boolean(object, "/spec/hostNetwork") == Some(true)).to_string()));
    fields
}

pub(crate) fn node(object: &Value) -> Fields {
    vec![("spec.unschedulable", (boolean(object, "/spec/unschedulable") == Some(true)).to_string())]
}

pub(crate) fn namespace(object: &Value) -> Fields {
    vec![("status.phase", text(object, "/status/phase").to_owned())]
}

pub(crate) fn secret(object: &Value) -> Fields {
    vec![("type", text(object, "/type").to_owned())]
}

pub(crate) fn service(object: &Value) -> Fields {
    strings(object, &[("spec.clusterIP", "/spec/clusterIP"), ("spec.type", "/spec/type")])
}

pub(crate) fn replica_set(object: &Value) -> Fields {
    let replicas = crate::access::integer(object, "/status/replicas").unwrap_or(0);
    vec![("status.replicas", replicas.to_string())]
}

const EVENT_FIELDS: &[(&str, &str)] = &[
    ("involvedObject.kind", "/involvedObject/kind"),
    ("involvedObject.namespace", "/involvedObject/namespace"),
    ("involvedObject.name", "/involvedObject/name"),
    ("involvedObject.uid", "/involvedObject/uid"),
    ("involvedObject.apiVersion", "/involvedObject/apiVersion"),
    ("involvedObject.resourceVersion", "/involvedObject/resourceVersion"),
    ("involvedObject.fieldPath", "/involvedObject/fieldPath"),
    ("reason", "/reason"),
    ("reportingComponent", "/reportingComponent"),
    ("type", "/type"),
];

pub(crate) fn event(object: &Value) -> Fields {
    let mut fields = strings(object, EVENT_FIELDS);
    let component = text(object, "/source/component");
    let source = if component.is_empty() { text(object, "/reportingComponent") } else { component };
    fields.push(("source", source.to_owned()));
    fields
}

const VIEW_FIELDS: &[(&str, &str)] = &[
    ("regarding.kind", "/regarding/kind"),
    ("regarding.namespace", "/regarding/namespace"),
    ("regarding.name", "/regarding/name"),
    ("regarding.uid", "/regarding/uid"),
    ("regarding.apiVersion", "/regarding/apiVersion"),
    ("regarding.resourceVersion", "/regarding/resourceVersion"),
    ("regarding.fieldPath", "/regarding/fieldPath"),
    ("reason", "/reason"),
    ("reportingController", "/reportingController"),
    ("type", "/type"),
];

pub(crate) fn events_event(object: &Value) -> Fields {
    strings(object, VIEW_FIELDS)
}

pub(crate) fn certificate_signing_request(object: &Value) -> Vec<(&'static str, String)> {
    vec![("spec.signerName", text(object, "/spec/signerName").to_owned())]
}
