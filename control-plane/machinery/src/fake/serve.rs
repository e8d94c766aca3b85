//! The fake's HTTP side: paths, queries, discovery and watch streams.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use futures::stream;
use http::{Method, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use kube::client::Body;
use serde_json::{Value, json};

use super::store::{KINDS, api_version, kind_of, text};
use super::{FakeApi, Refused};

type Reply = Response<UnsyncBoxBody<Bytes, std::convert::Infallible>>;

struct Target {
    resource: String,
    namespace: Option<String>,
    name: Option<String>,
    subresource: String,
}

fn target(path: &str) -> Option<Target> {
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    let rest = match *parts.first()? {
        "api" => parts.get(2..)?,
        "apis" => parts.get(3..)?,
        _ => return None,
    };
    let (namespace, rest) = match rest {
        ["namespaces", ns, resource, ..] if kind_of(resource).is_some_and(|kind| kind.4) => (Some(*ns), &rest[2..]),
        _ => (None, rest),
    };
    Some(Target {
        resource: (*rest.first()?).to_owned(),
        namespace: namespace.map(str::to_owned),
        name: rest.get(1).map(|name| (*name).to_owned()),
        subresource: rest.get(2).copied().unwrap_or_default().to_owned(),
    })
}

fn query(request: &Request<Body>) -> BTreeMap<String, String> {
    let text = request.uri().query().unwrap_or_default();
    let pairs = text.split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(key, value)| (key.to_owned(), percent_decode(value))).collect()
}

