//! News of addresses: [`AddressNews`].

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};

use crate::{NetlinkError, Result};

const GROUPS: i32 = libc::RTMGRP_IPV4_IFADDR | libc::RTMGRP_IPV6_IFADDR;

/// Tells that addresses of a network namespace have come or gone, not which. It can be read when there is news, for whoever
/// waits for file descriptors, and never blocks.
#[derive(Debug)]
pub struct AddressNews {
    socket: OwnedFd,
}

impl AddressNews {
    /// Of the calling thread's network namespace, from now on.
    pub fn open() -> Result<AddressNews> {
        let open = || -> nix::Result<OwnedFd> {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
            bind(socket.as_raw_fd(), &NetlinkAddr::new(0, GROUPS.cast_unsigned()))?;
            Ok(socket)
        };
        open().map(|socket| AddressNews { socket }).map_err(|errno| NetlinkError::Open(errno.into()))
    }

    /// Takes all news that there are; says whether there were any.
    pub fn take(&self) -> Result<bool> {
        let mut any = false;
        loop {
            // What a datagram says does not matter, so it may be cut.
            match recv(self.socket.as_raw_fd(), &mut [0; 16], MsgFlags::empty()) {
                // There was more than the socket holds, and that is news too.
                Ok(_) | Err(Errno::ENOBUFS) => any = true,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(any),
                Err(errno) => {
                    return Err(NetlinkError::Receive { operation: "hear of addresses", source: errno.into() });
                }
            }
        }
    }
}

impl AsFd for AddressNews {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for AddressNews {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}
