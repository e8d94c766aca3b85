//! Streams from a chosen source address, of TCP and SCTP, and answers to them.

use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, connect, listen, setsockopt,
    socket, sockopt,
};
use nix::sys::time::TimeVal;

use super::{at, read_answer};

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
