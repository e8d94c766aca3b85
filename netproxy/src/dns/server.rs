//! The sockets of cluster DNS: UDP and TCP on the cluster DNS address.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hickory_proto::ProtoError;
use hickory_proto::op::{Edns, Message, MessageType, Metadata, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, Record, RecordType};
use hickory_proto::serialize::binary::{BinEncodable, BinEncoder};
use parking_lot::{Mutex, RwLock};
use rand::Rng;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::answer::{Answer, Asked, Zone};
use super::upstream::Upstream;
use crate::cluster::Cluster;

const MAX_TCP_CONNECTIONS: usize = 256;
/// Of those, how many one address may have: one pod must not keep all others from asking.
const MAX_TCP_CONNECTIONS_OF_ONE: usize = 32;
const TCP_IDLE_TIMEOUT: Duration = Duration::from_secs(10);
const PLAIN_UDP_BYTES: u16 = 512;
/// Larger datagrams would be fragmented on the way.
const MAX_UDP_BYTES: u16 = 1232;
/// No question is longer, whatever it says.
const MAX_QUESTION_BYTES: u16 = 4096;
const HEADER_BYTES: usize = 12;
/// No record is shorter: a pointer to its name, type, class, time to live, length.
const MIN_RECORD_BYTES: usize = 12;
/// The record that carries extensions, without any.
const EDNS_BYTES: u16 = 11;
const MAX_NAME_BYTES: u16 = 255;
/// Where a message has the bit that says that it was cut, and the number of answers.
const FLAGS: usize = 2;
const TRUNCATED: u8 = 2;
const ANSWERS: usize = 6;
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

/// What questions come in by.
#[derive(Debug)]
pub struct Sockets {
    udp: UdpSocket,
    tcp: TcpListener,
}

impl Sockets {
    pub async fn bind(address: SocketAddr) -> Result<Sockets, DnsServerError> {
        let failed = |protocol| move |source| DnsServerError::Bind { protocol, address, source };
        let udp = UdpSocket::bind(address).await.map_err(failed("UDP"))?;
        let tcp = TcpListener::bind(address).await.map_err(failed("TCP"))?;
        Ok(Sockets { udp, tcp })
    }
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

