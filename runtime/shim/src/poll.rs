//! The one epoll instance, and what its events stand for.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

/// What an event is about. Slots index the owners' tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Token {
    Listener,
    Signals,
    Client(u32),
    Helper(u32),
    /// A container's output (`error` false: standard output or the terminal).
    Output {
        container: u32,
        error: bool,
    },
    /// A container's standard input can take more.
    Input(u32),
    /// An attached client wrote to its standard input, or its output can take more or hung up.
    AttachedInput {
        container: u32,
        client: u16,
    },
    AttachedOutput {
        container: u32,
        client: u16,
    },
    AttachedError {
        container: u32,
        client: u16,
    },
    Oom(u32),
    /// A port on loopback has a caller or a datagram.
    Forward(u32),
    /// One end of a forwarded connection.
    ForwardStream {
        slot: u32,
        end: u16,
    },
    /// The pod answered a datagram.
    ForwardFlow(u32),
    /// Something of a container's log was written.
    Log(u32),
    /// The same for the log of one that is gone.
    LogOfRemoved,
}

impl Token {
    fn to_bits(self) -> u64 {
        let (kind, low, high) = match self {
            Token::Listener => (0, 0, 0),
            Token::Signals => (1, 0, 0),
            Token::Client(slot) => (2, slot, 0),
            Token::Helper(slot) => (3, slot, 0),
            Token::Output { container, error } => (4, container, u16::from(error)),
            Token::Input(container) => (5, container, 0),
            Token::AttachedInput { container, client } => (6, container, client),
            Token::AttachedOutput { container, client } => (7, container, client),
            Token::AttachedError { container, client } => (8, container, client),
            Token::Oom(container) => (9, container, 0),
            Token::Forward(slot) => (10, slot, 0),
            Token::ForwardStream { slot, end } => (11, slot, end),
            Token::ForwardFlow(slot) => (12, slot, 0),
            Token::Log(container) => (13, container, 0),
            Token::LogOfRemoved => (14, 0, 0),
        };
        (kind << 48) | (u64::from(high) << 32) | u64::from(low)
    }

    fn from_bits(bits: u64) -> Option<Token> {
        let (container, client) = (bits as u32, (bits >> 32) as u16);
        Some(match bits >> 48 {
            0 => Token::Listener,
            1 => Token::Signals,
            2 => Token::Client(container),
            3 => Token::Helper(container),
            4 => Token::Output { container, error: client != 0 },
            5 => Token::Input(container),
            6 => Token::AttachedInput { container, client },
            7 => Token::AttachedOutput { container, client },
            8 => Token::AttachedError { container, client },
            9 => Token::Oom(container),
            10 => Token::Forward(container),
            11 => Token::ForwardStream { slot: container, end: client },
            12 => Token::ForwardFlow(container),
            13 => Token::Log(container),
            14 => Token::LogOfRemoved,
            _ => return None,
        })
    }
}

/// An event: what it is about and what happened.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ready {
    pub token: Token,
    pub flags: EpollFlags,
}

/// The poller.
#[derive(Debug)]
pub(crate) struct Poller {
    epoll: Epoll,
}

impl Poller {
    pub(crate) fn new() -> io::Result<Poller> {
        Ok(Poller { epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)? })
    }

    pub(crate) fn add(&self, fd: BorrowedFd<'_>, token: Token, flags: EpollFlags) -> io::Result<()> {
        Ok(self.epoll.add(fd, EpollEvent::new(flags, token.to_bits()))?)
    }

    /// Changes what a descriptor is watched for; one that is not watched (yet) is added.
    pub(crate) fn set(&self, fd: BorrowedFd<'_>, token: Token, flags: EpollFlags) -> io::Result<()> {
        match self.epoll.modify(fd, &mut EpollEvent::new(flags, token.to_bits())) {
            Err(Errno::ENOENT) => self.add(fd, token, flags),
            other => Ok(other?),
        }
    }

    /// Stops watching. A duplicate of the descriptor may live on elsewhere, so closing is not enough.
    pub(crate) fn remove(&self, fd: impl AsFd) {
        let _ = self.epoll.delete(fd);
    }

    /// Waits for events, at most `limit`.
    pub(crate) fn wait(&self, limit: Option<Duration>, ready: &mut Vec<Ready>) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); 16];
        let timeout = match limit {
            None => EpollTimeout::NONE,
            // Rounded up: a wait that ends just before its deadline would spin.
            Some(limit) => {
                i32::try_from(limit.as_millis() + 1).unwrap_or(i32::MAX).try_into().unwrap_or(EpollTimeout::MAX)
            }
        };
        ready.clear();
        let count = match self.epoll.wait(&mut events, timeout) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(errno) => return Err(errno.into()),
        };
        let known = events[..count]
            .iter()
            .filter_map(|event| Some(Ready { token: Token::from_bits(event.data())?, flags: event.events() }));
        ready.extend(known);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_the_kernel() {
        let tokens = [
            Token::Listener,
            Token::Signals,
            Token::Client(7),
            Token::Helper(u32::MAX),
            Token::Output { container: 3, error: true },
            Token::Input(1),
            Token::AttachedInput { container: 9, client: 2 },
            Token::AttachedOutput { container: 9, client: u16::MAX },
            Token::AttachedError { container: 9, client: 0 },
            Token::Oom(4),
            Token::Forward(2),
            Token::ForwardStream { slot: 5, end: 1 },
            Token::ForwardFlow(63),
            Token::Log(8),
            Token::LogOfRemoved,
        ];
        for token in tokens {
            assert_eq!(Token::from_bits(token.to_bits()), Some(token));
        }
        assert_eq!(Token::from_bits(u64::MAX), None);
    }
}
