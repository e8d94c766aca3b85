//! Why the agent could not start or had to stop.

use std::path::PathBuf;

/// What ends the agent.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("read kubeconfig {}", path.display())]
    Kubeconfig {
        path: PathBuf,
        #[source]
        source: Box<kube::config::KubeconfigError>,
    },
    #[error("make an API client from kubeconfig {}", path.display())]
    Client {
        path: PathBuf,
        #[source]
        source: kube::Error,
    },
    #[error("{operation} {}", path.display())]
    Io {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("running with swap on is not allowed: disable swap or set failSwapOn to false")]
    SwapOn,
    #[error("cannot get the node's first certificate")]
    Credentials(#[source] oarlock_credentials::CredentialsError),
    #[error("cannot give out processors, memory and devices")]
    Assignment(#[from] crate::AssignmentError),
    #[error("cannot give out ids for user namespaces")]
    Users(#[from] crate::UsersError),
    #[error(transparent)]
    Task(#[from] oarlock_supervise::TaskError),
}
