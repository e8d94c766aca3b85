//! What the agent is told on start: names, addresses, files and limits. Owns the defaults; reads nothing but the kubeconfig.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use k8s_openapi::api::core::v1::Taint;

use crate::{
    AllowedSysctls, AssignmentConfig, EnforcedGroup, EvictionConfig, ImageGcConfig, KubeletConfiguration,
    ShutdownConfig,
};

/// Everything the agent needs to know. Start from [`Config::new`] and change what differs.
#[derive(Debug, Clone)]
pub struct Config {
    pub node_name: String,
    /// The node's InternalIP and the host address of its pods.
    pub node_ip: IpAddr,
    /// The node's address of the other family, in a dual-stack cluster.
    pub second_node_ip: Option<IpAddr>,
    pub kubeconfig: PathBuf,
    /// Used where `kubeconfig` does not exist, to get the node's first certificate.
    pub bootstrap_kubeconfig: Option<PathBuf>,
    /// rotateCertificates: the client certificate is replaced before it ends.
    pub rotate_certificates: bool,
    /// serverTLSBootstrap: the serving certificate is asked for by a request, and replaced before it ends.
    pub server_tls_bootstrap: bool,
    /// The CRI socket.
    pub runtime_endpoint: PathBuf,
    /// `<data_dir>/pods` holds pod volumes, `<data_dir>/agent` the agent's own small records.
    pub data_dir: PathBuf,
    /// Where plugins of a kubelet look for it: `device-plugins`, `plugins_registry`, `pod-resources`, and state files.
    pub kubelet_dir: PathBuf,
    pub pod_logs_dir: PathBuf,
    /// Where `<pod>_<namespace>_<container>-<id>.log` symbolic links are kept; None keeps none.
    pub container_logs_dir: Option<PathBuf>,
    /// Where the :10250 API listens; the node reports this port.
    pub listen: SocketAddr,
    pub cert_file: PathBuf,
    pub key_file: PathBuf,
    pub client_ca_file: PathBuf,
    pub cluster_dns: Vec<IpAddr>,
    pub cluster_domain: String,
    /// The resolver configuration that pods with DNS policy Default inherit.
    pub resolv_conf: PathBuf,
    pub max_pods: u32,
    /// At most so many pods for each processor; 0 is no such limit.
    pub pods_per_core: u32,
    /// A directory of pod manifests, or one manifest, to run without an API server.
    pub static_pod_dir: Option<PathBuf>,
    /// Whether the node's API serves logs and sessions in containers.
    pub debugging_handlers: bool,
    /// How those who ask the node's API are told apart.
    pub review: ReviewConfig,
    pub node_labels: BTreeMap<String, String>,
    pub register_with_taints: Vec<Taint>,
    /// Cgroup under which `kubepods` is made; empty is the root.
    pub cgroup_root: String,
    /// cgroupDriver: cgroups are slices of systemd, unless the runtime says how it makes them.
    pub systemd_cgroups: bool,
    /// Makes `kubepods` cgroups with limits. Off, the runtime's defaults apply.
    pub cgroups_per_qos: bool,
    /// Kept away from pods: capacity minus this is allocatable.
    pub reserved_cpu_millis: u64,
    pub reserved_memory_bytes: u64,
    pub reserved_storage_bytes: u64,
    /// enforceNodeAllocatable names pods: they get no more than what is allocatable.
    pub enforce_pods: bool,
    /// Groups of the system's and the node's own daemons that are held to their reservations.
    pub enforced: Vec<EnforcedGroup>,
    /// The most processes of a pod; None is no limit.
    pub pod_pids_limit: Option<i64>,
    /// Kernel parameters that pods may set beside the safe ones.
    pub allowed_sysctls: AllowedSysctls,
    /// Ids of a pod in a user namespace of its own; a multiple of 65536.
    pub ids_per_pod: u32,
    /// Whether CPU limits are enforced, and over which period.
    pub cpu_cfs_quota: bool,
    pub cpu_cfs_quota_period: Duration,
    /// Lets Burstable pods use swap (memorySwap.swapBehavior LimitedSwap); otherwise no pod does.
    pub limited_swap: bool,
    /// Refuses to start where swap is on.
    pub fail_swap_on: bool,
    /// Containers without a seccomp profile get the runtime's.
    pub seccomp_default: bool,
    /// The longest delay before a container that keeps ending is started again.
    pub max_restart_delay: Duration,
    pub max_parallel_image_pulls: usize,
    /// A CredentialProviderConfig and the directory of its plugins, for pulling images.
    pub credential_providers: Option<(PathBuf, PathBuf)>,
    /// A container log is rotated past this size.
    pub container_log_max_bytes: u64,
    /// Rotated files kept, the current one included.
    pub container_log_max_files: usize,
    /// How often log sizes are looked at.
    pub container_log_period: Duration,
    /// How often the node is looked at.
    pub node_status_update_period: Duration,
    /// The most images that the node's status lists.
    pub node_status_max_images: usize,
    pub provider_id: Option<String>,
    /// How often an unchanged node status is sent anyway.
    pub node_status_report_period: Duration,
    pub node_lease_duration: Duration,
    /// When pods are ended because the node runs short.
    pub eviction: EvictionConfig,
    pub image_gc: ImageGcConfig,
    /// Processors, memory and devices for containers of their own.
    pub assignment: AssignmentConfig,
    pub shutdown: ShutdownConfig,
    /// What was given as KubeletConfiguration, for `/configz`.
    pub kubelet: KubeletConfiguration,
}

