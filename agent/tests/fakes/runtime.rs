//! A container runtime that runs nothing: CRI over a unix socket, containers that live until they are stopped or told to end.

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use futures::Stream;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use oarlock_proto::cri;
use oarlock_proto::cri::image_service_server::{ImageService, ImageServiceServer};
use oarlock_proto::cri::runtime_service_server::{RuntimeService, RuntimeServiceServer};
use tokio::net::UnixListener;
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use tower::Service;

#[derive(Clone)]
pub struct Sandbox {
    pub id: String,
    pub config: cri::PodSandboxConfig,
    pub runtime_handler: String,
    pub ready: bool,
    pub created_at: i64,
}

#[derive(Clone)]
pub struct Container {
    pub id: String,
    pub sandbox: String,
    pub config: cri::ContainerConfig,
    pub state: cri::ContainerState,
    pub created_at: i64,
    pub started_at: i64,
    pub finished_at: i64,
    pub exit_code: i32,
}

#[derive(Default)]
pub struct World {
    pub sandboxes: Vec<Sandbox>,
    pub containers: Vec<Container>,
    pub images: Vec<String>,
    pub pulls: Vec<String>,
    /// Who each was pulled as.
    pub logins: Vec<String>,
    /// Calls that change something, in order.
    pub calls: Vec<String>,
    /// What commands end with, once those below are used up.
    pub exec_exit_code: i32,
    /// What the next commands end with.
    pub exec_exit_codes: VecDeque<i32>,
    /// Containers that were stopped, by name, with the seconds they were given.
    pub stops: Vec<(String, i64)>,
    pub no_user_namespaces: bool,
    /// Working sets in bytes, by container name.
    pub memory: HashMap<String, u64>,
    /// What is stored, for listing and removal; apart from `images`, which are there to start containers from.
    pub stored: Vec<cri::Image>,
    made: u64,
}

/// The runtime. Clones share everything.
#[derive(Clone)]
pub struct FakeRuntime {
    pub world: Arc<Mutex<World>>,
    events: broadcast::Sender<cri::ContainerEventResponse>,
}

fn now() -> i64 {
    i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_nanos()).expect("before 2262")
}

impl FakeRuntime {
    pub fn new(images: &[&str]) -> Self {
        let world = World { images: images.iter().map(|image| (*image).to_owned()).collect(), ..Default::default() };
        Self { world: Arc::new(Mutex::new(world)), events: broadcast::channel(1024).0 }
    }

    /// Serves on the socket until the token is cancelled.
    pub fn serve(&self, socket: &Path, shutdown: CancellationToken) {
        let listener = UnixListener::bind(socket).expect("the socket");
        let fake = self.clone();
        tokio::spawn(async move {
            loop {
                let stream = tokio::select! {
                    accepted = listener.accept() => accepted.expect("a connection").0,
                    () = shutdown.cancelled() => return,
                };
                let (fake, shutdown) = (fake.clone(), shutdown.clone());
                tokio::spawn(async move {
                    let answer = service_fn(move |request: http::Request<Incoming>| {
                        let fake = fake.clone();
                        async move {
                            let request = request.map(tonic::body::Body::new);
                            if request.uri().path().starts_with("/runtime.v1.ImageService/") {
                                ImageServiceServer::new(fake).call(request).await
                            } else {
                                RuntimeServiceServer::new(fake).call(request).await
                            }
                        }
                    });
                    let connection =
                        http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), answer);
                    tokio::select! {
                        _ = connection => {}
                        () = shutdown.cancelled() => {}
                    }
                });
            }
        });
    }

    /// Ends the newest running container of that name.
    pub fn exit(&self, name: &str, code: i32) {
        let sandbox = {
            let mut world = self.world.lock().unwrap();
            let running = |c: &&mut Container| {
                c.config.metadata.as_ref().is_some_and(|m| m.name == name)
                    && c.state == cri::ContainerState::ContainerRunning
            };
            let container = world.containers.iter_mut().rev().find(running).expect("a running container");
            container.state = cri::ContainerState::ContainerExited;
            container.exit_code = code;
            container.finished_at = now();
            container.sandbox.clone()
        };
        self.announce(&sandbox);
    }

    pub fn running(&self) -> Vec<String> {
        let world = self.world.lock().unwrap();
        let running = world.containers.iter().filter(|c| c.state == cri::ContainerState::ContainerRunning);
        running.map(|c| c.config.metadata.clone().unwrap_or_default().name).collect()
    }

    pub fn is_empty(&self) -> bool {
        let world = self.world.lock().unwrap();
        world.sandboxes.is_empty() && world.containers.is_empty()
    }

    pub fn calls(&self) -> Vec<String> {
        self.world.lock().unwrap().calls.clone()
    }

    fn announce(&self, sandbox: &str) {
        let world = self.world.lock().unwrap();
        let metadata = world.sandboxes.iter().find(|s| s.id == sandbox).and_then(|s| s.config.metadata.clone());
        let _ = self.events.send(cri::ContainerEventResponse {
            pod_sandbox_status: Some(cri::PodSandboxStatus { metadata, ..Default::default() }),
            ..Default::default()
        });
    }

    fn change<T>(
        &self,
        call: impl Into<String>,
        change: impl FnOnce(&mut World) -> Result<T, Status>,
    ) -> Result<T, Status> {
        let mut world = self.world.lock().unwrap();
        world.calls.push(call.into());
        change(&mut world)
    }
}

