//! The sockets of cluster DNS: UDP and TCP on the cluster DNS address.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hickory_proto::ProtoError;
use hickory_proto::op::{Edns, Message, MessageType, Metadata, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RecordType};
use parking_lot::RwLock;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::answer::{Answer, Zone};
use super::upstream::Upstream;
use crate::cluster::Cluster;

const MAX_TCP_CONNECTIONS: usize = 128;
const TCP_IDLE_TIMEOUT: Duration = Duration::from_secs(10);
const PLAIN_UDP_BYTES: u16 = 512;
/// Larger datagrams would be fragmented on the way.
const MAX_UDP_BYTES: u16 = 1232;
/// How many aliases are followed.
const MAX_ALIASES: usize = 8;

/// The DNS address cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum DnsServerError {
    #[error("cannot listen on {protocol} {address}")]
    Bind { protocol: &'static str, address: SocketAddr, source: io::Error },
}

/// Cluster DNS.
pub struct DnsServer {
    zone: Zone,
    cluster: Arc<RwLock<Cluster>>,
    upstream: Arc<Upstream>,
    answered: AtomicU64,
    forwarded: AtomicU64,
}

/// Questions by what became of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    pub answered: u64,
    /// Asked of upstream resolvers.
    pub forwarded: u64,
    /// Answered from what upstream said before.
    pub cached: u64,
    /// Answered with what upstream said long before, because nobody could be asked.
    pub stale: u64,
    /// Not answered by anybody.
    pub failed: u64,
}

/// What can be said about a question at once.
enum Immediate {
    Message(Message),
    /// The rest has to be asked of the upstream resolvers.
    Forward {
        response: Box<Message>,
        query: Query,
    },
}

impl DnsServer {
    pub fn new(zone: Zone, cluster: Arc<RwLock<Cluster>>, upstream: Arc<Upstream>) -> DnsServer {
        DnsServer { zone, cluster, upstream, answered: AtomicU64::new(0), forwarded: AtomicU64::new(0) }
    }

