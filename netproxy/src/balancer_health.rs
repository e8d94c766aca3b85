//! What a load balancer asks at a Service's `healthCheckNodePort`: whether this node has endpoints of it. Listeners come and go
//! with the Service: for each port one on every address, or where node ports are served on some of the node's addresses
//! only, one on each of those, as they come and go.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode};
use http_body_util::Full;
use hyper_util::rt::{TokioIo, TokioTimer};
use ipnet::IpNet;
use oarlock_netlink::Address;
use parking_lot::RwLock;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{debug, warn};

use crate::addresses::{self, Changes};
use crate::health::Status;
use crate::service::ServiceName;

const MAX_CONNECTIONS: usize = 64;
/// Listeners of all ports together. There are fewer node ports than that unless their range was changed.
const MAX_LISTENERS: usize = 4096;
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
const RETRY_INTERVAL: Duration = Duration::from_secs(2);

/// What is said, and where.
#[derive(Debug, Default)]
pub struct Wanted {
    /// At each port the Service, and how many endpoints of it this node has.
    pub ports: BTreeMap<u16, (ServiceName, usize)>,
    /// Networks of the addresses to listen on; every address without any.
    pub networks: Vec<IpNet>,
}

/// Where a port is listened on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Place {
    /// Every address of either family; without IPv6, every one of the other.
    Any,
    /// Every address of this family.
    AnyOf { is_ipv4: bool },
    /// One address, with its link where it means something on that alone.
    One { address: IpAddr, link: u32 },
}

impl Place {
    fn listen(self, port: u16) -> io::Result<std::net::TcpListener> {
        let any =
            |is_ipv4| -> IpAddr { if is_ipv4 { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() } };
        match self {
            Place::Any => oarlock_listen::tcp((any(false), port).into())
                .or_else(|_| oarlock_listen::tcp((any(true), port).into())),
            Place::AnyOf { is_ipv4 } => oarlock_listen::tcp_of_one_family((any(is_ipv4), port).into()),
            Place::One { address: IpAddr::V6(address), link } => {
                oarlock_listen::tcp(SocketAddrV6::new(address, port, 0, link).into())
            }
            Place::One { address, .. } => oarlock_listen::tcp(SocketAddr::new(address, port)),
        }
    }
}

/// The places that networks select on a node with these addresses.
fn places(networks: &[IpNet], addresses: &[Address]) -> BTreeSet<Place> {
    let selects_all = |is_ipv4| networks.iter().any(|net| net.prefix_len() == 0 && net.addr().is_ipv4() == is_ipv4);
    let all = [true, false].map(selects_all);
    if networks.is_empty() || all == [true, true] {
        return [Place::Any].into();
    }
    let some = addresses.iter().filter(|one| networks.iter().any(|net| net.contains(&one.net.addr())));
    let place = |one: &Address| match one.net.addr() {
        address if all[usize::from(address.is_ipv6())] => Place::AnyOf { is_ipv4: address.is_ipv4() },
        address @ IpAddr::V6(v6) if v6.is_unicast_link_local() => Place::One { address, link: one.link },
        address => Place::One { address, link: 0 },
    };
    some.map(place).collect()
}

/// A port at a place; it ends with this, for new connections at once.
struct Listener {
    task: JoinHandle<()>,
    _end: DropGuard,
}

/// The listeners, and what they say.
struct Listeners {
    said: Arc<RwLock<Arc<Wanted>>>,
    running: HashMap<(u16, Place), Listener>,
    status: Arc<Status>,
    shutdown: CancellationToken,
    is_bounded: bool,
}

/// Serves the ports that `wanted` names until shutdown.
pub async fn run(mut wanted: watch::Receiver<Arc<Wanted>>, status: Arc<Status>, shutdown: CancellationToken) {
    let said = Arc::default();
    let mut listeners =
        Listeners { said, running: HashMap::new(), status, shutdown: shutdown.clone(), is_bounded: false };
    let mut changes: Option<Changes> = None;
    loop {
        let now = wanted.borrow_and_update().clone();
        let networks = now.networks.clone();
        let minds_addresses = !now.ports.is_empty() && !networks.is_empty();
        // From before the addresses are read, so that none slips through.
        changes = if minds_addresses { changes.or_else(Changes::open) } else { None };
        let addresses = if minds_addresses { addresses::list().await } else { Some(Vec::new()) };
        if let Some(addresses) = &addresses {
            listeners.set(now, &places(&networks, addresses)).await;
        }
        let unheard = minds_addresses && (changes.is_none() || addresses.is_none());
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { return },
            more = next(changes.as_ref()) => if !more { changes = None },
            () = tokio::time::sleep(RETRY_INTERVAL), if unheard => {}
            () = shutdown.cancelled() => return,
        }
    }
}

