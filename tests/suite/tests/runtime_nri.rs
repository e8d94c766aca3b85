//! Plugins of the Node Resource Interface and the runtime: what they are told and in which order, what they may change, and
//! what becomes of those that do not answer. Needs root, and socat for the plugin that the runtime launches.

mod nri_plugin;
#[allow(dead_code, reason = "shared with the tests of other files, which use the rest")]
mod runtime_daemon;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nri_plugin::{Answer, Call, Plugin};
use oarlock_nri::api;
use oarlock_proto::cri;
use runtime_daemon::{Daemon, LIMIT, container_config, sandbox_config, with_daemon};

fn socket(daemon: &Daemon) -> PathBuf {
    daemon.path().join("run/nri.sock")
}

fn asks_for(call: &Call, method: &str, answer: impl FnOnce() -> Answer) -> Answer {
    if call.method == method { answer() } else { Answer::nothing() }
}

fn adjustment(adjust: api::ContainerAdjustment) -> Answer {
    Answer::of(&api::CreateContainerResponse { adjust: Some(adjust), ..api::CreateContainerResponse::default() })
}

fn variable(key: &str, value: &str) -> api::KeyValue {
    api::KeyValue { key: key.into(), value: value.into() }
}

fn memory(limit: i64) -> api::LinuxResources {
    let limit = Some(api::OptionalInt64 { value: limit });
    api::LinuxResources {
        memory: Some(api::LinuxMemory { limit, ..api::LinuxMemory::default() }),
        ..api::LinuxResources::default()
    }
}

fn memory_limit(status: &cri::ContainerStatus) -> i64 {
    status.resources.as_ref().unwrap().linux.as_ref().unwrap().memory_limit_in_bytes
}

async fn stop(daemon: &mut Daemon, id: &str) {
    let request = cri::StopContainerRequest { container_id: id.to_owned(), timeout: 0 };
    daemon.runtime.stop_container(request).await.unwrap();
}

async fn remove(daemon: &mut Daemon, id: &str) {
    let request = cri::RemoveContainerRequest { container_id: id.to_owned() };
    daemon.runtime.remove_container(request).await.unwrap();
}

#[test]
fn a_plugin_hears_of_every_step_once_and_in_order() {
    with_daemon("nri-steps", |mut daemon| async move {
        let mut plugin = Plugin::connect(&socket(&daemon), "10", "steps", |_| Answer::nothing()).await;
        let state: api::SynchronizeRequest = plugin.call("Synchronize").await.decode();
        assert!(state.pods.is_empty() && state.containers.is_empty() && !state.more);

        let sandbox = daemon.sandbox("steps").await;
        let id = daemon.container(&sandbox, container_config("long", &["sleep", "1000"])).await;
        let update = cri::LinuxContainerResources { cpu_shares: 512, ..cri::LinuxContainerResources::default() };
        let request = cri::UpdateContainerResourcesRequest {
            container_id: id.clone(),
            linux: Some(update.clone()),
            ..cri::UpdateContainerResourcesRequest::default()
        };
        daemon.runtime.update_container_resources(request).await.unwrap();
        stop(&mut daemon, &id).await;
        remove(&mut daemon, &id).await;
        let short = daemon.container(&sandbox, container_config("short", &["exit", "3"])).await;
        daemon.exited(&short).await;
        let request = cri::UpdatePodSandboxResourcesRequest {
            pod_sandbox_id: sandbox.clone(),
            resources: Some(update),
            ..cri::UpdatePodSandboxResourcesRequest::default()
        };
        daemon.runtime.update_pod_sandbox_resources(request).await.unwrap();
        let request = cri::StopPodSandboxRequest { pod_sandbox_id: sandbox.clone() };
        daemon.runtime.stop_pod_sandbox(request.clone()).await.unwrap();
        daemon.runtime.stop_pod_sandbox(request).await.unwrap();
        let request = cri::RemovePodSandboxRequest { pod_sandbox_id: sandbox };
        daemon.runtime.remove_pod_sandbox(request).await.unwrap();

        let mut heard = Vec::new();
        while heard.last().is_none_or(|last| last != "RemovePodSandbox steps") {
            let call = plugin.next().await;
            heard.push(format!("{} {}", call.method, call.about()));
        }
        // The end of a container that ends by itself is heard of whenever it happens.
        let end = heard.iter().position(|call| call == "StopContainer short").expect("the end is heard of");
        assert!(heard[..end].iter().any(|call| call == "StartContainer short"));
        heard.remove(end);
        let expected = [
            "RunPodSandbox steps",
            "CreateContainer long",
            "PostCreateContainer long",
            "StartContainer long",
            "PostStartContainer long",
            "UpdateContainer long",
            "PostUpdateContainer long",
            "StopContainer long",
            "RemoveContainer long",
            "CreateContainer short",
            "PostCreateContainer short",
            "StartContainer short",
            "PostStartContainer short",
            "UpdatePodSandbox steps",
            "PostUpdatePodSandbox steps",
            "StopPodSandbox steps",
            "RemoveContainer short",
            "RemovePodSandbox steps",
        ];
        assert_eq!(heard, expected);
        daemon
    });
}

