//! Bootstrap tokens whose time is over are deleted. The API server refuses them from that moment on; this part takes them away.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, Preconditions};
use kube::{Api, ResourceExt};
use oarlock_machinery::{ApiError, Next, WorkQueue, call, queue};
use tokio_util::sync::CancellationToken;

use crate::shared::{Shared, TOKEN_NAMESPACE, Task};

const CONCURRENCY: usize = 1;
const EXPIRATION: &str = "expiration";

/// Keeps of a token's Secret what this part reads: the rest is nobody's business here.
pub(crate) fn trim(secret: &mut Secret) {
    if let Some(data) = &mut secret.data {
        data.retain(|key, _| key == EXPIRATION);
    }
}

pub(crate) fn start(shared: &Arc<Shared>, stop: &CancellationToken) -> Task {
    let queue: Arc<WorkQueue<String>> = WorkQueue::new();
    let on_token = queue.clone();
    shared.tokens.on_change(move |change| on_token.add(change.object().name_any()));
    let (shared, stop) = (shared.clone(), stop.clone());
    Box::pin(async move {
        shared.tokens.wait_synced().await;
        let reconcile = |name| reconcile(shared.clone(), name);
        queue::work("tokencleaner", queue, CONCURRENCY, stop, reconcile).await;
    })
}

/// How long a token is good for from now on; None is for ever. A time that nobody can read is over.
fn time_left(secret: &Secret, now: Timestamp) -> Option<Duration> {
    let text = secret.data.as_ref()?.get(EXPIRATION)?;
    let until = std::str::from_utf8(&text.0).ok().and_then(|text| text.parse::<Timestamp>().ok());
    let left = until.map(|until| until.duration_since(now));
    Some(left.and_then(|left| Duration::try_from(left).ok()).unwrap_or_default())
}

async fn reconcile(shared: Arc<Shared>, name: String) -> Result<Next, ApiError> {
    let Some(secret) = shared.tokens.get(TOKEN_NAMESPACE, &name) else { return Ok(Next::Done) };
    match time_left(&secret, Timestamp::now()) {
        None => return Ok(Next::Done),
        Some(left) if !left.is_zero() => return Ok(Next::After(left)),
        Some(_) => {}
    }
    let api: Api<Secret> = Api::namespaced(shared.client.clone(), TOKEN_NAMESPACE);
    let same = Preconditions { uid: secret.uid(), resource_version: secret.resource_version() };
    let params = DeleteParams { preconditions: Some(same), ..DeleteParams::default() };
    match call("delete secret", api.delete(&name, &params)).await {
        Err(error) if error.is_not_found() => Ok(Next::Done),
        result => result.map(|_| Next::Done),
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::ByteString;

    use super::*;

    fn left(expiration: Option<&str>) -> Option<Duration> {
        let data = expiration.map(|text| [(EXPIRATION.to_owned(), ByteString(text.into()))].into());
        time_left(&Secret { data, ..Secret::default() }, "2026-01-01T00:00:00Z".parse().unwrap())
    }

    #[test]
    fn a_token_lives_until_the_time_that_it_names() {
        assert_eq!(left(None), None);
        assert_eq!(left(Some("2026-01-01T00:01:00Z")), Some(Duration::from_secs(60)));
        assert_eq!(left(Some("2025-12-31T23:59:59Z")), Some(Duration::ZERO));
        assert_eq!(left(Some("tomorrow")), Some(Duration::ZERO), "the API server refuses it already");
    }
}
