//! Names outside the cluster: asked of the resolvers in the node's resolv.conf, or for stub domains of their own.
//!
//! A resolver that does not answer is asked last for a while, and the next one is asked beside it soon. When none answers in
//! time, an answer whose time is over is given, and asking goes on for the next asker (RFC 8767).

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::Name;
use parking_lot::{Mutex, RwLock};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep_until, timeout_at};

use super::ask::ask;
use super::cache::{Cache, Question};
use super::flight::{Flight, Flights, Landing, Outcome};
use super::loops::Loops;

const MAX_SERVERS: usize = 3;
/// Sockets that wait for a resolver at once. It also bounds a loop until it is found.
const MAX_PENDING: usize = 512;
/// Askers that wait at once; those of equal questions wait for one socket.
const MAX_WAITING: usize = 2048;
/// How soon the next resolver is asked beside one that has not answered.
const NEXT_SERVER_AFTER: Duration = Duration::from_millis(400);
/// How soon an old answer is given where there is one.
const STALE_AFTER: Duration = Duration::from_millis(1800);
/// How long a resolver that did not answer is asked last.
const GRUDGE: Duration = Duration::from_secs(10);
const RELOAD_INTERVAL: Duration = Duration::from_secs(5);
const PORT: u16 = 53;

/// A question that no resolver answered.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    #[error("no upstream resolver is configured in {}", path.display())]
    NoServer { path: PathBuf },
    #[error("too many questions are under way")]
    Busy,
    #[error("no resolver has answered yet")]
    Slow,
    #[error("the question cannot be encoded")]
    Encode(#[source] hickory_proto::ProtoError),
    #[error("resolver {server} did not answer")]
    Server { server: SocketAddr, source: io::Error },
    #[error("resolver {server} answered {code}")]
    Refused { server: SocketAddr, code: ResponseCode },
}

/// Domains with resolvers of their own, such as those of a company.
pub type StubDomains = Vec<(Name, Vec<SocketAddr>)>;

/// What happened to questions, for the metrics.
#[derive(Debug, Default)]
pub struct Counts {
    pub cached: AtomicU64,
    pub stale: AtomicU64,
    pub failed: AtomicU64,
}

/// The resolvers of the node and what they answered lately.
#[derive(Debug)]
pub struct Upstream {
    path: PathBuf,
    own: Vec<IpAddr>,
    stubs: RwLock<StubDomains>,
    servers: Mutex<Servers>,
    /// Resolvers that did not answer, and when.
    silent: Mutex<HashMap<SocketAddr, Instant>>,
    pub counts: Counts,
    cache: Mutex<Cache>,
    flights: Flights,
    pending: Arc<Semaphore>,
    waiting: Semaphore,
    pub loops: Loops,
}

#[derive(Debug, Default)]
struct Servers {
    addresses: Vec<SocketAddr>,
    modified: Option<SystemTime>,
    checked: Option<Instant>,
}

impl Upstream {
    /// Takes resolvers from the file at `path`, leaving out `own`, which would be a loop.
    pub fn new(path: &Path, own: Vec<IpAddr>, stubs: StubDomains) -> Upstream {
        Upstream {
            path: path.to_owned(),
            own,
            stubs: RwLock::new(sorted(stubs)),
            servers: Mutex::default(),
            silent: Mutex::default(),
            counts: Counts::default(),
            cache: Mutex::default(),
            flights: Flights::default(),
            pending: Arc::new(Semaphore::new(MAX_PENDING)),
            waiting: Semaphore::new(MAX_WAITING),
            loops: Loops::default(),
        }
    }

    /// Asks others for these domains from now on. What others said of them is forgotten.
    pub fn set_stubs(&self, stubs: StubDomains) {
        let stubs = sorted(stubs);
        let mut known = self.stubs.write();
        if *known != stubs {
            *known = stubs;
            self.flights.abandon();
            *self.cache.lock() = Cache::default();
        }
    }

    /// The answer as it was given not long ago, or longer ago where nobody could be asked a moment ago.
    pub fn cached(&self, query: &Query, dnssec: bool) -> Option<Message> {
        let (question, now) = (Question::new(query, dnssec), Instant::now());
        let cache = self.cache.lock();
        if let Some(found) = cache.get(&question, now) {
            self.counts.cached.fetch_add(1, Ordering::Relaxed);
            return Some(found);
        }
        let found = cache.stale_for_now(&question, now)?;
        self.counts.stale.fetch_add(1, Ordering::Relaxed);
        Some(found)
    }

