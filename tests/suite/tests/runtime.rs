//! The runtime daemon through its socket, as a kubelet uses it: real shims, containers, overlay and network. Needs root.

mod runtime_daemon;

use std::fs;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use oarlock_proto::cri;
use oarlock_proto::cri::ContainerEventType;
use runtime_daemon::{IMAGE, LIMIT, container_config, sandbox_config, with_daemon, words};
use tonic::Code;

#[test]
fn a_pod_lives_from_its_sandbox_to_its_removal_and_every_step_is_told() {
    with_daemon("life", |mut daemon| async move {
        let mut events = daemon.runtime.get_container_events(cri::GetEventsRequest {}).await.unwrap().into_inner();
        let sandbox = daemon.sandbox("life").await;
        let request = cri::PodSandboxStatusRequest { pod_sandbox_id: sandbox.clone(), verbose: true };
        let status = daemon.runtime.pod_sandbox_status(request).await.unwrap().into_inner().status.unwrap();
        assert_eq!(status.state, cri::PodSandboxState::SandboxReady as i32);
        assert!(status.network.unwrap().ip.starts_with("10.77.0."));

        let id = daemon.create(&sandbox, container_config("main", &["log", "5", "20", "1"])).await.unwrap();
        assert_eq!(daemon.status(&id).await.state, cri::ContainerState::ContainerCreated as i32);
        daemon.start_container(&id).await.unwrap();
        let status = daemon.status(&id).await;
        assert_eq!(status.state, cri::ContainerState::ContainerRunning as i32);
        assert!(status.started_at >= status.created_at && status.finished_at == 0);
        assert_eq!(status.image.unwrap().image, IMAGE);

        assert_eq!(daemon.output(&id, &["hostname"]).await.trim(), "life");
        let resolv = daemon.output(&id, &["cat", "/etc/resolv.conf"]).await;
        assert_eq!(resolv, "search tests.svc.cluster.local\nnameserver 10.43.0.10\noptions ndots:5\n");

        let stop = cri::StopContainerRequest { container_id: id.clone(), timeout: 10 };
        daemon.runtime.stop_container(stop.clone()).await.unwrap();
        daemon.runtime.stop_container(stop).await.unwrap();
        let status = daemon.status(&id).await;
        assert_eq!((status.exit_code, status.reason.as_str()), (0, "Completed"));
        assert!(status.finished_at >= status.started_at);
        assert_eq!(daemon.log(&id).await.iter().filter(|line| line.starts_with("stdout F 000000000")).count(), 5);

        daemon.runtime.remove_container(cri::RemoveContainerRequest { container_id: id.clone() }).await.unwrap();
        daemon.runtime.remove_container(cri::RemoveContainerRequest { container_id: id.clone() }).await.unwrap();
        let stop = cri::StopPodSandboxRequest { pod_sandbox_id: sandbox.clone() };
        daemon.runtime.stop_pod_sandbox(stop.clone()).await.unwrap();
        daemon.runtime.stop_pod_sandbox(stop).await.unwrap();
        daemon
            .runtime
            .remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: sandbox.clone() })
            .await
            .unwrap();
        daemon
            .runtime
            .remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: sandbox.clone() })
            .await
            .unwrap();

        let expected = [
            (&sandbox, ContainerEventType::ContainerCreatedEvent),
            (&sandbox, ContainerEventType::ContainerStartedEvent),
            (&id, ContainerEventType::ContainerCreatedEvent),
            (&id, ContainerEventType::ContainerStartedEvent),
            (&id, ContainerEventType::ContainerStoppedEvent),
            (&id, ContainerEventType::ContainerDeletedEvent),
            (&sandbox, ContainerEventType::ContainerStoppedEvent),
            (&sandbox, ContainerEventType::ContainerDeletedEvent),
        ];
        for (id, kind) in expected {
            let event = tokio::time::timeout(LIMIT, events.message()).await.unwrap().unwrap().unwrap();
            assert_eq!((&event.container_id, event.container_event_type), (id, kind as i32));
        }
        daemon
    });
}

