//! Moves bytes between a container, its log and attached clients.
//!
//! ```text
//! container stdout/stderr or terminal ──▶ log, every attached client
//! attached client's stdin ──▶ container stdin (or terminal), held back while the container does not read
//! ```
//!
//! A client that does not keep up holds the output back, the log's included, but only for [`STALL_LIMIT`]; then it is
//! dropped. So a burst loses nobody, and a client that has stopped reading cannot stop a container. A log that cannot be
//! written holds the output back once its memory is full, until there is room again.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::epoll::EpollFlags;
use nix::unistd::{pipe2, read, write};

use super::attach::{Attached, ClientEnds, set_nonblocking};
use super::log::{Log, Stream};
use crate::poll::{Poller, Token};

const ATTACHED_MAX: usize = 32;
const READ_BYTES: usize = 16 * 1024;
/// One container may not keep the loop from the others.
const READS_PER_EVENT: usize = 4;
const INPUT_BYTES_MAX: usize = 64 * 1024;
/// How long the loop itself waits for the disk when a container has ended; mostly it is some microseconds.
pub(crate) const FLUSH_LIMIT: Duration = Duration::from_millis(20);
/// How long a client may hold a container up.
const STALL_LIMIT: Duration = Duration::from_secs(1);

/// The ends a container's first process gets; `None` is `/dev/null`.
#[derive(Debug, Default)]
pub(crate) struct ContainerEnds {
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
}

impl ContainerEnds {
    /// The descriptors' numbers, for what must stay open in a child.
    pub(crate) fn numbers(&self) -> Vec<RawFd> {
        [&self.stdin, &self.stdout, &self.stderr].into_iter().flatten().map(AsRawFd::as_raw_fd).collect()
    }
}

/// The shim's side of one container's stdio.
#[derive(Debug)]
pub(crate) struct Stdio {
    slot: u32,
    terminal: bool,
    master: Option<OwnedFd>,
    output: Option<OwnedFd>,
    error: Option<OwnedFd>,
    input: Input,
    log: Option<Log>,
    attached: Vec<Option<Attached>>,
    /// Output is held back for clients until then at the latest.
    stalled_until: Option<Instant>,
    /// Output is held back for the log.
    log_full: bool,
}

#[derive(Debug)]
struct Input {
    wanted: bool,
    once: bool,
    pipe: Option<OwnedFd>,
    pending: Vec<u8>,
    closing: bool,
}

impl Stdio {
    /// Makes pipes, or for a terminal nothing yet: its master comes with [`Stdio::set_master`].
    pub(crate) fn new(
        poller: &Poller,
        slot: u32,
        terminal: bool,
        stdin: bool,
        stdin_once: bool,
        log: Option<Log>,
    ) -> io::Result<(Stdio, ContainerEnds)> {
        let input = Input { wanted: stdin, once: stdin_once, pipe: None, pending: Vec::new(), closing: false };
        let mut stdio = Stdio {
            slot,
            terminal,
            master: None,
            output: None,
            error: None,
            input,
            log,
            attached: Vec::new(),
            stalled_until: None,
            log_full: false,
        };
        let mut ends = ContainerEnds::default();
        if terminal {
            return Ok((stdio, ends));
        }
        if stdin {
            let (theirs, ours) = pipe2(OFlag::O_CLOEXEC)?;
            set_nonblocking(&ours)?;
            ends.stdin = Some(theirs);
            stdio.input.pipe = Some(ours);
        }
        for (error, ours, theirs) in
            [(false, &mut stdio.output, &mut ends.stdout), (true, &mut stdio.error, &mut ends.stderr)]
        {
            let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
            set_nonblocking(&reader)?;
            poller.add(reader.as_fd(), Token::Output { container: slot, error }, EpollFlags::EPOLLIN)?;
            *ours = Some(reader);
            *theirs = Some(writer);
        }
        Ok((stdio, ends))
    }

