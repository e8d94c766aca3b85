//! Flows that began before a host port led to a container, and those that it led there: with real packets.

#[macro_use]
mod cni_caller;

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use cni_caller::{Caller, Mode, addresses, neighbour, neighbour_addresses, netns};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, recv, sendto, setsockopt, socket,
    sockopt,
};
use nix::sys::time::TimeVal;
use oarlock_netlink::{Connection, Protocol};
use oarlock_netns::run_in;
use oarlock_testkit::{in_fresh_namespaces, wait_for};
use serde_json::{Value, json};

const PORT: u16 = 9999;

in_each_mode! {
    udp_clients_of_the_host_find_the_container_and_others_are_left_alone
    sctp_clients_of_the_host_find_the_container
}

fn portmap(protocol: &str) -> Value {
    let mapping = json!({"hostPort": PORT, "containerPort": 80, "protocol": protocol});
    json!({"name": "net", "type": "portmap", "runtimeConfig": {"portMappings": [mapping]}})
}

/// How long something may take that has to come.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long an answer is waited for before the question is sent again, and what must not come.
const MOMENT: Duration = Duration::from_secs(1);

/// A server that answers with its name, with the client's address as it sees it, and with the question.
fn answer(place: Option<&str>, name: &'static str, port: u16) {
    let bind = || UdpSocket::bind(("::", port)).unwrap();
    let server = place.map_or_else(bind, |place| run_in(&netns(place), bind).unwrap());
    std::thread::spawn(move || {
        let mut buffer = [0; 16];
        while let Ok((length, from)) = server.recv_from(&mut buffer) {
            let question = String::from_utf8_lossy(&buffer[..length]);
            let _ = server.send_to(format!("{name} {from} {question}").as_bytes(), from);
        }
    });
}

/// What tells one question or packet from all others.
fn next_number() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    NEXT.fetch_add(1, Ordering::SeqCst)
}

/// A client that keeps its socket, and so its flow.
struct Client(UdpSocket);

impl Client {
    fn new(place: &str, to: IpAddr, port: u16) -> Client {
        let any: SocketAddr = if to.is_ipv4() { ([0; 4], 0).into() } else { ([0_u16; 8], 0).into() };
        let open = || {
            let socket = UdpSocket::bind(any).unwrap();
            socket.set_read_timeout(Some(MOMENT)).unwrap();
            socket.connect((to, port)).unwrap();
            socket
        };
        Client(run_in(&netns(place), open).unwrap())
    }

    /// Who answers, and what it sees. Answers to earlier questions do not count.
    fn ask(&self) -> (String, String) {
        let question = next_number().to_string();
        wait_for("an answer", PATIENCE, || {
            // Refused where nobody listens.
            self.0.send(question.as_bytes()).ok()?;
            let mut buffer = [0; 128];
            loop {
                let length = self.0.recv(&mut buffer).ok()?;
                let text = String::from_utf8_lossy(&buffer[..length]);
                let words: Vec<&str> = text.split(' ').collect();
                if let [name, seen, answered] = words[..]
                    && answered == question
                {
                    return Some((name.to_owned(), seen.to_owned()));
                }
            }
        })
    }
}

fn udp_clients_of_the_host_find_the_container_and_others_are_left_alone(mode: Mode) {
    let caller = Caller::new();
    neighbour("outside");
    let client = caller.attach("client", caller.masqueraded(mode));
    let first = caller.attach("first", caller.masqueraded(mode));
    let second = caller.attach("second", caller.masqueraded(mode));
    answer(Some("outside"), "outside", PORT);
    answer(None, "host", PORT);
    answer(Some("first"), "first", 80);
    answer(Some("second"), "second", 80);
    let own = addresses(&client);
    let to_host: Vec<Client> =
        own.iter().map(|like| Client::new("outside", neighbour_addresses(*like).1, PORT)).collect();
    let to_other: Vec<Client> =
        own.iter().map(|like| Client::new("client", neighbour_addresses(*like).0, PORT)).collect();
    let hosts = |name: &str| to_host.iter().all(|client| client.ask().0 == name);
    // The port that masquerading chose for a flow is another one when the flow was forgotten in between.
    let others = || -> Vec<(String, String)> { to_other.iter().map(Client::ask).collect() };
    let before = others();
    assert!(before.iter().all(|(name, _)| name == "outside"), "{before:?}");
    assert!(hosts("host"));
    caller.call("ADD", "first", portmap("udp"), Some(&first)).unwrap();
    assert!(hosts("first"), "the same client, which never stops sending");
    assert_eq!(others(), before);
    caller.call("DEL", "first", portmap("udp"), Some(&first)).unwrap();
    assert!(hosts("host"), "and back");
    caller.call("ADD", "second", portmap("udp"), Some(&second)).unwrap();
    assert!(hosts("second"));
    assert_eq!(others(), before);
}

