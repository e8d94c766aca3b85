//! Why the agent could not start or had to stop; and how an error with its causes is shown.

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
    #[error("cannot hold daemons to what is reserved for them")]
    Reserved(#[from] crate::ReservedError),
    #[error("cannot use credential provider plugins")]
    Providers(#[from] crate::ProvidersConfigError),
    #[error("cannot give out ids for user namespaces")]
    Users(#[from] crate::UsersError),
    #[error(transparent)]
    Task(#[from] oarlock_supervise::TaskError),
}

/// An error with its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        text.push_str(": ");
        text.push_str(&source.to_string());
        cause = source.source();
    }
    text
}
