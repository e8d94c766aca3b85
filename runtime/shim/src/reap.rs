//! Ends of processes. Every child and every orphan of the pod is reaped here and nowhere else.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use oarlock_shim_api::wire::Reply;
use oarlock_shim_api::{Event, ExitRecord, exit_record_path, write_atomically};

use crate::container::{Ended, Status};
use crate::finished::Purpose;
use crate::forked;
use crate::server::Server;
use crate::stdio::Log;
use crate::{engine, stdio};

/// A disk that does not take the rest of a log for so long keeps no end secret.
const LOG_LIMIT: Duration = Duration::from_secs(10);
/// What removed containers' logs may have in memory, all together.
const UNWRITTEN_BYTES_MAX: usize = 16 << 20;

impl Server {
    pub(crate) fn reap(&mut self) {
        loop {
            match waitid(Id::All, WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG) {
                Ok(WaitStatus::Exited(pid, code)) => self.on_exit(pid, code, None),
                Ok(WaitStatus::Signaled(pid, signal, _)) => self.on_exit(pid, 128 + signal as i32, Some(signal as i32)),
                Err(Errno::EINTR) => {}
                // Nothing more has ended, or there are no children.
                _ => return,
            }
        }
    }

    fn on_exit(&mut self, pid: Pid, exit_code: i32, signal: Option<i32>) {
        if Some(pid) == self.pid_namespace_init {
            self.pid_namespace_init = None;
            return;
        }
        if self.record_exit(pid, exit_code, signal) {
            return;
        }
        // A process can end before its helper's report of it was read. The report was sent before the helper ended,
        // and only then did the process become our child: so it is there to be read now.
        for slot in 0..self.helpers.len() {
            self.on_helper(slot as u32);
        }
        // Otherwise: a helper, an orphan, or a process whose creation failed.
        self.record_exit(pid, exit_code, signal);
    }

    /// False if the process is none of those that matter.
    fn record_exit(&mut self, pid: Pid, exit_code: i32, signal: Option<i32>) -> bool {
        for slot in 0..self.containers.len() {
            let Some(container) = &mut self.containers[slot] else { continue };
            let ended = container.ended.is_some();
            if !ended && container.first.as_ref().is_some_and(|process| process.pid == pid) {
                self.container_exited(slot, exit_code, signal);
                return true;
            }
            let exec =
                container.execs.iter().position(|exec| exec.process.as_ref().is_some_and(|process| process.pid == pid));
            if let Some(index) = exec {
                let exec = container.execs.swap_remove(index);
                let event = Event::ExecExited { id: container.id.clone(), exec_id: exec.id, exit_code };
                self.broadcast(event);
                return true;
            }
        }
        false
    }

    fn container_exited(&mut self, slot: usize, exit_code: i32, signal: Option<i32>) {
        // Looked at now: with its last process systemd takes the group away, and what the kernel counted in it.
        self.on_oom(slot as u32);
        let Some(container) = &mut self.containers[slot] else { return };
        let deadline = Instant::now() + LOG_LIMIT;
        container.ended = Some(Ended { exit_code, signal, at_nanos: stdio::now_nanos(), deadline });
        self.announce_end(slot, Some(stdio::FLUSH_LIMIT));
    }

    /// Tells of the end of a first process once its log is on disk; without a limit to wait for that, in any case.
    pub(crate) fn announce_end(&mut self, slot: usize, limit: Option<Duration>) {
        let Some(container) = &mut self.containers[slot] else { return };
        let Some(Ended { exit_code, signal, at_nanos, .. }) = container.ended else { return };
        let whole = container.stdio.drain(&self.poller, &mut self.scratch, limit.unwrap_or_default());
        self.answer_reopened(slot);
        if !whole && limit.is_some() {
            return;
        }
        let Some(container) = &mut self.containers[slot] else { return };
        container.ended = None;
        let oom_killed = container.oom.as_ref().is_some_and(|watch| watch.kills() > 0);
        let new_oom = container.oom.as_mut().is_some_and(|watch| watch.take() > 0);
        if let Some(watch) = container.oom.take() {
            self.poller.remove(&watch);
        }
        let record = ExitRecord { exit_code, signal, oom_killed, finished_at_nanos: at_nanos };
        container.first = None;
        container.exit = Some(record);
        container.status = Status::Stopped;
        let id = container.id.clone();
        // A process that outlives the first one of a container without its own PID namespace is of no use to anyone.
        let sweep = container.cgroup.clone().filter(|_| !container.private_pid_namespace && !container.removed);
        let removed = container.removed;

        if !removed
            && let Ok(content) = serde_json::to_vec(&record)
            && let Err(error) = write_atomically(&exit_record_path(&self.config.state_dir, &id), &content)
        {
            eprintln!("{}", engine::chain(&error));
        }
        if new_oom {
            self.broadcast(Event::Oom { id: id.clone() });
        }
        self.broadcast(Event::Exited { id, record });
        if removed {
            self.forget(slot);
        } else if let Some(cgroup) = sweep {
            match forked::spawn(&[], move || engine::sweep(&cgroup)) {
                Ok(running) => self.watch_helper(running, Purpose::Background),
                Err(error) => eprintln!("cannot fork: {error}"),
            }
        }
    }

    /// A disk that takes nothing for long must not fill the memory: the oldest of what is left of removed containers' logs goes first.
    fn bound_unwritten_logs(&mut self) {
        let mut bytes: usize = self.unwritten_logs.iter().map(Log::backlog_bytes).sum();
        for log in &mut self.unwritten_logs {
            if bytes <= UNWRITTEN_BYTES_MAX {
                return;
            }
            let lost = log.abandon();
            if lost == 0 {
                continue;
            }
            eprintln!("the disk does not take the log of a container that is removed: {lost} bytes of it are lost");
            bytes -= lost;
        }
    }

    /// Drops a container that has been removed.
    pub(crate) fn forget(&mut self, slot: usize) {
        if let Some(mut container) = self.containers[slot].take() {
            container.stdio.drain(&self.poller, &mut self.scratch, stdio::FLUSH_LIMIT);
            let mut reopened = container.stdio.take_reopened().into_iter();
            for to in container.reopening.drain(..) {
                let gone = || Err(std::io::Error::other("the container was removed"));
                let result = reopened.next().unwrap_or_else(gone);
                self.reply(to, result.map(|()| Reply::Done).map_err(engine::io_failed("reopen the log")), Vec::new());
            }
            self.unwritten_logs.extend(container.stdio.close(&self.poller, &mut self.scratch));
            self.bound_unwritten_logs();
            if let Some(watch) = container.oom.take() {
                self.poller.remove(&watch);
            }
            for to in container.removers {
                self.reply(to, Ok(Reply::Done), Vec::new());
            }
        }
    }
}
