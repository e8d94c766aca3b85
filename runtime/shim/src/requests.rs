//! What each request does, and what follows when its helper has finished.

use std::fs;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::epoll::EpollFlags;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, pipe2};
use oarlock_cgroup::Cgroup;
use oarlock_shim_api::wire::{ExecBody, Reply, Request};
use oarlock_shim_api::{CreateReply, CreateRequest, ErrorKind, RemoteError, ShimState, container_dir};

use crate::container::{Container, Exec, Process, Status};
use crate::engine::{self, CreateJob, External, RemoveJob};
use crate::exec::ExecJob;
use crate::helper::{self, Finished, Report};
use crate::poll::Token;
use crate::server::{ReplyTo, Server, open_process, signal_process};
use crate::stdio::{ContainerEnds, Log, Stdio};

/// What a helper works for.
#[derive(Debug)]
pub(crate) enum Purpose {
    Create {
        container: u32,
        to: ReplyTo,
    },
    /// Clears away after a failed creation, whose error is then told.
    Undo {
        container: u32,
        to: ReplyTo,
        error: RemoteError,
    },
    Start {
        container: u32,
        to: ReplyTo,
    },
    Freeze {
        container: u32,
        to: ReplyTo,
        frozen: bool,
    },
    SignalAll {
        to: ReplyTo,
    },
    Exec {
        container: u32,
        exec_id: String,
        to: ReplyTo,
        client_ends: Vec<OwnedFd>,
    },
    Delete {
        container: u32,
        to: Option<ReplyTo>,
    },
    /// Nobody waits.
    Background,
}

type Handled = Result<(), RemoteError>;

fn invalid(message: impl Into<String>) -> RemoteError {
    RemoteError::new(ErrorKind::Invalid, message)
}

fn not_found(message: impl Into<String>) -> RemoteError {
    RemoteError::new(ErrorKind::NotFound, message)
}

/// Ids become directory names.
fn check_id(id: &str) -> Result<(), RemoteError> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    if !id.is_empty() && id.len() <= 200 && id.chars().all(fits) && !id.starts_with('.') {
        return Ok(());
    }
    Err(invalid(format!("{id:?} is not a valid id")))
}

impl Server {
    pub(crate) fn on_request(&mut self, to: ReplyTo, request: Request) {
        let handled = match request {
            Request::Create(request) => self.create(to, request),
            Request::Start { container_id } => self.start(to, &container_id),
            Request::Signal { container_id, signal, all } => self.signal(to, &container_id, signal, all),
            Request::Delete { container_id } => self.delete(to, &container_id),
            Request::Pause { container_id } => self.freeze(to, &container_id, true),
            Request::Resume { container_id } => self.freeze(to, &container_id, false),
            Request::Exec(body) => self.exec(to, body),
            Request::ExecSignal { container_id, exec_id, signal } => {
                self.exec_signal(to, &container_id, &exec_id, signal)
            }
            Request::Attach { container_id, stdin } => self.attach(to, &container_id, stdin),
            Request::Resize { container_id, exec_id, width, height } => {
                self.resize(to, &container_id, exec_id.as_deref(), (width, height))
            }
            Request::CloseStdin { container_id } => self.close_stdin(to, &container_id),
            Request::ReopenLog { container_id } => self.reopen_log(to, &container_id),
            Request::State => {
                let containers = self.containers.iter().flatten().filter_map(Container::state).collect();
                self.reply(to, Ok(Reply::State(ShimState { containers })), Vec::new());
                Ok(())
            }
            Request::Shutdown => {
                self.begin_shutdown(Some(to));
                Ok(())
            }
        };
        if let Err(error) = handled {
            self.reply(to, Err(error), Vec::new());
        }
    }

    fn done(&mut self, to: ReplyTo) -> Handled {
        self.reply(to, Ok(Reply::Done), Vec::new());
        Ok(())
    }

