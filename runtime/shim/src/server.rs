//! The loop: one epoll, tables of clients, helpers and containers.
//!
//! Requests are in `requests.rs`, ends of processes in `reap.rs`; what each kind of event leads to is in
//! [`Server::on_ready`].

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{SockFlag, accept4};
use nix::unistd::Pid;
use oarlock_shim_api::frame::{self, FrameError};
use oarlock_shim_api::wire::{FromShim, Outcome, Reply, ReplyFrame, RequestFrame};
use oarlock_shim_api::{ErrorKind, Event, RemoteError};

use crate::client::Client;
use crate::container::Container;
use crate::finished::Purpose;
use crate::forked::{self, Finished};
use crate::forward::Forwarder;
use crate::memory;
use crate::poll::{Poller, Ready, Token};
use crate::setup::Config;
use crate::stdio::Log;

const CLIENTS_MAX: usize = 8;
/// A helper that takes longer is killed; the client's own limit is a little longer still.
const HELPER_LIMIT: Duration = Duration::from_secs(120);

/// After so long without any event the shim gives memory back.
const QUIET: Duration = Duration::from_millis(500);

/// How long the end of the shim waits for each log that the disk does not take.
const LAST_FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// To whom a reply goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ReplyTo {
    slot: u32,
    generation: u32,
    id: u64,
}

/// A helper under way and what its report is for.
#[derive(Debug)]
pub(crate) struct Helper {
    pub(crate) running: forked::Running,
    pub(crate) purpose: Purpose,
    pub(crate) deadline: Instant,
}

#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) config: Config,
    pub(crate) poller: Poller,
    listener: OwnedFd,
    signals: SignalFd,
    clients: Vec<Option<Client>>,
    generation: u32,
    pub(crate) helpers: Vec<Option<Helper>>,
    pub(crate) containers: Vec<Option<Container>>,
    pub(crate) scratch: Vec<u8>,
    pub(crate) pid_namespace_init: Option<Pid>,
    pub(crate) forwarder: Forwarder,
    /// Logs of containers that are gone, which the disk has not taken yet.
    pub(crate) unwritten_logs: Vec<Log>,
    /// A shutdown was asked for: no new containers; ends when the last is gone.
    pub(crate) shutdown: Option<ReplyTo>,
    pub(crate) stopping: bool,
}

impl Server {
    pub(crate) fn new(config: Config, listener: OwnedFd, pid_namespace_init: Option<Pid>) -> io::Result<Server> {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        mask.add(Signal::SIGTERM);
        mask.add(Signal::SIGINT);
        mask.add(Signal::SIGHUP);
        mask.thread_block()?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        let poller = Poller::new()?;
        poller.add(listener.as_fd(), Token::Listener, EpollFlags::EPOLLIN)?;
        poller.add(signals.as_fd(), Token::Signals, EpollFlags::EPOLLIN)?;
        Ok(Server {
            config,
            poller,
            listener,
            signals,
            clients: Vec::new(),
            generation: 0,
            helpers: Vec::new(),
            containers: Vec::new(),
            scratch: Vec::new(),
            pid_namespace_init,
            forwarder: Forwarder::default(),
            unwritten_logs: Vec::new(),
            shutdown: None,
            stopping: false,
        })
    }

    /// Serves until a shutdown is complete.
    pub(crate) fn serve(mut self) -> io::Result<()> {
        let mut ready = Vec::new();
        let mut rested = false;
        while !self.is_finished() {
            // A container that writes all the time never lets the shim rest, nor pays for it.
            let limit = self.next_deadline().or((!rested).then_some(QUIET));
            self.poller.wait(limit, &mut ready)?;
            if ready.is_empty() && self.next_deadline().is_none() {
                self.rest();
                rested = true;
                continue;
            }
            rested = false;
            for item in ready.drain(..) {
                self.on_ready(item);
            }
            self.settle_logs();
            self.expire_helpers();
            self.expire_stalls();
            self.expire_ends();
            self.forwarder.expire(&self.poller, Instant::now());
        }
        self.finish();
        Ok(())
    }

