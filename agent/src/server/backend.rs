//! [`Backend`]: what the :10250 server asks of the agent.

use std::collections::HashMap;
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use oarlock_csi::VolumeUse;
use oarlock_node_api::{
    ContainerRef, ExecRequest, LogFile, MetricsPage, NodeBackend, NodeError, PodList, PortForwardRequest,
};
use oarlock_proto::cri;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::machine::{self, Rate};
use super::{cadvisor, metrics, stats};
use crate::eviction::{self, PodUsage};
use crate::go_duration::show;
use crate::model::{Container, ContainerId, PodUid, RunState};
use crate::node::capacity::disk;
use crate::shared::{PodEntry, PodTable, Shared};
use crate::spec;
use crate::{Amount, EvictionConfig};

const RUN: Duration = Duration::from_secs(120);
/// Counted files are shown for so long.
const DISK_USE_KEPT: Duration = Duration::from_secs(60);
/// While a log is followed, its container is looked at anyway this often.
const FOLLOW: Duration = Duration::from_secs(600);

/// Answers from the table of pods and from the runtime.
pub(crate) struct Backend {
    shared: Arc<Shared>,
    /// What pods have on disk, when it was last counted.
    disk: tokio::sync::Mutex<Option<(Instant, Arc<DiskUse>)>>,
    cpu: Rate,
}

/// Usage of each pod by UID.
type DiskUse = HashMap<String, PodUsage>;

impl Backend {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, disk: tokio::sync::Mutex::default(), cpu: Rate::default() }
    }

    /// Counted at most once in a while, however many ask.
    async fn disk_use(&self) -> Arc<DiskUse> {
        let mut kept = self.disk.lock().await;
        if let Some((_, usage)) = kept.as_ref().filter(|(at, _)| at.elapsed() < DISK_USE_KEPT) {
            return usage.clone();
        }
        let usage = Arc::new(eviction::of_all(&self.shared).await);
        *kept = Some((Instant::now(), usage.clone()));
        usage
    }

    fn pod(&self, target: &ContainerRef) -> Result<PodEntry, NodeError> {
        let entry = match target.pod_uid.as_deref().filter(|uid| !uid.is_empty()) {
            Some(uid) => self.shared.table.get(&PodUid::from(uid)),
            None => self.shared.table.find(&target.namespace, &target.pod),
        };
        let missing = || NodeError::NotFound(format!("pod \"{}_{}\" does not exist", target.pod, target.namespace));
        entry.filter(|entry| spec::pod_name(&entry.pod) == target.pod).ok_or_else(missing)
    }

    /// The running container that a request names.
    fn running(&self, target: &ContainerRef) -> Result<Container, NodeError> {
        let entry = self.pod(target)?;
        let record = entry.observed.latest(&target.container).filter(|record| record.state == RunState::Running);
        record.cloned().ok_or_else(|| NodeError::NotFound(format!("container not found (\"{}\")", target.container)))
    }
}

#[async_trait]
impl NodeBackend for Backend {
    async fn pods(&self) -> PodList {
        let items = self.shared.table.all().iter().map(PodEntry::with_status).collect();
        PodList { items, metadata: Default::default() }
    }

    async fn running_pods(&self) -> PodList {
        let entries = self.shared.table.all();
        let running = entries.iter().filter(|entry| entry.observed.containers.iter().any(Container::live));
        let items = running.map(|entry| Pod { status: None, ..(*entry.pod).clone() }).collect();
        PodList { items, metadata: Default::default() }
    }

