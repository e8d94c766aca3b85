//! The plugins under another runtime: containerd of the distribution, whose own CNI library calls all of them in a chain.

use std::fs;
use std::net::{IpAddr, TcpStream};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use oarlock_netlink::{Connection, Protocol};
use oarlock_proto::cri;
use oarlock_proto::cri::image_service_client::ImageServiceClient;
use oarlock_proto::cri::runtime_service_client::RuntimeServiceClient;
use oarlock_testimage::{Image, pack};
use oarlock_testkit::{binary, in_fresh_namespaces, wait_for};
use serde_json::json;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};

const PAUSE: &str = "oarlock.local/listener:1";
const PATIENCE: Duration = Duration::from_secs(60);
/// containerd keeps the sockets of its shims and the namespaces of its pods there.
const PLACES: [&str; 2] = ["/run/containerd", "/run/netns"];

/// containerd below a directory of its own.
struct Containerd {
    directory: tempfile::TempDir,
    process: Child,
}

impl Containerd {
    fn start() -> Containerd {
        let directory = tempfile::Builder::new().prefix("containerd-cni-").tempdir().unwrap();
        let below = |name: &str| directory.path().join(name);
        for place in PLACES {
            fs::create_dir_all(place).unwrap();
            mount(Some("tmpfs"), place, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        }
        for name in ["plugins", "net.d"] {
            fs::create_dir(below(name)).unwrap();
        }
        for plugin in ["bandwidth", "bridge", "firewall", "host-local", "loopback", "portmap", "tuning"] {
            symlink(binary("oarlock-cni-plugins"), below("plugins").join(plugin)).unwrap();
        }
        fs::write(below("net.d/10-test.conflist"), conflist(directory.path())).unwrap();
        fs::write(below("config.toml"), config(directory.path())).unwrap();
        // The sandbox itself is the server that is asked.
        let image = Image { reference: PAUSE, entrypoint: &["/bin/http", "80"], ..Image::default() };
        pack(&binary("oarlock-testimage"), &image, &below("pause.tar")).unwrap();
        let process = Command::new("containerd")
            .arg("--config")
            .arg(below("config.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(below("log")).unwrap())
            .spawn()
            .expect("containerd is installed (Debian: containerd)");
        let daemon = Containerd { directory, process };
        wait_for("containerd", PATIENCE, || std::os::unix::net::UnixStream::connect(daemon.socket()).ok());
        let imported = Command::new("ctr")
            .arg("--address")
            .arg(daemon.socket())
            .args(["--namespace", "k8s.io", "images", "import"])
            .arg(daemon.directory.path().join("pause.tar"))
            .output()
            .unwrap();
        assert!(imported.status.success(), "{}", String::from_utf8_lossy(&imported.stderr));
        daemon
    }

    /// The part that speaks CRI hears of an imported image a moment later; one that it does not know it would fetch.
    fn until_imported(&self, runtime: &Runtime) {
        let image = Some(cri::ImageSpec { image: PAUSE.to_owned(), ..Default::default() });
        let request = cri::ImageStatusRequest { image, verbose: false };
        let entered = runtime.enter();
        let mut images = ImageServiceClient::new(self.channel());
        drop(entered);
        wait_for("the image to be known", PATIENCE, || {
            runtime.block_on(images.image_status(request.clone())).unwrap().into_inner().image
        });
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("containerd.sock")
    }

    /// Needs a runtime that is entered.
    fn channel(&self) -> Channel {
        let socket = self.socket();
        Endpoint::from_static("http://runtime").connect_with_connector_lazy(tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        }))
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.process.id().cast_signed()), Signal::SIGTERM);
        let _ = self.process.wait();
        // Shims outlive their daemon; after a failed test there is one.
        let marker = self.directory.path().to_string_lossy().into_owned();
        for process in procfs::process::all_processes().into_iter().flatten().flatten() {
            if process.cmdline().is_ok_and(|words| words.join(" ").contains(&marker)) {
                let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
            }
        }
        for place in PLACES {
            let _ = umount2(place, MntFlags::MNT_DETACH);
        }
        for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            let _ = fs::remove_dir(hierarchy.path().join("k8s.io"));
        }
        let _ = fs::remove_dir("/sys/fs/cgroup/k8s.io");
    }
}