    /// Answers until shutdown.
    pub async fn run(self: Arc<Self>, sockets: Sockets, shutdown: CancellationToken) {
        tokio::select! {
            () = self.clone().serve_udp(Arc::new(sockets.udp)) => {}
            () = self.serve_tcp(sockets.tcp) => {}
            () = shutdown.cancelled() => {}
        }
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
            match self.immediate(&request, udp_limit(&request)) {
                Immediate::Message(response) => send_udp(&socket, peer, &request, &response).await,
                Immediate::Forward { response, query } => {
                    let (server, socket) = (self.clone(), socket.clone());
                    // Bounded by the number of askers that upstream lets wait: one more is refused at once.
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
        let sources = Arc::new(Sources::default());
        loop {
            let Ok(permit) = connections.clone().acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, peer)) => {
                    // Who has too many gets none; the others wait for their turn.
                    let Some(place) = sources.enter(peer.ip()) else { continue };
                    let server = self.clone();
                    tokio::spawn(async move {
                        // A peer that goes away is no error of ours.
                        let _ = server.serve_connection(stream).await;
                        drop((place, permit));
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
        const LIMIT: u16 = u16::MAX;
        loop {
            let length = timeout(TCP_IDLE_TIMEOUT, stream.read_u16()).await??;
            if length > MAX_QUESTION_BYTES {
                return Ok(());
            }
            let mut bytes = vec![0; usize::from(length)];
            timeout(TCP_IDLE_TIMEOUT, stream.read_exact(&mut bytes)).await??;
            let Some(request) = parse(&bytes) else { return Ok(()) };
            let response = match self.immediate(&request, LIMIT) {
                Immediate::Message(response) => response,
                Immediate::Forward { response, query } => self.finish(*response, query, &request).await,
            };
            let bytes = fit(&response, LIMIT).map_err(io::Error::other)?;
            let length = u16::try_from(bytes.len()).map_err(io::Error::other)?;
            timeout(TCP_IDLE_TIMEOUT, stream.write_all(&[&length.to_be_bytes()[..], &bytes].concat())).await??;
        }
    }

    /// Everything that needs no waiting; the answer may have `limit` bytes.
    fn immediate(&self, request: &Message, limit: u16) -> Immediate {
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
        let most = usize::from(limit).saturating_sub(HEADER_BYTES) / MIN_RECORD_BYTES;
        let mut name = query.name().clone();
        for _ in 0..MAX_ALIASES {
            let asked = Asked { name: &name, kind: query.query_type(), now_seconds: now, most, seed: rand::random() };
            let answer = self.zone.answer(&self.cluster.read(), &asked);
            match answer {
                Answer::Records(records) => {
                    response.metadata.authoritative = true;
                    response.metadata.truncation = records.is_cut;
                    response.add_answers(records.answers);
                    response.add_additionals(records.additional);
                    return Immediate::Message(response);
                }
                // Who denied what it has not heard of would be believed.
                Answer::Unknown => break,
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
    response.add_answers(mixed(answer.answers));
    response.add_authorities(answer.authorities);
    response.add_additionals(answer.additionals);
    response
}

/// The addresses among the records in another order, so that not all askers go to the first.
fn mixed(mut records: Vec<Record>) -> Vec<Record> {
    let is_address = |record: &Record| matches!(record.record_type(), RecordType::A | RecordType::AAAA);
    let places: Vec<usize> = (0..records.len()).filter(|place| is_address(&records[*place])).collect();
    let mut random = rand::rng();
    for last in (1..places.len()).rev() {
        records.swap(places[last], places[random.random_range(0..=last)]);
    }
    records
}

/// How many bytes the asker takes by UDP.
fn udp_limit(request: &Message) -> u16 {
    request.edns.as_ref().map_or(PLAIN_UDP_BYTES, |edns| edns.max_payload().clamp(PLAIN_UDP_BYTES, MAX_UDP_BYTES))
}

async fn send_udp(socket: &UdpSocket, peer: SocketAddr, request: &Message, response: &Message) {
    match fit(response, udp_limit(request)) {
        // What cannot be sent is asked again.
        Ok(bytes) => drop(socket.send_to(&bytes, peer).await),
        Err(error) => debug!(error = &error as &dyn std::error::Error, "DNS answer cannot be encoded"),
    }
}

/// The message, where it has no more bytes than that.
fn whole(message: &Message, limit: u16) -> Result<Option<Vec<u8>>, ProtoError> {
    // The encoder writes a name in full before it finds that it has been there.
    let bytes = encode(message, limit.saturating_add(MAX_NAME_BYTES))?;
    let is_whole = bytes.len() <= usize::from(limit) && (message.metadata.truncation || bytes[FLAGS] & TRUNCATED == 0);
    Ok(is_whole.then_some(bytes))
}

/// As much of the message as fits into this much.
fn encode(message: &Message, limit: u16) -> Result<Vec<u8>, ProtoError> {
    let mut bytes = Vec::with_capacity(usize::from(PLAIN_UDP_BYTES));
    let mut encoder = BinEncoder::new(&mut bytes);
    encoder.set_max_size(limit);
    message.emit(&mut encoder)?;
    Ok(bytes)
}

/// For a fuzzer: what is sent for a question of any bytes, where upstream's answer is any bytes too. None where there is no
/// question, or nothing can be sent.
#[cfg(any(test, feature = "fuzzing"))]
pub fn exchange(server: &DnsServer, question: &[u8], answer: &[u8], limit: u16) -> Option<(Message, Vec<u8>)> {
    let request = parse(question)?;
    let response = match server.immediate(&request, limit) {
        Immediate::Message(response) => response,
        Immediate::Forward { response, .. } => merge(*response, Message::from_vec(answer).ok()?),
    };
    fit(&response, limit).ok().map(|bytes| (request, bytes))
}

/// The message in no more bytes than the asker takes. Additional records are left out first, without which an answer is
/// whole; then as many answers stay as there is room for, and the asker is told to ask by TCP for all. Some askers never
/// do, and use what they got.
fn fit(response: &Message, limit: u16) -> Result<Vec<u8>, ProtoError> {
    let mut part = response.clone();
    if !response.metadata.truncation {
        if let Some(bytes) = whole(response, limit)? {
            return Ok(bytes);
        }
        part.additionals.clear();
        if let Some(bytes) = whole(&part, limit)? {
            return Ok(bytes);
        }
    }
    part.metadata.truncation = true;
    part.additionals.clear();
    part.authorities.clear();
    // What the asker has to know comes last, and there has to be room for it.
    let room = if part.edns.is_some() { limit.saturating_sub(EDNS_BYTES) } else { limit };
    let edns = part.edns.take();
    let least = encode(&part, room)?;
    let count = least.get(ANSWERS..ANSWERS + 2).map_or(0, |count| u16::from_be_bytes([count[0], count[1]]));
    part.edns = edns;
    let answers = std::mem::take(&mut part.answers);
    let mut more = answers.into_iter();
    part.answers.extend(more.by_ref().take(usize::from(count)));
    let mut best = encode(&part, limit)?;
    // There may be room for some more, and that is found out one by one.
    for answer in more {
        part.answers.push(answer);
        match whole(&part, limit)? {
            Some(bytes) => best = bytes,
            None => break,
        }
    }
    Ok(best)
}

/// How many connections each address has.
#[derive(Default)]
struct Sources {
    counts: Mutex<HashMap<IpAddr, usize>>,
}

/// One of an address's connections, until it is dropped.
struct Place {
    sources: Arc<Sources>,
    address: IpAddr,
}

impl Sources {
    fn enter(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
        let mut counts = self.counts.lock();
        let count = counts.entry(address).or_default();
        if *count >= MAX_TCP_CONNECTIONS_OF_ONE {
            return None;
        }
        *count += 1;
        Some(Place { sources: self.clone(), address })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.sources.counts.lock();
        if let Some(count) = counts.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::rr::RData;
    use hickory_proto::rr::rdata::A;

    fn answers(count: u32, with_extensions: bool) -> Message {
        let name = Name::from_ascii("large.default.svc.cluster.local.").unwrap();
        let mut request = Message::query();
        request.add_query(Query::query(name.clone(), RecordType::A));
        if with_extensions {
            request.set_edns(Edns::new());
        }
        let mut response = empty_response(&request);
        let record = |number: u32| Record::from_rdata(name.clone(), 5, RData::A(A(number.to_be_bytes().into())));
        response.add_answers((0..count).map(record));
        response.add_additionals((0..count).map(record));
        response
    }

    #[test]
    fn as_many_records_stay_as_there_is_room_for() {
        const RECORD: usize = 64;
        for with_extensions in [false, true] {
            for (count, limit) in [(5, 512), (35, 512), (35, 1232), (1000, 1232), (1000, u16::MAX), (1000, 9000)] {
                let response = answers(count, with_extensions);
                let bytes = fit(&response, limit).unwrap();
                let limit = usize::from(limit);
                let sent = Message::from_vec(&bytes).unwrap();
                assert!(bytes.len() <= limit && sent.edns.is_some() == with_extensions);
                let fits = bytes.len() + RECORD > limit;
                let is_whole = sent.answers.len() == response.answers.len();
                assert_eq!(sent.metadata.truncation, !is_whole, "{count} in {limit}");
                assert!(is_whole || fits, "{count} in {limit}: {} bytes, {} records", bytes.len(), sent.answers.len());
            }
        }
        let mut cut = answers(3, true);
        cut.metadata.truncation = true;
        assert!(Message::from_vec(&fit(&cut, 512).unwrap()).unwrap().metadata.truncation, "what was cut before");
    }

    #[test]
    fn one_address_has_only_so_many_places() {
        let sources = Arc::new(Sources::default());
        let (one, other): (IpAddr, IpAddr) = ([10, 42, 0, 2].into(), [10, 42, 0, 3].into());
        let mut places: Vec<Place> = (0..MAX_TCP_CONNECTIONS_OF_ONE).map(|_| sources.enter(one).unwrap()).collect();
        assert!(sources.enter(one).is_none() && sources.enter(other).is_some());
        places.pop();
        assert!(sources.enter(one).is_some());
        places.clear();
        assert!(sources.counts.lock().is_empty(), "who has none is forgotten");
    }
}
