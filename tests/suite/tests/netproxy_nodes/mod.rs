//! Nodes as network namespaces on segments of a router, each with its own proxy and one pod.
#![allow(dead_code, reason = "each test program uses a part")]

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use ipnet::IpNet;
use oarlock_machinery::fake::FakeApi;
use oarlock_netlink::{Connection, Protocol, Route, VethPair};
use oarlock_netns::{create_pinned, run_in};
use oarlock_netproxy::{Config, Netproxy, Network, Tunnel};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::netproxy_world::{Family, netns};

/// Makes tests of the functions named, each with the families that it is given.
#[allow(unused_macros, reason = "not every test file makes tests of each mode")]
macro_rules! with_each_families {
    ($($name:ident)*) => {
        mod ipv4 { $(#[test] fn $name() { super::in_fresh_namespaces(|| super::$name(&[super::Family::V4])); })* }
        mod ipv6 { $(#[test] fn $name() { super::in_fresh_namespaces(|| super::$name(&[super::Family::V6])); })* }
        mod dual_stack {
            $(#[test] fn $name() { super::in_fresh_namespaces(|| super::$name(&[super::Family::V4, super::Family::V6])); })*
        }
    };
}

pub fn number(node: &str) -> u8 {
    node.as_bytes()[0] - b'a' + 1
}

/// The address `last` of a segment.
pub fn underlay(family: Family, segment: u8, last: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(192, 168, segment, last).into(),
        Family::V6 => Ipv6Addr::new(0xfd07, 0, 0, u16::from(segment), 0, 0, 0, u16::from(last)).into(),
    }
}

/// The address `last` of a node's pods.
pub fn pod(family: Family, node: &str, last: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(10, 42, number(node), last).into(),
        Family::V6 => Ipv6Addr::new(0xfd2a, 0, 0, u16::from(number(node)), 0, 0, 0, u16::from(last)).into(),
    }
}

pub fn net(address: IpAddr) -> IpNet {
    IpNet::new(address, if address.is_ipv4() { 24 } else { 64 }).unwrap()
}

/// The addresses of a segment that Services may get.
pub fn pool(family: Family, segment: u8) -> IpNet {
    let first = underlay(family, segment, 200);
    IpNet::new(first, if first.is_ipv4() { 29 } else { 125 }).unwrap()
}

pub fn anywhere(family: Family) -> IpNet {
    if family == Family::V4 { "0.0.0.0/0" } else { "::/0" }.parse().unwrap()
}

/// A veth pair from the namespace of `near`, put into a bridge there if one is named, to `eth0` of another namespace.
pub fn wire(near: &mut Connection, name: &str, bridge: Option<&str>, far: &Path) -> Connection {
    let file = std::fs::File::open(far).unwrap();
    let master = bridge.map(|bridge| near.require_link(bridge).unwrap().index);
    near.create_veth(&VethPair {
        name,
        master,
        mac: None,
        peer_name: "eth0",
        peer_mac: None,
        peer_netns: file.as_fd(),
        mtu: 0,
    })
    .unwrap();
    let mut inside = Connection::open_in(Protocol::Route, far).unwrap();
    let link = inside.require_link("eth0").unwrap().index;
    inside.set_up(link).unwrap();
    inside
}

pub fn bridge(connection: &mut Connection, name: &str) -> u32 {
    connection.create_bridge(name, None, 0, false).unwrap();
    let index = connection.require_link(name).unwrap().index;
    connection.set_up(index).unwrap();
    index
}

/// A node with one pod that answers on port 8080 with the address that it sees.
pub struct Machine {
    // Goes first: what runs in it writes to the directory.
    runtime: Runtime,
    pub directory: tempfile::TempDir,
    config: Config,
    /// Tells the running proxy of another configuration.
    pub settings: watch::Sender<Config>,
    running: Option<(CancellationToken, JoinHandle<()>)>,
}

impl Machine {
    pub fn start(name: &str, segment: u8, families: &[Family], api: &Arc<FakeApi>, router: &mut Connection) -> Machine {
        Machine::start_with(Tunnel::Vxlan, (name, segment), families, api, router)
    }

    /// As [`Machine::start`], with another way to other segments.
    pub fn start_with(
        tunnel: Tunnel,
        (name, segment): (&str, u8),
        families: &[Family],
        api: &Arc<FakeApi>,
        router: &mut Connection,
    ) -> Machine {
        let (own, pod_netns) = (netns(name), netns(&format!("pod-{name}")));
        create_pinned(&own).unwrap();
        create_pinned(&pod_netns).unwrap();
        // As some distributions have it, and some administrators.
        let strict = if name == "b" { "all" } else { "default" };
        let path = format!("/proc/sys/net/ipv4/conf/{strict}/rp_filter");
        run_in(&own, || std::fs::write(path, "1").unwrap()).unwrap();
        let mut node = wire(router, &format!("to-{name}"), Some(&format!("seg{segment}")), &own);
        let eth0 = node.require_link("eth0").unwrap().index;
        let pods = bridge(&mut node, "oar0");
        let mut inside = wire(&mut node, "veth-pod", Some("oar0"), &pod_netns);
        let far = inside.require_link("eth0").unwrap().index;
        for family in families.iter().copied() {
            node.add_address(eth0, net(underlay(family, segment, number(name)))).unwrap();
            let gateway = underlay(family, segment, 254);
            node.add_route(&Route::new(anywhere(family), Some(gateway), eth0)).unwrap();
            node.add_address(pods, net(pod(family, name, 1))).unwrap();
            inside.add_address(far, net(pod(family, name, 2))).unwrap();
            inside.add_route(&Route::new(anywhere(family), Some(pod(family, name, 1)), far)).unwrap();
        }
        let listener = run_in(&pod_netns, || TcpListener::bind(("::", 8080)).unwrap()).unwrap();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                // One that gets stuck where a way is cut holds up no other.
                std::thread::spawn(move || {
                    let _ = stream.peer_addr().map(|peer| writeln!(stream, "{}", peer.ip().to_canonical()));
                    let _ = stream.write_all(&[b'x'; 200_000]);
                });
            }
        });
        let directory = tempfile::tempdir().unwrap();
        let config = Config { tunnel, ..config(name, segment, families, directory.path()) };
        // Its threads are in the node's namespace, and so is all that they do.
        let runtime = run_in(&own, || {
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
        })
        .unwrap();
        let settings = watch::channel(config.clone()).0;
        let mut machine = Machine { directory, config, settings, runtime, running: None };
        machine.start_proxy(api);
        machine
    }

    pub fn start_proxy(&mut self, api: &Arc<FakeApi>) {
        let (shutdown, api, config) = (CancellationToken::new(), api.clone(), self.config.clone());
        let stop = shutdown.clone();
        let changes = self.settings.subscribe();
        let handle = self.runtime.spawn(async move {
            Netproxy::new(config, api.client()).with_changes(changes).run(stop).await.unwrap();
        });
        self.running = Some((shutdown, handle));
    }

    pub fn stop_proxy(&mut self) {
        let (shutdown, handle) = self.running.take().expect("the proxy runs");
        shutdown.cancel();
        self.runtime.block_on(handle).unwrap();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some((shutdown, _)) = &self.running {
            shutdown.cancel();
        }
    }
}

