//! The scheduler: gives each pending pod a node.
//!
//! One task owns everything (`run`): the cache of nodes and their pods (`cache`), and the queue of waiting pods
//! (`queue`). It takes a pod, asks `filter` which nodes are possible and `score` which of them is best, assumes the
//! answer in the cache, and sends the binding while it goes on with the next pod. `preempt` makes room for pods that
//! matter more. All of these are pure. Owns no storage and no HTTP: everything goes through a `kube::Client`.

mod cache;
mod cycle;
mod filter;
mod message;
mod pod;
mod preempt;
mod queue;
mod resources;
mod run;
mod score;
mod sources;
mod storage;
mod terms;

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
    /// A task that should run for ever ended, by itself or by a panic.
    #[error("scheduler task {task} ended unexpectedly")]
    TaskEnded { task: &'static str },
}

/// The scheduler over one client.
pub struct Scheduler {
    client: kube::Client,
    config: Config,
}

impl Scheduler {
    pub fn new(client: kube::Client, config: Config) -> Self {
        Self { client, config }
    }

    /// Runs until `shutdown`. An error means that a task died; the caller should end the process.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), Error> {
        run::run(self.client, self.config, shutdown).await
    }
}
