//! The ServiceAccount `default` in each namespace.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Namespace, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::PostParams;
use kube::{Api, ResourceExt};
use oarlock_machinery::{ApiError, Change, Next, WorkQueue, call, queue};
use tokio_util::sync::CancellationToken;

use crate::shared::{Shared, Task};

const NAME: &str = "default";
const CONCURRENCY: usize = 4;

/// Whether anything may still be put into the namespace.
pub(crate) fn is_alive(namespace: &Namespace) -> bool {
    namespace.metadata.deletion_timestamp.is_none()
}

pub(crate) fn start(shared: &Arc<Shared>, stop: &CancellationToken) -> Task {
    let queue: Arc<WorkQueue<String>> = WorkQueue::new();
    let (on_namespace, on_account) = (queue.clone(), queue.clone());
    shared.namespaces.on_change(move |change| on_namespace.add(change.object().name_any()));
    shared.service_accounts.on_change(move |change| {
        if let Change::Deleted(account) = change
            && account.name_any() == NAME
        {
            on_account.add(account.namespace().unwrap_or_default());
        }
    });
    let (shared, stop) = (shared.clone(), stop.clone());
    Box::pin(async move {
        shared.namespaces.wait_synced().await;
        shared.service_accounts.wait_synced().await;
        queue::work("serviceaccount", queue, CONCURRENCY, stop, |namespace| reconcile(shared.clone(), namespace)).await;
    })
}

async fn reconcile(shared: Arc<Shared>, namespace: String) -> Result<Next, ApiError> {
    let alive = shared.namespaces.get("", &namespace).is_some_and(|namespace| is_alive(&namespace));
    if !alive || shared.service_accounts.get(&namespace, NAME).is_some() {
        return Ok(Next::Done);
    }
    let account = ServiceAccount {
        metadata: ObjectMeta { name: Some(NAME.into()), namespace: Some(namespace.clone()), ..Default::default() },
        ..Default::default()
    };
    let api: Api<ServiceAccount> = Api::namespaced(shared.client.clone(), &namespace);
    match call("create serviceaccount", api.create(&PostParams::default(), &account)).await {
        Err(error) if !(error.is_already_exists() || error.is_namespace_terminating()) => Err(error),
        _ => Ok(Next::Done),
    }
}