    /// Asks the resolvers, or waits with those who have asked the same. The answer's id is not the asker's.
    pub async fn resolve(self: &Arc<Self>, query: &Query, dnssec: bool) -> Outcome {
        let question = Question::new(query, dnssec);
        let stale = self.cache.lock().stale(&question, Instant::now());
        let outcome = match (self.waiting.try_acquire(), self.join(&question, query, dnssec)) {
            (Ok(_place), Some(mut flight)) if stale.is_some() => {
                let deadline = flight.since + STALE_AFTER;
                timeout_at(deadline, flight.outcome()).await.unwrap_or_else(|_| Err(Arc::new(UpstreamError::Slow)))
            }
            (Ok(_place), Some(mut flight)) => flight.outcome().await,
            _ => Err(Arc::new(UpstreamError::Busy)),
        };
        match (outcome, stale) {
            (Ok(answer), _) => Ok(answer),
            (Err(_), Some(answer)) => {
                self.counts.stale.fetch_add(1, Ordering::Relaxed);
                Ok(answer)
            }
            (Err(error), None) => {
                self.counts.failed.fetch_add(1, Ordering::Relaxed);
                Err(error)
            }
        }
    }

    /// The asking for a question that is under way, or a new one. None when too many are.
    fn join(self: &Arc<Self>, question: &Question, query: &Query, dnssec: bool) -> Option<Flight> {
        self.flights.join(question, |landing| {
            let permit = self.pending.clone().try_acquire_owned().ok()?;
            let (upstream, question, query) = (self.clone(), question.clone(), query.clone());
            // It goes on when those who wait have got an old answer or went away. Its time is bounded.
            tokio::spawn(async move {
                let outcome = upstream.ask_all(&query, dnssec, permit).await.map_err(Arc::new);
                upstream.land(landing, &question, outcome);
            });
            Some(())
        })
    }

    fn land(&self, landing: Landing, question: &Question, outcome: Outcome) {
        self.flights.land(landing, question, outcome, |outcome| {
            let mut cache = self.cache.lock();
            match outcome {
                Ok(answer) => cache.put(question.clone(), answer, Instant::now()),
                Err(_) => cache.note_failure(question, Instant::now()),
            }
        });
    }

    /// Asks one resolver after the other, the next one as soon as one fails or takes its time: the first answer counts.
    async fn ask_all(
        &self,
        query: &Query,
        dnssec: bool,
        permit: OwnedSemaphorePermit,
    ) -> Result<Message, UpstreamError> {
        let mut failure = UpstreamError::NoServer { path: self.path.clone() };
        let mut servers = self.servers_for(query.name()).into_iter();
        let mut permit = Some(permit);
        let mut under_way = FuturesUnordered::new();
        let mut asked: Vec<(SocketAddr, Instant)> = Vec::new();
        loop {
            // Another socket takes another permit; without one the next resolver's turn comes when this one has failed.
            if servers.len() > 0 {
                permit = permit.or_else(|| self.pending.clone().try_acquire_owned().ok());
            }
            if let Some(server) = permit.as_ref().and_then(|_| servers.next()) {
                let permit = permit.take();
                asked.push((server, Instant::now()));
                under_way.push(async move {
                    let answered = ask(server, query, dnssec).await;
                    (server, answered, permit)
                });
            }
            let next = tokio::time::Instant::now() + NEXT_SERVER_AFTER;
            let (server, answered, freed) = tokio::select! {
                answered = under_way.next() => match answered {
                    Some(answered) => answered,
                    None => return Err(failure),
                },
                () = sleep_until(next), if servers.len() > 0 => continue,
            };
            permit = permit.or(freed);
            asked.retain(|(one, _)| *one != server);
            match answered.map(|answer| (answer.metadata.response_code, answer)) {
                // Another may know better.
                Ok((code @ (ResponseCode::ServFail | ResponseCode::Refused | ResponseCode::NotImp), _)) => {
                    self.silent.lock().remove(&server);
                    failure = UpstreamError::Refused { server, code };
                }
                Ok((_, answer)) => {
                    self.note_silence(server, &asked);
                    return Ok(answer);
                }
                Err(error) => {
                    self.silent.lock().insert(server, Instant::now());
                    failure = error;
                }
            }
        }
    }

    /// After an answer: who was asked long enough before it and has said nothing is asked last for a while.
    fn note_silence(&self, answered: SocketAddr, asked: &[(SocketAddr, Instant)]) {
        let mut silent = self.silent.lock();
        silent.remove(&answered);
        let late = asked.iter().filter(|(_, since)| since.elapsed() >= NEXT_SERVER_AFTER);
        silent.extend(late.map(|(server, _)| (*server, Instant::now())));
    }

    /// The servers for a name, those last that were silent a moment ago.
    fn servers_for(&self, name: &Name) -> Vec<SocketAddr> {
        let stubs = self.stubs.read();
        let stub = stubs.iter().find(|(domain, _)| domain.zone_of(name)).map(|(_, servers)| servers.clone());
        drop(stubs);
        let mut servers = stub.unwrap_or_else(|| self.servers());
        servers.retain(|server| !self.loops.is_looping(server));
        let silent = self.silent.lock();
        servers.sort_by_key(|server| silent.get(server).is_some_and(|since| since.elapsed() < GRUDGE));
        servers
    }