    /// Idle: gives memory back, so that a pod at rest costs next to nothing.
    fn rest(&mut self) {
        self.scratch = Vec::new();
        self.forwarder.rest(&self.poller);
        for container in self.containers.iter_mut().flatten() {
            container.stdio.rest(&self.poller);
        }
        memory::rest();
    }

    fn on_ready(&mut self, ready: Ready) {
        match ready.token {
            Token::Listener => self.accept(),
            Token::Signals => self.on_signal(),
            Token::Client(slot) => self.on_client(slot, ready.flags),
            Token::Helper(slot) => self.on_helper(slot),
            Token::Output { container, error } => {
                self.with_stdio(container, |stdio, poller, scratch| stdio.on_output(poller, error, scratch));
            }
            Token::Input(container) => {
                self.with_stdio(container, |stdio, poller, _| stdio.on_input(poller, ready.flags))
            }
            Token::AttachedInput { container, client } => {
                self.with_stdio(container, |stdio, poller, scratch| stdio.on_attached_input(poller, client, scratch));
            }
            Token::AttachedOutput { container, client } => self.with_stdio(container, |stdio, poller, _| {
                stdio.on_attached_output(poller, client, false, ready.flags);
            }),
            Token::AttachedError { container, client } => self.with_stdio(container, |stdio, poller, _| {
                stdio.on_attached_output(poller, client, true, ready.flags);
            }),
            Token::Oom(container) => self.on_oom(container),
            Token::Forward(slot) => self.forwarder.on_listener(&self.poller, slot, &mut self.scratch),
            Token::ForwardStream { slot, end } => {
                self.forwarder.on_stream(&self.poller, slot, end, ready.flags, &mut self.scratch);
            }
            Token::ForwardFlow(slot) => self.forwarder.on_flow(slot, &mut self.scratch),
            Token::Log(container) => self.on_log(container),
            Token::LogOfRemoved => self.write_logs_of_removed(),
        }
    }

    fn with_stdio(&mut self, slot: u32, act: impl FnOnce(&mut crate::stdio::Stdio, &Poller, &mut Vec<u8>)) {
        if let Some(Some(container)) = self.containers.get_mut(slot as usize) {
            act(&mut container.stdio, &self.poller, &mut self.scratch);
        }
    }

    pub(crate) fn on_oom(&mut self, slot: u32) {
        let Some(Some(container)) = self.containers.get_mut(slot as usize) else { return };
        let Some(watch) = &mut container.oom else { return };
        if watch.take() > 0 {
            let event = Event::Oom { id: container.id.clone() };
            self.broadcast(event);
        }
    }

    fn accept(&mut self) {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let Ok(raw) = accept4(self.listener.as_raw_fd(), flags) else { return };
        let socket = take_fd(raw);
        let slot = self.clients.iter().position(Option::is_none).unwrap_or(self.clients.len());
        if slot >= CLIENTS_MAX {
            return; // closing tells the client
        }
        if self.poller.add(socket.as_fd(), Token::Client(slot as u32), EpollFlags::EPOLLIN).is_err() {
            return;
        }
        self.generation = self.generation.wrapping_add(1);
        let client = Client::new(socket, self.generation);
        if slot == self.clients.len() {
            self.clients.push(None);
        }
        self.clients[slot] = Some(client);
    }

    fn on_client(&mut self, slot: u32, flags: EpollFlags) {
        let Some(Some(client)) = self.clients.get_mut(slot as usize) else { return };
        let generation = client.generation;
        if flags.contains(EpollFlags::EPOLLOUT) && !client.flush(&self.poller, slot) {
            self.drop_client(slot);
            return;
        }
        loop {
            let Some(Some(client)) = self.clients.get_mut(slot as usize) else { return };
            let mut scratch = std::mem::take(&mut self.scratch);
            let received = frame::receive(client.socket.as_fd(), &mut scratch);
            self.scratch = scratch;
            let message = match received {
                Ok(message) => message,
                Err(FrameError::WouldBlock) => return,
                Err(_) => return self.drop_client(slot),
            };
            match serde_json::from_slice::<RequestFrame>(&message.body) {
                Ok(RequestFrame { id, request }) => self.on_request(ReplyTo { slot, generation, id }, request),
                Err(error) => {
                    eprintln!("unreadable request: {error}");
                    return self.drop_client(slot);
                }
            }
        }
    }

