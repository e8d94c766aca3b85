//! The calls of the interface, one file each. This file only hands requests to them.

mod attach;
mod checkpoint_container;
mod checkpoint_pod;
mod container_stats;
mod container_status;
mod create_container;
mod exec;
mod exec_sync;
mod get_container_events;
mod image_fs_info;
mod image_status;
mod import_images;
mod list_container_stats;
mod list_containers;
mod list_images;
mod list_metric_descriptors;
mod list_pod_sandbox;
mod list_pod_sandbox_metrics;
mod list_pod_sandbox_stats;
mod pod_sandbox_stats;
mod pod_sandbox_status;
mod port_forward;
mod prune_images;
mod pull_image;
mod pull_with_progress;
mod remove_container;
mod remove_image;
mod remove_pod_sandbox;
mod reopen_container_log;
mod restore_pod;
mod run_pod_sandbox;
mod runtime_config;
mod start_container;
mod status;
mod stop_container;
mod stop_pod_sandbox;
mod stream_container_stats;
mod stream_containers;
mod stream_images;
mod stream_pod_sandbox_metrics;
mod stream_pod_sandbox_stats;
mod stream_pod_sandboxes;
mod update_container_resources;
mod update_pod_sandbox_resources;
mod update_runtime_config;
mod version;

use std::pin::Pin;
use std::sync::Arc;

use futures::{Stream, StreamExt};
use oarlock_proto::cri;
use oarlock_proto::cri::image_service_server::ImageService;
use oarlock_proto::cri::runtime_service_server::RuntimeService;
use oarlock_proto::images::images_server::Images;
use oarlock_proto::images::{ImportProgress, ImportRequest, PruneRequest, PruneResponse, PullProgress, PullRequest};
use tonic::{Request, Response, Status};

use crate::core::Core;

/// Items in one message of a streamed list.
const CHUNK_ITEMS: usize = 100;

/// The messages of a streaming call.
type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// A list as messages of bounded size.
fn chunks<T: Send + 'static, R: Send + 'static>(items: Vec<T>, message: fn(Vec<T>) -> R) -> Responses<R> {
    futures::stream::iter(items).chunks(CHUNK_ITEMS).map(move |chunk| Ok(message(chunk))).boxed()
}

/// All services of the socket.
#[derive(Clone)]
pub(crate) struct Service {
    pub(crate) core: Arc<Core>,
}

