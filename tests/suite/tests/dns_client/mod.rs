//! Questions to cluster DNS, and resolvers that it asks in turn.
#![allow(dead_code, reason = "each test program uses a part")]

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use oarlock_testkit::wait_for;
use serde_json::json;

use crate::netproxy_world::{Family, TIMEOUT, World, at, port};

pub fn kind_of(family: Family) -> RecordType {
    if family == Family::V4 { RecordType::A } else { RecordType::AAAA }
}

pub fn question(name: &str, kind: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

/// As [`question`], from somebody who takes as many bytes by UDP.
pub fn taking(bytes: u16, name: &str, kind: RecordType) -> Message {
    let mut message = question(name, kind);
    let mut edns = Edns::new();
    edns.set_max_payload(bytes);
    message.set_edns(edns);
    message
}

/// The answer by UDP, and its length.
pub fn by_udp(place: Option<&str>, family: Family, question: &Message) -> (Message, usize) {
    let mut buffer = [0; 9000];
    let length = at(place, || {
        let socket = UdpSocket::bind((family.any(), 0)).unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        socket.connect((family.service(10), 53)).unwrap();
        socket.send(&question.to_vec().unwrap()).unwrap();
        socket.recv(&mut buffer).unwrap()
    });
    let answer = Message::from_vec(&buffer[..length]).unwrap();
    assert_eq!(
        (answer.metadata.id, answer.metadata.message_type, &answer.queries),
        (question.metadata.id, MessageType::Response, &question.queries)
    );
    (answer, length)
}

pub fn connection(family: Family) -> TcpStream {
    let stream = TcpStream::connect_timeout(&(family.service(10), 53).into(), TIMEOUT).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    stream
}

pub fn framed(message: &Message) -> Vec<u8> {
    let bytes = message.to_vec().unwrap();
    [&(bytes.len() as u16).to_be_bytes()[..], &bytes].concat()
}

pub fn read_framed(stream: &mut TcpStream) -> Message {
    let mut length = [0; 2];
    stream.read_exact(&mut length).unwrap();
    let mut bytes = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut bytes).unwrap();
    Message::from_vec(&bytes).unwrap()
}

pub fn by_tcp(place: Option<&str>, family: Family, question: &Message) -> Message {
    at(place, || {
        let mut stream = connection(family);
        stream.write_all(&framed(question)).unwrap();
        read_framed(&mut stream)
    })
}

pub fn addresses_of(records: &[Record]) -> Vec<IpAddr> {
    let address = |record: &Record| match &record.data {
        RData::A(A(address)) => Some(IpAddr::V4(*address)),
        RData::AAAA(AAAA(address)) => Some(IpAddr::V6(*address)),
        _ => None,
    };
    records.iter().filter_map(address).collect()
}

/// The proxy's DNS sockets come a moment after its rules.
pub fn until_served(family: Family) {
    let address = (family.service(10), 53).into();
    wait_for("the proxy's DNS", TIMEOUT, || TcpStream::connect_timeout(&address, TIMEOUT).ok());
}

/// A proxy that said that it is ready answers questions, without anybody waiting for it.
pub fn is_served(family: Family) {
    let connected = TcpStream::connect_timeout(&(family.service(10), 53).into(), TIMEOUT);
    connected.expect("cluster DNS is served from the moment that the proxy is ready");
}

/// A headless Service of this many endpoints in this family, and the name of both.
pub fn headless(world: &World, family: Family, name: &str, endpoints: &[IpAddr]) -> String {
    is_served(family);
    let name = format!("{name}-{}", family.table());
    world.slice(&name, "TCP", endpoints);
    world.service(&name, json!({"clusterIP": "None", "ports": port("TCP", None)}));
    let name = format!("{name}.default.svc.cluster.local.");
    wait_for("the name", TIMEOUT, || {
        let found = by_tcp(None, family, &question(&name, kind_of(family)));
        (found.answers.len() == endpoints.len()).then_some(())
    });
    name
}

/// Starts the proxy anew with stub domains, and with the resolver for all else.
pub fn with_stubs(world: &mut World, stubs: &[(&str, &[SocketAddr])], resolver: Option<IpAddr>) {
    world.stop_proxy();
    let mut config = world.config();
    config.stub_domains = stubs.iter().map(|(domain, servers)| ((*domain).to_owned(), servers.to_vec())).collect();
    if let Some(address) = resolver {
        std::fs::write(&config.upstream_resolv_conf, format!("nameserver {address}\n")).unwrap();
    }
    world.start_proxy_with(config);
    world.families.iter().for_each(|family| is_served(*family));
}

/// How a resolver behaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Behaviour {
    Answers,
    Fails,
    Silent,
    /// The first datagram about each name gets lost.
    Loses,
    /// It takes so long.
    Late(Duration),
    /// It says nothing until it behaves otherwise.
    Holds,
}

