//! Endpoints of Services: EndpointSlices (`slices`, with the time of their cause by `trigger`), the older Endpoints
//! (`legacy`), and the slices of those that somebody else keeps (`mirror`). Which pods count and how is decided in `backends`;
//! this file reads caches and writes the older Endpoints, `plan` writes slices.

mod backends;
mod echo;
mod legacy;
pub(crate) mod mirror;
mod mirrored;
mod plan;
mod slices;
mod topology;
mod trigger;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Endpoints, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{DeleteParams, PostParams, Preconditions};
use kube::{Api, ResourceExt};
use oarlock_machinery::{ApiError, Change, Key, Next, Selector, WorkQueue, call, queue};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use crate::shared::{Shared, Task};
use echo::{ECHO_LIMIT, Echoes};
use plan::Plan;
use trigger::{Times, Triggers};

pub(crate) const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
const CONCURRENCY: usize = 8;

struct Controller {
    shared: Arc<Shared>,
    slices: Arc<WorkQueue<Key>>,
    endpoints: Arc<WorkQueue<Key>>,
    written: Echoes,
    triggers: Triggers,
    /// Services that were seen to go, whose Endpoints go with them, whoever keeps those.
    gone: Mutex<HashSet<Key>>,
}

pub(crate) fn start(shared: &Arc<Shared>, stop: &CancellationToken) -> Task {
    let controller = Arc::new(Controller {
        shared: shared.clone(),
        slices: WorkQueue::new(),
        endpoints: WorkQueue::new(),
        written: Echoes::default(),
        triggers: Triggers::default(),
        gone: Mutex::default(),
    });
    let listener = controller.clone();
    shared.services.on_change(move |change| {
        let key = Key::of(change.object().as_ref());
        if matches!(change, Change::Deleted(_)) {
            listener.gone.lock().insert(key.clone());
        }
        listener.want(key);
    });
    let listener = controller.clone();
    shared.pods.on_change(move |change| listener.pod_changed(change));
    let listener = controller.clone();
    shared.nodes.on_change(move |change| listener.node_changed(change));
    let listener = controller.clone();
    shared.endpoint_slices.on_change(move |change| listener.slice_changed(change));
    let listener = controller.clone();
    shared.endpoints.on_change(move |change| listener.endpoints.add(Key::of(change.object().as_ref())));
    let stop = stop.clone();
    Box::pin(async move {
        let shared = controller.shared.clone();
        shared.services.wait_synced().await;
        shared.pods.wait_synced().await;
        shared.nodes.wait_synced().await;
        shared.endpoint_slices.wait_synced().await;
        shared.endpoints.wait_synced().await;
        let slices = queue::work("endpointslice", controller.slices.clone(), CONCURRENCY, stop.clone(), |key| {
            controller.clone().reconcile_slices(key)
        });
        let endpoints = queue::work("endpoints", controller.endpoints.clone(), CONCURRENCY, stop, |key| {
            controller.clone().reconcile_endpoints(key)
        });
        tokio::join!(slices, endpoints);
    })
}

impl Controller {
    fn want(&self, key: Key) {
        self.slices.add(key.clone());
        self.endpoints.add(key);
    }

    fn pod_changed(&self, change: &Change<'_, Pod>) {
        let relevant = match change {
            Change::Added(_) | Change::Deleted(_) => true,
            Change::Updated { old, new } => backends::differ(old, new),
        };
        if !relevant {
            return;
        }
        let pod = change.object();
        let before = match change {
            Change::Updated { old, .. } => old.metadata.labels.as_ref(),
            _ => None,
        };
        for service in self.shared.services.in_namespace(&pod.namespace().unwrap_or_default()) {
            let Some(selector) = selector(&service) else { continue };
            if selector.matches(pod.metadata.labels.as_ref()) || (before.is_some() && selector.matches(before)) {
                self.want(Key::of(service.as_ref()));
            }
        }
    }

    /// A node's zone matters to all Services, and what else decides about zones' shares to those that go by them.
    fn node_changed(&self, change: &Change<'_, k8s_openapi::api::core::v1::Node>) {
        let (is_moved, is_resized) = match change {
            Change::Updated { old, new } => {
                (backends::zone(old) != backends::zone(new), topology::of_node(old) != topology::of_node(new))
            }
            _ => (false, true),
        };
        if !is_moved && !is_resized {
            return;
        }
        for service in self.shared.services.list() {
            if is_moved || topology::is_automatic(&service) {
                self.slices.add(Key::of(service.as_ref()));
            }
        }
    }

    /// The zones' shares of the cluster, for a Service whose endpoints go by them.
    fn shares(&self, service: &Service) -> Option<BTreeMap<String, f64>> {
        let nodes = topology::is_automatic(service).then(|| self.shared.nodes.list())?;
        topology::shares(nodes.iter().filter_map(|node| topology::of_node(node)))
    }

