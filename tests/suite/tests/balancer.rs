//! Balancer addresses with real packets: a neighbour on the segment of two nodes, each with its own proxy.

#[macro_use]
mod netproxy_nodes;
mod netproxy_world;

use std::io::{BufRead, BufReader, ErrorKind};
use std::net::{IpAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use netproxy_nodes::{Machine, bridge, net, pod, register, underlay};
use netproxy_world::{Family, netns};
use oarlock_machinery::fake::FakeApi;
use oarlock_netlink::{Connection, Mac, Protocol};
use oarlock_testkit::{in_fresh_namespaces, wait_for};
use serde_json::{Value, json};

with_each_families! {
    a_neighbour_reaches_an_address_and_it_moves_with_its_node
    with_policy_local_a_node_with_endpoints_announces
}

/// A node is given up by the others after 8 seconds.
const MOVE_TIMEOUT: Duration = Duration::from_secs(25);
const SEGMENT: u8 = 1;

/// Nodes `a` and `b` on a segment, and this namespace as their neighbour.
struct Segment {
    api: Arc<FakeApi>,
    link: u32,
    families: &'static [Family],
    connection: Connection,
    machines: Vec<(&'static str, Machine)>,
}

impl Segment {
    fn start(families: &'static [Family]) -> Segment {
        oarlock_netns::bring_loopback_up().unwrap();
        let mut connection = Connection::open(Protocol::Route).unwrap();
        let link = bridge(&mut connection, "seg1");
        for family in families {
            connection.add_address(link, net(underlay(*family, SEGMENT, 254))).unwrap();
        }
        let api = FakeApi::new();
        ["a", "b"].iter().for_each(|name| register(&api, name, SEGMENT, families));
        let machines = ["a", "b"].map(|name| (name, Machine::start(name, SEGMENT, families, &api, &mut connection)));
        Segment { api, link, families, connection, machines: machines.into() }
    }

    /// A Service `web` with an address of each family, and endpoints on these nodes.
    fn serve(&self, policy: &str, nodes: &[&str]) {
        let texts = |addresses: Vec<IpAddr>| addresses.iter().map(ToString::to_string).collect::<Vec<_>>();
        let cluster_ips = texts(self.families.iter().map(|family| family.service(80)).collect());
        let ingress: Vec<Value> = self.addresses().iter().map(|one| json!({"ip": one.to_string()})).collect();
        self.api.create(json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "default"},
            "spec": {"type": "LoadBalancer", "clusterIP": cluster_ips[0], "clusterIPs": cluster_ips,
                     "externalTrafficPolicy": policy, "ports": [{"name": "p", "port": 80, "targetPort": 8080}]},
            "status": {"loadBalancer": {"ingress": ingress}},
        }));
        for family in self.families {
            let (name, kind) = slice_of(*family);
            self.api.create(json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
                "addressType": kind, "ports": [{"name": "p", "port": 8080}], "endpoints": endpoints(*family, nodes),
            }));
        }
    }

    fn addresses(&self) -> Vec<IpAddr> {
        self.families.iter().map(|family| balancer(*family)).collect()
    }

    fn mac(&self, node: &str) -> Mac {
        let mut inside = Connection::open_in(Protocol::Route, &netns(node)).unwrap();
        inside.require_link("eth0").unwrap().mac.unwrap()
    }

    /// The node that this neighbour sends to for an address, if it knows one.
    fn sends_to(&mut self, address: IpAddr) -> Option<&'static str> {
        let all = self.connection.neighbours().unwrap();
        let mac = all.into_iter().find(|one| one.address == address && one.link == self.link)?.mac?;
        self.machines.iter().map(|(name, _)| *name).find(|name| self.mac(name) == mac)
    }

    /// Waits until packets for all addresses go to `node`, and somebody answers there.
    fn is_served_by(&mut self, node: &str) {
        for address in self.addresses() {
            wait_for(&format!("{address} to be at {node}"), MOVE_TIMEOUT, || {
                (self.sends_to(address) == Some(node)).then_some(())
            });
            wait_for(&format!("an answer of {address} at {node}"), MOVE_TIMEOUT, || ask(address, 80).ok());
        }
    }
}

