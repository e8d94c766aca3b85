//! Spans as a collector of the OpenTelemetry protocol gets them: gathered as they end, sent by a thread of their own.
//!
//! Whoever works in a span never waits: a span that finds the queue full is dropped and counted, and so are those that a
//! collector does not take in its time. A caller's own trace goes on if it says so in a `traceparent` field of the first span
//! (the form of the W3C recommendation); whether it is recorded is then the caller's decision.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc as blocking;
use std::time::{Duration, SystemTime};

use tokio::sync::mpsc;
use tonic::transport::{Channel, Endpoint};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Level, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Layer};
use tracing_subscriber::registry::LookupSpan;

use crate::otlp::{self, KeyValue, Value};

/// Spans that wait to be sent.
const QUEUE_MAX: usize = 4096;
/// Spans in one message.
const BATCH_MAX: usize = 512;
/// How long the first span of a message waits for others.
const BATCH_PAUSE: Duration = Duration::from_millis(500);
const SEND_LIMIT: Duration = Duration::from_secs(5);
/// Attributes of one span; a span has few fields.
const ATTRIBUTES_MAX: usize = 32;
const MILLION: u32 = 1_000_000;

/// Where spans go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// `host:port` or `http://host:port` of a collector that speaks OTLP over gRPC.
    pub endpoint: String,
    /// How many of a million traces that begin here are recorded.
    pub sampling_rate_per_million: u32,
    /// What the process is called.
    pub service: String,
}

/// What has become of spans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exported {
    pub sent: u64,
    pub dropped: u64,
}

static SENT: AtomicU64 = AtomicU64::new(0);
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Since the process started.
pub fn exported() -> Exported {
    Exported { sent: SENT.load(Ordering::Relaxed), dropped: DROPPED.load(Ordering::Relaxed) }
}

/// The endpoint cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot send spans to {endpoint:?}: {problem}")]
pub struct ExportError {
    endpoint: String,
    problem: String,
}

enum Message {
    Span(otlp::Span),
    /// Answered when everything before it is sent.
    Flush(blocking::SyncSender<()>),
}

/// The part of a subscriber that gathers spans.
#[derive(Debug)]
pub(crate) struct Exporter {
    queue: mpsc::Sender<Message>,
    rate_per_million: u32,
}

/// Waits for what has been gathered to be sent.
#[derive(Clone, Debug)]
pub(crate) struct Flush(mpsc::Sender<Message>);

impl Flush {
    pub(crate) fn wait(&self, limit: Duration) {
        let (done, sent) = blocking::sync_channel(1);
        if self.0.try_send(Message::Flush(done)).is_ok() {
            let _ = sent.recv_timeout(limit);
        }
    }
}

/// A span as it is being gathered.
struct Gathered {
    span: otlp::Span,
    trace_id: [u8; 16],
    span_id: [u8; 8],
}

