//! The messages: requests, replies and events, as they stand on the wire. No I/O here.
//!
//! Enums are externally tagged throughout: serde then never buffers a message, which keeps the shim small and lets
//! [`ExecBody::process`] pass through unparsed.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::ExitRecord;

/// A request with the number its reply will carry.
#[derive(Debug, Serialize, Deserialize)]
pub struct RequestFrame {
    /// Chosen by the client, unique among its requests under way.
    pub id: u64,
    /// What is asked.
    pub request: Request,
}

/// Everything a client can ask of a shim.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Make a container up to the point where its program would be executed.
    Create(CreateRequest),
    /// Execute a created container's program.
    Start { container_id: String },
    /// Signal a container's first process, or all of its processes.
    Signal { container_id: String, signal: i32, all: bool },
    /// Forget a container; kills it first if it still runs. Succeeds for one that does not exist.
    Delete { container_id: String },
    /// Freeze a running container.
    Pause { container_id: String },
    /// Thaw a paused container.
    Resume { container_id: String },
    /// Run one more process in a running container. Descriptors come with the reply.
    Exec(ExecBody),
    /// Signal an exec's process.
    ExecSignal { container_id: String, exec_id: String, signal: i32 },
    /// Join a container's stdio. Descriptors come with the reply.
    Attach { container_id: String, stdin: bool },
    /// Set the terminal size of a container (`exec_id` absent) or an exec.
    Resize { container_id: String, exec_id: Option<String>, width: u16, height: u16 },
    /// End a container's standard input.
    CloseStdin { container_id: String },
    /// Open the log file anew by its path, after a rotation moved it.
    ReopenLog { container_id: String },
    /// Lead ports on loopback addresses of the host to the pod, in addition to those that are led already.
    Forward { rules: Vec<ForwardRule> },
    /// List containers.
    State,
    /// Kill what still runs, delete every container and exit.
    Shutdown,
}

/// What [`Request::Create`] needs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateRequest {
    /// Names the container; letters, digits, `_`, `.` and `-`.
    pub container_id: String,
    /// Directory with `config.json` and `rootfs`; must stay for the container's life.
    pub bundle: PathBuf,
    /// Where the CRI log goes; without one the output is only for attached clients.
    pub log_path: Option<PathBuf>,
    /// The container has a terminal.
    pub tty: bool,
    /// Keep standard input open for attached clients.
    pub stdin: bool,
    /// Close standard input when the first attached client's input ends.
    pub stdin_once: bool,
    /// An OCI runtime binary (runc, crun) in place of the built-in one.
    pub oci_runtime: Option<PathBuf>,
}

/// What [`Request::Exec`] needs on the wire; `process` stays raw so that the shim itself never parses it.
#[derive(Debug, Serialize, Deserialize)]
pub struct ExecBody {
    pub container_id: String,
    pub exec_id: String,
    /// An OCI runtime-spec `process` object.
    pub process: Box<serde_json::value::RawValue>,
    pub tty: bool,
    pub stdin: bool,
}

/// The reply to a request.
#[derive(Debug, Serialize, Deserialize)]
pub struct ReplyFrame {
    pub id: u64,
    pub outcome: Outcome,
}

/// Success or failure of one request.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Ok(Reply),
    Error(RemoteError),
}

/// The data of a successful reply.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    Done,
    Created(CreateReply),
    /// Descriptors in order: with a terminal, the terminal; else standard input (if asked for), output, error.
    Execed {
        pid: i32,
    },
    /// Descriptors in order: standard input (if `stdin`), output, then error unless `terminal`.
    Attached {
        stdin: bool,
        terminal: bool,
    },
    State(ShimState),
    /// What could not be forwarded; the other rules are in force.
    Forwarding {
        failures: Vec<String>,
    },
}

/// A port of the host's that leads to one of the pod's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardRule {
    pub transport: Transport,
    /// Where callers come in; loopback addresses only.
    pub listen: SocketAddr,
    /// Where they are led.
    pub target: SocketAddr,
}

/// What a forwarded port speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    Tcp,
    Udp,
}

/// Reply to a create.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateReply {
    /// The first process, in the shim's PID namespace.
    pub pid: i32,
    /// It was made out of sight of other pods' mounts. A shim of an earlier version does not say.
    #[serde(default)]
    pub secluded: bool,
}

/// What a shim knows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShimState {
    pub containers: Vec<ContainerState>,
}

/// One container as its shim sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerState {
    pub id: String,
    /// The first process; 0 once it has been reaped.
    pub pid: i32,
    pub status: ContainerStatus,
    /// Present when stopped.
    pub exit: Option<ExitRecord>,
}

/// Where a container is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContainerStatus {
    Created,
    Running,
    Paused,
    Stopped,
}

/// What a shim pushes to every client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// A container's first process ended; the record is already on disk.
    Exited { id: String, record: ExitRecord },
    /// An exec's process ended. `exit_code` is 128 + signal for one that was killed.
    ExecExited { id: String, exec_id: String, exit_code: i32 },
    /// The kernel killed a process of the container for want of memory.
    Oom { id: String },
    /// The connection ended: made by the client itself, and always the last event.
    Disconnected,
}

/// What comes from a shim: a reply or an event.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromShim {
    Event(Event),
    Reply(ReplyFrame),
}

/// A failure the shim reports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct RemoteError {
    pub kind: ErrorKind,
    /// For people; the wording of an exec failure is the one users of other runtimes know.
    pub message: String,
}

impl RemoteError {
    /// A failure of that kind with a message for people.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

/// What kind of failure, for code to branch on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// No such container or exec.
    NotFound,
    /// The id is taken.
    AlreadyExists,
    /// The container is not in a state that allows it, or another operation on it is under way.
    InvalidState,
    /// The request makes no sense.
    Invalid,
    /// The program to run does not exist (exit code 127 by custom).
    ExecutableNotFound,
    /// The program to run may not or cannot be executed (exit code 126 by custom).
    NotExecutable,
    /// The helper process took too long and was killed.
    TimedOut,
    /// The helper process died without a report.
    HelperDied,
    /// The container engine or the kernel refused.
    Engine,
}