    fn drop_client(&mut self, slot: u32) {
        if let Some(client) = self.clients.get_mut(slot as usize).and_then(Option::take) {
            self.poller.remove(&client.socket);
        }
    }

    pub(crate) fn reply(&mut self, to: ReplyTo, outcome: Result<Reply, RemoteError>, fds: Vec<OwnedFd>) {
        let outcome = outcome.map_or_else(Outcome::Error, Outcome::Ok);
        let Ok(body) = serde_json::to_vec(&FromShim::Reply(ReplyFrame { id: to.id, outcome })) else { return };
        let Some(Some(client)) = self.clients.get_mut(to.slot as usize) else { return };
        if client.generation == to.generation && !client.send(&self.poller, to.slot, body, fds) {
            self.drop_client(to.slot);
        }
    }

    pub(crate) fn broadcast(&mut self, event: Event) {
        let Ok(body) = serde_json::to_vec(&FromShim::Event(event)) else { return };
        for slot in 0..self.clients.len() {
            let Some(client) = &mut self.clients[slot] else { continue };
            if !client.send(&self.poller, slot as u32, body.clone(), Vec::new()) {
                self.drop_client(slot as u32);
            }
        }
    }

    /// Registers a helper that has been started.
    pub(crate) fn watch_helper(&mut self, running: forked::Running, purpose: Purpose) {
        let slot = self.helpers.iter().position(Option::is_none).unwrap_or(self.helpers.len());
        if slot == self.helpers.len() {
            self.helpers.push(None);
        }
        if let Err(error) = self.poller.add(running.channel.as_fd(), Token::Helper(slot as u32), EpollFlags::EPOLLIN) {
            eprintln!("cannot watch a helper: {error}");
        }
        self.helpers[slot] = Some(Helper { running, purpose, deadline: Instant::now() + HELPER_LIMIT });
    }

    pub(crate) fn on_helper(&mut self, slot: u32) {
        let Some(Some(helper)) = self.helpers.get_mut(slot as usize) else { return };
        let mut scratch = std::mem::take(&mut self.scratch);
        let finished = forked::poll(helper.running.channel.as_fd(), &mut scratch);
        self.scratch = scratch;
        if let Some(finished) = finished {
            self.finish_helper(slot, finished);
        }
    }

    fn finish_helper(&mut self, slot: u32, finished: Finished) {
        if let Some(helper) = self.helpers.get_mut(slot as usize).and_then(Option::take) {
            self.poller.remove(&helper.running.channel);
            self.on_finished(helper.purpose, finished);
        }
    }

    fn next_deadline(&self) -> Option<Duration> {
        let helpers = self.helpers.iter().flatten().map(|helper| helper.deadline);
        let stalls = self.containers.iter().flatten().filter_map(|container| container.stdio.stalled_until());
        let ends = self.containers.iter().flatten().filter_map(|container| Some(container.ended?.deadline));
        let earliest = helpers.chain(stalls).chain(ends).chain(self.forwarder.deadline()).min()?;
        Some(earliest.saturating_duration_since(Instant::now()))
    }

    fn expire_helpers(&mut self) {
        for slot in 0..self.helpers.len() {
            let Some(helper) = &self.helpers[slot] else { continue };
            if helper.deadline > Instant::now() {
                continue;
            }
            // Still our unreaped child: the number is its own.
            let _ = nix::sys::signal::kill(helper.running.pid, Signal::SIGKILL);
            let message = format!("the operation took longer than {} seconds", HELPER_LIMIT.as_secs());
            self.finish_helper(slot as u32, Err(RemoteError::new(ErrorKind::TimedOut, message)));
        }
    }

