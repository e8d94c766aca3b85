//! A node in fresh namespaces: a bridge with pods, a neighbour outside the cluster, a fake API and the real proxy.
#![allow(dead_code, reason = "each test program uses a part")]

pub mod policies;
pub mod sockets;

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use oarlock_machinery::fake::FakeApi;
use oarlock_netlink::{Connection, Protocol, Route, VethPair};
use oarlock_netns::{create_pinned, run_in};
use oarlock_netproxy::{Config, Netproxy, Network};
use oarlock_testkit::{in_fresh_namespaces, wait_for};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    /// Address `last` of a network: 7 for the link to the outside, 42 for pods, 43 for Services.
    fn address(self, net: u8, last: u16) -> IpAddr {
        match (self, net) {
            (Family::V4, 7) => Ipv4Addr::new(192, 168, 7, last as u8).into(),
            (Family::V4, net) => Ipv4Addr::new(10, net, 0, last as u8).into(),
            (Family::V6, net) => Ipv6Addr::new(0xfd00 + u16::from(net), 0, 0, 0, 0, 0, 0, last).into(),
        }
    }

    pub fn node(self) -> IpAddr {
        self.address(7, 1)
    }

    pub fn outside(self) -> IpAddr {
        self.address(7, 2)
    }

    pub fn gateway(self) -> IpAddr {
        self.address(42, 1)
    }

    pub fn pod(self, last: u16) -> IpAddr {
        self.address(42, last)
    }

    pub fn service(self, last: u16) -> IpAddr {
        self.address(43, last)
    }

    pub fn loopback(self) -> IpAddr {
        if self == Family::V4 { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() }
    }

    pub fn any(self) -> IpAddr {
        if self == Family::V4 { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
    }

    fn prefix(self) -> u8 {
        if self == Family::V4 { 24 } else { 64 }
    }

    fn default_route(self) -> &'static str {
        if self == Family::V4 { "0.0.0.0/0" } else { "::/0" }
    }

    pub fn table(self) -> &'static str {
        if self == Family::V4 { "ip" } else { "ip6" }
    }

    pub fn network(self) -> Network {
        let (pods, services) =
            if self == Family::V4 { ("10.42.0.0/16", "10.43.0.0/16") } else { ("fd2a::/48", "fd2b::/112") };
        Network {
            cluster_cidr: pods.parse().unwrap(),
            service_cidr: services.parse().unwrap(),
            cluster_dns: self.service(10),
            node_ip: Some(self.node()),
        }
    }
}

