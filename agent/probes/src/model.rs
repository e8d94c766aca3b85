//! The plain values that pass between the agent and its probes.

use std::net::IpAddr;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Container;

/// Which of a container's three probes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    Startup,
    Readiness,
    Liveness,
}

impl Kind {
    /// The word in events: `Startup probe failed: …`.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Startup => "Startup",
            Kind::Readiness => "Readiness",
            Kind::Liveness => "Liveness",
        }
    }
}

/// A probe's standing after thresholds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    Success,
    Failure,
    /// Nothing known yet.
    Unknown,
}

/// What a probe tells the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Update {
    pub pod_uid: String,
    pub container_name: String,
    pub container_id: String,
    pub kind: Kind,
    /// The thresholded outcome as it stands now.
    pub outcome: Outcome,
    /// Whether `outcome` differs from what was told before (or is the first one). False when only `probe_failed` is news.
    pub changed: bool,
    /// What the last attempt said.
    pub message: String,
    /// Some on each failed attempt: the text of the Unhealthy event, `Readiness probe failed: …`.
    pub probe_failed: Option<String>,
    /// Some on each attempt that succeeded with a warning: the text of the ProbeWarning event.
    pub probe_warned: Option<String>,
}

/// Outcomes carried over from before the agent restarted, so that nothing flips.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct InitialOutcomes {
    pub startup: Option<Outcome>,
    pub readiness: Option<Outcome>,
    pub liveness: Option<Outcome>,
}

/// A running container with its probes.
#[derive(Debug, Clone)]
pub struct Target {
    pub pod_uid: String,
    /// Where httpGet, tcpSocket and grpc go unless they name a host: the pod's address (the node's for host network).
    pub pod_ip: IpAddr,
    /// The probes and named ports are read from here.
    pub container: Container,
    /// The runtime's id, without a scheme.
    pub container_id: String,
    pub started_at: Timestamp,
    pub initial: InitialOutcomes,
}

/// Runs a command in a container for exec probes.
#[async_trait]
pub trait ExecProbe: Send + Sync {
    /// Exit code and the command's output (stdout and stderr together). Err when it could not be run or ran out of time.
    async fn exec(&self, container_id: &str, command: &[String], timeout: Duration) -> Result<(i32, Vec<u8>), String>;
}