    fn find(&mut self, id: &str) -> Result<(u32, &mut Container), RemoteError> {
        let matches = |entry: &&mut Option<Container>| entry.as_ref().is_some_and(|container| container.id == id);
        let slot = self.containers.iter_mut().position(|mut entry| matches(&&mut entry));
        let found = slot.and_then(|slot| Some((slot as u32, self.containers[slot].as_mut()?)));
        found.ok_or_else(|| not_found(format!("container {id} does not exist")))
    }

    fn spawn(&mut self, job: impl FnOnce() -> Finished) -> Result<helper::Running, RemoteError> {
        helper::spawn(&[], job).map_err(engine::io_failed("fork a helper"))
    }

    fn create(&mut self, to: ReplyTo, request: CreateRequest) -> Handled {
        check_id(&request.container_id)?;
        if self.stopping {
            return Err(RemoteError::new(ErrorKind::InvalidState, "the shim is shutting down"));
        }
        if self.find(&request.container_id).is_ok() {
            let message = format!("container {} already exists", request.container_id);
            return Err(RemoteError::new(ErrorKind::AlreadyExists, message));
        }
        let directory = container_dir(&self.config.state_dir, &request.container_id);
        fs::create_dir_all(&directory).map_err(engine::io_failed("create the container's directory"))?;
        let _ = fs::remove_file(directory.join("exit.json"));
        let log = request.log_path.as_deref().map(Log::open).transpose().map_err(engine::io_failed("open the log"))?;
        let slot = self.containers.iter().position(Option::is_none).unwrap_or(self.containers.len());
        let (stdio, ends) = Stdio::new(&self.poller, slot as u32, request.tty, request.stdin, request.stdin_once, log)
            .map_err(engine::io_failed("make pipes"))?;
        let running = self.spawn_create(&request, ends)?;
        let container = Container {
            id: request.container_id,
            status: Status::Creating,
            first: None,
            exit: None,
            stdio,
            oom: None,
            cgroup: None,
            private_pid_namespace: true,
            start_hooks: false,
            oci_runtime: request.oci_runtime,
            execs: Vec::new(),
            busy: true,
            removed: false,
            reply_when_gone: None,
        };
        if slot == self.containers.len() {
            self.containers.push(None);
        }
        self.containers[slot] = Some(container);
        self.watch_helper(running, Purpose::Create { container: slot as u32, to });
        Ok(())
    }

    /// The container's ends of the pipes are closed here when this returns: only the container keeps them.
    fn spawn_create(&mut self, request: &CreateRequest, ends: ContainerEnds) -> Result<helper::Running, RemoteError> {
        let job = CreateJob {
            container_id: request.container_id.clone(),
            bundle: request.bundle.clone(),
            state_dir: self.config.state_dir.clone(),
            container_root: self.config.container_root.clone(),
            terminal: request.tty,
            ends,
        };
        let external = request.oci_runtime.as_deref().map(|binary| External::new(binary, &self.config.container_root));
        let kept = job.ends.numbers();
        helper::spawn(&kept, move || match external {
            Some(external) => external.create(job),
            None => engine::create(job),
        })
        .map_err(engine::io_failed("fork a helper"))
    }

    fn start(&mut self, to: ReplyTo, id: &str) -> Handled {
        let (slot, container) = self.find(id)?;
        container.check_idle()?;
        container.check_status(&[Status::Created])?;
        let external = container.oci_runtime.clone();
        if external.is_none() && !container.start_hooks {
            container.status = Status::Running;
            notify(&self.config.container_root, id)?;
            return self.done(to);
        }
        container.busy = true;
        container.status = Status::Running;
        let (id, root, state_dir) = (id.to_owned(), self.config.container_root.clone(), self.config.state_dir.clone());
        let running = self.spawn(move || match external {
            Some(binary) => External::new(&binary, &root).simple("start", &state_dir, &id),
            None => engine::start_with_hooks(&root, &id),
        })?;
        self.watch_helper(running, Purpose::Start { container: slot, to });
        Ok(())
    }

