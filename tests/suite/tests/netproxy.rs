//! Service traffic with real packets through the real kernel: the proxy in namespaces of its own, pods on a bridge, a
//! neighbour outside, and a fake API. Each test runs in a cluster of IPv4, of IPv6, and of both.

#[macro_use]
mod netproxy_world;

use std::collections::HashSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use netproxy_world::{Family, TIMEOUT, World, ask, ask_until, at, endpoint_list, parse, port, read_answer};
use oarlock_testkit::wait_for;
use serde_json::{Value, json};

const NODE_PORT: u16 = 30_080;

in_each_mode! {
    a_service_is_reached_from_pods_the_node_and_outside_by_all_its_endpoints
    a_pod_reaches_itself_through_its_service
    without_endpoints_connections_are_refused_at_once
    local_external_traffic_policy_shows_the_client
    session_affinity_binds_a_client_to_an_endpoint_until_it_is_gone
    a_udp_client_that_keeps_its_socket_follows_the_endpoints
    flows_to_a_balancers_address_end_with_it
    tens_of_thousands_of_stale_flows_are_forgotten
    a_restart_of_the_proxy_does_not_disturb_anybody
    rules_come_back_after_an_outside_flush
    nft_lists_what_the_proxy_wrote
    names_are_answered_to_pods_and_the_node_but_not_outside
    resolvers_in_a_circle_are_left_out_and_sound_ones_are_asked
    the_node_gets_its_cni_configuration_and_everything_can_be_removed
    only_allowed_sources_reach_a_load_balancers_address
    balancers_are_told_whether_the_node_has_endpoints
    endpoints_of_another_zone_are_spared
    internal_traffic_policy_local_stays_on_the_node
}

/// A name that tells the families of a cluster of both apart.
fn named(name: &str, family: Family) -> String {
    format!("{name}-{}", family.table())
}

/// A specification with the Service's address, and more.
fn spec(family: Family, last: u16, more: &Value) -> Value {
    let mut spec = json!({"clusterIP": family.service(last).to_string()});
    spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    spec
}

/// The Service `web`, with these endpoints; returns its address.
fn web(world: &World, family: Family, endpoints: &[IpAddr]) -> IpAddr {
    let name = named("web", family);
    world.slice(&name, "TCP", endpoints);
    world.service(&name, spec(family, 50, &json!({"type": "NodePort", "ports": port("TCP", Some(NODE_PORT))})));
    family.service(50)
}

fn pods(family: Family) -> (IpAddr, IpAddr) {
    (family.pod(11), family.pod(12))
}

fn kind_of<T: std::fmt::Debug>(result: std::io::Result<T>) -> ErrorKind {
    result.unwrap_err().kind()
}

fn a_service_is_reached_from_pods_the_node_and_outside_by_all_its_endpoints(world: &mut World, family: Family) {
    let (a, b) = pods(family);
    let service = web(world, family, &[a, b]);
    ask_until(Some("client"), (service, 80));
    let answers: HashSet<_> = (0..40).map(|_| ask(Some("client"), (service, 80)).unwrap()).collect();
    let client = family.pod(13);
    assert_eq!(answers, HashSet::from([("a".to_owned(), client), ("b".to_owned(), client)]), "pods see the client");
    let from_node: HashSet<_> = (0..40).map(|_| ask(None, (service, 80)).unwrap().0).collect();
    assert_eq!(from_node.len(), 2, "the node reaches both");
    let outside = ask(Some("outside"), (family.node(), NODE_PORT)).unwrap();
    assert_eq!(outside.1, family.gateway(), "node ports show the node's address");
    assert!(ask(None, (family.node(), NODE_PORT)).is_ok(), "the node reaches its own node port");
    assert!(ask(Some("client"), (family.node(), NODE_PORT)).is_ok(), "pods reach node ports");
    assert_eq!(kind_of(ask(None, (family.loopback(), NODE_PORT))), ErrorKind::ConnectionRefused);
    assert_eq!(kind_of(ask(Some("client"), (service, 81))), ErrorKind::ConnectionRefused, "no such port");
}

