//! [`Runtime`]: one method a call.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use oarlock_proto::cri;
use oarlock_proto::cri::image_service_client::ImageServiceClient;
use oarlock_proto::cri::runtime_service_client::RuntimeServiceClient;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use super::operations::Operations;

/// Ordinary calls.
const CALL: Duration = Duration::from_secs(30);
/// Calls that wait for networks and mounts.
const SLOW_CALL: Duration = Duration::from_secs(240);
const PULL: Duration = Duration::from_secs(3600);
/// Lists of many containers are larger than the default of 4 MiB.
const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// A call that did not succeed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CriError {
    #[error("rpc error: code = {} desc = {}", code_name(.status.code()), .status.message())]
    Status { call: &'static str, status: Box<tonic::Status> },
    #[error("rpc error: code = DeadlineExceeded desc = {call} took longer than {} s", .after.as_secs())]
    Timeout { call: &'static str, after: Duration },
    #[error("the runtime's answer to {call} lacks {missing}")]
    Incomplete { call: &'static str, missing: &'static str },
}

impl CriError {
    /// The runtime does not know what the call was about.
    pub(crate) fn not_found(&self) -> bool {
        matches!(self, CriError::Status { status, .. } if status.code() == tonic::Code::NotFound)
    }

    /// The runtime has no such call.
    pub(crate) fn unimplemented(&self) -> bool {
        matches!(self, CriError::Status { status, .. } if status.code() == tonic::Code::Unimplemented)
    }

    /// What the runtime said, without gRPC's wrapping.
    pub(crate) fn description(&self) -> String {
        match self {
            CriError::Status { status, .. } => status.message().to_owned(),
            other => other.to_string(),
        }
    }
}

/// gRPC's own spelling of a status code.
fn code_name(code: tonic::Code) -> String {
    match code {
        tonic::Code::Ok => "OK".to_owned(),
        tonic::Code::Cancelled => "Canceled".to_owned(),
        other => format!("{other:?}"),
    }
}

/// A container runtime behind a unix socket. Clones share the connection.
#[derive(Clone)]
pub(crate) struct Runtime {
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
    operations: Arc<Operations>,
}

impl Runtime {
    /// Connects when first used, and again whenever the runtime went away.
    pub(crate) fn new(socket: &Path) -> Self {
        let socket: PathBuf = socket.to_owned();
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::from_static("http://localhost").connect_timeout(Duration::from_secs(5));
        let channel = endpoint.connect_with_connector_lazy(connector);
        Self {
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES),
            images: ImageServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES),
            operations: Arc::default(),
        }
    }

    /// Prometheus text about the calls that were made.
    pub(crate) fn metrics(&self) -> String {
        self.operations.metrics()
    }

    /// Makes a call and counts it. It is in a box of its own: it holds its request several times over, and what awaits it
    /// would be as large for as long as it lives.
    fn bounded<T>(
        &self,
        call: &'static str,
        limit: Duration,
        answer: impl Future<Output = Result<tonic::Response<T>, tonic::Status>> + Send,
    ) -> impl Future<Output = Result<T, CriError>> + Send {
        let answer = Box::pin(answer);
        async move {
            let began = Instant::now();
            let answer = tokio::time::timeout(limit, answer).await;
            self.operations.ended(call, began.elapsed(), matches!(answer, Ok(Ok(_))));
            match answer {
                Ok(Ok(response)) => Ok(response.into_inner()),
                Ok(Err(status)) => Err(CriError::Status { call, status: Box::new(status) }),
                Err(_) => Err(CriError::Timeout { call, after: limit }),
            }
        }
    }

    pub(crate) async fn version(&self) -> Result<cri::VersionResponse, CriError> {
        let request = cri::VersionRequest { version: "v1".to_owned() };
        self.bounded("Version", CALL, self.runtime.clone().version(request)).await
    }

    pub(crate) async fn status(&self) -> Result<cri::StatusResponse, CriError> {
        self.bounded("Status", CALL, self.runtime.clone().status(cri::StatusRequest { verbose: false })).await
    }

    /// Whether the runtime makes cgroups through systemd.
    pub(crate) async fn systemd_cgroups(&self) -> Result<bool, CriError> {
        let mut client = self.runtime.clone();
        let linux =
            self.bounded("RuntimeConfig", CALL, client.runtime_config(cri::RuntimeConfigRequest {})).await?.linux;
        Ok(linux.is_some_and(|linux| linux.cgroup_driver == cri::CgroupDriver::Systemd as i32))
    }

    pub(crate) async fn update_pod_cidr(&self, pod_cidr: String) -> Result<(), CriError> {
        let network_config = Some(cri::NetworkConfig { pod_cidr });
        let request = cri::UpdateRuntimeConfigRequest { runtime_config: Some(cri::RuntimeConfig { network_config }) };
        self.bounded("UpdateRuntimeConfig", CALL, self.runtime.clone().update_runtime_config(request)).await.map(drop)
    }

    pub(crate) async fn run_sandbox(
        &self,
        config: cri::PodSandboxConfig,
        runtime_handler: String,
    ) -> Result<String, CriError> {
        let request = cri::RunPodSandboxRequest { config: Some(config), runtime_handler };
        let response = self.bounded("RunPodSandbox", SLOW_CALL, self.runtime.clone().run_pod_sandbox(request)).await?;
        Ok(response.pod_sandbox_id)
    }

    pub(crate) async fn stop_sandbox(&self, id: &str) -> Result<(), CriError> {
        let request = cri::StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
        gone_is_fine(self.bounded("StopPodSandbox", SLOW_CALL, self.runtime.clone().stop_pod_sandbox(request)).await)
    }

    pub(crate) async fn remove_sandbox(&self, id: &str) -> Result<(), CriError> {
        let request = cri::RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
        gone_is_fine(
            self.bounded("RemovePodSandbox", SLOW_CALL, self.runtime.clone().remove_pod_sandbox(request)).await,
        )
    }

    pub(crate) async fn sandbox_status(&self, id: &str) -> Result<cri::PodSandboxStatus, CriError> {
        let request = cri::PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: false };
        let response = self.bounded("PodSandboxStatus", CALL, self.runtime.clone().pod_sandbox_status(request)).await?;
        response.status.ok_or(CriError::Incomplete { call: "PodSandboxStatus", missing: "a status" })
    }

    pub(crate) async fn list_sandboxes(
        &self,
        filter: Option<cri::PodSandboxFilter>,
    ) -> Result<Vec<cri::PodSandbox>, CriError> {
        let request = cri::ListPodSandboxRequest { filter };
        Ok(self.bounded("ListPodSandbox", CALL, self.runtime.clone().list_pod_sandbox(request)).await?.items)
    }

    pub(crate) async fn create_container(
        &self,
        sandbox: &str,
        config: cri::ContainerConfig,
        sandbox_config: cri::PodSandboxConfig,
    ) -> Result<String, CriError> {
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: sandbox.to_owned(),
            config: Some(config),
            sandbox_config: Some(sandbox_config),
        };
        let response =
            self.bounded("CreateContainer", SLOW_CALL, self.runtime.clone().create_container(request)).await?;
        Ok(response.container_id)
    }

    pub(crate) async fn start_container(&self, id: &str) -> Result<(), CriError> {
        let request = cri::StartContainerRequest { container_id: id.to_owned() };
        self.bounded("StartContainer", SLOW_CALL, self.runtime.clone().start_container(request)).await.map(drop)
    }

    /// Asks it to end, and kills it after `grace`.
    pub(crate) async fn stop_container(&self, id: &str, grace: Duration) -> Result<(), CriError> {
        let timeout = i64::try_from(grace.as_secs()).unwrap_or(i64::MAX);
        let request = cri::StopContainerRequest { container_id: id.to_owned(), timeout };
        let answer =
            self.bounded("StopContainer", grace + SLOW_CALL, self.runtime.clone().stop_container(request)).await;
        gone_is_fine(answer)
    }

    pub(crate) async fn remove_container(&self, id: &str) -> Result<(), CriError> {
        let request = cri::RemoveContainerRequest { container_id: id.to_owned() };
        gone_is_fine(self.bounded("RemoveContainer", SLOW_CALL, self.runtime.clone().remove_container(request)).await)
    }

    /// Changes the cgroup values of a running container.
    pub(crate) async fn update_resources(
        &self,
        id: &str,
        resources: cri::LinuxContainerResources,
    ) -> Result<(), CriError> {
        let request = cri::UpdateContainerResourcesRequest {
            container_id: id.to_owned(),
            linux: Some(resources),
            ..Default::default()
        };
        let mut client = self.runtime.clone();
        self.bounded("UpdateContainerResources", CALL, client.update_container_resources(request)).await.map(drop)
    }

    pub(crate) async fn container_status(&self, id: &str) -> Result<cri::ContainerStatus, CriError> {
        let request = cri::ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        let response = self.bounded("ContainerStatus", CALL, self.runtime.clone().container_status(request)).await?;
        response.status.ok_or(CriError::Incomplete { call: "ContainerStatus", missing: "a status" })
    }

    pub(crate) async fn list_containers(
        &self,
        filter: Option<cri::ContainerFilter>,
    ) -> Result<Vec<cri::Container>, CriError> {
        let request = cri::ListContainersRequest { filter };
        Ok(self.bounded("ListContainers", CALL, self.runtime.clone().list_containers(request)).await?.containers)
    }

    pub(crate) async fn exec_sync(
        &self,
        id: &str,
        cmd: &[String],
        limit: Duration,
    ) -> Result<cri::ExecSyncResponse, CriError> {
        let timeout = i64::try_from(limit.as_secs()).unwrap_or(0);
        let request = cri::ExecSyncRequest { container_id: id.to_owned(), cmd: cmd.to_vec(), timeout };
        let slack = if limit.is_zero() { SLOW_CALL } else { limit + Duration::from_secs(5) };
        self.bounded("ExecSync", slack, self.runtime.clone().exec_sync(request)).await
    }

    /// Writes a checkpoint to `location`. A limit of zero is the runtime's own.
    pub(crate) async fn checkpoint(&self, id: &str, location: &Path, limit: Duration) -> Result<(), CriError> {
        let request = cri::CheckpointContainerRequest {
            container_id: id.to_owned(),
            location: location.display().to_string(),
            timeout: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
        };
        let slack = if limit.is_zero() { SLOW_CALL } else { limit.min(PULL) + Duration::from_secs(5) };
        self.bounded("CheckpointContainer", slack, self.runtime.clone().checkpoint_container(request)).await.map(drop)
    }

    pub(crate) async fn exec(&self, request: cri::ExecRequest) -> Result<String, CriError> {
        Ok(self.bounded("Exec", CALL, self.runtime.clone().exec(request)).await?.url)
    }

    pub(crate) async fn attach(&self, request: cri::AttachRequest) -> Result<String, CriError> {
        Ok(self.bounded("Attach", CALL, self.runtime.clone().attach(request)).await?.url)
    }

    pub(crate) async fn port_forward(&self, request: cri::PortForwardRequest) -> Result<String, CriError> {
        Ok(self.bounded("PortForward", CALL, self.runtime.clone().port_forward(request)).await?.url)
    }

    pub(crate) async fn reopen_log(&self, id: &str) -> Result<(), CriError> {
        let request = cri::ReopenContainerLogRequest { container_id: id.to_owned() };
        self.bounded("ReopenContainerLog", CALL, self.runtime.clone().reopen_container_log(request)).await.map(drop)
    }

    /// The stream of container events. Its end or an error means: look at everything again.
    pub(crate) async fn events(&self) -> Result<tonic::Streaming<cri::ContainerEventResponse>, CriError> {
        self.bounded("GetContainerEvents", CALL, self.runtime.clone().get_container_events(cri::GetEventsRequest {}))
            .await
    }

    pub(crate) async fn sandbox_stats(&self) -> Result<Vec<cri::PodSandboxStats>, CriError> {
        let request = cri::ListPodSandboxStatsRequest { filter: None };
        Ok(self.bounded("ListPodSandboxStats", CALL, self.runtime.clone().list_pod_sandbox_stats(request)).await?.stats)
    }

    pub(crate) async fn container_stats(&self) -> Result<Vec<cri::ContainerStats>, CriError> {
        let request = cri::ListContainerStatsRequest { filter: None };
        Ok(self.bounded("ListContainerStats", CALL, self.runtime.clone().list_container_stats(request)).await?.stats)
    }

    pub(crate) async fn image_status(&self, image: &str) -> Result<Option<cri::Image>, CriError> {
        let image = Some(cri::ImageSpec { image: image.to_owned(), ..Default::default() });
        let request = cri::ImageStatusRequest { image, verbose: false };
        Ok(self.bounded("ImageStatus", CALL, self.images.clone().image_status(request)).await?.image)
    }

    pub(crate) async fn pull_image(&self, request: cri::PullImageRequest) -> Result<String, CriError> {
        Ok(self.bounded("PullImage", PULL, self.images.clone().pull_image(request)).await?.image_ref)
    }

    pub(crate) async fn list_images(&self) -> Result<Vec<cri::Image>, CriError> {
        let request = cri::ListImagesRequest { filter: None };
        Ok(self.bounded("ListImages", CALL, self.images.clone().list_images(request)).await?.images)
    }

    /// Removes an image by its id; one that is not there is success.
    pub(crate) async fn remove_image(&self, id: &str) -> Result<(), CriError> {
        let image = Some(cri::ImageSpec { image: id.to_owned(), ..Default::default() });
        let request = cri::RemoveImageRequest { image };
        gone_is_fine(self.bounded("RemoveImage", SLOW_CALL, self.images.clone().remove_image(request)).await)
    }

    pub(crate) async fn image_fs_info(&self) -> Result<cri::ImageFsInfoResponse, CriError> {
        self.bounded("ImageFsInfo", CALL, self.images.clone().image_fs_info(cri::ImageFsInfoRequest {})).await
    }
}

/// Stop and remove of what is gone have succeeded.
fn gone_is_fine<T>(answer: Result<T, CriError>) -> Result<(), CriError> {
    match answer {
        Err(error) if !error.not_found() => Err(error),
        _ => Ok(()),
    }
}