/// An adjustment of all that a process in the test image can see.
fn everything(volume: &str) -> api::ContainerAdjustment {
    let limit = api::PosixRlimit { r#type: "RLIMIT_NOFILE".into(), hard: 333, soft: 222 };
    let mount = |destination: &str| api::Mount {
        destination: destination.into(),
        source: volume.into(),
        r#type: "bind".into(),
        options: ["rbind", "ro"].map(str::to_owned).to_vec(),
    };
    api::ContainerAdjustment {
        annotations: [("plugins.example/was-here".to_owned(), "yes".to_owned())].into(),
        mounts: vec![mount("/given")],
        env: vec![variable("GIVEN", "by the plugin"), variable("-TAKEN", "")],
        rlimits: vec![limit],
        cdi_devices: vec![api::CdiDevice { name: "vendor.example/class=one".into() }],
        linux: Some(api::LinuxContainerAdjustment {
            devices: vec![api::LinuxDevice {
                path: "/dev/given".into(),
                r#type: "c".into(),
                major: 1,
                minor: 5,
                ..api::LinuxDevice::default()
            }],
            resources: Some(api::LinuxResources { pids: Some(api::LinuxPids { limit: 99 }), ..memory(64 << 20) }),
            oom_score_adj: Some(api::OptionalInt { value: 321 }),
            sysctl: [("net.ipv4.ip_default_ttl".to_owned(), "77".to_owned())].into(),
            scheduler: Some(api::LinuxScheduler { policy: 4, nice: 7, ..api::LinuxScheduler::default() }),
            ..api::LinuxContainerAdjustment::default()
        }),
        ..api::ContainerAdjustment::default()
    }
}

#[test]
fn what_a_plugin_adjusts_the_process_sees() {
    with_daemon("nri-adjust", |mut daemon| async move {
        let volume = daemon.path().join("volume");
        fs::create_dir(&volume).unwrap();
        fs::write(volume.join("file"), "content").unwrap();
        fs::create_dir(daemon.path().join("cdi")).unwrap();
        let device = r#"{"cdiVersion": "0.6.0", "kind": "vendor.example/class",
            "devices": [{"name": "one", "containerEdits": {"env": ["FROM_CDI=1"]}}]}"#;
        fs::write(daemon.path().join("cdi/vendor.json"), device).unwrap();
        let volume = volume.display().to_string();
        let mut plugin = Plugin::connect(&socket(&daemon), "10", "adjust", move |call| {
            asks_for(call, "CreateContainer", || adjustment(everything(&volume)))
        })
        .await;

        let sandbox = daemon.sandbox("adjust").await;
        let mut config = container_config("adjusted", &["sleep", "1000"]);
        config.envs = vec![cri::KeyValue { key: "TAKEN".into(), value: "1".into() }];
        let id = daemon.container(&sandbox, config).await;
        let asked: api::CreateContainerRequest = plugin.call("CreateContainer").await.decode();
        let (pod, container) = (asked.pod.unwrap(), asked.container.unwrap());
        assert_eq!((pod.id, pod.name, pod.namespace), (sandbox.clone(), "adjust".to_owned(), "tests".to_owned()));
        assert!(pod.ips[0].starts_with("10.77.0."), "{:?}", pod.ips);
        assert!(pod.linux.unwrap().namespaces.iter().any(|namespace| namespace.r#type == "network"));
        assert_eq!((container.id.as_str(), container.args), (id.as_str(), vec!["sleep".to_owned(), "1000".to_owned()]));
        assert!(container.env.contains(&"TAKEN=1".to_owned()));
        assert!(container.mounts.iter().any(|mount| mount.destination == "/proc"));
        assert!(!container.linux.unwrap().seccomp_policy.unwrap().syscalls.is_empty());

        let env = daemon.output(&id, &["env"]).await;
        assert!(env.contains("GIVEN=by the plugin") && env.contains("FROM_CDI=1") && !env.contains("TAKEN"), "{env}");
        assert_eq!(daemon.output(&id, &["cat", "/given/file"]).await, "content");
        let pid = daemon.pid(&id).await;
        let proc = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
        let files = proc("limits").lines().find(|line| line.starts_with("Max open files")).unwrap().to_owned();
        assert_eq!(files.split_whitespace().skip(3).take(2).collect::<Vec<_>>(), ["222", "333"]);
        assert_eq!(proc("oom_score_adj").trim(), "321");
        assert_eq!(daemon.output(&id, &["cat", "/proc/self/oom_score_adj"]).await, "321\n");
        assert_eq!(daemon.output(&id, &["cat", "/proc/sys/net/ipv4/ip_default_ttl"]).await.trim(), "77");
        let stat = proc("stat");
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        // Counted from the state: nice is the 17th field, the policy the 39th; 3 is SCHED_BATCH.
        assert_eq!((fields[16], fields[38]), ("7", "3"));
        assert!(daemon.output(&id, &["ls", "/dev"]).await.contains("given"));
        assert_eq!(memory_limit(&daemon.status(&id).await), 64 << 20);

        // Limits of a container that has not started are changed without a word of the plugin being lost.
        let waiting = daemon.create(&sandbox, container_config("waiting", &["sleep", "9"])).await;
        let waiting = waiting.unwrap();
        let update = cri::LinuxContainerResources { cpu_shares: 300, ..cri::LinuxContainerResources::default() };
        let request = cri::UpdateContainerResourcesRequest {
            container_id: waiting.clone(),
            linux: Some(update),
            ..cri::UpdateContainerResourcesRequest::default()
        };
        daemon.runtime.update_container_resources(request).await.unwrap();
        daemon.start_container(&waiting).await.unwrap();
        assert!(daemon.output(&waiting, &["env"]).await.contains("GIVEN=by the plugin"));
        daemon
    });
}

#[test]
fn a_plugin_is_told_the_state_when_it_comes_and_when_the_daemon_is_back() {
    with_daemon("nri-state", |mut daemon| async move {
        let sandbox = daemon.sandbox("state").await;
        let running = daemon.container(&sandbox, container_config("running", &["sleep", "1000"])).await;
        let over = daemon.container(&sandbox, container_config("over", &["true"])).await;
        daemon.exited(&over).await;
        for round in 0..2 {
            let mut plugin = Plugin::connect(&socket(&daemon), "10", "state", |_| Answer::nothing()).await;
            let state: api::SynchronizeRequest = plugin.call("Synchronize").await.decode();
            assert_eq!(state.pods.iter().map(|pod| pod.id.as_str()).collect::<Vec<_>>(), [sandbox.as_str()]);
            let [container] = state.containers.as_slice() else { panic!("{:?}", state.containers) };
            assert_eq!((&container.id, &container.name), (&running, &"running".to_owned()));
            assert_eq!(container.state, api::ContainerState::ContainerRunning as i32);
            assert_eq!(container.args, ["sleep", "1000"]);
            if round == 0 {
                daemon.crash().await;
                plugin.closed().await;
                daemon.open().await;
            }
        }
        daemon
    });
}

#[test]
fn two_plugins_cannot_set_one_thing_and_nothing_is_left_of_the_attempt() {
    with_daemon("nri-conflict", |mut daemon| async move {
        let set = |value: &'static str| {
            move |call: &Call| {
                asks_for(call, "CreateContainer", || {
                    adjustment(api::ContainerAdjustment {
                        env: vec![variable("CONTESTED", value)],
                        ..api::ContainerAdjustment::default()
                    })
                })
            }
        };
        // The index orders them, not who came first.
        let mut second = Plugin::connect(&socket(&daemon), "20", "second", set("2")).await;
        let mut first = Plugin::connect(&socket(&daemon), "10", "first", set("1")).await;
        let sandbox = daemon.sandbox("conflict").await;
        let error = daemon.create(&sandbox, container_config("c", &["sleep", "1000"])).await.unwrap_err();
        assert_eq!(error.message(), r#"plugins "20-second" and "10-first" both tried to set Env CONTESTED"#);
        let asked: api::CreateContainerRequest = second.call("CreateContainer").await.decode();
        assert!(asked.container.unwrap().env.contains(&"CONTESTED=1".to_owned()));
        // Both hear that it did not come to be.
        assert_eq!(first.call("RemoveContainer").await.about(), "c");
        let all = daemon.runtime.list_containers(cri::ListContainersRequest::default()).await.unwrap().into_inner();
        assert!(all.containers.is_empty());
        drop(second);
        let deadline = Instant::now() + LIMIT;
        let env = loop {
            assert!(Instant::now() < deadline, "a plugin that went is still asked");
            // The daemon may not have noticed yet that the plugin went.
            match daemon.create(&sandbox, container_config("c", &["sleep", "1000"])).await {
                Ok(id) => {
                    daemon.start_container(&id).await.unwrap();
                    break daemon.output(&id, &["env"]).await;
                }
                Err(_) => tokio::task::yield_now().await,
            }
        };
        assert!(env.contains("CONTESTED=1"));
        daemon
    });
}

#[test]
fn a_plugin_that_does_not_answer_is_dropped_and_one_that_refuses_is_heard() {
    with_daemon("nri-silence", |mut daemon| async move {
        daemon.plugin_limit = Duration::from_secs(2);
        daemon.crash().await;
        daemon.open().await;
        let mut silent = Plugin::connect(&socket(&daemon), "10", "silent", |call| {
            asks_for(call, "CreateContainer", || Answer::Silence)
        })
        .await;
        let mut strict = Plugin::connect(&socket(&daemon), "20", "strict", |call| match call.method.as_str() {
            "Configure" => Answer::of(&api::ConfigureResponse { events: (1 << 14) - 1 }),
            "CreateContainer" if call.about() == "bad" => Answer::refuse("no bad containers here"),
            "RunPodSandbox" if call.about() == "unwanted" => Answer::refuse("no such pods here"),
            "ValidateContainerAdjustment" if call.about() == "doubtful" => {
                let verdict = api::ValidateContainerAdjustmentResponse { reject: true, reason: "not sure".into() };
                Answer::of(&verdict)
            }
            _ => Answer::nothing(),
        })
        .await;
        let sandbox = daemon.sandbox("silence").await;
        daemon.container(&sandbox, container_config("good", &["sleep", "1000"])).await;
        silent.closed().await;
        assert_eq!(strict.call("StartContainer").await.about(), "good");

        let error = daemon.create(&sandbox, container_config("bad", &["sleep", "1000"])).await.unwrap_err();
        assert!(error.message().contains("no bad containers here"), "{error}");
        let error = daemon.create(&sandbox, container_config("doubtful", &["sleep", "1000"])).await.unwrap_err();
        assert!(error.message().contains("rejected container adjustment, reason: not sure"), "{error}");
        let unwanted = sandbox_config("unwanted", &daemon.log_directory("unwanted"));
        let error = daemon.run(unwanted).await.unwrap_err();
        assert!(error.message().contains("no such pods here"), "{error}");
        let all = daemon.runtime.list_pod_sandbox(cri::ListPodSandboxRequest::default()).await.unwrap().into_inner();
        assert_eq!(all.items.len(), 1);
        daemon
    });
}

#[test]
fn a_plugin_from_before_an_event_had_its_own_call_is_told_in_the_old_way() {
    with_daemon("nri-old", |mut daemon| async move {
        let mut plugin = Plugin::connect(&socket(&daemon), "10", "old", |call| match call.method.as_str() {
            "Configure" | "Synchronize" | "CreateContainer" | "UpdateContainer" | "StopContainer" | "StateChange" => {
                Answer::nothing()
            }
            _ => Answer::Error(12, "unknown method".to_owned()),
        })
        .await;
        let sandbox = daemon.sandbox("old").await;
        daemon.container(&sandbox, container_config("c", &["sleep", "1000"])).await;
        let change: api::StateChangeEvent = plugin.call("StateChange").await.decode();
        assert_eq!((change.event, change.pod.unwrap().id), (api::Event::RunPodSandbox as i32, sandbox));
        let events = [api::Event::PostCreateContainer, api::Event::StartContainer, api::Event::PostStartContainer];
        for event in events {
            let change: api::StateChangeEvent = plugin.call("StateChange").await.decode();
            assert_eq!((change.event, change.container.unwrap().name), (event as i32, "c".to_owned()));
        }
        daemon
    });
}

#[test]
fn plugins_update_and_evict_containers() {
    with_daemon("nri-update", |mut daemon| async move {
        let sandbox = daemon.sandbox("update").await;
        let first = daemon.container(&sandbox, container_config("first", &["sleep", "1000"])).await;
        let other = first.clone();
        let mut plugin = Plugin::connect(&socket(&daemon), "10", "update", move |call| match call.method.as_str() {
            "Synchronize" => Answer::of(&api::SynchronizeResponse {
                update: vec![api::ContainerUpdate::of(&other, memory(32 << 20))],
                more: false,
            }),
            "CreateContainer" => Answer::of(&api::CreateContainerResponse {
                update: vec![api::ContainerUpdate::of(&other, memory(48 << 20))],
                ..api::CreateContainerResponse::default()
            }),
            // Whatever is asked for, the plugin has its own idea.
            "UpdateContainer" => {
                let asked: api::UpdateContainerRequest = call.decode();
                let id = asked.container.unwrap().id;
                let mut wanted = memory(96 << 20);
                wanted.pids = Some(api::LinuxPids { limit: 55 });
                Answer::of(&api::UpdateContainerResponse {
                    update: vec![api::ContainerUpdate::of(id, wanted)],
                    ..api::UpdateContainerResponse::default()
                })
            }
            _ => Answer::nothing(),
        })
        .await;
        plugin.call("Synchronize").await;
        // Making another container waits for the plugin to be taken in, and so for the update.
        let second = daemon.create(&sandbox, container_config("second", &["sleep", "1000"])).await.unwrap();
        assert_eq!(memory_limit(&daemon.status(&first).await), 48 << 20);
        daemon.start_container(&second).await.unwrap();
        let request = cri::UpdateContainerResourcesRequest {
            container_id: second.clone(),
            linux: Some(cri::LinuxContainerResources {
                memory_limit_in_bytes: 80 << 20,
                ..cri::LinuxContainerResources::default()
            }),
            ..cri::UpdateContainerResourcesRequest::default()
        };
        daemon.runtime.update_container_resources(request).await.unwrap();
        assert_eq!(memory_limit(&daemon.status(&second).await), 96 << 20);
        let group = fs::read_to_string(format!("/proc/{}/cgroup", daemon.pid(&second).await)).unwrap();
        let pids = group.lines().find_map(|line| line.split_once(":pids:")).map(|(_, path)| path).unwrap_or_default();
        let limit = format!("/sys/fs/cgroup/pids{pids}/pids.max");
        if !pids.is_empty() {
            assert_eq!(fs::read_to_string(limit).unwrap().trim(), "55");
        }

        // Unasked, with one update that cannot be done, one of a container that is not there, and an eviction.
        let impossible = api::LinuxResources {
            rdt_class: Some(api::OptionalString { value: "gold".into() }),
            ..api::LinuxResources::default()
        };
        let request = api::UpdateContainersRequest {
            update: vec![
                api::ContainerUpdate::of(&first, memory(40 << 20)),
                api::ContainerUpdate::of(&second, impossible),
                api::ContainerUpdate::of("not-there", memory(1 << 20)),
            ],
            evict: vec![api::ContainerEviction { container_id: second.clone(), reason: "makes room".into() }],
        };
        let answer = plugin.ask("UpdateContainers", &request).await.unwrap();
        let answer: api::UpdateContainersResponse = prost::Message::decode(answer.as_slice()).unwrap();
        assert_eq!(
            answer.failed.iter().map(|failed| failed.container_id.as_str()).collect::<Vec<_>>(),
            [second.as_str()]
        );
        assert_eq!(memory_limit(&daemon.status(&first).await), 40 << 20);
        assert_eq!(daemon.exited(&second).await.exit_code, 137);
        assert_eq!(plugin.call("StopContainer").await.about(), "second");
        daemon
    });
}

#[test]
fn installed_plugins_are_launched_with_their_configuration() {
    with_daemon("nri-launch", |mut daemon| async move {
        let meeting = daemon.path().join("meeting.sock");
        let listener = UnixListener::bind(&meeting).unwrap();
        let (plugins, configurations) = (daemon.path().join("data/nri/plugins"), daemon.path().join("data/nri/conf.d"));
        fs::create_dir_all(&plugins).unwrap();
        fs::create_dir_all(&configurations).unwrap();
        fs::write(configurations.join("launched.conf"), "word: 1").unwrap();
        let program = plugins.join("10-launched");
        let script = format!(
            "#!/bin/sh\n[ \"$NRI_PLUGIN_IDX-$NRI_PLUGIN_NAME\" = 10-launched ] || exit 1\n\
             exec /usr/bin/socat FD:$NRI_PLUGIN_SOCKET UNIX-CONNECT:{}\n",
            meeting.display()
        );
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        daemon.crash().await;
        // The daemon waits for its plugins before it serves.
        let met = tokio::task::spawn_blocking(move || listener.accept().unwrap().0);
        let meeting = async {
            let stream = met.await.unwrap();
            Plugin::over(stream, "", "", |call| {
                asks_for(call, "CreateContainer", || {
                    let env = vec![variable("LAUNCHED", "1")];
                    adjustment(api::ContainerAdjustment { env, ..api::ContainerAdjustment::default() })
                })
            })
            .await
        };
        let (mut plugin, ()) = tokio::join!(meeting, daemon.open());
        let configuration: api::ConfigureRequest = plugin.call("Configure").await.decode();
        assert_eq!((configuration.config.as_str(), configuration.runtime_name.as_str()), ("word: 1", "oarlock"));
        let sandbox = daemon.sandbox("launch").await;
        let id = daemon.container(&sandbox, container_config("c", &["sleep", "1000"])).await;
        assert!(daemon.output(&id, &["env"]).await.contains("LAUNCHED=1"));
        // A daemon that stops says goodbye, and takes along what it launched.
        daemon.crash().await;
        plugin.call("Shutdown").await;
        plugin.closed().await;
        fs::remove_file(program).unwrap();
        daemon.open().await;
        daemon
    });
}
