//! Where volume contents come from: the API objects and tokens that the agent fetches or caches.

use async_trait::async_trait;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};

/// A service-account token order, bound to a pod.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TokenOrder {
    pub namespace: String,
    pub service_account: String,
    /// None asks for the API server's own audience.
    pub audience: Option<String>,
    pub expiration_seconds: i64,
    pub pod_name: String,
    pub pod_uid: String,
}

/// A token with its end of life.
#[derive(Clone)]
pub struct IssuedToken {
    pub token: String,
    pub expires_at: Timestamp,
}

impl std::fmt::Debug for IssuedToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IssuedToken").field("token", &"<redacted>").field("expires_at", &self.expires_at).finish()
    }
}

/// Why an object could not be had. An object that does not exist is `Ok(None)`, not an error.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("{message}")]
    Failed { message: String },
    #[error("{operation}")]
    Other {
        operation: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Gives volumes their contents. Calls must be bounded in time by the implementation.
#[async_trait]
pub trait ObjectSource: Send + Sync {
    async fn config_map(&self, namespace: &str, name: &str) -> Result<Option<ConfigMap>, SourceError>;
    async fn secret(&self, namespace: &str, name: &str) -> Result<Option<Secret>, SourceError>;
    async fn token(&self, order: &TokenOrder) -> Result<IssuedToken, SourceError>;
}
