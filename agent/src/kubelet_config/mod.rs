//! KubeletConfiguration: its fields under their upstream names, read strictly and put into [`Config`]. Pure.
//!
//! A field that does not exist is refused, and so is one that exists upstream and would be promised but not kept here. Those
//! that events or the runtime have made meaningless are taken and named in [`KubeletConfiguration::without_effect`].

mod assignment;
mod fields;
mod reservations;

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Deserializer};
use serde_json::Value;

use self::fields::{ByPodPriority, Fields, GoDuration};
use crate::{AllowedSysctls, Config, EvictionConfig, EvictionConfigError, ShutdownConfig, go_duration, users};

/// Fields that are taken and change nothing.
const WITHOUT_EFFECT: &[&str] = &[
    "configMapAndSecretChangeDetectionStrategy",
    "containerLogMaxWorkers",
    "contentType",
    "enableContentionProfiling",
    "enableControllerAttachDetach",
    "enableDebugFlagsHandler",
    "enableProfilingHandler",
    "eventBurst",
    "eventRecordQPS",
    "failCgroupV1",
    "featureGates",
    "fileCheckFrequency",
    "hairpinMode",
    "healthzBindAddress",
    "healthzPort",
    "httpCheckFrequency",
    "iptablesDropBit",
    "iptablesMasqueradeBit",
    "kernelMemcgNotification",
    "kubeAPIBurst",
    "kubeAPIQPS",
    "kubeletCgroups",
    "localStorageCapacityIsolation",
    "logging",
    "makeIPTablesUtilChains",
    "maxOpenFiles",
    "oomScoreAdj",
    "registryBurst",
    "registryPullQPS",
    "runtimeRequestTimeout",
    "streamingConnectionIdleTimeout",
    "syncFrequency",
    "volumeStatsAggPeriod",
];

/// Fields that exist and are refused, since nothing here would keep their promise.
const UNSUPPORTED: &[&str] = &[
    "enableServer",
    "enableSystemLogHandler",
    "enableSystemLogQuery",
    "imagePullCredentialsVerificationPolicy",
    "memoryThrottlingFactor",
    "podCIDR",
    "preloadedImagesVerificationAllowlist",
    "protectKernelDefaults",
    "qosReserved",
    "runOnce",
    "showHiddenMetricsForVersion",
    "singleProcessOOMKill",
    "staticPodURL",
    "staticPodURLHeader",
    "systemCgroups",
    "tlsCipherSuites",
    "tlsMinVersion",
    "tracing",
    "volumePluginDir",
];

/// A KubeletConfiguration as written.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct KubeletConfiguration {
    fields: Fields,
    without_effect: Vec<String>,
}

/// A KubeletConfiguration that cannot be used. Display names the field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KubeletConfigError {
    #[error("{0}")]
    Form(String),
    #[error("{field}: this agent does not implement the field")]
    Unsupported { field: String },
    #[error("{field}: {problem}")]
    Field { field: &'static str, problem: String },
    #[error(transparent)]
    Eviction(#[from] EvictionConfigError),
}

impl<'de> Deserialize<'de> for KubeletConfiguration {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Self::from_value(Value::deserialize(from)?).map_err(serde::de::Error::custom)
    }
}

fn wrong(field: &'static str, problem: impl Into<String>) -> KubeletConfigError {
    KubeletConfigError::Field { field, problem: problem.into() }
}

impl KubeletConfiguration {
    fn from_value(mut value: Value) -> Result<Self, KubeletConfigError> {
        let mut without_effect = Vec::new();
        if let Value::Object(map) = &mut value {
            if let Some(field) = map.keys().find(|name| UNSUPPORTED.contains(&name.as_str())) {
                return Err(KubeletConfigError::Unsupported { field: field.clone() });
            }
            without_effect = map.keys().filter(|name| WITHOUT_EFFECT.contains(&name.as_str())).cloned().collect();
            map.retain(|name, _| !WITHOUT_EFFECT.contains(&name.as_str()));
        }
        let fields: Fields =
            serde_json::from_value(value).map_err(|error| KubeletConfigError::Form(error.to_string()))?;
        if fields.kind.as_deref().is_some_and(|kind| kind != "KubeletConfiguration") {
            return Err(wrong("kind", "must be KubeletConfiguration"));
        }
        if fields.api_version.as_deref().is_some_and(|version| version != "kubelet.config.k8s.io/v1beta1") {
            return Err(wrong("apiVersion", "must be kubelet.config.k8s.io/v1beta1"));
        }
        Ok(Self { fields, without_effect })
    }

