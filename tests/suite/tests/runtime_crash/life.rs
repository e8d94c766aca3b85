//! A pod's whole life as a client sees it, with every call repeated whose daemon died under it.

use std::time::Instant;

use oarlock_proto::cri;
use oarlock_proto::images::ImportRequest;
use oarlock_proto::images::images_client::ImagesClient;
use oarlock_testkit::image_archive;
use tonic::{Code, Status};

use crate::daemon::Daemon;
use crate::runtime_daemon::{IMAGE, LIMIT, channel, container_config, sandbox_config};

/// A call, repeated if need be. Only a death excuses a failure.
macro_rules! call {
    ($daemon:expr, $what:literal, $call:expr) => {
        loop {
            let outcome: Result<_, Status> = $call.await;
            match outcome {
                Ok(reply) => break reply,
                Err(status) => {
                    let excused = $daemon.was_reborn().await;
                    assert!(excused, "{} after death {:?}: {status}", $what, $daemon.death());
                    check($daemon).await;
                }
            }
        }
    };
}

pub async fn live(daemon: &mut Daemon, name: &str) {
    call!(daemon, "import", import(daemon));
    let log_directory = daemon.path().join("logs").join(name).display().to_string();
    let mut config = sandbox_config(name, &log_directory);
    config.port_mappings = vec![cri::PortMapping {
        protocol: cri::Protocol::Tcp as i32,
        container_port: 80,
        host_port: 18080,
        host_ip: String::new(),
    }];
    let request = cri::RunPodSandboxRequest { config: Some(config), runtime_handler: String::new() };
    let sandbox = call!(daemon, "RunPodSandbox", daemon.runtime.run_pod_sandbox(request.clone()));
    let sandbox = sandbox.into_inner().pod_sandbox_id;

    let main = started(daemon, &sandbox, container_config("main", &["sleep"])).await;
    let exec = cri::ExecSyncRequest {
        container_id: main.clone(),
        cmd: vec!["echo".to_owned(), "here".to_owned()],
        timeout: 20,
    };
    let reply = call!(daemon, "ExecSync", daemon.runtime.exec_sync(exec.clone())).into_inner();
    assert_eq!((reply.exit_code, reply.stdout.as_slice()), (0, b"here\n".as_slice()));
    let update = cri::UpdateContainerResourcesRequest {
        container_id: main.clone(),
        linux: Some(cri::LinuxContainerResources { cpu_shares: 512, ..cri::LinuxContainerResources::default() }),
        ..cri::UpdateContainerResourcesRequest::default()
    };
    call!(daemon, "UpdateContainerResources", daemon.runtime.update_container_resources(update.clone()));
    let ends = started(daemon, &sandbox, container_config("ends", &["exit", "7"])).await;
    ended(daemon, &ends, 7).await;

    let stop = cri::StopContainerRequest { container_id: main.clone(), timeout: 20 };
    call!(daemon, "StopContainer", daemon.runtime.stop_container(stop.clone()));
    ended(daemon, &main, 0).await;
    let remove = cri::RemoveContainerRequest { container_id: main };
    call!(daemon, "RemoveContainer", daemon.runtime.remove_container(remove.clone()));
    // One that is killed with its sandbox, and one that was never started.
    started(daemon, &sandbox, container_config("stays", &["sleep"])).await;
    created(daemon, &sandbox, container_config("waits", &["sleep"])).await;

    let stop = cri::StopPodSandboxRequest { pod_sandbox_id: sandbox.clone() };
    call!(daemon, "StopPodSandbox", daemon.runtime.stop_pod_sandbox(stop.clone()));
    let remove = cri::RemovePodSandboxRequest { pod_sandbox_id: sandbox };
    call!(daemon, "RemovePodSandbox", daemon.runtime.remove_pod_sandbox(remove.clone()));
    let request = cri::RemoveImageRequest {
        image: Some(cri::ImageSpec { image: IMAGE.to_owned(), ..cri::ImageSpec::default() }),
    };
    call!(daemon, "RemoveImage", daemon.images.remove_image(request.clone()));
}

async fn import(daemon: &mut Daemon) -> Result<(), Status> {
    let mut images = ImagesClient::new(channel(&daemon.socket()));
    let request = ImportRequest { path: image_archive().display().to_string() };
    let mut progress = images.import(request).await?.into_inner();
    let mut done = false;
    while let Some(message) = progress.message().await? {
        done = message.done;
    }
    if done { Ok(()) } else { Err(Status::unavailable("the import broke off")) }
}

async fn created(daemon: &mut Daemon, sandbox: &str, config: cri::ContainerConfig) -> String {
    let request =
        cri::CreateContainerRequest { pod_sandbox_id: sandbox.to_owned(), config: Some(config), sandbox_config: None };
    call!(daemon, "CreateContainer", daemon.runtime.create_container(request.clone())).into_inner().container_id
}

async fn started(daemon: &mut Daemon, sandbox: &str, config: cri::ContainerConfig) -> String {
    let id = created(daemon, sandbox, config).await;
    let request = cri::StartContainerRequest { container_id: id.clone() };
    loop {
        match daemon.runtime.start_container(request.clone()).await {
            Ok(_) => return id,
            // One that ran and ended while the daemon was dead cannot be started again: that is an answer, nobody died.
            Err(status) if status.code() != Code::FailedPrecondition && daemon.was_reborn().await => {
                check(daemon).await;
            }
            Err(status) => {
                let state = status_of(daemon, &id).await.state;
                let ended = state == cri::ContainerState::ContainerExited as i32;
                assert!(ended, "StartContainer after death {:?}: {status}", daemon.death());
                return id;
            }
        }
    }
}

async fn status_of(daemon: &mut Daemon, id: &str) -> cri::ContainerStatus {
    let request = cri::ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
    let reply = call!(daemon, "ContainerStatus", daemon.runtime.container_status(request.clone()));
    reply.into_inner().status.expect("a status")
}

async fn ended(daemon: &mut Daemon, id: &str, code: i32) {
    let deadline = Instant::now() + LIMIT;
    loop {
        let status = status_of(daemon, id).await;
        if status.state == cri::ContainerState::ContainerExited as i32 {
            assert_eq!(status.exit_code, code, "{status:?} after death {:?}", daemon.death());
            return;
        }
        assert!(Instant::now() < deadline, "{id} does not end: {status:?}");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

/// What a daemon tells right after its start makes sense: nothing half made is listed.
async fn check(daemon: &mut Daemon) {
    let containers = daemon.runtime.list_containers(cri::ListContainersRequest::default()).await;
    let sandboxes = daemon.runtime.list_pod_sandbox(cri::ListPodSandboxRequest::default()).await;
    let (containers, sandboxes) = (containers.expect("containers").into_inner(), sandboxes.expect("sandboxes"));
    let sandboxes = sandboxes.into_inner().items;
    for container in containers.containers {
        assert_ne!(container.state, cri::ContainerState::ContainerUnknown as i32, "{container:?}");
        assert!(sandboxes.iter().any(|sandbox| sandbox.id == container.pod_sandbox_id), "an orphan: {container:?}");
    }
    assert!(sandboxes.len() <= 1, "one pod, several sandboxes: {sandboxes:?}");
}
