//! The node agent: a kubelet.
//!
//! Owns everything that happens to pods on one node: it watches the pods bound to the node, drives a container runtime
//! through CRI to make them real, reports their status, keeps the node object and its lease fresh, and answers on :10250.
//! It meets the runtime, the network and the API only through their published protocols.
//!
//! Where to start reading: `plan` says what a pod needs next (pure), `worker` owns a pod and carries that out, `status`
//! says what is told to the API (pure), `spec` turns a pod into what the runtime is asked for (pure), `agent` wires it all
//! together.

mod admission;
mod agent;
mod assignment;
mod cgroups;
mod config;
mod credentials;
mod cri;
mod error;
mod eviction;
mod go_duration;
mod hooks;
mod images;
mod inhibitor;
mod kubelet_config;
mod logs;
mod memory;
mod metrics;
mod model;
mod node;
mod objects;
mod plan;
mod pleg;
mod pods;
mod preemption;
mod pull_credentials;
mod recorder;
mod reserved;
mod resize;
mod server;
mod shared;
mod shutdown;
mod sources;
mod spec;
mod status;
mod storage;
mod sysctls;
mod termination;
mod turns;
mod users;
mod watched;
mod worker;

pub use assignment::{AssignmentConfig, AssignmentError};
pub use config::{Config, ReviewConfig};
pub use error::Error;
pub use eviction::{Amount, EvictionConfig, EvictionConfigError, Signal, Threshold};
pub use images::ImageGcConfig;
pub use inhibitor::{HoldError, LoginConfig};
pub use kubelet_config::{KubeletConfigError, KubeletConfiguration};
pub use memory::share_one_arena;
pub use oarlock_csi::abandon as abandon_volumes;
pub use pull_credentials::ProvidersConfigError;
pub use reserved::{EnforcedGroup, ReservedError};
pub use shutdown::ShutdownConfig;
pub use sysctls::{AllowedSysctls, PatternError};
pub use users::UsersError;

use credentials::Connection;
use tokio_util::sync::CancellationToken;

/// The version that the node reports.
pub const VERSION: &str = concat!("v1.36.0+oarlock.", env!("CARGO_PKG_VERSION"));

/// A node agent, ready to run.
pub struct Agent {
    config: Config,
    connection: Connection,
}

impl Agent {
    /// Reads the kubeconfig. Nothing outside is contacted before [`Agent::run`], but by a node without a certificate, which gets
    /// its first one here; `stop` ends the wait for it.
    pub async fn new(config: Config, stop: &CancellationToken) -> Result<Self, Error> {
        let connection = credentials::connect(&config, stop).await?;
        Ok(Self { config, connection })
    }

    /// Uses a client made elsewhere; `config.kubeconfig` is not read.
    pub fn with_client(config: Config, client: kube::Client) -> Self {
        Self { config, connection: Connection { client, keeper: None } }
    }

    /// Runs until `shutdown`. Containers keep running when the agent ends.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), Error> {
        agent::run(self.config, self.connection, shutdown).await
    }
}