pub fn config(name: &str, segment: u8, families: &[Family], directory: &Path) -> Config {
    std::fs::write(directory.join("resolv.conf"), "").unwrap();
    let network = |family: &Family| {
        let (pods, services) = match family {
            Family::V4 => ("10.42.0.0/16", "10.43.0.0/16"),
            Family::V6 => ("fd2a::/48", "fd2b::/112"),
        };
        Network {
            cluster_cidr: pods.parse().unwrap(),
            service_cidr: services.parse().unwrap(),
            cluster_dns: family.service(10),
            node_ip: Some(underlay(*family, segment, number(name))),
        }
    };
    Config {
        node_name: name.to_owned(),
        networks: families.iter().map(network).collect(),
        cni_conf_dir: Some(directory.join("net.d")),
        balancer_pools: families.iter().map(|family| pool(*family, segment)).collect(),
        balancer_class: "ours".to_owned(),
        wireguard_key: Some(directory.join("wireguard.key")),
        upstream_resolv_conf: directory.join("resolv.conf"),
        ..Config::default()
    }
}

pub fn register(api: &FakeApi, name: &str, segment: u8, families: &[Family]) {
    let cidrs: Vec<String> = families.iter().map(|family| net(pod(*family, name, 0)).trunc().to_string()).collect();
    let address = |family: &Family| json!({"type": "InternalIP", "address": underlay(*family, segment, number(name)).to_string()});
    let addresses: Vec<Value> = families.iter().map(address).collect();
    api.create(json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs},
        "status": {"addresses": addresses, "conditions": [{"type": "Ready", "status": "True"}]},
    }));
}

/// Whom the pod of `to` sees when that of `from` connects, if it can and everything that is sent arrives.
pub fn seen(from: &str, family: Family, to: &str) -> Option<IpAddr> {
    let address = (pod(family, to, 2), 8080).into();
    run_in(&netns(&format!("pod-{from}")), || {
        let mut stream = TcpStream::connect_timeout(&address, std::time::Duration::from_secs(2)).ok()?;
        stream.set_read_timeout(Some(std::time::Duration::from_secs(5))).ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        let (line, rest) = text.split_once('\n')?;
        (rest.len() == 200_000).then(|| line.parse().ok())?
    })
    .unwrap()
}

/// Segments of the underlay: a and c are on the first, b is on the second.
pub const NODES: [(&str, u8); 3] = [("a", 1), ("b", 2), ("c", 1)];

/// A router with both segments, and the nodes on them.
pub fn cluster(tunnel: Tunnel, families: &[Family]) -> (Connection, Arc<FakeApi>, Vec<Machine>) {
    oarlock_netns::bring_loopback_up().unwrap();
    let mut router = Connection::open(Protocol::Route).unwrap();
    for segment in [1, 2] {
        let index = bridge(&mut router, &format!("seg{segment}"));
        for family in families {
            router.add_address(index, net(underlay(*family, segment, 254))).unwrap();
        }
    }
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
    std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
    let api = FakeApi::new();
    let machines: Vec<Machine> = NODES
        .iter()
        .map(|(name, segment)| {
            register(&api, name, *segment, families);
            Machine::start_with(tunnel, (name, *segment), families, &api, &mut router)
        })
        .collect();
    (router, api, machines)
}
