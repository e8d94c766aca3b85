//! Watching the config maps and secrets that pods mount, one object a watch, so that their volumes follow within a moment.
//!
//! Owns who refers to what and the watches themselves; keeps no content. A node may read only what its pods refer to, object by
//! object, so a watch names its object. Objects that never change are not watched; neither are those beyond a bound, whose
//! volumes then follow at the next regular refresh.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt::Debug;

use futures::StreamExt;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use kube::runtime::watcher;
use kube::{Api, Resource, ResourceExt};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::model::PodUid;
use crate::objects::Delays;
use crate::pods::News;
use crate::spec;

/// Each watch is a connection.
const MOST: usize = 128;
/// Every namespace has one and every pod mounts it; it changes only with the cluster's authority.
const ROOT_CA: &str = "kube-root-ca.crt";

/// What a watch is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Kind {
    ConfigMap,
    Secret,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Object {
    kind: Kind,
    namespace: String,
    name: String,
}

struct Watch {
    users: HashSet<PodUid>,
    _task: AbortOnDropHandle<()>,
}

/// The watches of all pods.
pub(crate) struct Watched {
    client: kube::Client,
    news: mpsc::Sender<News>,
    watches: Mutex<HashMap<Object, Watch>>,
}

/// The objects whose contents a pod's volumes show.
fn mounted(pod: &Pod) -> BTreeSet<Object> {
    let mut found = BTreeSet::new();
    let mut add = |kind: Kind, name: &str| {
        if !name.is_empty() && name != ROOT_CA {
            found.insert(Object { kind, namespace: spec::pod_namespace(pod).to_owned(), name: name.to_owned() });
        }
    };
    for volume in pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten()) {
        if let Some(source) = &volume.config_map {
            add(Kind::ConfigMap, &source.name);
        }
        if let Some(source) = &volume.secret {
            add(Kind::Secret, source.secret_name.as_deref().unwrap_or_default());
        }
        for source in volume.projected.iter().flat_map(|projected| projected.sources.iter().flatten()) {
            if let Some(source) = &source.config_map {
                add(Kind::ConfigMap, &source.name);
            }
            if let Some(source) = &source.secret {
                add(Kind::Secret, &source.name);
            }
        }
    }
    found
}

impl Watched {
    pub(crate) fn new(client: kube::Client, news: mpsc::Sender<News>) -> std::sync::Arc<Self> {
        std::sync::Arc::new(Self { client, news, watches: Mutex::default() })
    }

    /// Watches what the pod mounts from now on, and no longer what only it mounted before.
    pub(crate) fn follow(self: &std::sync::Arc<Self>, uid: &PodUid, pod: &Pod) {
        let wanted = if spec::is_static(pod) { BTreeSet::new() } else { mounted(pod) };
        let mut watches = self.watches.lock();
        watches.retain(|object, watch| {
            if !wanted.contains(object) {
                watch.users.remove(uid);
            }
            !watch.users.is_empty()
        });
        for object in wanted {
            if let Some(watch) = watches.get_mut(&object) {
                watch.users.insert(uid.clone());
            } else if watches.len() < MOST {
                let task = tokio::spawn(self.clone().watch(object.clone()));
                let watch = Watch { users: HashSet::from([uid.clone()]), _task: AbortOnDropHandle::new(task) };
                watches.insert(object, watch);
            }
        }
    }

    /// The pod is gone.
    pub(crate) fn forget(&self, uid: &PodUid) {
        self.watches.lock().retain(|_, watch| {
            watch.users.remove(uid);
            !watch.users.is_empty()
        });
    }

    async fn watch(self: std::sync::Arc<Self>, object: Object) {
        let Object { kind, namespace, name } = &object;
        match kind {
            Kind::ConfigMap => {
                let api = Api::<ConfigMap>::namespaced(self.client.clone(), namespace);
                self.watch_one(api, name, &object, |map| map.immutable == Some(true)).await;
            }
            Kind::Secret => {
                let api = Api::<Secret>::namespaced(self.client.clone(), namespace);
                self.watch_one(api, name, &object, |secret| secret.immutable == Some(true)).await;
            }
        }
    }

    /// Tells of each new version. Ends only for an object that cannot change.
    async fn watch_one<K>(&self, api: Api<K>, name: &str, object: &Object, fixed: fn(&K) -> bool)
    where
        K: Resource<Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned + Send + 'static,
        K::DynamicType: Default,
    {
        let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
        let mut events = watcher(api, config).boxed();
        let mut delays = Delays::default();
        let mut version = None;
        let never = CancellationToken::new();
        while let Some(event) = events.next().await {
            let next = match event {
                Ok(watcher::Event::Apply(found) | watcher::Event::InitApply(found)) => {
                    if fixed(&found) {
                        return;
                    }
                    delays.reset();
                    found.resource_version()
                }
                // Volumes keep what was there; a new object of the name is told when it comes.
                Ok(_) => continue,
                Err(error) => {
                    tracing::debug!(object = name, %error, "the watch of a mounted object was interrupted");
                    delays.wait(&never).await;
                    continue;
                }
            };
            if next != version {
                version = next;
                self.tell(object).await;
            }
        }
    }

    async fn tell(&self, object: &Object) {
        let users: Vec<PodUid> =
            self.watches.lock().get(object).map(|watch| watch.users.iter().cloned().collect()).unwrap_or_default();
        for uid in users {
            let _ = self.news.send(News::ContentChanged(uid)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_volume_with_an_objects_content_is_found_once() {
        let pod: Pod = serde_json::from_value(serde_json::json!({"metadata": {"name": "p", "namespace": "n"}, "spec": {
            "containers": [], "volumes": [
                {"name": "a", "configMap": {"name": "settings"}}, {"name": "b", "secret": {"secretName": "key"}},
                {"name": "c", "projected": {"sources": [{"configMap": {"name": "settings"}}, {"secret": {"name": "other"}},
                    {"configMap": {"name": "kube-root-ca.crt"}}, {"serviceAccountToken": {"path": "t"}}]}},
                {"name": "d", "emptyDir": {}}]}}))
        .expect("a pod");
        let names: Vec<String> = mounted(&pod).into_iter().map(|object| object.name).collect();
        assert_eq!(names, ["settings", "key", "other"]);
    }
}