#[test]
fn containers_go_on_while_the_daemon_is_gone_and_their_ends_are_not_lost() {
    with_daemon("crash", |mut daemon| async move {
        let sandbox = daemon.sandbox("crash").await;
        let stays = daemon.container(&sandbox, container_config("stays", &["sleep"])).await;
        let dies = daemon.container(&sandbox, container_config("dies", &["sleep"])).await;
        let waits = daemon.create(&sandbox, container_config("waits", &["echo", "late"])).await.unwrap();
        let (stays_pid, dies_pid) = (daemon.pid(&stays).await, daemon.pid(&dies).await);

        daemon.crash().await;
        kill(Pid::from_raw(dies_pid), Signal::SIGKILL).unwrap();
        let gone = std::path::PathBuf::from(format!("/proc/{dies_pid}"));
        oarlock_testkit::wait_for("the killed container's process", LIMIT, || (!gone.exists()).then_some(()));
        daemon.open().await;

        let status = daemon.exited(&dies).await;
        assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"));
        assert_eq!(daemon.status(&stays).await.state, cri::ContainerState::ContainerRunning as i32);
        assert_eq!(daemon.pid(&stays).await, stays_pid);
        assert_eq!(daemon.output(&stays, &["echo", "still", "here"]).await, "still here\n");
        daemon.start_container(&waits).await.unwrap();
        daemon.exited(&waits).await;
        assert_eq!(daemon.log(&waits).await, ["stdout F late"]);

        // The end of what went on is heard by the new daemon.
        kill(Pid::from_raw(stays_pid), Signal::SIGTERM).unwrap();
        assert_eq!(daemon.exited(&stays).await.exit_code, 0);
        daemon
    });
}

#[test]
fn a_sandbox_whose_shim_was_killed_is_not_ready_and_its_containers_have_ended() {
    with_daemon("noshim", |mut daemon| async move {
        let sandbox = daemon.sandbox("noshim").await;
        let id = daemon.container(&sandbox, container_config("c", &["sleep"])).await;
        let request = cri::PodSandboxStatusRequest { pod_sandbox_id: sandbox.clone(), verbose: true };
        let info = daemon.runtime.pod_sandbox_status(request.clone()).await.unwrap().into_inner().info;
        let info: serde_json::Value = serde_json::from_str(&info["info"]).unwrap();
        let shim = i32::try_from(info["shimPid"].as_i64().unwrap()).unwrap();
        kill(Pid::from_raw(shim), Signal::SIGKILL).unwrap();
        let status = daemon.exited(&id).await;
        assert_eq!((status.exit_code, status.reason.as_str()), (255, "Unknown"));
        let deadline = std::time::Instant::now() + LIMIT;
        loop {
            let status = daemon.runtime.pod_sandbox_status(request.clone()).await.unwrap().into_inner().status.unwrap();
            if status.state == cri::PodSandboxState::SandboxNotready as i32 {
                break;
            }
            assert!(std::time::Instant::now() < deadline);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        daemon
    });
}

#[test]
fn a_retry_joins_its_first_attempt_and_a_name_belongs_to_one_configuration() {
    with_daemon("retry", |mut daemon| async move {
        let config = sandbox_config("retry", &daemon.log_directory("retry"));
        let request = cri::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: String::new() };
        let mut others = [daemon.runtime.clone(), daemon.runtime.clone()];
        let [one, two] = &mut others;
        let (first, second) = tokio::join!(one.run_pod_sandbox(request.clone()), two.run_pod_sandbox(request.clone()));
        let first = first.unwrap().into_inner().pod_sandbox_id;
        assert_eq!(first, second.unwrap().into_inner().pod_sandbox_id);
        assert_eq!(first, daemon.run(config.clone()).await.unwrap());
        let other = cri::PodSandboxConfig { hostname: "another".to_owned(), ..config };
        assert_eq!(daemon.run(other).await.unwrap_err().code(), Code::AlreadyExists);

        let id = daemon.create(&first, container_config("c", &["true"])).await.unwrap();
        assert_eq!(id, daemon.create(&first, container_config("c", &["true"])).await.unwrap());
        assert_eq!(
            daemon.create(&first, container_config("c", &["false"])).await.unwrap_err().code(),
            Code::AlreadyExists
        );
        // The start of an id is enough while it is clear.
        assert_eq!(daemon.status(&id[..13]).await.id, id);
        daemon
    });
}

