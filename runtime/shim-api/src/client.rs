//! The daemon's end of a shim's socket: requests matched with replies, events broadcast.
//!
//! One task per connection reads; whoever calls writes (a packet is sent whole or not at all, so writers need no
//! queue). When the connection ends every waiting call fails with [`ShimError::Disconnected`].

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use nix::sys::stat::Mode;
use oci_spec::runtime::Process;
use tokio::io::unix::AsyncFd;
use tokio::sync::{broadcast, oneshot};

use crate::frame::{self, Frame, FrameError};
use crate::spawn::{self, SpawnOptions, watch};
use crate::wire::{
    CreateReply, CreateRequest, Event, ExecBody, ForwardRule, FromShim, Outcome, Reply, Request, RequestFrame,
    ShimState,
};
use crate::{ShimError, ShimRecord, read_shim_record};

const EVENTS_MAX: usize = 1024;
const QUICK: Duration = Duration::from_secs(15);
/// Creating and deleting run a helper process, which the shim itself gives up on a little earlier.
const SLOW: Duration = Duration::from_secs(150);

/// A connection to one pod's shim. Cheap to clone; the connection ends with the last clone.
#[derive(Clone, Debug)]
pub struct Shim {
    inner: Arc<Inner>,
    reader: Arc<ReaderTask>,
}

#[derive(Debug)]
struct ReaderTask(tokio::task::JoinHandle<()>);

impl Drop for ReaderTask {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[derive(Debug)]
struct Inner {
    socket: AsyncFd<OwnedFd>,
    record: ShimRecord,
    state_dir: PathBuf,
    next_id: AtomicU64,
    waiting: Mutex<Waiting>,
    events: broadcast::Sender<Event>,
}

type ReplySender = oneshot::Sender<(Outcome, Vec<OwnedFd>)>;

#[derive(Debug, Default)]
struct Waiting {
    replies: HashMap<u64, ReplySender>,
    closed: bool,
}

/// What to run in a container.
#[derive(Debug, Clone)]
pub struct ExecRequest {
    pub container_id: String,
    /// Unique among the container's execs under way.
    pub exec_id: String,
    /// The whole process: arguments, environment, user, capabilities, limits. The container's seccomp filter and
    /// its namespaces, cgroup and root come from its bundle.
    pub process: Process,
    pub tty: bool,
    pub stdin: bool,
}

/// A started exec. The descriptors are the process's own pipes (or its terminal), all close-on-exec and blocking.
#[derive(Debug)]
pub struct ExecReply {
    pub pid: i32,
    pub stdin: Option<OwnedFd>,
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
    pub terminal: Option<OwnedFd>,
}

/// A joined container. Output that an attached client does not read in time is lost to it, never to the log.
#[derive(Debug)]
pub struct AttachReply {
    pub stdin: Option<OwnedFd>,
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
    /// The container has a terminal: standard error is part of the output.
    pub terminal: bool,
}

impl Shim {
    /// Starts a shim for a pod and connects to it.
    pub async fn spawn(options: SpawnOptions) -> Result<Shim, ShimError> {
        spawn::launch(&options).await?;
        Shim::connect(&options.state_dir).await
    }

    /// Connects to the shim that runs for this state directory. A socket or record left by a shim that is gone
    /// gives [`ShimError::NotRunning`].
    pub async fn connect(state_dir: &Path) -> Result<Shim, ShimError> {
        let not_running = || ShimError::NotRunning { state_dir: state_dir.into() };
        let record = read_shim_record(state_dir).map_err(ShimError::Record)?.ok_or_else(not_running)?;
        if !record.is_alive() {
            return Err(not_running());
        }
        let socket = match open_socket(state_dir) {
            Ok(socket) => socket,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                return Err(not_running());
            }
            Err(source) => return Err(ShimError::Io { operation: "connect to the shim", source }),
        };
        let socket = watch(socket).map_err(|source| ShimError::Io { operation: "watch the shim's socket", source })?;
        let inner = Arc::new(Inner {
            socket,
            record,
            state_dir: state_dir.into(),
            next_id: AtomicU64::new(1),
            waiting: Mutex::default(),
            events: broadcast::channel(EVENTS_MAX).0,
        });
        let reader = Arc::new(ReaderTask(tokio::spawn(read_frames(inner.clone()))));
        Ok(Shim { inner, reader })
    }

