//! Endpoints that somebody else keeps, for a Service without selector, shown as EndpointSlices. What they say is decided in
//! `mirrored`; this file reads caches and sends requests.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Endpoints, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::PostParams;
use kube::{Api, ResourceExt};
use oarlock_machinery::{ApiError, EventType, Key, Next, Recorder, WorkQueue, call, queue};
use tokio_util::sync::CancellationToken;

use super::echo::{ECHO_LIMIT, Echoes};
use super::{SERVICE_NAME_LABEL, delete_slices, mirrored};
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
        let api: Api<EndpointSlice> = Api::namespaced(self.shared.client.clone(), &key.namespace);
        let Some(endpoints) = source else {
            return delete_slices(&api, existing).await.map(|()| Next::Done);
        };
        let plan = mirrored::plan(&endpoints, &existing);
        self.tell(&endpoints, &plan);
        if endpoints.metadata.deletion_timestamp.is_none() {
            for slice in plan.create {
                match call("create endpointslice", api.create(&PostParams::default(), &slice)).await {
                    Ok(created) => self.written.note(&key, &created, &self.shared.endpoint_slices),
                    Err(error) if error.is_namespace_terminating() => {}
                    Err(error) => return Err(error),
                }
            }
        }
        for slice in plan.update {
            let written =
                call("replace endpointslice", api.replace(&slice.name_any(), &PostParams::default(), &slice)).await?;
            self.written.note(&key, &written, &self.shared.endpoint_slices);
        }
        delete_slices(&api, plan.delete).await?;
        Ok(Next::Done)
    }

    fn tell(&self, endpoints: &Endpoints, plan: &mirrored::Plan) {
        let warn = |reason, message| self.recorder.event(endpoints, EventType::Warning, reason, message);
        if plan.invalid > 0 {
            let message = format!("Skipped {} invalid IP addresses when mirroring to EndpointSlices", plan.invalid);
            warn("InvalidIPAddress", message);
        }
        if plan.skipped > plan.invalid {
            let message = format!(
                "A max of {} addresses can be mirrored to EndpointSlices per Endpoints subset. {} addresses were skipped",
                mirrored::MAX_ADDRESSES,
                plan.skipped
            );
            warn("TooManyAddressesToMirror", message);
        }
    }
}

fn has_selector(service: &Service) -> bool {
    let selector = service.spec.as_ref().and_then(|spec| spec.selector.as_ref());
    selector.is_some_and(|selector| !selector.is_empty())
}
