//! NetworkPolicies on ways that are not from one known pod to another by TCP: at a start of the proxy, out of sight of the
//! setting for bridges, by SCTP, from the node and from outside through Services. With real packets.

#[macro_use]
mod netproxy_world;

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use netproxy_world::policies::{is_shut, no_policy, policy, populate, select, until_open, until_shut};
use netproxy_world::sockets::{is_sctp_shut, sctp_arrives};
use netproxy_world::{Family, TIMEOUT, World, ask, ask_until, at};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use oarlock_machinery::fake::Refused;
use oarlock_testkit::wait_for;
use serde_json::{Value, json};

in_each_mode! {
    after_a_boot_nothing_is_ready_and_no_pod_starts_before_policies_hold
    a_restart_of_the_proxy_leaves_no_moment_open
    policies_hold_whatever_the_setting_for_bridges
    sctp_is_shut_out_and_let_through_by_its_ports
    pods_on_the_hosts_network_are_neither_peers_nor_isolated
    the_address_of_a_pod_that_has_ended_is_its_successors
    the_node_reaches_its_pods_and_pods_reach_themselves_under_default_deny
    blocks_mean_the_clients_address_also_behind_node_ports_and_balancers
}

const SETTINGS: [&str; 2] = ["bridge-nf-call-iptables", "bridge-nf-call-ip6tables"];

fn deny_all(world: &World) {
    policy(world, "deny-all", json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}));
}

fn run(program: &str, line: &str) {
    let output = Command::new(program).args(line.split(' ')).output().unwrap();
    assert!(output.status.success(), "{program} {line}: {}", String::from_utf8_lossy(&output.stderr));
}

/// What is answered at the port that tells it: the status and the rest.
fn http(path: &str) -> String {
    let port = if path == "/metrics" { 10_249 } else { 10_256 };
    let url = format!("http://127.0.0.1:{port}{path}");
    let output = Command::new("curl").args(["-sS", "-i", "-m", "3", &url]).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn after_a_boot_nothing_is_ready_and_no_pod_starts_before_policies_hold(world: &mut World, family: Family) {
    populate(world);
    let a = (family.pod(11), 8080);
    let name = format!("web-{}", family.table());
    world.slice(&name, "TCP", &[family.pod(12)]);
    let service = (family.service(60), 80);
    world.service(&name, json!({"clusterIP": service.0.to_string(), "ports": netproxy_world::port("TCP", None)}));
    policy(world, "deny", json!({"podSelector": select("a"), "policyTypes": ["Ingress"]}));
    until_shut(Some("client"), a);
    let conflist = world.directory.path().join("net.d/10-oarlock.conflist");
    wait_for("the CNI configuration", TIMEOUT, || conflist.exists().then_some(()));
    world.stop_proxy();
    // What the kernel has is gone, what is on disk is not.
    run("nft", "flush ruleset");
    let refusal = Refused::new(403, "Forbidden", "not yet");
    world.api.refuse("GET", "networkpolicies", usize::MAX, refusal);
    let config = world.config();
    let mut ready = world.launch_proxy(config);
    // Behind the Service is a pod that no policy is about.
    ask_until(Some("client"), service);
    assert!(!*ready.borrow(), "Services alone are not enough");
    assert!(http("/healthz").starts_with("HTTP/1.1 503"), "{}", http("/healthz"));
    assert!(!conflist.exists(), "a pod could start now, and nothing would isolate it");
    world.api.allow("GET", "networkpolicies");
    let waiting = async { tokio::time::timeout(TIMEOUT, ready.wait_for(|ready| *ready)).await.map(drop) };
    world.runtime.block_on(waiting).expect("the proxy to become ready");
    assert!(is_shut(Some("client"), a), "ready means that policies hold");
    assert!(http("/healthz").starts_with("HTTP/1.1 200"));
    wait_for("the CNI configuration again", TIMEOUT, || conflist.exists().then_some(()));
    // Another start takes nothing away: the tables are of this boot.
    world.stop_proxy();
    world.start_proxy();
    assert!(conflist.exists(), "pods go on to start while the proxy does");
    no_policy(world, "deny");
    world.api.delete("services", "default", &name, json!({}));
}

/// Tells threads to stop, also when what they accompany fails: they would be waited for without end.
struct AtEnd<'a>(&'a AtomicBool);

