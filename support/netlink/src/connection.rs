//! A netlink socket: one request and its acknowledgement, a dump, or a batch.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt, socket,
    sockopt,
};
use nix::sys::time::TimeVal;

use crate::wire::{self, Received, TYPE_DONE, TYPE_ERROR, TYPE_OVERRUN, Writer, attributes, flags, messages, read_u32};
use crate::{NetlinkError, Result, sockopt as options};

/// The kernel answers at once; this only bounds what should never happen.
const ANSWER_TIMEOUT_SECONDS: i64 = 10;
const RECEIVE_BUFFER_BYTES: usize = 4 << 20;
/// The largest datagram the kernel sends in a dump is smaller than this.
const DATAGRAM_BYTES: usize = 256 << 10;

/// Which part of the kernel to talk to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Links, addresses, routes, neighbours.
    Route,
    /// nf_tables and connection tracking.
    Netfilter,
    /// Families that are known by name only.
    Generic,
}

/// A socket in the network namespace it was opened in. Calls block for as long as the kernel works.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

/// One message of a batch that the kernel refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The sequence number of the message.
    pub sequence: u32,
    pub errno: Errno,
    pub hint: String,
}

impl Connection {
    /// Opens a socket in the calling thread's network namespace.
    pub fn open(protocol: Protocol) -> Result<Connection> {
        open_socket(protocol).map_err(NetlinkError::Open)
    }

    /// Opens a socket in the network namespace at `path`.
    pub fn open_in(protocol: Protocol, path: &Path) -> Result<Connection> {
        oarlock_netns::run_in(path, || Connection::open(protocol)).map_err(NetlinkError::Namespace)?
    }

    /// The number of the namespace that the socket is in, which no other has until the machine starts again. `None` before
    /// Linux 5.14.
    pub fn namespace_number(&self) -> Option<u64> {
        options::namespace_number(self.socket.as_fd()).ok()
    }

    /// Whether there is a link of an index, told without waiting for whoever is changing links.
    pub fn has_link(&self, index: u32) -> Result<bool> {
        let failed = |source| NetlinkError::Receive { operation: "look for a link", source };
        options::has_link(self.socket.as_fd(), index).map_err(failed)
    }

    /// A sequence number that this connection has not used.
    pub fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1).max(1);
        self.sequence
    }

    /// Sends one request and waits for its acknowledgement.
    pub fn request(
        &mut self,
        operation: &'static str,
        kind: u16,
        extra_flags: u16,
        body: impl FnOnce(&mut Writer),
    ) -> Result<()> {
        self.exchange(operation, kind, extra_flags | flags::ACK, body, |_| {})
    }

    /// Sends one request and hands every answer to `each`: a dump with [`flags::DUMP`], one object without.
    pub fn query(
        &mut self,
        operation: &'static str,
        kind: u16,
        extra_flags: u16,
        body: impl FnOnce(&mut Writer),
        each: impl FnMut(Received<'_>),
    ) -> Result<()> {
        let acknowledged = if extra_flags & flags::DUMP == flags::DUMP { 0 } else { flags::ACK };
        self.exchange(operation, kind, extra_flags | acknowledged, body, each)
    }

    fn exchange(
        &mut self,
        operation: &'static str,
        kind: u16,
        extra_flags: u16,
        body: impl FnOnce(&mut Writer),
        mut each: impl FnMut(Received<'_>),
    ) -> Result<()> {
        let sequence = self.next_sequence();
        let mut writer = Writer::new();
        writer.message(kind, flags::REQUEST | extra_flags, sequence, body);
        let bytes = writer.finish().ok_or(NetlinkError::TooLarge { operation })?;
        self.send(operation, &bytes)?;
        loop {
            let length = self.receive(operation, MsgFlags::empty())?;
            for message in messages(&self.buffer[..length]) {
                if message.sequence != sequence {
                    continue;
                }
                match message.kind {
                    TYPE_ERROR | TYPE_DONE => return verdict(operation, &message),
                    TYPE_OVERRUN => return Err(NetlinkError::Malformed { operation }),
                    _ => each(message),
                }
            }
        }
    }

    /// Sends prepared messages in one datagram and returns what the kernel refused. The kernel works through a batch before
    /// `send` returns, so what it had to say is in the socket by then. `acknowledged` is the sequence number of the message
    /// that asks for an acknowledgement: its absence means that answers were lost.
    pub fn batch(&mut self, operation: &'static str, bytes: &[u8], acknowledged: u32) -> Result<Vec<Refusal>> {
        self.drain();
        self.send(operation, bytes)?;
        let mut refusals = Vec::new();
        let mut complete = false;
        loop {
            let length = match recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(length) => length,
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(NetlinkError::Receive { operation, source: errno.into() }),
            };
            for message in messages(&self.buffer[..length]).filter(|message| message.kind == TYPE_ERROR) {
                match error_of(&message) {
                    Some((None, _)) => complete |= message.sequence == acknowledged,
                    Some((Some(errno), hint)) => refusals.push(Refusal { sequence: message.sequence, errno, hint }),
                    None => return Err(NetlinkError::Malformed { operation }),
                }
            }
        }
        if refusals.is_empty() && !complete {
            return Err(NetlinkError::Receive { operation, source: io::ErrorKind::UnexpectedEof.into() });
        }
        Ok(refusals)
    }

    fn drain(&mut self) {
        while recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_DONTWAIT).is_ok() {}
    }

    fn send(&mut self, operation: &'static str, bytes: &[u8]) -> Result<()> {
        let failed = |errno: Errno| NetlinkError::Send { operation, source: errno.into() };
        if bytes.len() > 64 << 10 {
            // Twice the size leaves room for the kernel's bookkeeping of the datagram.
            setsockopt(&self.socket, sockopt::SndBufForce, &(bytes.len() * 2)).map_err(failed)?;
        }
        loop {
            match send(self.socket.as_raw_fd(), bytes, MsgFlags::empty()) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(failed(errno)),
            }
        }
    }

    fn receive(&mut self, operation: &'static str, how: MsgFlags) -> Result<usize> {
        loop {
            match recv(self.socket.as_raw_fd(), &mut self.buffer, how) {
                Ok(length) => return Ok(length),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    return Err(NetlinkError::Receive { operation, source: io::ErrorKind::TimedOut.into() });
                }
                Err(errno) => return Err(NetlinkError::Receive { operation, source: errno.into() }),
            }
        }
    }
}

