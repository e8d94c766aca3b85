//! Events about pods and the node, as `kubectl describe` shows them.
//!
//! Owns a bounded queue, the counting of repeats and the rate limit for each object. Recording never waits and never
//! fails: when the queue is full or the API is away for long, events are lost, and nothing else is.

use std::borrow::Cow;
use std::collections::HashMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, Node, ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::{Api, Patch, PatchParams, PostParams};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::spec;

const QUEUE: usize = 1000;
/// Repeats within this time count up one event.
const REPEAT_WINDOW: Duration = Duration::from_secs(600);
/// Each object may have so many events at once, and one more in each refill time.
const BURST: f64 = 25.0;
const REFILL: Duration = Duration::from_secs(300);
const KNOWN_MAX: usize = 4096;
const CALL: Duration = Duration::from_secs(10);
/// An event outlasts an API outage of about a minute and a half.
const ATTEMPTS: u32 = 14;
const LONGEST_DELAY: Duration = Duration::from_secs(10);

/// Normal or Warning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Level {
    Normal,
    Warning,
}

/// Something that happened.
#[derive(Debug, Clone)]
struct Entry {
    about: ObjectReference,
    level: Level,
    reason: Cow<'static, str>,
    message: String,
    at: Timestamp,
}

/// Where events are handed in. Clones share the queue.
#[derive(Clone)]
pub(crate) struct Recorder {
    queue: mpsc::Sender<Entry>,
}

/// Sends what was handed in.
pub(crate) struct Sender {
    queue: mpsc::Receiver<Entry>,
    client: kube::Client,
    node_name: String,
    known: HashMap<Identity, Known>,
    budgets: HashMap<String, (f64, Timestamp)>,
    names: u64,
}

