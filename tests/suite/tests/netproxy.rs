//! Service traffic with real packets through the real kernel: the proxy in namespaces of its own, pods on a bridge, a
//! neighbour outside, and a fake API.

mod netproxy_world;

use std::collections::HashSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;

use netproxy_world::{NODE_IP, OUTSIDE_IP, TIMEOUT, World, ask, ask_until, at, parse, port, read_answer};
use oarlock_testkit::{in_fresh_namespaces, wait_for};
use serde_json::json;

const CLUSTER_IP: Ipv4Addr = Ipv4Addr::new(10, 43, 0, 50);
const DNS_IP: Ipv4Addr = Ipv4Addr::new(10, 43, 0, 10);
const NODE_PORT: u16 = 30_080;

fn two_pods() -> (World, Ipv4Addr, Ipv4Addr) {
    let mut world = World::start();
    let (a, b) = (world.pod("a", 11), world.pod("b", 12));
    world.pod("client", 13);
    (world, a, b)
}

fn web(world: &World, endpoints: &[Ipv4Addr]) {
    world.slice("web", "TCP", endpoints);
    world.service(
        "web",
        json!({"type": "NodePort", "clusterIP": CLUSTER_IP.to_string(), "ports": port("TCP", Some(NODE_PORT))}),
    );
}