/// Makes tests of the functions named, each in a cluster of IPv4, of IPv6 and of both.
#[allow(unused_macros, reason = "not every test file makes tests of each mode")]
macro_rules! in_each_mode {
    ($($name:ident)*) => {
        mod ipv4 {
            use super::netproxy_world::{Family, in_mode};
            $(#[test] fn $name() { in_mode(&[Family::V4], super::$name); })*
        }
        mod ipv6 {
            use super::netproxy_world::{Family, in_mode};
            $(#[test] fn $name() { in_mode(&[Family::V6], super::$name); })*
        }
        mod dual_stack {
            use super::netproxy_world::{Family, in_mode};
            $(#[test] fn $name() { in_mode(&[Family::V4, Family::V6], super::$name); })*
        }
    };
}

/// Runs a test body in a cluster of one family, of the other, and of both: in that one once for each family.
pub fn in_mode(families: &'static [Family], test: fn(&mut World, Family)) {
    in_fresh_namespaces(move || {
        // A new namespace takes this setting over from the host, and ours has to start somewhere.
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").expect("forwarding off");
        let mut world = World::start(families);
        families.iter().for_each(|family| test(&mut world, *family));
    });
}

pub const TIMEOUT: Duration = Duration::from_secs(20);
const NODE: &str = "node-1";

/// The node under test.
pub struct World {
    pub runtime: Runtime,
    pub api: Arc<FakeApi>,
    pub directory: tempfile::TempDir,
    pub families: &'static [Family],
    /// Tells the running proxy of another configuration.
    pub settings: watch::Sender<Config>,
    running: Option<(CancellationToken, JoinHandle<Result<(), oarlock_netproxy::Error>>)>,
}

impl World {
    /// Makes the network and starts the proxy; the caller is in namespaces of its own.
    pub fn start(families: &'static [Family]) -> World {
        oarlock_netns::bring_loopback_up().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let mut connection = Connection::open(Protocol::Route).unwrap();
        connection.create_bridge("oar0", None, 0, false).unwrap();
        let bridge = connection.require_link("oar0").unwrap();
        connection.set_up(bridge.index).unwrap();
        for family in families {
            let gateway = format!("{}/{}", family.gateway(), family.prefix());
            connection.add_address(bridge.index, gateway.parse().unwrap()).unwrap();
        }
        let directory = tempfile::tempdir().unwrap();
        let mut world = World {
            runtime,
            api: FakeApi::new(),
            directory,
            families,
            settings: watch::channel(Config::default()).0,
            running: None,
        };
        world.attach("outside", None, Family::outside, Family::node);
        let link = connection.require_link("to-outside").unwrap();
        for family in families {
            let own = format!("{}/{}", family.node(), family.prefix());
            connection.add_address(link.index, own.parse().unwrap()).unwrap();
        }
        let cidrs: Vec<String> =
            families.iter().map(|family| format!("{}/{}", family.address(42, 0), family.prefix())).collect();
        let addresses: Vec<Value> =
            families.iter().map(|family| json!({"type": "InternalIP", "address": family.node().to_string()})).collect();
        world.api.create(json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": NODE, "labels": {"topology.kubernetes.io/zone": "here"}},
            "spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs}, "status": {"addresses": addresses},
        }));
        for (name, last) in [("a", 11), ("b", 12), ("client", 13)] {
            world.pod(name, last);
        }
        world.start_proxy();
        world
    }

    pub fn config(&self) -> Config {
        std::fs::write(self.directory.path().join("resolv.conf"), "# nothing to ask\n").unwrap();
        Config {
            node_name: NODE.to_owned(),
            networks: self.families.iter().map(|family| family.network()).collect(),
            external_ips_allowed: vec!["198.51.100.0/24".parse().unwrap(), "fd99::/64".parse().unwrap()],
            health_listen: (self.families[self.families.len() - 1].any(), 10_256).into(),
            cni_conf_dir: Some(self.directory.path().join("net.d")),
            sysctl_record: Some(self.directory.path().join("sysctls")),
            cni_state_dir: self.directory.path().join("ipam"),
            upstream_resolv_conf: self.directory.path().join("resolv.conf"),
            ..Config::default()
        }
    }

    /// Starts the proxy and waits until it has written its rules.
    pub fn start_proxy(&mut self) {
        self.start_proxy_with(self.config());
    }

    /// As [`World::start_proxy`], with another configuration.
    pub fn start_proxy_with(&mut self, config: Config) {
        let mut ready = self.launch_proxy(config);
        let waiting = async { tokio::time::timeout(TIMEOUT, ready.wait_for(|ready| *ready)).await.map(drop) };
        self.runtime.block_on(waiting).expect("the proxy writes its rules");
    }

    /// Starts the proxy and does not wait; what it returns becomes true with its rules.
    pub fn launch_proxy(&mut self, config: Config) -> tokio::sync::watch::Receiver<bool> {
        let entered = self.runtime.enter();
        let (settings, changes) = watch::channel(config.clone());
        let proxy = Netproxy::new(config, self.api.client()).with_changes(changes);
        self.settings = settings;
        drop(entered);
        let ready = proxy.ready();
        let shutdown = CancellationToken::new();
        let handle = self.runtime.spawn(proxy.run(shutdown.clone()));
        self.running = Some((shutdown, handle));
        ready
    }

    /// Ends the proxy where it stands: it does nothing any more.
    pub fn kill_proxy(&mut self) {
        let (_, handle) = self.running.take().expect("the proxy runs");
        handle.abort();
        let ended = self.runtime.block_on(handle);
        assert!(ended.is_err_and(|error| error.is_cancelled()));
        // The end of a process closes all it has before another can be started; that of a task takes a moment.
        for family in self.families {
            let address = (family.service(10), 53);
            wait_for("the sockets to be closed", TIMEOUT, || {
                let all =
                    (UdpSocket::bind(address), TcpListener::bind(address), TcpListener::bind(("0.0.0.0", 10_256)));
                (all.0.is_ok() && all.1.is_ok() && all.2.is_ok()).then_some(())
            });
        }
    }

    pub fn stop_proxy(&mut self) {
        let (shutdown, handle) = self.running.take().expect("the proxy runs");
        shutdown.cancel();
        self.runtime.block_on(handle).unwrap().unwrap();
    }

    fn attach(
        &mut self,
        name: &str,
        bridge: Option<u32>,
        address: impl Fn(Family) -> IpAddr,
        gateway: impl Fn(Family) -> IpAddr,
    ) {
        let netns = netns(name);
        create_pinned(&netns).unwrap();
        let file = std::fs::File::open(&netns).unwrap();
        let mut connection = Connection::open(Protocol::Route).unwrap();
        let pair = VethPair {
            name: &format!("to-{name}"),
            master: bridge,
            mac: None,
            peer_name: "eth0",
            peer_mac: None,
            peer_netns: std::os::fd::AsFd::as_fd(&file),
            mtu: 0,
        };
        connection.create_veth(&pair).unwrap();
        if bridge.is_some() {
            let port = connection.require_link(&format!("to-{name}")).unwrap();
            connection.set_bridge_port(port.index, true, false).unwrap();
        }
        let mut inside = Connection::open_in(Protocol::Route, &netns).unwrap();
        let link = inside.require_link("eth0").unwrap();
        inside.set_up(link.index).unwrap();
        for family in self.families {
            let net = format!("{}/{}", address(*family), family.prefix());
            inside.add_address(link.index, net.parse().unwrap()).unwrap();
            let any = family.default_route().parse().unwrap();
            inside.add_route(&Route::new(any, Some(gateway(*family)), link.index)).unwrap();
        }
    }

    /// A pod with servers on TCP and UDP port 8080 that answer with the pod's name and the client's address.
    pub fn pod(&mut self, name: &str, last: u16) {
        let bridge = Connection::open(Protocol::Route).unwrap().require_link("oar0").unwrap();
        self.attach(name, Some(bridge.index), |family| family.pod(last), Family::gateway);
        self.families.iter().for_each(|family| serve(name, family.pod(last)));
    }

    /// Makes or changes a Service `default/<name>` with this specification.
    pub fn service(&self, name: &str, spec: Value) {
        self.api.create(json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"}, "spec": spec}));
    }

    /// Makes the slice of a Service with these endpoints on port 8080.
    pub fn slice(&self, service: &str, protocol: &str, endpoints: &[IpAddr]) {
        let family = if endpoints.iter().any(IpAddr::is_ipv6) { "IPv6" } else { "IPv4" };
        self.api.create(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": format!("{service}-1"), "namespace": "default", "labels": {"kubernetes.io/service-name": service}},
            "addressType": family, "ports": [{"name": "p", "port": 8080, "protocol": protocol}], "endpoints": endpoint_list(endpoints),
        }));
    }

    pub fn set_endpoints(&self, service: &str, endpoints: &[IpAddr]) {
        self.api.edit("endpointslices", "default", &format!("{service}-1"), |slice| {
            slice["endpoints"] = endpoint_list(endpoints)
        });
    }
}

