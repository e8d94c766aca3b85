//! Which change of a pod or a Service an EndpointSlice is written for, and when that was, so that proxies can tell how long
//! it takes until packets go by it. As upstream's controller: the earliest time that is new since the last reconciliation.

use std::collections::HashMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use oarlock_machinery::Key;
use parking_lot::Mutex;

use crate::pods::ready_changed;

pub(super) const ANNOTATION: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// The times that are known of each Service.
#[derive(Default)]
pub(super) struct Triggers {
    known: Mutex<HashMap<Key, Times>>,
}

/// When a Service was made and its pods last became ready or unready.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Times {
    service: Option<Timestamp>,
    pods: HashMap<String, Timestamp>,
}

impl Times {
    pub(super) fn of(service: &Service, pods: &[Arc<Pod>]) -> Times {
        Times {
            service: service.metadata.creation_timestamp.as_ref().map(|time| time.0),
            pods: pods.iter().filter_map(|pod| Some((pod.name_any(), ready_changed(pod)?))).collect(),
        }
    }

    /// The earliest of these that is later than what it was `before`.
    fn first_since(&self, before: &Times) -> Option<Timestamp> {
        let pods = self.pods.iter().filter(|(name, time)| before.pods.get(*name).is_none_or(|before| before < *time));
        let service = self.service.filter(|time| before.service.is_none_or(|before| before < *time));
        pods.map(|(_, time)| *time).chain(service).min()
    }
}

impl Triggers {
    /// When what is new came about; for a Service that is new itself, when that was made.
    pub(super) fn since_last(&self, service: &Key, now: &Times) -> Option<Timestamp> {
        match self.known.lock().get(service) {
            Some(before) => now.first_since(before),
            None => now.service,
        }
    }

    /// Slices have been written by these times.
    pub(super) fn written(&self, service: Key, now: Times) {
        self.known.lock().insert(service, now);
    }

    pub(super) fn forget(&self, service: &Key) {
        self.known.lock().remove(service);
    }
}

/// Says in a slice which time it is written for; where there is none, that of an earlier writing goes.
pub(super) fn annotate(slice: &mut EndpointSlice, trigger: Option<Timestamp>) {
    match trigger {
        Some(time) => drop(slice.annotations_mut().insert(ANNOTATION.to_owned(), time.to_string())),
        None if slice.metadata.annotations.is_some() => drop(slice.annotations_mut().remove(ANNOTATION)),
        None => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn service() -> Service {
        serde_json::from_value(json!({"metadata": {"name": "web", "creationTimestamp": "2026-01-01T00:00:00Z"}}))
            .unwrap()
    }

    fn pods(seconds: &[u32]) -> Vec<Arc<Pod>> {
        let pod = |(number, second): (usize, &u32)| {
            let conditions = json!([{"type": "Ready", "status": "True",
                                     "lastTransitionTime": format!("2026-01-01T00:00:{second:02}Z")}]);
            let name = format!("p{number}");
            Arc::new(
                serde_json::from_value(json!({"metadata": {"name": name}, "status": {"conditions": conditions}}))
                    .unwrap(),
            )
        };
        seconds.iter().enumerate().map(pod).collect()
    }

    #[test]
    fn the_earliest_time_that_is_new_counts() {
        let (triggers, key) = (Triggers::default(), Key::new("ns".to_owned(), "web".to_owned()));
        let reconcile = |seconds: &[u32]| {
            let now = Times::of(&service(), &pods(seconds));
            let found = triggers.since_last(&key, &now).map(|time| time.to_string());
            triggers.written(key.clone(), now);
            found
        };
        let at = |second: u32| Some(format!("2026-01-01T00:00:{second:02}Z"));
        assert_eq!(reconcile(&[5, 9]), at(0), "the Service is new");
        assert_eq!(reconcile(&[5, 9]), None);
        assert_eq!(reconcile(&[20, 15]), at(15));
        assert_eq!(reconcile(&[20, 15, 30]), at(30));
        assert_eq!(reconcile(&[20]), None, "nothing tells when a pod went");
        triggers.forget(&key);
        let now = Times::of(&service(), &pods(&[5]));
        assert_eq!(triggers.since_last(&key, &now).map(|time| time.to_string()), at(0));
    }

    #[test]
    fn a_slice_that_is_written_without_a_known_cause_does_not_keep_an_old_time() {
        let mut slice = EndpointSlice::default();
        annotate(&mut slice, None);
        assert_eq!(slice.metadata.annotations, None);
        slice.annotations_mut().insert("other".to_owned(), "stays".to_owned());
        annotate(&mut slice, Some("2026-01-01T00:00:05.25Z".parse().unwrap()));
        assert_eq!(slice.annotations()[ANNOTATION], "2026-01-01T00:00:05.25Z");
        annotate(&mut slice, None);
        assert_eq!(slice.annotations().keys().collect::<Vec<_>>(), ["other"]);
    }
}