    fn signal(&mut self, to: ReplyTo, id: &str, signal: i32, all: bool) -> Handled {
        let (_, container) = self.find(id)?;
        if all && let Some(cgroup) = container.cgroup.clone() {
            let running = self.spawn(move || engine::signal_all(&cgroup, signal))?;
            self.watch_helper(running, Purpose::SignalAll { to });
            return Ok(());
        }
        let ended = || not_found(format!("container {id} has ended"));
        let process = container.first.as_ref().ok_or_else(ended)?;
        send_signal(process, signal, ended)?;
        self.done(to)
    }

    fn delete(&mut self, to: ReplyTo, id: &str) -> Handled {
        check_id(id)?;
        match self.find(id) {
            Err(_) => return self.delete_unknown(to, id),
            Ok((slot, container)) => {
                container.check_idle()?;
                self.spawn_delete(slot, Some(to))
            }
        }
    }

    /// Something an earlier shim of this pod may have left.
    fn delete_unknown(&mut self, to: ReplyTo, id: &str) -> Handled {
        if !container_dir(&self.config.state_dir, id).exists() && !self.config.container_root.join(id).exists() {
            return self.done(to);
        }
        let job = self.remove_job(id);
        let running = self.spawn(move || engine::remove(&job))?;
        self.watch_helper(running, Purpose::SignalAll { to });
        Ok(())
    }

    fn remove_job(&self, id: &str) -> RemoveJob {
        RemoveJob {
            container_id: id.to_owned(),
            state_dir: self.config.state_dir.clone(),
            container_root: self.config.container_root.clone(),
        }
    }

    fn spawn_delete(&mut self, slot: u32, to: Option<ReplyTo>) -> Handled {
        let Some(Some(container)) = self.containers.get_mut(slot as usize) else { return Ok(()) };
        container.busy = true;
        if let Some(process) = &container.first {
            let _ = signal_process(&process.handle, Signal::SIGKILL as i32);
        }
        let (id, external) = (container.id.clone(), container.oci_runtime.clone());
        let job = self.remove_job(&id);
        let spawned = self.spawn(move || {
            let root = job.container_root.clone();
            let by_runtime =
                external.map(|binary| External::new(&binary, &root).delete(&job.state_dir, &job.container_id));
            let removed = engine::remove(&job);
            by_runtime.transpose().and(removed)
        });
        match spawned {
            Ok(running) => {
                self.watch_helper(running, Purpose::Delete { container: slot, to });
                Ok(())
            }
            Err(error) => {
                if let Some(Some(container)) = self.containers.get_mut(slot as usize) {
                    container.busy = false;
                }
                Err(error)
            }
        }
    }

    fn freeze(&mut self, to: ReplyTo, id: &str, frozen: bool) -> Handled {
        let (slot, container) = self.find(id)?;
        container.check_idle()?;
        container.check_status(&[if frozen { Status::Running } else { Status::Paused }])?;
        let none = || RemoteError::new(ErrorKind::Engine, "the container has no cgroup to freeze");
        let cgroup = container.cgroup.clone().ok_or_else(none)?;
        container.busy = true;
        let running = self.spawn(move || engine::set_frozen(&cgroup, frozen))?;
        self.watch_helper(running, Purpose::Freeze { container: slot, to, frozen });
        Ok(())
    }

    fn exec(&mut self, to: ReplyTo, body: ExecBody) -> Handled {
        check_id(&body.exec_id)?;
        let directory = container_dir(&self.config.state_dir, &body.container_id);
        let (slot, container) = self.find(&body.container_id)?;
        container.check_status(&[Status::Running, Status::Created])?;
        if container.execs.iter().any(|exec| exec.id == body.exec_id) {
            return Err(RemoteError::new(ErrorKind::AlreadyExists, format!("exec {} already exists", body.exec_id)));
        }
        let ended = || not_found(format!("container {} has ended", container.id));
        let process = container.first.as_ref().ok_or_else(ended)?;
        let init_handle = process.handle.try_clone().map_err(engine::io_failed("duplicate a handle"))?;
        let (ends, client_ends) = if body.tty {
            Default::default()
        } else {
            exec_pipes(body.stdin).map_err(engine::io_failed("make pipes"))?
        };
        let job = ExecJob {
            init: process.pid.as_raw(),
            init_handle,
            cgroup: container.cgroup.clone(),
            directory,
            process: body.process.get().to_owned(),
            terminal: body.tty,
            ends,
        };
        let mut kept = job.ends.numbers();
        kept.push(job.init_handle.as_raw_fd());
        let running =
            helper::spawn(&kept, move || crate::exec::exec(job)).map_err(engine::io_failed("fork a helper"))?;
        container.execs.push(Exec { id: body.exec_id.clone(), process: None, terminal: None });
        self.watch_helper(running, Purpose::Exec { container: slot, exec_id: body.exec_id, to, client_ends });
        Ok(())
    }

