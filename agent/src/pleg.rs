//! What goes on in the runtime: its stream of container events, with a slow look at everything as the safety net.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::cri::found_pods;
use crate::model::PodUid;
use crate::pods::News;
use crate::shared::Shared;
use crate::spec::names;

/// With events flowing, everything is looked at this often; without, as often as upstream does.
const RELIST: Duration = Duration::from_secs(60);
const RELIST_WITHOUT_EVENTS: Duration = Duration::from_secs(1);
const RETRY: Duration = Duration::from_millis(200);

/// Follows the runtime's events until `shutdown`.
pub(crate) async fn follow_events(shared: Arc<Shared>, news: mpsc::Sender<News>, shutdown: CancellationToken) {
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = follow_once(&shared, &news) => {}
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

/// Follows one stream to its end.
async fn follow_once(shared: &Shared, news: &mpsc::Sender<News>) {
    let mut events = match shared.runtime.events().await {
        Ok(events) => events,
        Err(error) => {
            if error.unimplemented() {
                // A runtime without events: look at everything instead.
                tokio::time::sleep(RELIST_WITHOUT_EVENTS).await;
                let _ = news.send(News::RuntimeAll).await;
            } else if shared.runtime_ok.swap(false, Ordering::Relaxed) {
                tracing::warn!(%error, "the runtime's events cannot be followed; trying again");
            }
            return;
        }
    };
    shared.runtime_ok.store(true, Ordering::Relaxed);
    // Whatever happened while nobody listened.
    let _ = news.send(News::RuntimeAll).await;
    while let Ok(Some(event)) = events.message().await {
        let from_sandbox = event.pod_sandbox_status.as_ref().and_then(|status| status.metadata.as_ref());
        let uid = from_sandbox.map(|metadata| metadata.uid.clone()).filter(|uid| !uid.is_empty()).or_else(|| {
            let labels: Option<&HashMap<String, String>> = event.containers_statuses.first().map(|s| &s.labels);
            labels.and_then(|labels| labels.get(names::POD_UID)).cloned()
        });
        let told = match uid {
            Some(uid) => News::Runtime(PodUid::from(uid)),
            None => News::RuntimeAll,
        };
        if news.send(told).await.is_err() {
            return;
        }
    }
}

/// Looks at everything now and then until `shutdown`.
pub(crate) async fn relist(shared: Arc<Shared>, news: mpsc::Sender<News>, shutdown: CancellationToken) {
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(RELIST) => {}
        }
        let _ = news.send(News::RuntimeAll).await;
        if let Ok(found) = found_pods(&shared.runtime).await {
            let _ = news.send(News::RuntimeFound(found)).await;
        }
    }
}