    fn slice_changed(&self, change: &Change<'_, EndpointSlice>) {
        let slice = change.object();
        let Some(service) = slice.labels().get(SERVICE_NAME_LABEL).filter(|_| slices::is_ours(slice)) else { return };
        let service = Key::new(slice.namespace().unwrap_or_default(), service.clone());
        self.written.hear(&service, slice);
        self.slices.add(service);
    }

    fn backends(&self, service: &Service, selector: &Selector) -> Vec<Arc<Pod>> {
        let pods = self.shared.pods.in_namespace(&service.namespace().unwrap_or_default());
        let mut pods: Vec<Arc<Pod>> =
            pods.into_iter().filter(|pod| selector.matches(pod.metadata.labels.as_ref())).collect();
        pods.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
        pods
    }

    async fn reconcile_slices(self: Arc<Self>, key: Key) -> Result<Next, ApiError> {
        let caught_up = self.written.is_caught_up(&key);
        let index = format!("{}/{}", key.namespace, key.name);
        let mut existing = self.shared.endpoint_slices.indexed(&index);
        existing.retain(|slice| slices::is_ours(slice));
        let Some(service) = self.shared.services.get_key(&key) else {
            self.triggers.forget(&key);
            let plan = Plan::without(existing);
            return plan.carry_out(&self.shared, &key, &self.written).await.map(|()| Next::Done);
        };
        if service.metadata.deletion_timestamp.is_some() {
            return Ok(Next::Done);
        }
        let Some(selector) = selector(&service) else { return Ok(Next::Done) };
        if !caught_up {
            // The echo of the write brings us back; the delay is for the echo that never comes.
            return Ok(Next::After(ECHO_LIMIT));
        }
        let zone_of = |node: &str| self.shared.nodes.get("", node).and_then(|node| backends::zone(&node).cloned());
        let (pods, shares) = (self.backends(&service, &selector), self.shares(&service));
        let mut plan = slices::plan(&service, &pods, &existing, zone_of, shares.as_ref());
        let times = Times::of(&service, &pods);
        let trigger = self.triggers.since_last(&key, &times);
        plan.create.iter_mut().chain(&mut plan.update).for_each(|slice| trigger::annotate(slice, trigger));
        plan.carry_out(&self.shared, &key, &self.written).await?;
        self.triggers.written(key, times);
        Ok(Next::Done)
    }

    async fn reconcile_endpoints(self: Arc<Self>, key: Key) -> Result<Next, ApiError> {
        let api: Api<Endpoints> = Api::namespaced(self.shared.client.clone(), &key.namespace);
        let existing = self.shared.endpoints.get_key(&key);
        let Some(service) = self.shared.services.get_key(&key) else {
            // Endpoints without a Service may be somebody's own; those that had one go with it.
            let had_service = self.gone.lock().contains(&key);
            let is_orphan = |endpoints: &Arc<Endpoints>| had_service || legacy::is_ours(endpoints);
            let Some(orphan) = existing.filter(is_orphan) else {
                self.gone.lock().remove(&key);
                return Ok(Next::Done);
            };
            let parameters =
                DeleteParams::default().preconditions(Preconditions { uid: orphan.uid(), resource_version: None });
            return match call("delete endpoints", api.delete(&key.name, &parameters)).await {
                Err(error) if !(error.is_not_found() || error.is_conflict()) => Err(error),
                _ => {
                    self.gone.lock().remove(&key);
                    Ok(Next::Done)
                }
            };
        };
        self.gone.lock().remove(&key);
        if service.metadata.deletion_timestamp.is_some() {
            return Ok(Next::Done);
        }
        let Some(selector) = selector(&service) else { return Ok(Next::Done) };
        let wanted = legacy::plan(&service, &self.backends(&service, &selector));
        let result = match existing {
            None => call("create endpoints", api.create(&PostParams::default(), &wanted)).await,
            Some(existing) if legacy::same(&existing, &wanted) => return Ok(Next::Done),
            Some(existing) => {
                let wanted = legacy::over(&existing, wanted);
                call("replace endpoints", api.replace(&key.name, &PostParams::default(), &wanted)).await
            }
        };
        match result {
            Err(error) if error.is_namespace_terminating() => Ok(Next::Done),
            result => result.map(|_| Next::Done),
        }
    }
}

/// What a Service selects; `None` for one whose endpoints somebody else keeps.
fn selector(service: &Service) -> Option<Selector> {
    let spec = service.spec.as_ref()?;
    if spec.type_.as_deref() == Some("ExternalName") {
        return None;
    }
    spec.selector.as_ref().filter(|selector| !selector.is_empty()).map(Selector::from_map)
}

/// Address families of a Service; IPv4 where it does not say.
fn families(service: &Service) -> BTreeSet<&str> {
    let families = service.spec.as_ref().and_then(|spec| spec.ip_families.as_ref());
    let families: BTreeSet<&str> = families.into_iter().flatten().map(String::as_str).collect();
    if families.is_empty() { BTreeSet::from(["IPv4"]) } else { families }
}
