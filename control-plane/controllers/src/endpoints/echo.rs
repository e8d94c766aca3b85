//! What was written and has not come back by the watch: until it has, the cache is not to be planned from.

use std::collections::HashMap;
use std::time::Duration;

use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::ResourceExt;
use oarlock_machinery::{Informer, Key};
use parking_lot::Mutex;
use tokio::time::Instant;

/// A write that has not come back by then never will: the slice was deleted at once.
pub(super) const ECHO_LIMIT: Duration = Duration::from_secs(10);

/// By Service: versions of slices that were written here and have not come back, and when.
#[derive(Default)]
pub(super) struct Echoes {
    written: Mutex<HashMap<Key, HashMap<String, Written>>>,
}

struct Written {
    version: u64,
    at: Instant,
}

impl Echoes {
    /// Takes note of a write that was answered with `slice`.
    pub(super) fn note(&self, service: &Key, slice: &EndpointSlice, cache: &Informer<EndpointSlice>) {
        let written = Written { version: version(slice), at: Instant::now() };
        self.written.lock().entry(service.clone()).or_default().insert(slice.name_any(), written);
        // The echo may have been quicker than the answer.
        if let Some(seen) = cache.get_key(&Key::of(slice)) {
            self.hear(service, &seen);
        }
    }

    /// Takes note of a slice as the watch tells it.
    pub(super) fn hear(&self, service: &Key, seen: &EndpointSlice) {
        let mut written = self.written.lock();
        let Some(slices) = written.get_mut(service) else { return };
        let name = seen.name_any();
        if slices.get(&name).is_some_and(|written| written.version <= version(seen)) {
            slices.remove(&name);
        }
        if slices.is_empty() {
            written.remove(service);
        }
    }

    /// Whether everything that was written for the Service has come back. To be asked before the cache is read: what is read
    /// afterwards includes everything that was written.
    pub(super) fn is_caught_up(&self, service: &Key) -> bool {
        let mut written = self.written.lock();
        let Some(slices) = written.get_mut(service) else { return true };
        slices.retain(|_, written| written.at.elapsed() < ECHO_LIMIT);
        slices.is_empty()
    }
}

fn version(slice: &EndpointSlice) -> u64 {
    slice.metadata.resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or(u64::MAX)
}