    fn expire_stalls(&mut self) {
        let now = Instant::now();
        for container in self.containers.iter_mut().flatten() {
            if container.stdio.stalled_until().is_some_and(|limit| limit <= now) {
                container.stdio.unstall(&self.poller, now);
            }
        }
    }

    /// Ends that have waited for the disk for too long.
    fn expire_ends(&mut self) {
        let now = Instant::now();
        for slot in 0..self.containers.len() {
            let ended = self.containers[slot].as_ref().and_then(|container| container.ended);
            if ended.is_some_and(|ended| ended.deadline <= now) {
                self.announce_end(slot, None);
            }
        }
    }

    /// What came of the log's writer may be picked up by any event of its container: nobody waits for it longer than that.
    fn settle_logs(&mut self) {
        for slot in 0..self.containers.len() {
            self.answer_reopened(slot);
            if self.containers[slot].as_ref().is_some_and(|container| container.ended.is_some()) {
                self.announce_end(slot, Some(Duration::ZERO));
            }
        }
    }

    fn write_logs_of_removed(&mut self) {
        let poller = &self.poller;
        self.unwritten_logs.retain_mut(|log| {
            log.go_on(poller, Token::LogOfRemoved);
            let idle = log.is_idle();
            if idle {
                log.rest(poller);
            }
            !idle
        });
    }

    fn on_signal(&mut self) {
        let mut child_ended = false;
        while let Ok(Some(info)) = self.signals.read_signal() {
            match info.ssi_signo as i32 {
                number if number == Signal::SIGCHLD as i32 => child_ended = true,
                number if number == Signal::SIGHUP as i32 => {}
                // Asked to end by hand or by the machine's shutdown: as if a daemon had asked.
                _ => self.begin_shutdown(None),
            }
        }
        if child_ended {
            self.reap();
        }
    }

    fn is_finished(&self) -> bool {
        self.stopping && self.helpers.iter().all(Option::is_none) && self.containers.iter().all(Option::is_none)
    }

    /// Leaves no trace of itself; tells whoever asked for its end.
    pub(crate) fn finish(mut self) {
        if let (Some(path), Some(init)) = (&self.config.pid_namespace, self.pid_namespace_init) {
            crate::pidns::remove(path, init);
        }
        for log in &mut self.unwritten_logs {
            log.flush(&self.poller, Token::LogOfRemoved, LAST_FLUSH_LIMIT);
        }
        let _ = std::fs::remove_file(oarlock_shim_api::socket_path(&self.config.state_dir));
        let _ = std::fs::remove_file(oarlock_shim_api::shim_record_path(&self.config.state_dir));
        if let Some(to) = self.shutdown.take() {
            self.reply(to, Ok(Reply::Done), Vec::new());
        }
    }
}

#[allow(unsafe_code, reason = "takes over an accepted socket")]
fn take_fd(raw: i32) -> OwnedFd {
    // SAFETY: just accepted, known to nobody else.
    unsafe { OwnedFd::from_raw_fd(raw) }
}

/// A handle for a child that has not been reaped.
#[allow(unsafe_code, reason = "the C library has no wrapper for pidfd_open")]
pub(crate) fn open_process(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: takes numbers only and returns a new close-on-exec descriptor.
    let raw = unsafe { nix::libc::syscall(nix::libc::SYS_pidfd_open, pid.as_raw(), 0) };
    if raw < 0 { Err(io::Error::last_os_error()) } else { Ok(take_fd(raw as i32)) }
}

/// Signals by handle; false when the process has ended.
#[allow(unsafe_code, reason = "the C library has no wrapper for pidfd_send_signal")]
pub(crate) fn signal_process(handle: &OwnedFd, signal: i32) -> Result<(), Errno> {
    // SAFETY: takes numbers and a null pointer.
    let result = unsafe {
        nix::libc::syscall(nix::libc::SYS_pidfd_send_signal, handle.as_raw_fd(), signal, std::ptr::null::<u8>(), 0)
    };
    Errno::result(result).map(drop)
}
