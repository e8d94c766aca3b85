//! One forwarded connection: two sockets, and at most one piece held for each that its reader has not taken yet.
//!
//! An end is watched only for what can be done with it, and not at all when that is nothing, so that a hung-up socket never
//! makes the loop spin.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, setsockopt, socket, sockopt};

use crate::poll::{Poller, Token};

/// Bytes read at once, and so held at most for each direction.
const PIECE_BYTES: usize = 8 * 1024;

const CALLER: usize = 0;
const POD: usize = 1;

#[derive(Debug)]
struct End {
    socket: TcpStream,
    /// Read from the other end and not yet taken by this one.
    pending: Vec<u8>,
    /// Nothing more comes from it.
    ended: bool,
    /// It has been told that nothing more comes.
    told: bool,
    watched: EpollFlags,
}

#[derive(Debug)]
pub(super) struct Stream {
    slot: u32,
    ends: [End; 2],
    connecting: bool,
}

impl End {
    fn new(socket: TcpStream) -> End {
        End { socket, pending: Vec::new(), ended: false, told: false, watched: EpollFlags::empty() }
    }

    /// Writes as much as is taken.
    fn flush(&mut self) -> io::Result<()> {
        let mut taken = 0;
        while taken < self.pending.len() {
            match self.socket.write(&self.pending[taken..]) {
                Ok(count) => taken += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if taken == self.pending.len() {
            self.pending = Vec::new();
        } else {
            self.pending.drain(..taken);
        }
        Ok(())
    }
}

impl Stream {
    /// Starts to connect a caller with the pod.
    pub(super) fn open(poller: &Poller, slot: u32, caller: TcpStream, target: SocketAddr) -> io::Result<Stream> {
        caller.set_nonblocking(true)?;
        let (pod, connecting) = dial(target)?;
        for socket in [&caller, &pod] {
            let _ = socket.set_nodelay(true);
            let _ = setsockopt(socket, sockopt::KeepAlive, &true);
        }
        let mut stream = Stream { slot, ends: [End::new(caller), End::new(pod)], connecting };
        stream.watch(poller)?;
        Ok(stream)
    }

    /// Moves what can be moved; false when the connection is over.
    pub(super) fn on_ready(&mut self, poller: &Poller, end: usize, flags: EpollFlags, scratch: &mut Vec<u8>) -> bool {
        if end > POD {
            return true;
        }
        self.advance(end, flags, scratch).and_then(|()| self.watch(poller)).is_ok() && !self.is_over()
    }

    fn advance(&mut self, end: usize, flags: EpollFlags, scratch: &mut Vec<u8>) -> io::Result<()> {
        if self.connecting {
            if end != POD {
                return Ok(());
            }
            if let Some(error) = self.ends[POD].socket.take_error()? {
                return Err(error);
            }
            self.connecting = !flags.contains(EpollFlags::EPOLLOUT);
        }
        self.ends[end].flush()?;
        self.read(end, scratch)?;
        // Whichever moved, either may now have to hear of the other's end.
        for [from, to] in [[CALLER, POD], [POD, CALLER]] {
            if self.ends[from].ended && self.ends[to].pending.is_empty() && !self.ends[to].told {
                self.ends[to].told = true;
                match self.ends[to].socket.shutdown(Shutdown::Write) {
                    Err(error) if error.kind() != io::ErrorKind::NotConnected => return Err(error),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// One piece from an end to the other, if that one has taken the last.
    fn read(&mut self, from: usize, scratch: &mut Vec<u8>) -> io::Result<()> {
        let to = POD - from;
        if self.connecting || self.ends[from].ended || !self.ends[to].pending.is_empty() {
            return Ok(());
        }
        scratch.resize(PIECE_BYTES, 0);
        match self.ends[from].socket.read(scratch) {
            Ok(0) => self.ends[from].ended = true,
            Ok(count) => {
                self.ends[to].pending.extend_from_slice(&scratch[..count]);
                self.ends[to].flush()?;
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn is_over(&self) -> bool {
        self.ends.iter().all(|end| end.ended && end.pending.is_empty())
    }

    fn watch(&mut self, poller: &Poller) -> io::Result<()> {
        for end in [CALLER, POD] {
            let mut wanted = EpollFlags::empty();
            if !self.connecting && !self.ends[end].ended && self.ends[POD - end].pending.is_empty() {
                wanted |= EpollFlags::EPOLLIN;
            }
            if !self.ends[end].pending.is_empty() || (self.connecting && end == POD) {
                wanted |= EpollFlags::EPOLLOUT;
            }
            let token = Token::ForwardStream { slot: self.slot, end: end as u16 };
            let this = &mut self.ends[end];
            if wanted == this.watched {
                continue;
            }
            match wanted.is_empty() {
                true => poller.remove(&this.socket),
                false => poller.set(this.socket.as_fd(), token, wanted)?,
            }
            this.watched = wanted;
        }
        Ok(())
    }

    /// How much it holds that nobody has taken yet.
    #[cfg(test)]
    pub(super) fn held_bytes(&self) -> usize {
        self.ends.iter().map(|end| end.pending.capacity()).sum()
    }

    pub(super) fn close(&self, poller: &Poller) {
        for end in &self.ends {
            poller.remove(&end.socket);
        }
    }
}

/// A connection that is being made, or is made.
fn dial(target: SocketAddr) -> io::Result<(TcpStream, bool)> {
    let family = if target.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket: OwnedFd = socket(family, SockType::Stream, flags, None)?;
    match connect(socket.as_raw_fd(), &SockaddrStorage::from(target)) {
        Ok(()) => Ok((socket.into(), false)),
        Err(Errno::EINPROGRESS) => Ok((socket.into(), true)),
        Err(errno) => Err(errno.into()),
    }
}
