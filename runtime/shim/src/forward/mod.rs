//! Host ports on loopback addresses: the way in that packet rules cannot give without `route_localnet`.
//!
//! The pod's shim listens on `127.0.0.1:hostPort` and leads what comes to the pod, so that it goes on while the daemon is
//! down and ends with the pod. Everything is bounded: connections, flows, and what is held of each. Owns no policy: the
//! daemon says which ports lead where.

mod datagrams;
mod stream;

use std::io;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::AsFd;
use std::time::Instant;

use nix::sys::epoll::EpollFlags;
use oarlock_shim_api::wire::{ForwardRule, Transport};

use crate::poll::{Poller, Token};
use datagrams::Flows;
use stream::Stream;

/// Connections of one pod at a time; more wait in the kernel's queue.
const STREAMS_MAX: usize = 64;
/// Ports of one pod.
const PORTS_MAX: usize = 64;
/// Callers taken at one event, so that nobody waits long behind them.
const ACCEPTS_MAX: usize = 8;

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

#[derive(Debug)]
struct Port {
    rule: ForwardRule,
    socket: Socket,
}

/// All forwarded ports of the pod. Dropping it closes everything.
#[derive(Debug, Default)]
pub(crate) struct Forwarder {
    ports: Vec<Port>,
    streams: Vec<Option<Stream>>,
    flows: Flows,
    /// No callers are taken until a connection ends.
    paused: bool,
}

impl Forwarder {
    /// Takes on rules; those that cannot be carried out are told.
    pub(crate) fn add(&mut self, poller: &Poller, rules: &[ForwardRule]) -> Vec<String> {
        let failed = |rule: &ForwardRule, error: &io::Error| {
            let name = match rule.transport {
                Transport::Tcp => "TCP",
                Transport::Udp => "UDP",
            };
            format!("cannot listen on {name} {}: {error}", rule.listen)
        };
        rules.iter().filter_map(|rule| self.open(poller, *rule).err().map(|error| failed(rule, &error))).collect()
    }

    fn open(&mut self, poller: &Poller, rule: ForwardRule) -> io::Result<()> {
        if !rule.listen.ip().is_loopback() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a loopback address"));
        }
        // Asked again by a daemon that did not hear the answer.
        if self.ports.iter().any(|port| port.rule == rule) {
            return Ok(());
        }
        if self.ports.len() >= PORTS_MAX {
            return Err(io::Error::other(format!("a pod has at most {PORTS_MAX} forwarded ports")));
        }
        let token = Token::Forward(self.ports.len() as u32);
        let socket = match rule.transport {
            Transport::Tcp => {
                let listener = TcpListener::bind(rule.listen)?;
                listener.set_nonblocking(true)?;
                poller.add(listener.as_fd(), token, EpollFlags::EPOLLIN)?;
                Socket::Tcp(listener)
            }
            Transport::Udp => {
                let socket = UdpSocket::bind(rule.listen)?;
                socket.set_nonblocking(true)?;
                poller.add(socket.as_fd(), token, EpollFlags::EPOLLIN)?;
                Socket::Udp(socket)
            }
        };
        self.ports.push(Port { rule, socket });
        Ok(())
    }

    pub(crate) fn on_listener(&mut self, poller: &Poller, slot: u32, scratch: &mut Vec<u8>) {
        let Some(port) = self.ports.get(slot as usize) else { return };
        match &port.socket {
            Socket::Udp(socket) => self.flows.on_datagrams(poller, slot, socket, port.rule.target, scratch),
            Socket::Tcp(_) => self.accept(poller, slot),
        }
    }

    fn accept(&mut self, poller: &Poller, slot: u32) {
        for _ in 0..ACCEPTS_MAX {
            let Some(Port { rule, socket: Socket::Tcp(listener) }) = self.ports.get(slot as usize) else { return };
            let free = self.streams.iter().position(Option::is_none).unwrap_or(self.streams.len());
            if free >= STREAMS_MAX {
                return self.pause(poller);
            }
            let client = match listener.accept() {
                Ok((client, _)) => client,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                // Out of descriptors or memory: the caller stays in the queue until there is room again.
                Err(_) => return self.pause(poller),
            };
            // A pod that cannot be reached closes on its caller.
            let Ok(stream) = Stream::open(poller, free as u32, client, rule.target) else { continue };
            if free == self.streams.len() {
                self.streams.push(None);
            }
            self.streams[free] = Some(stream);
        }
    }

    fn pause(&mut self, poller: &Poller) {
        self.paused = true;
        for port in &self.ports {
            if let Socket::Tcp(listener) = &port.socket {
                poller.remove(listener);
            }
        }
    }

    fn resume(&mut self, poller: &Poller) {
        if !std::mem::take(&mut self.paused) {
            return;
        }
        for (slot, port) in self.ports.iter().enumerate() {
            if let Socket::Tcp(listener) = &port.socket {
                let _ = poller.set(listener.as_fd(), Token::Forward(slot as u32), EpollFlags::EPOLLIN);
            }
        }
    }

    pub(crate) fn on_stream(&mut self, poller: &Poller, slot: u32, end: u16, flags: EpollFlags, scratch: &mut Vec<u8>) {
        let Some(entry) = self.streams.get_mut(slot as usize) else { return };
        let Some(stream) = entry else { return };
        if stream.on_ready(poller, usize::from(end), flags, scratch) {
            return;
        }
        stream.close(poller);
        *entry = None;
        self.resume(poller);
    }

    pub(crate) fn on_flow(&mut self, slot: u32, scratch: &mut Vec<u8>) {
        let ports = &self.ports;
        self.flows.on_answer(slot, scratch, |port| match ports.get(port as usize).map(|port| &port.socket) {
            Some(Socket::Udp(socket)) => Some(socket),
            _ => None,
        });
    }

    /// When the next flow is to be forgotten.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.flows.deadline()
    }

    pub(crate) fn expire(&mut self, poller: &Poller, now: Instant) {
        self.flows.expire(poller, now);
    }

    /// A quiet moment: gives memory back, and tries again to take callers if nothing else would.
    pub(crate) fn rest(&mut self, poller: &Poller) {
        if self.streams.iter().all(Option::is_none) {
            self.streams = Vec::new();
            self.resume(poller);
        }
    }
}

#[cfg(test)]
mod tests;
