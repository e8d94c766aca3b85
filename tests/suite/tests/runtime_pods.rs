//! What pods ask of the runtime beyond the plain case: host ports on loopback, user namespaces, other OCI runtimes.
//! Needs root, and crun and runc of the distribution.

#[allow(dead_code, reason = "shared with the tests of other files, which use the rest")]
mod runtime_daemon;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::{MetadataExt, chown};
use std::time::Instant;

use nix::mount::{MsFlags, mount, umount};
use oarlock_proto::cri;
use runtime_daemon::{IMAGE, LIMIT, container_config, sandbox_config, with_daemon, words};

fn port(host_port: i32, container_port: i32, protocol: cri::Protocol) -> cri::PortMapping {
    cri::PortMapping { host_port, container_port, protocol: protocol as i32, host_ip: String::new() }
}

/// Sends a word on a connection to the host's port and reads it back; None while nobody serves.
fn echo(stream: &mut TcpStream, word: &[u8]) -> Option<()> {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(word).ok()?;
    let mut answer = vec![0; word.len()];
    stream.read_exact(&mut answer).ok()?;
    assert_eq!(answer, word);
    Some(())
}

fn served(port: u16) -> TcpStream {
    oarlock_testkit::wait_for("an answer by the host's port", LIMIT, || {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
        echo(&mut stream, b"first").map(|()| stream)
    })
}

#[test]
fn a_host_port_answers_on_loopback_while_the_daemon_is_gone_and_closes_with_its_pod() {
    with_daemon("ports", |mut daemon| async move {
        let route_localnet = || std::fs::read_to_string("/proc/sys/net/ipv4/conf/all/route_localnet").unwrap();
        let before = route_localnet();
        let taken = TcpListener::bind(("127.0.0.1", 18079)).unwrap();
        let mut config = sandbox_config("ports", &daemon.log_directory("ports"));
        config.port_mappings = vec![
            port(18080, 8080, cri::Protocol::Tcp),
            port(18081, 8081, cri::Protocol::Udp),
            port(18079, 8080, cri::Protocol::Tcp),
        ];
        let sandbox = daemon.run(config).await.unwrap();
        daemon.container(&sandbox, container_config("tcp", &["tcp-echo", "8080"])).await;
        daemon.container(&sandbox, container_config("udp", &["udp-echo", "8081"])).await;

        let mut held = tokio::task::spawn_blocking(|| served(18080)).await.unwrap();
        daemon.crash().await;
        tokio::task::spawn_blocking(move || {
            echo(&mut held, b"the connection goes on").unwrap();
            served(18080);
            let socket = UdpSocket::bind(("127.0.0.1", 0)).unwrap();
            socket.connect(("127.0.0.1", 18081)).unwrap();
            socket.set_read_timeout(Some(std::time::Duration::from_millis(200))).unwrap();
            let mut answer = [0; 16];
            let deadline = Instant::now() + LIMIT;
            let count = loop {
                // The echo server may only be starting.
                let _ = socket.send(b"datagram");
                match socket.recv(&mut answer) {
                    Ok(count) => break count,
                    Err(_) => assert!(Instant::now() < deadline, "no datagram comes back"),
                }
            };
            assert_eq!(&answer[..count], b"ports: datagram");
        })
        .await
        .unwrap();
        daemon.open().await;

        // Whoever had the port keeps it, and the pod is none the worse.
        assert!(TcpStream::connect(("127.0.0.1", 18079)).is_ok() && taken.accept().is_ok());
        let stop = cri::StopPodSandboxRequest { pod_sandbox_id: sandbox.clone() };
        daemon.runtime.stop_pod_sandbox(stop).await.unwrap();
        assert!(TcpStream::connect(("127.0.0.1", 18080)).is_err());
        assert_eq!(route_localnet(), before);
        daemon
    });
}

/// Where the namespace's root is on the host.
const ROOT: u32 = 200_000;

fn mappings() -> Vec<cri::IdMapping> {
    vec![cri::IdMapping { host_id: ROOT, container_id: 0, length: 65536 }]
}

