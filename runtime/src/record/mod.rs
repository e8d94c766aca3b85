//! What is on record about sandboxes and containers: one small JSON file each, written before the step it announces.
//!
//! Owns the records' shape (here) and their files (`store`). Does not decide what a record means for the world;
//! `reconcile` does.

mod store;

pub(crate) use store::{Kind, RecordError, Store};

use oarlock_proto::cri;
use serde::{Deserialize, Serialize};

use crate::spec::namespace::{SandboxModes, UserMapping};
use crate::spec::user::Identity;

/// The shape that this version writes.
pub(crate) const VERSION: u32 = 1;

/// Where a sandbox is in its life.
///
/// ```text
/// Creating ──▶ Ready ──▶ Stopping ──▶ NotReady ──▶ Removing ──▶ (no record)
///     └── a crash or failure here is undone ─────────▲
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum SandboxPhase {
    Creating,
    Ready,
    Stopping,
    NotReady,
    Removing,
}

/// One sandbox.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct SandboxRecord {
    pub version: u32,
    pub id: String,
    /// Which boot of the machine its kernel objects belong to.
    pub boot_id: String,
    pub created_at_nanos: i64,
    pub handler: String,
    pub config: cri::PodSandboxConfig,
    pub hostname: String,
    pub cgroup_parent: String,
    pub owns_cgroup_parent: bool,
    pub host_network: bool,
    pub host_ipc: bool,
    pub host_pid: bool,
    pub shared_pid: bool,
    /// The identities of its user namespace; None shares the host's.
    #[serde(default)]
    pub user: Option<UserMapping>,
    pub phase: SandboxPhase,
    /// The CNI network that it joined; empty without one.
    #[serde(default)]
    pub network: String,
    /// Addresses in the network, the primary one first.
    pub ips: Vec<String>,
}

impl SandboxRecord {
    pub(crate) fn modes(&self) -> SandboxModes {
        SandboxModes {
            host_network: self.host_network,
            host_ipc: self.host_ipc,
            host_pid: self.host_pid,
            shared_pid: self.shared_pid,
            user: self.user,
        }
    }

    pub(crate) fn metadata(&self) -> cri::PodSandboxMetadata {
        self.config.metadata.clone().unwrap_or_default()
    }

    /// What no two sandboxes may have in common.
    pub(crate) fn name(&self) -> String {
        sandbox_name(&self.metadata())
    }
}

pub(crate) fn sandbox_name(metadata: &cri::PodSandboxMetadata) -> String {
    format!("{}_{}_{}_{}", metadata.name, metadata.namespace, metadata.uid, metadata.attempt)
}

/// Where a container is in its life.
///
/// ```text
/// Creating ──▶ Created ──▶ Starting ──▶ Running ──▶ Exited ──▶ Removing ──▶ (no record)
///     │                        └── the program cannot be run ──▲
///     └── a crash or failure here is undone
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ContainerPhase {
    Creating,
    Created,
    Starting,
    Running,
    Exited,
    Removing,
}

/// One container.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ContainerRecord {
    pub version: u32,
    pub id: String,
    pub sandbox_id: String,
    pub created_at_nanos: i64,
    pub phase: ContainerPhase,
    pub config: cri::ContainerConfig,
    /// Absolute; None when the container's output is not kept.
    pub log_path: Option<String>,
    /// `sha256:…` of the image's configuration.
    pub image_id: String,
    /// A repository digest of the image, or its id.
    pub image_ref: String,
    pub stop_signal: i32,
    pub identity: Identity,
    /// What is in force, updates included.
    pub resources: cri::LinuxContainerResources,
    /// The container's group, without a leading slash.
    pub cgroup: String,
    pub pid: i32,
    pub started_at_nanos: i64,
    pub finished_at_nanos: i64,
    pub exit_code: i32,
    pub reason: String,
    pub message: String,
}

impl ContainerRecord {
    pub(crate) fn metadata(&self) -> cri::ContainerMetadata {
        self.config.metadata.clone().unwrap_or_default()
    }

    /// What no two containers may have in common.
    pub(crate) fn name(&self) -> String {
        container_name(&self.sandbox_id, &self.metadata())
    }
}

pub(crate) fn container_name(sandbox_id: &str, metadata: &cri::ContainerMetadata) -> String {
    format!("{sandbox_id}_{}_{}", metadata.name, metadata.attempt)
}