    /// Who the shim is.
    pub fn record(&self) -> &ShimRecord {
        &self.inner.record
    }

    /// The state directory it serves.
    pub fn state_dir(&self) -> &Path {
        &self.inner.state_dir
    }

    /// Whether the connection still stands. False means: [`Shim::connect`] again, or the shim is gone.
    pub fn is_connected(&self) -> bool {
        !self.inner.waiting().closed && !self.reader.0.is_finished()
    }

    /// Events from now on. What happened before is in [`Shim::state`]: subscribe first, then read the state.
    pub fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.inner.events.subscribe()
    }

    /// Makes a container; its program waits for [`Shim::start`].
    pub async fn create(&self, request: CreateRequest) -> Result<CreateReply, ShimError> {
        match self.call("create", Request::Create(request), SLOW).await? {
            (Reply::Created(reply), _) => Ok(reply),
            _ => Err(ShimError::Unexpected { operation: "create" }),
        }
    }

    /// Executes a created container's program.
    pub async fn start(&self, container_id: &str) -> Result<(), ShimError> {
        self.done("start", Request::Start { container_id: container_id.into() }, SLOW).await
    }

    /// Sends a signal to the first process, or to all of the container's processes. `not_found` when it has ended.
    pub async fn signal(&self, container_id: &str, signal: i32, all: bool) -> Result<(), ShimError> {
        self.done("signal", Request::Signal { container_id: container_id.into(), signal, all }, QUICK).await
    }

    /// Removes a container, killing it if need be. Succeeds when there is none.
    pub async fn delete(&self, container_id: &str) -> Result<(), ShimError> {
        self.done("delete", Request::Delete { container_id: container_id.into() }, SLOW).await
    }

    /// Freezes a container.
    pub async fn pause(&self, container_id: &str) -> Result<(), ShimError> {
        self.done("pause", Request::Pause { container_id: container_id.into() }, QUICK).await
    }

    /// Thaws a container.
    pub async fn resume(&self, container_id: &str) -> Result<(), ShimError> {
        self.done("resume", Request::Resume { container_id: container_id.into() }, QUICK).await
    }

    /// Runs a process in a running container. Its end is announced by [`Event::ExecExited`]; subscribe before.
    pub async fn exec(&self, request: ExecRequest) -> Result<ExecReply, ShimError> {
        let ExecRequest { container_id, exec_id, process, tty, stdin } = request;
        let process = serde_json::value::to_raw_value(&process).map_err(ShimError::Encode)?;
        let body = ExecBody { container_id, exec_id, process, tty, stdin };
        let unexpected = || ShimError::Unexpected { operation: "exec" };
        let (Reply::Execed { pid }, fds) = self.call("exec", Request::Exec(body), SLOW).await? else {
            return Err(unexpected());
        };
        let mut reply = ExecReply { pid, stdin: None, stdout: None, stderr: None, terminal: None };
        let mut fds = fds.into_iter();
        if tty {
            reply.terminal = Some(fds.next().ok_or_else(unexpected)?);
        } else {
            if stdin {
                reply.stdin = Some(fds.next().ok_or_else(unexpected)?);
            }
            reply.stdout = Some(fds.next().ok_or_else(unexpected)?);
            reply.stderr = Some(fds.next().ok_or_else(unexpected)?);
        }
        Ok(reply)
    }

    /// Signals an exec's process. `not_found` when it has ended.
    pub async fn exec_signal(&self, container_id: &str, exec_id: &str, signal: i32) -> Result<(), ShimError> {
        let request = Request::ExecSignal { container_id: container_id.into(), exec_id: exec_id.into(), signal };
        self.done("exec signal", request, QUICK).await
    }

    /// Joins a container's standard input and output, from now on. The input given back counts as a client's: when it
    /// is closed, a container with `stdin_once` sees the end of its own. Who only listens calls
    /// [`Shim::attach_output`].
    pub async fn attach(&self, container_id: &str) -> Result<AttachReply, ShimError> {
        self.join(container_id, true).await
    }

    /// Joins a container's output, from now on.
    pub async fn attach_output(&self, container_id: &str) -> Result<AttachReply, ShimError> {
        self.join(container_id, false).await
    }

    async fn join(&self, container_id: &str, stdin: bool) -> Result<AttachReply, ShimError> {
        let unexpected = || ShimError::Unexpected { operation: "attach" };
        let request = Request::Attach { container_id: container_id.into(), stdin };
        let (Reply::Attached { stdin, terminal }, fds) = self.call("attach", request, QUICK).await? else {
            return Err(unexpected());
        };
        let mut fds = fds.into_iter();
        let mut reply = AttachReply { stdin: None, stdout: None, stderr: None, terminal };
        if stdin {
            reply.stdin = Some(fds.next().ok_or_else(unexpected)?);
        }
        reply.stdout = Some(fds.next().ok_or_else(unexpected)?);
        if !terminal {
            reply.stderr = Some(fds.next().ok_or_else(unexpected)?);
        }
        Ok(reply)
    }

    /// Sets the size, in characters, of a container's terminal or of an exec's.
    pub async fn resize(
        &self,
        container_id: &str,
        exec_id: Option<&str>,
        width: u16,
        height: u16,
    ) -> Result<(), ShimError> {
        let exec_id = exec_id.map(str::to_owned);
        self.done("resize", Request::Resize { container_id: container_id.into(), exec_id, width, height }, QUICK).await
    }

    /// Ends a container's standard input once what was written has been delivered.
    pub async fn close_stdin(&self, container_id: &str) -> Result<(), ShimError> {
        self.done("close stdin", Request::CloseStdin { container_id: container_id.into() }, QUICK).await
    }

    /// Opens the log by its path again. When this returns every later line is in the new file.
    pub async fn reopen_log(&self, container_id: &str) -> Result<(), ShimError> {
        self.done("reopen log", Request::ReopenLog { container_id: container_id.into() }, QUICK).await
    }

    /// Leads loopback ports to the pod until the shim ends. Gives what could not be done, such as a port that is taken.
    pub async fn forward(&self, rules: Vec<ForwardRule>) -> Result<Vec<String>, ShimError> {
        match self.call("forward", Request::Forward { rules }, QUICK).await? {
            (Reply::Forwarding { failures }, _) => Ok(failures),
            _ => Err(ShimError::Unexpected { operation: "forward" }),
        }
    }

    /// What the shim knows now.
    pub async fn state(&self) -> Result<ShimState, ShimError> {
        match self.call("state", Request::State, QUICK).await? {
            (Reply::State(state), _) => Ok(state),
            _ => Err(ShimError::Unexpected { operation: "state" }),
        }
    }

    /// Kills and deletes everything in the pod and ends the shim. Returns when it has gone.
    pub async fn shutdown(&self) -> Result<(), ShimError> {
        match self.done("shutdown", Request::Shutdown, SLOW).await {
            Err(ShimError::Disconnected) if !self.inner.record.is_alive() => return Ok(()),
            other => other?,
        }
        // Its answer is the last that it does. On a busy machine its process may be seen for a while after that.
        let deadline = Instant::now() + QUICK;
        let mut pause = Duration::from_micros(200);
        while self.inner.record.is_alive() {
            if Instant::now() > deadline {
                return Err(ShimError::TimedOut { operation: "shutdown", limit: QUICK });
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(20));
        }
        Ok(())
    }

    async fn done(&self, operation: &'static str, request: Request, limit: Duration) -> Result<(), ShimError> {
        match self.call(operation, request, limit).await? {
            (Reply::Done, _) => Ok(()),
            _ => Err(ShimError::Unexpected { operation }),
        }
    }

    async fn call(
        &self,
        operation: &'static str,
        request: Request,
        limit: Duration,
    ) -> Result<(Reply, Vec<OwnedFd>), ShimError> {
        let id = self.inner.next_id.fetch_add(1, Ordering::Relaxed);
        let body = serde_json::to_vec(&RequestFrame { id, request }).map_err(ShimError::Encode)?;
        let (sender, receiver) = oneshot::channel();
        {
            let mut waiting = self.inner.waiting();
            if waiting.closed {
                return Err(ShimError::Disconnected);
            }
            waiting.replies.insert(id, sender);
        }
        let _forget = Forget { inner: &self.inner, id };
        let exchange = async {
            self.inner.send(&body).await?;
            receiver.await.map_err(|_| ShimError::Disconnected)
        };
        let (outcome, fds) =
            tokio::time::timeout(limit, exchange).await.map_err(|_| ShimError::TimedOut { operation, limit })??;
        match outcome {
            Outcome::Ok(reply) => Ok((reply, fds)),
            Outcome::Error(remote) => Err(ShimError::Refused(remote)),
        }
    }
}

