//! Writes to a disk that may be slow, without the shim's loop waiting for it: in a thread that is there only while there
//! is something to write. Knows nothing of lines.
//!
//! ```text
//! loop: tail ──▶ queue ──▶ job ──▶ thread: write or reopen ──▶ done (eventfd) ──▶ loop: next job
//! ```
//!
//! The shim forks, and its children allocate and lock: so between its start and its end, while the loop can fork, the thread
//! neither allocates nor frees, and takes no lock but its own. Its start and end, which do, are waited for by the loop.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::poll::{Poller, Token};

/// What one log may have in memory. At 100 MB/s it bridges the longest pause that the kernel makes a writer take for
/// others' sake, a fifth of a second, by half; what is more waits in the container.
pub(crate) const BACKLOG_BYTES_MAX: usize = 8 << 20;
/// One write.
const JOB_BYTES_MAX: usize = 256 * 1024;
const STACK_BYTES: usize = 64 * 1024;
const REOPENINGS_MAX: usize = 16;

/// Where the bytes go. Called in the thread: allocates and frees nothing.
pub(crate) trait Sink: Send + 'static {
    fn write(&mut self, bytes: &[u8]) -> nix::Result<()>;
    /// On failure the old place stays in use.
    fn reopen(&mut self) -> nix::Result<()>;
}

#[derive(Debug)]
enum Job {
    Write(Vec<u8>),
    Reopen,
}

impl Job {
    fn bytes(&self) -> usize {
        if let Job::Write(bytes) = self { bytes.len() } else { 0 }
    }
}

/// What came of a job.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Done {
    Written(nix::Result<()>),
    Reopened(nix::Result<()>),
}

/// The loop's side.
pub(crate) struct Writer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    queue: VecDeque<Job>,
    queued_bytes: usize,
    /// Bytes of the job that the thread has.
    under_way: Option<usize>,
    spare: Vec<u8>,
}

struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    done: EventFd,
}

#[derive(Default)]
struct State {
    sink: Option<Box<dyn Sink>>,
    job: Option<Job>,
    finished: Option<(Job, nix::Result<()>)>,
    started: bool,
    stop: bool,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer").field("backlog_bytes", &self.backlog_bytes()).finish_non_exhaustive()
    }
}

impl Shared {
    /// A panic elsewhere leaves nothing half done here.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Writer {
    pub(crate) fn new(sink: impl Sink) -> io::Result<Writer> {
        let done = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let state = State { sink: Some(Box::new(sink)), ..State::default() };
        Ok(Writer {
            shared: Arc::new(Shared { state: Mutex::new(state), wake: Condvar::new(), done }),
            thread: None,
            queue: VecDeque::new(),
            queued_bytes: 0,
            under_way: None,
            spare: Vec::new(),
        })
    }

    /// Where to put what is to be written next; [`Writer::go_on`] then has it written.
    pub(crate) fn fill(&mut self, fill: impl FnOnce(&mut Vec<u8>)) {
        if !matches!(self.queue.back(), Some(Job::Write(bytes)) if bytes.len() < JOB_BYTES_MAX) {
            self.queue.push_back(Job::Write(std::mem::take(&mut self.spare)));
        }
        let Some(Job::Write(tail)) = self.queue.back_mut() else { return };
        let before = tail.len();
        fill(tail);
        self.queued_bytes += tail.len() - before;
        if tail.is_empty()
            && let Some(Job::Write(unused)) = self.queue.pop_back()
        {
            self.spare = unused;
        }
    }

    /// Opens the place anew after all that was filled in before.
    pub(crate) fn reopen(&mut self) -> io::Result<()> {
        if self.queue.iter().filter(|job| matches!(job, Job::Reopen)).count() >= REOPENINGS_MAX {
            return Err(io::Error::from(Errno::EBUSY));
        }
        self.queue.push_back(Job::Reopen);
        Ok(())
    }

    /// What is in memory yet.
    pub(crate) fn backlog_bytes(&self) -> usize {
        self.queued_bytes + self.under_way.unwrap_or(0)
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.under_way.is_none()
    }

