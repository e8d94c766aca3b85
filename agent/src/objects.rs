//! API objects that pods refer to: config maps, secrets, tokens, services, runtime classes. Every call is bounded in time.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{ConfigMap, Secret, Service, ServiceAccount};
use k8s_openapi::api::node::v1::RuntimeClass;
use kube::api::{Api, PostParams};
use kube::runtime::{reflector, watcher};
use oarlock_volumes::{IssuedToken, ObjectSource, SourceError, TokenOrder};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

const CALL: Duration = Duration::from_secs(10);
/// Tokens whose life is more than this far spent are fetched anew.
const TOKEN_SPENT: f64 = 0.8;

/// Fetches what pods refer to.
pub(crate) struct Objects {
    client: kube::Client,
    tokens: Mutex<HashMap<TokenOrder, (IssuedToken, Timestamp)>>,
    services: reflector::Store<Service>,
    services_synced: watch::Receiver<bool>,
}

/// An object that could not be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FetchError {
    #[error("failed to get {kind} {name:?}")]
    Api {
        kind: &'static str,
        name: String,
        #[source]
        source: kube::Error,
    },
    #[error("timed out getting {kind} {name:?}")]
    Timeout { kind: &'static str, name: String },
}

/// The watch of services that feeds [`Objects::services`].
pub(crate) struct ServiceWatch {
    client: kube::Client,
    writer: reflector::store::Writer<Service>,
    synced: watch::Sender<bool>,
}

impl Objects {
    pub(crate) fn new(client: kube::Client) -> (Arc<Self>, ServiceWatch) {
        let (services, writer) = reflector::store();
        let (synced, services_synced) = watch::channel(false);
        let objects = Self { client: client.clone(), tokens: Mutex::default(), services, services_synced };
        (Arc::new(objects), ServiceWatch { client, writer, synced })
    }

    async fn get<K>(&self, api: Api<K>, kind: &'static str, name: &str) -> Result<Option<K>, FetchError>
    where
        K: Clone + serde::de::DeserializeOwned + std::fmt::Debug,
    {
        match tokio::time::timeout(CALL, api.get_opt(name)).await {
            Ok(Ok(found)) => Ok(found),
            Ok(Err(source)) => Err(FetchError::Api { kind, name: name.to_owned(), source }),
            Err(_) => Err(FetchError::Timeout { kind, name: name.to_owned() }),
        }
    }

    pub(crate) async fn fetch_config_map(&self, ns: &str, name: &str) -> Result<Option<ConfigMap>, FetchError> {
        self.get(Api::namespaced(self.client.clone(), ns), "configmap", name).await
    }

    pub(crate) async fn fetch_secret(&self, ns: &str, name: &str) -> Result<Option<Secret>, FetchError> {
        self.get(Api::namespaced(self.client.clone(), ns), "secret", name).await
    }

    pub(crate) async fn fetch_service_account(
        &self,
        ns: &str,
        name: &str,
    ) -> Result<Option<ServiceAccount>, FetchError> {
        self.get(Api::namespaced(self.client.clone(), ns), "serviceaccount", name).await
    }

    /// The handler of a runtime class; None when there is no such class.
    pub(crate) async fn runtime_handler(&self, class: &str) -> Result<Option<String>, FetchError> {
        let api: Api<RuntimeClass> = Api::all(self.client.clone());
        Ok(self.get(api, "runtimeclass", class).await?.map(|class| class.handler))
    }

    /// All services, once they have been listed for the first time; None when that takes too long.
    pub(crate) async fn services(&self) -> Option<Vec<Service>> {
        let mut synced = self.services_synced.clone();
        let ready = tokio::time::timeout(CALL, synced.wait_for(|synced| *synced)).await;
        matches!(ready, Ok(Ok(_))).then(|| self.services.state().iter().map(|service| (**service).clone()).collect())
    }

    /// Drops what was kept for a pod.
    pub(crate) fn forget_pod(&self, uid: &str) {
        self.tokens.lock().retain(|order, _| order.pod_uid != uid);
    }

    fn kept_token(&self, order: &TokenOrder) -> Option<IssuedToken> {
        let tokens = self.tokens.lock();
        let (token, issued_at) = tokens.get(order)?;
        let life = token.expires_at.duration_since(*issued_at).as_secs_f64();
        let age = Timestamp::now().duration_since(*issued_at).as_secs_f64();
        (age < life * TOKEN_SPENT && age < 86_400.0).then(|| token.clone())
    }
}

#[async_trait]
impl ObjectSource for Objects {
    async fn config_map(&self, namespace: &str, name: &str) -> Result<Option<ConfigMap>, SourceError> {
        self.fetch_config_map(namespace, name).await.map_err(failed)
    }