    async fn container_log_path(
        &self,
        namespace: &str,
        pod: &str,
        container: &str,
        previous: bool,
    ) -> Result<LogFile, NodeError> {
        let target = ContainerRef { namespace: namespace.into(), pod: pod.into(), ..Default::default() };
        let entry = self.pod(&target)?;
        let known = entry.pod.spec.as_ref().and_then(|spec| spec::find_container(spec, container));
        if known.is_none() {
            let message = format!("container \"{container}\" in pod \"{pod}\" is not available");
            return Err(NodeError::BadRequest(message));
        }
        let latest = entry.observed.latest(container);
        let record = match (previous, latest) {
            (false, latest) => latest,
            (true, Some(latest)) => entry.observed.last_ended(container, Some(&latest.id)).or_else(|| {
                // Waiting to run again: the one that ended is the previous one.
                let waiting = entry.status.container_statuses.iter().flatten().find(|s| s.name == container);
                let waits = waiting.and_then(|s| s.state.as_ref()).is_some_and(|state| state.waiting.is_some());
                Some(latest).filter(|latest| waits && latest.state == RunState::Exited)
            }),
            (true, None) => None,
        };
        let Some(record) = record else {
            let message = if previous {
                format!("previous terminated container \"{container}\" in pod \"{pod}\" not found")
            } else {
                let reason = waiting_reason(&entry, container);
                format!("container \"{container}\" in pod \"{pod}\" is waiting to start: {reason}")
            };
            return Err(NodeError::BadRequest(message));
        };
        let running = self.follow(PodUid::from(spec::pod_uid(&entry.pod)), record);
        Ok(LogFile { path: record.log_path.clone().into(), running })
    }

    async fn exec_url(&self, request: ExecRequest) -> Result<String, NodeError> {
        let container = self.running(&request.target)?;
        let exec = cri::ExecRequest {
            container_id: container.id.to_string(),
            cmd: request.command,
            tty: request.tty,
            stdin: request.stdin,
            stdout: request.stdout,
            // A terminal has one output.
            stderr: request.stderr && !request.tty,
        };
        self.shared.runtime.exec(exec).await.map_err(internal)
    }

    async fn attach_url(&self, request: ExecRequest) -> Result<String, NodeError> {
        let container = self.running(&request.target)?;
        let attach = cri::AttachRequest {
            container_id: container.id.to_string(),
            stdin: request.stdin,
            tty: request.tty,
            stdout: request.stdout,
            stderr: request.stderr && !request.tty,
        };
        self.shared.runtime.attach(attach).await.map_err(internal)
    }

    async fn port_forward_url(&self, request: PortForwardRequest) -> Result<String, NodeError> {
        let entry = self.pod(&request.target)?;
        let sandbox = entry.observed.current_sandbox().filter(|sandbox| sandbox.ready);
        let Some(sandbox) = sandbox else {
            return Err(NodeError::NotFound(format!("pod not found (\"{}\")", spec::pod_uid(&entry.pod))));
        };
        let forward = cri::PortForwardRequest {
            pod_sandbox_id: sandbox.id.to_string(),
            port: request.ports.into_iter().map(i32::from).collect(),
        };
        self.shared.runtime.port_forward(forward).await.map_err(internal)
    }

    async fn run_in_container(&self, request: ExecRequest) -> Result<Vec<u8>, NodeError> {
        let container = self.running(&request.target)?;
        let answer = self.shared.runtime.exec_sync(container.id.as_str(), &request.command, RUN).await;
        let answer = answer.map_err(internal)?;
        let mut output = answer.stdout;
        output.extend(answer.stderr);
        if answer.exit_code != 0 {
            let shown = String::from_utf8_lossy(&output).into_owned();
            let message = format!("command '{}' exited with {}: {shown}", request.command.join(" "), answer.exit_code);
            return Err(NodeError::Internal(message));
        }
        Ok(output)
    }

