//! One attached client: three pipes whose other ends the daemon holds.
//!
//! Output is queued while the client does not read. A client with a full queue holds the container up for a moment, as
//! a full pipe would; one that stays full is dropped (see `pump.rs`).

use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::epoll::EpollFlags;
use nix::unistd::{pipe2, write};

use crate::poll::{Poller, Token};

/// From here on the container's output waits.
const QUEUE_BYTES_FULL: usize = 256 * 1024;
/// Reached only by output that cannot wait, the last of a container's life.
const QUEUE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// The shim's ends.
#[derive(Debug)]
pub(crate) struct Attached {
    pub(crate) input: Option<OwnedFd>,
    output: Outlet,
    error: Option<Outlet>,
}

/// The daemon's ends, in the order they are sent.
pub(crate) struct ClientEnds(pub(crate) Vec<OwnedFd>);

impl Attached {
    /// Makes the pipes and watches them.
    pub(crate) fn new(
        poller: &Poller,
        container: u32,
        client: u16,
        stdin: bool,
        terminal: bool,
    ) -> std::io::Result<(Attached, ClientEnds)> {
        let mut ends = Vec::with_capacity(3);
        let mut input = None;
        if stdin {
            let (ours, theirs) = pipe2(OFlag::O_CLOEXEC)?;
            set_nonblocking(&ours)?;
            poller.add(ours.as_fd(), Token::AttachedInput { container, client }, EpollFlags::EPOLLIN)?;
            input = Some(ours);
            ends.push(theirs);
        }
        let (output, theirs) = Outlet::new(poller, Token::AttachedOutput { container, client })?;
        ends.push(theirs);
        let mut error = None;
        if !terminal {
            let (outlet, theirs) = Outlet::new(poller, Token::AttachedError { container, client })?;
            error = Some(outlet);
            ends.push(theirs);
        }
        Ok((Attached { input, output, error }, ClientEnds(ends)))
    }

    /// Gives the client some output; false if it has gone or is too slow.
    pub(crate) fn push(&mut self, poller: &Poller, error: bool, text: &[u8]) -> bool {
        match self.outlet(error) {
            Some(outlet) => outlet.push(poller, text),
            None => true,
        }
    }

    /// The client can take more, or has hung up; false in the latter case.
    pub(crate) fn on_ready(&mut self, poller: &Poller, error: bool, flags: EpollFlags) -> bool {
        if flags.intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP) {
            return false;
        }
        self.outlet(error).is_none_or(|outlet| outlet.flush(poller))
    }

    fn outlet(&mut self, error: bool) -> Option<&mut Outlet> {
        if error { self.error.as_mut() } else { Some(&mut self.output) }
    }

    /// Whether the container's output has to wait for it.
    pub(crate) fn is_full(&self) -> bool {
        let longest = self.output.queue.len().max(self.error.as_ref().map_or(0, |outlet| outlet.queue.len()));
        longest >= QUEUE_BYTES_FULL
    }

    /// Whether all output has been handed over.
    pub(crate) fn is_drained(&self) -> bool {
        self.output.queue.is_empty() && self.error.as_ref().is_none_or(|outlet| outlet.queue.is_empty())
    }
}

#[derive(Debug)]
struct Outlet {
    pipe: OwnedFd,
    token: Token,
    queue: Vec<u8>,
}

impl Outlet {
    fn new(poller: &Poller, token: Token) -> std::io::Result<(Outlet, OwnedFd)> {
        let (theirs, ours) = pipe2(OFlag::O_CLOEXEC)?;
        set_nonblocking(&ours)?;
        // Nothing asked for: a hang-up is reported all the same.
        poller.add(ours.as_fd(), token, EpollFlags::empty())?;
        Ok((Outlet { pipe: ours, token, queue: Vec::new() }, theirs))
    }

    fn push(&mut self, poller: &Poller, text: &[u8]) -> bool {
        if self.queue.len() + text.len() > QUEUE_BYTES_MAX {
            return false;
        }
        let was_idle = self.queue.is_empty();
        self.queue.extend_from_slice(text);
        if was_idle { self.flush(poller) } else { true }
    }

    fn flush(&mut self, poller: &Poller) -> bool {
        let mut sent = 0;
        while sent < self.queue.len() {
            match write(&self.pipe, &self.queue[sent..]) {
                Ok(count) => sent += count,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => break,
                Err(_) => return false,
            }
        }
        self.queue.drain(..sent);
        let wanted = if self.queue.is_empty() {
            self.queue = Vec::new();
            EpollFlags::empty()
        } else {
            EpollFlags::EPOLLOUT
        };
        poller.set(self.pipe.as_fd(), self.token, wanted).is_ok()
    }
}

/// Sets O_NONBLOCK on an open file. Both ends of a pipe are open files of their own, so the peer is not touched.
pub(crate) fn set_nonblocking(fd: &OwnedFd) -> std::io::Result<()> {
    let flags = OFlag::from_bits_retain(nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFL)?);
    nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}