fn in_user_namespace(options: Option<&mut cri::NamespaceOption>) {
    options.expect("the configuration names namespaces").userns_options =
        Some(cri::UserNamespace { mode: cri::NamespaceMode::Pod as i32, uids: mappings(), gids: mappings() });
}

fn user_container(name: &str, command: &[&str]) -> cri::ContainerConfig {
    let mut config = container_config(name, command);
    let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    in_user_namespace(context.namespace_options.as_mut());
    config
}

fn user_sandbox(name: &str, log_directory: &str) -> cri::PodSandboxConfig {
    let mut config = sandbox_config(name, log_directory);
    let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    in_user_namespace(context.namespace_options.as_mut());
    config
}

#[test]
fn root_of_a_user_namespace_is_nobody_outside_and_owns_its_files_inside() {
    with_daemon("users", |mut daemon| async move {
        let status = daemon.runtime.status(cri::StatusRequest::default()).await.unwrap().into_inner();
        let handler = status.runtime_handlers.iter().find(|handler| handler.name.is_empty()).unwrap();
        assert!(handler.features.as_ref().unwrap().user_namespaces);

        let volume = daemon.path().join("volume");
        std::fs::create_dir(&volume).unwrap();
        std::fs::write(volume.join("of-root"), "mine").unwrap();
        std::fs::write(volume.join("of-user"), "theirs").unwrap();
        chown(volume.join("of-user"), Some(1000), Some(1000)).unwrap();
        // Nobody but root gets there by the path.
        let hidden = daemon.path().join("hidden");
        std::fs::create_dir(&hidden).unwrap();
        std::fs::set_permissions(&hidden, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        std::fs::write(hidden.join("file"), "hidden").unwrap();

        let mut config = user_sandbox("users", &daemon.log_directory("users"));
        config.linux.as_mut().unwrap().sysctls =
            [("kernel.shmmax".to_owned(), "123456".to_owned()), ("net.ipv4.ip_forward".to_owned(), "0".to_owned())]
                .into();
        let sandbox = daemon.run(config).await.unwrap();
        let mut main = user_container("main", &["sleep"]);
        let mount = |host: &std::path::Path, container: &str| cri::Mount {
            host_path: host.display().to_string(),
            container_path: container.to_owned(),
            ..cri::Mount::default()
        };
        main.mounts = vec![
            cri::Mount { uid_mappings: mappings(), gid_mappings: mappings(), ..mount(&volume, "/mapped") },
            mount(&volume, "/plain"),
            cri::Mount { readonly: true, ..mount(&hidden.join("file"), "/hidden") },
        ];
        let id = daemon.container(&sandbox, main).await;
        let pid = daemon.pid(&id).await;
        assert_eq!(std::fs::metadata(format!("/proc/{pid}")).unwrap().uid(), ROOT);
        assert_ne!(
            std::fs::read_link(format!("/proc/{pid}/ns/user")).unwrap(),
            std::fs::read_link("/proc/self/ns/user").unwrap()
        );
        for map in ["uid_map", "gid_map"] {
            let text = daemon.output(&id, &["cat", &format!("/proc/self/{map}")]).await;
            assert_eq!(text.split_whitespace().collect::<Vec<_>>(), ["0", "200000", "65536"]);
        }
        let identity = daemon.output(&id, &["id"]).await;
        assert!(identity.starts_with("uid=0 gid=0") && identity.contains("Seccomp:\t2"), "{identity}");
        assert_eq!(daemon.output(&id, &["hostname"]).await.trim(), "users");
        assert_eq!(daemon.output(&id, &["cat", "/proc/sys/kernel/shmmax"]).await.trim(), "123456");
        assert_eq!(daemon.output(&id, &["cat", "/hidden"]).await, "hidden");
        assert!(daemon.output(&id, &["cat", "/etc/resolv.conf"]).await.contains("10.43.0.10"));

        // Its own root file system, shared memory and mapped volume are its own; a plain volume is not.
        for path in ["/etc/of-container", "/dev/shm/of-container", "/mapped/of-container", "/mapped/of-root"] {
            assert_eq!(daemon.exec(&id, &["write", path, "x"]).await.unwrap().exit_code, 0, "{path}");
        }
        assert_ne!(daemon.exec(&id, &["write", "/plain/of-root", "x"]).await.unwrap().exit_code, 0);
        let owner = |name: &str| std::fs::metadata(volume.join(name)).unwrap().uid();
        assert_eq!((owner("of-container"), owner("of-root"), owner("of-user")), (0, 0, 1000));
        let listed = daemon.output(&id, &["ls", "/mapped"]).await;
        assert!(listed.contains("of-user"), "{listed}");

        // A user of the image, by an exec and as the first process.
        let mut other = user_container("other", &["id"]);
        other.linux.as_mut().unwrap().security_context.as_mut().unwrap().run_as_user =
            Some(cri::Int64Value { value: 1000 });
        let other = daemon.container(&sandbox, other).await;
        assert_eq!(daemon.exited(&other).await.exit_code, 0);
        assert!(daemon.log(&other).await[0].contains("uid=1000"));

        // The host's limits and kernel are out of reach.
        for path in ["/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/sys/kernel/uevent_seqnum"] {
            assert_ne!(daemon.exec(&id, &["write", path, "x"]).await.unwrap().exit_code, 0, "{path}");
        }
        daemon
    });
}

#[test]
fn a_user_namespace_goes_with_shared_processes_image_volumes_and_a_restarted_daemon() {
    with_daemon("usershared", |mut daemon| async move {
        let mut config = user_sandbox("usershared", &daemon.log_directory("usershared"));
        let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
        context.namespace_options.as_mut().unwrap().pid = cri::NamespaceMode::Pod as i32;
        let sandbox = daemon.run(config).await.unwrap();
        let shared = |name: &str, command: &[&str]| {
            let mut config = user_container(name, command);
            let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
            context.namespace_options.as_mut().unwrap().pid = cri::NamespaceMode::Pod as i32;
            config
        };
        let first = daemon.container(&sandbox, shared("first", &["sleep"])).await;
        let mut second = shared("second", &["sleep"]);
        second.mounts = vec![cri::Mount {
            container_path: "/image".to_owned(),
            image: Some(cri::ImageSpec { image: IMAGE.to_owned(), ..cri::ImageSpec::default() }),
            readonly: true,
            ..cri::Mount::default()
        }];
        let second = daemon.container(&sandbox, second).await;
        assert!(daemon.output(&second, &["ls", "/image"]).await.contains("bin"));
        let seen = daemon.output(&second, &["ls", "/proc"]).await;
        let processes = seen.split_whitespace().filter(|name| name.parse::<u32>().is_ok()).count();
        assert!(processes >= 4, "the reaper, both containers and the exec: {seen}");

        daemon.crash().await;
        daemon.open().await;
        assert_eq!(daemon.output(&first, &["echo", "still", "here"]).await, "still here\n");
        let update = cri::UpdateContainerResourcesRequest {
            container_id: first.clone(),
            linux: Some(cri::LinuxContainerResources { cpu_shares: 512, ..cri::LinuxContainerResources::default() }),
            ..cri::UpdateContainerResourcesRequest::default()
        };
        daemon.runtime.update_container_resources(update).await.unwrap();

        // A container that would leave the sandbox's user namespace is refused.
        let mut hosts = container_config("hosts", &["true"]);
        let context = hosts.linux.as_mut().unwrap().security_context.as_mut().unwrap();
        context.namespace_options.as_mut().unwrap().userns_options =
            Some(cri::UserNamespace { mode: cri::NamespaceMode::Node as i32, ..cri::UserNamespace::default() });
        let refused = daemon.create(&sandbox, hosts).await.unwrap_err();
        assert!(refused.message().contains("differs from the sandbox's"), "{refused}");
        let mut shared_up = user_container("up", &["true"]);
        shared_up.command = words(&["true"]);
        shared_up.mounts = vec![cri::Mount {
            host_path: "/tmp".to_owned(),
            container_path: "/up".to_owned(),
            propagation: cri::MountPropagation::PropagationBidirectional as i32,
            ..cri::Mount::default()
        }];
        assert!(daemon.create(&sandbox, shared_up).await.is_err());
        daemon
    });
}

/// Containers are made where other pods' mounts are out of sight (the run directory is a mount of its own for that). Neither what the host
/// mounts later nor what a container may look at gets lost by it.
#[test]
fn a_container_hears_of_the_host_s_mounts_and_sees_other_pods_where_it_looks_at_the_host() {
    with_daemon("sight", |mut daemon| async move {
        let table = |pid: i32| std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
        let host = || std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let run = daemon.path().join("run").canonicalize().unwrap();
        let own = format!(" {} ", run.display());
        assert!(host().contains(&own), "the run directory is no mount");
        let first = daemon.sandbox("first").await;
        daemon.container(&first, container_config("one", &["sleep"])).await;

        let shared = daemon.path().join("shared");
        std::fs::create_dir(&shared).unwrap();
        let none = None::<&str>;
        mount(Some("host"), &shared, Some("tmpfs"), MsFlags::empty(), none).unwrap();
        mount(none, &shared, none, MsFlags::MS_SHARED, none).unwrap();
        let looking = |path: &std::path::Path| cri::Mount {
            host_path: path.display().to_string(),
            container_path: "/host".to_owned(),
            propagation: cri::MountPropagation::PropagationHostToContainer as i32,
            ..cri::Mount::default()
        };
        let second = daemon.sandbox("second").await;
        let mut config = container_config("listener", &["sleep"]);
        config.mounts = vec![looking(&shared)];
        let listener = daemon.container(&second, config).await;
        let mut config = container_config("watcher", &["sleep"]);
        config.mounts = vec![looking(&run)];
        let watcher = daemon.container(&second, config).await;

        let pinned = format!("/host/sandboxes/{first}/ns/net");
        assert!(table(daemon.pid(&watcher).await).contains(&pinned), "the first pod's namespace is not seen");
        let later = shared.join("later");
        std::fs::create_dir(&later).unwrap();
        mount(Some("late"), &later, Some("tmpfs"), MsFlags::empty(), none).unwrap();
        assert!(table(daemon.pid(&listener).await).contains(" /host/later "), "the host's mount did not arrive");
        umount(&later).unwrap();
        assert!(!table(daemon.pid(&listener).await).contains(" /host/later "));

        umount(&shared).unwrap();
        daemon.crash().await;
        daemon.open().await;
        assert_eq!(host().matches(&own).count(), 1, "a daemon that comes again finds the mount there");
        daemon
    });
}

#[test]
fn containers_of_other_runtimes_are_run_watched_and_removed_like_our_own() {
    with_daemon("handlers", |mut daemon| async move {
        let request = cri::RunPodSandboxRequest {
            config: Some(sandbox_config("gone", &daemon.log_directory("gone"))),
            runtime_handler: "gone".to_owned(),
        };
        let refused = daemon.runtime.run_pod_sandbox(request).await.unwrap_err();
        assert!(refused.message().contains("/no/such/runtime"), "{refused}");
        // The built-in one as well: whatever holds for others holds for it.
        for handler in ["", "crun", "runc"] {
            let name = if handler.is_empty() { "own" } else { handler };
            let mut config = sandbox_config(name, &daemon.log_directory(name));
            config.hostname = "other".to_owned();
            let request = cri::RunPodSandboxRequest { config: Some(config), runtime_handler: handler.to_owned() };
            let sandbox = daemon.runtime.run_pod_sandbox(request).await.unwrap().into_inner().pod_sandbox_id;

            let ends = daemon.container(&sandbox, container_config("ends", &["exit", "7"])).await;
            assert_eq!(daemon.exited(&ends).await.exit_code, 7, "{handler}");
            let talks = daemon.container(&sandbox, container_config("talks", &["log", "20"])).await;
            daemon.exited(&talks).await;
            assert_eq!(daemon.log(&talks).await.len(), 20, "{handler}");

            let main = daemon.container(&sandbox, container_config("main", &["sleep"])).await;
            assert_eq!(daemon.output(&main, &["hostname"]).await.trim(), "other");
            let identity = daemon.output(&main, &["id"]).await;
            assert!(identity.contains("uid=0") && identity.contains("Seccomp:\t2"), "{handler}: {identity}");
            let status = daemon.output(&main, &["cat", "/proc/1/status"]).await;
            assert!(status.lines().any(|line| line == "Umask:\t0022"), "{handler}: {status}");
            assert_eq!(daemon.exec(&main, &["exit", "3"]).await.unwrap().exit_code, 3);
            let groups = daemon.output(&main, &["cat", "/proc/self/cgroup"]).await;
            assert!(groups.lines().all(|line| line.ends_with(&main) || line.ends_with(":/")), "{handler}: {groups}");
            let request = cri::ContainerStatsRequest { container_id: main.clone() };
            let stats = daemon.runtime.container_stats(request).await.unwrap().into_inner().stats.unwrap();
            assert!(stats.memory.unwrap().usage_bytes.unwrap().value > 0, "{handler}");
            let update = cri::UpdateContainerResourcesRequest {
                container_id: main.clone(),
                linux: Some(cri::LinuxContainerResources {
                    memory_limit_in_bytes: 64 << 20,
                    ..cri::LinuxContainerResources::default()
                }),
                ..cri::UpdateContainerResourcesRequest::default()
            };
            daemon.runtime.update_container_resources(update).await.unwrap();

            let mut terminal = container_config("terminal", &["tty-size"]);
            terminal.tty = true;
            let terminal = daemon.container(&sandbox, terminal).await;
            assert_eq!(daemon.exited(&terminal).await.exit_code, 0, "{handler}");

            let mut hungry = container_config("hungry", &["oom"]);
            hungry.linux.as_mut().unwrap().resources = Some(cri::LinuxContainerResources {
                memory_limit_in_bytes: 16 << 20,
                memory_swap_limit_in_bytes: 16 << 20,
                ..cri::LinuxContainerResources::default()
            });
            let hungry = daemon.container(&sandbox, hungry).await;
            let status = daemon.exited(&hungry).await;
            assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"), "{handler}");

            let missing = daemon.create(&sandbox, container_config("missing", &["no-such-program"])).await.unwrap();
            let error = daemon.start_container(&missing).await.unwrap_err();
            assert!(error.message().contains("no-such-program"), "{handler}: {error}");
            assert_eq!(daemon.status(&missing).await.exit_code, 128, "{handler}");

            daemon.crash().await;
            daemon.open().await;
            assert_eq!(daemon.output(&main, &["echo", "still", "here"]).await, "still here\n");
            let stop = cri::StopContainerRequest { container_id: main.clone(), timeout: 10 };
            daemon.runtime.stop_container(stop).await.unwrap();
            assert_eq!(daemon.status(&main).await.exit_code, 0, "{handler}");
            let remove = cri::RemoveContainerRequest { container_id: main };
            daemon.runtime.remove_container(remove).await.unwrap();
        }
        daemon
    });
}

#[test]
fn the_daemon_s_metrics_are_on_its_socket_and_count_what_was_called() {
    with_daemon("metrics", |mut daemon| async move {
        let sandbox = daemon.sandbox("metrics").await;
        daemon.container(&sandbox, container_config("main", &["sleep"])).await;
        let unknown = cri::ContainerStatusRequest { container_id: "unknown".to_owned(), verbose: false };
        daemon.runtime.container_status(unknown).await.unwrap_err();
        let socket = daemon.socket();
        let text = tokio::task::spawn_blocking(move || {
            let mut stream = std::os::unix::net::UnixStream::connect(socket).unwrap();
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: runtime\r\nconnection: close\r\n\r\n").unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            text
        })
        .await
        .unwrap();
        assert!(text.starts_with("HTTP/1.1 200") && text.contains("text/plain; version=0.0.4"), "{text}");
        for line in [
            "oarlock_runtime_sandboxes 1",
            "oarlock_runtime_containers_running 1",
            "grpc_server_handled_total{grpc_service=\"runtime.v1.RuntimeService\",grpc_method=\"RunPodSandbox\",grpc_code=\"OK\"} 1",
            "grpc_server_handled_total{grpc_service=\"runtime.v1.RuntimeService\",grpc_method=\"ContainerStatus\",grpc_code=\"NotFound\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        daemon
    });
}

#[test]
fn a_vendor_s_device_comes_with_what_its_file_says() {
    with_daemon("cdi", |mut daemon| async move {
        let files = daemon.path().join("cdi");
        std::fs::create_dir(&files).unwrap();
        std::fs::create_dir(daemon.path().join("driver")).unwrap();
        std::fs::write(daemon.path().join("driver/version"), "42").unwrap();
        let ran = daemon.path().join("hook-ran");
        let content = serde_json::json!({
            "cdiVersion": "0.6.0", "kind": "vendor.example/null",
            "containerEdits": {
                "env": ["DRIVER=here"],
                "mounts": [{"hostPath": daemon.path().join("driver"), "containerPath": "/driver", "options": ["ro", "bind"]}],
                "hooks": [{"hookName": "createRuntime", "path": "/usr/bin/touch", "args": ["touch", ran]}]
            },
            "devices": [{"name": "0", "containerEdits": {
                "deviceNodes": [{"path": "/dev/vendor0", "hostPath": "/dev/full", "permissions": "rw"}], "additionalGids": [4242]
            }}]
        });
        std::fs::write(files.join("vendor.json"), content.to_string()).unwrap();
        let sandbox = daemon.sandbox("cdi").await;
        let mut config = container_config("main", &["sleep"]);
        config.cdi_devices = vec![cri::CdiDevice { name: "vendor.example/null=0".to_owned() }];
        let id = daemon.container(&sandbox, config.clone()).await;
        assert!(daemon.output(&id, &["env"]).await.lines().any(|line| line == "DRIVER=here"));
        assert_eq!(daemon.output(&id, &["cat", "/driver/version"]).await, "42");
        assert!(daemon.output(&id, &["ls", "/dev"]).await.contains("vendor0"));
        // It is the device that the file names: writing to it fails for want of space.
        let written = daemon.exec(&id, &["write", "/dev/vendor0", "x"]).await.unwrap();
        assert!(String::from_utf8_lossy(&written.stderr).contains("No space left"), "{written:?}");
        assert!(
            daemon
                .output(&id, &["cat", "/proc/1/status"])
                .await
                .lines()
                .any(|line| line.starts_with("Groups:") && line.contains("4242"))
        );
        assert!(ran.exists());

        config.metadata.as_mut().unwrap().name = "other".to_owned();
        config.cdi_devices[0].name = "vendor.example/null=1".to_owned();
        let refused = daemon.create(&sandbox, config).await.unwrap_err();
        assert!(refused.message().contains("vendor.example/null=1"), "{refused}");
        daemon
    });
}

/// On a host with AppArmor and its parser; without either, what must not be taken for confinement.
#[test]
fn containers_run_under_the_apparmor_profile_they_get() {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let enabled = read("/sys/module/apparmor/parameters/enabled").starts_with('Y');
    let confined = enabled && std::path::Path::new("/usr/sbin/apparmor_parser").exists();
    with_daemon("apparmor", move |mut daemon| async move {
        let sandbox = daemon.sandbox("apparmor").await;
        let named = |name: &str, profile: Option<(cri::security_profile::ProfileType, &str)>| {
            let mut config = container_config(name, &["sleep"]);
            let context = config.linux.get_or_insert_default().security_context.get_or_insert_default();
            context.apparmor = profile
                .map(|(kind, name)| cri::SecurityProfile { profile_type: kind as i32, localhost_ref: name.to_owned() });
            config
        };
        use cri::security_profile::ProfileType::{Localhost, Unconfined};
        let default = daemon.container(&sandbox, named("default", None)).await;
        let free = daemon.container(&sandbox, named("free", Some((Unconfined, "")))).await;
        if enabled {
            // The first process's label, and that of an exec.
            let expected = if confined { "oarlock-default (enforce)" } else { "unconfined" };
            for label in ["/proc/1/attr/current", "/proc/self/attr/current"] {
                assert_eq!(daemon.output(&default, &["cat", label]).await.trim(), expected, "{label}");
                assert_eq!(daemon.output(&free, &["cat", label]).await.trim(), "unconfined", "{label}");
            }
        }
        let refused = match daemon.create(&sandbox, named("absent", Some((Localhost, "no-such-profile")))).await {
            Ok(id) => daemon.start_container(&id).await.unwrap_err(),
            Err(refused) => refused,
        };
        let reason = if enabled { "no-such-profile" } else { "AppArmor" };
        assert!(refused.message().contains(reason), "{refused}");
        // The profile lets the signal through that stops it.
        let stop = cri::StopContainerRequest { container_id: default.clone(), timeout: 20 };
        let before = Instant::now();
        daemon.runtime.stop_container(stop).await.unwrap();
        assert!(before.elapsed() < LIMIT);
        let status = daemon.status(&default).await;
        assert_eq!(status.exit_code, 0, "{status:?}");
        daemon
    });
}

#[test]
fn the_network_is_ready_when_its_plugins_say_so_and_a_pod_shows_what_drifted() {
    with_daemon("network", |mut daemon| async move {
        let list = daemon.path().join("cni-conf/10-pods.conflist");
        let good = std::fs::read_to_string(&list).unwrap();
        assert_eq!(network_problem(&mut daemon).await, None);
        std::fs::write(&list, good.replace("\"portmap\"", "\"no-such-plugin\"")).unwrap();
        let problem = network_problem(&mut daemon).await.expect("a plugin is missing");
        assert!(problem.contains("no-such-plugin"), "{problem}");
        std::fs::write(&list, good).unwrap();
        assert_eq!(network_problem(&mut daemon).await, None);

        let sandbox = daemon.sandbox("drift").await;
        assert_eq!(check_of(&mut daemon, &sandbox).await, serde_json::Value::Null);
        let links = std::process::Command::new("ip").args(["-o", "link", "show", "master", "cni0"]).output().unwrap();
        let links = String::from_utf8(links.stdout).unwrap();
        let link = links.split(": ").nth(1).and_then(|name| name.split('@').next()).expect("the pod's interface");
        let deleted = std::process::Command::new("ip").args(["link", "delete", link]).status().unwrap();
        assert!(deleted.success());
        let drift = check_of(&mut daemon, &sandbox).await;
        assert!(drift.as_str().is_some_and(|text| text.contains("veth")), "{drift}");
        daemon
    });
}

/// What the condition NetworkReady says when it is false.
async fn network_problem(daemon: &mut runtime_daemon::Daemon) -> Option<String> {
    let status = daemon.runtime.status(cri::StatusRequest { verbose: false }).await.unwrap().into_inner().status;
    let conditions = status.unwrap().conditions;
    let ready = conditions.into_iter().find(|condition| condition.r#type == "NetworkReady").unwrap();
    (!ready.status).then_some(ready.message)
}

async fn check_of(daemon: &mut runtime_daemon::Daemon, sandbox: &str) -> serde_json::Value {
    let request = cri::PodSandboxStatusRequest { pod_sandbox_id: sandbox.to_owned(), verbose: true };
    let info = daemon.runtime.pod_sandbox_status(request).await.unwrap().into_inner().info;
    serde_json::from_str::<serde_json::Value>(&info["info"]).unwrap()["cniCheck"].clone()
}

/// crun, but for checkpoints, for which CRIU would have to work here.
const DUMPING: &str = r#"#!/bin/sh
case " $* " in *" checkpoint "*) ;; *) exec /usr/bin/crun "$@" ;; esac
echo "$*" >&2
while [ $# -gt 1 ]; do
  case $1 in --image-path) images=$2 ;; --work-path) work=$2 ;; --leave-running) running=yes ;; esac
  shift
