//! What goes on in the runtime: its stream of container events, with a slow look at everything as the safety net. A runtime
//! without events is listed every second, and the pods of which something has changed are looked at.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use oarlock_proto::cri;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::cri::{CriError, found_pods};
use crate::model::PodUid;
use crate::pods::News;
use crate::shared::Shared;
use crate::spec::names;

/// With events flowing, everything is looked at this often.
const RELIST: Duration = Duration::from_secs(60);
/// Without events, this often is looked for changes, as upstream does.
const LIST: Duration = Duration::from_secs(1);
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
        Err(error) if error.unimplemented() => return compare(shared, news).await,
        Err(error) => {
            if shared.runtime_ok.swap(false, Ordering::Relaxed) {
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

/// Lists what a runtime without events has, again and again, and tells of the pods that differ; ends when it cannot be asked.
async fn compare(shared: &Shared, news: &mpsc::Sender<News>) {
    let mut last = None;
    loop {
        let now = match listed(shared).await {
            Ok(now) => now,
            Err(error) => {
                if shared.runtime_ok.swap(false, Ordering::Relaxed) {
                    tracing::warn!(%error, "the runtime cannot be listed; trying again");
                }
                return;
            }
        };
        shared.runtime_ok.store(true, Ordering::Relaxed);
        let told = match &last {
            // Whatever happened while nobody listened; what happens from now on differs from this list.
            None => vec![News::RuntimeAll],
            Some(last) => changed(last, &now).into_iter().map(News::Runtime).collect(),
        };
        for told in told {
            if news.send(told).await.is_err() {
                return;
            }
        }
        last = Some(now);
        tokio::time::sleep(LIST).await;
    }
}

/// The sandboxes and containers of each pod, with their states.
type Listed = BTreeMap<String, BTreeMap<String, i32>>;

async fn listed(shared: &Shared) -> Result<Listed, CriError> {
    let (sandboxes, containers) =
        tokio::try_join!(shared.runtime.list_sandboxes(None), shared.runtime.list_containers(None))?;
    Ok(by_pod(&sandboxes, &containers))
}

fn by_pod(sandboxes: &[cri::PodSandbox], containers: &[cri::Container]) -> Listed {
    let sandboxes = sandboxes.iter().map(|item| (&item.labels, &item.id, item.state));
    let containers = containers.iter().map(|item| (&item.labels, &item.id, item.state));
    let mut listed = Listed::new();
    for (labels, id, state) in sandboxes.chain(containers) {
        if let Some(uid) = labels.get(names::POD_UID).filter(|uid| !uid.is_empty()) {
            listed.entry(uid.clone()).or_default().insert(id.clone(), state);
        }
    }
    listed
}

/// The pods that differ between two lists, those that came and went among them.
fn changed(last: &Listed, now: &Listed) -> Vec<PodUid> {
    let went = last.keys().filter(|uid| !now.contains_key(*uid));
    let differ = now.iter().filter(|(uid, parts)| last.get(*uid) != Some(parts)).map(|(uid, _)| uid);
    went.chain(differ).map(|uid| PodUid::from(uid.as_str())).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    fn sandbox(uid: &str, id: &str, state: i32) -> cri::PodSandbox {
        let labels = [(names::POD_UID.to_owned(), uid.to_owned())].into();
        cri::PodSandbox { id: id.to_owned(), state, labels, ..Default::default() }
    }

    fn container(uid: &str, id: &str, state: i32) -> cri::Container {
        let labels = [(names::POD_UID.to_owned(), uid.to_owned())].into();
        cri::Container { id: id.to_owned(), state, labels, ..Default::default() }
    }

    #[test]
    fn only_pods_that_differ_are_told() {
        let before = by_pod(
            &[sandbox("same", "s1", 0), sandbox("ends", "s2", 0), sandbox("goes", "s3", 1)],
            &[container("same", "c1", 1), container("ends", "c2", 1)],
        );
        let after = by_pod(
            &[sandbox("same", "s1", 0), sandbox("ends", "s2", 0), sandbox("comes", "s4", 0), sandbox("", "x", 0)],
            &[container("same", "c1", 1), container("ends", "c2", 2)],
        );
        let told: Vec<String> = changed(&before, &after).iter().map(ToString::to_string).collect();
        assert_eq!(told, ["goes", "comes", "ends"]);
        assert!(changed(&after, &after).is_empty());
    }
}