#[test]
fn a_service_is_reached_from_pods_the_node_and_outside_by_all_its_endpoints() {
    in_fresh_namespaces(|| {
        let (world, a, b) = two_pods();
        web(&world, &[a, b]);
        ask_until(Some("client"), (CLUSTER_IP, 80));
        let answers: HashSet<_> = (0..40).map(|_| ask(Some("client"), (CLUSTER_IP, 80)).unwrap()).collect();
        let client: IpAddr = Ipv4Addr::new(10, 42, 0, 13).into();
        assert_eq!(answers, HashSet::from([("a".to_owned(), client), ("b".to_owned(), client)]), "pods see the client");
        let from_node: HashSet<_> = (0..40).map(|_| ask(None, (CLUSTER_IP, 80)).unwrap().0).collect();
        assert_eq!(from_node.len(), 2, "the node reaches both");
        let outside = ask(Some("outside"), (NODE_IP, NODE_PORT)).unwrap();
        assert_eq!(outside.1, IpAddr::from([10, 42, 0, 1]), "node ports show the node's address");
        assert!(ask(None, (NODE_IP, NODE_PORT)).is_ok(), "the node reaches its own node port");
        assert!(ask(Some("client"), (NODE_IP, NODE_PORT)).is_ok(), "pods reach node ports");
        assert_eq!(ask(None, (Ipv4Addr::LOCALHOST, NODE_PORT)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        assert_eq!(
            ask(Some("client"), (CLUSTER_IP, 81)).unwrap_err().kind(),
            ErrorKind::ConnectionRefused,
            "no such port"
        );
    });
}

#[test]
fn a_pod_reaches_itself_through_its_service() {
    in_fresh_namespaces(|| {
        let (world, a, _) = two_pods();
        web(&world, &[a]);
        let (name, client) = ask_until(Some("a"), (CLUSTER_IP, 80));
        assert_eq!(name, "a");
        assert_ne!(client, IpAddr::from(a), "it must not see itself as the client");
    });
}

#[test]
fn without_endpoints_connections_are_refused_at_once() {
    in_fresh_namespaces(|| {
        let (world, a, _) = two_pods();
        web(&world, &[a]);
        ask_until(Some("client"), (CLUSTER_IP, 80));
        world.set_endpoints("web", &[]);
        for (place, to) in
            [(Some("client"), (CLUSTER_IP, 80)), (None, (CLUSTER_IP, 80)), (Some("outside"), (NODE_IP, NODE_PORT))]
        {
            wait_for(&format!("a refused connection from {place:?}"), TIMEOUT, || {
                ask(place, to).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused).then_some(())
            });
        }
        world.set_endpoints("web", &[a]);
        assert_eq!(ask_until(Some("client"), (CLUSTER_IP, 80)).0, "a");
    });
}

#[test]
fn local_external_traffic_policy_shows_the_client() {
    in_fresh_namespaces(|| {
        let (world, a, _) = two_pods();
        world.slice("web", "TCP", &[a]);
        let spec = json!({
            "type": "NodePort", "clusterIP": CLUSTER_IP.to_string(), "ports": port("TCP", Some(NODE_PORT)), "externalTrafficPolicy": "Local",
        });
        world.service("web", spec);
        assert_eq!(ask_until(Some("outside"), (NODE_IP, NODE_PORT)), ("a".to_owned(), OUTSIDE_IP.into()));
        assert!(ask(Some("client"), (NODE_IP, NODE_PORT)).is_ok());
    });
}

#[test]
fn session_affinity_binds_a_client_to_an_endpoint_until_it_is_gone() {
    in_fresh_namespaces(|| {
        let (world, a, b) = two_pods();
        world.slice("web", "TCP", &[a, b]);
        let spec =
            json!({"clusterIP": CLUSTER_IP.to_string(), "ports": port("TCP", None), "sessionAffinity": "ClientIP"});
        world.service("web", spec);
        let first = ask_until(Some("client"), (CLUSTER_IP, 80)).0;
        let all: HashSet<_> = (0..30).map(|_| ask(Some("client"), (CLUSTER_IP, 80)).unwrap().0).collect();
        assert_eq!(all, HashSet::from([first.clone()]));
        let (other, rest) = if first == "a" { ("b", b) } else { ("a", a) };
        world.set_endpoints("web", &[rest]);
        wait_for("the other endpoint", TIMEOUT, || {
            ask(Some("client"), (CLUSTER_IP, 80)).is_ok_and(|answer| answer.0 == other).then_some(())
        });
    });
}

#[test]
fn a_udp_client_that_keeps_its_socket_follows_the_endpoints() {
    in_fresh_namespaces(|| {
        let (world, a, b) = two_pods();
        world.slice("echo", "UDP", &[a]);
        world.service("echo", json!({"clusterIP": CLUSTER_IP.to_string(), "ports": port("UDP", None)}));
        let socket = at(Some("client"), || UdpSocket::bind("0.0.0.0:4000").unwrap());
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let hears = |wanted: &str| {
            wait_for(wanted, TIMEOUT, || {
                socket.send_to(b"?", (CLUSTER_IP, 80)).ok()?;
                let mut buffer = [0; 64];
                let (length, peer) = socket.recv_from(&mut buffer).ok()?;
                assert_eq!(peer, SocketAddr::new(CLUSTER_IP.into(), 80), "answers come from the Service");
                (parse(&String::from_utf8_lossy(&buffer[..length]))?.0 == wanted).then_some(())
            });
        };
        hears("a");
        world.set_endpoints("echo", &[b]);
        hears("b");
    });
}

#[test]
fn a_restart_of_the_proxy_does_not_disturb_anybody() {
    in_fresh_namespaces(|| {
        let (mut world, a, b) = two_pods();
        web(&world, &[a]);
        ask_until(Some("client"), (CLUSTER_IP, 80));
        let mut kept = at(Some("client"), || TcpStream::connect((CLUSTER_IP, 80)).unwrap());
        read_answer(&mut kept).unwrap();
        world.stop_proxy();
        assert_eq!(ask(Some("client"), (CLUSTER_IP, 80)).unwrap().0, "a", "new connections work while it is down");
        world.set_endpoints("web", &[b]);
        world.start_proxy();
        wait_for("the new endpoint", TIMEOUT, || {
            ask(Some("client"), (CLUSTER_IP, 80)).is_ok_and(|one| one.0 == "b").then_some(())
        });
        kept.write_all(b"still there").unwrap();
        let mut echo = [0; 11];
        kept.read_exact(&mut echo).unwrap();
        assert_eq!(&echo, b"still there", "old connections go on");
    });
}

#[test]
fn rules_come_back_after_an_outside_flush() {
    in_fresh_namespaces(|| {
        let (world, a, _) = two_pods();
        web(&world, &[a]);
        ask_until(Some("client"), (CLUSTER_IP, 80));
        for arguments in [&["flush", "ruleset"][..], &["flush", "table", "ip", "oarlock-netproxy"]] {
            assert!(Command::new("nft").args(arguments).status().unwrap().success());
            assert_eq!(ask_until(Some("client"), (CLUSTER_IP, 80)).0, "a");
        }
    });
}

#[test]
fn nft_lists_what_the_proxy_wrote() {
    in_fresh_namespaces(|| {
        let (world, a, b) = two_pods();
        web(&world, &[a, b]);
        ask_until(Some("client"), (CLUSTER_IP, 80));
        world.slice("bound", "TCP", &[a, b]);
        let bound = Ipv4Addr::new(10, 43, 0, 51);
        let spec = json!({"clusterIP": bound.to_string(), "ports": port("TCP", None), "sessionAffinity": "ClientIP"});
        world.service("bound", spec);
        ask_until(Some("client"), (bound, 80));
        let output = Command::new("nft").args(["list", "ruleset"]).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(text.contains("10.43.0.50 . tcp . 80 : goto cluster-2"), "{text}");
        assert!(text.contains("numgen random mod 2"), "{text}");
        assert!(text.contains("10.42.0.13 . 10.43.0.51 . tcp . 80 "), "clients that are bound show: {text}");
    });
}

/// A question as bytes, and the addresses in the answer.
fn resolve(place: Option<&str>, name: &str) -> Option<Vec<IpAddr>> {
    let mut question = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        question.push(label.len() as u8);
        question.extend_from_slice(label.as_bytes());
    }
    question.extend_from_slice(&[0, 0, 1, 0, 1]);
    let mut buffer = [0; 512];
    let length = at(place, || {
        let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
        socket.set_read_timeout(Some(Duration::from_secs(1))).ok()?;
        socket.send_to(&question, (DNS_IP, 53)).ok()?;
        socket.recv(&mut buffer).ok()
    })?;
    // Every answer here is an address record with a compressed name: 12 bytes, then the address.
    let records = buffer[question.len()..length].chunks_exact(16);
    let count = usize::from(buffer[7]);
    Some(records.take(count).map(|record| IpAddr::from([record[12], record[13], record[14], record[15]])).collect())
}

