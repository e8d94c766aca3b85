//! An API server of a few lines behind kube's client: objects by path, list, watch, patch, delete with grace.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::sync::{broadcast, watch};

type Answer = Response<BoxBody<Bytes, Infallible>>;

#[derive(Default)]
struct Objects {
    /// By full path, such as `/api/v1/namespaces/default/pods/web`.
    all: BTreeMap<String, Value>,
    version: u64,
    /// Requests that change something, in order.
    changes: Vec<String>,
}

/// The server. Clones share everything.
#[derive(Clone)]
pub struct FakeApi {
    objects: Arc<Mutex<Objects>>,
    events: broadcast::Sender<(String, Value)>,
    changed: watch::Sender<u64>,
    down: Arc<Mutex<bool>>,
}

impl FakeApi {
    pub fn new() -> Self {
        let (events, _) = broadcast::channel(4096);
        Self { objects: Arc::default(), events, changed: watch::channel(0).0, down: Arc::default() }
    }

    pub fn client(&self) -> kube::Client {
        let api = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let api = api.clone();
            async move { api.answer(request).await }
        });
        kube::Client::new(service, "default")
    }

    /// While down, every request fails.
    pub fn set_down(&self, down: bool) {
        *self.down.lock().unwrap() = down;
    }

    pub fn get(&self, path: &str) -> Option<Value> {
        self.objects.lock().unwrap().all.get(path).cloned()
    }

    /// All objects whose path contains `part`.
    pub fn all(&self, part: &str) -> Vec<Value> {
        let objects = self.objects.lock().unwrap();
        objects.all.iter().filter(|(path, _)| path.contains(part)).map(|(_, value)| value.clone()).collect()
    }

    pub fn changes(&self) -> Vec<String> {
        self.objects.lock().unwrap().changes.clone()
    }

    pub fn put(&self, path: &str, mut value: Value) -> Value {
        let kind = {
            let mut objects = self.objects.lock().unwrap();
            objects.version += 1;
            value["metadata"]["resourceVersion"] = objects.version.to_string().into();
            if value["metadata"]["uid"].is_null() {
                value["metadata"]["uid"] = format!("uid-{}", objects.version).into();
            }
            if value["metadata"]["name"].is_null() {
                value["metadata"]["name"] = path.rsplit('/').next().unwrap_or_default().into();
            }
            let old = objects.all.insert(path.to_owned(), value.clone());
            if old.is_some() { "MODIFIED" } else { "ADDED" }
        };
        self.announce(path, kind, &value);
        value
    }

    pub fn remove(&self, path: &str) {
        let removed = self.objects.lock().unwrap().all.remove(path);
        if let Some(value) = removed {
            self.announce(path, "DELETED", &value);
        }
    }

    /// What a user's `kubectl delete` does to a pod with a grace period.
    pub fn delete_gracefully(&self, path: &str, grace_seconds: i64) {
        let mut value = self.get(path).expect("the object");
        value["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
        value["metadata"]["deletionGracePeriodSeconds"] = grace_seconds.into();
        self.put(path, value);
    }

    fn announce(&self, path: &str, kind: &str, value: &Value) {
        let _ = self.events.send((path.to_owned(), json!({"type": kind, "object": value})));
        self.changed.send_modify(|count| *count += 1);
    }

    /// Changes with every change of an object.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Waits until the object (Null when there is none) satisfies `wanted`.
    pub async fn wait(&self, path: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let mut changed = self.changed.subscribe();
        let reached = tokio::time::timeout(std::time::Duration::from_secs(20), async {
            loop {
                let value = self.get(path).unwrap_or(Value::Null);
                if wanted(&value) {
                    return value;
                }
                changed.changed().await.expect("the fake lives");
            }
        });
        match reached.await {
            Ok(value) => value,
            Err(_) => panic!(
                "{path} never became {what}: {:#}\nchanges: {:#?}",
                self.get(path).unwrap_or_default(),
                self.changes()
            ),
        }
    }

    async fn answer(&self, request: Request<Body>) -> Result<Answer, std::io::Error> {
        if *self.down.lock().unwrap() {
            return Err(std::io::Error::other("the API is down"));
        }
        let (method, uri) = (request.method().clone(), request.uri().clone());
        let path = uri.path().to_owned();
        let query = uri.query().unwrap_or_default().to_owned();
        let body = request.into_body().collect().await.map_err(std::io::Error::other)?.to_bytes();
        let body: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
        if method != Method::GET {
            self.objects.lock().unwrap().changes.push(format!("{method} {path}"));
        }
        Ok(match method {
            Method::GET if query.contains("watch=true") => self.watch(&path, &query),
            Method::GET => self.read(&path, &query),
            Method::POST => self.create(&path, body),
            Method::PATCH => self.patch(&path, &body),
            Method::DELETE => {
                let found = self.get(&path);
                self.remove(&path);
                found.map_or_else(|| not_found(&path), |value| reply(200, &value))
            }
            _ => reply(405, &json!({})),
        })
    }

    fn read(&self, path: &str, query: &str) -> Answer {
        if let Some(value) = self.get(path) {
            return reply(200, &value);
        }
        let collections = [
            ("pods", "PodList"),
            ("services", "ServiceList"),
            ("nodes", "NodeList"),
            ("configmaps", "ConfigMapList"),
            ("certificatesigningrequests", "CertificateSigningRequestList"),
        ];
        let resource = path.rsplit('/').next().unwrap_or_default();
        if let Some((_, kind)) = collections.into_iter().find(|(name, _)| *name == resource) {
            let objects = self.objects.lock().unwrap();
            let wanted = |key: &&String| matches_collection(path, key) && is_named(query, key);
            let items: Vec<&Value> = objects.all.keys().filter(wanted).filter_map(|key| objects.all.get(key)).collect();
            let version = objects.version.to_string();
            let list =
                json!({"kind": kind, "apiVersion": "v1", "metadata": {"resourceVersion": version}, "items": items});
            return reply(200, &list);
        }
        not_found(path)
    }

    fn watch(&self, path: &str, query: &str) -> Answer {
        let mut events = self.events.subscribe();
        let (sender, receiver) = tokio::sync::mpsc::channel::<Result<Frame<Bytes>, Infallible>>(1024);
        // What came after the list and before this.
        let from: u64 =
            query.split('&').find_map(|pair| pair.strip_prefix("resourceVersion=")?.parse().ok()).unwrap_or(u64::MAX);
        let version = |value: &Value| value["metadata"]["resourceVersion"].as_str()?.parse::<u64>().ok();
        for (key, value) in &self.objects.lock().unwrap().all {
            if matches_collection(path, key)
                && is_named(query, key)
                && version(value).is_some_and(|version| version > from)
            {
                let event = json!({"type": "MODIFIED", "object": value});
                let _ = sender.try_send(Ok(Frame::data(format!("{event}\n").into())));
            }
        }
        let (path, query, down) = (path.to_owned(), query.to_owned(), self.down.clone());
        tokio::spawn(async move {
            loop {
                let event = tokio::select! {
                    event = events.recv() => event,
                    () = sender.closed() => return,
                };
                let Ok((key, event)) = event else { return };
                if *down.lock().unwrap() {
                    return;
                }
                if matches_collection(&path, &key) && is_named(&query, &key) {
                    let line = format!("{event}\n");
                    if sender.send(Ok(Frame::data(line.into()))).await.is_err() {
                        return;
                    }
                }
            }
        });
        let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
        Response::new(BodyExt::boxed(StreamBody::new(stream)))
    }

    fn create(&self, path: &str, body: Value) -> Answer {
        if path.ends_with("/token") {
            let status = json!({"token": "t0ken", "expirationTimestamp": "2099-01-01T00:00:00Z"});
            return reply(
                201,
                &json!({"kind": "TokenRequest", "metadata": {}, "spec": body["spec"], "status": status}),
            );
        }
        let name = body["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let full = format!("{path}/{name}");
        if self.get(&full).is_some() {
            return reply(409, &status(409, "AlreadyExists"));
        }
        reply(201, &self.put(&full, body))
    }

    fn patch(&self, path: &str, patch: &Value) -> Answer {
        let target = path.trim_end_matches("/status");
        let Some(mut value) = self.get(target) else { return not_found(path) };
        let uid = &patch["metadata"]["uid"];
        if !uid.is_null() && *uid != value["metadata"]["uid"] {
            return reply(409, &status(409, "Conflict"));
        }
        merge(&mut value, patch);
        reply(200, &self.put(target, value))
    }
}

/// Whether the object at `key` belongs to the collection at `path`, in whatever namespace.
fn matches_collection(path: &str, key: &str) -> bool {
    let resource = path.rsplit('/').next().unwrap_or_default();
    let mut parts = key.rsplit('/');
    parts.next();
    parts.next() == Some(resource)
}

/// Whether a field selector on the name, if there is one, lets the object through.
fn is_named(query: &str, key: &str) -> bool {
    let selector = query.split('&').find_map(|pair| pair.strip_prefix("fieldSelector=metadata.name"));
    let name = selector.map(|text| text.trim_start_matches("%3D").trim_start_matches('='));
    name.is_none_or(|name| key.rsplit('/').next() == Some(name))
}

/// Enough of a strategic merge: conditions by type, other lists replaced, null removes.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(changes) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (name, change) in changes {
        match change {
            Value::Null => {
                target.as_object_mut().expect("an object").remove(name);
            }
            Value::Array(list) if name == "conditions" => {
                let mut kept = target[name].as_array().cloned().unwrap_or_default();
                for condition in list {
                    if condition["$patch"] == "delete" {
                        kept.retain(|old| old["type"] != condition["type"]);
                        continue;
                    }
                    match kept.iter_mut().find(|old| old["type"] == condition["type"]) {
                        Some(old) => merge(old, condition),
                        None => kept.push(condition.clone()),
                    }
                }
                target[name] = kept.into();
            }
            Value::Array(list) => {
                target[name] = list.iter().filter(|item| item["$patch"].is_null()).cloned().collect();
            }
            change => merge(&mut target[name], change),
        }
    }
}

fn status(code: u16, reason: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": reason})
}

fn not_found(_path: &str) -> Answer {
    reply(404, &status(404, "NotFound"))
}

fn reply(code: u16, value: &Value) -> Answer {
    let body = Full::new(Bytes::from(value.to_string()));
    let mut response = Response::new(BodyExt::boxed(body));
    *response.status_mut() = http::StatusCode::from_u16(code).expect("a status code");
    response
}