type Reply<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl RuntimeService for Service {
    async fn version(&self, _request: Request<cri::VersionRequest>) -> Reply<cri::VersionResponse> {
        Ok(Response::new(version::version()))
    }

    async fn run_pod_sandbox(&self, request: Request<cri::RunPodSandboxRequest>) -> Reply<cri::RunPodSandboxResponse> {
        let request = request.into_inner();
        run_pod_sandbox::run_pod_sandbox(&self.core, request).await.map(Response::new)
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<cri::StopPodSandboxRequest>,
    ) -> Reply<cri::StopPodSandboxResponse> {
        let request = request.into_inner();
        stop_pod_sandbox::stop_pod_sandbox(&self.core, request).await.map(Response::new)
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<cri::RemovePodSandboxRequest>,
    ) -> Reply<cri::RemovePodSandboxResponse> {
        let request = request.into_inner();
        remove_pod_sandbox::remove_pod_sandbox(&self.core, request).await.map(Response::new)
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<cri::PodSandboxStatusRequest>,
    ) -> Reply<cri::PodSandboxStatusResponse> {
        let request = request.into_inner();
        pod_sandbox_status::pod_sandbox_status(&self.core, &request).await.map(Response::new)
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<cri::ListPodSandboxRequest>,
    ) -> Reply<cri::ListPodSandboxResponse> {
        let request = request.into_inner();
        Ok(Response::new(cri::ListPodSandboxResponse {
            items: list_pod_sandbox::list_pod_sandbox(&self.core, request.filter.as_ref()),
        }))
    }

    async fn create_container(
        &self,
        request: Request<cri::CreateContainerRequest>,
    ) -> Reply<cri::CreateContainerResponse> {
        let request = request.into_inner();
        create_container::create_container(&self.core, request).await.map(Response::new)
    }

    async fn start_container(
        &self,
        request: Request<cri::StartContainerRequest>,
    ) -> Reply<cri::StartContainerResponse> {
        let request = request.into_inner();
        start_container::start_container(&self.core, &request).await.map(Response::new)
    }

    async fn stop_container(&self, request: Request<cri::StopContainerRequest>) -> Reply<cri::StopContainerResponse> {
        let request = request.into_inner();
        stop_container::stop_container(&self.core, &request).await.map(Response::new)
    }

    async fn remove_container(
        &self,
        request: Request<cri::RemoveContainerRequest>,
    ) -> Reply<cri::RemoveContainerResponse> {
        let request = request.into_inner();
        remove_container::remove_container(&self.core, &request).await.map(Response::new)
    }

    async fn list_containers(
        &self,
        request: Request<cri::ListContainersRequest>,
    ) -> Reply<cri::ListContainersResponse> {
        let request = request.into_inner();
        Ok(Response::new(cri::ListContainersResponse {
            containers: list_containers::list_containers(&self.core, request.filter.as_ref()),
        }))
    }

    async fn container_status(
        &self,
        request: Request<cri::ContainerStatusRequest>,
    ) -> Reply<cri::ContainerStatusResponse> {
        let request = request.into_inner();
        container_status::container_status(&self.core, &request).await.map(Response::new)
    }

    async fn update_container_resources(
        &self,
        request: Request<cri::UpdateContainerResourcesRequest>,
    ) -> Reply<cri::UpdateContainerResourcesResponse> {
        let request = request.into_inner();
        update_container_resources::update_container_resources(&self.core, &request).await.map(Response::new)
    }

    async fn reopen_container_log(
        &self,
        request: Request<cri::ReopenContainerLogRequest>,
    ) -> Reply<cri::ReopenContainerLogResponse> {
        let request = request.into_inner();
        reopen_container_log::reopen_container_log(&self.core, &request).await.map(Response::new)
    }

    async fn exec_sync(&self, request: Request<cri::ExecSyncRequest>) -> Reply<cri::ExecSyncResponse> {
        let request = request.into_inner();
        exec_sync::exec_sync(&self.core, request).await.map(Response::new)
    }

    async fn exec(&self, request: Request<cri::ExecRequest>) -> Reply<cri::ExecResponse> {
        let request = request.into_inner();
        exec::exec(&self.core, request).map(Response::new)
    }

    async fn attach(&self, request: Request<cri::AttachRequest>) -> Reply<cri::AttachResponse> {
        let request = request.into_inner();
        attach::attach(&self.core, &request).map(Response::new)
    }

    async fn port_forward(&self, request: Request<cri::PortForwardRequest>) -> Reply<cri::PortForwardResponse> {
        let request = request.into_inner();
        port_forward::port_forward(&self.core, &request).map(Response::new)
    }

    async fn container_stats(
        &self,
        request: Request<cri::ContainerStatsRequest>,
    ) -> Reply<cri::ContainerStatsResponse> {
        let request = request.into_inner();
        container_stats::container_stats(&self.core, &request).await.map(Response::new)
    }

    async fn list_container_stats(
        &self,
        request: Request<cri::ListContainerStatsRequest>,
    ) -> Reply<cri::ListContainerStatsResponse> {
        let request = request.into_inner();
        Ok(Response::new(cri::ListContainerStatsResponse {
            stats: list_container_stats::list_container_stats(&self.core, request.filter.as_ref()).await?,
        }))
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<cri::PodSandboxStatsRequest>,
    ) -> Reply<cri::PodSandboxStatsResponse> {
        let request = request.into_inner();
        pod_sandbox_stats::pod_sandbox_stats(&self.core, &request).await.map(Response::new)
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<cri::ListPodSandboxStatsRequest>,
    ) -> Reply<cri::ListPodSandboxStatsResponse> {
        let request = request.into_inner();
        Ok(Response::new(cri::ListPodSandboxStatsResponse {
            stats: list_pod_sandbox_stats::list_pod_sandbox_stats(&self.core, request.filter.as_ref()).await?,
        }))
    }

    async fn update_runtime_config(
        &self,
        request: Request<cri::UpdateRuntimeConfigRequest>,
    ) -> Reply<cri::UpdateRuntimeConfigResponse> {
        let request = request.into_inner();
        Ok(Response::new(update_runtime_config::update_runtime_config(&request)))
    }

    async fn status(&self, request: Request<cri::StatusRequest>) -> Reply<cri::StatusResponse> {
        let request = request.into_inner();
        Ok(Response::new(status::status(&self.core, &request).await))
    }

    async fn checkpoint_container(
        &self,
        request: Request<cri::CheckpointContainerRequest>,
    ) -> Reply<cri::CheckpointContainerResponse> {
        let request = request.into_inner();
        checkpoint_container::checkpoint_container(&self.core, request).await.map(Response::new)
    }

    async fn checkpoint_pod(&self, request: Request<cri::CheckpointPodRequest>) -> Reply<cri::CheckpointPodResponse> {
        let request = request.into_inner();
        checkpoint_pod::checkpoint_pod(&self.core, &request).map(Response::new)
    }

    async fn restore_pod(&self, _request: Request<cri::RestorePodRequest>) -> Reply<cri::RestorePodResponse> {
        restore_pod::restore_pod().map(Response::new)
    }

    async fn list_metric_descriptors(
        &self,
        _request: Request<cri::ListMetricDescriptorsRequest>,
    ) -> Reply<cri::ListMetricDescriptorsResponse> {
        Ok(Response::new(list_metric_descriptors::list_metric_descriptors()))
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _request: Request<cri::ListPodSandboxMetricsRequest>,
    ) -> Reply<cri::ListPodSandboxMetricsResponse> {
        Ok(Response::new(cri::ListPodSandboxMetricsResponse {
            pod_metrics: list_pod_sandbox_metrics::list_pod_sandbox_metrics(&self.core).await?,
        }))
    }

    async fn runtime_config(&self, _request: Request<cri::RuntimeConfigRequest>) -> Reply<cri::RuntimeConfigResponse> {
        Ok(Response::new(runtime_config::runtime_config(&self.core)))
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<cri::UpdatePodSandboxResourcesRequest>,
    ) -> Reply<cri::UpdatePodSandboxResourcesResponse> {
        let request = request.into_inner();
        update_pod_sandbox_resources::update_pod_sandbox_resources(&self.core, request).await.map(Response::new)
    }

    type StreamPodSandboxesStream = Responses<cri::StreamPodSandboxesResponse>;

    async fn stream_pod_sandboxes(
        &self,
        request: Request<cri::StreamPodSandboxesRequest>,
    ) -> Reply<Self::StreamPodSandboxesStream> {
        let request = request.into_inner();
        Ok(Response::new(stream_pod_sandboxes::stream_pod_sandboxes(&self.core, request.filter.as_ref())))
    }

    type StreamContainersStream = Responses<cri::StreamContainersResponse>;

    async fn stream_containers(
        &self,
        request: Request<cri::StreamContainersRequest>,
    ) -> Reply<Self::StreamContainersStream> {
        let request = request.into_inner();
        Ok(Response::new(stream_containers::stream_containers(&self.core, request.filter.as_ref())))
    }

    type StreamContainerStatsStream = Responses<cri::StreamContainerStatsResponse>;

    async fn stream_container_stats(
        &self,
        request: Request<cri::StreamContainerStatsRequest>,
    ) -> Reply<Self::StreamContainerStatsStream> {
        let request = request.into_inner();
        stream_container_stats::stream_container_stats(&self.core, request.filter.as_ref()).await.map(Response::new)
    }

    type StreamPodSandboxStatsStream = Responses<cri::StreamPodSandboxStatsResponse>;

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<cri::StreamPodSandboxStatsRequest>,
    ) -> Reply<Self::StreamPodSandboxStatsStream> {
        let request = request.into_inner();
        stream_pod_sandbox_stats::stream_pod_sandbox_stats(&self.core, request.filter.as_ref()).await.map(Response::new)
    }

    type StreamPodSandboxMetricsStream = Responses<cri::StreamPodSandboxMetricsResponse>;

    async fn stream_pod_sandbox_metrics(
        &self,
        _request: Request<cri::StreamPodSandboxMetricsRequest>,
    ) -> Reply<Self::StreamPodSandboxMetricsStream> {
        stream_pod_sandbox_metrics::stream_pod_sandbox_metrics(&self.core).await.map(Response::new)
    }

    type GetContainerEventsStream = Responses<cri::ContainerEventResponse>;

    async fn get_container_events(
        &self,
        _request: Request<cri::GetEventsRequest>,
    ) -> Reply<Self::GetContainerEventsStream> {
        Ok(Response::new(get_container_events::get_container_events(&self.core)))
    }
}