#[test]
fn what_cannot_be_run_is_told_in_words_users_know() {
    with_daemon("refused", |mut daemon| async move {
        let sandbox = daemon.sandbox("refused").await;
        let id = daemon.create(&sandbox, container_config("nope", &["nope"])).await.unwrap();
        let error = daemon.start_container(&id).await.unwrap_err();
        assert!(error.message().contains(r#"exec: "nope": executable file not found in $PATH"#), "{error}");
        let status = daemon.status(&id).await;
        assert_eq!((status.exit_code, status.reason.as_str()), (128, "StartError"));
        assert!(status.message.contains("executable file not found"));

        let mut missing = container_config("image", &["true"]);
        missing.image = Some(cri::ImageSpec { image: "no.such/image:1".into(), ..cri::ImageSpec::default() });
        let error = daemon.create(&sandbox, missing).await.unwrap_err();
        assert_eq!(error.code(), Code::NotFound);
        assert!(error.message().contains("no.such/image:1"), "{error}");

        let mut mapped = container_config("mapped", &["true"]);
        mapped.mounts = vec![cri::Mount {
            container_path: "/v".into(),
            host_path: "/no/such/path".into(),
            ..cri::Mount::default()
        }];
        let error = daemon.create(&sandbox, mapped).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument);
        assert!(error.message().contains("/no/such/path"), "{error}");

        let running = daemon.container(&sandbox, container_config("running", &["sleep"])).await;
        let error = daemon.exec(&running, &["nope"]).await.unwrap_err();
        assert!(error.message().contains(r#"exec: "nope": executable file not found in $PATH"#), "{error}");
        let unknown = cri::ContainerStatusRequest { container_id: "feed".into(), verbose: false };
        assert_eq!(daemon.runtime.container_status(unknown).await.unwrap_err().code(), Code::NotFound);
        let mut systemd = sandbox_config("systemd", "");
        systemd.linux.as_mut().unwrap().cgroup_parent = "kubepods.slice".into();
        let error = daemon.run(systemd).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument);
        assert!(
            error.message().starts_with("config.linux.cgroup_parent: \"kubepods.slice\" is a systemd slice"),
            "{error}"
        );
        daemon
    });
}

#[test]
fn a_sandbox_that_cannot_join_the_network_leaves_nothing() {
    with_daemon("nonet", |mut daemon| async move {
        let conflist = daemon.path().join("cni-conf/10-pods.conflist");
        let good = fs::read_to_string(&conflist).unwrap();
        fs::write(&conflist, good.replace("\"type\": \"portmap\"", "\"type\": \"no-such-plugin\"")).unwrap();
        let config = sandbox_config("nonet", "");
        let error = daemon.run(config.clone()).await.unwrap_err();
        assert!(error.message().contains("no-such-plugin"), "{error}");
        let listed = daemon.runtime.list_pod_sandbox(cri::ListPodSandboxRequest::default()).await.unwrap().into_inner();
        assert!(listed.items.is_empty());
        // The configuration is read anew each time, and the name is free.
        fs::write(&conflist, good).unwrap();
        daemon.run(config).await.unwrap();
        let status = daemon.runtime.status(cri::StatusRequest { verbose: true }).await.unwrap().into_inner();
        assert!(status.status.unwrap().conditions.iter().all(|condition| condition.status));
        daemon
    });
}

#[test]
fn identity_environment_and_limits_are_as_asked_for_and_memory_runs_out_at_its_limit() {
    with_daemon("limits", |mut daemon| async move {
        let sandbox = daemon.sandbox("limits").await;
        let mut config = container_config("limited", &["sleep"]);
        config.envs = vec![cri::KeyValue { key: "GREETING".into(), value: b"ahoy".to_vec() }];
        let linux = config.linux.as_mut().unwrap();
        linux.resources = Some(cri::LinuxContainerResources {
            memory_limit_in_bytes: 64 << 20,
            cpu_shares: 512,
            oom_score_adj: 500,
            ..cri::LinuxContainerResources::default()
        });
        let context = linux.security_context.as_mut().unwrap();
        context.run_as_username = "rower".into();
        context.supplemental_groups = vec![4242];
        context.no_new_privs = true;
        context.capabilities =
            Some(cri::Capability { drop_capabilities: words(&["ALL"]), ..cri::Capability::default() });
        let id = daemon.container(&sandbox, config).await;
        let identity = daemon.output(&id, &["id"]).await;
        assert!(identity.starts_with("uid=1000 gid=1000 groups="), "{identity}");
        for expected in
            ["1001", "4242", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"]
        {
            assert!(identity.contains(expected), "{expected} in {identity}");
        }
        assert_eq!(daemon.output(&id, &["env", "GREETING"]).await, "ahoy\n");
        assert_eq!(daemon.output(&id, &["env", "HOME"]).await, "/tmp\n");
        let user = daemon.status(&id).await.user.unwrap().linux.unwrap();
        assert_eq!((user.uid, user.supplemental_groups), (1000, vec![1000, 1001, 4242]));

        let stats = cri::ContainerStatsRequest { container_id: id.clone() };
        let memory =
            daemon.runtime.container_stats(stats.clone()).await.unwrap().into_inner().stats.unwrap().memory.unwrap();
        assert!(memory.available_bytes.unwrap().value <= 64 << 20);
        let update =
            cri::LinuxContainerResources { memory_limit_in_bytes: 32 << 20, ..cri::LinuxContainerResources::default() };
        let request = cri::UpdateContainerResourcesRequest {
            container_id: id.clone(),
            linux: Some(update),
            ..cri::UpdateContainerResourcesRequest::default()
        };
        daemon.runtime.update_container_resources(request).await.unwrap();
        let memory = daemon.runtime.container_stats(stats).await.unwrap().into_inner().stats.unwrap().memory.unwrap();
        assert!(memory.available_bytes.unwrap().value <= 32 << 20);

        // A new score for the kernel's choice of a victim reaches what runs and what is started later.
        let score = |pid: &str| fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim().to_owned();
        let pid = daemon.pid(&id).await.to_string();
        assert_eq!(score(&pid), "500");
        let update = cri::LinuxContainerResources { oom_score_adj: 777, ..cri::LinuxContainerResources::default() };
        let request = cri::UpdateContainerResourcesRequest {
            container_id: id.clone(),
            linux: Some(update),
            ..cri::UpdateContainerResourcesRequest::default()
        };
        daemon.runtime.update_container_resources(request).await.unwrap();
        assert_eq!(score(&pid), "777");
        assert_eq!(daemon.output(&id, &["cat", "/proc/self/oom_score_adj"]).await, "777\n");
        let resources = daemon.status(&id).await.resources.unwrap().linux.unwrap();
        assert_eq!((resources.oom_score_adj, resources.memory_limit_in_bytes), (777, 32 << 20));

        let mut hungry = container_config("hungry", &["oom"]);
        hungry.linux.as_mut().unwrap().resources = Some(cri::LinuxContainerResources {
            memory_limit_in_bytes: 16 << 20,
            ..cri::LinuxContainerResources::default()
        });
        let id = daemon.container(&sandbox, hungry).await;
        let status = daemon.exited(&id).await;
        assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));
        daemon
    });
}

#[test]
fn mounts_read_only_roots_and_the_sandboxes_shared_memory_are_as_asked_for() {
    with_daemon("mounts", |mut daemon| async move {
        let sandbox = daemon.sandbox("mounts").await;
        let volume = daemon.path().join("volume");
        fs::create_dir(&volume).unwrap();
        fs::write(volume.join("hello"), "from the host").unwrap();
        let mount = |path: &str, readonly| cri::Mount {
            container_path: path.into(),
            host_path: volume.display().to_string(),
            readonly,
            ..cri::Mount::default()
        };
        let mut config = container_config("a", &["sleep"]);
        config.mounts = vec![mount("/rw", false), mount("/ro", true)];
        config.linux.as_mut().unwrap().security_context.as_mut().unwrap().readonly_rootfs = true;
        let a = daemon.container(&sandbox, config).await;
        let b = daemon.container(&sandbox, container_config("b", &["sleep"])).await;
        assert_eq!(daemon.output(&a, &["cat", "/ro/hello"]).await, "from the host");
        daemon.output(&a, &["write", "/rw/written", "by a container"]).await;
        assert!(volume.join("written").exists());
        for refused in ["/ro/written", "/at-the-root", "/proc/sys/kernel/hostname", "/sys/fs/cgroup/x"] {
            assert_ne!(daemon.exec(&a, &["write", refused, "x"]).await.unwrap().exit_code, 0, "{refused}");
        }
        daemon.output(&a, &["write", "/dev/shm/shared", "memory"]).await;
        assert!(daemon.output(&b, &["cat", "/dev/shm/shared"]).await.starts_with("memory"));
        daemon.output(&b, &["write", "/at-the-root", "x"]).await;
        daemon
    });
}

#[test]
fn a_pod_in_the_hosts_namespaces_and_one_with_shared_pids() {
    with_daemon("modes", |mut daemon| async move {
        let mut config = sandbox_config("host", "");
        config.hostname.clear();
        let options = cri::NamespaceOption {
            network: cri::NamespaceMode::Node as i32,
            pid: cri::NamespaceMode::Container as i32,
            ipc: cri::NamespaceMode::Node as i32,
            ..cri::NamespaceOption::default()
        };
        config.linux.as_mut().unwrap().security_context.as_mut().unwrap().namespace_options = Some(options.clone());
        let sandbox = daemon.run(config).await.unwrap();
        let request = cri::PodSandboxStatusRequest { pod_sandbox_id: sandbox.clone(), verbose: false };
        let status = daemon.runtime.pod_sandbox_status(request).await.unwrap().into_inner().status.unwrap();
        assert_eq!(status.network.unwrap().ip, "");
        let mut container = container_config("c", &["sleep"]);
        container.linux.as_mut().unwrap().security_context.as_mut().unwrap().namespace_options = Some(options);
        let id = daemon.container(&sandbox, container).await;
        let pid = daemon.pid(&id).await;
        let namespace = |pid: &str, kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
        for kind in ["net", "ipc", "uts"] {
            assert_eq!(namespace(&pid.to_string(), kind), namespace("thread-self", kind), "{kind}");
        }

        let mut config = sandbox_config("shared", "");
        let options = cri::NamespaceOption { pid: cri::NamespaceMode::Pod as i32, ..cri::NamespaceOption::default() };
        config.linux.as_mut().unwrap().security_context.as_mut().unwrap().namespace_options = Some(options.clone());
        let sandbox = daemon.run(config).await.unwrap();
        let mut ids = Vec::new();
        for name in ["one", "two"] {
            let mut container = container_config(name, &["sleep"]);
            container.linux.as_mut().unwrap().security_context.as_mut().unwrap().namespace_options =
                Some(options.clone());
            ids.push(daemon.container(&sandbox, container).await);
        }
        let (one, two) = (daemon.pid(&ids[0]).await.to_string(), daemon.pid(&ids[1]).await.to_string());
        assert_eq!(namespace(&one, "pid"), namespace(&two, "pid"));
        assert_ne!(namespace(&one, "pid"), namespace("thread-self", "pid"));
        daemon
    });
}
