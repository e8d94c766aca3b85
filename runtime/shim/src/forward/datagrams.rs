//! Forwarded datagrams: a flow for each caller, with a socket of its own towards the pod, so that answers find the way back.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::sys::epoll::EpollFlags;

use crate::poll::{Poller, Token};

/// Flows of one pod; the one longest silent makes room for a new one.
const FLOWS_MAX: usize = 64;
/// A flow is forgotten after so long without a datagram.
const SILENCE: Duration = Duration::from_secs(60);
/// Datagrams moved at one event.
const BATCH: usize = 32;
const DATAGRAM_BYTES_MAX: usize = 64 * 1024;

#[derive(Debug)]
struct Flow {
    port: u32,
    caller: SocketAddr,
    socket: UdpSocket,
    last: Instant,
}

#[derive(Debug, Default)]
pub(super) struct Flows {
    slots: Vec<Option<Flow>>,
}

impl Flows {
    /// Callers' datagrams.
    pub(super) fn on_datagrams(
        &mut self,
        poller: &Poller,
        port: u32,
        socket: &UdpSocket,
        target: SocketAddr,
        scratch: &mut Vec<u8>,
    ) {
        scratch.resize(DATAGRAM_BYTES_MAX, 0);
        for _ in 0..BATCH {
            let (count, caller) = match socket.recv_from(scratch) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // What an earlier answer met with; the socket goes on.
                Err(_) => continue,
            };
            if let Some(flow) = self.flow(poller, port, caller, target) {
                flow.last = Instant::now();
                // As lost as on any other network.
                let _ = flow.socket.send(&scratch[..count]);
            }
        }
    }

    fn flow(&mut self, poller: &Poller, port: u32, caller: SocketAddr, target: SocketAddr) -> Option<&mut Flow> {
        let known = self
            .slots
            .iter()
            .position(|slot| slot.as_ref().is_some_and(|flow| flow.port == port && flow.caller == caller));
        let slot = match known {
            Some(slot) => slot,
            None => self.begin(poller, port, caller, target).ok()?,
        };
        self.slots.get_mut(slot)?.as_mut()
    }

    fn begin(&mut self, poller: &Poller, port: u32, caller: SocketAddr, target: SocketAddr) -> io::Result<usize> {
        let any: SocketAddr = match target {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let socket = UdpSocket::bind(any)?;
        socket.connect(target)?;
        socket.set_nonblocking(true)?;
        let slot = self.free(poller);
        poller.add(socket.as_fd(), Token::ForwardFlow(slot as u32), EpollFlags::EPOLLIN)?;
        let flow = Flow { port, caller, socket, last: Instant::now() };
        match self.slots.get_mut(slot) {
            Some(entry) => *entry = Some(flow),
            None => self.slots.push(Some(flow)),
        }
        Ok(slot)
    }

    fn free(&mut self, poller: &Poller) -> usize {
        if let Some(slot) = self.slots.iter().position(Option::is_none) {
            return slot;
        }
        if self.slots.len() < FLOWS_MAX {
            return self.slots.len();
        }
        let silent = self.slots.iter().enumerate().min_by_key(|(_, flow)| flow.as_ref().map(|flow| flow.last));
        let slot = silent.map_or(0, |(slot, _)| slot);
        self.forget(poller, slot);
        slot
    }

    fn forget(&mut self, poller: &Poller, slot: usize) {
        if let Some(flow) = self.slots.get_mut(slot).and_then(Option::take) {
            poller.remove(&flow.socket);
        }
    }

    /// The pod's answers, out by the socket that the caller wrote to.
    pub(super) fn on_answer<'a>(
        &mut self,
        slot: u32,
        scratch: &mut Vec<u8>,
        socket_of: impl Fn(u32) -> Option<&'a UdpSocket>,
    ) {
        let Some(Some(flow)) = self.slots.get_mut(slot as usize) else { return };
        let Some(socket) = socket_of(flow.port) else { return };
        scratch.resize(DATAGRAM_BYTES_MAX, 0);
        for _ in 0..BATCH {
            match flow.socket.recv(scratch) {
                Ok(count) => {
                    flow.last = Instant::now();
                    let _ = socket.send_to(&scratch[..count], flow.caller);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // The pod refused: nobody listens there now, perhaps later.
                Err(_) => {}
            }
        }
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.slots.iter().flatten().map(|flow| flow.last + SILENCE).min()
    }

    pub(super) fn expire(&mut self, poller: &Poller, now: Instant) {
        for slot in 0..self.slots.len() {
            if self.slots[slot].as_ref().is_some_and(|flow| flow.last + SILENCE <= now) {
                self.forget(poller, slot);
            }
        }
        if self.slots.iter().all(Option::is_none) {
            self.slots = Vec::new();
        }
    }
}
