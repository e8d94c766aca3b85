//! The pod resources API: which devices, processors and memory every container has, for monitoring agents on the node.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
pub use oarlock_proto::podresources as wire;
use oarlock_proto::podresources::pod_resources_lister_server::{PodResourcesLister, PodResourcesListerServer};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::socket;

/// Who knows.
#[async_trait]
pub trait Source: Send + Sync + 'static {
    /// Every pod that runs or is to run.
    async fn list(&self) -> Vec<wire::PodResources>;
    /// What there is to be had in all.
    async fn allocatable(&self) -> wire::AllocatableResourcesResponse;
}

struct Lister(Arc<dyn Source>);

#[tonic::async_trait]
impl PodResourcesLister for Lister {
    async fn list(
        &self,
        _: Request<wire::ListPodResourcesRequest>,
    ) -> Result<Response<wire::ListPodResourcesResponse>, Status> {
        Ok(Response::new(wire::ListPodResourcesResponse { pod_resources: self.0.list().await }))
    }

    async fn get_allocatable_resources(
        &self,
        _: Request<wire::AllocatableResourcesRequest>,
    ) -> Result<Response<wire::AllocatableResourcesResponse>, Status> {
        Ok(Response::new(self.0.allocatable().await))
    }

    async fn get(
        &self,
        request: Request<wire::GetPodResourcesRequest>,
    ) -> Result<Response<wire::GetPodResourcesResponse>, Status> {
        let wire::GetPodResourcesRequest { pod_name, pod_namespace } = request.into_inner();
        let mut pods = self.0.list().await.into_iter();
        let found = pods.find(|pod| pod.name == pod_name && pod.namespace == pod_namespace);
        let missing = || Status::unknown(format!("pod {pod_name} in namespace {pod_namespace} not found"));
        Ok(Response::new(wire::GetPodResourcesResponse { pod_resources: Some(found.ok_or_else(missing)?) }))
    }
}

/// Serves at `path` until `shutdown`.
pub async fn serve(path: PathBuf, source: Arc<dyn Source>, shutdown: CancellationToken) -> io::Result<()> {
    let listener = socket::listen(&path)?;
    socket::serve(listener, PodResourcesListerServer::new(Lister(source)), shutdown).await;
    Ok(())
}