fn a_pod_reaches_itself_through_its_service(world: &mut World, family: Family) {
    let (a, _) = pods(family);
    let service = web(world, family, &[a]);
    let (name, client) = ask_until(Some("a"), (service, 80));
    assert_eq!(name, "a");
    assert_ne!(client, a, "it must not see itself as the client");
}

fn without_endpoints_connections_are_refused_at_once(world: &mut World, family: Family) {
    let (a, _) = pods(family);
    let service = web(world, family, &[a]);
    ask_until(Some("client"), (service, 80));
    world.set_endpoints(&named("web", family), &[]);
    let node_port = (family.node(), NODE_PORT);
    for (place, to) in [(Some("client"), (service, 80)), (None, (service, 80)), (Some("outside"), node_port)] {
        wait_for(&format!("a refused connection from {place:?}"), TIMEOUT, || {
            ask(place, to).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused).then_some(())
        });
    }
    world.set_endpoints(&named("web", family), &[a]);
    assert_eq!(ask_until(Some("client"), (service, 80)).0, "a");
}

fn local_external_traffic_policy_shows_the_client(world: &mut World, family: Family) {
    let (a, _) = pods(family);
    let name = named("web", family);
    world.slice(&name, "TCP", &[a]);
    let more = json!({"type": "NodePort", "ports": port("TCP", Some(NODE_PORT)), "externalTrafficPolicy": "Local"});
    world.service(&name, spec(family, 50, &more));
    assert_eq!(ask_until(Some("outside"), (family.node(), NODE_PORT)), ("a".to_owned(), family.outside()));
    assert!(ask(Some("client"), (family.node(), NODE_PORT)).is_ok());
}

fn session_affinity_binds_a_client_to_an_endpoint_until_it_is_gone(world: &mut World, family: Family) {
    let (a, b) = pods(family);
    let name = named("web", family);
    world.slice(&name, "TCP", &[a, b]);
    world.service(&name, spec(family, 50, &json!({"ports": port("TCP", None), "sessionAffinity": "ClientIP"})));
    let service = (family.service(50), 80);
    let first = ask_until(Some("client"), service).0;
    let all: HashSet<_> = (0..30).map(|_| ask(Some("client"), service).unwrap().0).collect();
    assert_eq!(all, HashSet::from([first.clone()]));
    let (other, rest) = if first == "a" { ("b", b) } else { ("a", a) };
    world.set_endpoints(&name, &[rest]);
    ask_until_it_is(other, Some("client"), service);
}

/// Asks until `name` answers; a failure says what the last question got instead.
fn ask_until_it_is(name: &str, place: Option<&str>, to: (IpAddr, u16)) {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let answer = ask(place, to);
        if answer.as_ref().is_ok_and(|(from, _)| from == name) {
            return;
        }
        assert!(Instant::now() < deadline, "{to:?} goes to {answer:?}, and not to {name}");
    }
}

fn a_udp_client_that_keeps_its_socket_follows_the_endpoints(world: &mut World, family: Family) {
    let (a, b) = pods(family);
    let name = named("echo", family);
    world.slice(&name, "UDP", &[a]);
    world.service(&name, spec(family, 50, &json!({"ports": port("UDP", None)})));
    let service = SocketAddr::new(family.service(50), 80);
    let socket = at(Some("client"), || UdpSocket::bind((family.any(), 4000)).unwrap());
    socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let hears = |wanted: &str| {
        wait_for(wanted, TIMEOUT, || {
            socket.send_to(b"?", service).ok()?;
            let mut buffer = [0; 64];
            let (length, peer) = socket.recv_from(&mut buffer).ok()?;
            // An answer that is on its way when its flow is forgotten is not translated back any more, and nobody waits for it.
            (peer == service).then_some(())?;
            (parse(&String::from_utf8_lossy(&buffer[..length]))?.0 == wanted).then_some(())
        });
    };
    hears("a");
    world.set_endpoints(&name, &[b]);
    hears("b");
}

