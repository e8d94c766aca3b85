//! The second half of requests that a helper works for: what follows when it has finished.

use std::os::fd::{AsFd, OwnedFd};

use nix::sys::epoll::EpollFlags;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use oarlock_cgroup::Cgroup;
use oarlock_shim_api::wire::Reply;
use oarlock_shim_api::{CreateReply, ErrorKind, RemoteError};

use crate::container::{Process, Status};
use crate::engine::{self, External};
use crate::forked::{Finished, Report};
use crate::poll::Token;
use crate::requests::not_found;
use crate::server::{ReplyTo, Server, open_process, signal_process};

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
    /// For all that the container knows to wait for it.
    Delete {
        container: u32,
    },
    /// Nobody waits.
    Background,
}

impl Server {
    /// A helper has finished: the second half of its request.
    pub(crate) fn on_finished(&mut self, purpose: Purpose, finished: Finished) {
        match purpose {
            Purpose::Create { container, to } => self.created(container, to, finished),
            Purpose::Undo { container, to, error } => {
                if let Err(also) = finished {
                    eprintln!("clearing away a failed creation: {also}");
                    let removed = self.containers.get_mut(container as usize).and_then(Option::as_mut);
                    for to in removed.map(|container| std::mem::take(&mut container.removers)).unwrap_or_default() {
                        self.reply(to, Err(also.clone()), Vec::new());
                    }
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
            Purpose::Delete { container } => self.deleted(container, finished),
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
        let mut is_unwanted = self.stopping;
        if let Some(Some(container)) = self.containers.get_mut(slot as usize) {
            container.busy = false;
            is_unwanted |= !container.removers.is_empty();
        }
        if !is_unwanted {
            return;
        }
        if let Err(error) = self.spawn_delete(slot) {
            eprintln!("{error}");
            let removers = self.containers.get_mut(slot as usize).and_then(Option::as_mut).map(|one| &mut one.removers);
            for to in removers.map(std::mem::take).unwrap_or_default() {
                self.reply(to, Err(error.clone()), Vec::new());
            }
        }
    }

    fn created(&mut self, slot: u32, to: ReplyTo, finished: Finished) {
        match finished.and_then(|(report, fds)| self.adopt(slot, report, fds)) {
            Ok((pid, secluded)) => {
                self.reply(to, Ok(Reply::Created(CreateReply { pid, secluded })), Vec::new());
                self.not_busy(slot);
            }
            Err(error) => self.undo(slot, to, error),
        }
    }

    /// Takes a created container on: handle, terminal, and the watch for lack of memory, before anything runs in it.
    fn adopt(&mut self, slot: u32, report: Report, fds: Vec<OwnedFd>) -> Result<(i32, bool), RemoteError> {
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
        Ok((report.pid, report.secluded))
    }

    fn undo(&mut self, slot: u32, to: ReplyTo, error: RemoteError) {
        let Some(Some(container)) = self.containers.get_mut(slot as usize) else {
            return self.reply(to, Err(error), Vec::new());
        };
        if let Some(process) = container.first.take() {
            let _ = signal_process(&process.handle, Signal::SIGKILL as i32);
        }
        let (id, external) = (container.id.clone(), container.oci_runtime.clone());
        let job = engine::RemoveJob { hooks_done: external.is_some(), ..self.remove_job(&id) };
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

    fn deleted(&mut self, slot: u32, finished: Finished) {
        let Some(Some(container)) = self.containers.get_mut(slot as usize) else { return };
        container.busy = false;
        if let Err(error) = finished {
            for to in std::mem::take(&mut container.removers) {
                self.reply(to, Err(error.clone()), Vec::new());
            }
            // A shutdown goes on without what cannot be removed; the daemon looks after leftovers.
            if self.stopping {
                eprintln!("{error}");
                self.forget(slot as usize);
            }
            return;
        }
        if container.first.is_some() {
            container.removed = true;
            self.reap();
            return;
        }
        self.forget(slot as usize);
    }
}