    /// Takes what is done, and has the next job done. Events come as `token`.
    pub(crate) fn go_on(&mut self, poller: &Poller, token: Token) -> Vec<Done> {
        let mut done = Vec::new();
        loop {
            done.extend(self.take_finished());
            if self.under_way.is_some() {
                return done;
            }
            let Some(job) = self.queue.pop_front() else { return done };
            let bytes = job.bytes();
            self.queued_bytes -= bytes;
            self.under_way = Some(bytes);
            if let Err(error) = self.start(poller, token) {
                // No thread to be had: better the loop waits than a line is lost.
                eprintln!("cannot start a thread for a log: {error}");
                let mut state = self.shared.lock();
                let Some(mut sink) = state.sink.take() else { return done };
                let result = perform(sink.as_mut(), &job);
                state.sink = Some(sink);
                state.finished = Some((job, result));
                continue;
            }
            self.shared.lock().job = Some(job);
            self.shared.wake.notify_all();
        }
    }

    fn take_finished(&mut self) -> Option<Done> {
        let _ = self.shared.done.read();
        let (job, result) = self.shared.lock().finished.take()?;
        self.under_way = None;
        Some(match job {
            Job::Reopen => Done::Reopened(result),
            Job::Write(mut bytes) => {
                bytes.clear();
                self.spare = bytes;
                Done::Written(result)
            }
        })
    }

    /// The thread, if there is none, and its events.
    fn start(&mut self, poller: &Poller, token: Token) -> io::Result<()> {
        if self.thread.is_some() {
            return Ok(());
        }
        poller.set(self.shared.done.as_fd(), token, EpollFlags::EPOLLIN)?;
        let shared = self.shared.clone();
        let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn(move || work(&shared));
        match thread {
            Ok(thread) => self.thread = Some(thread),
            Err(error) => {
                poller.remove(&self.shared.done);
                return Err(error);
            }
        }
        let mut state = self.shared.lock();
        while !state.started {
            state = self.shared.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }

    /// From now on events come as another token.
    pub(crate) fn watch_as(&self, poller: &Poller, token: Token) {
        if self.thread.is_some() {
            let _ = poller.set(self.shared.done.as_fd(), token, EpollFlags::EPOLLIN);
        }
    }

    /// Waits until everything is written; false if it takes longer than `limit`.
    pub(crate) fn flush(&mut self, poller: &Poller, token: Token, limit: Duration) -> (bool, Vec<Done>) {
        let deadline = Instant::now() + limit;
        let mut done = self.go_on(poller, token);
        while !self.is_idle() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return (false, done);
            }
            let state = self.shared.lock();
            let waiting = self.shared.wake.wait_timeout_while(state, left, |state| state.finished.is_none());
            drop(waiting);
            done.extend(self.go_on(poller, token));
        }
        (true, done)
    }

    /// Drops what no job has yet, and says how many bytes that was.
    pub(crate) fn abandon(&mut self) -> usize {
        self.queue = VecDeque::new();
        std::mem::take(&mut self.queued_bytes)
    }

    /// Gives the thread and all memory back, unless there is something to write.
    pub(crate) fn rest(&mut self, poller: &Poller) {
        if !self.is_idle() {
            return;
        }
        (self.queue, self.spare) = (VecDeque::new(), Vec::new());
        if let Some(thread) = self.thread.take() {
            poller.remove(&self.shared.done);
            self.shared.lock().stop = true;
            self.shared.wake.notify_all();
            let _ = thread.join();
            let mut state = self.shared.lock();
            (state.stop, state.started) = (false, false);
        }
    }
}

fn perform(sink: &mut dyn Sink, job: &Job) -> nix::Result<()> {
    match job {
        Job::Write(bytes) => sink.write(bytes),
        Job::Reopen => sink.reopen(),
    }
}

