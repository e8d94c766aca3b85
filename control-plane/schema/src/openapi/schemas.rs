//! Schemas of the catalogue's types, in the form of either OpenAPI version.

use crate::catalogue::{Leaf, ListType, Property, Shape, TypeId, catalogue};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    V2,
    V3,
}

impl Style {
    pub(super) fn reference(self, name: &str) -> String {
        match self {
            Self::V2 => format!("#/definitions/{name}"),
            Self::V3 => format!("#/components/schemas/{name}"),
        }
    }
}

/// Types that the catalogue knows by shape only.
const SPECIAL: &[(Leaf, &str)] = &[
    (Leaf::Quantity, "io.k8s.apimachinery.pkg.api.resource.Quantity"),
    (Leaf::IntOrString, "io.k8s.apimachinery.pkg.util.intstr.IntOrString"),
    (Leaf::Time, "io.k8s.apimachinery.pkg.apis.meta.v1.Time"),
    (Leaf::MicroTime, "io.k8s.apimachinery.pkg.apis.meta.v1.MicroTime"),
    (Leaf::Raw, "io.k8s.apimachinery.pkg.runtime.RawExtension"),
    (Leaf::Fields, "io.k8s.apimachinery.pkg.apis.meta.v1.FieldsV1"),
];

/// The given types and all that they refer to.
pub(super) fn closure(roots: Vec<TypeId>) -> BTreeSet<TypeId> {
    let mut seen = BTreeSet::new();
    let mut open = roots;
    while let Some(id) = open.pop() {
        if !seen.insert(id) {
            continue;
        }
        for property in catalogue().properties(id).iter().filter(|property| !property.is_inline_message()) {
            if let Leaf::Object(inner) = property.shape.leaf() {
                open.push(inner);
            }
        }
    }
    seen
}

pub(super) fn render(types: &BTreeSet<TypeId>, style: Style) -> Map<String, Value> {
    let mut schemas: Vec<(String, Value)> =
        types.iter().map(|id| (catalogue().full_name(*id), object(*id, style))).collect();
    schemas.extend(SPECIAL.iter().map(|(leaf, name)| ((*name).to_owned(), special(*leaf, style))));
    schemas.sort_by(|left, right| left.0.cmp(&right.0));
    schemas.into_iter().collect()
}

fn special(leaf: Leaf, style: Style) -> Value {
    match (leaf, style) {
        (Leaf::Quantity, Style::V2) => json!({"type": "string"}),
        (Leaf::Quantity, Style::V3) => json!({"oneOf": [{"type": "string"}, {"type": "number"}]}),
        (Leaf::IntOrString, Style::V2) => json!({"type": "string", "format": "int-or-string"}),
        (Leaf::IntOrString, Style::V3) => {
            json!({"format": "int-or-string", "oneOf": [{"type": "integer"}, {"type": "string"}]})
        }
        (Leaf::Time | Leaf::MicroTime, _) => json!({"type": "string", "format": "date-time"}),
        _ => json!({"type": "object"}),
    }
}

fn object(id: TypeId, style: Style) -> Value {
    let info = catalogue().info(id);
    let mut properties = Map::new();
    let mut required = Vec::new();
    for found in catalogue().properties(id).iter().filter(|property| !property.is_inline_message()) {
        properties.insert(found.name.to_owned(), property(found, style));
        if found.required {
            required.push(Value::from(found.name));
        }
    }
    let mut schema = Map::new();
    schema.insert("type".to_owned(), json!("object"));
    if let Some(description) = description(info.name) {
        schema.insert("description".to_owned(), json!(description));
    }
    if !required.is_empty() {
        schema.insert("required".to_owned(), Value::Array(required));
    }
    if !properties.is_empty() {
        schema.insert("properties".to_owned(), Value::Object(properties));
    }
    if let Some(gvk) = info.gvk {
        let mut parts = gvk.rsplitn(3, '/');
        let (kind, version, group) = (parts.next(), parts.next(), parts.next());
        let gvk = json!([{"group": group.unwrap_or_default(), "kind": kind, "version": version}]);
        schema.insert("x-kubernetes-group-version-kind".to_owned(), gvk);
    }
    if info.atomic {
        schema.insert("x-kubernetes-map-type".to_owned(), json!("atomic"));
    }
    Value::Object(schema)
}

