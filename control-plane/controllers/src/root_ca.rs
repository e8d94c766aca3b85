//! The cluster's CA certificate as ConfigMap `kube-root-ca.crt` in each namespace.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::PostParams;
use kube::{Api, ResourceExt};
use oarlock_machinery::{ApiError, Next, WorkQueue, call, merge, queue};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::service_account::is_alive;
use crate::shared::{ROOT_CA_NAME, Shared, Task};

const CONCURRENCY: usize = 4;
const DATA_KEY: &str = "ca.crt";
pub(crate) fn start(shared: &Arc<Shared>, stop: &CancellationToken, pem: String) -> Task {
    let queue: Arc<WorkQueue<String>> = WorkQueue::new();
    let (on_namespace, on_map) = (queue.clone(), queue.clone());
    shared.namespaces.on_change(move |change| on_namespace.add(change.object().name_any()));
    shared.root_cas.on_change(move |change| on_map.add(change.object().namespace().unwrap_or_default()));
    let (shared, stop, pem) = (shared.clone(), stop.clone(), Arc::<str>::from(pem));
    Box::pin(async move {
        shared.namespaces.wait_synced().await;
        shared.root_cas.wait_synced().await;
        let reconcile = |namespace| reconcile(shared.clone(), pem.clone(), namespace);
        queue::work("root-ca", queue, CONCURRENCY, stop, reconcile).await;
    })
}

async fn reconcile(shared: Arc<Shared>, pem: Arc<str>, namespace: String) -> Result<Next, ApiError> {
    if !shared.namespaces.get("", &namespace).is_some_and(|namespace| is_alive(&namespace)) {
        return Ok(Next::Done);
    }
    let api: Api<ConfigMap> = Api::namespaced(shared.client.clone(), &namespace);
    let data = BTreeMap::from([(DATA_KEY.to_owned(), pem.to_string())]);
    let result = match shared.root_cas.get(&namespace, ROOT_CA_NAME) {
        Some(map) if map.data.as_ref() == Some(&data) => return Ok(Next::Done),
        Some(map) => {
            // The whole map is ours: keys that somebody added go.
            let surplus = map.data.iter().flatten().map(|(key, _)| (key.clone(), Value::Null));
            let mut wanted: serde_json::Map<String, Value> = surplus.collect();
            wanted.insert(DATA_KEY.to_owned(), Value::from(pem.as_ref()));
            merge("patch configmap", &api, ROOT_CA_NAME, &json!({ "data": wanted })).await
        }
        None => {
            let metadata = ObjectMeta {
                name: Some(ROOT_CA_NAME.into()),
                namespace: Some(namespace.clone()),
                ..Default::default()
            };
            let map = ConfigMap { metadata, data: Some(data), ..Default::default() };
            call("create configmap", api.create(&PostParams::default(), &map)).await
        }
    };
    match result {
        Err(error) if !(error.is_already_exists() || error.is_namespace_terminating()) => Err(error),
        _ => Ok(Next::Done),
    }
}