fn fits(labels: &HashMap<String, String>, wanted: &HashMap<String, String>) -> bool {
    wanted.iter().all(|(name, value)| labels.get(name) == Some(value))
}

fn container_status(c: &Container) -> cri::ContainerStatus {
    cri::ContainerStatus {
        id: c.id.clone(),
        metadata: c.config.metadata.clone(),
        state: c.state as i32,
        created_at: c.created_at,
        started_at: c.started_at,
        finished_at: c.finished_at,
        exit_code: c.exit_code,
        image: c.config.image.clone(),
        image_ref: "sha256:image".to_owned(),
        labels: c.config.labels.clone(),
        annotations: c.config.annotations.clone(),
        mounts: c.config.mounts.clone(),
        log_path: c.config.log_path.clone(),
        ..Default::default()
    }
}

fn memory(bytes: u64) -> cri::MemoryUsage {
    cri::MemoryUsage { working_set_bytes: Some(cri::UInt64Value { value: bytes }), ..Default::default() }
}

impl World {
    /// Where a container's log is.
    fn log_path(&self, container: &Container) -> PathBuf {
        let sandbox = self.sandboxes.iter().find(|sandbox| sandbox.id == container.sandbox);
        let directory = sandbox.map(|sandbox| sandbox.config.log_directory.clone()).unwrap_or_default();
        Path::new(&directory).join(&container.config.log_path)
    }

    fn memory_of(&self, container: &Container) -> u64 {
        let name = container.config.metadata.clone().unwrap_or_default().name;
        self.memory.get(&name).copied().unwrap_or(0)
    }
}

type Answer<T> = Result<Response<T>, Status>;
type Flow<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn ok<T>(value: T) -> Answer<T> {
    Ok(Response::new(value))
}

fn none<T>() -> Answer<T> {
    Err(Status::unimplemented("the fake has no such call"))
}

#[tonic::async_trait]
impl RuntimeService for FakeRuntime {
    type StreamPodSandboxesStream = Flow<cri::StreamPodSandboxesResponse>;
    type StreamContainersStream = Flow<cri::StreamContainersResponse>;
    type StreamContainerStatsStream = Flow<cri::StreamContainerStatsResponse>;
    type StreamPodSandboxStatsStream = Flow<cri::StreamPodSandboxStatsResponse>;
    type StreamPodSandboxMetricsStream = Flow<cri::StreamPodSandboxMetricsResponse>;
    type GetContainerEventsStream = Flow<cri::ContainerEventResponse>;

    async fn version(&self, _: Request<cri::VersionRequest>) -> Answer<cri::VersionResponse> {
        ok(cri::VersionResponse {
            version: "0.1.0".into(),
            runtime_name: "fake".into(),
            runtime_version: "1.0".into(),
            runtime_api_version: "v1".into(),
        })
    }

