//! Shared informers: one watch a kind, one cache, many listeners. Listeners are plain functions that put keys into
//! work queues; they run in the watch task and must not block. The cache says nothing about what to do.

use std::collections::{HashMap, HashSet};
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Resource, ResourceExt};
use parking_lot::RwLock;
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Namespace and name; the namespace of a cluster-scoped object is empty.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Key {
    pub namespace: String,
    pub name: String,
}

impl Key {
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }

    pub fn of<K: ResourceExt>(object: &K) -> Self {
        Self { namespace: object.namespace().unwrap_or_default(), name: object.name_any() }
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.namespace.is_empty() {
            true => f.write_str(&self.name),
            false => write!(f, "{}/{}", self.namespace, self.name),
        }
    }
}

/// What happened to an object in the cache.
pub enum Change<'a, K> {
    Added(&'a Arc<K>),
    Updated { old: &'a Arc<K>, new: &'a Arc<K> },
    Deleted(&'a Arc<K>),
}

impl<'a, K> Change<'a, K> {
    /// The newest state known of the object.
    pub fn object(&self) -> &'a Arc<K> {
        match self {
            Self::Added(object) | Self::Deleted(object) => object,
            Self::Updated { new, .. } => new,
        }
    }
}

type Handler<K> = Box<dyn Fn(&Change<'_, K>) + Send + Sync>;
type IndexBy<K> = fn(&K) -> Option<String>;

struct Cache<K> {
    objects: HashMap<Key, Arc<K>>,
    by_namespace: HashMap<String, HashSet<Key>>,
    by_owner: HashMap<String, HashSet<Key>>,
    by_index: HashMap<String, HashSet<Key>>,
}

/// The cache of one kind and its listeners.
pub struct Informer<K> {
    cache: RwLock<Cache<K>>,
    handlers: RwLock<Vec<Handler<K>>>,
    synced: watch::Sender<bool>,
    trim: fn(&mut K),
    index_by: Option<IndexBy<K>>,
}

impl<K> Informer<K>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    /// `trim` drops what no listener reads, to keep the cache small; managedFields go in any case.
    pub fn new(trim: fn(&mut K)) -> Arc<Self> {
        Self::build(trim, None)
    }

    /// As [`Informer::new`], with one more index that [`Informer::indexed`] answers from.
    pub fn with_index(trim: fn(&mut K), index_by: IndexBy<K>) -> Arc<Self> {
        Self::build(trim, Some(index_by))
    }

    fn build(trim: fn(&mut K), index_by: Option<IndexBy<K>>) -> Arc<Self> {
        Arc::new(Self {
            cache: RwLock::new(Cache {
                objects: HashMap::new(),
                by_namespace: HashMap::new(),
                by_owner: HashMap::new(),
                by_index: HashMap::new(),
            }),
            handlers: RwLock::new(Vec::new()),
            synced: watch::Sender::new(false),
            trim,
            index_by,
        })
    }

    /// Adds a listener. Listeners added after [`Informer::run`] started miss what happened before.
    pub fn on_change(&self, handler: impl Fn(&Change<'_, K>) + Send + Sync + 'static) {
        self.handlers.write().push(Box::new(handler));
    }

    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<K>> {
        self.cache.read().objects.get(&Key::new(namespace, name)).cloned()
    }

    pub fn get_key(&self, key: &Key) -> Option<Arc<K>> {
        self.cache.read().objects.get(key).cloned()
    }

    pub fn list(&self) -> Vec<Arc<K>> {
        self.cache.read().objects.values().cloned().collect()
    }

    pub fn len(&self) -> usize {
        self.cache.read().objects.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn in_namespace(&self, namespace: &str) -> Vec<Arc<K>> {
        let cache = self.cache.read();
        select(&cache, cache.by_namespace.get(namespace))
    }

    /// Objects with an ownerReference to `uid`.
    pub fn owned_by(&self, uid: &str) -> Vec<Arc<K>> {
        let cache = self.cache.read();
        select(&cache, cache.by_owner.get(uid))
    }

    /// Objects for which the extra index has `value`.
    pub fn indexed(&self, value: &str) -> Vec<Arc<K>> {
        let cache = self.cache.read();
        select(&cache, cache.by_index.get(value))
    }

    /// Whether the first list is complete.
    pub fn is_synced(&self) -> bool {
        *self.synced.borrow()
    }

    /// Returns once the first list is complete.
    pub async fn wait_synced(&self) {
        let mut synced = self.synced.subscribe();
        // The sender lives as long as `self`, so this cannot fail while we hold it.
        let _ = synced.wait_for(|synced| *synced).await;
    }

    /// Watches until `shutdown`. Errors are retried with growing pauses; listeners see a relist as ordinary changes.
    pub async fn run(&self, api: Api<K>, config: watcher::Config, shutdown: CancellationToken) {
        let mut events = Box::pin(kube::runtime::watcher(api, config));
        let mut pause = Backoff::default();
        let mut seen: HashSet<Key> = HashSet::new();
        loop {
            let event = tokio::select! {
                () = shutdown.cancelled() => return,
                event = events.next() => event,
            };
            match event {
                None => return,
                Some(Ok(event)) => {
                    // A list begins each attempt, also one that fails.
                    if !matches!(event, Event::Init) {
                        pause = Backoff::default();
                    }
                    self.absorb(event, &mut seen);
                }
                Some(Err(error)) => {
                    let delay = pause.next_delay();
                    tracing::debug!(kind = %K::kind(&()), %error, ?delay, "watch interrupted");
                    tokio::select! {
                        () = shutdown.cancelled() => return,
                        () = tokio::time::sleep(delay) => {}
                    }
                }
            }
        }
    }

    fn absorb(&self, event: Event<K>, seen: &mut HashSet<Key>) {
        match event {
            Event::Init => seen.clear(),
            Event::InitApply(object) => {
                seen.insert(Key::of(&object));
                self.apply(object);
            }
            Event::InitDone => {
                let gone: Vec<Key> =
                    self.cache.read().objects.keys().filter(|key| !seen.contains(key)).cloned().collect();
                for key in gone {
                    self.remove(&key, None);
                }
                *seen = HashSet::new();
                self.synced.send_replace(true);
            }
            Event::Apply(object) => self.apply(object),
            Event::Delete(object) => self.remove(&Key::of(&object), Some(object)),
        }
    }

    fn apply(&self, mut object: K) {
        object.meta_mut().managed_fields = None;
        (self.trim)(&mut object);
        let key = Key::of(&object);
        let new = Arc::new(object);
        let old = {
            let mut cache = self.cache.write();
            let old = cache.objects.insert(key.clone(), new.clone());
            if let Some(old) = &old {
                self.unindex(&mut cache, &key, old);
            }
            self.index(&mut cache, &key, &new);
            old
        };
        match &old {
            None => self.notify(&Change::Added(&new)),
            Some(old) if old.meta().resource_version == new.meta().resource_version => {}
            // The name was deleted and used again while nobody watched: listeners must see both.
            Some(old) if old.meta().uid != new.meta().uid => {
                self.notify(&Change::Deleted(old));
                self.notify(&Change::Added(&new));
            }
            Some(old) => self.notify(&Change::Updated { old, new: &new }),
        }
    }

    fn remove(&self, key: &Key, last: Option<K>) {
        let old = {
            let mut cache = self.cache.write();
            let old = cache.objects.remove(key);
            if let Some(old) = &old {
                self.unindex(&mut cache, key, old);
            }
            old
        };
        let gone = match (old, last) {
            (_, Some(mut last)) => {
                last.meta_mut().managed_fields = None;
                (self.trim)(&mut last);
                Arc::new(last)
            }
            (Some(old), None) => old,
            (None, None) => return,
        };
        self.notify(&Change::Deleted(&gone));
    }

    fn notify(&self, change: &Change<'_, K>) {
        for handler in self.handlers.read().iter() {
            handler(change);
        }
    }

    fn index(&self, cache: &mut Cache<K>, key: &Key, object: &K) {
        cache.by_namespace.entry(key.namespace.clone()).or_default().insert(key.clone());
        for owner in object.owner_references() {
            cache.by_owner.entry(owner.uid.clone()).or_default().insert(key.clone());
        }
        if let Some(value) = self.index_by.and_then(|index_by| index_by(object)) {
            cache.by_index.entry(value).or_default().insert(key.clone());
        }
    }

    fn unindex(&self, cache: &mut Cache<K>, key: &Key, object: &K) {
        forget(&mut cache.by_namespace, &key.namespace, key);
        for owner in object.owner_references() {
            forget(&mut cache.by_owner, &owner.uid, key);
        }
        if let Some(value) = self.index_by.and_then(|index_by| index_by(object)) {
            forget(&mut cache.by_index, &value, key);
        }
    }
}

fn select<K>(cache: &Cache<K>, keys: Option<&HashSet<Key>>) -> Vec<Arc<K>> {
    keys.into_iter().flatten().filter_map(|key| cache.objects.get(key).cloned()).collect()
}

fn forget(index: &mut HashMap<String, HashSet<Key>>, value: &str, key: &Key) {
    if let Some(keys) = index.get_mut(value) {
        keys.remove(key);
        if keys.is_empty() {
            index.remove(value);
        }
    }
}

/// Growing pauses between attempts of a watch: 50 ms, doubled up to 10 s, each shortened at random by up to a half.
#[derive(Default)]
pub struct Backoff {
    attempts: u32,
}

impl Backoff {
    pub fn next_delay(&mut self) -> Duration {
        let full = Duration::from_millis(50).saturating_mul(1 << self.attempts.min(8)).min(Duration::from_secs(10));
        self.attempts = self.attempts.saturating_add(1);
        full.mul_f64(rand::random_range(0.5..1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::ConfigMap;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
    use parking_lot::Mutex;

    fn object(name: &str, uid: &str, version: &str, owner: Option<&str>) -> ConfigMap {
        ConfigMap {
            metadata: ObjectMeta {
                namespace: Some("ns".into()),
                name: Some(name.into()),
                uid: Some(uid.into()),
                resource_version: Some(version.into()),
                owner_references: owner.map(|uid| vec![OwnerReference { uid: uid.into(), ..Default::default() }]),
                ..Default::default()
            },
            ..Default::default()
        }
    }

    fn recorded() -> (Arc<Informer<ConfigMap>>, Arc<Mutex<Vec<String>>>) {
        let informer = Informer::<ConfigMap>::new(|_| {});
        let log = Arc::new(Mutex::new(Vec::new()));
        let sink = log.clone();
        informer.on_change(move |change| {
            let verb = match change {
                Change::Added(_) => "add",
                Change::Updated { .. } => "update",
                Change::Deleted(_) => "delete",
            };
            sink.lock().push(format!("{verb} {}", change.object().name_any()));
        });
        (informer, log)
    }

    #[test]
    fn relist_reports_what_was_missed_and_stays_silent_about_the_rest() {
        let (informer, log) = recorded();
        let mut seen = HashSet::new();
        for event in [
            Event::Init,
            Event::InitApply(object("kept", "1", "1", None)),
            Event::InitApply(object("lost", "2", "2", None)),
            Event::InitApply(object("reborn", "3", "3", None)),
            Event::InitDone,
        ] {
            informer.absorb(event, &mut seen);
        }
        assert!(informer.is_synced());
        log.lock().clear();
        for event in [
            Event::Init,
            Event::InitApply(object("kept", "1", "1", None)),
            Event::InitApply(object("reborn", "4", "9", None)),
            Event::InitDone,
        ] {
            informer.absorb(event, &mut seen);
        }
        assert_eq!(*log.lock(), ["delete reborn", "add reborn", "delete lost"]);
    }

    #[test]
    fn owner_index_follows_updates_and_deletes() {
        let (informer, _) = recorded();
        let mut seen = HashSet::new();
        informer.absorb(Event::Apply(object("a", "1", "1", Some("owner"))), &mut seen);
        assert_eq!(informer.owned_by("owner").len(), 1);
        informer.absorb(Event::Apply(object("a", "1", "2", None)), &mut seen);
        assert!(informer.owned_by("owner").is_empty());
        informer.absorb(Event::Apply(object("a", "1", "3", Some("owner"))), &mut seen);
        informer.absorb(Event::Delete(object("a", "1", "4", Some("owner"))), &mut seen);
        assert!(informer.owned_by("owner").is_empty());
        assert!(informer.in_namespace("ns").is_empty());
    }
}
