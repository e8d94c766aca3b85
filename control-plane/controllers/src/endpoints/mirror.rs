//! Endpoints that somebody else keeps, for a Service without selector, shown as EndpointSlices. What they say is decided in
//! `mirrored`; this file reads caches.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Endpoints, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::ResourceExt;
use oarlock_machinery::{ApiError, EventType, Key, Next, Recorder, WorkQueue, queue};
use tokio_util::sync::CancellationToken;

use super::echo::{ECHO_LIMIT, Echoes};
use super::mirrored::LeftOut;
use super::plan::Plan;
use super::{SERVICE_NAME_LABEL, mirrored};
use crate::shared::{Shared, Task};

const CONCURRENCY: usize = 5;

struct Controller {
    shared: Arc<Shared>,
    recorder: Recorder,
    queue: Arc<WorkQueue<Key>>,
    written: Echoes,
}

pub(crate) fn start(shared: &Arc<Shared>, stop: &CancellationToken) -> Task {
    let controller = Arc::new(Controller {
        shared: shared.clone(),
        recorder: shared.recorder.named("endpoint-slice-mirroring-controller"),
        queue: WorkQueue::new(),
        written: Echoes::default(),
    });
    let listener = controller.clone();
    shared.services.on_change(move |change| listener.queue.add(Key::of(change.object().as_ref())));
    let listener = controller.clone();
    shared.endpoints.on_change(move |change| listener.queue.add(Key::of(change.object().as_ref())));
    let listener = controller.clone();
    shared.endpoint_slices.on_change(move |change| listener.slice_changed(change.object()));
    let stop = stop.clone();
    Box::pin(async move {
        let shared = controller.shared.clone();
        shared.services.wait_synced().await;
        shared.endpoints.wait_synced().await;
        shared.endpoint_slices.wait_synced().await;
        let name = "endpointslicemirroring";
        queue::work(name, controller.queue.clone(), CONCURRENCY, stop, |key| controller.clone().reconcile(key)).await;
    })
}

impl Controller {
    fn slice_changed(&self, slice: &EndpointSlice) {
        let Some(service) = slice.labels().get(SERVICE_NAME_LABEL).filter(|_| mirrored::is_ours(slice)) else { return };
        let service = Key::new(slice.namespace().unwrap_or_default(), service.clone());
        self.written.hear(&service, slice);
        self.queue.add(service);
    }

    /// The object to be mirrored, if any is.
    fn source(&self, key: &Key) -> Option<Arc<Endpoints>> {
        let service = self.shared.services.get_key(key)?;
        let endpoints = self.shared.endpoints.get_key(key)?;
        (!has_selector(&service) && mirrored::is_wanted(&endpoints)).then_some(endpoints)
    }

    async fn reconcile(self: Arc<Self>, key: Key) -> Result<Next, ApiError> {
        let is_caught_up = self.written.is_caught_up(&key);
        let mut existing = self.shared.endpoint_slices.indexed(&format!("{}/{}", key.namespace, key.name));
        existing.retain(|slice| mirrored::is_ours(slice));
        let source = self.source(&key);
        if source.is_none() && existing.is_empty() && is_caught_up {
            return Ok(Next::Done);
        }
        if !is_caught_up {
            // The echo of the write brings us back; the delay is for the echo that never comes.
            return Ok(Next::After(ECHO_LIMIT));
        }
        let Some(endpoints) = source else {
            let plan = Plan::without(existing);
            return plan.carry_out(&self.shared, &key, &self.written).await.map(|()| Next::Done);
        };
        let (mut plan, left_out) = mirrored::plan(&endpoints, &existing);
        self.tell(&endpoints, left_out);
        if endpoints.metadata.deletion_timestamp.is_some() {
            plan.create.clear();
        }
        plan.carry_out(&self.shared, &key, &self.written).await.map(|()| Next::Done)
    }

    fn tell(&self, endpoints: &Endpoints, left_out: LeftOut) {
        let warn = |reason, message| self.recorder.event(endpoints, EventType::Warning, reason, message);
        if left_out.invalid > 0 {
            let message = format!("Skipped {} invalid IP addresses when mirroring to EndpointSlices", left_out.invalid);
            warn("InvalidIPAddress", message);
        }
        if left_out.all > left_out.invalid {
            let message = format!(
                "A max of {} addresses can be mirrored to EndpointSlices per Endpoints subset. {} addresses were skipped",
                mirrored::MAX_ADDRESSES,
                left_out.all
            );
            warn("TooManyAddressesToMirror", message);
        }
    }
}

fn has_selector(service: &Service) -> bool {
    let selector = service.spec.as_ref().and_then(|spec| spec.selector.as_ref());
    selector.is_some_and(|selector| !selector.is_empty())
}