/// Addresses that another balancer gave: nothing but the change itself says that they were a Service's.
fn flows_to_a_balancers_address_end_with_it(world: &mut World, family: Family) {
    let (a, _) = pods(family);
    let name = named("echo", family);
    world.slice(&name, "UDP", &[a]);
    world.service(&name, spec(family, 50, &json!({"type": "LoadBalancer", "ports": port("UDP", None)})));
    let address: IpAddr = if family == Family::V4 { [203, 0, 113, 7].into() } else { "fd98::7".parse().unwrap() };
    let ingress = |list: Value| {
        world.api.edit("services", "default", &name, |service| {
            service["status"] = json!({"loadBalancer": {"ingress": list}});
        });
    };
    ingress(json!([{"ip": address.to_string()}]));
    let socket = at(Some("outside"), || UdpSocket::bind((family.any(), 4100)).unwrap());
    socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    wait_for("an answer", TIMEOUT, || {
        socket.send_to(b"?", (address, 80)).ok()?;
        socket.recv_from(&mut [0; 64]).ok()
    });
    assert_eq!(flows(family, address, a), 1);
    ingress(json!([]));
    wait_for("the flow to be forgotten", TIMEOUT, || (flows(family, address, a) == 0).then_some(()));
}

/// The tracked UDP flows to an address, before translation, whose answers come from another.
fn flows(family: Family, to: IpAddr, from: IpAddr) -> usize {
    let mut count = 0;
    let mut connection = oarlock_netlink::Connection::open(oarlock_netlink::Protocol::Netfilter).unwrap();
    let each = |flow: oarlock_netlink::conntrack::Flow| {
        count += usize::from(flow.original.destination.ip() == to && flow.reply.source.ip() == from);
    };
    connection.each_flow(family == Family::V4, &[libc::IPPROTO_UDP as u8], each).unwrap();
    count
}

fn tens_of_thousands_of_stale_flows_are_forgotten(world: &mut World, family: Family) {
    let (a, b) = pods(family);
    let name = named("echo", family);
    world.slice(&name, "UDP", &[a]);
    world.service(&name, spec(family, 50, &json!({"ports": port("UDP", None)})));
    let service = family.service(50);
    let send = |port: u16| {
        at(Some("client"), || {
            UdpSocket::bind((family.any(), port)).and_then(|socket| socket.send_to(b"?", (service, 80)))
        })
        .unwrap();
    };
    wait_for("a flow", TIMEOUT, || {
        send(2000);
        (flows(family, service, a) == 1).then_some(())
    });
    at(Some("client"), || {
        for port in 9000..39_000 {
            let socket = UdpSocket::bind((family.any(), port)).unwrap();
            socket.send_to(b"?", (service, 80)).unwrap();
        }
    });
    assert!(flows(family, service, a) > 25_000, "{} flows", flows(family, service, a));
    let changed = std::time::Instant::now();
    world.set_endpoints(&name, &[b]);
    wait_for("no flow to lead to the old endpoint", TIMEOUT, || (flows(family, service, a) == 0).then_some(()));
    eprintln!("30,000 stale flows forgotten in {:?}", changed.elapsed());
}

fn a_restart_of_the_proxy_does_not_disturb_anybody(world: &mut World, family: Family) {
    let (a, b) = pods(family);
    let service = (web(world, family, &[a]), 80);
    ask_until(Some("client"), service);
    let mut kept = at(Some("client"), || TcpStream::connect(service).unwrap());
    read_answer(&mut kept).unwrap();
    world.stop_proxy();
    assert_eq!(ask(Some("client"), service).unwrap().0, "a", "new connections work while it is down");
    world.set_endpoints(&named("web", family), &[b]);
    world.start_proxy();
    wait_for("the new endpoint", TIMEOUT, || ask(Some("client"), service).is_ok_and(|one| one.0 == "b").then_some(()));
    kept.write_all(b"still there").unwrap();
    let mut echo = [0; 11];
    kept.read_exact(&mut echo).unwrap();
    assert_eq!(&echo, b"still there", "old connections go on");
}