/// A server on TCP and UDP port 8080 of a pod, that answers with its name and the client's address.
pub fn serve(name: &str, address: IpAddr) {
    serve_as(Some(name), name, (address, 8080).into());
}

/// As [`serve`], at any place and port and by any name.
pub fn serve_as(place: Option<&str>, name: &str, address: SocketAddr) {
    let (listener, socket) = at(place, || (TcpListener::bind(address).unwrap(), UdpSocket::bind(address).unwrap()));
    let own = name.to_owned();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let Ok(peer) = stream.peer_addr() else { continue };
            let _ = stream.write_all(format!("{own} {}\n", peer.ip()).as_bytes());
            // Afterwards an echo, for tests that keep their connection.
            std::thread::spawn(move || {
                let mut buffer = [0; 64];
                while let Ok(length) = stream.read(&mut buffer) {
                    if length == 0 || stream.write_all(&buffer[..length]).is_err() {
                        return;
                    }
                }
            });
        }
    });
    let own = name.to_owned();
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((_, peer)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(format!("{own} {}\n", peer.ip()).as_bytes(), peer);
        }
    });
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some((shutdown, _)) = &self.running {
            shutdown.cancel();
        }
    }
}

pub fn endpoint_list(endpoints: &[IpAddr]) -> Value {
    endpoints
        .iter()
        .map(|address| json!({"addresses": [address.to_string()], "conditions": {"ready": true}, "nodeName": NODE}))
        .collect()
}

pub fn netns(name: &str) -> PathBuf {
    Path::new("/run/netns").join(name)
}

/// A port of a specification.
pub fn port(protocol: &str, node_port: Option<u16>) -> Value {
    json!([{"name": "p", "protocol": protocol, "port": 80, "targetPort": 8080, "nodePort": node_port}])
}

/// Runs `work` in the namespace of a pod, or of the node when there is none.
pub fn at<T: Send>(place: Option<&str>, work: impl FnOnce() -> T + Send) -> T {
    match place {
        Some(name) => run_in(&netns(name), work).unwrap(),
        None => work(),
    }
}

/// Who answers at `to`, and which address they see: (`pod name`, client).
pub fn ask(place: Option<&str>, to: (impl Into<IpAddr>, u16)) -> io::Result<(String, IpAddr)> {
    let address = SocketAddr::new(to.0.into(), to.1);
    at(place, || {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(3))?;
        read_answer(&mut stream)
    })
}

pub fn read_answer(stream: &mut TcpStream) -> io::Result<(String, IpAddr)> {
    stream.set_read_timeout(Some(Duration::from_secs(3)))?;
    let mut text = Vec::new();
    let mut byte = [0];
    while byte[0] != b'\n' {
        stream.read_exact(&mut byte)?;
        text.push(byte[0]);
    }
    parse(&String::from_utf8_lossy(&text)).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

pub fn parse(text: &str) -> Option<(String, IpAddr)> {
    let (name, address) = text.trim().split_once(' ')?;
    Some((name.to_owned(), address.parse().ok()?))
}

/// Asks until somebody answers.
pub fn ask_until(place: Option<&str>, to: (impl Into<IpAddr>, u16)) -> (String, IpAddr) {
    let (address, port) = (to.0.into(), to.1);
    wait_for(&format!("an answer of {address}:{port}"), TIMEOUT, || ask(place, (address, port)).ok())
}
