//! Streams from a chosen source address, of TCP and SCTP, and answers to them.

use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, connect, listen, recv,
    sendto, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use super::{TIMEOUT, at, read_answer};

/// A socket of one of the protocols that carry streams.
pub fn open(is_ipv4: bool, protocol: SockProtocol) -> nix::Result<OwnedFd> {
    let family = if is_ipv4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
    socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, protocol)
}

/// Whether the kernel has SCTP.
pub fn has_sctp() -> bool {
    open(true, SockProtocol::Sctp).is_ok()
}

/// Answers associations at an address of a pod, or of the node, with a name and the client's address.
pub fn serve_sctp(place: Option<&str>, name: &str, address: SocketAddr) {
    let listener = at(place, || {
        let socket = open(address.is_ipv4(), SockProtocol::Sctp).unwrap();
        bind(socket.as_raw_fd(), &SockaddrStorage::from(address)).unwrap();
        listen(&socket, Backlog::new(16).unwrap()).unwrap();
        // One association is used like a connection.
        TcpListener::from(socket)
    });
    let own = name.to_owned();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.peer_addr().map(|peer| stream.write_all(format!("{own} {}\n", peer.ip()).as_bytes()));
        }
    });
}

/// Who answers a stream, and which address they see. Without a source the kernel chooses it.
pub fn ask_stream(
    place: Option<&str>,
    protocol: SockProtocol,
    source: Option<IpAddr>,
    to: SocketAddr,
    patience: Duration,
) -> io::Result<(String, IpAddr)> {
    at(place, || {
        let socket = open(to.is_ipv4(), protocol)?;
        let milliseconds = i64::try_from(patience.as_millis()).unwrap_or(i64::MAX);
        setsockopt(&socket, sockopt::SendTimeout, &TimeVal::new(milliseconds / 1000, milliseconds % 1000 * 1000))?;
        if let Some(source) = source {
            bind(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(source, 0)))?;
        }
        connect(socket.as_raw_fd(), &SockaddrStorage::from(to))?;
        read_answer(&mut TcpStream::from(socket))
    })
}

/// The first packet of an association, from one port to another, with the checksum that makes it a whole one.
fn sctp_init(from: u16, to: u16) -> Vec<u8> {
    // A common header without a tag or checksum, and an INIT chunk: tag, window, streams each way, first number.
    let mut packet = [&from.to_be_bytes()[..], &to.to_be_bytes(), &[0; 8], &[1, 0, 0, 20]].concat();
    packet.extend([0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1]);
    let checksum = !packet.iter().fold(u32::MAX, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| if sum & 1 == 1 { sum >> 1 ^ 0x82f6_3b78 } else { sum >> 1 })
    });
    packet[8..12].copy_from_slice(&checksum.to_le_bytes());
    packet
}

/// Whether the first packet of an association arrives at a pod in the end.
pub fn sctp_arrives(from: &str, to: (&str, SocketAddr)) -> bool {
    does_sctp_arrive(from, to, TIMEOUT)
}

/// Whether it does not, however often it is sent in a moment.
pub fn is_sctp_shut(from: &str, to: (&str, SocketAddr)) -> bool {
    !does_sctp_arrive(from, to, Duration::from_millis(100))
}

/// Needs no SCTP in the kernel: packets are made and taken as they are. They are sent a few times at least, whatever patience
/// there is.
fn does_sctp_arrive(from: &str, (pod, to): (&str, SocketAddr), patience: Duration) -> bool {
    const TIMES: usize = 3;
    static NEXT_PORT: AtomicU16 = AtomicU16::new(20_000);
    let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let raw = || socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Sctp).unwrap();
    let (taker, sender) = (at(Some(pod), raw), at(Some(from), raw));
    setsockopt(&taker, sockopt::ReceiveTimeout, &TimeVal::new(0, 20_000)).unwrap();
    let port = NEXT_PORT.fetch_add(1, Ordering::SeqCst);
    let packet = sctp_init(port, to.port());
    let deadline = Instant::now() + patience;
    let mut buffer = [0; 256];
    for time in 1.. {
        // The port of the packet is not an address's port here.
        let address = SockaddrStorage::from(SocketAddr::new(to.ip(), 0));
        sendto(sender.as_raw_fd(), &packet, &address, MsgFlags::empty()).unwrap();
        if let Ok(length) = recv(taker.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            // IPv4 gives its header too.
            let header = if to.is_ipv4() { usize::from(buffer[0] & 15) * 4 } else { 0 };
            if buffer.get(header..length).is_some_and(|found| found == packet) {
                return true;
            }
        }
        if time >= TIMES && Instant::now() >= deadline {
            break;
        }
    }
    false
}