    /// The terminal of the container, once it has been made.
    pub(crate) fn set_master(&mut self, poller: &Poller, master: OwnedFd) -> io::Result<()> {
        set_nonblocking(&master)?;
        let reader = master.try_clone()?;
        poller.add(reader.as_fd(), Token::Output { container: self.slot, error: false }, EpollFlags::EPOLLIN)?;
        if self.input.wanted {
            self.input.pipe = Some(master.try_clone()?);
        }
        self.output = Some(reader);
        self.master = Some(master);
        Ok(())
    }

    pub(crate) fn master(&self) -> Option<&OwnedFd> {
        self.master.as_ref()
    }

    pub(crate) fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// Reads what the container wrote. `scratch` is shared by all containers.
    pub(crate) fn on_output(&mut self, poller: &Poller, error: bool, scratch: &mut Vec<u8>) {
        for _ in 0..READS_PER_EVENT {
            if self.is_held() || !self.read_once(poller, error, scratch) {
                break;
            }
            if self.attached.iter().flatten().any(Attached::is_full) {
                self.stalled_until = Some(Instant::now() + STALL_LIMIT);
                self.hold(poller);
            }
            if self.log.as_ref().is_some_and(Log::is_full) {
                self.log_full = true;
                self.hold(poller);
            }
        }
        self.write_log(poller);
    }

    fn is_held(&self) -> bool {
        self.stalled_until.is_some() || self.log_full
    }

    fn hold(&mut self, poller: &Poller) {
        for pipe in [&self.output, &self.error].into_iter().flatten() {
            poller.remove(pipe);
        }
    }

    /// When clients that hold the output back are to be dropped.
    pub(crate) fn stalled_until(&self) -> Option<Instant> {
        self.stalled_until
    }

    /// Lets the output go on if nobody is full any longer, or drops those who have been for too long.
    pub(crate) fn unstall(&mut self, poller: &Poller, now: Instant) {
        let Some(limit) = self.stalled_until else { return };
        let full = |entry: &Option<Attached>| entry.as_ref().is_some_and(Attached::is_full);
        if now >= limit {
            for client in 0..self.attached.len() {
                if full(&self.attached[client]) {
                    self.drop_client(poller, client as u16);
                }
            }
        } else if self.attached.iter().any(full) {
            return;
        }
        self.stalled_until = None;
        self.let_go(poller);
    }

    fn let_go(&mut self, poller: &Poller) {
        if self.is_held() {
            return;
        }
        for (error, pipe) in [(false, &self.output), (true, &self.error)] {
            if let Some(pipe) = pipe {
                let _ = poller.set(pipe.as_fd(), Token::Output { container: self.slot, error }, EpollFlags::EPOLLIN);
            }
        }
    }

    /// Something of the log was written.
    pub(crate) fn write_log(&mut self, poller: &Poller) {
        let token = Token::Log(self.slot);
        let Some(log) = &mut self.log else { return };
        log.go_on(poller, token);
        if self.log_full && log.has_room() {
            self.log_full = false;
            self.let_go(poller);
        }
    }

    /// What came of calls of [`Stdio::reopen_log`], in their order.
    pub(crate) fn take_reopened(&mut self) -> Vec<io::Result<()>> {
        self.log.as_mut().map(Log::take_reopened).unwrap_or_default()
    }

    /// Reads all there is, so that the log is complete before an exit is announced. False if the log is not on disk and
    /// the disk did not take it within `limit`.
    pub(crate) fn drain(&mut self, poller: &Poller, scratch: &mut Vec<u8>, limit: Duration) -> bool {
        // Bounded: a process outside the container may hold the pipe and write for ever.
        for error in [false, true] {
            for _ in 0..1024 {
                if self.log.as_ref().is_some_and(Log::is_full) && !self.flush(poller, limit) {
                    return false;
                }
                if !self.read_once(poller, error, scratch) {
                    break;
                }
            }
        }
        self.flush(poller, limit)
    }

    fn flush(&mut self, poller: &Poller, limit: Duration) -> bool {
        let token = Token::Log(self.slot);
        self.log.as_mut().is_none_or(|log| log.flush(poller, token, limit))
    }

