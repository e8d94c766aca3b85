//! The nouns of the agent: identifiers, and a pod as the runtime shows it. Plain values; no I/O, no Kubernetes objects.

use std::fmt;
use std::sync::Arc;

use jiff::Timestamp;

macro_rules! identifier {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub(crate) struct $name(Arc<str>);

        impl $name {
            pub(crate) fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.into())
            }
        }

        impl From<String> for $name {
            fn from(text: String) -> Self {
                Self(text.into())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

identifier!(
    /// `metadata.uid` of a pod (for static pods, the hash of their manifest).
    PodUid
);
identifier!(
    /// The runtime's id of a pod sandbox.
    SandboxId
);
identifier!(
    /// The runtime's id of a container, without a scheme.
    ContainerId
);

/// A pod as the runtime shows it at one moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Observed {
    /// Newest first.
    pub sandboxes: Vec<Sandbox>,
    /// Newest first.
    pub containers: Vec<Container>,
}

/// A pod sandbox.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sandbox {
    pub id: SandboxId,
    pub attempt: u32,
    pub ready: bool,
    pub host_network: bool,
    /// The primary address first; empty with host network.
    pub ips: Vec<String>,
    pub created_at: Timestamp,
}

impl Sandbox {
    /// Whether containers can be started in it.
    pub(crate) fn usable(&self) -> bool {
        self.ready && (self.host_network || !self.ips.is_empty())
    }
}

/// What a container is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RunState {
    Created,
    Running,
    Exited,
    Unknown,
}

/// A container.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Container {
    pub id: ContainerId,
    pub sandbox: SandboxId,
    pub name: String,
    /// How often this container of the pod was restarted before.
    pub restart_count: u32,
    pub state: RunState,
    pub created_at: Timestamp,
    pub started_at: Option<Timestamp>,
    pub finished_at: Option<Timestamp>,
    pub exit_code: i32,
    pub reason: String,
    /// The runtime's message, or the termination message once the container has ended.
    pub message: String,
    /// The hash annotation of the definition it was made from.
    pub hash: String,
    /// The resources it was made with, as the agent notes them; empty where it did not.
    pub resources: String,
    /// The image as it was asked for.
    pub image: String,
    /// The image as the runtime resolved it.
    pub image_id: String,
    pub log_path: String,
    /// Uid, gid and groups of the first process, where the runtime tells.
    pub user: Option<(i64, i64, Vec<i64>)>,
}

impl Container {
    /// Whether it may have a process.
    pub(crate) fn live(&self) -> bool {
        matches!(self.state, RunState::Running | RunState::Unknown)
    }
}

impl Observed {
    /// The sandbox that containers belong to now: the newest.
    pub(crate) fn current_sandbox(&self) -> Option<&Sandbox> {
        self.sandboxes.first()
    }

    /// The newest container of that name.
    pub(crate) fn latest(&self, name: &str) -> Option<&Container> {
        self.containers.iter().find(|container| container.name == name)
    }

    /// The newest container of that name in one sandbox.
    pub(crate) fn latest_in(&self, name: &str, sandbox: &SandboxId) -> Option<&Container> {
        self.containers.iter().find(|container| container.name == name && container.sandbox == *sandbox)
    }

    /// The newest container of that name that has ended, leaving out `except`.
    pub(crate) fn last_ended(&self, name: &str, except: Option<&ContainerId>) -> Option<&Container> {
        self.containers.iter().find(|container| {
            container.name == name && container.state == RunState::Exited && Some(&container.id) != except
        })
    }
}
