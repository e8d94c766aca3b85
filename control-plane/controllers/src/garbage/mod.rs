//! The garbage collector: deletes what has lost all its owners, and carries out foreground and orphaning deletion.
//!
//! One metadata-only watch for each resource feeds one `graph`; its answers are worked off by a queue. Before anything
//! is deleted the API is asked, never only the graph, so a graph that lags behind costs time and nothing else.

pub(crate) mod discovery;
mod graph;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::Api;
use kube::api::{DeleteParams, DynamicObject, Preconditions, PropagationPolicy};
use kube::core::PartialObjectMeta;
use kube::runtime::watcher;
use oarlock_machinery::informer::Backoff;
use oarlock_machinery::{ApiError, Next, WorkQueue, call, merge_metadata, queue};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::shared::{Shared, Task};
use discovery::Resource;
use graph::{FOREGROUND, Graph, ORPHAN, Place, Uid, Work, has_finalizer};

const CONCURRENCY: usize = 16;
/// How often new or vanished resources are looked for.
const REDISCOVERY: Duration = Duration::from_secs(30);
/// Work starts without the resources that cannot be listed by then.
const SYNC_LIMIT: Duration = Duration::from_secs(30);
/// An owner of a kind that the server does not know is looked at again after this.
const UNKNOWN_KIND_RECHECK: Duration = Duration::from_secs(60);

struct Collector {
    shared: Arc<Shared>,
    graph: Mutex<Graph>,
    queue: Arc<WorkQueue<Work>>,
    /// By (apiVersion, kind).
    kinds: Mutex<HashMap<(String, String), Resource>>,
}

struct Monitor {
    stop: CancellationToken,
    synced: watch::Receiver<bool>,
}

pub(crate) fn start(shared: &Arc<Shared>, stop: &CancellationToken) -> Task {
    let collector = Arc::new(Collector {
        shared: shared.clone(),
        graph: Mutex::default(),
        queue: WorkQueue::new(),
        kinds: Mutex::default(),
    });
    let stop = stop.clone();
    Box::pin(async move { collector.run(stop).await })
}

impl Collector {
    async fn run(self: Arc<Self>, stop: CancellationToken) {
        let mut tasks: JoinSet<()> = JoinSet::new();
        let mut monitors: HashMap<Resource, Monitor> = HashMap::new();
        let mut pause = Backoff::default();
        while !self.refresh(&mut monitors, &mut tasks, &stop).await {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(pause.next_delay()) => {}
            }
        }
        let waiting = async {
            for monitor in monitors.values_mut() {
                // A monitor that ended will never be synced, and need not be waited for.
                let _ = monitor.synced.wait_for(|synced| *synced).await;
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            waited = tokio::time::timeout(SYNC_LIMIT, waiting) => if waited.is_err() {
                tracing::warn!("garbage collection starts although some resources could not be listed");
            }
        }
        let worker = self.clone();
        let work = queue::work("garbage", self.queue.clone(), CONCURRENCY, stop.clone(), move |work| {
            worker.clone().reconcile(work)
        });
        let mut interval = tokio::time::interval(REDISCOVERY);
        interval.reset();
        let rediscover = async {
            loop {
                interval.tick().await;
                self.refresh(&mut monitors, &mut tasks, &stop).await;
                while tasks.try_join_next().is_some() {}
            }
        };
        tokio::select! {
            () = work => {}
            () = rediscover => {}
        }
    }