    async fn secret(&self, namespace: &str, name: &str) -> Result<Option<Secret>, SourceError> {
        self.fetch_secret(namespace, name).await.map_err(failed)
    }

    async fn token(&self, order: &TokenOrder) -> Result<IssuedToken, SourceError> {
        if let Some(token) = self.kept_token(order) {
            return Ok(token);
        }
        let api: Api<ServiceAccount> = Api::namespaced(self.client.clone(), &order.namespace);
        let request = TokenRequest {
            spec: Some(TokenRequestSpec {
                audiences: order.audience.clone().map(|audience| vec![audience]),
                expiration_seconds: Some(order.expiration_seconds),
                bound_object_ref: Some(BoundObjectReference {
                    kind: Some("Pod".to_owned()),
                    api_version: Some("v1".to_owned()),
                    name: Some(order.pod_name.clone()),
                    uid: Some(order.pod_uid.clone()),
                }),
            }),
            ..Default::default()
        };
        let source_failed = |message: String| SourceError::Failed { message };
        let params = PostParams::default();
        let call =
            api.create_subresource::<TokenRequest, TokenRequest>("token", &order.service_account, &params, &request);
        let answer = tokio::time::timeout(CALL, call).await;
        let made = match answer {
            Ok(Ok(made)) => made,
            Ok(Err(error)) => return Err(source_failed(format!("failed to fetch token: {error}"))),
            Err(_) => return Err(source_failed("failed to fetch token: timed out".to_owned())),
        };
        let status = made.status.unwrap_or_default();
        let (Some(token), Some(expires_at)) = (status.token, status.expiration_timestamp) else {
            return Err(source_failed("failed to fetch token: no token in answer".to_owned()));
        };
        let token = IssuedToken { token, expires_at: expires_at.0 };
        self.tokens.lock().insert(order.clone(), (token.clone(), Timestamp::now()));
        Ok(token)
    }
}

fn failed(error: FetchError) -> SourceError {
    SourceError::Other { operation: error.to_string(), source: Box::new(error) }
}

impl ServiceWatch {
    /// Keeps the services current until `shutdown`.
    pub(crate) async fn run(self, shutdown: CancellationToken) {
        let ServiceWatch { client, mut writer, synced } = self;
        let mut delays = Delays::default();
        let mut events = watcher(Api::<Service>::all(client), watcher::Config::default()).boxed();
        loop {
            let event = tokio::select! {
                () = shutdown.cancelled() => return,
                event = events.next() => event,
            };
            match event {
                Some(Ok(event)) => {
                    // A list begins each attempt, also one that fails.
                    if !matches!(event, watcher::Event::Init) {
                        delays.reset();
                    }
                    writer.apply_watcher_event(&event);
                    if matches!(event, watcher::Event::InitDone) {
                        synced.send_replace(true);
                    }
                }
                Some(Err(error)) => {
                    tracing::debug!(%error, "service watch interrupted");
                    delays.wait(&shutdown).await;
                }
                None => return,
            }
        }
    }
}

/// Delays between attempts at a watch: short at first, so that an API server that comes back is found at once.
pub(crate) struct Delays {
    next: Duration,
    last_ok: Instant,
}

impl Default for Delays {
    fn default() -> Self {
        Self { next: Self::FIRST, last_ok: Instant::now() }
    }
}

impl Delays {
    const FIRST: Duration = Duration::from_millis(50);
    const LONGEST: Duration = Duration::from_secs(5);

    pub(crate) fn reset(&mut self) {
        self.next = Self::FIRST;
        self.last_ok = Instant::now();
    }

    /// How long nothing has worked.
    pub(crate) fn failing_for(&self) -> Duration {
        self.last_ok.elapsed()
    }

    pub(crate) async fn wait(&mut self, shutdown: &CancellationToken) {
        let jitter = self.next.mul_f64(rand::random::<f64>() * 0.2);
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = tokio::time::sleep(self.next + jitter) => {}
        }
        self.next = (self.next * 2).min(Self::LONGEST);
    }
}