    /// Fields that were given and change nothing here.
    pub fn without_effect(&self) -> &[String] {
        &self.without_effect
    }

    /// The fields as given, for `/configz`.
    pub(crate) fn given(&self) -> Value {
        let mut value = serde_json::to_value(&self.fields).unwrap_or_default();
        if let Value::Object(map) = &mut value {
            map.retain(|_, value| !value.is_null());
        }
        value
    }

    /// Checks the fields and puts them into `config`.
    pub fn apply(&self, config: &mut Config) -> Result<(), KubeletConfigError> {
        let fields = self.fields.clone();
        fields.check_fixed()?;
        fields.eviction(&mut config.eviction)?;
        fields.images_and_logs(config)?;
        fields.resources(config)?;
        fields.reservations(config)?;
        fields.assignment(config)?;
        fields.shutdown(config)?;
        fields.plain(config)?;
        config.kubelet = self.clone();
        Ok(())
    }
}

impl Fields {
    /// Fields that may only say what is so anyway.
    fn check_fixed(&self) -> Result<(), KubeletConfigError> {
        let only = |ok: bool, field: &'static str, problem: &str| if ok { Ok(()) } else { Err(wrong(field, problem)) };
        only(self.read_only_port.unwrap_or(0) == 0, "readOnlyPort", "nothing is served without authentication")?;
        only(self.register_node != Some(false), "registerNode", "the node registers itself")?;
        let authentication = self.authentication.clone().unwrap_or_default();
        let anonymous = authentication.anonymous.unwrap_or_default().enabled;
        only(anonymous != Some(true), "authentication.anonymous.enabled", "nobody is served without authentication")?;
        let mode = self.authorization.clone().unwrap_or_default().mode;
        only(
            mode.as_deref().is_none_or(|mode| mode == "Webhook"),
            "authorization.mode",
            "only Webhook is implemented",
        )?;
        let same =
            self.image_service_endpoint.is_none() || self.image_service_endpoint == self.container_runtime_endpoint;
        only(same, "imageServiceEndpoint", "images come from containerRuntimeEndpoint")
    }

    fn eviction(&self, eviction: &mut EvictionConfig) -> Result<(), KubeletConfigError> {
        let merge = self.merge_default_eviction_settings.unwrap_or(false);
        let defaults = eviction.thresholds.clone();
        let texts = |map: &Option<BTreeMap<String, String>>| map.clone().unwrap_or_default();
        eviction.set(
            self.eviction_hard.as_ref(),
            &texts(&self.eviction_soft),
            &texts(&self.eviction_soft_grace_period),
            &texts(&self.eviction_minimum_reclaim),
            go_duration::parse,
        )?;
        if merge && let Some(hard) = &self.eviction_hard {
            let missing = defaults.into_iter().filter(|threshold| !hard.contains_key(threshold.signal.name()));
            eviction.thresholds.extend(missing);
        }
        if let Some(GoDuration(period)) = self.eviction_pressure_transition_period {
            eviction.transition_period = period;
        }
        if let Some(seconds) = self.eviction_max_pod_grace_period {
            eviction.max_pod_grace = Duration::from_secs(seconds);
        }
        Ok(())
    }