impl Drop for AtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// How often a client reaches somebody while `work` is done, and how often it tries.
fn reached_during(from: &'static str, to: (IpAddr, u16), patience: Duration, work: impl FnOnce()) -> (usize, usize) {
    let (stop, tries, answers) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                at(Some(from), || {
                    while !stop.load(Ordering::SeqCst) {
                        let is_reached = TcpStream::connect_timeout(&to.into(), patience).is_ok();
                        answers.fetch_add(usize::from(is_reached), Ordering::SeqCst);
                        tries.fetch_add(1, Ordering::SeqCst);
                    }
                });
            });
        }
        let _end = AtEnd(&stop);
        work();
    });
    (answers.into_inner(), tries.into_inner())
}

fn a_restart_of_the_proxy_leaves_no_moment_open(world: &mut World, family: Family) {
    populate(world);
    let a = (family.pod(11), 8080);
    let from_b = json!([{"from": [{"podSelector": select("b")}]}]);
    policy(world, "only-b", json!({"podSelector": select("a"), "ingress": from_b}));
    until_shut(Some("client"), a);
    until_open(Some("b"), a);
    let ((open, tries), (friend, asked)) = {
        let mut friend = (0, 0);
        let stranger = reached_during("client", a, Duration::from_millis(5), || {
            friend = reached_during("b", a, TIMEOUT, || {
                for _ in 0..3 {
                    world.stop_proxy();
                    world.start_proxy();
                }
            });
        });
        (stranger, friend)
    };
    assert_eq!(open, 0, "of {tries} tries");
    assert_eq!(friend, asked, "who may come is not kept out for a moment either");
    assert!(tries > 20 && asked > 20, "{tries} and {asked} tries");
    // A policy that came while nobody looked holds as soon as the proxy is ready.
    world.stop_proxy();
    policy(world, "only-b", json!({"podSelector": {}, "ingress": from_b_and_itself()}));
    world.start_proxy();
    assert!(is_shut(Some("client"), (family.pod(12), 8080)));
    no_policy(world, "only-b");
    until_open(Some("client"), a);
}

fn from_b_and_itself() -> Value {
    json!([{"from": [{"podSelector": select("b")}]}])
}

fn policies_hold_whatever_the_setting_for_bridges(world: &mut World, family: Family) {
    let path = |name: &str| format!("/proc/sys/net/bridge/{name}");
    if !std::path::Path::new(&path(SETTINGS[0])).exists() {
        println!("not run: this kernel has no br_netfilter, so that nothing can hold between pods of one bridge");
        return;
    }
    populate(world);
    let a = (family.pod(11), 8080);
    policy(world, "deny", json!({"podSelector": select("a"), "policyTypes": ["Ingress"]}));
    until_shut(Some("client"), a);
    SETTINGS.iter().for_each(|name| std::fs::write(path(name), "0").unwrap());
    assert!(is_shut(Some("client"), a), "the setting is not what decides");
    // Somebody takes the bridge's own setting away as well.
    let off = "link set oar0 type bridge nf_call_iptables 0 nf_call_ip6tables 0";
    run("ip", off);
    until_shut(Some("client"), a);
    assert!(http("/metrics").contains("oarlock_netproxy_policy_unseen_bridges 0"));
    let events = |world: &World, reason: &str| {
        let all = world.api.list("events");
        all.into_iter().filter(|event| event["reason"] == reason && event["involvedObject"]["name"] == "node-1").count()
    };
    let before = ["NetworkPolicyNotEnforced", "NetworkPolicyEnforced"].map(|reason| events(world, reason));
    // As on a kernel without br_netfilter.
    let none: Option<&str> = None;
    mount(Some("tmpfs"), "/proc/sys/net/bridge", Some("tmpfs"), MsFlags::empty(), none).unwrap();
    wait_for("the node's event", TIMEOUT, || {
        (events(world, "NetworkPolicyNotEnforced") == before[0] + 1).then_some(())
    });
    assert!(http("/metrics").contains("oarlock_netproxy_policy_unseen_bridges 1"));
    umount2("/proc/sys/net/bridge", MntFlags::MNT_DETACH).unwrap();
    wait_for("the node's other event", TIMEOUT, || {
        (events(world, "NetworkPolicyEnforced") == before[1] + 1).then_some(())
    });
    assert!(http("/metrics").contains("oarlock_netproxy_policy_unseen_bridges 0"));
    until_shut(Some("client"), a);
    SETTINGS.iter().for_each(|name| std::fs::write(path(name), "1").unwrap());
    no_policy(world, "deny");
    until_open(Some("client"), a);
}

