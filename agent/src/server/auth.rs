//! Who may ask: bearer tokens by TokenReview, permission by SubjectAccessReview, both remembered for a short while.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use kube::api::{Api, PostParams};
use oarlock_node_api::{Authorizer, User};
use parking_lot::Mutex;

use crate::ReviewConfig;

const CALL: Duration = Duration::from_secs(10);
const KEPT_MAX: usize = 1024;

/// A verdict and until when it holds.
type Remembered<K, V> = Mutex<HashMap<K, (V, Instant)>>;

/// Asks the API server.
pub(crate) struct ApiAuthorizer {
    client: kube::Client,
    node_name: String,
    review: ReviewConfig,
    tokens: Remembered<String, User>,
    verdicts: Remembered<(String, Vec<String>, String, String), bool>,
}

impl ApiAuthorizer {
    pub(crate) fn new(client: kube::Client, node_name: String, review: ReviewConfig) -> Self {
        Self { client, node_name, review, tokens: Mutex::default(), verdicts: Mutex::default() }
    }
}

fn recall<K: std::hash::Hash + Eq, V: Clone>(kept: &Remembered<K, V>, key: &K) -> Option<V> {
    let kept = kept.lock();
    kept.get(key).filter(|(_, until)| *until > Instant::now()).map(|(value, _)| value.clone())
}

fn remember<K: std::hash::Hash + Eq, V>(kept: &Remembered<K, V>, key: K, value: V, time: Duration) {
    let mut kept = kept.lock();
    if kept.len() >= KEPT_MAX {
        let now = Instant::now();
        kept.retain(|_, (_, until)| *until > now);
        if kept.len() >= KEPT_MAX {
            kept.clear();
        }
    }
    kept.insert(key, (value, Instant::now() + time));
}

#[async_trait]
impl Authorizer for ApiAuthorizer {
    async fn authenticate_token(&self, token: &str) -> Option<User> {
        if !self.review.tokens {
            return None;
        }
        let key = token.to_owned();
        if let Some(user) = recall(&self.tokens, &key) {
            return Some(user);
        }
        let review =
            TokenReview { spec: TokenReviewSpec { token: token.to_owned(), audiences: None }, ..Default::default() };
        let api: Api<TokenReview> = Api::all(self.client.clone());
        let answer = tokio::time::timeout(CALL, api.create(&PostParams::default(), &review)).await;
        let status = answer.ok()?.ok()?.status?;
        if status.authenticated != Some(true) {
            return None;
        }
        let found = status.user?;
        let user = User {
            name: found.username.unwrap_or_default(),
            uid: found.uid.unwrap_or_default(),
            groups: found.groups.unwrap_or_default(),
        };
        remember(&self.tokens, key, user.clone(), self.review.token_kept);
        Some(user)
    }

    async fn authorize(&self, user: &User, verb: &str, subresource: &str) -> bool {
        let key = (user.name.clone(), user.groups.clone(), verb.to_owned(), subresource.to_owned());
        if let Some(verdict) = recall(&self.verdicts, &key) {
            return verdict;
        }
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: Some(user.name.clone()),
                uid: Some(user.uid.clone()).filter(|uid| !uid.is_empty()),
                groups: Some(user.groups.clone()),
                resource_attributes: Some(ResourceAttributes {
                    verb: Some(verb.to_owned()),
                    version: Some("v1".to_owned()),
                    resource: Some("nodes".to_owned()),
                    subresource: Some(subresource.to_owned()),
                    name: Some(self.node_name.clone()),
                    ..Default::default()
                }),
                ..Default::default()
            },
            ..Default::default()
        };
        let api: Api<SubjectAccessReview> = Api::all(self.client.clone());
        match tokio::time::timeout(CALL, api.create(&PostParams::default(), &review)).await {
            Ok(Ok(answer)) => {
                let allowed = answer.status.is_some_and(|status| status.allowed);
                let time = if allowed { self.review.allowed_kept } else { self.review.denied_kept };
                remember(&self.verdicts, key, allowed, time);
                allowed
            }
            Ok(Err(error)) => {
                tracing::warn!(%error, "a request to the node could not be authorized");
                false
            }
            Err(_) => false,
        }
    }
}