    fn images_and_logs(&self, config: &mut Config) -> Result<(), KubeletConfigError> {
        let gc = &mut config.image_gc;
        gc.high_percent = self.image_gc_high_threshold_percent.unwrap_or(gc.high_percent);
        gc.low_percent = self.image_gc_low_threshold_percent.unwrap_or(gc.low_percent);
        if gc.high_percent > 100 {
            return Err(wrong("imageGCHighThresholdPercent", "must be between 0 and 100"));
        }
        if gc.low_percent >= gc.high_percent {
            return Err(wrong("imageGCLowThresholdPercent", "must be less than imageGCHighThresholdPercent"));
        }
        gc.min_age = self.image_minimum_gc_age.map_or(gc.min_age, |age| age.0);
        gc.max_age = self.image_maximum_gc_age.map_or(gc.max_age, |age| Some(age.0).filter(|age| !age.is_zero()));
        if gc.max_age.is_some_and(|age| age <= gc.min_age) {
            return Err(wrong("imageMaximumGCAge", "must be greater than imageMinimumGCAge"));
        }
        if let Some(text) = &self.container_log_max_size {
            let bytes =
                oarlock_quantity::units(text).and_then(|bytes| u64::try_from(bytes).ok()).filter(|bytes| *bytes > 0);
            let bad = || wrong("containerLogMaxSize", format!("{text:?} is not a positive quantity"));
            config.container_log_max_bytes = bytes.ok_or_else(bad)?;
        }
        if let Some(files) = self.container_log_max_files {
            if files <= 1 {
                return Err(wrong("containerLogMaxFiles", "must be greater than 1"));
            }
            config.container_log_max_files = files;
        }
        if let Some(GoDuration(interval)) = self.container_log_monitor_interval {
            if interval < Duration::from_secs(3) {
                return Err(wrong("containerLogMonitorInterval", "must be at least 3s"));
            }
            config.container_log_period = interval;
        }
        match (self.serialize_image_pulls, self.max_parallel_image_pulls) {
            (Some(true), Some(pulls)) if pulls > 1 => {
                return Err(wrong(
                    "maxParallelImagePulls",
                    "cannot be larger than 1 unless serializeImagePulls is false",
                ));
            }
            (_, Some(0)) => return Err(wrong("maxParallelImagePulls", "must be a positive number")),
            (Some(true), _) => config.max_parallel_image_pulls = 1,
            (_, Some(pulls)) => config.max_parallel_image_pulls = pulls,
            _ => {}
        }
        Ok(())
    }

    fn resources(&self, config: &mut Config) -> Result<(), KubeletConfigError> {
        if let Some(length) = self.user_namespaces.as_ref().and_then(|users| users.ids_per_pod) {
            let fits = |length: &u32| *length > 0 && length.is_multiple_of(users::UNIT);
            let length = u32::try_from(length).ok().filter(fits);
            let bad = || wrong("userNamespaces.idsPerPod", "must be a multiple of 65536, above 0 and below 4294967296");
            config.ids_per_pod = length.ok_or_else(bad)?;
        }
        if let Some(patterns) = &self.allowed_unsafe_sysctls {
            let allowed = AllowedSysctls::new(patterns);
            config.allowed_sysctls = allowed.map_err(|error| wrong("allowedUnsafeSysctls", error.to_string()))?;
        }
        if let Some(limit) = self.pod_pids_limit {
            config.pod_pids_limit = Some(limit).filter(|limit| *limit > 0);
        }
        config.cpu_cfs_quota = self.cpu_cfs_quota.unwrap_or(config.cpu_cfs_quota);
        if let Some(GoDuration(period)) = self.cpu_cfs_quota_period {
            if !(Duration::from_millis(1)..=Duration::from_secs(1)).contains(&period) {
                return Err(wrong("cpuCFSQuotaPeriod", "must be between 1ms and 1s, inclusive"));
            }
            config.cpu_cfs_quota_period = period;
        }
        if let Some(GoDuration(longest)) =
            self.crash_loop_back_off.as_ref().and_then(|c| c.max_container_restart_period)
        {
            if !(Duration::from_secs(1)..=Duration::from_secs(300)).contains(&longest) {
                return Err(wrong(
                    "crashLoopBackOff.maxContainerRestartPeriod",
                    "must be between 1s and 300s, inclusive",
                ));
            }
            config.max_restart_delay = longest;
        }
        config.max_pods = self.max_pods.unwrap_or(config.max_pods);
        config.pods_per_core = self.pods_per_core.unwrap_or(config.pods_per_core);
        config.fail_swap_on = self.fail_swap_on.unwrap_or(config.fail_swap_on);
        config.seccomp_default = self.seccomp_default.unwrap_or(config.seccomp_default);
        Ok(())
    }