fn property(property: &Property, style: Style) -> Value {
    let mut schema = match property.shape {
        Shape::One(leaf) => leaf_schema(leaf, style),
        Shape::List(leaf) => Map::from_iter([
            ("type".to_owned(), json!("array")),
            ("items".to_owned(), Value::Object(leaf_schema(leaf, style))),
        ]),
        Shape::Map(leaf) => Map::from_iter([
            ("type".to_owned(), json!("object")),
            ("additionalProperties".to_owned(), Value::Object(leaf_schema(leaf, style))),
        ]),
    };
    if let Some(default) = property.default.and_then(|text| serde_json::from_str::<Value>(text).ok()) {
        schema.insert("default".to_owned(), default);
    }
    let mut extend = |name: &str, value: Value| schema.insert(format!("x-kubernetes-{name}"), value);
    match property.list_type {
        ListType::Set => drop(extend("list-type", json!("set"))),
        ListType::Map(_) => {
            extend("list-type", json!("map"));
            extend("list-map-keys", property.list_keys().collect());
        }
        ListType::Atomic if matches!(property.shape, Shape::List(_)) => drop(extend("list-type", json!("atomic"))),
        ListType::Atomic => {}
    }
    if property.atomic_map {
        extend("map-type", json!("atomic"));
    }
    let strategies: Vec<&str> = [
        (property.patch_merge, "merge"),
        (property.patch_replace, "replace"),
        (property.patch_retain_keys, "retainKeys"),
    ]
    .into_iter()
    .filter_map(|(set, name)| set.then_some(name))
    .collect();
    if !strategies.is_empty() {
        extend("patch-strategy", json!(strategies.join(",")));
    }
    if let Some(key) = property.merge_key {
        extend("patch-merge-key", json!(key));
    }
    Value::Object(schema)
}

fn leaf_schema(leaf: Leaf, style: Style) -> Map<String, Value> {
    let plain = |kind: &str, format: Option<&str>| {
        let mut schema = Map::from_iter([("type".to_owned(), json!(kind))]);
        if let Some(format) = format {
            schema.insert("format".to_owned(), json!(format));
        }
        schema
    };
    let reference = |name: &str| {
        let link = json!({"$ref": style.reference(name)});
        match (style, link) {
            (Style::V2, Value::Object(link)) => link,
            (_, link) => Map::from_iter([("allOf".to_owned(), json!([link]))]),
        }
    };
    match leaf {
        Leaf::String => plain("string", None),
        Leaf::Duration => plain("string", None),
        Leaf::Bool => plain("boolean", None),
        Leaf::Int32 => plain("integer", Some("int32")),
        Leaf::Int64 => plain("integer", Some("int64")),
        Leaf::Double => plain("number", Some("double")),
        Leaf::Bytes => plain("string", Some("byte")),
        Leaf::WrappedStrings => {
            Map::from_iter([("type".to_owned(), json!("array")), ("items".to_owned(), json!({"type": "string"}))])
        }
        Leaf::SchemaOrArray | Leaf::SchemaOrBool | Leaf::SchemaOrStrings => Map::new(),
        Leaf::Object(id) => reference(&catalogue().full_name(id)),
        _ => SPECIAL
            .iter()
            .find(|(special, _)| *special == leaf)
            .map_or_else(|| plain("object", None), |(_, name)| reference(name)),
    }
}

/// What `kubectl explain` says of the kinds and parts that users write most.
fn description(name: &str) -> Option<&'static str> {
    Some(match name {
        "core.v1.Pod" => "A group of containers that run together on one node.",
        "core.v1.PodSpec" => "What a pod is to run, and how.",
        "core.v1.PodStatus" => "What became of a pod, as its node last reported it.",
        "core.v1.Container" => "One program of a pod: its image, command, environment, resources and probes.",
        "core.v1.Probe" => "A check of a container's health, by command, HTTP, TCP or gRPC.",
        "core.v1.Service" => "A stable address for a changing set of pods.",
        "core.v1.Node" => "A machine that runs pods.",
        "core.v1.Namespace" => "A scope for names.",
        "core.v1.ConfigMap" => "Configuration as key and value, for environment variables and files.",
        "core.v1.Secret" => "Confidential data as key and value; values are base64 in JSON.",
        "core.v1.ServiceAccount" => "An identity for the programs in a pod.",
        "core.v1.Event" => "A report of something that happened to an object.",
        "core.v1.Endpoints" => "The addresses behind a service, in the older form.",
        "core.v1.Volume" => "A directory that containers of a pod can mount.",
        "discovery.v1.EndpointSlice" => "Some of the addresses behind a service.",
        "networking.v1.NetworkPolicy" => "Which traffic pods may receive and send.",
        "coordination.v1.Lease" => "A time-limited claim, as nodes and leaders hold it.",
        "apps.v1.Deployment" => "Keeps a number of equal pods and rolls their template over.",
        "apps.v1.DeploymentSpec" => "How many pods a deployment keeps, from which template, and how it replaces them.",
        "apps.v1.ReplicaSet" => "Keeps a number of equal pods.",
        "policy.v1.PodDisruptionBudget" => "How many pods of a set may be evicted at once.",
        "rbac.v1.Role" => "Permissions in one namespace.",
        "rbac.v1.ClusterRole" => "Permissions in all namespaces and on cluster objects.",
        "rbac.v1.RoleBinding" => "Gives a role to users, groups or service accounts in one namespace.",
        "rbac.v1.ClusterRoleBinding" => "Gives a cluster role to users, groups or service accounts everywhere.",
        "scheduling.v1.PriorityClass" => "A name for a pod priority.",
        "node.v1.RuntimeClass" => "A name for a way to run containers.",
        "meta.v1.ObjectMeta" => "Name, labels and the other data that every object has.",
        _ => return None,
    })
}