/// Removes a waiting entry however the call ends, so that a cancelled call leaves nothing behind.
struct Forget<'a> {
    inner: &'a Inner,
    id: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.inner.waiting().replies.remove(&self.id);
    }
}

impl Inner {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn send(&self, body: &[u8]) -> Result<(), ShimError> {
        loop {
            let mut guard = self
                .socket
                .writable()
                .await
                .map_err(|source| ShimError::Io { operation: "wait for the shim's socket", source })?;
            match frame::send(self.socket.get_ref().as_fd(), body, &[]) {
                Ok(()) => return Ok(()),
                Err(FrameError::WouldBlock) => guard.clear_ready(),
                Err(FrameError::Closed) => return Err(ShimError::Disconnected),
                Err(error) => return Err(ShimError::Frame(error)),
            }
        }
    }

    async fn receive(&self, scratch: &mut Vec<u8>) -> Result<Frame, FrameError> {
        loop {
            let mut guard = self
                .socket
                .readable()
                .await
                .map_err(|source| FrameError::Io { operation: "wait for the shim's socket", source })?;
            match frame::receive(self.socket.get_ref().as_fd(), scratch) {
                Err(FrameError::WouldBlock) => guard.clear_ready(),
                other => return other,
            }
        }
    }
}

async fn read_frames(inner: Arc<Inner>) {
    let mut scratch = Vec::new();
    loop {
        let frame = match inner.receive(&mut scratch).await {
            Ok(frame) => frame,
            Err(FrameError::Closed) => break,
            Err(error) => {
                tracing::warn!(sandbox.id = %inner.record.sandbox_id, %error, "shim connection broke");
                break;
            }
        };
        match serde_json::from_slice::<FromShim>(&frame.body) {
            Ok(FromShim::Reply(reply)) => {
                let waiting = inner.waiting().replies.remove(&reply.id);
                if let Some(sender) = waiting {
                    let _ = sender.send((reply.outcome, frame.fds));
                }
            }
            // No subscriber is not a fault: the state tells it all later.
            Ok(FromShim::Event(event)) => drop(inner.events.send(event)),
            Err(error) => {
                tracing::warn!(sandbox.id = %inner.record.sandbox_id, %error, "shim sent an unreadable message");
                break;
            }
        }
    }
    let abandoned = {
        let mut waiting = inner.waiting();
        waiting.closed = true;
        std::mem::take(&mut waiting.replies)
    };
    drop(abandoned);
    let _ = inner.events.send(Event::Disconnected);
}

/// Connects through a directory descriptor: a socket address holds 107 bytes, a state directory's path may be longer.
fn open_socket(state_dir: &Path) -> io::Result<OwnedFd> {
    let dir = nix::fcntl::open(state_dir, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}/shim.sock", dir.as_raw_fd()));
    connect(socket.as_raw_fd(), &UnixAddr::new(path.as_os_str().as_bytes())?)?;
    Ok(socket)
}