fn rules_come_back_after_an_outside_flush(world: &mut World, family: Family) {
    let (a, _) = pods(family);
    let service = (web(world, family, &[a]), 80);
    ask_until(Some("client"), service);
    let foreign = ["add", "table", family.table(), "somebody-elses"];
    assert!(Command::new("nft").args(foreign).status().unwrap().success());
    let sets = ["endpoints", "balancers"].map(|set| vec!["flush", "map", family.table(), "oarlock-netproxy", set]);
    let flushes = [vec!["flush", "table", family.table(), "oarlock-netproxy"]].into_iter().chain(sets);
    for arguments in flushes {
        assert!(Command::new("nft").args(arguments).status().unwrap().success());
        assert_eq!(ask_until(Some("client"), service).0, "a");
    }
    let listed = Command::new("nft").args(["list", "tables"]).output().unwrap();
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert!(listed.contains(&format!("table {} somebody-elses", family.table())), "other tables stay: {listed}");
    assert!(Command::new("nft").args(["flush", "ruleset"]).status().unwrap().success());
    assert_eq!(ask_until(Some("client"), service).0, "a");
}

fn nft_lists_what_the_proxy_wrote(world: &mut World, family: Family) {
    let (a, b) = pods(family);
    let service = web(world, family, &[a, b]);
    ask_until(Some("client"), (service, 80));
    let name = named("bound", family);
    world.slice(&name, "TCP", &[a, b]);
    let bound = family.service(51);
    let more = json!({
        "type": "LoadBalancer", "ports": port("TCP", None), "sessionAffinity": "ClientIP",
        "loadBalancerSourceRanges": ["203.0.113.0/24", "fd99:1::/64", "fd99:2::/48"],
    });
    world.service(&name, spec(family, 51, &more));
    ask_until(Some("client"), (bound, 80));
    let output = Command::new("nft").args(["list", "ruleset"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains(&format!("{service} . tcp . 80 : 0x02000010")), "{text}");
    assert!(text.contains("0x00000000 . 0x10000002 : goto cluster-2"), "{text}");
    assert!(text.contains("numgen random mod 2"), "{text}");
    let client = format!("{} . {bound} . tcp . 80 ", family.pod(13));
    assert!(text.contains(&client), "clients that are bound show: {text}");
}

/// A question for the addresses of a family, and those in the answer; none where there is no answer within a second.
fn resolve(family: Family, place: Option<&str>, name: &str) -> Option<Vec<IpAddr>> {
    let (kind, length) = if family == Family::V4 { (1, 4) } else { (28, 16) };
    let mut question = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        question.push(label.len() as u8);
        question.extend_from_slice(label.as_bytes());
    }
    question.extend_from_slice(&[0, 0, kind, 0, 1]);
    let mut buffer = [0; 512];
    let received = at(place, || {
        let socket = UdpSocket::bind((family.any(), 0)).ok()?;
        socket.set_read_timeout(Some(Duration::from_secs(1))).ok()?;
        socket.send_to(&question, (family.service(10), 53)).ok()?;
        socket.recv(&mut buffer).ok()
    })?;
    // Every answer here is an address record with a compressed name: 12 bytes, then the address.
    let records = buffer[question.len()..received].chunks_exact(12 + length);
    let count = usize::from(buffer[7]);
    Some(records.take(count).filter_map(|record| oarlock_netlink::wire::read_address(&record[12..])).collect())
}

