//! Names outside the cluster: asked of the resolvers in the node's resolv.conf, or for stub domains of their own.
//!
//! A resolver that does not answer is asked last for a while, and when none does, an answer whose time is over is given.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use hickory_proto::op::{Edns, Message, Query, ResponseCode};
use hickory_proto::rr::Name;
use parking_lot::{Mutex, RwLock};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::cache::{Cache, Question};
use super::loops::Loops;

const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(2);
const MAX_SERVERS: usize = 3;
/// Questions under way at once. It also bounds a loop until it is found.
const MAX_PENDING: usize = 512;
/// How long a resolver that did not answer is asked last.
const GRUDGE: Duration = Duration::from_secs(10);
const RELOAD_INTERVAL: Duration = Duration::from_secs(5);
const PORT: u16 = 53;
const UDP_PAYLOAD_BYTES: u16 = 1232;

/// A question that no resolver answered.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    #[error("no upstream resolver is configured in {}", path.display())]
    NoServer { path: PathBuf },
    #[error("too many questions are under way")]
    Busy,
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
    pending: Semaphore,
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
            pending: Semaphore::new(MAX_PENDING),
            loops: Loops::default(),
        }
    }

    /// Asks others for these domains from now on. What others said of them is forgotten.
    pub fn set_stubs(&self, stubs: StubDomains) {
        let stubs = sorted(stubs);
        let mut known = self.stubs.write();
        if *known != stubs {
            *known = stubs;
            *self.cache.lock() = Cache::default();
        }
    }

    /// The answer as it was given not long ago.
    pub fn cached(&self, query: &Query, dnssec: bool) -> Option<Message> {
        let found = self.cache.lock().get(&Question::new(query, dnssec), Instant::now())?;
        self.counts.cached.fetch_add(1, Ordering::Relaxed);
        Some(found)
    }

    /// Asks the resolvers one after the other. The answer's id is not the asker's.
    pub async fn resolve(&self, query: &Query, dnssec: bool) -> Result<Message, UpstreamError> {
        let asked = self.ask_all(query, dnssec).await;
        let question = Question::new(query, dnssec);
        match asked {
            Ok(answer) => {
                self.cache.lock().put(question, &answer, Instant::now());
                Ok(answer)
            }
            Err(error) => match self.cache.lock().stale(&question, Instant::now()) {
                Some(answer) => {
                    self.counts.stale.fetch_add(1, Ordering::Relaxed);
                    Ok(answer)
                }
                None => {
                    self.counts.failed.fetch_add(1, Ordering::Relaxed);
                    Err(error)
                }
            },
        }
    }

    async fn ask_all(&self, query: &Query, dnssec: bool) -> Result<Message, UpstreamError> {
        let _permit = self.pending.try_acquire().map_err(|_| UpstreamError::Busy)?;
        let mut failure = UpstreamError::NoServer { path: self.path.clone() };
        for server in self.servers_for(query.name()) {
            match ask(server, query, dnssec).await {
                Ok(answer) => {
                    self.silent.lock().remove(&server);
                    match answer.metadata.response_code {
                        // Another may know better.
                        code @ (ResponseCode::ServFail | ResponseCode::Refused | ResponseCode::NotImp) => {
                            failure = UpstreamError::Refused { server, code };
                        }
                        _ => return Ok(answer),
                    }
                }
                Err(error) => {
                    self.silent.lock().insert(server, Instant::now());
                    failure = error;
                }
            }
        }
        Err(failure)
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
                servers.modified = modified;
                servers.addresses = parse(&fs::read_to_string(&self.path).unwrap_or_default(), &self.own);
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

fn parse(resolv_conf: &str, own: &[IpAddr]) -> Vec<SocketAddr> {
    let addresses = resolv_conf.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next()?.parse::<IpAddr>().ok()).flatten()
    });
    addresses
        .filter(|address| !own.contains(address))
        .take(MAX_SERVERS)
        .map(|address| SocketAddr::new(address, PORT))
        .collect()
}

/// Asks one server, by TCP when the answer does not fit into a datagram.
pub async fn ask(server: SocketAddr, query: &Query, dnssec: bool) -> Result<Message, UpstreamError> {
    let mut question = Message::query();
    question.metadata.recursion_desired = true;
    question.add_query(query.clone());
    let mut edns = Edns::new();
    edns.set_max_payload(UDP_PAYLOAD_BYTES).set_dnssec_ok(dnssec);
    question.set_edns(edns);
    let bytes = question.to_vec().map_err(UpstreamError::Encode)?;
    let failed = |source| UpstreamError::Server { server, source };
    let expired = |_| failed(io::ErrorKind::TimedOut.into());
    let answer = timeout(ATTEMPT_TIMEOUT, by_udp(server, &question, &bytes)).await.map_err(expired)?.map_err(failed)?;
    if !answer.metadata.truncation {
        return Ok(answer);
    }
    timeout(ATTEMPT_TIMEOUT, by_tcp(server, &question, &bytes)).await.map_err(expired)?.map_err(failed)
}

/// Whether a message answers the question that was asked: anybody can send to an open port.
fn matches(question: &Message, answer: &Message) -> bool {
    let same = |a: &Query, b: &Query| a.name() == b.name() && a.query_type() == b.query_type();
    answer.metadata.id == question.metadata.id
        && answer.queries.len() == question.queries.len()
        && answer.queries.iter().zip(&question.queries).all(|(a, b)| same(a, b))
}

async fn by_udp(server: SocketAddr, question: &Message, bytes: &[u8]) -> io::Result<Message> {
    let any: SocketAddr = if server.is_ipv4() { ([0; 4], 0).into() } else { ([0; 16], 0).into() };
    // A fresh port for each question is half of what makes a forged answer improbable.
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    socket.send(bytes).await?;
    let mut buffer = vec![0; 4096];
    loop {
        let length = socket.recv(&mut buffer).await?;
        if let Ok(answer) = Message::from_vec(&buffer[..length])
            && matches(question, &answer)
        {
            return Ok(answer);
        }
    }
}

async fn by_tcp(server: SocketAddr, question: &Message, bytes: &[u8]) -> io::Result<Message> {
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(bytes.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes()[..], bytes].concat()).await?;
    let length = stream.read_u16().await?;
    let mut buffer = vec![0; usize::from(length)];
    stream.read_exact(&mut buffer).await?;
    let answer = Message::from_vec(&buffer).map_err(io::Error::other)?;
    if matches(question, &answer) { Ok(answer) } else { Err(io::ErrorKind::InvalidData.into()) }
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
    fn the_own_address_is_never_an_upstream() {
        let text = "# comment\nnameserver 10.43.0.10\nnameserver 192.0.2.1\nsearch x\nnameserver nonsense\nnameserver 2001:db8::1\n";
        let found = parse(text, &["10.43.0.10".parse().unwrap()]);
        assert_eq!(found, ["192.0.2.1:53".parse().unwrap(), "[2001:db8::1]:53".parse().unwrap()]);
    }
}