    /// All servers that anything may be asked of.
    pub fn all_servers(&self) -> Vec<SocketAddr> {
        let mut servers = self.servers();
        servers.extend(self.stubs.read().iter().flat_map(|(_, servers)| servers));
        servers.sort();
        servers.dedup();
        servers
    }

    /// The servers, read again when the file has changed.
    fn servers(&self) -> Vec<SocketAddr> {
        let mut servers = self.servers.lock();
        let now = Instant::now();
        if servers.checked.is_none_or(|checked| now.duration_since(checked) >= RELOAD_INTERVAL) {
            servers.checked = Some(now);
            let modified = fs::metadata(&self.path).and_then(|metadata| metadata.modified()).ok();
            if modified != servers.modified || servers.modified.is_none() {
                let text = fs::read_to_string(&self.path).unwrap_or_default();
                servers.addresses = parse(&text, &self.own, link_index);
                // Links that zones name come and go, and the file does not change with them.
                servers.modified = modified.filter(|_| !has_zones(&text));
            }
        }
        servers.addresses.clone()
    }
}

/// The longest domain that a name is in decides.
fn sorted(mut stubs: StubDomains) -> StubDomains {
    stubs.sort_by_key(|(domain, _)| std::cmp::Reverse(domain.num_labels()));
    stubs
}

/// The words after `nameserver`.
fn name_servers(resolv_conf: &str) -> impl Iterator<Item = &str> {
    resolv_conf.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next()).flatten()
    })
}

fn has_zones(resolv_conf: &str) -> bool {
    name_servers(resolv_conf).any(|server| server.contains('%'))
}

/// An address of a link names it by its zone, as `fe80::1%eth0`; `index_of` finds the link.
fn parse(resolv_conf: &str, own: &[IpAddr], index_of: impl Fn(&str) -> Option<u32>) -> Vec<SocketAddr> {
    let server = |text: &str| match text.split_once('%') {
        Some((address, zone)) => Some(SocketAddrV6::new(address.parse().ok()?, PORT, 0, index_of(zone)?).into()),
        None => Some(SocketAddr::new(text.parse().ok()?, PORT)),
    };
    name_servers(resolv_conf)
        .filter_map(server)
        .filter(|server| !own.contains(&server.ip()))
        .take(MAX_SERVERS)
        .collect()
}

/// The number of a link by name, or by itself.
fn link_index(zone: &str) -> Option<u32> {
    nix::net::if_::if_nametoindex(zone).ok().or_else(|| zone.parse().ok().filter(|index| *index != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::from_ascii(text).unwrap()
    }

    #[test]
    fn the_longest_stub_domain_decides_and_silent_servers_are_asked_last() {
        let server = |text: &str| -> SocketAddr { text.parse().unwrap() };
        let (short, long) = (server("192.0.2.1:53"), server("192.0.2.2:53"));
        let stubs = vec![(name("corp."), vec![short, long]), (name("lab.corp."), vec![long])];
        let upstream = Upstream::new(Path::new("/nonexistent"), Vec::new(), stubs);
        assert_eq!(upstream.servers_for(&name("www.lab.corp.")), [long]);
        assert_eq!(upstream.servers_for(&name("www.corp.")), [short, long]);
        assert!(upstream.servers_for(&name("example.org.")).is_empty());
        upstream.silent.lock().insert(short, Instant::now());
        assert_eq!(upstream.servers_for(&name("www.corp.")), [long, short]);
    }

    #[test]
    fn a_resolver_on_a_link_is_asked_on_that_link() {
        let text =
            "nameserver fe80::1%eth0\nnameserver fe80::1%gone\nnameserver 192.0.2.1%eth0\nnameserver fe80::2%7\n";
        let index = |zone: &str| if zone == "eth0" { Some(3) } else { zone.parse().ok() };
        let server = |address: &str, link| SocketAddrV6::new(address.parse().unwrap(), PORT, 0, link).into();
        assert_eq!(parse(text, &[], index), [server("fe80::1", 3), server("fe80::2", 7)]);
        assert_eq!(
            (link_index("lo"), link_index("7"), link_index("no-such-link"), link_index("0")),
            (Some(1), Some(7), None, None)
        );
        // The link may come later, although the file stays as it is.
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("resolv.conf");
        fs::write(&path, "nameserver fe80::1%lo\n").unwrap();
        let upstream = Upstream::new(&path, Vec::new(), StubDomains::new());
        assert_eq!(upstream.all_servers(), [server("fe80::1", 1)]);
        assert_eq!(upstream.servers.lock().modified, None, "it is read again");
    }

    #[test]
    fn the_own_address_is_never_an_upstream() {
        let text = "# comment\nnameserver 10.43.0.10\nnameserver 192.0.2.1\nsearch x\nnameserver nonsense\nnameserver 2001:db8::1\n";
        let found = parse(text, &["10.43.0.10".parse().unwrap()], |_| None);
        assert_eq!(found, ["192.0.2.1:53".parse().unwrap(), "[2001:db8::1]:53".parse().unwrap()]);
    }
}