fn sctp_is_shut_out_and_let_through_by_its_ports(world: &mut World, family: Family) {
    populate(world);
    let to = |port: u16| ("a", SocketAddr::new(family.pod(11), port));
    assert!(sctp_arrives("client", to(3868)), "nothing is in the way");
    policy(world, "deny", json!({"podSelector": select("a"), "policyTypes": ["Ingress"]}));
    wait_for("SCTP to be shut out", TIMEOUT, || is_sctp_shut("client", to(3868)).then_some(()));
    let allow = |ports: Value| {
        policy(
            world,
            "deny",
            json!({"podSelector": select("a"), "ingress": [{"from": [{"podSelector": select("client")}], "ports": ports}]}),
        );
    };
    allow(json!([{"protocol": "SCTP", "port": 3868}]));
    assert!(sctp_arrives("client", to(3868)), "the port that is named");
    assert!(is_sctp_shut("client", to(3869)) && is_sctp_shut("b", to(3868)), "no other, and nobody else");
    assert!(is_shut(Some("client"), (family.pod(11), 8080)), "no other protocol");
    allow(json!([{"protocol": "SCTP", "port": 3000, "endPort": 3100}, {"protocol": "TCP", "port": 3868}]));
    assert!(sctp_arrives("client", to(3100)), "a range");
    wait_for("the other port to be shut", TIMEOUT, || is_sctp_shut("client", to(3868)).then_some(()));
    no_policy(world, "deny");
    let egress = json!([{"ports": [{"protocol": "SCTP", "port": 3868}]}]);
    policy(world, "deny", json!({"podSelector": select("client"), "policyTypes": ["Egress"], "egress": egress}));
    wait_for("what the client sends to be shut", TIMEOUT, || is_sctp_shut("client", to(3869)).then_some(()));
    assert!(sctp_arrives("client", to(3868)));
    no_policy(world, "deny");
}

/// A pod on the network of some node, in the namespace of the others.
fn host_pod(world: &World, name: &str, node: &str, addresses: impl Fn(Family) -> IpAddr) {
    if world.api.get("pods", "default", name).is_some() {
        return;
    }
    let ips: Vec<Value> = world.families.iter().map(|family| json!({"ip": addresses(*family).to_string()})).collect();
    world.api.create(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "labels": {"app": name}},
        "spec": {"nodeName": node, "hostNetwork": true, "containers": [{"name": "c", "image": "i"}]},
        "status": {"phase": "Running", "podIP": ips[0]["ip"], "podIPs": ips},
    }));
}

fn pods_on_the_hosts_network_are_neither_peers_nor_isolated(world: &mut World, family: Family) {
    populate(world);
    let a = (family.pod(11), 8080);
    host_pod(world, "remote", "node-2", Family::outside);
    host_pod(world, "local", "node-1", Family::node);
    let from = json!([{"from": [{"podSelector": select("remote")}, {"podSelector": select("b")}]}]);
    policy(world, "friends", json!({"podSelector": select("a"), "ingress": from}));
    until_shut(Some("client"), a);
    until_open(Some("b"), a);
    assert!(is_shut(Some("outside"), a), "its address is that of everybody on its node");
    no_policy(world, "friends");
    deny_all(world);
    until_shut(Some("client"), a);
    assert!(http("/healthz").starts_with("HTTP/1.1 200"));
    let reached = |from: &'static str| {
        at(Some(from), || TcpStream::connect_timeout(&(family.node(), 10_256).into(), Duration::from_secs(3)).is_ok())
    };
    // The health port listens on IPv4 alone here.
    assert!(family == Family::V6 || (reached("outside") && reached("client")), "the node is not isolated");
    no_policy(world, "deny-all");
    ["remote", "local"]
        .into_iter()
        .for_each(|name| world.api.delete("pods", "default", name, json!({"gracePeriodSeconds": 0})));
}

