//! What the server serves, told to clients: versions, groups and resources, legacy and aggregated, and OpenAPI.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use oarlock_kinds::Kind;
use oarlock_schema::openapi::{self, ServedResource, ServedSubresource};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::Config;
use crate::negotiate;
use crate::wire::{self, Answer};

/// What `kubectl version` prints.
pub(crate) const GIT_VERSION: &str = concat!("v1.36.0+oarlock.", env!("CARGO_PKG_VERSION"));

struct Document {
    body: Bytes,
    etag: HeaderValue,
}

impl Document {
    fn new(value: &Value) -> Document {
        let body = Bytes::from(value.to_string());
        let digest = Sha256::digest(&body);
        let hex: String = digest.iter().map(|byte| format!("{byte:02X}")).collect();
        let etag = HeaderValue::from_str(&format!("\"{hex}\"")).unwrap_or(HeaderValue::from_static("\"\""));
        Document { body, etag }
    }

    fn answer(&self, headers: &HeaderMap, content_type: &'static str) -> Answer {
        let known = headers.get(header::IF_NONE_MATCH).is_some_and(|known| *known == self.etag);
        let mut response = match known {
            true => wire::answer(StatusCode::NOT_MODIFIED, content_type, Bytes::new()),
            false => wire::answer(StatusCode::OK, content_type, self.body.clone()),
        };
        response.headers_mut().insert(header::ETAG, self.etag.clone());
        response.headers_mut().insert(header::VARY, HeaderValue::from_static("Accept"));
        response
    }
}

/// Every discovery document, made at start.
pub(crate) struct Discovery {
    version: Value,
    api: Document,
    api_aggregated: BTreeMap<&'static str, Document>,
    apis: Document,
    apis_aggregated: BTreeMap<&'static str, Document>,
    groups: BTreeMap<&'static str, Document>,
    resources: BTreeMap<String, Document>,
}

impl Discovery {
    pub(crate) fn new(config: &Config) -> Discovery {
        let address = SocketAddr::new(config.advertise_address, config.listen.port()).to_string();
        let api = json!({
            "kind": "APIVersions", "versions": ["v1"],
            "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": address}],
        });
        let groups: Vec<Value> = named_groups().into_iter().map(group).collect();
        let apis = json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups});
        let group_documents = named_groups().into_iter().map(|name| {
            let mut document = group(name);
            document["kind"] = "APIGroup".into();
            document["apiVersion"] = "v1".into();
            (name, Document::new(&document))
        });
        let resources = versions().into_iter().map(|(group, version)| {
            let document = resource_list(group, version);
            (path_of(group, version), Document::new(&document))
        });
        let aggregated = |core: bool| {
            ["v2", "v2beta1"]
                .into_iter()
                .map(move |version| (version, Document::new(&aggregated(version, core))))
                .collect()
        };
        Discovery {
            version: version(),
            api: Document::new(&api),
            api_aggregated: aggregated(true),
            apis: Document::new(&apis),
            apis_aggregated: aggregated(false),
            groups: group_documents.collect(),
            resources: resources.collect(),
        }
    }

    /// Answers a discovery path; `None` when it is not one.
    pub(crate) fn answer(&self, path: &str, headers: &HeaderMap) -> Option<Answer> {
        let path = path.trim_end_matches('/');
        let wanted = negotiate::wants_aggregated_discovery(headers);
        match path {
            "/version" => Some(wire::json(StatusCode::OK, &self.version)),
            "/api" => Some(either(&self.api, &self.api_aggregated, wanted, headers)),
            "/apis" => Some(either(&self.apis, &self.apis_aggregated, wanted, headers)),
            "" => Some(wire::json(StatusCode::OK, &json!({"paths": self.paths()}))),
            _ => {
                if let Some(document) = self.resources.get(path) {
                    return Some(document.answer(headers, "application/json"));
                }
                let group = path.strip_prefix("/apis/")?;
                self.groups.get(group).map(|document| document.answer(headers, "application/json"))
            }
        }
    }

    fn paths(&self) -> Vec<String> {
        let mut paths: Vec<String> = [
            "/.well-known/openid-configuration",
            "/api",
            "/apis",
            "/healthz",
            "/livez",
            "/metrics",
            "/openapi/v2",
            "/openapi/v3",
            "/openid/v1/jwks",
            "/readyz",
            "/version",
        ]
        .map(str::to_owned)
        .into();
        paths.extend(self.resources.keys().cloned());
        paths.extend(self.groups.keys().map(|group| format!("/apis/{group}")));
        paths.sort_unstable();
        paths
    }
}

