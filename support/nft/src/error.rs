//! What can go wrong with nf_tables.

use nix::errno::Errno;
use oarlock_netlink::NetlinkError;

/// An operation on nf_tables that failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NftError {
    /// Nothing of the transaction was done. `what` names the first refused command; `count` is how many were refused.
    #[error("the kernel refused to {what}{}{}", more(*count), explain(hint))]
    Refused { what: String, count: usize, hint: String, source: Errno },
    #[error("nf_tables")]
    Netlink(#[source] NetlinkError),
    #[error("the transaction for table {table} is larger than netlink allows")]
    TooLarge { table: String },
    #[error("the kernel's ruleset changed while it was read")]
    Interrupted,
}

fn more(count: usize) -> String {
    if count > 1 { format!(" (and {} more commands)", count - 1) } else { String::new() }
}

fn explain(hint: &str) -> String {
    if hint.is_empty() { String::new() } else { format!(": {hint}") }
}

impl NftError {
    /// The kernel's error number, when it is the kernel that refused.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            NftError::Refused { source, .. } => Some(*source),
            NftError::Netlink(error) => error.errno(),
            _ => None,
        }
    }

    /// Whether something in the transaction was there already that had to be new.
    pub fn is_exists(&self) -> bool {
        self.errno() == Some(Errno::EEXIST)
    }

    /// Whether something in the transaction was named that is not there.
    pub fn is_not_found(&self) -> bool {
        self.errno() == Some(Errno::ENOENT)
    }
}