fn names_are_answered_to_pods_and_the_node_but_not_outside(world: &mut World, family: Family) {
    let (a, _) = pods(family);
    let service = web(world, family, &[a]);
    let name = format!("{}.default.svc.cluster.local", named("web", family));
    let answer =
        |place| wait_for("a name", TIMEOUT, || resolve(family, place, &name).filter(|found| !found.is_empty()));
    assert_eq!(answer(Some("client")), [service]);
    assert_eq!(answer(None), [service]);
    let unknown = wait_for("an answer about a name that is none", TIMEOUT, || {
        resolve(family, Some("client"), "nope.default.svc.cluster.local")
    });
    assert!(unknown.is_empty(), "{unknown:?}");
    assert_eq!(resolve(family, Some("outside"), &name), None, "DNS is for the cluster");
    let kube_dns = wait_for("the DNS Service", TIMEOUT, || world.api.get("services", "kube-system", "kube-dns"));
    let addresses = kube_dns["spec"]["clusterIPs"].as_array().unwrap();
    assert!(addresses.contains(&json!(family.service(10).to_string())), "{addresses:?}");
    assert_eq!(addresses.len(), world.families.len());
}

/// Passes questions on, and answers back; counts them.
fn relay(at: SocketAddr, to: SocketAddr) -> Arc<AtomicUsize> {
    let socket = UdpSocket::bind(at).unwrap();
    let count = Arc::new(AtomicUsize::new(0));
    let counter = count.clone();
    std::thread::spawn(move || {
        let mut buffer = [0; 1500];
        while let Ok((length, asker)) = socket.recv_from(&mut buffer) {
            counter.fetch_add(1, Ordering::SeqCst);
            let (question, back) = (buffer[..length].to_vec(), socket.try_clone().unwrap());
            std::thread::spawn(move || {
                let next = UdpSocket::bind((asker.ip(), 0)).ok()?;
                next.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
                next.send_to(&question, to).ok()?;
                let mut answer = [0; 1500];
                let length = next.recv(&mut answer).ok()?;
                back.send_to(&answer[..length], asker).ok()
            });
        }
    });
    count
}

/// A resolver for which every name has one address.
fn resolver(at: SocketAddr, address: IpAddr) {
    let socket = UdpSocket::bind(at).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 1500];
        while let Ok((length, asker)) = socket.recv_from(&mut buffer) {
            let labels = buffer[12..length].iter().position(|byte| *byte == 0).unwrap();
            let mut answer = buffer[..12 + labels + 5].to_vec();
            answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
            let bytes = oarlock_netlink::wire::address_bytes(address);
            let kind = if address.is_ipv4() { 1 } else { 28 };
            answer.extend([0xc0, 12, 0, kind, 0, 1, 0, 0, 0, 5, 0, bytes.len() as u8]);
            answer.extend(bytes);
            let _ = socket.send_to(&answer, asker);
        }
    });
}

fn resolvers_in_a_circle_are_left_out_and_sound_ones_are_asked(world: &mut World, family: Family) {
    let file = world.directory.path().join("resolv.conf");
    // This node's DNS asks the first, which asks the second, which asks this node's DNS.
    let second = SocketAddr::new(family.loopback(), 5353);
    let count = relay(SocketAddr::new(family.loopback(), 53), second);
    relay(second, (family.service(10), 53).into());
    std::fs::write(&file, format!("nameserver {}\n", family.loopback())).unwrap();
    wait_for("the first question that goes in a circle", TIMEOUT, || {
        resolve(family, None, "circle.example");
        (count.load(Ordering::SeqCst) > 0).then_some(())
    });
    wait_for("the circle to be found", TIMEOUT, || {
        let before = count.load(Ordering::SeqCst);
        let answer = resolve(family, None, "other.example");
        (answer == Some(vec![]) && count.load(Ordering::SeqCst) == before).then_some(())
    });
    resolver((family.node(), 53).into(), family.outside());
    std::fs::write(&file, format!("nameserver {}\nnameserver {}\n", family.loopback(), family.node())).unwrap();
    wait_for("the sound resolver", TIMEOUT, || {
        (resolve(family, Some("client"), "sound.example") == Some(vec![family.outside()])).then_some(())
    });
    std::fs::write(&file, "# nothing to ask\n").unwrap();
}