fn either(
    plain: &Document,
    aggregated: &BTreeMap<&'static str, Document>,
    wanted: Option<&str>,
    headers: &HeaderMap,
) -> Answer {
    match wanted.and_then(|version| aggregated.get(version).map(|document| (version, document))) {
        Some(("v2beta1", document)) => {
            document.answer(headers, "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList")
        }
        Some((_, document)) => {
            document.answer(headers, "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList")
        }
        None => plain.answer(headers, "application/json"),
    }
}

fn version() -> Value {
    json!({
        "major": "1", "minor": "36", "emulationMajor": "1", "emulationMinor": "36", "minCompatibilityMajor": "1",
        "minCompatibilityMinor": "35", "gitVersion": GIT_VERSION, "gitCommit": "", "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z", "goVersion": "none", "compiler": "rustc",
        "platform": format!("linux/{}", match std::env::consts::ARCH { "x86_64" => "amd64", "aarch64" => "arm64", other => other }),
    })
}

fn versions() -> Vec<(&'static str, &'static str)> {
    let mut found: Vec<(&str, &str)> = Vec::new();
    for kind in oarlock_kinds::all() {
        if !found.contains(&(kind.group, kind.version)) {
            found.push((kind.group, kind.version));
        }
    }
    found
}

fn named_groups() -> Vec<&'static str> {
    let mut found: Vec<&str> = Vec::new();
    for (group, _) in versions() {
        if !group.is_empty() && !found.contains(&group) {
            found.push(group);
        }
    }
    found
}

fn path_of(group: &str, version: &str) -> String {
    if group.is_empty() { format!("/api/{version}") } else { format!("/apis/{group}/{version}") }
}

fn group(name: &str) -> Value {
    let versions: Vec<Value> = versions()
        .into_iter()
        .filter(|(group, _)| *group == name)
        .map(|(group, version)| json!({"groupVersion": format!("{group}/{version}"), "version": version}))
        .collect();
    json!({"name": name, "versions": versions, "preferredVersion": versions.first()})
}

fn kinds_of(group: &str, version: &str) -> impl Iterator<Item = &'static Kind> {
    oarlock_kinds::all().iter().filter(move |kind| kind.group == group && kind.version == version)
}

fn storage_hash(kind: &Kind) -> String {
    use base64::Engine as _;
    let digest = Sha256::digest(format!("{}/{}/{}", kind.group, kind.version, kind.kind));
    base64::engine::general_purpose::STANDARD.encode(&digest[..8])
}

/// The `APIResourceList` of a group version.
fn resource_list(group: &str, version: &str) -> Value {
    let mut resources = Vec::new();
    for kind in kinds_of(group, version) {
        let mut entry = Map::new();
        entry.insert("name".into(), kind.plural.into());
        entry.insert("singularName".into(), kind.singular.into());
        entry.insert("namespaced".into(), kind.namespaced.into());
        entry.insert("kind".into(), kind.kind.into());
        entry.insert("verbs".into(), kind.verbs.to_vec().into());
        if !kind.short_names.is_empty() {
            entry.insert("shortNames".into(), kind.short_names.to_vec().into());
        }
        if !kind.categories.is_empty() {
            entry.insert("categories".into(), kind.categories.to_vec().into());
        }
        if kind.stored {
            entry.insert("storageVersionHash".into(), storage_hash(kind).into());
        }
        resources.push(Value::Object(entry));
        for name in kind.subresources {
            let Some(spoken) = kind.subresource_type(name) else { continue };
            let mut entry = Map::new();
            entry.insert("name".into(), format!("{}/{name}", kind.plural).into());
            entry.insert("singularName".into(), "".into());
            entry.insert("namespaced".into(), kind.namespaced.into());
            if (spoken.group, spoken.version) != (group, version) {
                entry.insert("group".into(), spoken.group.into());
                entry.insert("version".into(), spoken.version.into());
            }
            entry.insert("kind".into(), spoken.kind.into());
            entry.insert("verbs".into(), spoken.verbs.to_vec().into());
            resources.push(Value::Object(entry));
        }
    }
    let group_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": resources})
}

