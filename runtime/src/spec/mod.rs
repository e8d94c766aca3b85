//! Decides what a container looks like: CRI configuration and image configuration in, OCI runtime specification out.
//!
//! Pure: no I/O, no clock, no async. Facts about the host and the root file system come in as values ([`HostFacts`],
//! [`user::Identity`], [`device::HostDevice`]), so every decision can be read and tested here. What is not honoured is
//! refused ([`SpecError`]), never dropped.

pub(crate) mod adjust;
pub(crate) mod capability;
pub(crate) mod cdi;
pub(crate) mod container;
pub(crate) mod device;
pub(crate) mod image;
pub(crate) mod mount;
pub(crate) mod namespace;
pub(crate) mod resources;
pub(crate) mod sandbox;
pub(crate) mod seccomp;
mod seccomp_table;
pub(crate) mod signal;
pub(crate) mod user;

use std::path::PathBuf;

/// Why a configuration cannot be carried out. `field` is the path of the CRI field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SpecError {
    /// The value makes no sense.
    #[error("{field}: {problem}")]
    Invalid { field: String, problem: String },
    /// The value makes sense, but this runtime or this host cannot do it.
    #[error("{field} is not supported: {reason}")]
    Unsupported { field: String, reason: String },
}

impl SpecError {
    pub(crate) fn invalid(field: impl Into<String>, problem: impl Into<String>) -> SpecError {
        SpecError::Invalid { field: field.into(), problem: problem.into() }
    }

    pub(crate) fn unsupported(field: impl Into<String>, reason: impl Into<String>) -> SpecError {
        SpecError::Unsupported { field: field.into(), reason: reason.into() }
    }
}

/// What decisions need to know about the host. Read once at start.
#[derive(Clone, Debug, Default)]
pub(crate) struct HostFacts {
    /// The unified hierarchy has the controllers.
    pub cgroup_v2: bool,
    /// Mount points of the version 1 hierarchies; empty on version 2.
    pub cgroup_v1_hierarchies: Vec<PathBuf>,
    /// Memory and swap can be limited together.
    pub swap_accounting: bool,
    /// Huge pages can be limited.
    pub hugetlb: bool,
    /// Capabilities this process may hand on.
    pub capabilities: capability::Set,
    /// The lowest oom_score_adj this process may give; None where any may be given.
    pub oom_score_adj_floor: Option<i32>,
    /// Why pods cannot have user namespaces; None where they can.
    pub no_user_namespaces: Option<String>,
    pub apparmor: bool,
    /// The runtime's own AppArmor profile is in the kernel.
    pub apparmor_default: bool,
    pub selinux: bool,
    /// Control groups are made through systemd, as slices and scopes.
    pub systemd_cgroups: bool,
    /// The host's own name.
    pub hostname: String,
}
