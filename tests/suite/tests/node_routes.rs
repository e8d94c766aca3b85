//! Nodes as network namespaces with a router between them, each with its own proxy: pods of one segment reach each other
//! directly, others through VXLAN, and what is not needed any more goes.

mod netproxy_world;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use ipnet::IpNet;
use netproxy_world::{Family, TIMEOUT, netns};
use oarlock_machinery::fake::FakeApi;
use oarlock_netlink::{Connection, LinkChange, Protocol, Route, VethPair};
use oarlock_netns::{create_pinned, run_in};
use oarlock_netproxy::{Config, Netproxy, Network};
use oarlock_testkit::{in_fresh_namespaces, wait_for};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

macro_rules! in_each_mode {
    ($($name:ident)*) => {
        mod ipv4 { $(#[test] fn $name() { super::in_fresh_namespaces(|| super::$name(&[super::Family::V4])); })* }
        mod ipv6 { $(#[test] fn $name() { super::in_fresh_namespaces(|| super::$name(&[super::Family::V6])); })* }
        mod dual_stack {
            $(#[test] fn $name() { super::in_fresh_namespaces(|| super::$name(&[super::Family::V4, super::Family::V6])); })*
        }
    };
}

in_each_mode! { pods_of_all_nodes_reach_each_other }

/// Segments of the underlay: a and c are on the first, b is on the second.
const NODES: [(&str, u8); 3] = [("a", 1), ("b", 2), ("c", 1)];

fn number(node: &str) -> u8 {
    node.as_bytes()[0] - b'a' + 1
}

/// The address `last` of a segment.
fn underlay(family: Family, segment: u8, last: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(192, 168, segment, last).into(),
        Family::V6 => Ipv6Addr::new(0xfd07, 0, 0, u16::from(segment), 0, 0, 0, u16::from(last)).into(),
    }
}

/// The address `last` of a node's pods.
fn pod(family: Family, node: &str, last: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(10, 42, number(node), last).into(),
        Family::V6 => Ipv6Addr::new(0xfd2a, 0, 0, u16::from(number(node)), 0, 0, 0, u16::from(last)).into(),
    }
}

fn net(address: IpAddr) -> IpNet {
    IpNet::new(address, if address.is_ipv4() { 24 } else { 64 }).unwrap()
}

fn anywhere(family: Family) -> IpNet {
    if family == Family::V4 { "0.0.0.0/0" } else { "::/0" }.parse().unwrap()
}

/// A veth pair from the namespace of `near`, put into a bridge there if one is named, to `eth0` of another namespace.
fn wire(near: &mut Connection, name: &str, bridge: Option<&str>, far: &Path) -> Connection {
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

fn bridge(connection: &mut Connection, name: &str) -> u32 {
    connection.create_bridge(name, None, 0, false).unwrap();
    let index = connection.require_link(name).unwrap().index;
    connection.set_up(index).unwrap();
    index
}

/// A node with one pod that answers on port 8080 with the address that it sees.
struct Machine {
    directory: tempfile::TempDir,
    _runtime: Runtime,
    shutdown: CancellationToken,
}

impl Machine {
    fn start(name: &str, segment: u8, families: &[Family], api: &Arc<FakeApi>, router: &mut Connection) -> Machine {
        let (own, pod_netns) = (netns(name), netns(&format!("pod-{name}")));
        create_pinned(&own).unwrap();
        create_pinned(&pod_netns).unwrap();
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
                let _ = stream.peer_addr().map(|peer| writeln!(stream, "{}", peer.ip().to_canonical()));
                let _ = stream.write_all(&[b'x'; 200_000]);
            }
        });
        let directory = tempfile::tempdir().unwrap();
        let config = config(name, segment, families, directory.path());
        // Its threads are in the node's namespace, and so is all that they do.
        let runtime = run_in(&own, || {
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
        })
        .unwrap();
        let (shutdown, api) = (CancellationToken::new(), api.clone());
        let stop = shutdown.clone();
        runtime.spawn(async move { Netproxy::new(config, api.client()).run(stop).await.unwrap() });
        Machine { directory, _runtime: runtime, shutdown }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

fn config(name: &str, segment: u8, families: &[Family], directory: &Path) -> Config {
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
        upstream_resolv_conf: directory.join("resolv.conf"),
        ..Config::default()
    }
}

fn register(api: &FakeApi, name: &str, segment: u8, families: &[Family]) {
    let cidrs: Vec<String> = families.iter().map(|family| net(pod(*family, name, 0)).trunc().to_string()).collect();
    let address = |family: &Family| json!({"type": "InternalIP", "address": underlay(*family, segment, number(name)).to_string()});
    let addresses: Vec<Value> = families.iter().map(address).collect();
    api.create(json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs},
        "status": {"addresses": addresses},
    }));
}

/// Whom the pod of `to` sees when that of `from` connects, if it can and everything that is sent arrives.
fn seen(from: &str, family: Family, to: &str) -> Option<IpAddr> {
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

fn reaches(from: &str, family: Family, to: &str) {
    let client = wait_for(&format!("{from} to reach {to} by {family:?}"), TIMEOUT, || seen(from, family, to));
    assert_eq!(client, pod(family, from, 2), "pods see each other's own addresses");
}

fn vxlan_links(node: &str) -> Vec<String> {
    let links = Connection::open_in(Protocol::Route, &netns(node)).unwrap().links().unwrap();
    links.into_iter().map(|link| link.name).filter(|name| name.starts_with("oar-vxlan")).collect()
}

fn pods_of_all_nodes_reach_each_other(families: &[Family]) {
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
            Machine::start(name, *segment, families, &api, &mut router)
        })
        .collect();
    for family in families.iter().copied() {
        for (from, to) in [("a", "b"), ("b", "a"), ("a", "c"), ("c", "b")] {
            reaches(from, family, to);
        }
        let routes = Connection::open_in(Protocol::Route, &netns("a")).unwrap().routes().unwrap();
        let gateway = |to: &str| {
            let route = routes.iter().find(|route| route.destination == net(pod(family, to, 0)).trunc());
            route.and_then(|route| route.gateway)
        };
        assert_eq!(gateway("c"), Some(underlay(family, 1, number("c"))), "on one segment, through the node itself");
        assert_eq!(gateway("b"), Some(pod(family, "b", 0)), "elsewhere, through the tunnel");
    }
    assert_eq!(vxlan_links("a").len(), families.len());
    let smallest = if families.contains(&Family::V6) { 1430 } else { 1450 };
    let conflist = || std::fs::read_to_string(machines[0].directory.path().join("net.d/10-oarlock.conflist")).ok();
    wait_for("pods' links to be small enough", TIMEOUT, || {
        conflist().filter(|text| text.contains(&format!("\"mtu\": {smallest}")))
    });
    // A link that is cut and healed needs nobody's help.
    let cut = router.require_link("to-b").unwrap().index;
    let set = |router: &mut Connection, up| {
        router.change_link(cut, &LinkChange { up: Some(up), ..LinkChange::default() }).unwrap();
    };
    set(&mut router, false);
    assert_eq!(seen("a", families[0], "b"), None);
    set(&mut router, true);
    reaches("a", families[0], "b");
    api.delete("nodes", "", "b", json!({}));
    wait_for("the tunnel to go", TIMEOUT, || vxlan_links("a").is_empty().then_some(()));
    reaches("a", families[0], "c");
}
