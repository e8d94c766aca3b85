//! Events for users (`kubectl describe`, `kubectl get events`). Recording never blocks and never fails: a repeated
//! event raises the count of the first one, and an object that makes too many loses the surplus.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client, Resource, ResourceExt};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::call::call;

/// Events waiting to be written; more are dropped.
const WAITING_LIMIT: usize = 1024;
/// Events remembered for counting repetitions.
const REMEMBERED_LIMIT: usize = 2048;
/// An object may make this many events in a burst, and then one per [`REFILL`].
const BURST: u32 = 25;
const REFILL: Duration = Duration::from_secs(300);

/// Whether an event tells of trouble.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EventType {
    Normal,
    Warning,
}

impl EventType {
    fn as_str(self) -> &'static str {
        match self {
            Self::Normal => "Normal",
            Self::Warning => "Warning",
        }
    }
}

struct Occurrence {
    component: &'static str,
    object: ObjectReference,
    type_: EventType,
    reason: String,
    message: String,
    at: Timestamp,
}

/// A handle to record events in the name of one component. Cheap to clone.
#[derive(Clone)]
pub struct Recorder {
    component: &'static str,
    sender: mpsc::Sender<Occurrence>,
}

impl Recorder {
    /// A recorder and the task that writes what it records.
    pub fn new(client: Client, component: &'static str) -> (Self, Writer) {
        let (sender, receiver) = mpsc::channel(WAITING_LIMIT);
        (Self { component, sender }, Writer { client, receiver, memory: Memory::default() })
    }

    /// The same writer, another component's name.
    pub fn named(&self, component: &'static str) -> Self {
        Self { component, sender: self.sender.clone() }
    }

    /// Records an event about `object`.
    pub fn event<K>(&self, object: &K, type_: EventType, reason: &str, message: impl Into<String>)
    where
        K: Resource<DynamicType = ()> + ResourceExt,
    {
        self.event_about(reference(object), type_, reason, message);
    }

    /// Records an event about something of which only a reference is known.
    pub fn event_about(&self, object: ObjectReference, type_: EventType, reason: &str, message: impl Into<String>) {
        let occurrence = Occurrence {
            component: self.component,
            object,
            type_,
            reason: reason.to_owned(),
            message: message.into(),
            at: Timestamp::now(),
        };
        if self.sender.try_send(occurrence).is_err() {
            tracing::debug!(reason, "event dropped: too many are waiting");
        }
    }
}

/// A reference to `object` as events carry it.
pub fn reference<K: Resource<DynamicType = ()> + ResourceExt>(object: &K) -> ObjectReference {
    ObjectReference {
        api_version: Some(K::api_version(&()).into_owned()),
        kind: Some(K::kind(&()).into_owned()),
        namespace: object.namespace(),
        name: Some(object.name_any()),
        uid: object.uid(),
        resource_version: object.resource_version(),
        field_path: None,
    }
}

#[derive(PartialEq, Eq, Hash, Clone)]
struct Identity {
    component: &'static str,
    uid: String,
    name: String,
    type_: EventType,
    reason: String,
    message: String,
}

#[derive(Default)]
struct Memory {
    known: HashMap<Identity, (String, i32)>,
    order: VecDeque<Identity>,
    budgets: HashMap<String, Budget>,
}

struct Budget {
    left: u32,
    since: Timestamp,
}

impl Memory {
    /// Whether `object_uid` may make one more event now.
    fn allows(&mut self, object_uid: &str, now: Timestamp) -> bool {
        if self.budgets.len() > REMEMBERED_LIMIT {
            self.budgets.retain(|_, budget| now.duration_since(budget.since).as_secs() < REFILL.as_secs() as i64);
        }
        let budget = self.budgets.entry(object_uid.to_owned()).or_insert(Budget { left: BURST, since: now });
        let refills = now.duration_since(budget.since).as_secs() / REFILL.as_secs() as i64;
        if refills > 0 {
            budget.left = budget.left.saturating_add(u32::try_from(refills).unwrap_or(BURST)).min(BURST);
            budget.since = now;
        }
        let allowed = budget.left > 0;
        budget.left = budget.left.saturating_sub(1);
        allowed
    }

