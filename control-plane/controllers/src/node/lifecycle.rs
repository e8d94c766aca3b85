//! Node life cycle: a node that stays silent becomes Unknown, its taints follow its conditions, and the pods on a
//! node that is not ready are not ready either. Decisions are in `health`.

use std::collections::HashMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, ObjectReference, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::{Api, ResourceExt};
use oarlock_machinery::{ApiError, Change, EventType, Next, Recorder, WorkQueue, merge, merge_status, queue};
use parking_lot::Mutex;
use serde_json::json;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::health::{self, Heard};
use crate::pods::{is_ready, is_terminal};
use crate::shared::{NODE_LEASE_NAMESPACE, Shared, Task};

const CONCURRENCY: usize = 4;

struct Controller {
    shared: Arc<Shared>,
    recorder: Recorder,
    queue: Arc<WorkQueue<String>>,
    heard: Mutex<HashMap<String, Heard>>,
}

pub(crate) fn start(shared: &Arc<Shared>, stop: &CancellationToken) -> Task {
    let controller = Arc::new(Controller {
        shared: shared.clone(),
        recorder: shared.recorder.named("node-controller"),
        queue: WorkQueue::new(),
        heard: Mutex::default(),
    });
    let listener = controller.clone();
    shared.nodes.on_change(move |change| listener.node_changed(change));
    let listener = controller.clone();
    shared.leases.on_change(move |change| listener.note_life(&change.object().name_any()));
    let stop = stop.clone();
    Box::pin(async move {
        controller.shared.nodes.wait_synced().await;
        controller.shared.leases.wait_synced().await;
        controller.shared.pods.wait_synced().await;
        let queue = controller.queue.clone();
        queue::work("node-lifecycle", queue, CONCURRENCY, stop, |name| controller.clone().reconcile(name)).await;
    })
}

impl Controller {
    fn node_changed(&self, change: &Change<'_, Node>) {
        let name = change.object().name_any();
        match change {
            Change::Added(node) => self.announce(node, "RegisteredNode", "Registered Node", "in Controller"),
            Change::Deleted(node) => {
                self.heard.lock().remove(&name);
                self.announce(node, "RemovingNode", "Removing Node", "from Controller");
                return;
            }
            Change::Updated { .. } => {}
        }
        self.note_life(&name);
        self.queue.add(name);
    }

    fn announce(&self, node: &Node, reason: &str, verb: &str, place: &str) {
        let name = node.name_any();
        self.record(&name, node.uid(), reason, format!("Node {name} event: {verb} {name} {place}"));
    }

    fn record(&self, name: &str, uid: Option<String>, reason: &str, message: String) {
        let about = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Node".to_owned()),
            name: Some(name.to_owned()),
            uid,
            ..Default::default()
        };
        self.recorder.event_about(about, EventType::Normal, reason, message);
    }

    /// Called on every renewal: cheap, and nothing is queued while all is well.
    fn note_life(&self, name: &str) {
        let Some(node) = self.shared.nodes.get("", name) else { return };
        let lease = self.shared.leases.get(NODE_LEASE_NAMESPACE, name);
        let renewed = lease.and_then(|lease| lease.spec.as_ref()?.renew_time.as_ref().map(|time| time.0));
        let mut all = self.heard.lock();
        let heard = health::listen(all.get(name), health::word(&node, renewed), Instant::now());
        all.insert(name.to_owned(), heard);
    }

    async fn reconcile(self: Arc<Self>, name: String) -> Result<Next, ApiError> {
        let Some(node) = self.shared.nodes.get("", &name) else { return Ok(Next::Done) };
        self.note_life(&name);
        let heard = self.heard.lock().get(&name).cloned();
        let left = heard.map_or(health::GRACE, |heard| health::time_left(&heard, Instant::now()));
        let api: Api<Node> = Api::all(self.shared.client.clone());
        if left.is_zero()
            && let Some(conditions) = health::silenced(&node, Timestamp::now())
        {
            self.record(&name, node.uid(), "NodeNotReady", format!("Node {name} status is now: NodeNotReady"));
            let patch = json!({"metadata": {"uid": node.uid()}, "status": {"conditions": conditions}});
            merge_status("patch node status", &api, &name, &patch).await?;
            // The change comes back by the watch, and the taints follow then.
            return Ok(Next::After(health::GRACE));
        }
        if let Some(taints) = health::taints(&node, Timestamp::now()) {
            // With the version that was read: a taint of somebody else must not be lost.
            let metadata = json!({"uid": node.uid(), "resourceVersion": node.resource_version()});
            let patch = json!({"metadata": metadata, "spec": {"taints": taints}});
            merge("patch node taints", &api, &name, &patch).await?;
        }
        let ready = health::condition(&node, "Ready").map(|ready| ready.status.as_str());
        if matches!(ready, Some("Unknown" | "False")) {
            self.mark_pods_not_ready(&name).await?;
        }
        // A lost node is heard of by an event; a living one must be missed in time.
        Ok(if left.is_zero() { Next::Done } else { Next::After(left) })
    }

    /// A pod on a node that is not ready serves nobody, and the node cannot say so itself.
    async fn mark_pods_not_ready(&self, node: &str) -> Result<(), ApiError> {
        for pod in self.shared.pods.indexed(node).into_iter().filter(|pod| is_ready(pod) && !is_terminal(pod)) {
            let api: Api<Pod> = Api::namespaced(self.shared.client.clone(), &pod.namespace().unwrap_or_default());
            let mut conditions = pod.status.as_ref().and_then(|status| status.conditions.clone()).unwrap_or_default();
            for condition in conditions.iter_mut().filter(|condition| condition.type_ == "Ready") {
                "False".clone_into(&mut condition.status);
                condition.last_transition_time =
                    Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(Timestamp::now()));
            }
            let metadata = json!({"uid": pod.uid(), "resourceVersion": pod.resource_version()});
            let patch = json!({"metadata": metadata, "status": {"conditions": conditions}});
            let name = pod.name_any();
            match merge_status("patch pod status", &api, &name, &patch).await {
                Err(error) if error.is_not_found() => {}
                result => drop(result?),
            }
            self.recorder.event(pod.as_ref(), EventType::Warning, "NodeNotReady", "Node is not ready");
        }
        Ok(())
    }
}
