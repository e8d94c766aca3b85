//! A connected daemon: one socket and what could not be sent yet.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};

use nix::sys::epoll::EpollFlags;
use oarlock_shim_api::frame::{self, FrameError};

use crate::poll::{Poller, Token};

/// A daemon that does not read gets this many messages; then it is disconnected and must read the state when it is back.
const QUEUE_MAX: usize = 256;

#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) socket: OwnedFd,
    /// Tells two clients of the same slot apart.
    pub(crate) generation: u32,
    queue: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
}

impl Client {
    pub(crate) fn new(socket: OwnedFd, generation: u32) -> Client {
        Client { socket, generation, queue: VecDeque::new() }
    }

    /// Sends or queues a message; false when the client is to be dropped.
    pub(crate) fn send(&mut self, poller: &Poller, slot: u32, body: Vec<u8>, fds: Vec<OwnedFd>) -> bool {
        if self.queue.len() >= QUEUE_MAX {
            return false;
        }
        self.queue.push_back((body, fds));
        self.queue.len() > 1 || self.flush(poller, slot)
    }

    /// Sends what it can; false when the client is gone.
    pub(crate) fn flush(&mut self, poller: &Poller, slot: u32) -> bool {
        while let Some((body, fds)) = self.queue.front() {
            let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            match frame::send(self.socket.as_fd(), body, &borrowed) {
                Ok(()) => drop(self.queue.pop_front()),
                Err(FrameError::WouldBlock) => break,
                Err(_) => return false,
            }
        }
        let mut wanted = EpollFlags::EPOLLIN;
        if self.queue.is_empty() {
            self.queue = VecDeque::new();
        } else {
            wanted |= EpollFlags::EPOLLOUT;
        }
        poller.set(self.socket.as_fd(), Token::Client(slot), wanted).is_ok()
    }
}