    async fn status(&self, _: Request<cri::StatusRequest>) -> Answer<cri::StatusResponse> {
        let good = |kind: &str| cri::RuntimeCondition { r#type: kind.into(), status: true, ..Default::default() };
        let conditions = vec![good("RuntimeReady"), good("NetworkReady")];
        let users = !self.world.lock().unwrap().no_user_namespaces;
        let able = cri::RuntimeHandlerFeatures { recursive_read_only_mounts: true, user_namespaces: users };
        ok(cri::StatusResponse {
            status: Some(cri::RuntimeStatus { conditions }),
            runtime_handlers: vec![cri::RuntimeHandler { name: String::new(), features: Some(able) }],
            ..Default::default()
        })
    }

    async fn run_pod_sandbox(&self, request: Request<cri::RunPodSandboxRequest>) -> Answer<cri::RunPodSandboxResponse> {
        let cri::RunPodSandboxRequest { config, runtime_handler } = request.into_inner();
        let config = config.unwrap_or_default();
        let id = self.change("run", |world| {
            world.made += 1;
            let id = format!("sandbox{}", world.made);
            let created_at = now();
            world.sandboxes.push(Sandbox { id: id.clone(), config, runtime_handler, ready: true, created_at });
            Ok(id)
        })?;
        ok(cri::RunPodSandboxResponse { pod_sandbox_id: id })
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<cri::StopPodSandboxRequest>,
    ) -> Answer<cri::StopPodSandboxResponse> {
        let id = request.into_inner().pod_sandbox_id;
        self.change("stop sandbox", |world| {
            for sandbox in world.sandboxes.iter_mut().filter(|sandbox| sandbox.id == id) {
                sandbox.ready = false;
            }
            Ok(())
        })?;
        ok(cri::StopPodSandboxResponse {})
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<cri::RemovePodSandboxRequest>,
    ) -> Answer<cri::RemovePodSandboxResponse> {
        let id = request.into_inner().pod_sandbox_id;
        self.change("remove sandbox", |world| {
            world.sandboxes.retain(|sandbox| sandbox.id != id);
            Ok(())
        })?;
        ok(cri::RemovePodSandboxResponse {})
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<cri::PodSandboxStatusRequest>,
    ) -> Answer<cri::PodSandboxStatusResponse> {
        let id = request.into_inner().pod_sandbox_id;
        let world = self.world.lock().unwrap();
        let found = world.sandboxes.iter().find(|sandbox| sandbox.id == id);
        let sandbox = found.ok_or_else(|| Status::not_found("no such sandbox"))?;
        let status = cri::PodSandboxStatus {
            id,
            metadata: sandbox.config.metadata.clone(),
            state: i32::from(!sandbox.ready),
            created_at: sandbox.created_at,
            network: Some(cri::PodSandboxNetworkStatus { ip: "10.42.0.9".into(), additional_ips: vec![] }),
            labels: sandbox.config.labels.clone(),
            ..Default::default()
        };
        ok(cri::PodSandboxStatusResponse { status: Some(status), ..Default::default() })
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<cri::ListPodSandboxRequest>,
    ) -> Answer<cri::ListPodSandboxResponse> {
        let filter = request.into_inner().filter.unwrap_or_default();
        let world = self.world.lock().unwrap();
        let fitting = world.sandboxes.iter().filter(|s| fits(&s.config.labels, &filter.label_selector));
        let items = fitting.map(|s| cri::PodSandbox {
            id: s.id.clone(),
            metadata: s.config.metadata.clone(),
            state: i32::from(!s.ready),
            created_at: s.created_at,
            labels: s.config.labels.clone(),
            ..Default::default()
        });
        ok(cri::ListPodSandboxResponse { items: items.collect() })
    }

    async fn create_container(
        &self,
        request: Request<cri::CreateContainerRequest>,
    ) -> Answer<cri::CreateContainerResponse> {
        let request = request.into_inner();
        let config = request.config.unwrap_or_default();
        let name = config.metadata.clone().unwrap_or_default().name;
        let id = self.change(format!("create {name}"), |world| {
            world.made += 1;
            let id = format!("container{}", world.made);
            world.containers.push(Container {
                id: id.clone(),
                sandbox: request.pod_sandbox_id,
                config,
                state: cri::ContainerState::ContainerCreated,
                created_at: now(),
                started_at: 0,
                finished_at: 0,
                exit_code: 0,
            });
            Ok(id)
        })?;
        ok(cri::CreateContainerResponse { container_id: id })
    }

    async fn start_container(
        &self,
        request: Request<cri::StartContainerRequest>,
    ) -> Answer<cri::StartContainerResponse> {
        let id = request.into_inner().container_id;
        self.change("start", |world| {
            let found = world.containers.iter_mut().find(|container| container.id == id);
            let container = found.ok_or_else(|| Status::not_found("no such container"))?;
            container.state = cri::ContainerState::ContainerRunning;
            container.started_at = now();
            Ok(())
        })?;
        ok(cri::StartContainerResponse {})
    }

    async fn stop_container(&self, request: Request<cri::StopContainerRequest>) -> Answer<cri::StopContainerResponse> {
        let cri::StopContainerRequest { container_id: id, timeout } = request.into_inner();
        self.change("stop", |world| {
            let name = world.containers.iter().find(|c| c.id == id).and_then(|c| c.config.metadata.clone());
            world.stops.push((name.unwrap_or_default().name, timeout));
            let running = |c: &&mut Container| c.id == id && c.state == cri::ContainerState::ContainerRunning;
            for container in world.containers.iter_mut().filter(running) {
                container.state = cri::ContainerState::ContainerExited;
                container.exit_code = 143;
                container.finished_at = now();
            }
            Ok(())
        })?;
        ok(cri::StopContainerResponse {})
    }

    async fn remove_container(
        &self,
        request: Request<cri::RemoveContainerRequest>,
    ) -> Answer<cri::RemoveContainerResponse> {
        let id = request.into_inner().container_id;
        self.change("remove", |world| {
            world.containers.retain(|container| container.id != id);
            Ok(())
        })?;
        ok(cri::RemoveContainerResponse {})
    }

    async fn list_containers(
        &self,
        request: Request<cri::ListContainersRequest>,
    ) -> Answer<cri::ListContainersResponse> {
        let filter = request.into_inner().filter.unwrap_or_default();
        let world = self.world.lock().unwrap();
        let fitting = world.containers.iter().filter(|c| fits(&c.config.labels, &filter.label_selector));
        let containers = fitting.map(|c| cri::Container {
            id: c.id.clone(),
            pod_sandbox_id: c.sandbox.clone(),
            metadata: c.config.metadata.clone(),
            state: c.state as i32,
            created_at: c.created_at,
            image_ref: "sha256:image".to_owned(),
            labels: c.config.labels.clone(),
            ..Default::default()
        });
        ok(cri::ListContainersResponse { containers: containers.collect() })
    }

    async fn container_status(
        &self,
        request: Request<cri::ContainerStatusRequest>,
    ) -> Answer<cri::ContainerStatusResponse> {
        let id = request.into_inner().container_id;
        let world = self.world.lock().unwrap();
        let found = world.containers.iter().find(|container| container.id == id);
        let container = found.ok_or_else(|| Status::not_found("no such container"))?;
        let mut status = container_status(container);
        status.log_path = world.log_path(container).display().to_string();
        ok(cri::ContainerStatusResponse { status: Some(status), ..Default::default() })
    }

    async fn exec_sync(&self, request: Request<cri::ExecSyncRequest>) -> Answer<cri::ExecSyncResponse> {
        let command = request.into_inner().cmd.join(" ");
        let exit_code = self.change(format!("exec {command}"), |world| {
            Ok(world.exec_exit_codes.pop_front().unwrap_or(world.exec_exit_code))
        })?;
        ok(cri::ExecSyncResponse { exit_code, ..Default::default() })
    }

    async fn get_container_events(&self, _: Request<cri::GetEventsRequest>) -> Answer<Self::GetContainerEventsStream> {
        let mut events = self.events.subscribe();
        let (sender, receiver) = tokio::sync::mpsc::channel(64);
        tokio::spawn(async move {
            loop {
                let event = tokio::select! {
                    event = events.recv() => event,
                    () = sender.closed() => return,
                };
                let Ok(event) = event else { return };
                if sender.send(Ok(event)).await.is_err() {
                    return;
                }
            }
        });
        ok(Box::pin(tokio_stream::wrappers::ReceiverStream::new(receiver)))
    }

    async fn runtime_config(&self, _: Request<cri::RuntimeConfigRequest>) -> Answer<cri::RuntimeConfigResponse> {
        none()
    }
    async fn stream_pod_sandboxes(
        &self,
        _: Request<cri::StreamPodSandboxesRequest>,
    ) -> Answer<Self::StreamPodSandboxesStream> {
        none()
    }
    async fn stream_containers(
        &self,
        _: Request<cri::StreamContainersRequest>,
    ) -> Answer<Self::StreamContainersStream> {
        none()
    }
    async fn update_container_resources(
        &self,
        request: Request<cri::UpdateContainerResourcesRequest>,
    ) -> Answer<cri::UpdateContainerResourcesResponse> {
        let linux = request.into_inner().linux.unwrap_or_default();
        let (shares, cpus) = (linux.cpu_shares, linux.cpuset_cpus);
        let said =
            if cpus.is_empty() { format!("update cpu.shares={shares}") } else { format!("update cpuset.cpus={cpus}") };
        self.change(said, |_| Ok(()))?;
        ok(cri::UpdateContainerResourcesResponse {})
    }
    async fn reopen_container_log(
        &self,
        request: Request<cri::ReopenContainerLogRequest>,
    ) -> Answer<cri::ReopenContainerLogResponse> {
        let id = request.into_inner().container_id;
        self.change("reopen", |world| {
            let found = world.containers.iter().find(|container| container.id == id);
            let path = world.log_path(found.ok_or_else(|| Status::not_found("no such container"))?);
            std::fs::OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .map_err(|e| Status::internal(e.to_string()))
        })?;
        ok(cri::ReopenContainerLogResponse {})
    }
    async fn exec(&self, _: Request<cri::ExecRequest>) -> Answer<cri::ExecResponse> {
        none()
    }
    async fn attach(&self, _: Request<cri::AttachRequest>) -> Answer<cri::AttachResponse> {
        none()
    }
    async fn port_forward(&self, _: Request<cri::PortForwardRequest>) -> Answer<cri::PortForwardResponse> {
        none()
    }
    async fn container_stats(&self, _: Request<cri::ContainerStatsRequest>) -> Answer<cri::ContainerStatsResponse> {
        none()
    }
    async fn list_container_stats(
        &self,
        _: Request<cri::ListContainerStatsRequest>,
    ) -> Answer<cri::ListContainerStatsResponse> {
        let world = self.world.lock().unwrap();
        let stats = world.containers.iter().map(|container| cri::ContainerStats {
            attributes: Some(cri::ContainerAttributes {
                id: container.id.clone(),
                metadata: container.config.metadata.clone(),
                labels: container.config.labels.clone(),
                ..Default::default()
            }),
            memory: Some(memory(world.memory_of(container))),
            ..Default::default()
        });
        ok(cri::ListContainerStatsResponse { stats: stats.collect() })
    }
    async fn stream_container_stats(
        &self,
        _: Request<cri::StreamContainerStatsRequest>,
    ) -> Answer<Self::StreamContainerStatsStream> {
        none()
    }
    async fn pod_sandbox_stats(&self, _: Request<cri::PodSandboxStatsRequest>) -> Answer<cri::PodSandboxStatsResponse> {
        none()
    }
    async fn list_pod_sandbox_stats(
        &self,
        _: Request<cri::ListPodSandboxStatsRequest>,
    ) -> Answer<cri::ListPodSandboxStatsResponse> {
        let world = self.world.lock().unwrap();
        let stats = world.sandboxes.iter().map(|sandbox| {
            let inside = world.containers.iter().filter(|container| container.sandbox == sandbox.id);
            cri::PodSandboxStats {
                attributes: Some(cri::PodSandboxAttributes {
                    id: sandbox.id.clone(),
                    metadata: sandbox.config.metadata.clone(),
                    ..Default::default()
                }),
                linux: Some(cri::LinuxPodSandboxStats {
                    memory: Some(memory(inside.map(|container| world.memory_of(container)).sum())),
                    ..Default::default()
                }),
                ..Default::default()
            }
        });
        ok(cri::ListPodSandboxStatsResponse { stats: stats.collect() })
    }
    async fn stream_pod_sandbox_stats(
        &self,
        _: Request<cri::StreamPodSandboxStatsRequest>,
    ) -> Answer<Self::StreamPodSandboxStatsStream> {
        none()
    }
    async fn update_runtime_config(
        &self,
        _: Request<cri::UpdateRuntimeConfigRequest>,
    ) -> Answer<cri::UpdateRuntimeConfigResponse> {
        ok(cri::UpdateRuntimeConfigResponse {})
    }
    async fn checkpoint_container(
        &self,
        _: Request<cri::CheckpointContainerRequest>,
    ) -> Answer<cri::CheckpointContainerResponse> {
        none()
    }
    async fn checkpoint_pod(&self, _: Request<cri::CheckpointPodRequest>) -> Answer<cri::CheckpointPodResponse> {
        none()
    }
    async fn restore_pod(&self, _: Request<cri::RestorePodRequest>) -> Answer<cri::RestorePodResponse> {
        none()
    }
    async fn list_metric_descriptors(
        &self,
        _: Request<cri::ListMetricDescriptorsRequest>,
    ) -> Answer<cri::ListMetricDescriptorsResponse> {
        none()
    }
    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<cri::ListPodSandboxMetricsRequest>,
    ) -> Answer<cri::ListPodSandboxMetricsResponse> {
        none()
    }
    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<cri::StreamPodSandboxMetricsRequest>,
    ) -> Answer<Self::StreamPodSandboxMetricsStream> {
        none()
    }
    async fn update_pod_sandbox_resources(
        &self,
        _: Request<cri::UpdatePodSandboxResourcesRequest>,
    ) -> Answer<cri::UpdatePodSandboxResourcesResponse> {
        none()
    }
}

