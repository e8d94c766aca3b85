//! Counters of the server, in the Prometheus text format.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::core::Core;

/// Upper bounds of the latency histogram, in seconds.
const BOUNDS: [f64; 10] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0];
/// Verbs and resources come from requests; past this many combinations they are counted together.
const MAX_SERIES: usize = 2000;

#[derive(Default)]
struct Latency {
    buckets: [u64; BOUNDS.len()],
    count: u64,
    sum_seconds: f64,
}

#[derive(Default)]
pub(crate) struct Metrics {
    requests: Mutex<BTreeMap<(&'static str, String, u16), u64>>,
    latencies: Mutex<BTreeMap<&'static str, Latency>>,
    watches: Arc<AtomicI64>,
    inflight: Arc<AtomicI64>,
}

/// Counts one thing while it lives.
pub(crate) struct Gauge(Arc<AtomicI64>);

impl Gauge {
    fn start(counter: &Arc<AtomicI64>) -> Gauge {
        counter.fetch_add(1, Ordering::Relaxed);
        Gauge(counter.clone())
    }
}

impl Drop for Gauge {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Metrics {
    pub(crate) fn watch_started(&self) -> Gauge {
        Gauge::start(&self.watches)
    }

    pub(crate) fn request_started(&self) -> Gauge {
        Gauge::start(&self.inflight)
    }

    pub(crate) fn request_done(&self, verb: &'static str, resource: &str, code: u16, took: Duration) {
        let mut requests = self.requests.lock();
        let known = requests.len() < MAX_SERIES;
        let resource = if known { resource } else { "other" };
        *requests.entry((verb, resource.to_owned(), code)).or_default() += 1;
        drop(requests);
        if verb == "watch" {
            return;
        }
        let mut latencies = self.latencies.lock();
        let latency = latencies.entry(verb).or_default();
        let seconds = took.as_secs_f64();
        latency.count += 1;
        latency.sum_seconds += seconds;
        for (bucket, bound) in latency.buckets.iter_mut().zip(BOUNDS) {
            if seconds <= bound {
                *bucket += 1;
            }
        }
    }

    pub(crate) fn render(&self, core: &Core) -> String {
        let mut out = String::new();
        let _ = writeln!(out, "# TYPE apiserver_request_total counter");
        for ((verb, resource, code), count) in &*self.requests.lock() {
            let resource = resource.replace(['"', '\\', '\n'], "_");
            let _ = writeln!(
                out,
                "apiserver_request_total{{verb=\"{verb}\",resource=\"{resource}\",code=\"{code}\"}} {count}"
            );
        }
        let _ = writeln!(out, "# TYPE apiserver_request_duration_seconds histogram");
        for (verb, latency) in &*self.latencies.lock() {
            for (bucket, bound) in latency.buckets.iter().zip(BOUNDS) {
                let _ = writeln!(
                    out,
                    "apiserver_request_duration_seconds_bucket{{verb=\"{verb}\",le=\"{bound}\"}} {bucket}"
                );
            }
            let Latency { count, sum_seconds, .. } = latency;
            let _ = writeln!(out, "apiserver_request_duration_seconds_bucket{{verb=\"{verb}\",le=\"+Inf\"}} {count}");
            let _ = writeln!(out, "apiserver_request_duration_seconds_sum{{verb=\"{verb}\"}} {sum_seconds}");
            let _ = writeln!(out, "apiserver_request_duration_seconds_count{{verb=\"{verb}\"}} {count}");
        }
        let gauges = [
            ("apiserver_current_inflight_requests", self.inflight.load(Ordering::Relaxed)),
            ("apiserver_longrunning_watches", self.watches.load(Ordering::Relaxed)),
            ("apiserver_storage_revision", i64::try_from(core.store.current_revision()).unwrap_or(i64::MAX)),
        ];
        for (name, value) in gauges {
            let _ = writeln!(out, "# TYPE {name} gauge\n{name} {value}");
        }
        let _ = writeln!(out, "# TYPE apiserver_resource_objects gauge");
        for kind in oarlock_kinds::all().iter().filter(|kind| kind.stored && crate::object::is_native(kind)) {
            let count = core.store.count(&crate::object::bucket(kind));
            let name = kind.qualified_plural();
            let _ = writeln!(out, "apiserver_resource_objects{{resource=\"{name}\"}} {count}");
        }
        out
    }
}