type Identity = (String, String, Cow<'static, str>, Level, String);

struct Known {
    name: String,
    count: i32,
    first: Timestamp,
    last: Timestamp,
}

/// A recorder, and the task body that sends for it.
pub(crate) fn recorder(client: kube::Client, node_name: String) -> (Recorder, Sender) {
    let (handle, queue) = mpsc::channel(QUEUE);
    let sender = Sender { queue, client, node_name, known: HashMap::new(), budgets: HashMap::new(), names: 0 };
    (Recorder { queue: handle }, sender)
}

impl Recorder {
    /// An event about a pod.
    pub(crate) fn pod(
        &self,
        pod: &Pod,
        level: Level,
        reason: impl Into<Cow<'static, str>>,
        message: impl Into<String>,
    ) {
        self.record(pod_reference(pod, None), level, reason.into(), message.into());
    }

    /// An event about one container of a pod.
    pub(crate) fn container(
        &self,
        pod: &Pod,
        container: &str,
        level: Level,
        reason: impl Into<Cow<'static, str>>,
        message: impl Into<String>,
    ) {
        let field = pod.spec.as_ref().and_then(|spec| spec::find_container(spec, container)).map(|(_, path)| path);
        self.record(pod_reference(pod, field), level, reason.into(), message.into());
    }

    /// An event about the node.
    pub(crate) fn node(
        &self,
        name: &str,
        level: Level,
        reason: impl Into<Cow<'static, str>>,
        message: impl Into<String>,
    ) {
        let about = ObjectReference {
            kind: Some("Node".to_owned()),
            api_version: Some(<Node as k8s_openapi::Resource>::API_VERSION.to_owned()),
            name: Some(name.to_owned()),
            uid: Some(name.to_owned()),
            ..Default::default()
        };
        self.record(about, level, reason.into(), message.into());
    }

    fn record(&self, about: ObjectReference, level: Level, reason: Cow<'static, str>, message: String) {
        let entry = Entry { about, level, reason: reason.clone(), message, at: Timestamp::now() };
        if self.queue.try_send(entry).is_err() {
            tracing::debug!(event.reason = &*reason, "event lost, the queue is full");
        }
    }
}

fn pod_reference(pod: &Pod, field_path: Option<String>) -> ObjectReference {
    ObjectReference {
        kind: Some("Pod".to_owned()),
        api_version: Some("v1".to_owned()),
        name: pod.metadata.name.clone(),
        namespace: pod.metadata.namespace.clone(),
        uid: pod.metadata.uid.clone(),
        resource_version: pod.metadata.resource_version.clone(),
        field_path,
    }
}

impl Sender {
    /// Sends until `shutdown`.
    pub(crate) async fn run(mut self, shutdown: CancellationToken) {
        loop {
            let entry = tokio::select! {
                () = shutdown.cancelled() => return,
                entry = self.queue.recv() => entry,
            };
            let Some(entry) = entry else { return };
            if self.within_budget(&entry) {
                self.send(entry).await;
            }
        }
    }

    fn within_budget(&mut self, entry: &Entry) -> bool {
        if self.budgets.len() > KNOWN_MAX {
            self.budgets.clear();
        }
        let key = entry.about.uid.clone().unwrap_or_default();
        let (tokens, at) = self.budgets.entry(key).or_insert((BURST, entry.at));
        let passed = entry.at.duration_since(*at).as_secs_f64().max(0.0);
        *tokens = (*tokens + passed / REFILL.as_secs_f64()).min(BURST);
        *at = entry.at;
        if *tokens < 1.0 {
            return false;
        }
        *tokens -= 1.0;
        true
    }

    async fn send(&mut self, entry: Entry) {
        let namespace = entry.about.namespace.clone().unwrap_or_else(|| "default".to_owned());
        let api: Api<Event> = Api::namespaced(self.client.clone(), &namespace);
        let key: Identity = (
            entry.about.uid.clone().unwrap_or_default(),
            entry.about.field_path.clone().unwrap_or_default(),
            entry.reason.clone(),
            entry.level,
            entry.message.clone(),
        );
        if self.known.len() > KNOWN_MAX {
            self.known.clear();
        }
        let recent = |known: &&mut Known| {
            Duration::try_from(entry.at.duration_since(known.last)).unwrap_or_default() < REPEAT_WINDOW
        };
        if let Some(known) = self.known.get_mut(&key).filter(recent) {
            known.count += 1;
            known.last = entry.at;
            let patch = serde_json::json!({"count": known.count, "lastTimestamp": Time(entry.at)});
            let (name, params) = (known.name.clone(), PatchParams::default());
            let answer = tokio::time::timeout(CALL, api.patch(&name, &params, &Patch::Merge(&patch))).await;
            if matches!(answer, Ok(Ok(_))) {
                return;
            }
        }
        self.names += 1;
        let subject = entry.about.name.clone().unwrap_or_default();
        let name = format!("{subject}.{:x}{:04x}", entry.at.as_nanosecond(), self.names & 0xffff);
        let known = Known { name: name.clone(), count: 1, first: entry.at, last: entry.at };
        let event = self.event(&entry, &known, namespace);
        self.known.insert(key, known);
        self.create(&api, &event).await;
    }

    fn event(&self, entry: &Entry, known: &Known, namespace: String) -> Event {
        let level = if entry.level == Level::Normal { "Normal" } else { "Warning" };
        Event {
            metadata: ObjectMeta { name: Some(known.name.clone()), namespace: Some(namespace), ..Default::default() },
            involved_object: entry.about.clone(),
            reason: Some(entry.reason.to_string()),
            message: Some(shortened(&entry.message)),
            type_: Some(level.to_owned()),
            count: Some(known.count),
            first_timestamp: Some(Time(known.first)),
            last_timestamp: Some(Time(known.last)),
            source: Some(EventSource { component: Some("kubelet".to_owned()), host: Some(self.node_name.clone()) }),
            reporting_component: Some("kubelet".to_owned()),
            reporting_instance: Some(self.node_name.clone()),
            ..Default::default()
        }
    }

    async fn create(&self, api: &Api<Event>, event: &Event) {
        for attempt in 0..ATTEMPTS {
            match tokio::time::timeout(CALL, api.create(&PostParams::default(), event)).await {
                Ok(Ok(_)) => return,
                // Refused for good: the namespace is going, or the event is not allowed.
                Ok(Err(kube::Error::Api(status))) if status.code < 500 && status.code != 429 => return,
                _ => tokio::time::sleep(Duration::from_millis(200 << attempt.min(6)).min(LONGEST_DELAY)).await,
            }
        }
        tracing::debug!(event.reason = event.reason, "event lost, the API did not take it");
    }
}

/// The API refuses messages over 1024 bytes.
fn shortened(message: &str) -> String {
    let mut end = message.len().min(1024);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    message[..end].to_owned()
}