/// A question by UDP: the name and who asked.
pub type Heard = (String, SocketAddr);

/// A resolver of the same addresses for every name by UDP, of one more by TCP. By UDP it says so when the name begins with
/// `large.`.
pub struct Resolver {
    state: Mutex<State>,
}

struct State {
    behaviour: Behaviour,
    addresses: Vec<IpAddr>,
    seconds: u32,
    heard: Vec<Heard>,
}

impl Resolver {
    /// Serves in the namespace of a pod, or of the node.
    pub fn start(place: Option<&str>, address: SocketAddr, addresses: &[IpAddr], seconds: u32) -> Arc<Resolver> {
        let state = State { behaviour: Behaviour::Answers, addresses: addresses.to_vec(), seconds, heard: Vec::new() };
        let resolver = Arc::new(Resolver { state: Mutex::new(state) });
        let (socket, listener) = at(place, || (UdpSocket::bind(address).unwrap(), TcpListener::bind(address).unwrap()));
        let own = resolver.clone();
        std::thread::spawn(move || own.serve_udp(&socket));
        let own = resolver.clone();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let answer = own.answer(&read_framed(&mut stream), true);
                let _ = stream.write_all(&framed(&answer));
            }
        });
        resolver
    }

    pub fn behave(&self, behaviour: Behaviour) {
        self.state.lock().unwrap().behaviour = behaviour;
    }

    /// Says something else from now on.
    pub fn say(&self, addresses: &[IpAddr], seconds: u32) {
        let mut state = self.state.lock().unwrap();
        (state.addresses, state.seconds) = (addresses.to_vec(), seconds);
    }

    /// The questions about a name.
    pub fn heard(&self, name: &str) -> Vec<Heard> {
        self.state.lock().unwrap().heard.iter().filter(|(heard, _)| heard == name).cloned().collect()
    }

    /// The sockets that questions about a name came from.
    pub fn sockets(&self, name: &str) -> BTreeSet<SocketAddr> {
        self.heard(name).into_iter().map(|(_, asker)| asker).collect()
    }

    fn serve_udp(self: &Arc<Self>, socket: &UdpSocket) {
        let mut buffer = [0; 1500];
        while let Ok((length, asker)) = socket.recv_from(&mut buffer) {
            let question = Message::from_vec(&buffer[..length]).unwrap();
            let name = question.queries[0].name().to_ascii();
            let (behaviour, is_first) = {
                let mut state = self.state.lock().unwrap();
                let is_first = !state.heard.iter().any(|(heard, _)| *heard == name);
                state.heard.push((name, asker));
                (state.behaviour.clone(), is_first)
            };
            let send = |answer: Message, socket: &UdpSocket| {
                let _ = socket.send_to(&answer.to_vec().unwrap(), asker);
            };
            let answer = self.answer(&question, false);
            match behaviour {
                Behaviour::Silent => {}
                Behaviour::Loses if is_first => {}
                Behaviour::Late(time) => {
                    let socket = socket.try_clone().unwrap();
                    std::thread::spawn(move || {
                        std::thread::sleep(time);
                        let _ = socket.send_to(&answer.to_vec().unwrap(), asker);
                    });
                }
                Behaviour::Holds => {
                    let (own, socket) = (self.clone(), socket.try_clone().unwrap());
                    std::thread::spawn(move || {
                        wait_for("the answer to be let go", TIMEOUT, || {
                            (own.state.lock().unwrap().behaviour != Behaviour::Holds).then_some(())
                        });
                        let _ = socket.send_to(&answer.to_vec().unwrap(), asker);
                    });
                }
                _ => send(answer, socket),
            }
        }
    }

    fn answer(&self, question: &Message, by_tcp: bool) -> Message {
        let state = self.state.lock().unwrap();
        let mut answer = Message::response(question.metadata.id, question.metadata.op_code);
        answer.add_queries(question.queries.iter().cloned());
        let name = question.queries[0].name().clone();
        if state.behaviour == Behaviour::Fails && !by_tcp {
            answer.metadata.response_code = ResponseCode::ServFail;
        } else if !by_tcp && name.to_ascii().starts_with("large.") {
            answer.metadata.truncation = true;
        } else {
            for address in &state.addresses {
                let data = match address {
                    IpAddr::V4(address) => RData::A(A(*address)),
                    IpAddr::V6(address) => RData::AAAA(AAAA(*address)),
                };
                answer.add_answer(Record::from_rdata(name.clone(), state.seconds, data));
            }
            if by_tcp {
                answer.add_answer(Record::from_rdata(name, state.seconds, RData::A(A(Ipv4Addr::new(192, 0, 2, 99)))));
            }
        }
        answer
    }
}