    /// One read; false when there is no more for now.
    fn read_once(&mut self, poller: &Poller, error: bool, scratch: &mut Vec<u8>) -> bool {
        let Some(pipe) = (if error { &self.error } else { &self.output }) else { return false };
        scratch.resize(READ_BYTES, 0);
        match read(pipe, scratch) {
            Ok(0) => self.end_output(poller, error),
            Ok(count) => {
                self.deliver(poller, error, &scratch[..count]);
                return true;
            }
            Err(Errno::EINTR) => return true,
            Err(Errno::EAGAIN) => {}
            // A terminal reports its end as EIO.
            Err(_) => self.end_output(poller, error),
        }
        false
    }

    fn deliver(&mut self, poller: &Poller, error: bool, text: &[u8]) {
        if let Some(log) = &mut self.log {
            log.append(stream(error), text);
        }
        for client in &mut self.attached {
            if client.as_mut().is_some_and(|attached| !attached.push(poller, error, text)) {
                *client = None;
            }
        }
    }

    fn end_output(&mut self, poller: &Poller, error: bool) {
        let pipe = if error { self.error.take() } else { self.output.take() };
        if let Some(pipe) = pipe {
            poller.remove(&pipe);
        }
        if let Some(log) = &mut self.log {
            log.finish(stream(error));
            log.go_on(poller, Token::Log(self.slot));
        }
        if self.output.is_none() && self.error.is_none() {
            self.release_drained();
        }
    }

    /// After the end of output a client is let go as soon as it has everything.
    fn release_drained(&mut self) {
        for client in &mut self.attached {
            if client.as_ref().is_some_and(Attached::is_drained) {
                *client = None;
            }
        }
    }

    /// Joins a client.
    pub(crate) fn attach(&mut self, poller: &Poller, stdin: bool) -> io::Result<(bool, ClientEnds)> {
        let free = self.attached.iter().position(Option::is_none);
        let index = free.unwrap_or(self.attached.len());
        if index >= ATTACHED_MAX {
            return Err(io::Error::other("too many attached clients"));
        }
        let stdin = stdin && self.input.pipe.is_some() && !self.input.closing;
        let (attached, ends) = Attached::new(poller, self.slot, index as u16, stdin, self.terminal)?;
        if index == self.attached.len() {
            self.attached.push(None);
        }
        // When the output has ended there is nothing to wait for: the client sees the end at once.
        if self.output.is_some() || self.error.is_some() {
            self.attached[index] = Some(attached);
        }
        Ok((stdin, ends))
    }

    /// An attached client's output pipe can take more or hung up.
    pub(crate) fn on_attached_output(&mut self, poller: &Poller, client: u16, error: bool, flags: EpollFlags) {
        let Some(entry) = self.attached.get_mut(usize::from(client)) else { return };
        if entry.as_mut().is_some_and(|attached| !attached.on_ready(poller, error, flags)) {
            self.drop_client(poller, client);
        }
        self.unstall(poller, Instant::now());
        if self.output.is_none() && self.error.is_none() {
            self.release_drained();
        }
    }

    fn drop_client(&mut self, poller: &Poller, client: u16) {
        let gone = self.attached.get_mut(usize::from(client)).and_then(Option::take);
        if gone.is_some_and(|attached| attached.input.is_some()) && self.input.once {
            self.close_input(poller);
        }
    }

    /// An attached client wrote, or closed its standard input.
    pub(crate) fn on_attached_input(&mut self, poller: &Poller, client: u16, scratch: &mut Vec<u8>) {
        let Some(Some(attached)) = self.attached.get_mut(usize::from(client)) else { return };
        let Some(pipe) = &attached.input else { return };
        if self.input.pending.len() >= INPUT_BYTES_MAX {
            // Not watched at all until there is room: a hang-up would be reported over and over.
            poller.remove(pipe);
            return;
        }
        scratch.resize(READ_BYTES, 0);
        match read(pipe, scratch) {
            Ok(0) => {
                attached.input = None;
                if self.input.once {
                    self.close_input(poller);
                }
            }
            Ok(count) if self.input.pipe.is_some() => {
                self.input.pending.extend_from_slice(&scratch[..count]);
                self.flush_input(poller);
            }
            Ok(_) | Err(Errno::EINTR | Errno::EAGAIN) => {}
            Err(_) => attached.input = None,
        }
    }

