//! Calls that join: a retry of a call that is still under way waits for the first one's outcome instead of racing it,
//! and a caller that goes away does not end the work.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;
use tonic::Status;
use tracing::Instrument;

type Outcome = Option<Result<String, Status>>;

/// Calls under way, by what they do and to what.
#[derive(Clone, Debug, Default)]
pub(crate) struct Joins {
    running: Arc<Mutex<HashMap<String, watch::Receiver<Outcome>>>>,
}

impl Joins {
    /// Runs `work` on a task of its own unless `key` is under way already; gives the outcome of whichever ran.
    pub(crate) async fn run<W>(&self, key: String, work: W) -> Result<String, Status>
    where
        W: Future<Output = Result<String, Status>> + Send + 'static,
    {
        let mut outcome = {
            let mut running = self.running.lock();
            match running.get(&key) {
                Some(outcome) => outcome.clone(),
                None => {
                    let (sender, receiver) = watch::channel(None);
                    running.insert(key.clone(), receiver.clone());
                    let leave = Leave { running: self.running.clone(), key };
                    // What the work logs and how long its steps take belongs to the call that began it.
                    let carried_out = async move {
                        let result = work.await;
                        drop(leave);
                        let _ = sender.send(Some(result));
                    };
                    tokio::spawn(carried_out.in_current_span());
                    receiver
                }
            }
        };
        match outcome.wait_for(Option::is_some).await {
            Ok(outcome) => {
                outcome.clone().unwrap_or_else(|| Err(Status::internal("the call ended without an outcome")))
            }
            Err(_) => Err(Status::internal("the call ended without an outcome")),
        }
    }
}

/// Takes the key out however the work ends.
struct Leave {
    running: Arc<Mutex<HashMap<String, watch::Receiver<Outcome>>>>,
    key: String,
}

impl Drop for Leave {
    fn drop(&mut self) {
        self.running.lock().remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::Notify;

    use super::*;

    #[tokio::test]
    async fn a_retry_joins_and_a_later_call_runs_anew() {
        let joins = Joins::default();
        let (count, go) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
        let work = || {
            let (count, go) = (count.clone(), go.clone());
            async move {
                let run = count.fetch_add(1, Ordering::SeqCst);
                go.notified().await;
                Ok(run.to_string())
            }
        };
        let (first, second) = (joins.run("k".into(), work()), joins.run("k".into(), work()));
        let wake = async {
            while count.load(Ordering::SeqCst) == 0 {
                tokio::task::yield_now().await;
            }
            go.notify_one();
        };
        let (first, second, ()) = tokio::join!(first, second, wake);
        assert_eq!((first.unwrap(), second.unwrap()), ("0".to_owned(), "0".to_owned()));
        go.notify_one();
        assert_eq!(joins.run("k".into(), work()).await.unwrap(), "1");
    }

    #[tokio::test]
    async fn work_goes_on_when_its_caller_goes_away() {
        let joins = Joins::default();
        let (go, done) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let work = {
            let (go, done) = (go.clone(), done.clone());
            async move {
                go.notified().await;
                done.notify_one();
                Ok(String::new())
            }
        };
        let call = tokio::spawn({
            let joins = joins.clone();
            async move { joins.run("k".into(), work).await }
        });
        while joins.running.lock().is_empty() {
            tokio::task::yield_now().await;
        }
        call.abort();
        go.notify_one();
        done.notified().await;
    }

    #[tokio::test]
    async fn a_panic_is_an_error_and_frees_the_key() {
        let joins = Joins::default();
        let outcome = joins.run("k".into(), async { panic!("on purpose") }).await;
        assert!(outcome.is_err());
        assert_eq!(joins.run("k".into(), async { Ok("fine".into()) }).await.unwrap(), "fine");
    }
}
