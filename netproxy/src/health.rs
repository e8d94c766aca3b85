//! The health port, for balancers: `/healthz` and `/livez`. On loopback alone also `/metrics`, with upstream's names where there
//! is one, and `/proxyMode`.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use jiff::Timestamp;
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::dns::{Counts, DnsServer};
use crate::histogram::Histogram;

/// A change that waits longer than this for its commit makes the proxy unhealthy.
const MAX_DELAY: Duration = Duration::from_secs(120);
/// Changes whose waiting is told apart.
const MAX_WAITING: usize = 64;
const MAX_CONNECTIONS: usize = 64;
const RETRY_INTERVAL: Duration = Duration::from_secs(2);
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
const COMMIT_MICROSECONDS: [u64; 9] = [250, 1_000, 4_000, 16_000, 64_000, 256_000, 1_000_000, 4_000_000, 16_000_000];

/// How long things take.
#[derive(Debug)]
struct Durations {
    commit: Histogram,
    /// From a change of a pod or a Service to its rules.
    programming: Histogram,
}

impl Default for Durations {
    fn default() -> Durations {
        let whole = (1..60).chain((60..120).step_by(5)).chain((120..=300).step_by(30));
        let programming = [250_000, 500_000].into_iter().chain(whole.map(|seconds: u64| seconds * 1_000_000));
        Durations { commit: Histogram::new(COMMIT_MICROSECONDS), programming: Histogram::new(programming) }
    }
}

/// Changes that wait for their commit.
#[derive(Debug, Default)]
struct Pending {
    /// How many there have been.
    asked: u64,
    /// The oldest first: since when, and the number of the last change that this stands for.
    waiting: VecDeque<(Instant, u64)>,
}

impl Pending {
    fn ask(&mut self) -> u64 {
        self.asked += 1;
        if self.waiting.len() < MAX_WAITING {
            self.waiting.push_back((Instant::now(), self.asked));
        } else if let Some(last) = self.waiting.back_mut() {
            // Those that came after many others wait as long as they do, as far as it matters here.
            last.1 = self.asked;
        }
        self.asked
    }

    fn done(&mut self, number: u64) {
        while self.waiting.front().is_some_and(|(_, last)| *last <= number) {
            self.waiting.pop_front();
        }
    }
}

/// What the proxy is doing, written by its parts and read by the health port. Times are milliseconds since 1970.
#[derive(Debug, Default)]
pub struct Status {
    /// True once Services and network policies have been written and cluster DNS is served.
    pub ready: watch::Sender<bool>,
    pending: Mutex<Pending>,
    /// The Node says that it is going, so balancers had better send elsewhere.
    pub leaving: AtomicBool,
    has_services: AtomicBool,
    has_policies: AtomicBool,
    /// Of what is listened on, how much has not been tried yet.
    untried: AtomicUsize,
    pub queued_at: AtomicU64,
    pub synced_at: AtomicU64,
    pub failures: AtomicU64,
    pub repairs: AtomicU64,
    pub flows_removed: AtomicU64,
    pub services: AtomicU64,
    pub elements: AtomicU64,
    /// Balancer addresses that this node announces.
    pub announced: AtomicU64,
    /// Bridges of pods whose packets come by no network policy.
    pub unseen_bridges: AtomicU64,
    durations: Durations,
}

/// Milliseconds since 1970.
pub fn now_milliseconds() -> u64 {
    u64::try_from(jiff::Timestamp::now().as_millisecond()).unwrap_or(0)
}

impl Status {
    /// A change is asked for; the number by which its commit is told.
    pub fn queued(&self) -> u64 {
        self.queued_at.store(now_milliseconds(), Ordering::Relaxed);
        self.pending.lock().ask()
    }

    /// A commit that did not go through, and is tried again.
    pub fn failed(&self) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        let mut pending = self.pending.lock();
        let last = pending.asked;
        if pending.waiting.is_empty() {
            pending.waiting.push_back((Instant::now(), last));
        }
    }

    /// A commit of all changes up to this one went through after `took`.
    pub fn synced(&self, number: u64, took: Duration) {
        self.synced_at.store(now_milliseconds(), Ordering::Relaxed);
        self.pending.lock().done(number);
        self.has_services.store(true, Ordering::SeqCst);
        self.note_ready();
        self.durations.commit.observe(took);
    }

    /// The rules go by a change of this time.
    pub fn programmed(&self, change: Timestamp, now: Timestamp) {
        // Another machine's clock may be ahead.
        self.durations.programming.observe(now.duration_since(change).try_into().unwrap_or_default());
    }

    /// Network policies as they are now are in the kernel.
    pub fn policies_enforced(&self) {
        self.has_policies.store(true, Ordering::SeqCst);
        self.note_ready();
    }

    /// So many addresses will be listened on, which is waited for before anything counts as ready.
    pub fn will_listen(&self, count: usize) {
        self.untried.fetch_add(count, Ordering::SeqCst);
    }

    /// One of them is listened on; or cannot be now, for which nothing else is kept waiting.
    pub fn tried_to_listen(&self) {
        self.untried.fetch_sub(1, Ordering::SeqCst);
        self.note_ready();
    }

    fn note_ready(&self) {
        let is_ready = self.has_services.load(Ordering::SeqCst)
            && self.has_policies.load(Ordering::SeqCst)
            && self.untried.load(Ordering::SeqCst) == 0;
        self.ready.send_if_modified(|ready| is_ready && !std::mem::replace(ready, true));
    }

    pub fn is_healthy_now(&self) -> bool {
        self.is_healthy(Instant::now())
    }

    fn is_healthy(&self, now: Instant) -> bool {
        let oldest = self.pending.lock().waiting.front().map(|(since, _)| *since);
        let late = oldest.is_some_and(|since| now.saturating_duration_since(since) >= MAX_DELAY);
        *self.ready.borrow() && !late
    }
}

