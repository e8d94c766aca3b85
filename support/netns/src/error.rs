//! What can go wrong with a namespace, one variant an operation.

use std::io;
use std::path::PathBuf;

/// An operation on a namespace that failed. The cause is the source, not part of the text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetnsError {
    #[error("cannot start a thread for the namespace")]
    Thread(#[source] io::Error),
    #[error("the code that ran in the namespace panicked")]
    Panicked,
    #[error("cannot open namespace {}", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("{} is not a namespace", path.display())]
    NotANamespace { path: PathBuf },
    #[error("cannot enter namespace {}", path.display())]
    Enter { path: PathBuf, source: io::Error },
    #[error("cannot make new namespaces")]
    Unshare(#[source] io::Error),
    #[error("cannot map the identities of a user namespace ({})", mapping.trim())]
    Identities { mapping: String, source: io::Error },
    #[error("a namespace is pinned at {} already", path.display())]
    AlreadyPinned { path: PathBuf },
    #[error("cannot pin a namespace at {}", path.display())]
    Pin { path: PathBuf, source: io::Error },
    #[error("cannot remove the pinned namespace {}", path.display())]
    Unpin { path: PathBuf, source: io::Error },
    #[error("cannot bring the loopback interface up")]
    Loopback(#[source] io::Error),
    #[error("cannot set the hostname to {name:?}")]
    Hostname { name: String, source: io::Error },
    #[error("{name:?} is not the name of a sysctl")]
    SysctlName { name: String },
    #[error("cannot set sysctl {name} to {value:?}")]
    Sysctl { name: String, value: String, source: io::Error },
}