    /// Below the kubelet's directory, under upstream's names.
    async fn checkpoint(&self, target: ContainerRef, timeout: Duration) -> Result<Vec<String>, NodeError> {
        let container = self.running(&target)?;
        let ContainerRef { namespace, pod, container: name, .. } = &target;
        let failed =
            |why: String| NodeError::Internal(format!("checkpointing of {namespace}/{pod}/{name} failed ({why})"));
        let directory = self.shared.config.kubelet_dir.join("checkpoints");
        make_private(&directory)
            .await
            .map_err(|error| failed(format!("cannot make {}: {error}", directory.display())))?;
        let time = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ");
        let location = directory.join(format!("checkpoint-{pod}_{namespace}-{name}-{time}.tar"));
        let made = self.shared.runtime.checkpoint(container.id.as_str(), &location, timeout).await;
        made.map_err(|error| failed(error.to_string()))?;
        Ok(vec![location.display().to_string()])
    }

    async fn stats_summary(&self) -> Value {
        let pods = self.shared.runtime.sandbox_stats().await.unwrap_or_default();
        let filesystem = self.shared.runtime.image_fs_info().await.ok();
        let now = Instant::now();
        let drivers = self.driver_volumes().await;
        let facts = stats::Facts {
            node_name: &self.shared.config.node_name,
            now_nanos: i64::try_from(Timestamp::now().as_nanosecond()).unwrap_or(0),
            started: stats::starts(&self.shared),
            disk: &*self.disk_use().await,
            drivers: &drivers,
            room: disk(&self.shared.config.data_dir).unwrap_or_default(),
            cpu_rate: machine::processor().0.and_then(|busy| self.cpu.look(now, busy)),
        };
        stats::summary(&facts, &pods, filesystem.as_ref())
    }

    async fn metrics(&self, page: MetricsPage) -> String {
        match page {
            MetricsPage::Probes => self.shared.probes.metrics(),
            MetricsPage::Agent => {
                let volumes = self.driver_volumes().await;
                metrics::agent_metrics(&self.shared) + &metrics::volume_metrics(volumes.values().flatten())
            }
            MetricsPage::Resource => {
                let runtime = &self.shared.runtime;
                let told = tokio::join!(runtime.sandbox_stats(), runtime.container_stats());
                metrics::resource_metrics(&told, &metrics::container_starts(&self.shared))
            }
            MetricsPage::CAdvisor => {
                let pods = self.shared.runtime.sandbox_stats().await.unwrap_or_default();
                let containers = self.shared.runtime.container_stats().await.unwrap_or_default();
                let capacity = &self.shared.capacity;
                let cores = capacity.capacity.get("cpu").copied().unwrap_or(0) / 1000;
                let machine = cadvisor::MachineFacts { cores, memory_bytes: capacity.memory_bytes() };
                cadvisor::metrics(&machine, &pods, &containers)
            }
        }
    }

    async fn configz(&self) -> Value {
        let config = &self.shared.config;
        let mut shown = config.kubelet.given();
        let effective = json!({
            "kind": "KubeletConfiguration",
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "address": config.listen.ip().to_string(),
            "port": config.listen.port(),
            "clusterDomain": config.cluster_domain,
            "clusterDNS": config.cluster_dns.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "maxPods": config.max_pods,
            "podsPerCore": config.pods_per_core,
            "allowedUnsafeSysctls": config.allowed_sysctls.patterns(),
            "podPidsLimit": config.pod_pids_limit.unwrap_or(-1),
            "cgroupsPerQOS": config.cgroups_per_qos,
            "cgroupDriver": if self.shared.cgroups.load().systemd { "systemd" } else { "cgroupfs" },
            "cpuCFSQuota": config.cpu_cfs_quota,
            "cpuCFSQuotaPeriod": show(config.cpu_cfs_quota_period),
            "containerRuntimeEndpoint": format!("unix://{}", config.runtime_endpoint.display()),
            "containerLogMaxSize": config.container_log_max_bytes.to_string(),
            "containerLogMaxFiles": config.container_log_max_files,
            "containerLogMonitorInterval": show(config.container_log_period),
            "evictionPressureTransitionPeriod": show(config.eviction.transition_period),
            "evictionHard": hard_thresholds(&config.eviction),
            "imageGCHighThresholdPercent": config.image_gc.high_percent,
            "imageGCLowThresholdPercent": config.image_gc.low_percent,
            "imageMinimumGCAge": show(config.image_gc.min_age),
            "imageMaximumGCAge": show(config.image_gc.max_age.unwrap_or_default()),
            "nodeLeaseDurationSeconds": config.node_lease_duration.as_secs(),
            "nodeStatusReportFrequency": show(config.node_status_report_period),
            "nodeStatusUpdateFrequency": show(config.node_status_update_period),
            "staticPodPath": config.static_pod_dir.as_ref().map(|dir| dir.display().to_string()).unwrap_or_default(),
            "resolvConf": config.resolv_conf.display().to_string(),
            "seccompDefault": config.seccomp_default,
        });
        if let (Value::Object(shown), Value::Object(effective)) = (&mut shown, effective) {
            shown.extend(effective);
        }
        json!({ "kubeletconfig": shown })
    }