/// An SCTP packet that asks for an association: there need be no SCTP in the kernel but in its tracking of connections. The
/// number is the last of it, and nothing looks at it on the way.
fn initiation(port: u16, number: u32) -> Vec<u8> {
    let mut packet = 4000_u16.to_be_bytes().to_vec();
    packet.extend(port.to_be_bytes());
    // Verification tag, room for the checksum, then the chunk: type 1, its length, tag, window, streams, sequence number.
    packet.extend([0; 8]);
    packet.extend([1, 0, 0, 20, 0, 0, 0, 7, 0, 1, 0, 0, 0, 1, 0, 1]);
    packet.extend(number.to_be_bytes());
    let mut checksum = u32::MAX;
    for byte in &packet {
        checksum ^= u32::from(*byte);
        for _ in 0..8 {
            checksum = (checksum >> 1) ^ if checksum & 1 == 1 { 0x82f6_3b78 } else { 0 };
        }
    }
    packet[8..12].copy_from_slice(&(!checksum).to_le_bytes());
    packet
}

fn raw_sctp(place: Option<&str>, is_ipv4: bool) -> OwnedFd {
    let family = if is_ipv4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let open = || socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Sctp).unwrap();
    place.map_or_else(open, |place| run_in(&netns(place), open).unwrap())
}

/// The port at which a packet of that number arrives, whatever else does; none when nothing comes for that long.
fn port_of(number: u32, server: &OwnedFd, is_ipv4: bool, patience: Duration) -> Option<u16> {
    let seconds = i64::try_from(patience.as_secs()).unwrap();
    setsockopt(server, sockopt::ReceiveTimeout, &TimeVal::new(seconds, 0)).unwrap();
    let mut buffer = [0; 256];
    let header = if is_ipv4 { 20 } else { 0 };
    loop {
        let length = recv(server.as_raw_fd(), &mut buffer, MsgFlags::empty()).ok()?;
        let packet = buffer[..length].get(header..).unwrap_or_default();
        if packet.ends_with(&number.to_be_bytes()) {
            return packet.get(2..4).map(|port| u16::from_be_bytes([port[0], port[1]]));
        }
    }
}

fn sctp_clients_of_the_host_find_the_container(mode: Mode) {
    let caller = Caller::new();
    neighbour("outside");
    let result = caller.attach("a", caller.masqueraded(mode));
    for own in addresses(&result) {
        let (client, server) = (raw_sctp(Some("outside"), own.is_ipv4()), raw_sctp(Some("a"), own.is_ipv4()));
        let to = SockaddrStorage::from(SocketAddr::new(neighbour_addresses(own).1, 0));
        let send = |number: u32| {
            sendto(client.as_raw_fd(), &initiation(PORT, number), &to, MsgFlags::empty()).unwrap();
        };
        // A packet is not sent again: flows that are not forgotten end by themselves after 3 s, and none gets lost here.
        let arrives = |patience: Duration| {
            let number = next_number();
            send(number);
            port_of(number, &server, own.is_ipv4(), patience)
        };
        assert_eq!(arrives(MOMENT), None, "nothing leads there yet");
        let mut connection = Connection::open(Protocol::Netfilter).unwrap();
        wait_for("the flow to be tracked", PATIENCE, || {
            send(next_number());
            let mut flows = 0;
            connection.each_flow(own.is_ipv4(), &[libc::IPPROTO_SCTP as u8], |_| flows += 1).unwrap();
            (flows == 1).then_some(())
        });
        caller.call("ADD", "a", portmap("sctp"), Some(&result)).unwrap();
        assert_eq!(arrives(PATIENCE), Some(80), "from the first packet on");
        caller.call("DEL", "a", portmap("sctp"), Some(&result)).unwrap();
        assert_eq!(arrives(MOMENT), None, "and no longer");
    }
}