fn the_node_gets_its_cni_configuration_and_everything_can_be_removed(world: &mut World, family: Family) {
    let path = world.directory.path().join("net.d/10-oarlock.conflist");
    let text = wait_for("the CNI configuration", TIMEOUT, || std::fs::read_to_string(&path).ok());
    assert!(text.contains(if family == Family::V4 { "10.42.0.0/24" } else { "fd2a::/64" }), "{text}");
    world.stop_proxy();
    oarlock_netproxy::remove_everything(&world.config()).unwrap();
    let tables = Command::new("nft").args(["list", "tables"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&tables.stdout), "");
    let addresses = oarlock_netlink::Connection::open(oarlock_netlink::Protocol::Route).unwrap().addresses().unwrap();
    assert!(addresses.iter().all(|address| address.net.addr() != family.service(10)));
    let forwarding = match family {
        Family::V4 => "/proc/sys/net/ipv4/ip_forward",
        Family::V6 => "/proc/sys/net/ipv6/conf/all/forwarding",
    };
    assert_eq!(std::fs::read_to_string(forwarding).unwrap().trim(), "0", "as it was before");
    world.start_proxy();
    assert_eq!(std::fs::read_to_string(forwarding).unwrap().trim(), "1");
}

/// An address that somebody outside routes to the node.
fn balancer(family: Family) -> IpAddr {
    if family == Family::V4 { [198, 51, 100, 7].into() } else { "fd99::7".parse().unwrap() }
}

/// A Service of type LoadBalancer with [`balancer`] as its address.
fn balanced(world: &World, family: Family, more: &Value) {
    let name = named("balanced", family);
    let mut whole = json!({"type": "LoadBalancer", "ports": port("TCP", None)});
    whole.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    if world.api.get("services", "default", &name).is_some() {
        world.api.edit("services", "default", &name, |service| service["spec"] = spec(family, 52, &whole));
        return;
    }
    world.api.create(json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
        "spec": spec(family, 52, &whole),
        "status": {"loadBalancer": {"ingress": [{"ip": balancer(family).to_string()}]}},
    }));
}

fn only_allowed_sources_reach_a_load_balancers_address(world: &mut World, family: Family) {
    let (a, _) = pods(family);
    world.slice(&named("balanced", family), "TCP", &[a]);
    balanced(world, family, &json!({}));
    let to = (balancer(family), 80);
    ask_until(Some("outside"), to);
    let neighbours = if family == Family::V4 { "192.168.7.0/24" } else { "fd07::/64" };
    let strangers = if family == Family::V4 { "203.0.113.0/24" } else { "fd98::/16" };
    balanced(world, family, &json!({"loadBalancerSourceRanges": [strangers]}));
    wait_for("a dropped connection", TIMEOUT, || ask(Some("outside"), to).is_err().then_some(()));
    assert_eq!(kind_of(ask(Some("client"), to)), ErrorKind::TimedOut, "pods are no exception");
    assert!(ask(Some("client"), (family.service(52), 80)).is_ok(), "the cluster's address is not the balancer's");
    balanced(world, family, &json!({"loadBalancerSourceRanges": [strangers, neighbours]}));
    ask_until(Some("outside"), to);
    assert_eq!(kind_of(ask(Some("client"), to)), ErrorKind::TimedOut, "pods are not in the range");
}