    fn shutdown(&self, config: &mut Config) -> Result<(), KubeletConfigError> {
        let whole = self.shutdown_grace_period.map(|period| period.0);
        let critical = self.shutdown_grace_period_critical_pods.map_or(Duration::ZERO, |period| period.0);
        if let Some(groups) = self.shutdown_grace_period_by_pod_priority.as_ref().filter(|groups| !groups.is_empty()) {
            if whole.is_some() || !critical.is_zero() {
                let problem = "cannot be set together with shutdownGracePeriod or shutdownGracePeriodCriticalPods";
                return Err(wrong("shutdownGracePeriodByPodPriority", problem));
            }
            let group =
                |group: &ByPodPriority| (group.priority, Duration::from_secs(group.shutdown_grace_period_seconds));
            config.shutdown.groups = groups.iter().map(group).collect();
            config.shutdown.groups.sort_unstable();
        } else if whole.is_some() || !critical.is_zero() {
            let longer = || wrong("shutdownGracePeriodCriticalPods", "must be <= shutdownGracePeriod");
            let groups = ShutdownConfig::of_periods(whole.unwrap_or_default(), critical);
            config.shutdown.groups = groups.ok_or_else(longer)?;
        }
        Ok(())
    }

    fn plain(self, config: &mut Config) -> Result<(), KubeletConfigError> {
        fn set<T>(target: &mut T, value: Option<T>) {
            if let Some(value) = value {
                *target = value;
            }
        }
        if let Some(endpoint) = self.container_runtime_endpoint {
            let path = endpoint.strip_prefix("unix://").filter(|path| path.starts_with('/'));
            let bad = || wrong("containerRuntimeEndpoint", format!("{endpoint:?} is not unix:// and an absolute path"));
            config.runtime_endpoint = path.ok_or_else(bad)?.into();
        }
        if let Some(dir) = self.static_pod_path {
            config.static_pod_dir = Some(dir).filter(|dir| !dir.as_os_str().is_empty());
        }
        set(&mut config.pod_logs_dir, self.pod_logs_dir);
        if let Some(address) = self.address {
            config.listen.set_ip(address);
        }
        if let Some(port) = self.port {
            config.listen.set_port(port);
        }
        set(&mut config.cert_file, self.tls_cert_file);
        set(&mut config.key_file, self.tls_private_key_file);
        set(&mut config.debugging_handlers, self.enable_debugging_handlers);
        let authentication = self.authentication.unwrap_or_default();
        let (tokens, verdicts) = (
            authentication.webhook.unwrap_or_default(),
            self.authorization.and_then(|a| a.webhook).unwrap_or_default(),
        );
        set(&mut config.review.tokens, tokens.enabled);
        set(&mut config.review.token_kept, tokens.cache_ttl.map(|period| period.0));
        set(&mut config.review.allowed_kept, verdicts.cache_authorized_ttl.map(|period| period.0));
        set(&mut config.review.denied_kept, verdicts.cache_unauthorized_ttl.map(|period| period.0));
        set(&mut config.client_ca_file, authentication.x509.and_then(|x509| x509.client_ca_file));
        set(&mut config.cluster_domain, self.cluster_domain);
        set(&mut config.cluster_dns, self.cluster_dns);
        set(&mut config.node_status_update_period, self.node_status_update_frequency.map(|period| period.0));
        set(&mut config.node_status_report_period, self.node_status_report_frequency.map(|period| period.0));
        if let Some(seconds) = self.node_lease_duration_seconds {
            if seconds == 0 {
                return Err(wrong("nodeLeaseDurationSeconds", "must be greater than 0"));
            }
            config.node_lease_duration = Duration::from_secs(seconds);
        }
        if let Some(most) = self.node_status_max_images {
            config.node_status_max_images = usize::try_from(most).unwrap_or(usize::MAX);
        }
        set(&mut config.cgroup_root, self.cgroup_root);
        set(&mut config.cgroups_per_qos, self.cgroups_per_qos);
        config.systemd_cgroups = match self.cgroup_driver.as_deref() {
            None => config.systemd_cgroups,
            Some("systemd") => true,
            Some("cgroupfs") => false,
            Some(_) => return Err(wrong("cgroupDriver", "must be cgroupfs or systemd")),
        };
        set(&mut config.resolv_conf, self.resolv_conf);
        set(&mut config.rotate_certificates, self.rotate_certificates);
        set(&mut config.server_tls_bootstrap, self.server_tls_bootstrap);
        set(&mut config.register_with_taints, self.register_with_taints);
        if self.provider_id.is_some() {
            config.provider_id = self.provider_id;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