    /// Starts monitors of new resources and ends those of vanished ones; false if discovery failed.
    async fn refresh(
        self: &Arc<Self>,
        monitors: &mut HashMap<Resource, Monitor>,
        tasks: &mut JoinSet<()>,
        stop: &CancellationToken,
    ) -> bool {
        let (resources, failures) = match discovery::discover(&self.shared.client).await {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(%error, cause = %error.user_message(), "discovery failed");
                return false;
            }
        };
        let by_kind = resources.iter().map(|resource| {
            ((api_version(&resource.group, &resource.version), resource.kind.clone()), resource.clone())
        });
        self.kinds.lock().extend(by_kind);
        // Events own nothing and are owned by nothing, and there are many of them.
        let wanted: HashSet<&Resource> =
            resources.iter().filter(|r| r.watchable && r.deletable && r.plural != "events").collect();
        if failures.is_empty() {
            monitors.retain(|resource, monitor| {
                let stays = wanted.contains(resource);
                if !stays {
                    monitor.stop.cancel();
                }
                stays
            });
        }
        for resource in wanted {
            if !monitors.contains_key(resource) {
                let (sender, synced) = watch::channel(false);
                let stop = stop.child_token();
                tasks.spawn(self.clone().monitor(resource.clone(), sender, stop.clone()));
                monitors.insert(resource.clone(), Monitor { stop, synced });
            }
        }
        true
    }

    async fn monitor(self: Arc<Self>, resource: Resource, synced: watch::Sender<bool>, stop: CancellationToken) {
        let api: Api<PartialObjectMeta<DynamicObject>> =
            Api::all_with(self.shared.client.clone(), &resource.api_resource());
        let version: Arc<str> = api_version(&resource.group, &resource.version).into();
        let kind: Arc<str> = resource.kind.as_str().into();
        let mut events = Box::pin(watcher(api, watcher::Config::default()));
        let mut known: HashSet<Uid> = HashSet::new();
        let mut seen: HashSet<Uid> = HashSet::new();
        let mut pause = Backoff::default();
        loop {
            let event = tokio::select! {
                () = stop.cancelled() => break,
                event = events.next() => event,
            };
            let place = |meta: &ObjectMeta| Place {
                api_version: version.clone(),
                kind: kind.clone(),
                namespace: meta.namespace.clone().unwrap_or_default(),
                name: meta.name.clone().unwrap_or_default(),
            };
            let work = match event {
                None => break,
                Some(Err(error)) => {
                    tracing::debug!(resource = %resource.qualified(), %error, "watch interrupted");
                    tokio::select! {
                        () = stop.cancelled() => break,
                        () = tokio::time::sleep(pause.next_delay()) => continue,
                    }
                }
                Some(Ok(event)) => {
                    // A list begins each attempt, also one that fails.
                    if !matches!(event, watcher::Event::Init) {
                        pause = Backoff::default();
                    }
                    match event {
                        watcher::Event::Init => {
                            seen.clear();
                            Vec::new()
                        }
                        watcher::Event::InitApply(object) => {
                            let uid: Uid = object.metadata.uid.as_deref().unwrap_or_default().into();
                            seen.insert(uid.clone());
                            known.insert(uid);
                            self.graph.lock().observe(place(&object.metadata), &object.metadata)
                        }
                        watcher::Event::InitDone => {
                            let gone: Vec<Uid> = known.difference(&seen).cloned().collect();
                            known = std::mem::take(&mut seen);
                            synced.send_replace(true);
                            let mut graph = self.graph.lock();
                            gone.iter().flat_map(|uid| graph.remove(uid)).collect()
                        }
                        watcher::Event::Apply(object) => {
                            known.insert(object.metadata.uid.as_deref().unwrap_or_default().into());
                            self.graph.lock().observe(place(&object.metadata), &object.metadata)
                        }
                        watcher::Event::Delete(object) => {
                            let uid = object.metadata.uid.as_deref().unwrap_or_default();
                            known.remove(uid);
                            self.graph.lock().remove(uid)
                        }
                    }
                }
            };
            work.into_iter().for_each(|work| self.queue.add(work));
        }
        // Ended because the resource is not served any more, if not by shutdown, when nobody reads the graph: what
        // was in it is out of reach, and its dependents are checked.
        let work: Vec<Work> = known.iter().flat_map(|uid| self.graph.lock().remove(uid)).collect();
        work.into_iter().for_each(|work| self.queue.add(work));
    }

    fn resource_of(&self, api_version: &str, kind: &str) -> Option<Resource> {
        let kinds = self.kinds.lock();
        kinds.get(&(api_version.to_owned(), kind.to_owned())).cloned().or_else(|| {
            // A reference may name another version of the group than the preferred one.
            let group = api_version.rsplit_once('/').map_or("", |(group, _)| group);
            kinds.values().find(|resource| resource.group == group && resource.kind == kind).cloned()
        })
    }

    fn api(&self, resource: &Resource, namespace: &str) -> Api<DynamicObject> {
        let (client, type_) = (self.shared.client.clone(), resource.api_resource());
        match resource.namespaced {
            true => Api::namespaced_with(client, namespace, &type_),
            false => Api::all_with(client, &type_),
        }
    }

    async fn reconcile(self: Arc<Self>, work: Work) -> Result<Next, ApiError> {
        match work {
            Work::Check(uid) => self.check(&uid).await,
            Work::Orphan(uid) => self.orphan(&uid).await,
        }
    }

    fn gone(&self, uid: &str) {
        let work = self.graph.lock().remove(uid);
        work.into_iter().for_each(|work| self.queue.add(work));
    }

    async fn check(&self, uid: &Uid) -> Result<Next, ApiError> {
        let (place, waits, skip) = {
            let graph = self.graph.lock();
            let Some(node) = graph.node(uid) else { return Ok(Next::Done) };
            (node.place.clone(), node.waits(), node.deleting && !node.waits())
        };
        if skip {
            return Ok(Next::Done);
        }
        let Some(resource) = self.resource_of(&place.api_version, &place.kind) else {
            return Ok(Next::After(UNKNOWN_KIND_RECHECK));
        };
        let api = self.api(&resource, &place.namespace);
        let live = call("get object metadata", api.get_metadata_opt(&place.name)).await?;
        let Some(live) = live.filter(|live| live.metadata.uid.as_deref() == Some(&**uid)) else {
            self.gone(uid);
            return Ok(Next::Done);
        };
        if waits {
            return self.advance_foreground(&api, uid, &live).await;
        }
        if live.metadata.deletion_timestamp.is_some() {
            return Ok(Next::Done);
        }
        self.judge(&api, uid, &place, &live).await
    }

    /// Decides by the owners: keep, drop stale references, or delete.
    async fn judge(
        &self,
        api: &Api<DynamicObject>,
        uid: &Uid,
        place: &Place,
        live: &PartialObjectMeta<DynamicObject>,
    ) -> Result<Next, ApiError> {
        let owners = live.metadata.owner_references.as_deref().unwrap_or_default();
        if owners.is_empty() {
            return Ok(Next::Done);
        }
        let (mut solid, mut waiting) = (Vec::new(), Vec::new());
        for owner in owners {
            match self.find_owner(owner, &place.namespace).await? {
                Found::Solid => solid.push(owner),
                Found::Waiting => waiting.push(owner),
                Found::Dangling => {}
                Found::Unknown => return Ok(Next::After(UNKNOWN_KIND_RECHECK)),
            }
        }
        let name = &place.name;
        if !solid.is_empty() {
            if solid.len() == owners.len() {
                return Ok(Next::Done);
            }
            let kept: Vec<&OwnerReference> = solid;
            return patch(api, name, &live.metadata, json!({ "ownerReferences": kept })).await;
        }
        let meta = &live.metadata;
        let has_waiting_dependents = {
            let graph = self.graph.lock();
            let dependents = graph.node(uid).map(|node| node.dependents.clone()).unwrap_or_default();
            if dependents.is_empty() {
                None
            } else {
                Some(dependents.iter().any(|dependent| graph.node(dependent).is_some_and(graph::Node::waits)))
            }
        };
        let policy = match (waiting.is_empty(), has_waiting_dependents) {
            (false, Some(circular)) => {
                if circular && owners.iter().any(|owner| owner.block_owner_deletion == Some(true)) {
                    // Owners wait for this, and this would wait for its dependents, which may be those owners.
                    let mut freed = owners.to_vec();
                    freed.iter_mut().for_each(|owner| owner.block_owner_deletion = Some(false));
                    patch(api, name, meta, json!({ "ownerReferences": freed })).await?;
                    return delete(api, name, uid, None, PropagationPolicy::Foreground).await;
                }
                PropagationPolicy::Foreground
            }
            _ if has_finalizer(meta, ORPHAN) => PropagationPolicy::Orphan,
            _ if has_finalizer(meta, FOREGROUND) => PropagationPolicy::Foreground,
            _ => PropagationPolicy::Background,
        };
        delete(api, name, uid, meta.resource_version.clone(), policy).await
    }

    async fn find_owner(&self, owner: &OwnerReference, namespace: &str) -> Result<Found, ApiError> {
        if self.graph.lock().is_absent(&owner.uid) {
            return Ok(Found::Dangling);
        }
        let Some(resource) = self.resource_of(&owner.api_version, &owner.kind) else { return Ok(Found::Unknown) };
        if resource.namespaced && namespace.is_empty() {
            // A cluster-scoped object cannot be owned by a namespaced one: nothing says which one is meant.
            return Ok(Found::Unknown);
        }
        let api = self.api(&resource, namespace);
        let found = call("get owner metadata", api.get_metadata_opt(&owner.name)).await?;
        let found = found.filter(|found| found.metadata.uid.as_deref() == Some(&owner.uid));
        Ok(match found {
            None => Found::Dangling,
            Some(found)
                if found.metadata.deletion_timestamp.is_some() && has_finalizer(&found.metadata, FOREGROUND) =>
            {
                Found::Waiting
            }
            Some(_) => Found::Solid,
        })
    }

    /// The object waits for its dependents: looks at those that block it, or lets it go.
    async fn advance_foreground(
        &self,
        api: &Api<DynamicObject>,
        uid: &Uid,
        live: &PartialObjectMeta<DynamicObject>,
    ) -> Result<Next, ApiError> {
        let blockers = self.graph.lock().blockers(uid);
        if blockers.is_empty() {
            return drop_finalizer(api, &live.metadata, FOREGROUND).await;
        }
        let graph = self.graph.lock();
        for blocker in blockers {
            if graph.node(&blocker).is_some_and(|node| !node.deleting) {
                self.queue.add(Work::Check(blocker));
            }
        }
        Ok(Next::Done)
    }

    /// Takes the owner out of its dependents' references, and lets it go.
    async fn orphan(&self, uid: &Uid) -> Result<Next, ApiError> {
        let (place, dependents) = {
            let graph = self.graph.lock();
            let Some(node) = graph.node(uid) else { return Ok(Next::Done) };
            let places = node.dependents.iter().filter_map(|uid| graph.node(uid)).map(|node| node.place.clone());
            (node.place.clone(), places.collect::<Vec<Place>>())
        };
        for dependent in dependents {
            let Some(resource) = self.resource_of(&dependent.api_version, &dependent.kind) else { continue };
            let api = self.api(&resource, &dependent.namespace);
            let live = call("get dependent metadata", api.get_metadata_opt(&dependent.name)).await?;
            let Some(live) = live else { continue };
            let owners = live.metadata.owner_references.clone().unwrap_or_default();
            let kept: Vec<OwnerReference> = owners.iter().filter(|owner| owner.uid != **uid).cloned().collect();
            if kept.len() != owners.len() {
                patch(&api, &dependent.name, &live.metadata, json!({ "ownerReferences": kept })).await?;
            }
        }
        let Some(resource) = self.resource_of(&place.api_version, &place.kind) else { return Ok(Next::Done) };
        let api = self.api(&resource, &place.namespace);
        let live = call("get owner metadata", api.get_metadata_opt(&place.name)).await?;
        match live.filter(|live| live.metadata.uid.as_deref() == Some(&**uid)) {
            Some(live) => drop_finalizer(&api, &live.metadata, ORPHAN).await,
            None => Ok(Next::Done),
        }
    }
}

