//! Calls to the API with a time limit and an error that says which operation failed.

use std::fmt::Debug;
use std::future::Future;
use std::time::Duration;

use kube::Api;
use kube::api::{Patch, PatchParams};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// No call to the API waits longer than this.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// A call to the API that failed.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The server refused it, or could not be reached.
    #[error("{operation} failed")]
    Failed {
        operation: &'static str,
        #[source]
        source: Box<kube::Error>,
    },
    /// No answer within [`CALL_TIMEOUT`].
    #[error("{operation} got no answer in {} s", CALL_TIMEOUT.as_secs())]
    TimedOut { operation: &'static str },
}

impl ApiError {
    fn status(&self) -> Option<&kube::core::Status> {
        match self {
            Self::Failed { source, .. } => match source.as_ref() {
                kube::Error::Api(status) => Some(status),
                _ => None,
            },
            Self::TimedOut { .. } => None,
        }
    }

    /// The object is not there.
    pub fn is_not_found(&self) -> bool {
        self.status().is_some_and(|status| status.code == 404)
    }

    /// The object changed since it was read, or a precondition did not hold.
    pub fn is_conflict(&self) -> bool {
        self.status().is_some_and(|status| status.code == 409 && status.reason != "AlreadyExists")
    }

    /// The name is taken.
    pub fn is_already_exists(&self) -> bool {
        self.status().is_some_and(|status| status.reason == "AlreadyExists")
    }

    /// The namespace is going away, so nothing may be created in it.
    pub fn is_namespace_terminating(&self) -> bool {
        self.status().is_some_and(|status| {
            status.code == 403
                && (status.message.contains("because it is being terminated")
                    || status
                        .details
                        .iter()
                        .flat_map(|d| &d.causes)
                        .any(|cause| cause.reason == "NamespaceTerminating"))
        })
    }

    /// The request itself is wrong; sending it again will not help.
    pub fn is_invalid(&self) -> bool {
        self.status().is_some_and(|status| status.code == 422 || status.code == 400)
    }

    /// The resource does not offer the verb.
    pub fn is_method_not_allowed(&self) -> bool {
        self.status().is_some_and(|status| status.code == 405)
    }

    /// What a user would want to read: the server's own words where there are some.
    pub fn user_message(&self) -> String {
        match (self.status(), self) {
            (Some(status), _) => status.message.clone(),
            (None, Self::Failed { source, .. }) => source.to_string(),
            (None, timed_out) => timed_out.to_string(),
        }
    }
}

/// Waits for `request` no longer than [`CALL_TIMEOUT`]. `operation` names it in errors ("create pod").
pub async fn call<T>(
    operation: &'static str,
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, ApiError> {
    match tokio::time::timeout(CALL_TIMEOUT, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(source)) => Err(ApiError::Failed { operation, source: Box::new(source) }),
        Err(_elapsed) => Err(ApiError::TimedOut { operation }),
    }
}

/// Merge-patches an object.
pub async fn merge<K>(operation: &'static str, api: &Api<K>, name: &str, patch: &Value) -> Result<K, ApiError>
where
    K: Clone + DeserializeOwned + Debug,
{
    call(operation, api.patch(name, &PatchParams::default(), &Patch::Merge(patch))).await
}

/// Merge-patches an object's status.
pub async fn merge_status<K>(operation: &'static str, api: &Api<K>, name: &str, patch: &Value) -> Result<K, ApiError>
where
    K: Clone + DeserializeOwned + Debug,
{
    call(operation, api.patch_status(name, &PatchParams::default(), &Patch::Merge(patch))).await
}

/// Merge-patches an object and reads no more than its metadata back.
pub async fn merge_metadata<K>(operation: &'static str, api: &Api<K>, name: &str, patch: &Value) -> Result<(), ApiError>
where
    K: Clone + DeserializeOwned + Debug,
{
    call(operation, api.patch_metadata(name, &PatchParams::default(), &Patch::Merge(patch))).await.map(drop)
}
