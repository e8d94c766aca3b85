//! Listening sockets of daemons: [`tcp`] and [`tcp_of_one_family`].

use std::io;
use std::net::{SocketAddr, TcpListener};

use socket2::{Domain, Protocol, Socket, Type};

/// Connections that may wait to be accepted; the kernel's own bound holds where it is lower.
const BACKLOG: i32 = 1024;

/// A listener that does not block. `[::]` takes IPv4 too, whatever the host's `net.ipv6.bindv6only` says.
pub fn tcp(address: SocketAddr) -> io::Result<TcpListener> {
    listen(address, !address.ip().is_unspecified())
}

/// As [`tcp`], but `[::]` takes IPv6 alone.
pub fn tcp_of_one_family(address: SocketAddr) -> io::Result<TcpListener> {
    listen(address, true)
}

fn listen(address: SocketAddr, only_v6: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(only_v6)?;
    }
    // A daemon that starts anew does not wait for connections of before to be over.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv6Addr, TcpStream};

    #[test]
    fn any_address_is_one_of_either_family() {
        let listener = tcp((Ipv6Addr::UNSPECIFIED, 0).into()).unwrap();
        assert!(!socket2::SockRef::from(&listener).only_v6().unwrap());
        let port = listener.local_addr().unwrap().port();
        TcpStream::connect(("127.0.0.1", port)).unwrap();
        TcpStream::connect(("::1", port)).unwrap();
        tcp((Ipv6Addr::LOCALHOST, port).into()).expect_err("the port is taken");
        let one = tcp((Ipv6Addr::LOCALHOST, 0).into()).unwrap();
        assert!(socket2::SockRef::from(&one).only_v6().unwrap());
        let port = tcp_of_one_family((Ipv6Addr::UNSPECIFIED, 0).into()).unwrap().local_addr().unwrap().port();
        TcpStream::connect(("127.0.0.1", port)).expect_err("that is the other family");
    }
}
