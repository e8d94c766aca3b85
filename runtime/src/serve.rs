//! Serves gRPC on the unix socket: one HTTP/2 connection a task, each request handed to the service its path names.
//!
//! This is all that is needed of a router, and keeps a web framework out of the binary.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use oarlock_proto::cri::image_service_server::{self, ImageServiceServer};
use oarlock_proto::cri::runtime_service_server::{self, RuntimeServiceServer};
use oarlock_proto::images::images_server::{self, ImagesServer};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Service as _;

use crate::core::Core;
use crate::rpc::Service;

/// Largest request taken; clients of the interface send up to this.
const REQUEST_BYTES_MAX: usize = 16 << 20;
/// Calls at once on one connection; clients use one connection for everything, event streams and long stops included.
const STREAMS_MAX: u32 = 4096;
/// After an accept that failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The services of the socket.
#[derive(Clone)]
struct Services {
    runtime: RuntimeServiceServer<Service>,
    image: ImageServiceServer<Service>,
    images: ImagesServer<Service>,
}

/// Serves until `stop`, then lets calls under way end; the caller limits how long.
pub(crate) async fn serve(core: Arc<Core>, listener: UnixListener, stop: CancellationToken) {
    let service = Arc::new(Service { core });
    let services = Services {
        runtime: RuntimeServiceServer::from_arc(service.clone()).max_decoding_message_size(REQUEST_BYTES_MAX),
        image: ImageServiceServer::from_arc(service.clone()).max_decoding_message_size(REQUEST_BYTES_MAX),
        images: ImagesServer::from_arc(service),
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
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .adaptive_window(true)
        .serve_connection(TokioIo::new(stream), answer);
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

async fn dispatch(mut services: Services, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let service = request.uri().path().trim_start_matches('/').split('/').next().unwrap_or_default();
    match service {
        runtime_service_server::SERVICE_NAME => services.runtime.call(request).await,
        image_service_server::SERVICE_NAME => services.image.call(request).await,
        images_server::SERVICE_NAME => services.images.call(request).await,
        unknown => Ok(Status::unimplemented(format!("unknown service {unknown}")).into_http()),
    }
}