fn conflist(below: &Path) -> String {
    json!({"cniVersion": "1.0.0", "name": "test", "plugins": [
        {"type": "bridge", "bridge": "ctd0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
         "ipam": {"type": "host-local", "dataDir": below.join("ipam"),
                  "ranges": [[{"subnet": "10.46.0.0/24"}], [{"subnet": "fd46::/64"}]],
                  "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}},
        {"type": "tuning", "dataDir": below.join("tuning"), "mtu": 1400, "sysctl": {"net.core.somaxconn": "500"}},
        {"type": "firewall", "ingressPolicy": "same-bridge"},
        {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true},
        {"type": "bandwidth", "capabilities": {"bandwidth": true}},
    ]})
    .to_string()
}

fn config(below: &Path) -> String {
    let below = below.display();
    format!(
        r#"version = 2
root = "{below}/root"
state = "{below}/state"
[grpc]
  address = "{below}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{below}/plugins"
    conf_dir = "{below}/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
"#
    )
}

fn answers(address: IpAddr, port: u16) -> bool {
    TcpStream::connect_timeout(&(address, port).into(), Duration::from_secs(10)).is_ok()
}

fn links() -> Vec<String> {
    let links = Connection::open(Protocol::Route).unwrap().links().unwrap();
    links.into_iter().map(|link| link.name).filter(|name| name.starts_with("veth") || name.starts_with("bwp")).collect()
}

#[test]
fn containerd_attaches_and_detaches_pods_with_every_plugin() {
    in_fresh_namespaces(|| {
        oarlock_netns::bring_loopback_up().unwrap();
        let containerd = Containerd::start();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let entered = runtime.enter();
        let mut client = RuntimeServiceClient::new(containerd.channel());
        drop(entered);
        containerd.until_imported(&runtime);
        let bandwidth = [("kubernetes.io/ingress-bandwidth", "10M"), ("kubernetes.io/egress-bandwidth", "10M")];
        let config = cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: "pod".into(),
                uid: "uid".into(),
                namespace: "default".into(),
                attempt: 0,
            }),
            annotations: bandwidth.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
            port_mappings: vec![cri::PortMapping { container_port: 80, host_port: 8080, ..Default::default() }],
            linux: Some(cri::LinuxPodSandboxConfig::default()),
            ..Default::default()
        };
        let request = cri::RunPodSandboxRequest { config: Some(config), runtime_handler: String::new() };
        let pod = match runtime.block_on(client.run_pod_sandbox(request)) {
            Ok(answer) => answer.into_inner().pod_sandbox_id,
            Err(error) => panic!("{error}\n{}", containerd.log()),
        };
        let request = cri::PodSandboxStatusRequest { pod_sandbox_id: pod.clone(), verbose: false };
        let status = runtime.block_on(client.pod_sandbox_status(request)).unwrap().into_inner().status.unwrap();
        let network = status.network.unwrap();
        let ips: Vec<IpAddr> = [network.ip]
            .into_iter()
            .chain(network.additional_ips.into_iter().map(|one| one.ip))
            .map(|text| text.parse().unwrap())
            .collect();
        assert_eq!(ips.len(), 2);
        for ip in &ips {
            wait_for(&format!("the pod at {ip}"), PATIENCE, || answers(*ip, 80).then_some(()));
            let gateway = if ip.is_ipv4() { "10.46.0.1" } else { "fd46::1" };
            assert!(answers(gateway.parse().unwrap(), 8080), "through the host port of {gateway}");
        }
        assert_eq!(links().len(), 2, "the pair and what it sends through: {:?}", links());
        runtime
            .block_on(client.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: pod.clone() }))
            .unwrap_or_else(|error| panic!("{error}\n{}", containerd.log()));
        runtime.block_on(client.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: pod })).unwrap();
        wait_for("the links to go", PATIENCE, || links().is_empty().then_some(()));
        assert!(!ips.iter().any(|ip| containerd.directory.path().join("ipam/test").join(ip.to_string()).exists()));
        for map in ["pods", "hostports"] {
            let listed = Command::new("nft").args(["list", "map", "ip", "oarlock-cni", map]).output().unwrap();
            assert!(!String::from_utf8_lossy(&listed.stdout).contains("elements"), "{map} is not empty");
        }
    });
}
