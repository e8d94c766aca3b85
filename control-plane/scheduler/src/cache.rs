//! The nodes and the pods on them, kept up to date event by event; a pod that was given a node counts there from that
//! moment, before the API knows it. Pure.

use std::collections::HashMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Taint};
use kube::ResourceExt;

use crate::pod::PodInfo;
use crate::resources::Resources;
use crate::storage::Storage;
use crate::terms::{Labels, Namespaces};

/// A node with what is on it.
#[derive(Clone, Debug, Default)]
pub(crate) struct NodeInfo {
    pub name: String,
    /// Whether the node object is known; pods may be known before their node.
    pub known: bool,
    pub labels: Labels,
    pub taints: Vec<Taint>,
    pub unschedulable: bool,
    pub allocatable: Resources,
    pub max_pods: i64,
    /// Image name to size in bytes.
    pub images: HashMap<String, i64>,
    pub pods: HashMap<String, Arc<PodInfo>>,
    pub requested: Resources,
    pub usage: Resources,
}

impl NodeInfo {
    pub fn add(&mut self, pod: Arc<PodInfo>) {
        if let Some(old) = self.pods.get(&pod.uid).cloned() {
            self.remove(&old.uid);
        }
        self.requested.add(&pod.requests);
        self.usage.add(&pod.usage);
        self.pods.insert(pod.uid.clone(), pod);
    }

    pub fn remove(&mut self, uid: &str) -> Option<Arc<PodInfo>> {
        let pod = self.pods.remove(uid)?;
        self.requested.subtract(&pod.requests);
        self.usage.subtract(&pod.usage);
        Some(pod)
    }

    /// Takes over what the node object says. Returns whether a pod that did not fit might fit now.
    fn update(&mut self, node: &Node) -> bool {
        let status = node.status.as_ref();
        let allocatable = status.and_then(|status| status.allocatable.as_ref().or(status.capacity.as_ref()));
        let spec = node.spec.as_ref();
        let before = (
            self.known,
            std::mem::take(&mut self.labels),
            std::mem::take(&mut self.taints),
            self.unschedulable,
            std::mem::take(&mut self.allocatable),
            self.max_pods,
        );
        self.known = true;
        self.labels = node.labels().clone();
        self.taints = spec.and_then(|spec| spec.taints.clone()).unwrap_or_default();
        self.unschedulable = spec.and_then(|spec| spec.unschedulable).unwrap_or(false);
        self.allocatable = Resources::from_quantities(allocatable);
        let pods = allocatable.and_then(|resources| resources.get("pods"));
        self.max_pods = pods.map_or(0, oarlock_machinery::quantity::value);
        let images = status.and_then(|status| status.images.as_ref());
        self.images = images
            .into_iter()
            .flatten()
            .flat_map(|image| {
                let size = image.size_bytes.unwrap_or(0);
                image.names.iter().flatten().map(move |name| (name.clone(), size))
            })
            .collect();
        before.0 != self.known
            || before.1 != self.labels
            || before.2 != self.taints
            || before.3 != self.unschedulable
            || before.4 != self.allocatable
            || before.5 != self.max_pods
    }
}

/// Everything the scheduler knows about the cluster.
#[derive(Debug, Default)]
pub(crate) struct Cache {
    nodes: Vec<NodeInfo>,
    by_name: HashMap<String, usize>,
    /// Where each pod is, by uid.
    place: HashMap<String, String>,
    /// Pods that were given a node here and that the API has not confirmed.
    assumed: HashMap<String, Arc<PodInfo>>,
    pub namespaces: Namespaces,
    pub storage: Storage,
}

impl Cache {
    /// Nodes that a pod may be put on.
    pub fn nodes(&self) -> impl Iterator<Item = &NodeInfo> + Clone {
        self.nodes.iter().filter(|node| node.known)
    }

    pub fn node(&self, name: &str) -> Option<&NodeInfo> {
        self.by_name.get(name).map(|index| &self.nodes[*index])
    }

    fn entry(&mut self, name: &str) -> &mut NodeInfo {
        let index = *self.by_name.entry(name.to_owned()).or_insert_with(|| {
            self.nodes.push(NodeInfo { name: name.to_owned(), ..Default::default() });
            self.nodes.len() - 1
        });
        &mut self.nodes[index]
    }

    /// A node was added or changed; true if that may help a waiting pod.
    pub fn update_node(&mut self, node: &Node) -> bool {
        self.entry(&node.name_any()).update(node)
    }

    pub fn remove_node(&mut self, name: &str) {
        let Some(index) = self.by_name.get(name).copied() else { return };
        self.nodes[index].known = false;
        self.drop_if_empty(name);
    }

    fn drop_if_empty(&mut self, name: &str) {
        let Some(index) = self.by_name.get(name).copied() else { return };
        if self.nodes[index].known || !self.nodes[index].pods.is_empty() {
            return;
        }
        self.by_name.remove(name);
        self.nodes.swap_remove(index);
        if let Some(moved) = self.nodes.get(index) {
            self.by_name.insert(moved.name.clone(), index);
        }
    }

    /// The API says that the pod is on its node.
    pub fn put(&mut self, pod: Arc<PodInfo>) {
        self.assumed.remove(&pod.uid);
        self.place_at(pod.node_name.clone(), pod);
    }

    fn place_at(&mut self, node: String, pod: Arc<PodInfo>) {
        let uid = pod.uid.clone();
        if self.place.get(&uid).is_some_and(|place| *place != node) {
            self.take_away(&uid);
        }
        self.entry(&node).add(pod);
        self.place.insert(uid, node);
    }

