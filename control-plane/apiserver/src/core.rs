//! What every request handler shares, and the context of one request.

use std::sync::Arc;

use http::HeaderMap;
use oarlock_kinds::Kind;
use oarlock_store::{Op, Outcome, Store, StoreError};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::Config;
use crate::authz::rbac::Rbac;
use crate::discovery::Discovery;
use crate::error::{ApiError, ApiResult};
use crate::kubelet::Kubelets;
use crate::metrics::Metrics;
use crate::negotiate::Accept;
use crate::object;
use crate::request::RequestInfo;
use crate::resource_metrics::ResourceMetrics;
use crate::strategy::services::Allocator;
use crate::tokens::Tokens;
use crate::user::User;

/// The server's insides.
pub(crate) struct Core {
    pub(crate) config: Config,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) tokens: Tokens,
    pub(crate) rbac: Rbac,
    pub(crate) discovery: Discovery,
    pub(crate) services: Allocator,
    pub(crate) kubelets: Kubelets,
    pub(crate) metrics: Metrics,
    pub(crate) resource_metrics: ResourceMetrics,
    /// Places for requests that are being worked on; watches and connections through to nodes take none.
    pub(crate) places: Semaphore,
    /// Cancelled when the server stops: ends watches and other endless answers.
    pub(crate) stopping: CancellationToken,
}

impl Core {
    /// Carries out one write. A lost race is `Ok(None)`, so that the caller can look again.
    pub(crate) async fn try_commit(&self, kind: &Kind, name: &str, op: Op) -> ApiResult<Option<Outcome>> {
        match self.store.txn(vec![op]).await {
            Ok(mut outcomes) => Ok(outcomes.pop()),
            Err(StoreError::Conflict { .. }) => Ok(None),
            Err(error) => Err(ApiError::from_store(&error, kind, name)),
        }
    }
}

/// One request, authenticated and authorized.
pub(crate) struct Context {
    pub(crate) core: Arc<Core>,
    pub(crate) user: User,
    pub(crate) info: RequestInfo,
    pub(crate) accept: Accept,
    pub(crate) headers: HeaderMap,
    pub(crate) dry_run: bool,
    /// Become `Warning` headers.
    pub(crate) warnings: Vec<String>,
}

impl Context {
    /// Who is changing fields: the `fieldManager` parameter or the start of the user agent.
    pub(crate) fn field_manager(&self) -> String {
        if let Some(manager) = self.info.query.get("fieldManager") {
            return manager.to_owned();
        }
        let agent =
            self.headers.get(http::header::USER_AGENT).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let first = agent.split('/').next().unwrap_or_default();
        let manager: String = first.chars().filter(|c| !c.is_control()).take(128).collect();
        if manager.is_empty() { "unknown".into() } else { manager }
    }
}

/// The object (or collection, with an empty name) a request is about.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) kind: &'static Kind,
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) subresource: Option<String>,
}

impl Target {
    pub(crate) fn key(&self) -> String {
        object::key(self.kind, &self.namespace, &self.name)
    }

    pub(crate) fn not_found(&self) -> ApiError {
        ApiError::not_found(self.kind, &self.name)
    }
}
