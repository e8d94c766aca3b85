//! Serves gRPC on the unix socket: one connection a task, each request handed to the service its path names, counted and in
//! a span of its own; and the metrics, in HTTP of either version.
//!
//! This is all that is needed of a router, and keeps a web framework out of the binary.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{Method, Request, Response, header};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use oarlock_proto::cri::image_service_server::{self, ImageServiceServer};
use oarlock_proto::cri::runtime_service_server::{self, RuntimeServiceServer};
use oarlock_proto::images::images_server::{self, ImagesServer};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Service as _;
use tracing::{Instrument, debug_span, field};

use crate::core::Core;
use crate::prometheus;
use crate::rpc::Service;
use crate::state::blocking;

/// Largest request taken; clients of the interface send up to this.
const REQUEST_BYTES_MAX: usize = 16 << 20;
/// Calls at once on one connection; clients use one connection for everything, event streams and long stops included.
const STREAMS_MAX: u32 = 4096;
/// How long a client may take over a request's head.
const HEADER_LIMIT: Duration = Duration::from_secs(10);
/// After an accept that failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The services of the socket.
#[derive(Clone)]
struct Services {
    runtime: RuntimeServiceServer<Service>,
    image: ImageServiceServer<Service>,
    images: ImagesServer<Service>,
    core: Arc<Core>,
}

/// Serves until `stop`, then lets calls under way end; the caller limits how long.
pub(crate) async fn serve(core: Arc<Core>, listener: UnixListener, stop: CancellationToken) {
    let service = Arc::new(Service { core: core.clone() });
    let services = Services {
        runtime: RuntimeServiceServer::from_arc(service.clone()).max_decoding_message_size(REQUEST_BYTES_MAX),
        image: ImageServiceServer::from_arc(service.clone()).max_decoding_message_size(REQUEST_BYTES_MAX),
        images: ImagesServer::from_arc(service),
        core,
    };
    let connections = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                connections.spawn(connection(stream, services.clone(), stop.clone()));
            }
            Err(error) => {
                tracing::warn!(%error, "connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    connections.close();
    connections.wait().await;
}

async fn connection(stream: UnixStream, services: Services, stop: CancellationToken) {
    let answer = service_fn(move |request| dispatch(services.clone(), request));
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http2().timer(TokioTimer::new()).max_concurrent_streams(STREAMS_MAX).adaptive_window(true);
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_LIMIT);
    let connection = builder.serve_connection(TokioIo::new(stream), answer);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection ended with an error");
    }
}

async fn dispatch(services: Services, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    if request.method() == Method::GET && request.uri().path() == "/metrics" {
        return Ok(metrics(services.core).await);
    }
    let path = request.uri().path().to_owned();
    let calls = services.core.clone();
    calls.calls.begin(&path);
    let start = Instant::now();
    let parent = request.headers().get("traceparent").and_then(|parent| parent.to_str().ok());
    let span = debug_span!(
        "rpc",
        otel.name = path.trim_start_matches('/'),
        traceparent = parent,
        rpc.system = "grpc",
        rpc.grpc.status_code = field::Empty
    );
    let response = hand_over(services, request).instrument(span.clone()).await?;
    // An error is told in the head; a code that comes after the body is the success of a call that answered.
    let code = response.headers().get("grpc-status").and_then(|code| code.to_str().ok()?.parse().ok()).unwrap_or(0);
    span.record("rpc.grpc.status_code", code);
    calls.calls.end(&path, code, start.elapsed());
    Ok(response)
}

async fn hand_over(mut services: Services, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let service = request.uri().path().trim_start_matches('/').split('/').next().unwrap_or_default();
    match service {
        runtime_service_server::SERVICE_NAME => services.runtime.call(request).await,
        image_service_server::SERVICE_NAME => services.image.call(request).await,
        images_server::SERVICE_NAME => services.images.call(request).await,
        unknown => Ok(Status::unimplemented(format!("unknown service {unknown}")).into_http()),
    }
}

async fn metrics(core: Arc<Core>) -> Response<Body> {
    let text = blocking("the metrics", move || Ok(prometheus::text(&core))).await.unwrap_or_default();
    let mut response = Response::new(Body::new(text));
    let kind = header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}
