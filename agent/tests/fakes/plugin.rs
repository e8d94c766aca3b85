//! A device plugin in a process of its own: this test program, started again to be nothing else.
//!
//! It is told what to do by lines on its input: `devices a:Healthy:0 b:Unhealthy:1` changes what it lists, `register` registers it.
//! What it is asked it writes to its output, one line a call.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use oarlock_proto::deviceplugin as wire;
use oarlock_proto::deviceplugin::device_plugin_server::{DevicePlugin, DevicePluginServer};
use oarlock_proto::deviceplugin::registration_client::RegistrationClient;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

pub const ROLE: &str = "OARLOCK_TEST_DEVICE_PLUGIN";
pub const RESOURCE: &str = "example.com/card";

/// The process, as a test sees it.
pub struct PluginProcess {
    child: Child,
    orders: ChildStdin,
    calls: mpsc::Receiver<String>,
}

impl PluginProcess {
    /// Starts one that has its socket in `directory`, beside the kubelet's; `main` names the test that calls [`be_plugin`].
    pub fn start(directory: &Path, main: &str) -> Self {
        let program = std::env::current_exe().expect("this program");
        let mut command = Command::new(program);
        command.args([main, "--exact", "--nocapture", "--quiet"]).env(ROLE, directory);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the plugin");
        let orders = child.stdin.take().expect("its input");
        let output = BufReader::new(child.stdout.take().expect("its output"));
        let (sender, calls) = mpsc::channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if let Some(call) = line.strip_prefix("plugin: ") {
                    let _ = sender.send(call.to_owned());
                }
            }
        });
        let plugin = Self { child, orders, calls };
        plugin.wait_for("serving");
        plugin
    }

    pub fn order(&mut self, line: &str) {
        writeln!(self.orders, "{line}").expect("an order");
    }

    /// Waits for a call that begins so, and gives it.
    pub fn wait_for(&self, call: &str) -> String {
        loop {
            let next = self.calls.recv_timeout(Duration::from_secs(20));
            let next = next.unwrap_or_else(|_| panic!("the plugin was not asked: {call}"));
            if next.starts_with(call) {
                return next;
            }
        }
    }

    pub fn kill(mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("its end");
    }
}

impl Drop for PluginProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Served {
    devices: watch::Receiver<Vec<wire::Device>>,
}

pub fn tell(call: &str) {
    let mut output = std::io::stdout().lock();
    let _ = writeln!(output, "plugin: {call}");
    let _ = output.flush();
}

#[tonic::async_trait]
impl DevicePlugin for Served {
    async fn get_device_plugin_options(
        &self,
        _: Request<wire::Empty>,
    ) -> Result<Response<wire::DevicePluginOptions>, Status> {
        Ok(Response::new(options()))
    }

    type ListAndWatchStream =
        std::pin::Pin<Box<dyn futures::Stream<Item = Result<wire::ListAndWatchResponse, Status>> + Send + 'static>>;

    async fn list_and_watch(&self, _: Request<wire::Empty>) -> Result<Response<Self::ListAndWatchStream>, Status> {
        let devices = tokio_stream::wrappers::WatchStream::new(self.devices.clone());
        let lists = futures::StreamExt::map(devices, |devices| Ok(wire::ListAndWatchResponse { devices }));
        Ok(Response::new(Box::pin(lists)))
    }

    async fn get_preferred_allocation(
        &self,
        request: Request<wire::PreferredAllocationRequest>,
    ) -> Result<Response<wire::PreferredAllocationResponse>, Status> {
        // The last ones by name.
        let choose = |request: &wire::ContainerPreferredAllocationRequest| {
            let mut ids = request.available_device_i_ds.clone();
            ids.sort();
            ids.reverse();
            ids.truncate(request.allocation_size as usize);
            wire::ContainerPreferredAllocationResponse { device_i_ds: ids }
        };
        let container_responses = request.get_ref().container_requests.iter().map(choose).collect();
        Ok(Response::new(wire::PreferredAllocationResponse { container_responses }))
    }

    async fn allocate(
        &self,
        request: Request<wire::AllocateRequest>,
    ) -> Result<Response<wire::AllocateResponse>, Status> {
        let asked = &request.get_ref().container_requests[0].devices_ids;
        tell(&format!("allocate {}", asked.join(",")));
        if asked.iter().any(|id| id.starts_with("broken")) {
            return Err(Status::internal("the card is on fire"));
        }
        let answer = wire::ContainerAllocateResponse {
            envs: HashMap::from([("CARDS".to_owned(), asked.join(","))]),
            mounts: vec![wire::Mount {
                container_path: "/cards".into(),
                host_path: "/opt/cards".into(),
                read_only: true,
            }],
            devices: vec![wire::DeviceSpec {
                container_path: "/dev/card".into(),
                host_path: "/dev/null".into(),
                permissions: "rw".into(),
            }],
            annotations: HashMap::from([("example.com/cards".to_owned(), asked.len().to_string())]),
            cdi_devices: vec![wire::CdiDevice { name: "example.com/card=all".into() }],
        };
        Ok(Response::new(wire::AllocateResponse { container_responses: vec![answer] }))
    }

    async fn pre_start_container(
        &self,
        request: Request<wire::PreStartContainerRequest>,
    ) -> Result<Response<wire::PreStartContainerResponse>, Status> {
        tell(&format!("start {}", request.get_ref().devices_ids.join(",")));
        Ok(Response::new(wire::PreStartContainerResponse {}))
    }
}

fn options() -> wire::DevicePluginOptions {
    wire::DevicePluginOptions { pre_start_required: true, get_preferred_allocation_available: true }
}

fn device(text: &str) -> wire::Device {
    let mut parts = text.split(':');
    let mut part = || parts.next().unwrap_or_default().to_owned();
    let (id, health, node) = (part(), part(), part());
    let topology = node.parse().ok().map(|id| wire::TopologyInfo { nodes: vec![wire::NumaNode { id }] });
    wire::Device { id, health, topology }
}

/// In the plugin's process: serves until killed. Elsewhere: returns.
pub async fn be_plugin() {
    let Some(directory) = std::env::var_os(ROLE).map(PathBuf::from) else { return };
    let (sender, devices) = watch::channel(Vec::new());
    let server = DevicePluginServer::new(Served { devices });
    let name = format!("card-{}.sock", std::process::id());
    let serve = |path: PathBuf| {
        let listener = oarlock_plugins::socket::listen(&path).expect("the socket");
        tokio::spawn(oarlock_plugins::socket::serve(listener, server.clone(), CancellationToken::new()));
    };
    serve(directory.join(&name));
    tell("serving");
    let (orders, mut lines) = tokio::sync::mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            let _ = orders.send(line);
        }
    });
    while let Some(line) = lines.recv().await {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("devices") => drop(sender.send_replace(words.map(device).collect())),
            Some("register") => {
                serve(directory.join(&name));
                let mut client =
                    RegistrationClient::new(oarlock_plugins::socket::channel(&directory.join("kubelet.sock")));
                let request = wire::RegisterRequest {
                    version: words.next().unwrap_or("v1beta1").to_owned(),
                    endpoint: name.clone(),
                    resource_name: RESOURCE.to_owned(),
                    options: Some(options()),
                };
                match client.register(request).await {
                    Ok(_) => tell("registered"),
                    Err(status) => tell(&format!("refused {}", status.message())),
                }
            }
            _ => {}
        }
    }
}