fn the_address_of_a_pod_that_has_ended_is_its_successors(world: &mut World, family: Family) {
    populate(world);
    let (a, b) = ((family.pod(11), 8080), (family.pod(12), 8080));
    let from_b = json!([{"from": [{"podSelector": select("b")}]}]);
    policy(world, "from-b", json!({"podSelector": select("a"), "ingress": from_b}));
    policy(world, "b-alone", json!({"podSelector": select("b"), "policyTypes": ["Ingress"]}));
    until_open(Some("b"), a);
    until_shut(Some("client"), b);
    let mut successor = world.api.get("pods", "default", "b").unwrap();
    successor["metadata"] = json!({"name": "successor", "namespace": "default", "labels": {"app": "successor"}});
    for phase in ["Succeeded", "Failed"] {
        world.api.edit("pods", "default", "b", |pod| pod["status"]["phase"] = json!(phase));
        until_shut(Some("b"), a);
        // Nobody's address is cut off.
        until_shut(Some("client"), b);
        world.api.create(successor.clone());
        until_open(Some("client"), b);
        assert!(is_shut(Some("b"), a), "the successor has other labels");
        world.api.delete("pods", "default", "successor", json!({"gracePeriodSeconds": 0}));
        world.api.edit("pods", "default", "b", |pod| pod["status"]["phase"] = json!("Running"));
        until_open(Some("b"), a);
    }
    no_policy(world, "from-b");
    no_policy(world, "b-alone");
    until_open(Some("client"), b);
}

fn the_node_reaches_its_pods_and_pods_reach_themselves_under_default_deny(world: &mut World, family: Family) {
    populate(world);
    let a = (family.pod(11), 8080);
    let name = format!("mirror-{}", family.table());
    world.slice(&name, "TCP", &[family.pod(11)]);
    let service = (family.service(61), 80);
    world.service(&name, json!({"clusterIP": service.0.to_string(), "ports": netproxy_world::port("TCP", None)}));
    ask_until(Some("client"), service);
    deny_all(world);
    until_shut(Some("client"), a);
    assert_eq!(ask(None, a).expect("a probe of the kubelet").1, family.gateway());
    assert_eq!(ask(Some("a"), a).expect("a pod by its own address").0, "a");
    assert_eq!(ask(Some("a"), service).expect("a pod behind its own Service").0, "a");
    assert!(is_shut(Some("client"), service), "the Service opens it to nobody else");
    assert!(is_shut(Some("a"), (family.pod(12), 8080)) && is_shut(Some("a"), (family.outside(), 8080)));
    no_policy(world, "deny-all");
    until_open(Some("client"), service);
    world.api.delete("services", "default", &name, json!({}));
}

fn blocks_mean_the_clients_address_also_behind_node_ports_and_balancers(world: &mut World, family: Family) {
    populate(world);
    let (balancer, own, other): (IpAddr, _, _) = match family {
        Family::V4 => ("203.0.113.5".parse().unwrap(), "192.168.7.2/32", "192.168.7.128/25"),
        Family::V6 => ("2001:db8::5".parse().unwrap(), "fd07::2/128", "fd07::8000/113"),
    };
    for (number, local) in [(0, "Cluster"), (1, "Local")] {
        let name = format!("front-{}-{number}", family.table());
        let node_port = 30_140 + number + 2 * u16::from(family == Family::V6);
        world.slice(&name, "TCP", &[family.pod(11)]);
        let cluster_ip = family.service(62 + number);
        world.api.create(json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
            "spec": {"type": "LoadBalancer", "clusterIP": cluster_ip, "clusterIPs": [cluster_ip],
                     "externalTrafficPolicy": local, "ports": netproxy_world::port("TCP", Some(node_port))},
            "status": {"loadBalancer": {"ingress": [{"ip": balancer}]}},
        }));
        let ways = [(family.node(), node_port), (balancer, 80)];
        let seen = if local == "Local" { family.outside() } else { family.gateway() };
        for way in ways {
            assert_eq!(ask_until(Some("outside"), way), ("a".to_owned(), seen), "{local}: whom the pod sees");
        }
        let from = |block: &str| {
            let peer = json!([{"from": [{"ipBlock": {"cidr": block}}]}]);
            policy(world, "block", json!({"podSelector": select("a"), "ingress": peer}));
        };
        from(other);
        ways.into_iter().for_each(|way| until_shut(Some("outside"), way));
        from(own);
        // Also where the pod sees another: what is let through is decided by who sent it.
        ways.into_iter().for_each(|way| until_open(Some("outside"), way));
        assert!(is_shut(Some("client"), (family.pod(11), 8080)), "the block has nobody else in it");
        no_policy(world, "block");
        world.api.delete("services", "default", &name, json!({}));
    }
}