/// The address of the Service.
fn balancer(family: Family) -> IpAddr {
    underlay(family, SEGMENT, 203)
}

fn slice_of(family: Family) -> (&'static str, &'static str) {
    if family == Family::V4 { ("web-4", "IPv4") } else { ("web-6", "IPv6") }
}

fn endpoints(family: Family, nodes: &[&str]) -> Value {
    let endpoint = |node: &&str| json!({"addresses": [pod(family, node, 2).to_string()], "nodeName": node, "conditions": {"ready": true}});
    nodes.iter().map(endpoint).collect()
}

/// The address that the pod behind `address` sees.
fn ask(address: IpAddr, port: u16) -> std::io::Result<IpAddr> {
    let stream = TcpStream::connect_timeout(&(address, port).into(), Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    line.trim().parse().map_err(|_| ErrorKind::InvalidData.into())
}

fn a_neighbour_reaches_an_address_and_it_moves_with_its_node(families: &'static [Family]) {
    let mut segment = Segment::start(families);
    segment.serve("Cluster", &["a", "b"]);
    for address in segment.addresses() {
        let client = wait_for(&format!("{address} to answer"), MOVE_TIMEOUT, || ask(address, 80).ok());
        assert_ne!(client.to_string(), underlay(families[0], SEGMENT, 254).to_string(), "answers have to come back");
        let refused = ask(address, 81).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "nothing else is behind the address");
    }
    for address in segment.addresses() {
        let first = segment.sends_to(address).expect("one of the nodes");
        let second = if first == "a" { "b" } else { "a" };
        let position = usize::from(first == "b");
        segment.machines[position].1.stop_proxy();
        let moved = |segment: &mut Segment, to: &str, why: &str| {
            wait_for(&format!("{address} to move to {to}: {why}"), MOVE_TIMEOUT, || {
                (segment.sends_to(address) == Some(to) && ask(address, 80).is_ok()).then_some(())
            });
        };
        moved(&mut segment, second, "the first node's proxy is gone");
        let api = segment.api.clone();
        segment.machines[position].1.start_proxy(&api);
        moved(&mut segment, first, "it is back");
        let ready = |state: &str| {
            api.edit("nodes", "", first, |node| node["status"]["conditions"][0]["status"] = state.into());
        };
        ready("Unknown");
        moved(&mut segment, second, "the first node is not ready");
        ready("True");
        moved(&mut segment, first, "it is ready again");
    }
    segment.api.delete("services", "default", "web", json!({}));
    for address in segment.addresses() {
        wait_for(&format!("nobody to answer for {address}"), MOVE_TIMEOUT, || {
            let known = segment.connection.neighbours().unwrap();
            for one in known.iter().filter(|one| one.address == address && one.link == segment.link) {
                segment.connection.delete_neighbour(one).unwrap();
            }
            ask(address, 80).is_err_and(|error| error.kind() == ErrorKind::HostUnreachable).then_some(())
        });
    }
}

fn with_policy_local_a_node_with_endpoints_announces(families: &'static [Family]) {
    let mut segment = Segment::start(families);
    segment.serve("Local", &["b"]);
    for address in segment.addresses() {
        let client = wait_for(&format!("{address} to answer"), MOVE_TIMEOUT, || ask(address, 80).ok());
        let neighbour = if address.is_ipv4() { Family::V4 } else { Family::V6 };
        assert_eq!(client, underlay(neighbour, SEGMENT, 254), "the client's own address");
    }
    segment.is_served_by("b");
    for family in families {
        let (name, _) = slice_of(*family);
        segment.api.edit("endpointslices", "default", name, |slice| slice["endpoints"] = endpoints(*family, &["a"]));
    }
    segment.is_served_by("a");
}