/// As [`Changes::next`], for ever without any.
async fn next(changes: Option<&Changes>) -> bool {
    match changes {
        Some(changes) => changes.next().await,
        None => std::future::pending().await,
    }
}

impl Listeners {
    /// Says what is wanted now, at these places.
    async fn set(&mut self, wanted: Arc<Wanted>, places: &BTreeSet<Place>) {
        let count = wanted.ports.len() * places.len();
        if count > MAX_LISTENERS && !self.is_bounded {
            warn!(wanted = count, bound = MAX_LISTENERS, "health check ports are not served on every address");
        }
        self.is_bounded = count > MAX_LISTENERS;
        // Every port at one place before any at the next, so that the bound leaves each of them something.
        let all = places.iter().flat_map(|place| wanted.ports.keys().map(|port| (*port, *place)));
        let now: BTreeSet<(u16, Place)> = all.take(MAX_LISTENERS).collect();
        let gone: Vec<Listener> = self.running.extract_if(|key, _| !now.contains(key)).map(|(_, one)| one).collect();
        *self.said.write() = wanted;
        for listener in gone {
            // One address and all of them exclude each other, so the old sockets have to be closed first.
            listener.task.abort();
            let _ = listener.task.await;
        }
        for (port, place) in now {
            self.running.entry((port, place)).or_insert_with(|| {
                let token = self.shutdown.child_token();
                let task = listen(port, place, self.said.clone(), self.status.clone(), token.clone());
                Listener { task: tokio::spawn(task), _end: token.drop_guard() }
            });
        }
    }
}

async fn listen(
    port: u16,
    place: Place,
    said: Arc<RwLock<Arc<Wanted>>>,
    status: Arc<Status>,
    token: CancellationToken,
) {
    let listener = loop {
        match place.listen(port).and_then(TcpListener::from_std) {
            Ok(listener) => break listener,
            Err(error) => {
                warn!(
                    port,
                    ?place,
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
                let response = respond(said.read().ports.get(&port), status.is_healthy_now());
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

    #[test]
    fn networks_select_addresses_of_both_families_and_links_where_they_matter() {
        let address = |link, net: &str| Address { link, net: net.parse().unwrap() };
        let own = [
            address(1, "127.0.0.1/8"),
            address(2, "192.0.2.7/24"),
            address(2, "2001:db8::7/64"),
            address(2, "fe80::7/64"),
            address(3, "198.51.100.7/24"),
        ];
        let chosen = |networks: &[&str]| {
            let networks: Vec<IpNet> = networks.iter().map(|text| text.parse().unwrap()).collect();
            places(&networks, &own).into_iter().collect::<Vec<_>>()
        };
        let one = |text: &str, link| Place::One { address: text.parse().unwrap(), link };
        assert_eq!(chosen(&[]), [Place::Any]);
        assert_eq!(chosen(&["0.0.0.0/0", "::/0"]), [Place::Any]);
        assert_eq!(chosen(&["192.0.2.0/24", "2001:db8::/32"]), [one("192.0.2.7", 0), one("2001:db8::7", 0)]);
        assert_eq!(chosen(&["0.0.0.0/0", "fe80::/10"]), [Place::AnyOf { is_ipv4: true }, one("fe80::7", 2)]);
        assert_eq!(chosen(&["203.0.113.0/24"]), []);
    }

    #[tokio::test]
    async fn listeners_are_bounded_and_each_port_keeps_a_place() {
        let shutdown = CancellationToken::new();
        let (said, status) = (Arc::default(), Arc::default());
        let mut listeners = Listeners { said, running: HashMap::new(), status, shutdown, is_bounded: false };
        // No address of any machine, so that nothing is taken from others.
        let place = |last| Place::One { address: [192, 0, 2, last].into(), link: 0 };
        let many: BTreeMap<_, _> = (20_000..23_000).map(|port| (port, (ServiceName::new("ns", "web"), 0))).collect();
        let wanted = Arc::new(Wanted { ports: many, networks: Vec::new() });
        listeners.set(wanted.clone(), &[place(1), place(2)].into()).await;
        assert_eq!(listeners.running.len(), MAX_LISTENERS);
        assert!(wanted.ports.keys().all(|port| listeners.running.contains_key(&(*port, place(1)))));
        listeners.set(Arc::default(), &[place(1)].into()).await;
        assert!(listeners.running.is_empty());
    }
}
