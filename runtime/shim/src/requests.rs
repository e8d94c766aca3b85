//! What each request does. Where a helper works for it, the rest is in `finished.rs`.

use std::collections::VecDeque;
use std::fs;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use nix::unistd::pipe2;
use oarlock_shim_api::wire::{ExecBody, Reply, Request};
use oarlock_shim_api::{CreateRequest, ErrorKind, RemoteError, ShimState, container_dir};

use crate::container::{Container, Exec, Process, Status};
use crate::engine::{self, CreateJob, External, RemoveJob};
use crate::exec::ExecJob;
use crate::finished::Purpose;
use crate::forked::{self, Finished};
use crate::forward::Forwarder;
use crate::server::{ReplyTo, Server, signal_process};
use crate::stdio::{ContainerEnds, Log, Stdio};

type Handled = Result<(), RemoteError>;

/// Calls that wait for one container's removal.
const REMOVERS_MAX: usize = 64;

fn invalid(message: impl Into<String>) -> RemoteError {
    RemoteError::new(ErrorKind::Invalid, message)
}

pub(crate) fn not_found(message: impl Into<String>) -> RemoteError {
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
            Request::Forward { rules } => {
                let failures = self.forwarder.add(&self.poller, &rules);
                self.reply(to, Ok(Reply::Forwarding { failures }), Vec::new());
                Ok(())
            }
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
        let found = self.containers.iter_mut().enumerate().find_map(|(slot, entry)| {
            let container = entry.as_mut().filter(|container| container.id == id)?;
            Some((slot as u32, container))
        });
        found.ok_or_else(|| not_found(format!("container {id} does not exist")))
    }

    pub(crate) fn spawn(&mut self, job: impl FnOnce() -> Finished) -> Result<forked::Running, RemoteError> {
        forked::spawn(&[], job).map_err(engine::io_failed("fork a helper"))
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
            removers: Vec::new(),
            ended: None,
            reopening: VecDeque::new(),
        };
        if slot == self.containers.len() {
            self.containers.push(None);
        }
        self.containers[slot] = Some(container);
        self.watch_helper(running, Purpose::Create { container: slot as u32, to });
        Ok(())
    }

    /// The container's ends of the pipes are closed here when this returns: only the container keeps them.
    fn spawn_create(&mut self, request: &CreateRequest, ends: ContainerEnds) -> Result<forked::Running, RemoteError> {
        let job = CreateJob {
            container_id: request.container_id.clone(),
            bundle: request.bundle.clone(),
            state_dir: self.config.state_dir.clone(),
            container_root: self.config.container_root.clone(),
            mounts_below: self.config.mounts_below.clone(),
            terminal: request.tty,
            ends,
        };
        let external = request.oci_runtime.as_deref().map(|binary| External::new(binary, &self.config.container_root));
        let kept = job.ends.numbers();
        forked::spawn(&kept, move || match external {
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
            Err(_) => self.delete_unknown(to, id),
            Ok((slot, container)) => {
                let is_idle = container.check_idle().is_ok();
                if container.removers.len() >= REMOVERS_MAX {
                    return Err(RemoteError::new(ErrorKind::Engine, format!("too many calls remove container {id}")));
                }
                container.removers.push(to);
                // Otherwise when its helper has finished, if that was not a removal itself.
                let begun = if is_idle { self.spawn_delete(slot) } else { Ok(()) };
                if begun.is_err()
                    && let Some(Some(container)) = self.containers.get_mut(slot as usize)
                {
                    container.removers.pop();
                }
                begun
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

    pub(crate) fn remove_job(&self, id: &str) -> RemoveJob {
        RemoveJob {
            container_id: id.to_owned(),
            state_dir: self.config.state_dir.clone(),
            container_root: self.config.container_root.clone(),
            hooks_done: false,
        }
    }

    pub(crate) fn spawn_delete(&mut self, slot: u32) -> Handled {
        let Some(Some(container)) = self.containers.get_mut(slot as usize) else { return Ok(()) };
        container.busy = true;
        if let Some(process) = &container.first {
            let _ = signal_process(&process.handle, Signal::SIGKILL as i32);
        }
        let (id, external) = (container.id.clone(), container.oci_runtime.clone());
        let job = RemoveJob { hooks_done: external.is_some(), ..self.remove_job(&id) };
        let spawned = self.spawn(move || {
            let root = job.container_root.clone();
            let by_runtime =
                external.map(|binary| External::new(&binary, &root).delete(&job.state_dir, &job.container_id));
            let removed = engine::remove(&job);
            by_runtime.transpose().and(removed)
        });
        match spawned {
            Ok(running) => {
                self.watch_helper(running, Purpose::Delete { container: slot });
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
        let container_root = self.config.container_root.clone();
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
            container_root,
            process: body.process.get().to_owned(),
            terminal: body.tty,
            ends,
        };
        let mut kept = job.ends.numbers();
        kept.push(job.init_handle.as_raw_fd());
        let group = job.cgroup.as_deref().and_then(|path| oarlock_cgroup::Cgroup::new(path).ok()?.birthplace());
        let running = forked::spawn_in(group.as_ref().map(AsFd::as_fd), &kept, move || crate::exec::exec(job))
            .map_err(engine::io_failed("fork a helper"))?;
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
        let (slot, container) = self.find(id)?;
        if !container.stdio.reopen_log().map_err(engine::io_failed("reopen the log"))? {
            return self.done(to);
        }
        container.reopening.push_back(to);
        self.on_log(slot);
        Ok(())
    }

    /// Something of a container's log was written, or it was opened anew.
    pub(crate) fn on_log(&mut self, slot: u32) {
        let Some(Some(container)) = self.containers.get_mut(slot as usize) else { return };
        container.stdio.write_log(&self.poller);
        self.answer_reopened(slot as usize);
        self.announce_end(slot as usize, Some(Duration::ZERO));
    }

    /// Tells who asked for it that a log has been opened anew.
    pub(crate) fn answer_reopened(&mut self, slot: usize) {
        let Some(Some(container)) = self.containers.get_mut(slot) else { return };
        for result in container.stdio.take_reopened() {
            let Some(Some(container)) = self.containers.get_mut(slot) else { return };
            if let Some(to) = container.reopening.pop_front() {
                self.reply(to, result.map(|()| Reply::Done).map_err(engine::io_failed("reopen the log")), Vec::new());
            }
        }
    }

    pub(crate) fn begin_shutdown(&mut self, to: Option<ReplyTo>) {
        self.stopping = true;
        self.shutdown = to.or(self.shutdown);
        self.forwarder = Forwarder::default();
        for slot in 0..self.containers.len() {
            // One that is busy follows when its helper has finished.
            if self.containers[slot].as_ref().is_some_and(|container| container.check_idle().is_ok())
                && let Err(error) = self.spawn_delete(slot as u32)
            {
                eprintln!("{error}");
            }
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