    /// What the server has done so far.
    pub fn counts(&self) -> Counts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            answered: read(&self.answered),
            forwarded: read(&self.forwarded),
            cached: read(&self.upstream.counts.cached),
            stale: read(&self.upstream.counts.stale),
            failed: read(&self.upstream.counts.failed),
        }
    }

    /// Serves `address` until shutdown.
    pub async fn run(self: Arc<Self>, address: SocketAddr, shutdown: CancellationToken) -> Result<(), DnsServerError> {
        let failed = |protocol| move |source| DnsServerError::Bind { protocol, address, source };
        let udp = Arc::new(UdpSocket::bind(address).await.map_err(failed("UDP"))?);
        let tcp = TcpListener::bind(address).await.map_err(failed("TCP"))?;
        tokio::select! {
            () = self.clone().serve_udp(udp) => {}
            () = self.serve_tcp(tcp) => {}
            () = shutdown.cancelled() => {}
        }
        Ok(())
    }

    async fn serve_udp(self: Arc<Self>, socket: Arc<UdpSocket>) {
        let mut buffer = vec![0; 4096];
        loop {
            let (length, peer) = match socket.recv_from(&mut buffer).await {
                Ok(received) => received,
                Err(error) => {
                    // An ICMP error about an answer sent earlier ends up here; the socket itself is fine.
                    debug!(error = &error as &dyn std::error::Error, "receiving a DNS question failed");
                    continue;
                }
            };
            let Some(request) = parse(&buffer[..length]) else { continue };
            match self.immediate(&request) {
                Immediate::Message(response) => send_udp(&socket, peer, &request, &response).await,
                Immediate::Forward { response, query } => {
                    let (server, socket) = (self.clone(), socket.clone());
                    // Bounded by the number of questions that upstream takes at once: one more is refused at once.
                    tokio::spawn(async move {
                        let response = server.finish(*response, query, &request).await;
                        send_udp(&socket, peer, &request, &response).await;
                    });
                }
            }
        }
    }

    async fn serve_tcp(self: Arc<Self>, listener: TcpListener) {
        let connections = Arc::new(Semaphore::new(MAX_TCP_CONNECTIONS));
        loop {
            let Ok(permit) = connections.clone().acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let server = self.clone();
                    tokio::spawn(async move {
                        // A peer that goes away is no error of ours.
                        let _ = server.serve_connection(stream).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    debug!(error = &error as &dyn std::error::Error, "accepting a DNS connection failed");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    async fn serve_connection(&self, mut stream: TcpStream) -> io::Result<()> {
        loop {
            let length = timeout(TCP_IDLE_TIMEOUT, stream.read_u16()).await??;
            let mut bytes = vec![0; usize::from(length)];
            timeout(TCP_IDLE_TIMEOUT, stream.read_exact(&mut bytes)).await??;
            let Some(request) = parse(&bytes) else { return Ok(()) };
            let response = match self.immediate(&request) {
                Immediate::Message(response) => response,
                Immediate::Forward { response, query } => self.finish(*response, query, &request).await,
            };
            let bytes = response.to_vec().map_err(io::Error::other)?;
            let length = u16::try_from(bytes.len()).map_err(io::Error::other)?;
            timeout(TCP_IDLE_TIMEOUT, stream.write_all(&[&length.to_be_bytes()[..], &bytes].concat())).await??;
        }
    }

    /// Everything that needs no waiting.
    fn immediate(&self, request: &Message) -> Immediate {
        self.answered.fetch_add(1, Ordering::Relaxed);
        let mut response = empty_response(request);
        if request.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
            response.metadata.response_code = ResponseCode::BADVERS;
            return Immediate::Message(response);
        }
        let [query] = request.queries.as_slice() else {
            response.metadata.response_code = ResponseCode::FormErr;
            return Immediate::Message(response);
        };
        let unsupported = request.metadata.op_code != OpCode::Query || query.query_class() != DNSClass::IN;
        if unsupported || query.query_type() == RecordType::AXFR {
            response.metadata.response_code = ResponseCode::NotImp;
            return Immediate::Message(response);
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs() as u32);
        let mut name = query.name().clone();
        for _ in 0..MAX_ALIASES {
            let cluster = self.cluster.read();
            match self.zone.answer(&cluster, &name, query.query_type(), now) {
                Answer::Records(records) => {
                    response.metadata.authoritative = true;
                    response.add_answers(records);
                    if query.query_type() == RecordType::SRV {
                        response.add_additionals(self.zone.additional(&cluster, &name, now));
                    }
                    return Immediate::Message(response);
                }
                Answer::NoData(soa) => {
                    response.metadata.authoritative = true;
                    response.add_authority(soa);
                    return Immediate::Message(response);
                }
                Answer::NoName(soa) => {
                    response.metadata.authoritative = true;
                    // After an alias, the code is about the last name.
                    response.metadata.response_code = ResponseCode::NXDomain;
                    response.add_authority(soa);
                    return Immediate::Message(response);
                }
                Answer::Alias(record, target) => {
                    response.metadata.authoritative = true;
                    response.add_answer(record);
                    if query.query_type() == RecordType::CNAME {
                        return Immediate::Message(response);
                    }
                    name = target;
                }
                Answer::NotOurs if self.upstream.loops.hear(&name) => {
                    response.metadata.response_code = ResponseCode::NXDomain;
                    return Immediate::Message(response);
                }
                Answer::NotOurs => return self.forward(response, name, query, request),
            }
        }
        response.metadata.response_code = ResponseCode::ServFail;
        Immediate::Message(response)
    }

    fn forward(&self, response: Message, name: Name, query: &Query, request: &Message) -> Immediate {
        let query = Query::query(name, query.query_type());
        match self.upstream.cached(&query, wants_dnssec(request)) {
            Some(answer) => Immediate::Message(merge(response, answer)),
            None => Immediate::Forward { response: Box::new(response), query },
        }
    }

    async fn finish(&self, mut response: Message, query: Query, request: &Message) -> Message {
        self.forwarded.fetch_add(1, Ordering::Relaxed);
        match self.upstream.resolve(&query, wants_dnssec(request)).await {
            Ok(answer) => merge(response, answer),
            Err(error) => {
                debug!(error = &error as &dyn std::error::Error, name = %query.name(), "name could not be resolved");
                response.metadata.response_code = ResponseCode::ServFail;
                response
            }
        }
    }
}

fn wants_dnssec(request: &Message) -> bool {
    request.edns.as_ref().is_some_and(|edns| edns.flags().dnssec_ok)
}

/// A question; anything else is not worth an answer.
fn parse(bytes: &[u8]) -> Option<Message> {
    Message::from_vec(bytes).ok().filter(|message| message.metadata.message_type == MessageType::Query)
}

fn empty_response(request: &Message) -> Message {
    let mut response = Message::response(request.metadata.id, request.metadata.op_code);
    response.metadata = Metadata::response_from_request(&request.metadata);
    response.metadata.recursion_available = true;
    response.add_queries(request.queries.iter().cloned());
    if request.edns.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(MAX_UDP_BYTES);
        edns.set_dnssec_ok(wants_dnssec(request));
        response.set_edns(edns);
    }
    response
}

/// The upstream's answer after what is there already.
fn merge(mut response: Message, answer: Message) -> Message {
    let has_alias = !response.answers.is_empty();
    response.metadata.response_code = answer.metadata.response_code;
    response.metadata.authentic_data = answer.metadata.authentic_data && !has_alias;
    response.metadata.authoritative = has_alias;
    response.add_answers(answer.answers);
    response.add_authorities(answer.authorities);
    response.add_additionals(answer.additionals);
    response
}

async fn send_udp(socket: &UdpSocket, peer: SocketAddr, request: &Message, response: &Message) {
    let limit =
        request.edns.as_ref().map_or(PLAIN_UDP_BYTES, |edns| edns.max_payload().clamp(PLAIN_UDP_BYTES, MAX_UDP_BYTES));
    let bytes = fit(response, usize::from(limit));
    match bytes {
        // What cannot be sent is asked again.
        Ok(bytes) => drop(socket.send_to(&bytes, peer).await),
        Err(error) => debug!(error = &error as &dyn std::error::Error, "DNS answer cannot be encoded"),
    }
}

/// The message in no more bytes than the asker takes. Additional records are left out first, without which an answer is
/// whole; then as many answers stay as there is room for, and the asker is told to ask by TCP for all. Some askers never
/// do, and use what they got.
fn fit(response: &Message, limit: usize) -> Result<Vec<u8>, ProtoError> {
    let bytes = response.to_vec()?;
    if bytes.len() <= limit {
        return Ok(bytes);
    }
    let mut part = response.clone();
    part.additionals.clear();
    let bytes = part.to_vec()?;
    if bytes.len() <= limit {
        return Ok(bytes);
    }
    part.metadata.truncation = true;
    part.authorities.clear();
    let answers = std::mem::take(&mut part.answers);
    let mut best = part.to_vec()?;
    let (mut fits, mut exceeds) = (0, answers.len() + 1);
    while exceeds - fits > 1 {
        let count = fits + (exceeds - fits) / 2;
        part.answers = answers[..count].to_vec();
        let bytes = part.to_vec()?;
        if bytes.len() <= limit {
            (best, fits) = (bytes, count);
        } else {
            exceeds = count;
        }
    }
    Ok(best)
}