/// What is told at an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Audience {
    /// Whether this node is well.
    Anybody,
    /// Everything.
    Host,
}

/// Serves a port until shutdown. One that another program has is tried again: Services and names do not hang on it.
pub async fn run(
    (listen, audience): (SocketAddr, Audience),
    status: Arc<Status>,
    dns: Arc<DnsServer>,
    shutdown: CancellationToken,
) {
    let mut is_first = true;
    let listener = loop {
        let bound = oarlock_listen::tcp(listen).and_then(TcpListener::from_std);
        if std::mem::take(&mut is_first) {
            status.tried_to_listen();
        }
        match bound {
            Ok(listener) => break listener,
            Err(error) => {
                warn!(%listen, error = &error as &dyn std::error::Error, "health or metrics port cannot be served; trying again")
            }
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY_INTERVAL) => {}
            () = shutdown.cancelled() => return,
        }
    };
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shutdown.cancelled() => return,
        };
        let Ok((stream, _)) = accepted else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let Ok(permit) = connections.clone().try_acquire_owned() else { continue };
        let (status, dns) = (status.clone(), dns.clone());
        tokio::spawn(async move {
            let service = hyper::service::service_fn(move |request: Request<Incoming>| {
                let response = respond(&request, audience, &status, &dns);
                async move { Ok::<_, Infallible>(response) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = connection.await {
                debug!(error = &error as &dyn std::error::Error, "health connection ended");
            }
            drop(permit);
        });
    }
}

fn respond(request: &Request<Incoming>, audience: Audience, status: &Status, dns: &DnsServer) -> Response<Full<Bytes>> {
    let now = now_milliseconds();
    let (code, kind, body) = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/healthz") => {
            let is_well = status.is_healthy_now() && !status.leaving.load(Ordering::Relaxed);
            let code = if is_well { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
            (code, "application/json", health(status, now))
        }
        (&Method::GET | &Method::HEAD, "/livez") => (StatusCode::OK, "application/json", health(status, now)),
        (&Method::GET | &Method::HEAD, "/proxyMode") if audience == Audience::Host => {
            (StatusCode::OK, "text/plain", "nftables".to_owned())
        }
        (&Method::GET | &Method::HEAD, "/metrics") if audience == Audience::Host => {
            (StatusCode::OK, "text/plain; version=0.0.4", metrics(status, dns.counts()))
        }
        (&Method::GET | &Method::HEAD, _) => (StatusCode::NOT_FOUND, "text/plain", "404 page not found\n".to_owned()),
        _ => (StatusCode::METHOD_NOT_ALLOWED, "text/plain", "405 method not allowed\n".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = code;
    response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static(kind));
    response.headers_mut().insert("X-Content-Type-Options", http::HeaderValue::from_static("nosniff"));
    response
}

fn health(status: &Status, now: u64) -> String {
    let time = |milliseconds: u64| {
        let timestamp = jiff::Timestamp::from_millisecond(i64::try_from(milliseconds).unwrap_or(0));
        timestamp.map(|timestamp| timestamp.to_string()).unwrap_or_default()
    };
    let updated = status.synced_at.load(Ordering::Relaxed);
    let eligible = !status.leaving.load(Ordering::Relaxed);
    serde_json::json!({"lastUpdated": time(updated), "currentTime": time(now), "nodeEligible": eligible}).to_string()
}

fn metrics(status: &Status, dns: Counts) -> String {
    let mut text = String::new();
    let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let Durations { commit, programming } = &status.durations;
    commit.tell(&mut text, "kubeproxy_sync_proxy_rules_duration_seconds", "Time from a change to its commit.");
    let help = "Time from a change of a pod or a Service, as its EndpointSlice says, to its commit.";
    programming.tell(&mut text, "kubeproxy_network_programming_duration_seconds", help);
    let rows = [
        ("kubeproxy_sync_proxy_rules_last_timestamp_seconds", "gauge", "Last commit.", read(&status.synced_at) / 1000),
        (
            "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
            "gauge",
            "Last change.",
            read(&status.queued_at) / 1000,
        ),
        (
            "kubeproxy_sync_proxy_rules_nftables_sync_failures_total",
            "counter",
            "Failed commits.",
            read(&status.failures),
        ),
        ("oarlock_netproxy_repairs_total", "counter", "Times that others' changes were undone.", read(&status.repairs)),
        (
            "oarlock_netproxy_stale_flows_removed_total",
            "counter",
            "Tracked flows forgotten.",
            read(&status.flows_removed),
        ),
        ("oarlock_netproxy_services", "gauge", "Services known.", read(&status.services)),
        ("oarlock_netproxy_elements", "gauge", "Map elements held.", read(&status.elements)),
        ("oarlock_netproxy_announced_addresses", "gauge", "Balancer addresses announced.", read(&status.announced)),
        (
            "oarlock_netproxy_policy_unseen_bridges",
            "gauge",
            "Bridges whose packets between pods no network policy sees.",
            read(&status.unseen_bridges),
        ),
        ("oarlock_dns_requests_total", "counter", "Questions answered.", dns.answered),
        ("oarlock_dns_forwarded_total", "counter", "Questions asked of upstream resolvers.", dns.forwarded),
        ("oarlock_dns_cache_hits_total", "counter", "Answers from the cache.", dns.cached),
        ("oarlock_dns_stale_answers_total", "counter", "Answers whose time was over.", dns.stale),
        ("oarlock_dns_forward_failures_total", "counter", "Questions that no resolver answered.", dns.failed),
    ];
    for (name, kind, help, value) in rows {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_to_program_the_network_has_the_buckets_of_upstream() {
        let status = Status::default();
        let now = Timestamp::from_second(1000).unwrap();
        for milliseconds in [400, 59_500, 119_000, 299_000, 301_000] {
            status.programmed(now - Duration::from_millis(milliseconds), now);
        }
        status.programmed(now + Duration::from_secs(5), now);
        let text = metrics(&status, Counts::default());
        let prefix = "kubeproxy_network_programming_duration_seconds_bucket";
        let buckets: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix(prefix)).collect();
        assert_eq!(buckets.len(), 2 + 59 + 12 + 7 + 1);
        let counts = [(0.25, 1), (0.5, 2), (59.0, 2), (60.0, 3), (115.0, 3), (120.0, 4), (270.0, 4), (300.0, 5)];
        for (bound, count) in counts {
            let line = format!("{{le=\"{bound}\"}} {count}");
            assert!(buckets.contains(&line.as_str()), "{line} in {buckets:?}");
        }
        assert_eq!(buckets.last(), Some(&"{le=\"+Inf\"} 6"));
    }

    #[test]
    fn a_change_that_waits_too_long_makes_the_proxy_unhealthy() {
        let status = Status::default();
        let now = Instant::now();
        assert!(!status.is_healthy(now), "before the first commit");
        let sync = |number| status.synced(number, Duration::from_millis(1));
        sync(0);
        assert!(!*status.ready.borrow() && !status.is_healthy(now), "before the first network policies");
        status.policies_enforced();
        assert!(*status.ready.borrow() && status.is_healthy(now));
        assert!(status.is_healthy(now + 2 * MAX_DELAY));
        let first = status.queued();
        assert!(status.is_healthy(now + MAX_DELAY / 2));
        assert!(!status.is_healthy(now + 2 * MAX_DELAY));
        // Changes that come later do not make the first one younger.
        status.pending.lock().waiting[0].0 = now.checked_sub(MAX_DELAY).unwrap();
        let second = status.queued();
        assert!(!status.is_healthy(now));
        sync(first);
        assert!(status.is_healthy(now), "the second has not waited for long");
        assert!(!status.is_healthy(now + 2 * MAX_DELAY), "but it waits, although there was a commit since");
        sync(second);
        assert!(status.is_healthy(now + 2 * MAX_DELAY));
        let many: Vec<u64> = (0..10 * MAX_WAITING).map(|_| status.queued()).collect();
        assert_eq!(status.pending.lock().waiting.len(), MAX_WAITING);
        sync(many[many.len() - 2]);
        assert!(!status.is_healthy(now + 2 * MAX_DELAY), "the last of many waits");
        sync(many[many.len() - 1]);
        assert!(status.is_healthy(now + 2 * MAX_DELAY));
        status.failed();
        assert!(!status.is_healthy(now + 2 * MAX_DELAY), "a change whose commit fails waits");
        sync(many[many.len() - 1]);
        assert!(status.is_healthy(now + 2 * MAX_DELAY), "and is in when it went through");
    }
}
