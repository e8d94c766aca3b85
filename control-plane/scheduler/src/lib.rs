//! The scheduler: gives each pending pod a node. Owns no storage and no HTTP: everything goes through a `kube::Client`.

use tokio_util::sync::CancellationToken;

/// What the scheduler needs to know beside what the API tells it.
#[derive(Clone, Debug)]
pub struct Config {
    /// Only pods whose `spec.schedulerName` is this are scheduled.
    pub scheduler_name: String,
}

impl Default for Config {
    fn default() -> Self {
        Self { scheduler_name: "default-scheduler".to_owned() }
    }
}

/// Why the scheduler stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A task that should run for ever ended.
    #[error("scheduler task {task} ended unexpectedly")]
    TaskEnded { task: &'static str },
}

/// The scheduler over one client.
pub struct Scheduler {
    _client: kube::Client,
    _config: Config,
}

impl Scheduler {
    pub fn new(client: kube::Client, config: Config) -> Self {
        Self { _client: client, _config: config }
    }

    /// Runs until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), Error> {
        shutdown.cancelled().await;
        Ok(())
    }
}