done
[ "$running" = yes ] || exit 1
echo pages > "$images/pages-1.img"
echo log > "$work/dump.log"
"#;

fn program(path: &std::path::Path, script: &str) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::write(path, script).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn a_checkpoint_has_the_dump_the_changes_and_the_configuration_and_the_container_goes_on() {
    with_daemon("checkpoint", |mut daemon| async move {
        let location = daemon.path().join("checkpoint.tar");
        let mut runtime = daemon.runtime.clone();
        let mut ask = async |id: &str| {
            let location = location.display().to_string();
            let request = cri::CheckpointContainerRequest { container_id: id.to_owned(), location, timeout: 10 };
            runtime.checkpoint_container(request).await
        };
        let own = daemon.sandbox("own").await;
        let id = daemon.container(&own, container_config("own", &["sleep", "1000"])).await;
        let error = ask(&id).await.unwrap_err();
        assert_eq!(error.code(), tonic::Code::Unimplemented);
        assert!(error.message().contains("built-in engine makes none"), "{error}");

        program(&daemon.path().join("dumping"), DUMPING);
        let config = sandbox_config("dumping", &daemon.log_directory("dumping"));
        let request = cri::RunPodSandboxRequest { config: Some(config), runtime_handler: "dumping".into() };
        let sandbox = daemon.runtime.run_pod_sandbox(request).await.unwrap().into_inner().pod_sandbox_id;
        let id = daemon.create(&sandbox, container_config("dumped", &["sleep", "1000"])).await.unwrap();
        let error = ask(&id).await.unwrap_err();
        assert_eq!(error.code(), tonic::Code::FailedPrecondition, "{error}");
        daemon.start_container(&id).await.unwrap();
        assert!(ask(&id).await.unwrap_err().message().contains("CRIU cannot be used"));
        program(&daemon.path().join("criu"), "#!/bin/sh\necho 'Error (vdso.c): not on this kernel' >&2; exit 1\n");
        let error = ask(&id).await.unwrap_err();
        assert_eq!(error.code(), tonic::Code::Unimplemented);
        assert!(error.message().ends_with("Error (vdso.c): not on this kernel"), "{error}");

        program(&daemon.path().join("criu"), "#!/bin/sh\n[ \"$1\" = check ]\n");
        daemon.output(&id, &["write", "/written", "by the container"]).await;
        ask(&id).await.unwrap();
        let out = daemon.path().join("out");
        std::fs::create_dir(&out).unwrap();
        let unpacked =
            std::process::Command::new("tar").arg("-xf").arg(&location).arg("-C").arg(&out).status().unwrap();
        assert!(unpacked.success());
        let read = |name: &str| std::fs::read_to_string(out.join(name)).unwrap();
        assert_eq!((read("checkpoint/pages-1.img").trim(), read("dump.log").trim()), ("pages", "log"));
        let config: serde_json::Value = serde_json::from_str(&read("config.dump")).unwrap();
        assert_eq!(
            (&config["id"], &config["name"], &config["runtime"]),
            (&id.clone().into(), &"dumped".into(), &"dumping".into())
        );
        assert!(read("spec.dump").contains("ociVersion") && read("status.dump").contains(&id));
        let listed = std::process::Command::new("tar").arg("-tf").arg(out.join("rootfs-diff.tar")).output().unwrap();
        assert!(String::from_utf8(listed.stdout).unwrap().lines().any(|line| line == "written"));
        assert_eq!(daemon.status(&id).await.state, cri::ContainerState::ContainerRunning as i32);
        let left = std::fs::read_dir(daemon.path().join("data/checkpoints")).into_iter().flatten().count();
        assert_eq!(left, 0);
        daemon
    });
}