    fn exec_signal(&mut self, to: ReplyTo, id: &str, exec_id: &str, signal: i32) -> Handled {
        let (_, container) = self.find(id)?;
        let ended = || not_found(format!("exec {exec_id} of container {id} has ended"));
        let exec = container.execs.iter().find(|exec| exec.id == exec_id).ok_or_else(ended)?;
        send_signal(exec.process.as_ref().ok_or_else(ended)?, signal, ended)?;
        self.done(to)
    }

    fn attach(&mut self, to: ReplyTo, id: &str, stdin: bool) -> Handled {
        let (slot, _) = self.find(id)?;
        let Some(Some(container)) = self.containers.get_mut(slot as usize) else { return Ok(()) };
        let terminal = container.stdio.is_terminal();
        let (stdin, ends) = container.stdio.attach(&self.poller, stdin).map_err(engine::io_failed("attach"))?;
        self.reply(to, Ok(Reply::Attached { stdin, terminal }), ends.0);
        Ok(())
    }

    fn resize(&mut self, to: ReplyTo, id: &str, exec_id: Option<&str>, (width, height): (u16, u16)) -> Handled {
        let (_, container) = self.find(id)?;
        let master = match exec_id {
            None => container.stdio.master(),
            Some(exec_id) => {
                let exec = container.execs.iter().find(|exec| exec.id == exec_id);
                exec.ok_or_else(|| not_found(format!("exec {exec_id} has ended")))?.terminal.as_ref()
            }
        };
        let master = master.ok_or_else(|| invalid("it has no terminal"))?;
        crate::exec::resize(master, width, height).map_err(engine::io_failed("resize the terminal"))?;
        self.done(to)
    }

    fn close_stdin(&mut self, to: ReplyTo, id: &str) -> Handled {
        let (slot, _) = self.find(id)?;
        if let Some(Some(container)) = self.containers.get_mut(slot as usize) {
            container.stdio.close_input(&self.poller);
        }
        self.done(to)
    }

    fn reopen_log(&mut self, to: ReplyTo, id: &str) -> Handled {
        let (_, container) = self.find(id)?;
        container.stdio.reopen_log().map_err(engine::io_failed("reopen the log"))?;
        self.done(to)
    }

    pub(crate) fn begin_shutdown(&mut self, to: Option<ReplyTo>) {
        self.stopping = true;
        self.shutdown = to.or(self.shutdown);
        for slot in 0..self.containers.len() {
            // One that is busy follows when its helper has finished.
            if self.containers[slot].as_ref().is_some_and(|container| container.check_idle().is_ok())
                && let Err(error) = self.spawn_delete(slot as u32, None)
            {
                eprintln!("{error}");
            }
        }
    }