    /// The container's standard input can take more, or nobody reads it any longer.
    pub(crate) fn on_input(&mut self, poller: &Poller, flags: EpollFlags) {
        if flags.intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP) {
            self.drop_input(poller);
        } else {
            self.flush_input(poller);
        }
    }

    fn flush_input(&mut self, poller: &Poller) {
        let Some(pipe) = &self.input.pipe else { return };
        let mut sent = 0;
        let mut broken = false;
        while sent < self.input.pending.len() {
            match write(pipe, &self.input.pending[sent..]) {
                Ok(count) => sent += count,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => break,
                Err(_) => {
                    broken = true;
                    break;
                }
            }
        }
        self.input.pending.drain(..sent);
        if broken || (self.input.pending.is_empty() && self.input.closing) {
            self.drop_input(poller);
            return;
        }
        let idle = self.input.pending.is_empty();
        let wanted = if idle { EpollFlags::empty() } else { EpollFlags::EPOLLOUT };
        if idle {
            self.input.pending = Vec::new();
        }
        let _ = poller.set(pipe.as_fd(), Token::Input(self.slot), wanted);
        let room = self.input.pending.len() < INPUT_BYTES_MAX;
        for (client, attached) in self.attached.iter().enumerate() {
            if let Some(source) = attached.as_ref().and_then(|attached| attached.input.as_ref()) {
                if room {
                    let _ = poller.set(source.as_fd(), input_token(self.slot, client as u16), EpollFlags::EPOLLIN);
                } else {
                    poller.remove(source);
                }
            }
        }
    }

    /// Ends the container's standard input after what is pending. A terminal is sent its end-of-file character.
    pub(crate) fn close_input(&mut self, poller: &Poller) {
        if self.input.pipe.is_none() || self.input.closing {
            return;
        }
        self.input.closing = true;
        if self.terminal {
            self.input.pending.push(4);
        }
        self.flush_input(poller);
    }

    fn drop_input(&mut self, poller: &Poller) {
        if let Some(pipe) = self.input.pipe.take() {
            poller.remove(&pipe);
        }
        self.input.pending = Vec::new();
        for attached in self.attached.iter_mut().flatten() {
            attached.input = None;
        }
    }

    /// Has the log opened anew; false if there is none.
    pub(crate) fn reopen_log(&mut self) -> io::Result<bool> {
        self.log.as_mut().map_or(Ok(false), |log| log.reopen().map(|()| true))
    }

    /// Gives memory back.
    pub(crate) fn rest(&mut self, poller: &Poller) {
        if let Some(log) = &mut self.log {
            log.rest(poller);
        }
    }

    /// The container is gone for good. What is left of a log that is not on disk yet is the caller's.
    pub(crate) fn close(&mut self, poller: &Poller, scratch: &mut Vec<u8>) -> Option<Log> {
        self.drain(poller, scratch, Duration::ZERO);
        self.end_output(poller, false);
        self.end_output(poller, true);
        self.drop_input(poller);
        self.attached.clear();
        self.master = None;
        let mut log = self.log.take()?;
        if log.flush(poller, Token::Log(self.slot), FLUSH_LIMIT) {
            log.rest(poller);
            return None;
        }
        log.watch_as(poller, Token::LogOfRemoved);
        Some(log)
    }
}

fn input_token(container: u32, client: u16) -> Token {
    Token::AttachedInput { container, client }
}

fn stream(error: bool) -> Stream {
    if error { Stream::Stderr } else { Stream::Stdout }
}