/// The `APIGroupDiscoveryList` of the core group or of all others.
fn aggregated(discovery_version: &str, core: bool) -> Value {
    let groups: Vec<&str> = if core { vec![""] } else { named_groups() };
    let items: Vec<Value> = groups
        .into_iter()
        .map(|group| {
            let versions: Vec<Value> = versions()
                .into_iter()
                .filter(|(of, _)| *of == group)
                .map(|(group, version)| {
                    let resources: Vec<Value> = kinds_of(group, version).map(aggregated_resource).collect();
                    json!({"version": version, "resources": resources, "freshness": "Current"})
                })
                .collect();
            let mut metadata = json!({"creationTimestamp": null});
            if !group.is_empty() {
                metadata["name"] = group.into();
            }
            json!({"metadata": metadata, "versions": versions})
        })
        .collect();
    json!({
        "kind": "APIGroupDiscoveryList", "apiVersion": format!("apidiscovery.k8s.io/{discovery_version}"),
        "metadata": {}, "items": items,
    })
}

fn aggregated_resource(kind: &Kind) -> Value {
    let response = |group: &str, version: &str, kind: &str| json!({"group": group, "version": version, "kind": kind});
    let subresources: Vec<Value> = kind
        .subresources
        .iter()
        .filter_map(|name| {
            let spoken = kind.subresource_type(name)?;
            Some(json!({
                "subresource": name, "responseKind": response(spoken.group, spoken.version, spoken.kind),
                "verbs": spoken.verbs,
            }))
        })
        .collect();
    let mut entry = json!({
        "resource": kind.plural, "responseKind": response(kind.group, kind.version, kind.kind),
        "scope": if kind.namespaced { "Namespaced" } else { "Cluster" },
        "singularResource": kind.singular, "verbs": kind.verbs,
    });
    if !kind.short_names.is_empty() {
        entry["shortNames"] = kind.short_names.to_vec().into();
    }
    if !kind.categories.is_empty() {
        entry["categories"] = kind.categories.to_vec().into();
    }
    if !subresources.is_empty() {
        entry["subresources"] = subresources.into();
    }
    entry
}

/// What the OpenAPI documents are made from.
fn served() -> Vec<ServedResource> {
    let owned = |list: &[&str]| list.iter().map(|one| (*one).to_owned()).collect::<Vec<_>>();
    oarlock_kinds::all()
        .iter()
        .map(|kind| ServedResource {
            group: kind.group.into(),
            version: kind.version.into(),
            kind: kind.kind.into(),
            plural: kind.plural.into(),
            namespaced: kind.namespaced,
            verbs: owned(kind.verbs),
            subresources: kind
                .subresources
                .iter()
                .filter_map(|name| {
                    let spoken = kind.subresource_type(name)?;
                    Some(ServedSubresource {
                        name: (*name).to_owned(),
                        group: spoken.group.into(),
                        version: spoken.version.into(),
                        kind: spoken.kind.into(),
                        verbs: owned(spoken.verbs),
                    })
                })
                .collect(),
        })
        .collect()
}

const OPENAPI_PROTOBUF: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";

/// Whether a client asks for OpenAPI v2 as protobuf, in the older or the newer name of that type.
fn prefers_protobuf(headers: &HeaderMap) -> bool {
    let offers = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    offers.flat_map(|line| line.split(',')).any(|offer| {
        let name = offer.split(';').next().unwrap_or_default().trim();
        name == OPENAPI_PROTOBUF || name == "application/com.github.proto-openapi.spec.v2@v1.0+protobuf"
    })
}

/// Answers `/openapi/...`; made anew each time, since clients keep what they read.
pub(crate) fn openapi(path: &str, headers: &HeaderMap) -> Option<Answer> {
    let document = match path.trim_end_matches('/') {
        "/openapi/v2" if prefers_protobuf(headers) => {
            return Some(wire::answer(StatusCode::OK, OPENAPI_PROTOBUF, openapi::v2_protobuf(&served())));
        }
        "/openapi/v2" => openapi::v2_document(&served()),
        "/openapi/v3" => openapi::v3_index(&served()),
        path => {
            let rest = path.strip_prefix("/openapi/v3/")?;
            let (group, version) = match rest.split('/').collect::<Vec<_>>()[..] {
                ["api", version] => ("", version),
                ["apis", group, version] => (group, version),
                _ => return None,
            };
            openapi::v3_document(group, version, &served())?
        }
    };
    Some(Document::new(&document).answer(headers, "application/json"))
}