/// The thread.
fn work(shared: &Shared) {
    let mut state = shared.lock();
    state.started = true;
    shared.wake.notify_all();
    while !state.stop {
        if state.job.is_none() {
            state = shared.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
            continue;
        }
        // Both are there: the loop gives a job only when the last one is finished.
        let (Some(job), Some(mut sink)) = (state.job.take(), state.sink.take()) else { continue };
        drop(state);
        let result = perform(sink.as_mut(), &job);
        state = shared.lock();
        state.sink = Some(sink);
        state.finished = Some((job, result));
        let _ = shared.done.write(1);
        shared.wake.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const TOKEN: Token = Token::Log(0);
    const PATIENCE: Duration = Duration::from_secs(20);

    /// Takes a job only when it is let, and tells what came.
    struct Gate {
        open: mpsc::Receiver<()>,
        came: mpsc::Sender<String>,
    }

    impl Sink for Gate {
        fn write(&mut self, bytes: &[u8]) -> nix::Result<()> {
            self.open.recv().map_err(|_| Errno::EIO)?;
            let _ = self.came.send(String::from_utf8_lossy(bytes).into_owned());
            Ok(())
        }

        fn reopen(&mut self) -> nix::Result<()> {
            self.open.recv().map_err(|_| Errno::EIO)?;
            let _ = self.came.send("reopened".to_owned());
            Ok(())
        }
    }

    fn gate() -> (Writer, mpsc::Sender<()>, mpsc::Receiver<String>, Poller) {
        let (open, opened) = mpsc::channel();
        let (came, coming) = mpsc::channel();
        (Writer::new(Gate { open: opened, came }).unwrap(), open, coming, Poller::new().unwrap())
    }

    #[test]
    fn what_is_abandoned_is_never_written_and_what_is_under_way_is() {
        let (mut writer, open, coming, poller) = gate();
        writer.fill(|out| out.extend_from_slice(b"one"));
        writer.go_on(&poller, TOKEN);
        writer.fill(|out| out.extend_from_slice(b"two and more"));
        assert_eq!((writer.abandon(), writer.backlog_bytes()), (12, 3));
        open.send(()).unwrap();
        assert!(writer.flush(&poller, TOKEN, PATIENCE).0);
        writer.rest(&poller);
        assert_eq!(coming.try_iter().collect::<Vec<_>>(), ["one"]);
    }

    #[test]
    fn nothing_waits_for_a_slow_disk_and_the_order_is_kept() {
        let (mut writer, open, coming, poller) = gate();
        writer.fill(|out| out.extend_from_slice(b"one"));
        assert!(writer.go_on(&poller, TOKEN).is_empty());
        writer.fill(|out| out.extend_from_slice(b"two"));
        writer.fill(|out| out.extend_from_slice(b"+"));
        writer.reopen().unwrap();
        writer.fill(|out| out.extend_from_slice(b"three"));
        assert!(writer.go_on(&poller, TOKEN).is_empty());
        assert_eq!((writer.backlog_bytes(), writer.is_idle()), (12, false));
        assert!(!writer.flush(&poller, TOKEN, Duration::from_millis(1)).0);
        // At rest it keeps what is under way.
        writer.rest(&poller);
        for _ in 0..4 {
            open.send(()).unwrap();
        }
        let (flushed, done) = writer.flush(&poller, TOKEN, PATIENCE);
        assert!(flushed);
        assert_eq!(done, [Done::Written(Ok(())), Done::Written(Ok(())), Done::Reopened(Ok(())), Done::Written(Ok(()))]);
        assert_eq!(coming.try_iter().collect::<Vec<_>>(), ["one", "two+", "reopened", "three"]);
    }

    #[test]
    fn the_end_of_a_job_wakes_the_loop_and_a_rested_writer_writes_again() {
        let (mut writer, open, coming, poller) = gate();
        let mut ready = Vec::new();
        for round in ["a", "b"] {
            writer.fill(|out| out.extend_from_slice(round.as_bytes()));
            writer.go_on(&poller, TOKEN);
            poller.wait(Some(Duration::ZERO), &mut ready).unwrap();
            assert!(ready.is_empty());
            open.send(()).unwrap();
            poller.wait(Some(PATIENCE), &mut ready).unwrap();
            assert_eq!(ready.iter().map(|event| event.token).collect::<Vec<_>>(), [TOKEN]);
            assert_eq!(writer.go_on(&poller, TOKEN), [Done::Written(Ok(()))]);
            assert_eq!(coming.recv().unwrap(), round);
            writer.rest(&poller);
            assert!(writer.thread.is_none());
        }
    }

    #[test]
    fn a_place_that_fails_is_told_and_the_rest_is_tried() {
        let (mut writer, open, _, poller) = gate();
        drop(open);
        writer.fill(|out| out.push(b'x'));
        writer.reopen().unwrap();
        let (flushed, done) = writer.flush(&poller, TOKEN, PATIENCE);
        assert!(flushed);
        assert_eq!(done, [Done::Written(Err(Errno::EIO)), Done::Reopened(Err(Errno::EIO))]);
        for _ in 0..REOPENINGS_MAX {
            writer.reopen().unwrap();
        }
        assert!(writer.reopen().is_err());
    }
}