fn balancers_are_told_whether_the_node_has_endpoints(world: &mut World, family: Family) {
    let (a, b) = pods(family);
    let name = named("balanced", family);
    let port = 31_000 + u16::from(family == Family::V6);
    world.slice(&name, "TCP", &[a, b]);
    balanced(world, family, &json!({"externalTrafficPolicy": "Local", "healthCheckNodePort": port}));
    let told = |wanted: &str| {
        wait_for(wanted, TIMEOUT, || {
            let mut stream = at(Some("outside"), || TcpStream::connect((family.node(), port))).ok()?;
            stream.write_all(b"GET / HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n").ok()?;
            let mut text = String::new();
            stream.read_to_string(&mut text).ok()?;
            text.starts_with(wanted).then_some(text)
        })
    };
    let text = told("HTTP/1.1 200");
    assert!(text.contains("\"localEndpoints\":2") && text.contains(&name), "{text}");
    assert_eq!(ask_until(Some("outside"), (balancer(family), 80)).1, family.outside(), "the client shows");
    world.set_endpoints(&name, &[]);
    assert!(told("HTTP/1.1 503").contains("\"localEndpoints\":0"));
    world.api.delete("services", "default", &name, json!({}));
    wait_for("the port to be closed", TIMEOUT, || {
        at(Some("outside"), || TcpStream::connect((family.node(), port))).is_err().then_some(())
    });
}

fn endpoints_of_another_zone_are_spared(world: &mut World, family: Family) {
    let (a, b) = pods(family);
    let service = (web(world, family, &[a, b]), 80);
    ask_until(Some("client"), service);
    let hinted = |zones: [&str; 2]| {
        let mut list = endpoint_list(&[a, b]);
        for (endpoint, zone) in list.as_array_mut().unwrap().iter_mut().zip(zones) {
            endpoint["hints"] = json!({"forZones": [{"name": zone}]});
        }
        list
    };
    let name = format!("{}-1", named("web", family));
    world.api.edit("endpointslices", "default", &name, |slice| slice["endpoints"] = hinted(["there", "here"]));
    wait_for("the endpoint of this zone alone", TIMEOUT, || {
        (0..20).all(|_| ask(Some("client"), service).is_ok_and(|answer| answer.0 == "b")).then_some(())
    });
    world.api.edit("endpointslices", "default", &name, |slice| slice["endpoints"] = hinted(["there", "there"]));
    wait_for("both endpoints", TIMEOUT, || {
        let names: HashSet<String> = (0..20).filter_map(|_| Some(ask(Some("client"), service).ok()?.0)).collect();
        (names.len() == 2).then_some(())
    });
}

fn internal_traffic_policy_local_stays_on_the_node(world: &mut World, family: Family) {
    let (a, b) = pods(family);
    let name = named("web", family);
    world.slice(&name, "TCP", &[a, b]);
    world.service(&name, spec(family, 50, &json!({"ports": port("TCP", None), "internalTrafficPolicy": "Local"})));
    let service = (family.service(50), 80);
    ask_until(Some("client"), service);
    let elsewhere = |endpoints: &[(IpAddr, &str)]| -> Value {
        let one = |(address, node): &(IpAddr, &str)| json!({"addresses": [address.to_string()], "conditions": {"ready": true}, "nodeName": node});
        endpoints.iter().map(one).collect()
    };
    let slice = format!("{name}-1");
    let some = elsewhere(&[(a, "other-node"), (b, "node-1")]);
    world.api.edit("endpointslices", "default", &slice, |slice| slice["endpoints"] = some.clone());
    wait_for("the endpoint of this node alone", TIMEOUT, || {
        (0..20).all(|_| ask(Some("client"), service).is_ok_and(|answer| answer.0 == "b")).then_some(())
    });
    let none = elsewhere(&[(a, "other-node")]);
    world.api.edit("endpointslices", "default", &slice, |slice| slice["endpoints"] = none.clone());
    wait_for("no answer", TIMEOUT, || ask(Some("client"), service).is_err().then_some(()));
    assert_eq!(kind_of(ask(Some("client"), service)), ErrorKind::TimedOut, "dropped, not refused");
}
