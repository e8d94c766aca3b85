//! Hears of every nf_tables commit of this network namespace, for the time from an event to its rules.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::Context;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

/// nfnetlink's group for nf_tables, as a bit.
const GROUP: u32 = 1 << (7 - 1);
/// The message that ends what is told of a commit.
const NEW_GENERATION: u16 = (10 << 8) | 15;
const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) struct Commits {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

impl Commits {
    pub(crate) fn open() -> anyhow::Result<Commits> {
        let socket =
            socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, GROUP))?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(PATIENCE.as_secs().cast_signed(), 0))?;
        let _ = setsockopt(&socket, sockopt::RcvBufForce, &(8 << 20));
        Ok(Commits { socket, buffer: vec![0; 1 << 20] })
    }

    /// Forgets what was told so far.
    pub(crate) fn drain(&mut self) {
        while !matches!(recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_DONTWAIT), Err(Errno::EAGAIN)) {}
    }

    /// Waits for the next commit; milliseconds since `begin`.
    pub(crate) fn wait_since(&mut self, begin: Instant) -> anyhow::Result<f64> {
        loop {
            let length = match recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
                // Something was lost because there was too much of it, so there was a commit.
                Err(Errno::ENOBUFS) => return Ok(begin.elapsed().as_secs_f64() * 1000.0),
                other => other.context("no commit was heard of")?,
            };
            let datagram = &self.buffer[..length];
            if oarlock_netlink::wire::messages(datagram).any(|message| message.kind == NEW_GENERATION) {
                return Ok(begin.elapsed().as_secs_f64() * 1000.0);
            }
        }
    }
}
