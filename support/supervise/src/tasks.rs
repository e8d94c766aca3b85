//! A set of named tasks that live and die together: the first that ends unasked cancels the rest.

use std::future::Future;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// The error type that tasks report: any error that can cross threads.
type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Why a set of tasks ended before it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// A task returned an error.
    #[error("{name} failed")]
    Failed {
        name: &'static str,
        #[source]
        source: BoxError,
    },
    /// A task returned without an error although nobody asked it to stop.
    #[error("{name} ended unexpectedly")]
    Ended { name: &'static str },
    /// A task panicked.
    #[error("{name} panicked")]
    Panicked {
        name: String,
        #[source]
        source: tokio::task::JoinError,
    },
}

/// Named tasks under one cancellation token.
pub struct Tasks {
    shutdown: CancellationToken,
    set: JoinSet<(&'static str, Result<(), BoxError>)>,
}

impl Tasks {
    /// An empty set that ends when `shutdown` is cancelled.
    pub fn new(shutdown: CancellationToken) -> Self {
        Self { shutdown, set: JoinSet::new() }
    }

    /// The token that every task of the set should watch.
    pub fn token(&self) -> CancellationToken {
        self.shutdown.clone()
    }

    /// Starts a task. Its end counts as a failure of the whole set unless the token has been cancelled by then.
    pub fn spawn<F, E>(&mut self, name: &'static str, task: F)
    where
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: Into<BoxError> + Send + 'static,
    {
        self.set.spawn(async move { (name, task.await.map_err(Into::into)) });
    }

    /// Waits until the token is cancelled and every task has ended, or until one ends unasked; then cancels the others and
    /// gives them `drain` to finish before they are aborted. The first failure is returned.
    pub async fn join(mut self, drain: Duration) -> Result<(), TaskError> {
        let mut first: Option<TaskError> = None;
        let shutdown = self.shutdown.clone();
        loop {
            let ended = tokio::select! {
                ended = self.set.join_next() => ended,
                () = shutdown.cancelled() => break,
            };
            let Some(ended) = ended else { break };
            if let Some(error) = outcome(ended, shutdown.is_cancelled()) {
                first = Some(error);
                shutdown.cancel();
            }
        }
        let drained = tokio::time::timeout(drain, async {
            while let Some(ended) = self.set.join_next().await {
                let error = outcome(ended, true);
                first = first.take().or(error);
            }
        });
        if drained.await.is_err() {
            tracing::warn!(tasks = self.set.len(), "tasks did not end in time and are aborted");
            self.set.shutdown().await;
        }
        first.map_or(Ok(()), Err)
    }
}

/// What one task's end means; an ordinary return is fine once a stop was asked for.
fn outcome(
    ended: Result<(&'static str, Result<(), BoxError>), tokio::task::JoinError>,
    stopping: bool,
) -> Option<TaskError> {
    match ended {
        Ok((_, Ok(()))) if stopping => None,
        Ok((name, Ok(()))) => Some(TaskError::Ended { name }),
        Ok((name, Err(source))) => Some(TaskError::Failed { name, source }),
        Err(source) if source.is_cancelled() => None,
        Err(source) => Some(TaskError::Panicked { name: "a task".to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_failure_ends_the_others_and_is_named() {
        let mut tasks = Tasks::new(CancellationToken::new());
        let token = tasks.token();
        tasks.spawn("patient", async move {
            token.cancelled().await;
            Ok::<(), std::io::Error>(())
        });
        tasks.spawn("broken", async { Err(std::io::Error::other("no disk")) });
        let error = tasks.join(Duration::from_secs(1)).await.expect_err("the set must fail");
        assert_eq!(error.to_string(), "broken failed");
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_end_is_a_failure() {
        let mut tasks = Tasks::new(CancellationToken::new());
        tasks.spawn("short", async { Ok::<(), std::io::Error>(()) });
        let error = tasks.join(Duration::from_secs(1)).await.expect_err("the set must fail");
        assert_eq!(error.to_string(), "short ended unexpectedly");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stuck_task_is_aborted_after_the_drain_time() {
        let token = CancellationToken::new();
        let mut tasks = Tasks::new(token.clone());
        tasks.spawn("stuck", async {
            std::future::pending::<()>().await;
            Ok::<(), std::io::Error>(())
        });
        token.cancel();
        tasks.join(Duration::from_secs(5)).await.expect("a requested stop is no failure");
    }
}