#[test]
fn names_are_answered_to_pods_and_the_node_but_not_outside() {
    in_fresh_namespaces(|| {
        let (world, a, _) = two_pods();
        web(&world, &[a]);
        let name = "web.default.svc.cluster.local";
        let answer = |place| wait_for("a name", TIMEOUT, || resolve(place, name).filter(|found| !found.is_empty()));
        assert_eq!(answer(Some("client")), [IpAddr::from(CLUSTER_IP)]);
        assert_eq!(answer(None), [IpAddr::from(CLUSTER_IP)]);
        assert_eq!(resolve(Some("client"), "nope.default.svc.cluster.local"), Some(vec![]));
        assert_eq!(resolve(Some("outside"), name), None, "DNS is for the cluster");
        let kube_dns = world.api.get("services", "kube-system", "kube-dns").expect("the DNS Service is made");
        assert_eq!(kube_dns["spec"]["clusterIP"], DNS_IP.to_string());
    });
}

#[test]
fn the_node_gets_its_cni_configuration_and_everything_can_be_removed() {
    in_fresh_namespaces(|| {
        let mut world = World::start();
        let path = world.directory.path().join("net.d/10-oarlock.conflist");
        let text = wait_for("the CNI configuration", TIMEOUT, || std::fs::read_to_string(&path).ok());
        assert!(text.contains("10.42.0.0/24"), "{text}");
        world.stop_proxy();
        oarlock_netproxy::remove_everything(&world.config()).unwrap();
        let tables = Command::new("nft").args(["list", "tables"]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&tables.stdout), "");
        let addresses =
            oarlock_netlink::Connection::open(oarlock_netlink::Protocol::Route).unwrap().addresses().unwrap();
        assert!(addresses.iter().all(|address| address.net.addr() != IpAddr::from(DNS_IP)));
    });
}