    /// A helper has finished: the second half of its request.
    pub(crate) fn on_finished(&mut self, purpose: Purpose, finished: Finished) {
        match purpose {
            Purpose::Create { container, to } => self.created(container, to, finished),
            Purpose::Undo { container, to, error } => {
                if let Err(also) = finished {
                    eprintln!("clearing away a failed creation: {also}");
                }
                self.forget(container as usize);
                self.reply(to, Err(error), Vec::new());
            }
            Purpose::Start { container, to } => {
                if finished.is_err() {
                    self.set_status(container, Status::Running, Status::Created);
                }
                self.complete(container, to, finished);
            }
            Purpose::Freeze { container, to, frozen } => {
                if finished.is_ok() {
                    let (from, next) =
                        if frozen { (Status::Running, Status::Paused) } else { (Status::Paused, Status::Running) };
                    self.set_status(container, from, next);
                }
                self.complete(container, to, finished);
            }
            Purpose::SignalAll { to } => self.reply(to, finished.map(|_| Reply::Done), Vec::new()),
            Purpose::Exec { container, exec_id, to, client_ends } => {
                self.execed(container, exec_id, to, client_ends, finished);
            }
            Purpose::Delete { container, to } => self.deleted(container, to, finished),
            Purpose::Background => {
                if let Err(error) = finished {
                    eprintln!("{error}");
                }
            }
        }
    }

    fn set_status(&mut self, slot: u32, from: Status, next: Status) {
        if let Some(Some(container)) = self.containers.get_mut(slot as usize)
            && container.status == from
        {
            container.status = next;
        }
    }

    fn complete(&mut self, slot: u32, to: ReplyTo, finished: Finished) {
        self.not_busy(slot);
        self.reply(to, finished.map(|_| Reply::Done), Vec::new());
    }

    fn not_busy(&mut self, slot: u32) {
        if let Some(Some(container)) = self.containers.get_mut(slot as usize) {
            container.busy = false;
        }
        if self.stopping
            && let Err(error) = self.spawn_delete(slot, None)
        {
            eprintln!("{error}");
        }
    }

    fn created(&mut self, slot: u32, to: ReplyTo, finished: Finished) {
        match finished.and_then(|(report, fds)| self.adopt(slot, report, fds)) {
            Ok(pid) => {
                self.reply(to, Ok(Reply::Created(CreateReply { pid })), Vec::new());
                self.not_busy(slot);
            }
            Err(error) => self.undo(slot, to, error),
        }
    }

    /// Takes a created container on: handle, terminal, and the watch for lack of memory, before anything runs in it.
    fn adopt(&mut self, slot: u32, report: Report, fds: Vec<OwnedFd>) -> Result<i32, RemoteError> {
        let gone = || RemoteError::new(ErrorKind::Engine, "the container is gone");
        let container = self.containers.get_mut(slot as usize).and_then(Option::as_mut).ok_or_else(gone)?;
        let pid = Pid::from_raw(report.pid);
        let handle = open_process(pid).map_err(engine::io_failed("get a handle of the container's process"))?;
        container.first = Some(Process { pid, handle });
        container.status = Status::Created;
        container.private_pid_namespace = report.private_pid_namespace;
        container.start_hooks = report.start_hooks;
        if let Some(master) = fds.into_iter().next() {
            container.stdio.set_master(&self.poller, master).map_err(engine::io_failed("use the terminal"))?;
        }
        let watch = report.cgroup.as_deref().and_then(|path| Cgroup::new(path).ok()?.watch_oom().ok());
        if let Some(watch) = watch {
            self.poller
                .add(watch.as_fd(), Token::Oom(slot), EpollFlags::EPOLLIN)
                .map_err(engine::io_failed("watch for lack of memory"))?;
            container.oom = Some(watch);
        }
        container.cgroup = report.cgroup;
        Ok(report.pid)
    }

    fn undo(&mut self, slot: u32, to: ReplyTo, error: RemoteError) {
        let Some(Some(container)) = self.containers.get_mut(slot as usize) else {
            return self.reply(to, Err(error), Vec::new());
        };
        if let Some(process) = container.first.take() {
            let _ = signal_process(&process.handle, Signal::SIGKILL as i32);
        }
        let (id, external) = (container.id.clone(), container.oci_runtime.clone());
        let job = self.remove_job(&id);
        let spawned = self.spawn(move || {
            if let Some(binary) = external {
                External::new(&binary, &job.container_root).delete(&job.state_dir, &job.container_id)?;
            }
            engine::remove(&job)
        });
        match spawned {
            Ok(running) => self.watch_helper(running, Purpose::Undo { container: slot, to, error }),
            Err(also) => {
                eprintln!("{also}");
                self.forget(slot as usize);
                self.reply(to, Err(error), Vec::new());
            }
        }
    }

