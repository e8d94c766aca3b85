//! `bench cri`: sandbox, create, start, stop and remove through the CRI socket alone.

use std::time::Instant;

use anyhow::Context;
use hyper_util::rt::TokioIo;
use oarlock_proto::cri::image_service_client::ImageServiceClient;
use oarlock_proto::cri::runtime_service_client::RuntimeServiceClient;
use oarlock_proto::cri::*;
use tonic::transport::{Channel, Endpoint};

use crate::cluster::Cluster;
use crate::table::{self, Row};

const IMAGE: &str = "oarlock.local/testimage:1";

pub(crate) fn run(rounds: usize) -> anyhow::Result<()> {
    let cluster = Cluster::start(false)?;
    cluster.import()?;
    let socket = cluster.path().join("run/runtime.sock");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let channel = Endpoint::from_static("http://runtime")
            .connect_with_connector(tower::service_fn(move |_| {
                let socket = socket.clone();
                async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
            }))
            .await
            .context("cannot reach the runtime")?;
        measure(channel, rounds).await
    })
}

async fn measure(channel: Channel, rounds: usize) -> anyhow::Result<()> {
    let mut runtime = RuntimeServiceClient::new(channel.clone());
    let status = ImageServiceClient::new(channel)
        .image_status(ImageStatusRequest { image: Some(image()), ..ImageStatusRequest::default() })
        .await?
        .into_inner();
    anyhow::ensure!(status.image.is_some(), "{IMAGE} is not imported");
    let names = [
        "RunPodSandbox",
        "CreateContainer",
        "StartContainer",
        "sandbox + create + start",
        "ExecSync true",
        "StopPodSandbox",
        "RemovePodSandbox",
    ];
    let mut rows: Vec<Row> = names.iter().map(|name| Row { name: (*name).to_owned(), samples: Vec::new() }).collect();
    for round in 0..rounds {
        let times = once(&mut runtime, round).await?;
        for (row, time) in rows.iter_mut().zip(times) {
            row.samples.push(time);
        }
    }
    table::print("one pod through CRI", &rows);
    Ok(())
}

fn image() -> ImageSpec {
    ImageSpec { image: IMAGE.to_owned(), user_specified_image: IMAGE.to_owned(), ..ImageSpec::default() }
}

async fn once(runtime: &mut RuntimeServiceClient<Channel>, round: usize) -> anyhow::Result<[f64; 7]> {
    let milliseconds = |start: Instant| start.elapsed().as_secs_f64() * 1000.0;
    let sandbox_config = PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: format!("bench-{round}"),
            uid: format!("bench-{round}"),
            namespace: "default".to_owned(),
            attempt: 0,
        }),
        linux: Some(LinuxPodSandboxConfig {
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(NamespaceOption {
                    pid: NamespaceMode::Container.into(),
                    ..NamespaceOption::default()
                }),
                ..LinuxSandboxSecurityContext::default()
            }),
            ..LinuxPodSandboxConfig::default()
        }),
        ..PodSandboxConfig::default()
    };
    let begin = Instant::now();
    let request = RunPodSandboxRequest { config: Some(sandbox_config.clone()), ..RunPodSandboxRequest::default() };
    let pod = runtime.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
    let sandbox = milliseconds(begin);
    let start = Instant::now();
    let config = ContainerConfig {
        metadata: Some(ContainerMetadata { name: "main".to_owned(), attempt: 0 }),
        image: Some(image()),
        command: vec!["/bin/sleep".to_owned()],
        linux: Some(LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(NamespaceOption {
                    pid: NamespaceMode::Container.into(),
                    ..NamespaceOption::default()
                }),
                ..LinuxContainerSecurityContext::default()
            }),
            ..LinuxContainerConfig::default()
        }),
        ..ContainerConfig::default()
    };
    let request = CreateContainerRequest {
        pod_sandbox_id: pod.clone(),
        config: Some(config),
        sandbox_config: Some(sandbox_config),
    };
    let container = runtime.create_container(request).await?.into_inner().container_id;
    let create = milliseconds(start);
    let start = Instant::now();
    runtime.start_container(StartContainerRequest { container_id: container.clone() }).await?;
    let started = milliseconds(start);
    let all = milliseconds(begin);
    let start = Instant::now();
    runtime
        .exec_sync(ExecSyncRequest { container_id: container.clone(), cmd: vec!["/bin/true".to_owned()], timeout: 10 })
        .await?;
    let exec = milliseconds(start);
    let start = Instant::now();
    runtime.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: pod.clone() }).await?;
    let stop = milliseconds(start);
    let start = Instant::now();
    runtime.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id: pod }).await?;
    let remove = milliseconds(start);
    Ok([sandbox, create, started, all, exec, stop, remove])
}
