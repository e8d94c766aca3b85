//! What can go wrong on a netlink socket.

use std::io;

use nix::errno::Errno;

/// A netlink operation that failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetlinkError {
    #[error("cannot open a netlink socket")]
    Open(#[source] io::Error),
    #[error("cannot enter the network namespace")]
    Namespace(#[source] oarlock_netns::NetnsError),
    #[error("cannot send to the kernel to {operation}")]
    Send { operation: &'static str, source: io::Error },
    #[error("no answer of the kernel to {operation}")]
    Receive { operation: &'static str, source: io::Error },
    /// The kernel said no; `hint` is its own explanation where it gives one.
    #[error("cannot {operation}{}", explain(hint))]
    Refused { operation: &'static str, hint: String, source: Errno },
    #[error("a message to {operation} would be larger than netlink allows")]
    TooLarge { operation: &'static str },
    #[error("the kernel's answer to {operation} is malformed")]
    Malformed { operation: &'static str },
}

fn explain(hint: &str) -> String {
    if hint.is_empty() { String::new() } else { format!(" ({hint})") }
}

impl NetlinkError {
    /// The kernel's error number, when it is the kernel that refused.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            NetlinkError::Refused { source, .. } => Some(*source),
            _ => None,
        }
    }

    /// Whether what was to be made is there already.
    pub fn is_exists(&self) -> bool {
        self.errno() == Some(Errno::EEXIST)
    }

    /// Whether what was to be changed or removed is not there.
    pub fn is_not_found(&self) -> bool {
        matches!(self.errno(), Some(Errno::ENOENT | Errno::ENODEV | Errno::ESRCH | Errno::EADDRNOTAVAIL | Errno::ENXIO))
    }
}

/// Success also when what was to be removed is gone already.
pub(crate) fn gone_is_fine(result: Result<(), NetlinkError>) -> Result<(), NetlinkError> {
    match result {
        Err(error) if error.is_not_found() => Ok(()),
        other => other,
    }
}