    fn execed(&mut self, slot: u32, exec_id: String, to: ReplyTo, client_ends: Vec<OwnedFd>, finished: Finished) {
        let adopted = finished.and_then(|(report, fds)| {
            let gone = || not_found("the container is gone");
            let container = self.containers.get_mut(slot as usize).and_then(Option::as_mut).ok_or_else(gone)?;
            let exec = container.execs.iter_mut().find(|exec| exec.id == exec_id).ok_or_else(gone)?;
            let pid = Pid::from_raw(report.pid);
            let handle = open_process(pid).map_err(engine::io_failed("get a handle of the process"))?;
            exec.process = Some(Process { pid, handle });
            let mut ends = client_ends;
            if let Some(master) = fds.into_iter().next() {
                ends.push(master.try_clone().map_err(engine::io_failed("duplicate the terminal"))?);
                exec.terminal = Some(master);
            }
            Ok((report.pid, ends))
        });
        match adopted {
            Ok((pid, ends)) => self.reply(to, Ok(Reply::Execed { pid }), ends),
            Err(error) => {
                if let Some(Some(container)) = self.containers.get_mut(slot as usize) {
                    container.execs.retain(|exec| exec.id != exec_id);
                }
                self.reply(to, Err(error), Vec::new());
            }
        }
    }

    fn deleted(&mut self, slot: u32, to: Option<ReplyTo>, finished: Finished) {
        let Some(Some(container)) = self.containers.get_mut(slot as usize) else { return };
        container.busy = false;
        if let Err(error) = finished {
            // A shutdown goes on without what cannot be removed; the daemon looks after leftovers.
            if self.stopping {
                eprintln!("{error}");
                self.forget(slot as usize);
            }
            if let Some(to) = to {
                self.reply(to, Err(error), Vec::new());
            }
            return;
        }
        if container.first.is_some() {
            container.removed = true;
            container.reply_when_gone = to;
            self.reap();
            return;
        }
        self.forget(slot as usize);
        if let Some(to) = to {
            self.reply(to, Ok(Reply::Done), Vec::new());
        }
    }
}

fn send_signal(process: &Process, signal: i32, ended: impl FnOnce() -> RemoteError) -> Handled {
    match signal_process(&process.handle, signal) {
        Ok(()) => Ok(()),
        Err(Errno::ESRCH) => Err(ended()),
        Err(Errno::EINVAL) => Err(invalid(format!("no signal has number {signal}"))),
        Err(errno) => Err(engine::failed("send the signal", &errno)),
    }
}

/// Standard input (if wanted), output and error: the process's ends, and the client's.
fn exec_pipes(stdin: bool) -> std::io::Result<(ContainerEnds, Vec<OwnedFd>)> {
    let mut ends = ContainerEnds::default();
    let mut client = Vec::with_capacity(3);
    if stdin {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
        ends.stdin = Some(reader);
        client.push(writer);
    }
    for end in [&mut ends.stdout, &mut ends.stderr] {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
        *end = Some(writer);
        client.push(reader);
    }
    Ok((ends, client))
}

/// Lets a created container run: its first process waits on this socket.
fn notify(container_root: &Path, id: &str) -> Handled {
    let path: PathBuf = engine::notify_socket(container_root, id);
    let directory = path.parent().unwrap_or(container_root);
    let directory = fs::File::open(directory).map_err(engine::io_failed("open the container's directory"))?;
    // Through the descriptor: a socket address holds 107 bytes, the path may be longer.
    let address = format!("/proc/self/fd/{}/notify.sock", directory.as_raw_fd());
    let mut stream = UnixStream::connect(address).map_err(engine::io_failed("start the container"))?;
    stream.write_all(b"start container").map_err(engine::io_failed("start the container"))
}