fn open_socket(protocol: Protocol) -> io::Result<Connection> {
    let protocol = match protocol {
        Protocol::Route => SockProtocol::NetlinkRoute,
        Protocol::Netfilter => SockProtocol::NetlinkNetFilter,
        Protocol::Generic => SockProtocol::NetlinkGeneric,
    };
    let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(ANSWER_TIMEOUT_SECONDS, 0))?;
    // Without CAP_NET_ADMIN in the initial user namespace the buffer stays at its default, which only dumps of very
    // many objects would notice.
    let _ = setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER_BYTES);
    options::short_explained_errors(socket.as_fd())?;
    Ok(Connection { socket, sequence: 0, buffer: vec![0; DATAGRAM_BYTES] })
}

fn verdict(operation: &'static str, message: &Received<'_>) -> Result<()> {
    match error_of(message) {
        Some((None, _)) => Ok(()),
        Some((Some(errno), hint)) => Err(NetlinkError::Refused { operation, hint, source: errno }),
        None => Err(NetlinkError::Malformed { operation }),
    }
}

/// The error number (none for success) and the explanation in an error or done message.
fn error_of(message: &Received<'_>) -> Option<(Option<Errno>, String)> {
    const CAPPED: u16 = 0x100;
    const WITH_ATTRIBUTES: u16 = 0x200;
    const MESSAGE_ATTRIBUTE: u16 = 1;
    let code = match read_u32(message.payload) {
        Some(code) => code.cast_signed(),
        None if message.kind == TYPE_DONE => 0,
        None => return None,
    };
    let mut hint = String::new();
    if message.flags & WITH_ATTRIBUTES != 0 && message.kind == TYPE_ERROR {
        let original = message.payload.get(4..)?;
        let skip = if message.flags & CAPPED != 0 { wire::HEADER_BYTES } else { read_u32(original)? as usize };
        let found = attributes(original.get(skip.next_multiple_of(4)..).unwrap_or_default())
            .find(|(kind, _)| *kind == MESSAGE_ATTRIBUTE);
        hint = found.map(|(_, text)| wire::read_string(text)).unwrap_or_default();
    }
    let errno = match Errno::from_raw(code.wrapping_neg()) {
        // Numbers that never reach other system calls, such as the kernel's internal ENOTSUPP.
        Errno::UnknownErrno => Errno::EOPNOTSUPP,
        errno => errno,
    };
    Some(((code != 0).then_some(errno), hint))
}