    async fn healthy(&self) -> Result<(), String> {
        if self.shared.runtime_ok() { Ok(()) } else { Err("the container runtime cannot be reached".to_owned()) }
    }
}

impl Backend {
    /// Volumes whose drivers tell what they take up, by pod.
    async fn driver_volumes(&self) -> HashMap<String, Vec<VolumeUse>> {
        let mut drivers = HashMap::new();
        for entry in self.shared.table.all() {
            let uid = spec::pod_uid(&entry.pod);
            let usage = self.shared.storage.usage(uid).await;
            if !usage.is_empty() {
                drivers.insert(uid.to_owned(), usage);
            }
        }
        drivers
    }

    /// Turns false when the container does not run any more.
    fn follow(&self, uid: PodUid, record: &Container) -> watch::Receiver<bool> {
        let (sender, receiver) = watch::channel(record.state == RunState::Running);
        if record.state == RunState::Running {
            let (shared, id): (_, ContainerId) = (self.shared.clone(), record.id.clone());
            tokio::spawn(async move {
                let runs = |table: &PodTable| {
                    let entry = table.get(&uid);
                    let record = entry.and_then(|e| e.observed.containers.iter().find(|c| c.id == id).cloned());
                    record.is_some_and(|record| record.state == RunState::Running)
                };
                let ended = async { while !shared.table.wait_for(FOLLOW, |table| !runs(table)).await {} };
                tokio::select! {
                    () = sender.closed() => return,
                    () = ended => {}
                }
                sender.send_replace(false);
            });
        }
        receiver
    }
}

/// Hard eviction thresholds as they are configured.
fn hard_thresholds(config: &EvictionConfig) -> Value {
    let hard = config.thresholds.iter().filter(|threshold| threshold.grace.is_none());
    let shown = hard.map(|threshold| {
        let below = match threshold.below {
            Amount::Absolute(units) => oarlock_quantity::Quantity::binary(units).to_string(),
            Amount::Percent(percent) => format!("{percent}%"),
        };
        (threshold.signal.name().to_owned(), Value::from(below))
    });
    Value::Object(shown.collect())
}

fn waiting_reason(entry: &PodEntry, container: &str) -> String {
    let lists = [
        &entry.status.container_statuses,
        &entry.status.init_container_statuses,
        &entry.status.ephemeral_container_statuses,
    ];
    let status = lists.into_iter().flatten().flatten().find(|status| status.name == container);
    let waiting = status.and_then(|status| status.state.as_ref()).and_then(|state| state.waiting.as_ref());
    waiting.and_then(|waiting| waiting.reason.clone()).unwrap_or_else(|| "ContainerCreating".to_owned())
}

/// What is in a checkpoint is what was in the container's memory.
async fn make_private(directory: &Path) -> io::Result<()> {
    tokio::fs::create_dir_all(directory).await?;
    tokio::fs::set_permissions(directory, Permissions::from_mode(0o700)).await
}

fn internal(error: crate::cri::CriError) -> NodeError {
    if error.not_found() { NodeError::NotFound(error.description()) } else { NodeError::Internal(error.to_string()) }
}