#[tonic::async_trait]
impl ImageService for Service {
    async fn list_images(&self, request: Request<cri::ListImagesRequest>) -> Reply<cri::ListImagesResponse> {
        let request = request.into_inner();
        Ok(Response::new(cri::ListImagesResponse {
            images: list_images::list_images(&self.core, request.filter.as_ref()),
        }))
    }

    async fn image_status(&self, request: Request<cri::ImageStatusRequest>) -> Reply<cri::ImageStatusResponse> {
        let request = request.into_inner();
        image_status::image_status(&self.core, &request).map(Response::new)
    }

    async fn pull_image(&self, request: Request<cri::PullImageRequest>) -> Reply<cri::PullImageResponse> {
        let request = request.into_inner();
        pull_image::pull_image(&self.core, request).await.map(Response::new)
    }

    async fn remove_image(&self, request: Request<cri::RemoveImageRequest>) -> Reply<cri::RemoveImageResponse> {
        let request = request.into_inner();
        remove_image::remove_image(&self.core, &request).await.map(Response::new)
    }

    async fn image_fs_info(&self, _request: Request<cri::ImageFsInfoRequest>) -> Reply<cri::ImageFsInfoResponse> {
        image_fs_info::image_fs_info(&self.core).await.map(Response::new)
    }

    type StreamImagesStream = Responses<cri::StreamImagesResponse>;

    async fn stream_images(&self, request: Request<cri::StreamImagesRequest>) -> Reply<Self::StreamImagesStream> {
        let request = request.into_inner();
        Ok(Response::new(stream_images::stream_images(&self.core, request.filter.as_ref())))
    }
}

#[tonic::async_trait]
impl Images for Service {
    type ImportStream = Responses<ImportProgress>;

    async fn import(&self, request: Request<ImportRequest>) -> Reply<Self::ImportStream> {
        import_images::import_images(&self.core, request.into_inner()).map(Response::new)
    }

    type PullStream = Responses<PullProgress>;

    async fn pull(&self, request: Request<PullRequest>) -> Reply<Self::PullStream> {
        pull_with_progress::pull_with_progress(&self.core, request.into_inner()).map(Response::new)
    }

    async fn prune(&self, request: Request<PruneRequest>) -> Reply<PruneResponse> {
        prune_images::prune_images(&self.core, request.into_inner()).await.map(Response::new)
    }
}
