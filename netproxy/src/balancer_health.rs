//! What a load balancer asks at a Service's `healthCheckNodePort`: whether this node has endpoints of it. One listener for
//! each port, which comes and goes with the Service.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode};
use http_body_util::Full;
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::RwLock;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{debug, warn};

use crate::health::Status;
use crate::service::ServiceName;

const MAX_CONNECTIONS: usize = 64;
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
const RETRY_INTERVAL: Duration = Duration::from_secs(2);

/// What is said at each port: the Service, and how many endpoints of it this node has.
pub type Wanted = BTreeMap<u16, (ServiceName, usize)>;

/// Serves the ports that `wanted` names until shutdown.
pub async fn run(mut wanted: watch::Receiver<Arc<Wanted>>, status: Arc<Status>, shutdown: CancellationToken) {
    let said = Arc::new(RwLock::new(Arc::<Wanted>::default()));
    let mut listeners: HashMap<u16, DropGuard> = HashMap::new();
    loop {
        let now = wanted.borrow_and_update().clone();
        listeners.retain(|port, _| now.contains_key(port));
        *said.write() = now.clone();
        for port in now.keys() {
            listeners.entry(*port).or_insert_with(|| {
                let token = shutdown.child_token();
                tokio::spawn(listen(*port, said.clone(), status.clone(), token.clone()));
                token.drop_guard()
            });
        }
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { return },
            () = shutdown.cancelled() => return,
        }
    }
}

async fn listen(port: u16, said: Arc<RwLock<Arc<Wanted>>>, status: Arc<Status>, token: CancellationToken) {
    // Any address of either family; without IPv6, any of the other.
    let any: [IpAddr; 2] = [Ipv6Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into()];
    let listener = loop {
        let listen = |address| oarlock_listen::tcp(SocketAddr::new(address, port));
        match listen(any[0]).or_else(|_| listen(any[1])).and_then(TcpListener::from_std) {
            Ok(listener) => break listener,
            Err(error) => {
                warn!(
                    port,
                    error = &error as &dyn std::error::Error,
                    "health check port cannot be served; trying again"
                )
            }
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY_INTERVAL) => {}
            () = token.cancelled() => return,
        }
    };
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = token.cancelled() => return,
        };
        let Ok((stream, _)) = accepted else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let Ok(permit) = connections.clone().try_acquire_owned() else { continue };
        let (said, status) = (said.clone(), status.clone());
        tokio::spawn(async move {
            let service = hyper::service::service_fn(move |_| {
                let response = respond(said.read().get(&port), status.is_healthy_now());
                async move { Ok::<_, Infallible>(response) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = connection.await {
                debug!(error = &error as &dyn std::error::Error, "health check connection ended");
            }
            drop(permit);
        });
    }
}

fn respond(said: Option<&(ServiceName, usize)>, is_healthy: bool) -> Response<Full<Bytes>> {
    let Some((service, endpoints)) = said else {
        let mut response = Response::new(Full::default());
        *response.status_mut() = StatusCode::NOT_FOUND;
        return response;
    };
    let body = serde_json::json!({
        "service": {"namespace": &*service.namespace, "name": &*service.name},
        "localEndpoints": endpoints,
        "serviceProxyHealthy": is_healthy,
    });
    let mut response = Response::new(Full::new(Bytes::from(body.to_string())));
    if *endpoints == 0 || !is_healthy {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    let headers = response.headers_mut();
    headers.insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert("X-Content-Type-Options", HeaderValue::from_static("nosniff"));
    headers.insert("X-Load-Balancing-Endpoint-Weight", HeaderValue::from(*endpoints));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_healthy_node_with_endpoints_is_well() {
        let said = |endpoints| (ServiceName::new("default", "web"), endpoints);
        assert_eq!(respond(Some(&said(2)), true).status(), StatusCode::OK);
        assert_eq!(respond(Some(&said(0)), true).status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(respond(Some(&said(2)), false).status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(respond(None, true).status(), StatusCode::NOT_FOUND);
    }
}
