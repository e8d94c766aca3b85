//! What the :10250 server asks of the agent: the [`NodeBackend`] and [`Authorizer`] traits and their plain values.

use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::List;
use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;
use tokio::sync::watch;

/// A list of pods as `/pods` shows it.
pub type PodList = List<Pod>;

/// Who is asking.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub uid: String,
    pub groups: Vec<String>,
}

/// Authenticates bearer tokens and authorizes requests to the node (`nodes/<subresource>` of this node).
#[async_trait]
pub trait Authorizer: Send + Sync + 'static {
    /// None when the token is not good. Bounded in time by the implementation.
    async fn authenticate_token(&self, token: &str) -> Option<User>;
    /// `verb` is get, create, update, patch or delete; `subresource` is proxy, log, stats, metrics, pods, healthz, configz, …
    async fn authorize(&self, user: &User, verb: &str, subresource: &str) -> bool;
}

/// A container's current log file.
#[derive(Debug, Clone)]
pub struct LogFile {
    /// `<pod logs root>/<namespace>_<pod>_<uid>/<container>/<restart>.log`; the last three parts are never followed
    /// through a symbolic link.
    pub path: PathBuf,
    /// True while the container runs; following ends after it turned false (or its sender is gone) and all is read.
    pub running: watch::Receiver<bool>,
}

/// A container named by a request path.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ContainerRef {
    pub namespace: String,
    pub pod: String,
    /// Present when the path names it.
    pub pod_uid: Option<String>,
    pub container: String,
}

/// exec, attach and run.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ExecRequest {
    pub target: ContainerRef,
    /// Empty for attach.
    pub command: Vec<String>,
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub tty: bool,
}

/// port-forward. `target.container` is empty.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PortForwardRequest {
    pub target: ContainerRef,
    pub ports: Vec<u16>,
}

/// Which metrics page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetricsPage {
    Agent,
    Resource,
    CAdvisor,
    Probes,
}

/// Refusals and failures, each with the message the client sees.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NodeError {
    #[error("{0}")]
    NotFound(String),
    #[error("{0}")]
    BadRequest(String),
    #[error("{0}")]
    Internal(String),
    #[error("{0}")]
    Unavailable(String),
    /// The feature is off or not there.
    #[error("{0}")]
    NotImplemented(String),
}

/// The agent's side of the node API. Calls must be bounded in time by the implementation.
#[async_trait]
pub trait NodeBackend: Send + Sync + 'static {
    /// The pods bound to this node, with their status.
    async fn pods(&self) -> PodList;
    /// The pods that have something running, as the runtime sees them.
    async fn running_pods(&self) -> PodList;
    async fn container_log_path(
        &self,
        namespace: &str,
        pod: &str,
        container: &str,
        previous: bool,
    ) -> Result<LogFile, NodeError>;
    /// The runtime's streaming URL (`http://127.0.0.1:…`).
    async fn exec_url(&self, request: ExecRequest) -> Result<String, NodeError>;
    async fn attach_url(&self, request: ExecRequest) -> Result<String, NodeError>;
    async fn port_forward_url(&self, request: PortForwardRequest) -> Result<String, NodeError>;
    /// Runs a command to its end; gives its output.
    async fn run_in_container(&self, request: ExecRequest) -> Result<Vec<u8>, NodeError>;
    async fn stats_summary(&self) -> Value;
    /// Prometheus text.
    async fn metrics(&self, page: MetricsPage) -> String;
    async fn configz(&self) -> Value;
    /// Err says what is wrong; `/healthz` shows it.
    async fn healthy(&self) -> Result<(), String> {
        Ok(())
    }
    /// Writes a checkpoint of a running container within `timeout`, or the runtime's own limit where that is zero. Gives the paths
    /// of the archives made.
    async fn checkpoint(&self, target: ContainerRef, timeout: Duration) -> Result<Vec<String>, NodeError>;
}