impl Exporter {
    /// Starts the sending thread.
    pub(crate) fn start(export: &Export) -> Result<(Exporter, Flush), ExportError> {
        let failed = |problem: String| ExportError { endpoint: export.endpoint.clone(), problem };
        let address = match export.endpoint.split_once("://") {
            None => format!("http://{}", export.endpoint),
            Some(("http", _)) => export.endpoint.clone(),
            Some((scheme, _)) => return Err(failed(format!("{scheme} is not spoken, only http"))),
        };
        let endpoint = Endpoint::from_shared(address).map_err(|error| failed(error.to_string()))?;
        let endpoint = endpoint.connect_timeout(SEND_LIMIT).timeout(SEND_LIMIT);
        let (queue, spans) = mpsc::channel(QUEUE_MAX);
        let service = export.service.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| failed(error.to_string()))?;
        std::thread::Builder::new()
            .name("spans".to_owned())
            .spawn(move || runtime.block_on(send_all(endpoint, spans, service)))
            .map_err(|error| failed(error.to_string()))?;
        let flush = Flush(queue.clone());
        Ok((Exporter { queue, rate_per_million: export.sampling_rate_per_million.min(MILLION) }, flush))
    }

    /// Which spans are gathered: all of ours, however little is logged.
    pub(crate) fn wants(metadata: &Metadata<'_>) -> bool {
        metadata.is_span() && *metadata.level() <= Level::DEBUG && metadata.target().starts_with("oarlock")
    }

    fn samples(&self) -> bool {
        rand::random_range(0..MILLION) < self.rate_per_million
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Exporter {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        let (trace_id, parent, kind) = match span.parent() {
            Some(parent) => match parent.extensions().get::<Gathered>() {
                Some(parent) => (parent.trace_id, parent.span_id.to_vec(), otlp::KIND_INTERNAL),
                // A trace is recorded as a whole or not at all.
                None => return,
            },
            None => match fields.parent.as_deref().and_then(traceparent) {
                Some((_, _, false)) => return,
                Some((trace_id, caller, true)) => (trace_id, caller.to_vec(), otlp::KIND_SERVER),
                None if self.samples() => (rand::random(), Vec::new(), otlp::KIND_SERVER),
                None => return,
            },
        };
        let span_id: [u8; 8] = rand::random();
        let gathered = otlp::Span {
            trace_id: trace_id.to_vec(),
            span_id: span_id.to_vec(),
            parent_span_id: parent,
            name: fields.name.unwrap_or_else(|| span.name().to_owned()),
            kind,
            start_time_unix_nano: now(),
            end_time_unix_nano: 0,
            attributes: fields.attributes,
        };
        span.extensions_mut().insert(Gathered { span: gathered, trace_id, span_id });
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut extensions = span.extensions_mut();
        if let Some(gathered) = extensions.get_mut::<Gathered>() {
            let mut fields = Fields::default();
            values.record(&mut fields);
            gathered.span.attributes.extend(fields.attributes);
            gathered.span.attributes.truncate(ATTRIBUTES_MAX);
        }
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        let Some(span) = context.span(&id) else { return };
        let Some(mut gathered) = span.extensions_mut().remove::<Gathered>() else { return };
        gathered.span.end_time_unix_nano = now();
        if self.queue.try_send(Message::Span(gathered.span)).is_err() {
            DROPPED.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// A trace, the caller's span in it, and whether the caller records it.
fn traceparent(text: &str) -> Option<([u8; 16], [u8; 8], bool)> {
    let mut parts = text.trim().split('-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let (trace, span) = (hex::<16>(trace)?, hex::<8>(span)?);
    let [version] = hex::<1>(version)?;
    let [flags] = hex::<1>(flags)?;
    (version != 0xff && trace != [0; 16] && span != [0; 8]).then_some((trace, span, flags & 1 == 1))
}

fn hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut out = [0; N];
    if text.len() != 2 * N || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    for (index, byte) in out.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(out)
}

/// Reads a span's fields. `otel.name` is the span's name, for spans of many names.
#[derive(Default)]
struct Fields {
    name: Option<String>,
    parent: Option<String>,
    attributes: Vec<KeyValue>,
}

impl Fields {
    fn add(&mut self, field: &Field, value: Value) {
        if self.attributes.len() < ATTRIBUTES_MAX {
            self.attributes.push(KeyValue::new(field.name(), value));
        }
    }

    fn text(&mut self, field: &Field, text: String) {
        match field.name() {
            "otel.name" => self.name = Some(text),
            "traceparent" => self.parent = Some(text),
            _ => self.add(field, Value::Text(text)),
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.text(field, format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.text(field, value.to_owned());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field, Value::Flag(value));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field, Value::Number(value));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field, Value::Number(i64::try_from(value).unwrap_or(i64::MAX)));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.add(field, Value::Real(value));
    }
}

/// Sends until nobody can gather any more.
async fn send_all(endpoint: Endpoint, mut queue: mpsc::Receiver<Message>, service: String) {
    let channel = endpoint.connect_lazy();
    let mut batch = Vec::with_capacity(BATCH_MAX);
    let mut told = false;
    while let Some(first) = queue.recv().await {
        batch.push(first);
        if !matches!(batch[0], Message::Flush(_)) {
            tokio::time::sleep(BATCH_PAUSE).await;
        }
        while batch.len() < BATCH_MAX
            && let Ok(next) = queue.try_recv()
        {
            batch.push(next);
        }
        let (mut spans, mut waiting) = (Vec::with_capacity(batch.len()), Vec::new());
        for message in batch.drain(..) {
            match message {
                Message::Span(span) => spans.push(span),
                Message::Flush(done) => waiting.push(done),
            }
        }
        let count = spans.len() as u64;
        match send(&channel, spans, &service).await {
            Ok(()) => {
                SENT.fetch_add(count, Ordering::Relaxed);
                told = false;
            }
            Err(error) => {
                DROPPED.fetch_add(count, Ordering::Relaxed);
                // Once until it works again; the count tells the rest.
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(%error, "spans could not be sent and are dropped");
                }
            }
        }
        for done in waiting {
            // Whoever waited may have given up.
            let _ = done.send(());
        }
    }
}

async fn send(channel: &Channel, spans: Vec<otlp::Span>, service: &str) -> Result<(), tonic::Status> {
    if spans.is_empty() {
        return Ok(());
    }
    let scope = otlp::Scope { name: "oarlock".to_owned(), version: env!("CARGO_PKG_VERSION").to_owned() };
    let attributes = vec![KeyValue::new("service.name", Value::Text(service.to_owned()))];
    let request = otlp::ExportRequest {
        resource_spans: vec![otlp::ResourceSpans {
            resource: Some(otlp::Resource { attributes }),
            scope_spans: vec![otlp::ScopeSpans { scope: Some(scope), spans }],
        }],
    };
    let exchange = async {
        let mut client = tonic::client::Grpc::new(channel.clone());
        client.ready().await.map_err(|error| tonic::Status::unavailable(error.to_string()))?;
        let codec = tonic_prost::ProstCodec::<otlp::ExportRequest, otlp::ExportResponse>::default();
        let path = http::uri::PathAndQuery::from_static(otlp::EXPORT);
        client.unary(tonic::Request::new(request), path, codec).await.map(drop)
    };
    let limit = tokio::time::timeout(SEND_LIMIT, exchange).await;
    limit.unwrap_or_else(|_| Err(tonic::Status::deadline_exceeded("the collector does not answer")))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use http_body_util::BodyExt;
    use prost::Message as _;
    use tracing_subscriber::prelude::*;

    use super::*;

    type Taken = Arc<Mutex<Vec<otlp::ExportRequest>>>;

    /// A collector that takes everything, or nothing.
    async fn collector(answers: bool) -> (String, Taken) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let taken = Taken::default();
        let taking = taken.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let taking = taking.clone();
                let answer = hyper::service::service_fn(move |request: http::Request<hyper::body::Incoming>| {
                    let taking = taking.clone();
                    async move {
                        assert_eq!(request.uri().path(), otlp::EXPORT);
                        let body = request.into_body().collect().await?.to_bytes();
                        if answers {
                            taking.lock().unwrap().push(otlp::ExportRequest::decode(&body[5..]).unwrap());
                        }
                        let code = if answers { "0" } else { "14" };
                        let response = http::Response::builder().header("content-type", "application/grpc");
                        let mut trailers = http::HeaderMap::new();
                        trailers.insert("grpc-status", code.parse().unwrap());
                        let empty = http_body_util::Full::new(hyper::body::Bytes::from_static(&[0; 5]));
                        let body = empty.with_trailers(std::future::ready(Some(Ok(trailers))));
                        Ok::<_, hyper::Error>(response.body(body).unwrap())
                    }
                });
                tokio::spawn(async move {
                    let stream = hyper_util::rt::TokioIo::new(stream);
                    let executor = hyper_util::rt::TokioExecutor::new();
                    let _ = hyper::server::conn::http2::Builder::new(executor).serve_connection(stream, answer).await;
                });
            }
        });
        (address, taken)
    }

    fn export(endpoint: String, sampling_rate_per_million: u32) -> Export {
        Export { endpoint, sampling_rate_per_million, service: "tests".into() }
    }

    async fn flushed(flush: Flush) {
        tokio::task::spawn_blocking(move || flush.wait(Duration::from_secs(20))).await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn spans_reach_the_collector_with_their_parents_and_a_callers_trace_goes_on() {
        let (address, taken) = collector(true).await;
        let (exporter, flush) = Exporter::start(&export(address, MILLION)).unwrap();
        let filter = tracing_subscriber::filter::filter_fn(Exporter::wants);
        let subscriber = tracing_subscriber::registry().with(exporter.with_filter(filter));
        tracing::subscriber::with_default(subscriber, || {
            let caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
            let call = tracing::debug_span!(
                "rpc",
                otel.name = "Service/Call",
                traceparent = caller,
                code = tracing::field::Empty
            );
            call.in_scope(|| tracing::debug_span!("step", number = 7).in_scope(|| {}));
            call.record("code", 5);
            drop(call);
            // The caller does not record this one.
            let silent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";
            tracing::debug_span!("silent", traceparent = silent).in_scope(|| {
                tracing::debug_span!("silent too").in_scope(|| {});
            });
            tracing::debug_span!(target: "another", "not ours").in_scope(|| {});
            tracing::debug_span!("own").in_scope(|| {});
        });
        flushed(flush).await;
        let requests = taken.lock().unwrap();
        let resource = requests[0].resource_spans[0].resource.as_ref().unwrap();
        assert_eq!(resource.attributes, [KeyValue::new("service.name", Value::Text("tests".into()))]);
        let spans: Vec<&otlp::Span> = requests
            .iter()
            .flat_map(|request| &request.resource_spans)
            .flat_map(|resource| &resource.scope_spans)
            .flat_map(|scope| &scope.spans)
            .collect();
        let [step, call, own] = spans.as_slice() else { panic!("{spans:?}") };
        assert_eq!((call.name.as_str(), call.kind), ("Service/Call", otlp::KIND_SERVER));
        assert_eq!(call.parent_span_id, [0xb7, 0xad, 0x6b, 0x71, 0x69, 0x20, 0x33, 0x31]);
        assert_eq!(call.trace_id[..3], [0x0a, 0xf7, 0x65]);
        assert_eq!(call.attributes, [KeyValue::new("code", Value::Number(5))]);
        assert_eq!((&step.name, &step.parent_span_id, &step.trace_id), (&"step".into(), &call.span_id, &call.trace_id));
        assert_eq!(step.attributes, [KeyValue::new("number", Value::Number(7))]);
        assert!(call.start_time_unix_nano <= step.start_time_unix_nano);
        assert!(step.end_time_unix_nano <= call.end_time_unix_nano);
        assert!(own.parent_span_id.is_empty() && own.trace_id != call.trace_id);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn nobody_waits_for_a_collector_that_takes_nothing_and_what_is_lost_is_counted() {
        let (address, taken) = collector(false).await;
        let (exporter, flush) = Exporter::start(&export(format!("http://{address}"), MILLION)).unwrap();
        let before = exported().dropped;
        let many = 3 * QUEUE_MAX as u64;
        tracing::subscriber::with_default(tracing_subscriber::registry().with(exporter), || {
            for _ in 0..many {
                tracing::debug_span!("one of many").in_scope(|| {});
            }
        });
        // The queue may be full of spans at first.
        while exported().dropped - before < many {
            flushed(flush.clone()).await;
        }
        assert!(taken.lock().unwrap().is_empty());
    }

    #[test]
    fn without_sampling_nothing_is_gathered_and_a_wrong_endpoint_is_refused() {
        let (exporter, _flush) = Exporter::start(&export("127.0.0.1:1".into(), 0)).unwrap();
        assert!((0..1000).all(|_| !exporter.samples()));
        assert!(Exporter::start(&export("https://collector.example:4317".into(), 1)).is_err());
        for bad in ["", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331", "00-0-0-01", "zz-x-y-z"] {
            assert_eq!(traceparent(bad), None, "{bad}");
        }
    }
}
