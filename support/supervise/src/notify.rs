//! The `sd_notify` readiness protocol: a datagram `READY=1` to the socket named by `NOTIFY_SOCKET`.
//!
//! systemd speaks it to services of `Type=notify`; `oarlock up` speaks it to its children, so a daemon needs one way only.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Why a readiness message could not be sent or awaited.
#[derive(Debug, thiserror::Error)]
pub enum NotifyError {
    #[error("cannot bind the notification socket {path}")]
    Bind {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot send readiness to {socket}")]
    Send {
        socket: String,
        #[source]
        source: io::Error,
    },
    #[error("cannot receive readiness")]
    Receive {
        #[source]
        source: io::Error,
    },
    #[error("not ready within {} s", .after.as_secs())]
    Timeout { after: Duration },
}

/// Tells the supervisor, if there is one, that this process now serves. Without `NOTIFY_SOCKET` it does nothing.
pub fn notify_ready() -> Result<(), NotifyError> {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(()) };
    let name = name.to_string_lossy().into_owned();
    let send = || -> io::Result<()> {
        let socket = UnixDatagram::unbound()?;
        let address = match name.strip_prefix('@') {
            Some(abstract_name) => SocketAddr::from_abstract_name(abstract_name)?,
            None => SocketAddr::from_pathname(&name)?,
        };
        socket.send_to_addr(b"READY=1", &address).map(|_| ())
    };
    send().map_err(|source| NotifyError::Send { socket: name.clone(), source })
}

/// The supervisor's end: one socket a child.
pub struct NotifySocket {
    path: PathBuf,
    socket: tokio::net::UnixDatagram,
}

impl NotifySocket {
    /// Binds a fresh socket at `path`, replacing what an earlier supervisor left there.
    pub fn bind(path: &Path) -> Result<Self, NotifyError> {
        let _ = std::fs::remove_file(path);
        let socket = tokio::net::UnixDatagram::bind(path)
            .map_err(|source| NotifyError::Bind { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), socket })
    }

    /// The value for the child's `NOTIFY_SOCKET`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for the next `READY=1`. Cancel safe.
    pub async fn ready(&self, timeout: Duration) -> Result<(), NotifyError> {
        let wait = async {
            let mut buffer = [0u8; 256];
            loop {
                let length = self.socket.recv(&mut buffer).await.map_err(|source| NotifyError::Receive { source })?;
                if buffer[..length].split(|byte| *byte == b'\n').any(|line| line == b"READY=1") {
                    return Ok(());
                }
            }
        };
        tokio::time::timeout(timeout, wait).await.map_err(|_| NotifyError::Timeout { after: timeout })?
    }
}

impl Drop for NotifySocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