    /// Counts the pod on `node` before the API does.
    pub fn assume(&mut self, pod: &Arc<PodInfo>, node: &str) {
        self.assumed.insert(pod.uid.clone(), pod.clone());
        self.place_at(node.to_owned(), pod.clone());
    }

    /// The binding failed. A pod that was confirmed or is gone meanwhile stays as it is.
    pub fn forget_assumed(&mut self, uid: &str) {
        if self.assumed.remove(uid).is_some() {
            self.take_away(uid);
        }
    }

    pub fn is_assumed(&self, uid: &str) -> bool {
        self.assumed.contains_key(uid)
    }

    /// The pod is gone; true if it was on a node.
    pub fn remove(&mut self, uid: &str) -> bool {
        self.assumed.remove(uid);
        self.take_away(uid)
    }

    fn take_away(&mut self, uid: &str) -> bool {
        let Some(node) = self.place.remove(uid) else { return false };
        self.entry(&node).remove(uid);
        self.drop_if_empty(&node);
        true
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    /// A node with 4 cores, 8 GiB and 110 pods, changed by `extra`.
    pub(crate) fn node(name: &str, extra: Value) -> Node {
        let mut value = json!({
            "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
            "spec": {},
            "status": {"allocatable": {"cpu": "4", "memory": "8Gi", "pods": "110"}},
        });
        merge(&mut value, &extra);
        serde_json::from_value(value).unwrap()
    }

    pub(crate) fn pod(name: &str, extra: Value) -> Arc<PodInfo> {
        let mut value = json!({
            "metadata": {"name": name, "namespace": "default", "uid": name},
            "spec": {"containers": [{"name": "c", "image": "i"}]},
        });
        merge(&mut value, &extra);
        PodInfo::compile(&serde_json::from_value(value).unwrap()).unwrap()
    }

    pub(crate) fn cpu(amount: &str) -> Value {
        json!({"spec": {"containers": [{"name": "c", "resources": {"requests": {"cpu": amount}}}]}})
    }

    pub(crate) fn merge(target: &mut Value, patch: &Value) {
        match (target, patch) {
            (Value::Object(target), Value::Object(patch)) => {
                for (key, value) in patch {
                    merge(target.entry(key.clone()).or_insert(Value::Null), value);
                }
            }
            (target, patch) => *target = patch.clone(),
        }
    }

    pub(crate) fn cache(nodes: &[Node], pods: &[Arc<PodInfo>]) -> Cache {
        let mut cache = Cache::default();
        nodes.iter().for_each(|node| {
            cache.update_node(node);
        });
        pods.iter().for_each(|pod| cache.put(pod.clone()));
        cache
    }

    #[test]
    fn an_assumed_pod_counts_until_it_is_confirmed_forgotten_or_gone() {
        let mut cache = cache(&[node("n1", json!({}))], &[]);
        let waiting = pod("p", cpu("1"));
        cache.assume(&waiting, "n1");
        assert_eq!(cache.node("n1").unwrap().requested.cpu_milli, 1000);
        cache.forget_assumed("p");
        assert_eq!(cache.node("n1").unwrap().requested.cpu_milli, 0);
        cache.assume(&waiting, "n1");
        let mut confirmed = cpu("1");
        confirmed["spec"]["nodeName"] = json!("n1");
        cache.put(pod("p", confirmed));
        cache.forget_assumed("p");
        assert_eq!(cache.node("n1").unwrap().requested.cpu_milli, 1000, "a late failure changes nothing");
        assert!(cache.remove("p"));
        assert_eq!(cache.node("n1").unwrap().pods.len(), 0);
    }

    #[test]
    fn pods_known_before_their_node_count_when_it_comes() {
        let mut early = cpu("2");
        early["spec"]["nodeName"] = json!("late");
        let mut cache = cache(&[], &[pod("p", early)]);
        assert_eq!(cache.nodes().count(), 0);
        assert!(cache.update_node(&node("late", json!({}))));
        assert_eq!(cache.nodes().next().unwrap().requested.cpu_milli, 2000);
        cache.remove_node("late");
        assert_eq!(cache.nodes().count(), 0);
        cache.remove("p");
        assert!(cache.node("late").is_none());
    }

    #[test]
    fn a_heartbeat_is_no_reason_to_try_again() {
        let mut cache = cache(&[node("n", json!({}))], &[]);
        let beat = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}], "images": []}});
        assert!(!cache.update_node(&node("n", beat)));
        assert!(cache.update_node(&node("n", json!({"spec": {"unschedulable": true}}))));
    }

    proptest! {
        #[test]
        fn sums_always_match_the_pods(steps in proptest::collection::vec((0u8..6, 0u8..3, 0u8..5), 1..80)) {
            let mut cache = cache(&[node("n0", json!({})), node("n1", json!({}))], &[]);
            for (uid, node_number, action) in steps {
                let (uid, place) = (format!("p{uid}"), format!("n{node_number}"));
                let mut extra = cpu("100m");
                match action {
                    0 => cache.assume(&pod(&uid, extra), &place),
                    1 => { extra["spec"]["nodeName"] = json!(place); cache.put(pod(&uid, extra)); }
                    2 => cache.forget_assumed(&uid),
                    3 => drop(cache.remove(&uid)),
                    _ => { cache.remove_node(&place); cache.update_node(&node(&place, json!({}))); }
                }
                let mut seen = 0;
                for info in &cache.nodes {
                    prop_assert_eq!(info.requested.cpu_milli, 100 * info.pods.len() as i64);
                    prop_assert_eq!(&cache.nodes[cache.by_name[&info.name]].name, &info.name);
                    seen += info.pods.len();
                }
                prop_assert_eq!(seen, cache.place.len());
            }
        }
    }
}