/// What the API server is asked about those who ask the node's API, and for how long its answers hold.
#[derive(Debug, Clone)]
pub struct ReviewConfig {
    /// Whether bearer tokens are taken, as TokenReview judges them.
    pub tokens: bool,
    pub token_kept: Duration,
    pub allowed_kept: Duration,
    pub denied_kept: Duration,
}

impl Default for ReviewConfig {
    /// The kubelet's.
    fn default() -> Self {
        Self {
            tokens: true,
            token_kept: Duration::from_secs(120),
            allowed_kept: Duration::from_secs(300),
            denied_kept: Duration::from_secs(30),
        }
    }
}

impl Config {
    /// The defaults for a node, everything in its usual place.
    pub fn new(node_name: impl Into<String>, node_ip: IpAddr) -> Self {
        let data_dir = PathBuf::from("/var/lib/oarlock");
        Self {
            node_name: node_name.into(),
            node_ip,
            second_node_ip: None,
            kubeconfig: data_dir.join("agent/kubeconfig"),
            bootstrap_kubeconfig: None,
            rotate_certificates: false,
            server_tls_bootstrap: false,
            runtime_endpoint: PathBuf::from("/run/oarlock/runtime.sock"),
            kubelet_dir: PathBuf::from("/var/lib/kubelet"),
            pod_logs_dir: PathBuf::from("/var/log/pods"),
            container_logs_dir: Some(PathBuf::from("/var/log/containers")),
            listen: SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 10250),
            cert_file: data_dir.join("agent/serving.crt"),
            key_file: data_dir.join("agent/serving.key"),
            client_ca_file: data_dir.join("agent/ca.crt"),
            data_dir,
            cluster_dns: vec![IpAddr::V4(Ipv4Addr::new(10, 43, 0, 10))],
            cluster_domain: "cluster.local".to_owned(),
            resolv_conf: PathBuf::from("/etc/resolv.conf"),
            max_pods: 110,
            pods_per_core: 0,
            static_pod_dir: None,
            debugging_handlers: true,
            review: ReviewConfig::default(),
            node_labels: BTreeMap::new(),
            register_with_taints: Vec::new(),
            cgroup_root: String::new(),
            systemd_cgroups: false,
            cgroups_per_qos: true,
            reserved_cpu_millis: 0,
            reserved_memory_bytes: 0,
            reserved_storage_bytes: 0,
            enforce_pods: true,
            enforced: Vec::new(),
            pod_pids_limit: None,
            allowed_sysctls: AllowedSysctls::default(),
            ids_per_pod: crate::users::UNIT,
            cpu_cfs_quota: true,
            cpu_cfs_quota_period: Duration::from_millis(100),
            limited_swap: false,
            fail_swap_on: false,
            seccomp_default: false,
            max_restart_delay: Duration::from_secs(300),
            max_parallel_image_pulls: 10,
            credential_providers: None,
            container_log_max_bytes: 10 << 20,
            container_log_max_files: 5,
            container_log_period: Duration::from_secs(10),
            node_status_update_period: Duration::from_secs(10),
            node_status_max_images: 50,
            provider_id: None,
            node_status_report_period: Duration::from_secs(300),
            node_lease_duration: Duration::from_secs(40),
            eviction: EvictionConfig::default(),
            image_gc: ImageGcConfig::default(),
            assignment: AssignmentConfig::default(),
            shutdown: ShutdownConfig::default(),
            kubelet: KubeletConfiguration::default(),
        }
    }

    /// The directory with one directory a pod.
    pub(crate) fn pods_root(&self) -> PathBuf {
        self.data_dir.join("pods")
    }

    /// The agent's own records.
    pub(crate) fn state_dir(&self) -> PathBuf {
        self.data_dir.join("agent")
    }

    /// Where the node's own certificates are.
    pub(crate) fn certificates_dir(&self) -> PathBuf {
        self.data_dir.join("certificates")
    }
}
