//! The fields of KubeletConfiguration that have an effect, as the file spells them. Owns no meaning.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use k8s_openapi::api::core::v1::Taint;
use serde::{Deserialize, Deserializer, Serialize};

use crate::go_duration;

/// The fields that have an effect. Absent ones keep what [`Config`] has.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct Fields {
    pub(super) kind: Option<String>,
    pub(super) api_version: Option<String>,
    pub(super) enable_debugging_handlers: Option<bool>,
    pub(super) static_pod_path: Option<PathBuf>,
    pub(super) pod_logs_dir: Option<PathBuf>,
    pub(super) address: Option<IpAddr>,
    pub(super) port: Option<u16>,
    pub(super) read_only_port: Option<u16>,
    pub(super) tls_cert_file: Option<PathBuf>,
    pub(super) tls_private_key_file: Option<PathBuf>,
    pub(super) rotate_certificates: Option<bool>,
    #[serde(rename = "serverTLSBootstrap")]
    pub(super) server_tls_bootstrap: Option<bool>,
    pub(super) authentication: Option<Authentication>,
    pub(super) authorization: Option<Authorization>,
    pub(super) cluster_domain: Option<String>,
    #[serde(rename = "clusterDNS")]
    pub(super) cluster_dns: Option<Vec<IpAddr>>,
    pub(super) node_status_update_frequency: Option<GoDuration>,
    pub(super) node_status_report_frequency: Option<GoDuration>,
    pub(super) node_lease_duration_seconds: Option<u64>,
    pub(super) node_status_max_images: Option<i32>,
    #[serde(rename = "imageMinimumGCAge")]
    pub(super) image_minimum_gc_age: Option<GoDuration>,
    #[serde(rename = "imageMaximumGCAge")]
    pub(super) image_maximum_gc_age: Option<GoDuration>,
    #[serde(rename = "imageGCHighThresholdPercent")]
    pub(super) image_gc_high_threshold_percent: Option<u8>,
    #[serde(rename = "imageGCLowThresholdPercent")]
    pub(super) image_gc_low_threshold_percent: Option<u8>,
    pub(super) cgroup_driver: Option<String>,
    pub(super) cgroup_root: Option<String>,
    #[serde(rename = "cgroupsPerQOS")]
    pub(super) cgroups_per_qos: Option<bool>,
    pub(super) cpu_manager_policy: Option<String>,
    pub(super) cpu_manager_policy_options: Option<BTreeMap<String, String>>,
    pub(super) cpu_manager_reconcile_period: Option<GoDuration>,
    #[serde(rename = "reservedSystemCPUs")]
    pub(super) reserved_system_cpus: Option<String>,
    pub(super) memory_manager_policy: Option<String>,
    pub(super) reserved_memory: Option<Vec<ReservedMemory>>,
    pub(super) topology_manager_policy: Option<String>,
    pub(super) topology_manager_scope: Option<String>,
    pub(super) topology_manager_policy_options: Option<BTreeMap<String, String>>,
    pub(super) max_pods: Option<u32>,
    pub(super) pods_per_core: Option<u32>,
    pub(super) pod_pids_limit: Option<i64>,
    pub(super) allowed_unsafe_sysctls: Option<Vec<String>>,
    pub(super) user_namespaces: Option<UserNamespaces>,
    pub(super) resolv_conf: Option<PathBuf>,
    #[serde(rename = "cpuCFSQuota")]
    pub(super) cpu_cfs_quota: Option<bool>,
    #[serde(rename = "cpuCFSQuotaPeriod")]
    pub(super) cpu_cfs_quota_period: Option<GoDuration>,
    pub(super) serialize_image_pulls: Option<bool>,
    pub(super) max_parallel_image_pulls: Option<usize>,
    pub(super) eviction_hard: Option<BTreeMap<String, String>>,
    pub(super) eviction_soft: Option<BTreeMap<String, String>>,
    pub(super) eviction_soft_grace_period: Option<BTreeMap<String, String>>,
    pub(super) eviction_pressure_transition_period: Option<GoDuration>,
    pub(super) eviction_max_pod_grace_period: Option<u64>,
    pub(super) eviction_minimum_reclaim: Option<BTreeMap<String, String>>,
    pub(super) merge_default_eviction_settings: Option<bool>,
    pub(super) fail_swap_on: Option<bool>,
    pub(super) memory_swap: Option<MemorySwap>,
    pub(super) container_log_max_size: Option<String>,
    pub(super) container_log_max_files: Option<usize>,
    pub(super) container_log_monitor_interval: Option<GoDuration>,
    pub(super) system_reserved: Option<BTreeMap<String, String>>,
    pub(super) kube_reserved: Option<BTreeMap<String, String>>,
    pub(super) enforce_node_allocatable: Option<Vec<String>>,
    pub(super) system_reserved_cgroup: Option<String>,
    pub(super) kube_reserved_cgroup: Option<String>,
    pub(super) crash_loop_back_off: Option<CrashLoopBackOff>,
    pub(super) shutdown_grace_period: Option<GoDuration>,
    pub(super) shutdown_grace_period_critical_pods: Option<GoDuration>,
    pub(super) shutdown_grace_period_by_pod_priority: Option<Vec<ByPodPriority>>,
    pub(super) seccomp_default: Option<bool>,
    pub(super) register_with_taints: Option<Vec<Taint>>,
    pub(super) register_node: Option<bool>,
    pub(super) provider_id: Option<String>,
    pub(super) container_runtime_endpoint: Option<String>,
    pub(super) image_service_endpoint: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct Authentication {
    pub(super) x509: Option<X509>,
    pub(super) webhook: Option<Webhook>,
    pub(super) anonymous: Option<Switch>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct X509 {
    #[serde(rename = "clientCAFile")]
    pub(super) client_ca_file: Option<PathBuf>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct Webhook {
    pub(super) enabled: Option<bool>,
    #[serde(rename = "cacheTTL")]
    pub(super) cache_ttl: Option<GoDuration>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct Switch {
    pub(super) enabled: Option<bool>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct Authorization {
    pub(super) mode: Option<String>,
    pub(super) webhook: Option<AuthorizationWebhook>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct AuthorizationWebhook {
    #[serde(rename = "cacheAuthorizedTTL")]
    pub(super) cache_authorized_ttl: Option<GoDuration>,
    #[serde(rename = "cacheUnauthorizedTTL")]
    pub(super) cache_unauthorized_ttl: Option<GoDuration>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct ReservedMemory {
    pub(super) numa_node: u32,
    pub(super) limits: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct UserNamespaces {
    pub(super) ids_per_pod: Option<i64>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct MemorySwap {
    pub(super) swap_behavior: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct ByPodPriority {
    pub(super) priority: i32,
    pub(super) shutdown_grace_period_seconds: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct CrashLoopBackOff {
    pub(super) max_container_restart_period: Option<GoDuration>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct GoDuration(pub(super) Duration);

impl<'de> Deserialize<'de> for GoDuration {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        let duration = go_duration::parse(&text);
        duration
            .map(GoDuration)
            .ok_or_else(|| serde::de::Error::custom(format!("{text:?} is not a duration such as 5m0s")))
    }
}

impl Serialize for GoDuration {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&go_duration::show(self.0))
    }
}