#[tonic::async_trait]
impl ImageService for FakeRuntime {
    type StreamImagesStream = Flow<cri::StreamImagesResponse>;

    async fn list_images(&self, _: Request<cri::ListImagesRequest>) -> Answer<cri::ListImagesResponse> {
        ok(cri::ListImagesResponse { images: self.world.lock().unwrap().stored.clone() })
    }

    async fn stream_images(&self, _: Request<cri::StreamImagesRequest>) -> Answer<Self::StreamImagesStream> {
        none()
    }

    async fn image_status(&self, request: Request<cri::ImageStatusRequest>) -> Answer<cri::ImageStatusResponse> {
        let wanted = request.into_inner().image.unwrap_or_default().image;
        let present = wanted == "sha256:image" || self.world.lock().unwrap().images.contains(&wanted);
        let image = present.then(|| cri::Image { id: "sha256:image".into(), ..Default::default() });
        ok(cri::ImageStatusResponse { image, ..Default::default() })
    }

    async fn pull_image(&self, request: Request<cri::PullImageRequest>) -> Answer<cri::PullImageResponse> {
        let request = request.into_inner();
        let wanted = request.image.unwrap_or_default().image;
        let mut world = self.world.lock().unwrap();
        world.logins.push(request.auth.unwrap_or_default().username);
        world.pulls.push(wanted.clone());
        if wanted.contains("missing") {
            return Err(Status::not_found("no such image"));
        }
        world.images.push(wanted);
        ok(cri::PullImageResponse { image_ref: "sha256:image".into() })
    }

    async fn remove_image(&self, request: Request<cri::RemoveImageRequest>) -> Answer<cri::RemoveImageResponse> {
        let id = request.into_inner().image.unwrap_or_default().image;
        self.world.lock().unwrap().stored.retain(|image| image.id != id);
        ok(cri::RemoveImageResponse {})
    }

    async fn image_fs_info(&self, _: Request<cri::ImageFsInfoRequest>) -> Answer<cri::ImageFsInfoResponse> {
        ok(cri::ImageFsInfoResponse::default())
    }
}