enum Found {
    Solid,
    Dangling,
    /// Is itself in foreground deletion and waits for its dependents.
    Waiting,
    /// Of a kind that the server does not have.
    Unknown,
}

fn api_version(group: &str, version: &str) -> String {
    if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") }
}

async fn delete(
    api: &Api<DynamicObject>,
    name: &str,
    uid: &Uid,
    resource_version: Option<String>,
    policy: PropagationPolicy,
) -> Result<Next, ApiError> {
    let parameters = DeleteParams {
        propagation_policy: Some(policy),
        preconditions: Some(Preconditions { uid: Some(uid.to_string()), resource_version }),
        ..Default::default()
    };
    match call("delete dependent", api.delete(name, &parameters)).await {
        Err(error) if error.is_not_found() => Ok(Next::Done),
        result => result.map(|_| Next::Done),
    }
}

/// Changes metadata, bound to the version that was read.
async fn patch(api: &Api<DynamicObject>, name: &str, read: &ObjectMeta, mut metadata: Value) -> Result<Next, ApiError> {
    metadata["uid"] = json!(read.uid);
    metadata["resourceVersion"] = json!(read.resource_version);
    match merge_metadata("patch metadata", api, name, &json!({ "metadata": metadata })).await {
        Err(error) if error.is_not_found() => Ok(Next::Done),
        result => result.map(|_| Next::Done),
    }
}

async fn drop_finalizer(api: &Api<DynamicObject>, read: &ObjectMeta, finalizer: &str) -> Result<Next, ApiError> {
    if !has_finalizer(read, finalizer) {
        return Ok(Next::Done);
    }
    let kept: Vec<&String> = read.finalizers.iter().flatten().filter(|candidate| *candidate != finalizer).collect();
    let name = read.name.clone().unwrap_or_default();
    patch(api, &name, read, json!({ "finalizers": kept })).await
}