fn percent_decode(text: &str) -> String {
    let bytes = text.replace('+', " ").into_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut rest = bytes.as_slice();
    while let Some((first, tail)) = rest.split_first() {
        let hex = tail.get(..2).and_then(|hex| std::str::from_utf8(hex).ok());
        match (first, hex.and_then(|hex| u8::from_str_radix(hex, 16).ok())) {
            (b'%', Some(byte)) => {
                out.push(byte);
                rest = &tail[2..];
            }
            _ => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Label and field selectors with equality only.
#[derive(Clone, Default)]
struct Filter {
    namespace: Option<String>,
    labels: Vec<(String, String)>,
    fields: Vec<(String, String)>,
}

impl Filter {
    fn new(namespace: Option<String>, query: &BTreeMap<String, String>) -> Self {
        let pairs = |name: &str| {
            let terms = query.get(name).map(String::as_str).unwrap_or_default();
            let terms = terms.split(',').filter_map(|term| term.split_once('='));
            terms.map(|(key, value)| (key.to_owned(), value.trim_start_matches('=').to_owned())).collect()
        };
        Self { namespace, labels: pairs("labelSelector"), fields: pairs("fieldSelector") }
    }

    fn passes(&self, object: &Value) -> bool {
        let label = |key: &str| object["metadata"]["labels"][key].as_str();
        self.namespace.as_deref().is_none_or(|ns| text(object, "/metadata/namespace") == ns)
            && self.labels.iter().all(|(key, value)| label(key) == Some(value))
            && self.fields.iter().all(|(key, value)| text(object, &format!("/{}", key.replace('.', "/"))) == value)
    }
}

fn reply(code: u16, body: &Value) -> Reply {
    let mut response = Response::new(Full::new(Bytes::from(body.to_string())).boxed_unsync());
    *response.status_mut() = http::StatusCode::from_u16(code).unwrap_or(http::StatusCode::INTERNAL_SERVER_ERROR);
    response
}

fn failure(code: u16, reason: &str, message: &str) -> Reply {
    let body = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": message
    });
    reply(code, &body)
}

fn partial(object: &Value) -> Value {
    json!({
        "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": object["metadata"].clone()
    })
}

fn merge(target: &mut Value, patch: &Value) {
    let Some(fields) = patch.as_object() else { return *target = patch.clone() };
    if !target.is_object() {
        *target = json!({});
    }
    for (key, value) in fields {
        match (value.is_null(), target.as_object_mut()) {
            (true, Some(map)) => drop(map.remove(key)),
            _ => merge(&mut target[key.as_str()], value),
        }
    }
}

impl FakeApi {
    pub(super) async fn serve(self: Arc<Self>, request: Request<Body>) -> Reply {
        if let Some(found) = discovery(request.uri().path()) {
            return reply(200, &found);
        }
        let Some(target) = target(request.uri().path()).filter(|target| kind_of(&target.resource).is_some()) else {
            return failure(404, "NotFound", "the server could not find the requested resource");
        };
        let path = match target.subresource.as_str() {
            "" => target.resource.clone(),
            subresource => format!("{}/{subresource}", target.resource),
        };
        self.interrupted(request.method().as_str(), &path);
        if let Some(Refused { code, reason, message }) = self.refusal(request.method().as_str(), &path) {
            return failure(code, reason, &message);
        }
        let accept = request.headers().get(http::header::ACCEPT).and_then(|accept| accept.to_str().ok());
        let metadata_only = accept.is_some_and(|accept| accept.contains("as=PartialObjectMetadata"));
        if request.method() == Method::GET {
            return self.read(&target, &query(&request), metadata_only);
        }
        let method = request.method().clone();
        let body = request.into_body().collect_bytes().await.unwrap_or_default();
        let body: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
        match self.write(&method, &target, body) {
            Ok(object) => reply(200, &if metadata_only { partial(&object) } else { object }),
            Err(Refused { code, reason, message }) => failure(code, reason, &message),
        }
    }

    fn write(&self, method: &Method, target: &Target, body: Value) -> Result<Value, Refused> {
        let namespace = target.namespace.as_deref().unwrap_or_default();
        let name = target.name.as_deref().unwrap_or_default();
        let resource = target.resource.as_str();
        self.change(|store| match (method.as_str(), target.name.is_some()) {
            ("POST", true) if target.subresource == "binding" => {
                store.bind(namespace, name, text(&body, "/target/name"))?;
                Ok(json!({"kind": "Status", "apiVersion": "v1", "status": "Success"}))
            }
            ("POST", false) => store.create(resource, namespace, body),
            ("PUT", true) => store.update(resource, namespace, name, &target.subresource, |_| body),
            ("PATCH", true) => store.update(resource, namespace, name, &target.subresource, |old| {
                let mut new = old.clone();
                if let Some(metadata) = new["metadata"].as_object_mut() {
                    metadata.remove("resourceVersion");
                }
                merge(&mut new, &body);
                new
            }),
            ("DELETE", true) => store.delete(resource, namespace, name, &body),
            ("DELETE", false) => {
                let in_namespace = target.namespace.as_deref();
                let names: Vec<String> =
                    store.list(resource, in_namespace).map(|o| text(o, "/metadata/name").to_owned()).collect();
                for name in names {
                    store.delete(resource, namespace, &name, &body)?;
                }
                Ok(json!({"kind": "Status", "apiVersion": "v1", "status": "Success"}))
            }
            _ => {
                let message = "the server does not allow this method on the requested resource".to_owned();
                Err(Refused { code: 405, reason: "MethodNotAllowed", message })
            }
        })
    }

    fn read(self: Arc<Self>, target: &Target, query: &BTreeMap<String, String>, metadata_only: bool) -> Reply {
        let shape = |object: &Value| if metadata_only { partial(object) } else { object.clone() };
        if let Some(name) = &target.name {
            let namespace = target.namespace.as_deref().unwrap_or_default();
            return match self.get(&target.resource, namespace, name) {
                Some(object) => reply(200, &shape(&object)),
                None => failure(404, "NotFound", &format!("{} \"{name}\" not found", target.resource)),
            };
        }
        let filter = Filter::new(target.namespace.clone(), query);
        if query.get("watch").is_some_and(|watch| watch == "true" || watch == "1") {
            let from = query.get("resourceVersion").and_then(|version| version.parse().ok()).unwrap_or(0);
            return self.watch(target.resource.clone(), filter, from, metadata_only);
        }
        let store = self.store.lock();
        let items = store.list(&target.resource, None).filter(|object| filter.passes(object)).map(shape);
        let kind = kind_of(&target.resource).map_or("", |kind| kind.3);
        let (api, kind) = match metadata_only {
            true => ("meta.k8s.io/v1".to_owned(), "PartialObjectMetadata"),
            false => (kind_of(&target.resource).map_or(String::new(), |kind| api_version(kind.0, kind.1)), kind),
        };
        let body = json!({
            "apiVersion": api,
            "kind": format!("{kind}List"),
            "metadata": {"resourceVersion": store.revision().max(1).to_string()},
            "items": items.collect::<Vec<_>>(),
        });
        reply(200, &body)
    }

    fn watch(self: Arc<Self>, resource: String, filter: Filter, from: u64, metadata_only: bool) -> Reply {
        let changes = self.revision.subscribe();
        let next = move |(api, mut changes, mut from): (Arc<Self>, tokio::sync::watch::Receiver<u64>, u64)| {
            let (resource, filter) = (resource.clone(), filter.clone());
            async move {
                loop {
                    changes.borrow_and_update();
                    let held = api.held.lock().contains(&resource);
                    let found = if held {
                        None
                    } else {
                        let store = api.store.lock();
                        let start = store.log.partition_point(|entry| entry.revision <= from);
                        let mut fresh = store.log[start..].iter();
                        fresh.find(|entry| entry.resource == resource && filter.passes(&entry.object)).map(|entry| {
                            let object = if metadata_only { partial(&entry.object) } else { entry.object.clone() };
                            (entry.revision, json!({"type": entry.type_, "object": object}))
                        })
                    };
                    if let Some((revision, event)) = found {
                        from = revision;
                        let frame = Frame::data(Bytes::from(format!("{event}\n")));
                        return Some((Ok(frame), (api, changes, from)));
                    }
                    changes.changed().await.ok()?;
                }
            }
        };
        let body = StreamBody::new(stream::unfold((self, changes, from), next));
        Response::new(body.boxed_unsync())
    }
}

fn discovery(path: &str) -> Option<Value> {
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    let resources = |group: &str, version: &str| {
        let listed = KINDS.iter().filter(|kind| kind.0 == group && kind.1 == version).map(|kind| {
            json!({
                "name": kind.2, "singularName": kind.3.to_lowercase(), "namespaced": kind.4, "kind": kind.3,
                "verbs": ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"],
            })
        });
        let listed: Vec<Value> = listed.collect();
        let list = json!({
            "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": api_version(group, version),
            "resources": listed,
        });
        (!listed.is_empty()).then_some(list)
    };
    match parts.as_slice() {
        ["api"] => Some(json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []})),
        ["api", version] => resources("", version),
        ["apis"] => {
            let mut groups: Vec<Value> = Vec::new();
            for kind in KINDS.iter().filter(|kind| !kind.0.is_empty()) {
                if groups.iter().all(|group| group["name"] != kind.0) {
                    let version = json!({"groupVersion": api_version(kind.0, kind.1), "version": kind.1});
                    groups.push(json!({"name": kind.0, "versions": [version], "preferredVersion": version}));
                }
            }
            Some(json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}))
        }
        ["apis", group, version] => resources(group, version),
        _ => None,
    }
}
