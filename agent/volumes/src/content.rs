//! Gathers what a volume of API objects contains: fetches, then projects.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    ConfigMapProjection, Pod, ProjectedVolumeSource, SecretProjection, ServiceAccountTokenProjection, Volume,
    VolumeProjection,
};

use crate::error::VolumeError;
use crate::manager::PodFacts;
use crate::payload::{self, FileProjection, KeySelection, Payload, mode_or_default};
use crate::plan;
use crate::source::{ObjectSource, TokenOrder};
use crate::tokens::TokenCache;

const DEFAULT_TOKEN_SECONDS: i64 = 3600;

/// Fetches for one pod.
pub(crate) struct Gatherer<'a> {
    pub source: &'a dyn ObjectSource,
    pub tokens: &'a TokenCache,
    pub pod: &'a Pod,
    pub facts: &'a PodFacts,
    pub now: Timestamp,
}

impl Gatherer<'_> {
    /// The files of a configMap, secret, downwardAPI or projected volume.
    pub async fn gather(&self, volume: &Volume) -> Result<Payload, VolumeError> {
        if let Some(source) = &volume.config_map {
            let selection = KeySelection {
                kind: "config",
                items: source.items.as_deref().unwrap_or_default(),
                default_mode: mode_or_default(source.default_mode),
                optional: source.optional.unwrap_or(false),
            };
            return self.config_map(&source.name, &selection).await;
        }
        if let Some(source) = &volume.secret {
            let selection = KeySelection {
                kind: "secret",
                items: source.items.as_deref().unwrap_or_default(),
                default_mode: mode_or_default(source.default_mode),
                optional: source.optional.unwrap_or(false),
            };
            return self.secret(source.secret_name.as_deref().unwrap_or_default(), &selection).await;
        }
        if let Some(source) = &volume.downward_api {
            let items = source.items.as_deref().unwrap_or_default();
            return payload::downward_api(items, mode_or_default(source.default_mode), self.pod, self.facts);
        }
        match &volume.projected {
            Some(source) => self.projected(&volume.name, source).await,
            None => Ok(Payload::new()),
        }
    }

    fn namespace(&self) -> &str {
        self.pod.metadata.namespace.as_deref().unwrap_or("default")
    }

    async fn config_map(&self, name: &str, selection: &KeySelection<'_>) -> Result<Payload, VolumeError> {
        let fetched = self.source.config_map(self.namespace(), name).await;
        match fetched.map_err(|source| self.fetch_failed("configmap", name, source))? {
            Some(object) => selection.config_map(&object),
            None if selection.optional => Ok(Payload::new()),
            None => Err(self.not_found("configmap", name)),
        }
    }

    async fn secret(&self, name: &str, selection: &KeySelection<'_>) -> Result<Payload, VolumeError> {
        let fetched = self.source.secret(self.namespace(), name).await;
        match fetched.map_err(|source| self.fetch_failed("secret", name, source))? {
            Some(object) => selection.secret(&object),
            None if selection.optional => Ok(Payload::new()),
            None => Err(self.not_found("secret", name)),
        }
    }

    async fn projected(&self, volume: &str, source: &ProjectedVolumeSource) -> Result<Payload, VolumeError> {
        let default_mode = mode_or_default(source.default_mode);
        let mut payload = Payload::new();
        for projection in source.sources.iter().flatten() {
            payload.extend(self.projection(volume, projection, default_mode).await?);
        }
        Ok(payload)
    }

    async fn projection(&self, volume: &str, projection: &VolumeProjection, mode: u32) -> Result<Payload, VolumeError> {
        if let Some(ConfigMapProjection { items, name, optional }) = &projection.config_map {
            let items = items.as_deref().unwrap_or_default();
            let optional = optional.unwrap_or(false);
            let selection = KeySelection { kind: "config", items, default_mode: mode, optional };
            return self.config_map(name, &selection).await;
        }
        if let Some(SecretProjection { items, name, optional }) = &projection.secret {
            let items = items.as_deref().unwrap_or_default();
            let optional = optional.unwrap_or(false);
            let selection = KeySelection { kind: "secret", items, default_mode: mode, optional };
            return self.secret(name, &selection).await;
        }
        if let Some(source) = &projection.downward_api {
            return payload::downward_api(source.items.as_deref().unwrap_or_default(), mode, self.pod, self.facts);
        }
        if let Some(source) = &projection.service_account_token {
            return self.token(source, mode).await;
        }
        let value = serde_json::to_value(projection).unwrap_or_default();
        let kind = value.as_object().and_then(|object| object.keys().next().cloned()).unwrap_or_else(|| "empty".into());
        Err(VolumeError::Unsupported { volume: volume.to_string(), kind: format!("projected {kind}") })
    }

    /// With a user or a group to give the file to, it is nobody else's to read (the group's mode comes with fsGroup).
    async fn token(&self, projection: &ServiceAccountTokenProjection, mode: u32) -> Result<Payload, VolumeError> {
        let metadata = &self.pod.metadata;
        let account = self.pod.spec.as_ref().and_then(|spec| spec.service_account_name.clone());
        let order = TokenOrder {
            namespace: self.namespace().to_string(),
            service_account: account.filter(|name| !name.is_empty()).unwrap_or_else(|| "default".to_string()),
            audience: projection.audience.clone().filter(|audience| !audience.is_empty()),
            expiration_seconds: projection.expiration_seconds.unwrap_or(DEFAULT_TOKEN_SECONDS),
            pod_name: metadata.name.clone().unwrap_or_default(),
            pod_uid: metadata.uid.clone().unwrap_or_default(),
        };
        let issued = self.tokens.get(self.source, &order, self.now).await.map_err(|source| VolumeError::Token {
            namespace: order.namespace.clone(),
            name: order.service_account.clone(),
            source,
        })?;
        let owner_uid = plan::common_user(self.pod);
        let has_group = self.pod.spec.as_ref().and_then(|spec| spec.security_context.as_ref()?.fs_group).is_some();
        let mode = if owner_uid.is_some() || has_group { 0o600 } else { mode };
        let path = payload::clean_path(&projection.path)?;
        Ok(Payload::from([(path, FileProjection { data: issued.token.into_bytes(), mode, owner_uid })]))
    }

    fn not_found(&self, kind: &'static str, name: &str) -> VolumeError {
        VolumeError::ObjectNotFound { kind, namespace: self.namespace().to_string(), name: name.to_string() }
    }

    fn fetch_failed(&self, kind: &'static str, name: &str, source: crate::source::SourceError) -> VolumeError {
        VolumeError::Fetch { kind, namespace: self.namespace().to_string(), name: name.to_string(), source }
    }
}