    fn remember(&mut self, identity: Identity, name: String, count: i32) {
        if self.known.insert(identity.clone(), (name, count)).is_none() {
            self.order.push_back(identity);
        }
        while self.order.len() > REMEMBERED_LIMIT {
            if let Some(oldest) = self.order.pop_front() {
                self.known.remove(&oldest);
            }
        }
    }
}

/// The task that writes events.
pub struct Writer {
    client: Client,
    receiver: mpsc::Receiver<Occurrence>,
    memory: Memory,
}

impl Writer {
    /// Writes until `shutdown`, or until every recorder is gone.
    pub async fn run(mut self, shutdown: CancellationToken) {
        loop {
            let occurrence = tokio::select! {
                () = shutdown.cancelled() => return,
                occurrence = self.receiver.recv() => occurrence,
            };
            let Some(occurrence) = occurrence else { return };
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = self.write(occurrence) => {}
            }
        }
    }

    async fn write(&mut self, occurrence: Occurrence) {
        let uid = occurrence.object.uid.clone().unwrap_or_default();
        if !self.memory.allows(&uid, occurrence.at) {
            return;
        }
        let identity = Identity {
            component: occurrence.component,
            uid,
            name: occurrence.object.name.clone().unwrap_or_default(),
            type_: occurrence.type_,
            reason: occurrence.reason.clone(),
            message: occurrence.message.clone(),
        };
        let namespace = occurrence.object.namespace.clone().unwrap_or_else(|| "default".to_owned());
        let api: Api<Event> = Api::namespaced(self.client.clone(), &namespace);
        if let Some((name, count)) = self.memory.known.get(&identity).cloned() {
            let again = serde_json::json!({ "count": count + 1, "lastTimestamp": Time(occurrence.at) });
            let patch = Patch::Merge(&again);
            match call("patch event", api.patch(&name, &PatchParams::default(), &patch)).await {
                Ok(_) => return self.memory.remember(identity, name, count + 1),
                Err(error) if error.is_not_found() => {}
                Err(error) => return tracing::debug!(%error, "event not counted"),
            }
        }
        let event = first(&occurrence, &namespace);
        let name = event.name_any();
        match call("create event", api.create(&PostParams::default(), &event)).await {
            Ok(_) => self.memory.remember(identity, name, 1),
            Err(error) => tracing::debug!(%error, cause = %error.user_message(), "event not written"),
        }
    }
}

fn first(occurrence: &Occurrence, namespace: &str) -> Event {
    let about = occurrence.object.name.clone().unwrap_or_default();
    let suffix = format!("{:x}", occurrence.at.as_nanosecond() as u64);
    let at = Some(Time(occurrence.at));
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{about}.{suffix}")),
            namespace: Some(namespace.to_owned()),
            ..Default::default()
        },
        involved_object: occurrence.object.clone(),
        type_: Some(occurrence.type_.as_str().to_owned()),
        reason: Some(occurrence.reason.clone()),
        message: Some(occurrence.message.chars().take(1024).collect()),
        source: Some(EventSource { component: Some(occurrence.component.to_owned()), host: None }),
        reporting_component: Some(occurrence.component.to_owned()),
        reporting_instance: Some(String::new()),
        first_timestamp: at.clone(),
        last_timestamp: at,
        count: Some(1),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_noisy_object_is_limited_and_recovers() {
        let mut memory = Memory::default();
        let start = Timestamp::from_second(1_000_000).unwrap();
        let allowed = (0..100).filter(|_| memory.allows("noisy", start)).count();
        assert_eq!(allowed, BURST as usize);
        assert!(memory.allows("other", start));
        let later = start + k8s_openapi::jiff::SignedDuration::from_secs(301);
        assert!(memory.allows("noisy", later));
        assert!(!memory.allows("noisy", later));
    }

    #[test]
    fn memory_is_bounded() {
        let mut memory = Memory::default();
        for number in 0..REMEMBERED_LIMIT + 10 {
            let identity = Identity {
                component: "test",
                uid: number.to_string(),
                name: String::new(),
                type_: EventType::Normal,
                reason: String::new(),
                message: String::new(),
            };
            memory.remember(identity, String::new(), 1);
        }
        assert_eq!(memory.known.len(), REMEMBERED_LIMIT);
    }
}
