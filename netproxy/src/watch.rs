//! The watches of the API server as one bounded stream of reduced objects.

use std::collections::HashSet;
use std::error::Error;
use std::fmt::Debug;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::runtime::watcher::{self, Event as WatcherEvent, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc::Sender;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::cluster::SliceName;
use crate::node::Node;
use crate::service::{Service, ServiceName, Slice};

const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const LAST_BACKOFF: Duration = Duration::from_secs(5);

/// A change of the cluster.
#[derive(Debug, Clone)]
pub enum Event {
    Service(ServiceName, Option<Box<Service>>),
    /// With the time of the change that it was written for.
    Slice(SliceName, Option<Slice>, Option<Timestamp>),
    Node(Arc<str>, Option<Node>),
    /// One of the watches has told everything that exists.
    Listed(Kind),
}

/// What is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    Services,
    Slices,
    Nodes,
}

/// Tells of Services until shutdown.
pub async fn services(client: Client, events: Sender<Event>, shutdown: CancellationToken) {
    let name = |object: &core::Service| {
        Some(ServiceName::new(object.metadata.namespace.as_deref()?, object.metadata.name.as_deref()?))
    };
    let event = |name: ServiceName, object: Option<core::Service>| {
        Event::Service(name, object.as_ref().and_then(Service::read).map(Box::new))
    };
    run(Api::all(client), Event::Listed(Kind::Services), name, event, events, shutdown).await;
}

/// Tells of EndpointSlices until shutdown.
pub async fn slices(client: Client, own_node: String, events: Sender<Event>, shutdown: CancellationToken) {
    let name = |object: &EndpointSlice| {
        let text = |text: &Option<String>| text.as_deref().map(Arc::<str>::from);
        Some((text(&object.metadata.namespace)?, text(&object.metadata.name)?))
    };
    let event = move |name: SliceName, object: Option<EndpointSlice>| {
        let trigger = object.as_ref().and_then(Slice::trigger);
        Event::Slice(name, object.and_then(|object| Slice::read(&object, &own_node)), trigger)
    };
    run(Api::all(client), Event::Listed(Kind::Slices), name, event, events, shutdown).await;
}

/// Tells of Nodes until shutdown.
pub async fn nodes(client: Client, events: Sender<Event>, shutdown: CancellationToken) {
    let name = |object: &core::Node| object.metadata.name.as_deref().map(Arc::<str>::from);
    let event = |name: Arc<str>, object: Option<core::Node>| Event::Node(name, object.as_ref().map(Node::read));
    run(Api::all(client), Event::Listed(Kind::Nodes), name, event, events, shutdown).await;
}

/// Tells of all objects of a kind until shutdown; `listed` is what is told whenever everything that exists has been.
pub async fn run<K, N, E>(
    api: Api<K>,
    listed: E,
    name: impl Fn(&K) -> Option<N>,
    event: impl Fn(N, Option<K>) -> E,
    events: Sender<E>,
    shutdown: CancellationToken,
) where
    E: Clone,
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
    N: Clone + Eq + Hash,
{
    run_with((api, watcher::Config::default()), listed, name, event, events, shutdown).await;
}

/// The last in an error's chain: those before it repeat it, some with every field of the answer.
fn cause<'a>(error: &'a (dyn Error + 'static)) -> &'a (dyn Error + 'static) {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last
}

/// As [`run`], for the objects of `selected` that its configuration selects.
pub async fn run_with<K, N, E>(
    selected: (Api<K>, watcher::Config),
    listed: E,
    name: impl Fn(&K) -> Option<N>,
    event: impl Fn(N, Option<K>) -> E,
    events: Sender<E>,
    shutdown: CancellationToken,
) where
    E: Clone,
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
    N: Clone + Eq + Hash,
{
    let mut known: HashSet<N> = HashSet::new();
    let mut listing: HashSet<N> = HashSet::new();
    let mut backoff = FIRST_BACKOFF;
    let mut stream = Box::pin(watcher(selected.0, selected.1));
    loop {
        let next = tokio::select! {
            next = stream.next() => next,
            () = shutdown.cancelled() => return,
        };
        let mut out = Vec::new();
        match next {
            None => return,
            Some(Err(error)) => {
                // The stream goes on where it was, or starts over with a list, when it is asked again.
                warn!(kind = %K::kind(&()), cause = %cause(&error), "watch was interrupted");
                tokio::select! {
                    () = tokio::time::sleep(backoff) => {}
                    () = shutdown.cancelled() => return,
                }
                backoff = (backoff * 2).min(LAST_BACKOFF);
                continue;
            }
            Some(Ok(WatcherEvent::Init)) => {
                // It begins each attempt, also one that fails.
                listing.clear();
                continue;
            }
            Some(Ok(WatcherEvent::InitApply(object))) => {
                if let Some(name) = name(&object) {
                    listing.insert(name.clone());
                    known.insert(name.clone());
                    out.push(event(name, Some(object)));
                }
            }
            Some(Ok(WatcherEvent::InitDone)) => {
                // What was there before and is not in the new list was deleted while nobody looked.
                out.extend(known.difference(&listing).cloned().map(|name| event(name, None)));
                known = std::mem::take(&mut listing);
                debug!(kind = %K::kind(&()), objects = known.len(), "listed");
                out.push(listed.clone());
            }
            Some(Ok(WatcherEvent::Apply(object))) => {
                if let Some(name) = name(&object) {
                    known.insert(name.clone());
                    out.push(event(name, Some(object)));
                }
            }
            Some(Ok(WatcherEvent::Delete(object))) => {
                if let Some(name) = name(&object) {
                    known.remove(&name);
                    out.push(event(name, None));
                }
            }
        }
        backoff = FIRST_BACKOFF;
        for event in out {
            if events.send(event).await.is_err() {
                return;
            }
        }
    }
}
