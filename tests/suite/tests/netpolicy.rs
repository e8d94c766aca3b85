//! NetworkPolicies with real packets: pods on one bridge, a neighbour outside, the real proxy and a fake API.

#[macro_use]
mod netproxy_world;

use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use netproxy_world::policies::{no_policy, policy, populate, select, until_open, until_shut};
use netproxy_world::{Family, TIMEOUT, World, ask, at, netns, port, serve_as};
use oarlock_testkit::wait_for;
use serde_json::{Value, json};

in_each_mode! {
    a_policy_shuts_and_opens_pods_of_one_bridge
    labels_decide_as_they_change
    egress_to_a_service_goes_by_its_endpoints
    a_pod_that_is_not_known_yet_is_cut_off
    policies_come_back_after_an_outside_flush_and_go_with_the_last_one
    each_kind_of_peer_and_port_lets_through_what_it_names
}

fn a_policy_shuts_and_opens_pods_of_one_bridge(world: &mut World, family: Family) {
    populate(world);
    let (a, b) = ((family.pod(11), 8080), (family.pod(12), 8080));
    until_open(Some("client"), a);
    until_open(Some("outside"), a);
    policy(world, "deny", json!({"podSelector": select("a"), "policyTypes": ["Ingress"]}));
    until_shut(Some("client"), a);
    assert!(ask(Some("outside"), a).is_err(), "nor from outside");
    assert!(ask(None, a).is_ok(), "the node itself always reaches its pods");
    assert!(ask(Some("client"), b).is_ok(), "other pods stay open");
    assert!(ask(Some("a"), b).is_ok(), "what the pod sends is another direction");
    let from_client = json!([{"from": [{"podSelector": select("client")}], "ports": [{"port": "http"}]}]);
    policy(world, "allow", json!({"podSelector": {}, "ingress": from_client}));
    until_open(Some("client"), a);
    assert!(ask(Some("b"), a).is_err(), "only the client is let in");
    let block = if family == Family::V4 { "192.168.7.0/24" } else { "fd07::/64" };
    policy(
        world,
        "allow",
        json!({"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": block}}], "ports": [{"port": 8000, "endPort": 8100}]}]}),
    );
    until_open(Some("outside"), a);
    until_shut(Some("client"), a);
    no_policy(world, "allow");
    no_policy(world, "deny");
    until_open(Some("client"), a);
}

fn labels_decide_as_they_change(world: &mut World, family: Family) {
    populate(world);
    let a = (family.pod(11), 8080);
    let friends = json!([{"from": [{"podSelector": {"matchLabels": {"friend": "yes"}}}]}]);
    policy(world, "friends", json!({"podSelector": select("a"), "ingress": friends}));
    until_shut(Some("client"), a);
    world.api.edit("pods", "default", "client", |pod| pod["metadata"]["labels"]["friend"] = json!("yes"));
    until_open(Some("client"), a);
    world.api.edit("pods", "default", "client", |pod| pod["metadata"]["labels"]["friend"] = json!("no"));
    until_shut(Some("client"), a);
    no_policy(world, "friends");
}

fn egress_to_a_service_goes_by_its_endpoints(world: &mut World, family: Family) {
    populate(world);
    let name = format!("web-{}", family.table());
    world.slice(&name, "TCP", &[family.pod(11)]);
    let service = (family.service(50), 80);
    world.service(&name, json!({"clusterIP": service.0.to_string(), "ports": port("TCP", None)}));
    until_open(Some("client"), service);
    let to = |app: &str| {
        json!({
            "podSelector": select("client"), "policyTypes": ["Egress"],
            "egress": [{"to": [{"podSelector": select(app)}], "ports": [{"port": 8080}]}],
        })
    };
    policy(world, "egress", to("b"));
    until_shut(Some("client"), service);
    assert!(ask(Some("client"), (family.pod(12), 8080)).is_ok());
    policy(world, "egress", to("a"));
    until_open(Some("client"), service);
    assert!(ask(Some("client"), (family.pod(12), 8080)).is_err());
    no_policy(world, "egress");
}

fn a_pod_that_is_not_known_yet_is_cut_off(world: &mut World, family: Family) {
    populate(world);
    let (a, b) = ((family.pod(11), 8080), (family.pod(12), 8080));
    policy(world, "any", json!({"podSelector": select("nobody")}));
    let object = world.api.get("pods", "default", "b").unwrap();
    world.api.delete("pods", "default", "b", json!({"gracePeriodSeconds": 0}));
    until_shut(Some("client"), b);
    assert!(ask(Some("b"), a).is_err(), "nor does it reach anybody");
    assert!(ask(Some("client"), a).is_ok());
    let mut again = object;
    for field in ["uid", "resourceVersion", "creationTimestamp", "deletionTimestamp"] {
        again["metadata"].as_object_mut().unwrap().remove(field);
    }
    world.api.create(again);
    until_open(Some("client"), b);
    no_policy(world, "any");
}

fn policies_come_back_after_an_outside_flush_and_go_with_the_last_one(world: &mut World, family: Family) {
    populate(world);
    let a = (family.pod(11), 8080);
    let spec = json!({"podSelector": select("a"), "ingress": [{"from": [{"podSelector": select("b")}], "ports": [{"port": 8000, "endPort": 9000}]}]});
    policy(world, "some", spec);
    until_shut(Some("client"), a);
    let listed = Command::new("nft").args(["list", "table", family.table(), "oarlock-policy"]).output().unwrap();
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert!(listed.status.success() && text.contains("8000-9000") && text.contains("default/some"), "{text}");
    assert!(Command::new("nft").args(["flush", "ruleset"]).status().unwrap().success());
    until_shut(Some("client"), a);
    assert!(ask(Some("b"), a).is_ok());
    no_policy(world, "some");
    until_open(Some("client"), a);
    // That of the other family goes a moment later.
    wait_for("no table of policies", TIMEOUT, || {
        let tables = Command::new("nft").args(["list", "tables"]).output().unwrap();
        assert!(tables.status.success());
        (!String::from_utf8_lossy(&tables.stdout).contains("oarlock-policy")).then_some(())
    });
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Carrier {
    Tcp,
    Udp,
}

use Carrier::{Tcp, Udp};

/// What the table of cases asks for: at every place there is a server.
const PORTS: [(Carrier, u16); 6] = [(Tcp, 8080), (Tcp, 8081), (Tcp, 9000), (Udp, 8080), (Udp, 8081), (Udp, 9000)];
/// Who is asked or asks. `client` is in the policies' own namespace, `b` and `c` are in `red`, `d` is in `blue`; all have the
/// label `app: client` but `c`, whose is `app: other`. `c` calls its TCP port 9000 `http`; for the others that is 8080.
const PEERS: [&str; 5] = ["client", "b", "c", "d", "outside"];

/// One policy: about pod `a`, which the peers ask, when its direction is ingress, and else about `a` as it asks the peers.
struct Case {
    /// The rule's `from` or `to`.
    peers: Value,
    ports: Value,
    /// Whether a peer is reached, or reaches `a`, by this port.
    open: fn(&str, Carrier, u16) -> bool,
}

fn case(peers: Value, ports: Value, open: fn(&str, Carrier, u16) -> bool) -> Case {
    Case { peers, ports, open }
}

fn color(color: &str) -> Value {
    json!({"matchLabels": {"color": color}})
}

fn is_pod(peer: &str) -> bool {
    peer != "outside"
}

/// What holds in both directions.
fn cases(family: Family) -> Vec<Case> {
    let (any, pods, two, outside) = match family {
        Family::V4 => ("0.0.0.0/0", "10.42.0.0/24", "10.42.0.12/31", "192.168.7.2/32"),
        Family::V6 => ("::/0", "fd2a::/64", "fd2a::c/127", "fd07::2/128"),
    };
    let other = if family == Family::V4 { "::/0" } else { "0.0.0.0/0" };
    let block = |net: &str, except: &[&str]| json!({"ipBlock": {"cidr": net, "except": except}});
    let all = || json!([]);
    vec![
        // Namespaces, alone and with pods of them.
        case(json!([{"namespaceSelector": color("red")}]), all(), |peer, _, _| ["b", "c"].contains(&peer)),
        case(json!([{"namespaceSelector": color("red"), "podSelector": select("client")}]), all(), |peer, _, _| {
            peer == "b"
        }),
        case(json!([{"namespaceSelector": color("red")}, {"podSelector": select("client")}]), all(), |peer, _, _| {
            ["b", "c", "client"].contains(&peer)
        }),
        case(json!([{"namespaceSelector": {}}]), all(), |peer, _, _| is_pod(peer)),
        case(json!([{"namespaceSelector": {}, "podSelector": select("client")}]), all(), |peer, _, _| {
            ["client", "b", "d"].contains(&peer)
        }),
        case(
            json!([{"namespaceSelector": {"matchExpressions": [{"key": "color", "operator": "NotIn", "values": ["red"]}]}}]),
            all(),
            |peer, _, _| ["client", "d"].contains(&peer),
        ),
        case(
            json!([{"namespaceSelector": {"matchExpressions": [{"key": "color", "operator": "Exists"}]}, "podSelector":
                {"matchExpressions": [{"key": "app", "operator": "In", "values": ["other", "else"]}]}}]),
            all(),
            |peer, _, _| peer == "c",
        ),
        case(json!([{"podSelector": {}}]), all(), |peer, _, _| peer == "client"),
        case(json!([{"namespaceSelector": color("green")}]), all(), |_, _, _| false),
        // Networks, and parts of them that are not meant.
        case(json!([block(pods, &[two])]), all(), |peer, _, _| ["c", "d"].contains(&peer)),
        case(json!([block(any, &[outside])]), all(), |peer, _, _| is_pod(peer)),
        case(json!([block(any, &[pods])]), all(), |peer, _, _| peer == "outside"),
        case(json!([block(pods, &[two]), {"podSelector": select("client")}]), all(), |peer, _, _| {
            ["c", "d", "client"].contains(&peer)
        }),
        case(json!([block(outside, &[]), block(other, &[])]), all(), |peer, _, _| peer == "outside"),
        // Protocols and ports.
        case(all(), json!([{"protocol": "UDP"}]), |_, carrier, _| carrier == Udp),
        case(all(), json!([{"protocol": "UDP", "port": 8080}]), |_, carrier, port| (carrier, port) == (Udp, 8080)),
        case(all(), json!([{"port": 8081}]), |_, carrier, port| (carrier, port) == (Tcp, 8081)),
        case(all(), json!([{"protocol": "TCP", "port": 8000, "endPort": 8081}]), |_, carrier, port| {
            carrier == Tcp && port <= 8081
        }),
        case(all(), json!([{"protocol": "UDP", "port": 8081, "endPort": 9000}, {"port": 9000}]), |_, carrier, port| {
            (carrier == Udp && port >= 8081) || (carrier, port) == (Tcp, 9000)
        }),
        case(
            json!([{"namespaceSelector": color("red")}, block(outside, &[])]),
            json!([{"protocol": "UDP", "port": 8081}, {"protocol": "TCP", "port": 9000}]),
            |peer, carrier, port| {
                ["b", "c", "outside"].contains(&peer) && [(Udp, 8081), (Tcp, 9000)].contains(&(carrier, port))
            },
        ),
    ]
}

/// Ports by name are those of who is asked.
fn named_cases(direction: &str) -> Vec<Case> {
    let http = json!([{"port": "http"}]);
    let both = json!([{"protocol": "TCP", "port": "http"}, {"protocol": "UDP", "port": "names"}]);
    if direction == "ingress" {
        return vec![
            case(json!([]), http, |_, carrier, port| (carrier, port) == (Tcp, 8080)),
            case(json!([{"namespaceSelector": color("blue")}]), both, |peer, carrier, port| {
                peer == "d" && [(Tcp, 8080), (Udp, 8081)].contains(&(carrier, port))
            }),
            case(json!([]), json!([{"protocol": "UDP", "port": "http"}]), |_, _, _| false),
        ];
    }
    fn number(peer: &str) -> u16 {
        if peer == "c" { 9000 } else { 8080 }
    }
    vec![
        case(json!([]), http, |peer, carrier, port| is_pod(peer) && (carrier, port) == (Tcp, number(peer))),
        case(json!([{"namespaceSelector": color("red")}]), both, |peer, carrier, port| {
            ["b", "c"].contains(&peer) && [(Tcp, number(peer)), (Udp, 8081)].contains(&(carrier, port))
        }),
    ]
}

/// The places of the table, with their servers, and the API's objects; those of both families at once.
fn populate_table(world: &mut World, family: Family) {
    if !netns("c").exists() {
        for (name, last) in [("c", 14), ("d", 15)] {
            world.pod(name, last);
        }
        for (name, labels) in
            [("default", json!({})), ("red", json!({"color": "red"})), ("blue", json!({"color": "blue"}))]
        {
            let metadata = json!({"name": name, "labels": labels});
            world.api.create(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}));
        }
        for (name, last, namespace, app) in [
            ("a", 11, "default", "a"),
            ("client", 13, "default", "client"),
            ("b", 12, "red", "client"),
            ("c", 14, "red", "other"),
            ("d", 15, "blue", "client"),
        ] {
            let http = if name == "c" { 9000 } else { 8080 };
            let ips: Vec<Value> =
                world.families.iter().map(|family| json!({"ip": family.pod(last).to_string()})).collect();
            world.api.create(json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": name, "namespace": namespace, "labels": {"app": app}},
                "spec": {"nodeName": "node-1", "containers": [{"name": "c", "image": "i", "ports": [
                    {"name": "http", "containerPort": http}, {"name": "names", "containerPort": 8081, "protocol": "UDP"},
                ]}]},
                "status": {"phase": "Running", "podIP": ips[0]["ip"], "podIPs": ips},
            }));
        }
    }
    for name in ["a", "b", "c", "client", "d", "outside"] {
        let ports: &[u16] = if name == "outside" { &[8080, 8081, 9000] } else { &[8081, 9000] };
        for port in ports {
            serve_as(Some(name), name, (address_of(family, name), *port).into());
        }
    }
}

fn address_of(family: Family, name: &str) -> IpAddr {
    match ["a", "b", "client", "c", "d"].iter().position(|pod| *pod == name) {
        Some(position) => family.pod(11 + position as u16),
        None => family.outside(),
    }
}

/// Whether there is an answer before patience ends. Each question by UDP is from a port of its own: one from a port that had
/// an answer before would be part of that flow.
fn is_answered(place: &str, carrier: Carrier, to: SocketAddr, patience: Duration) -> bool {
    static NEXT_PORT: AtomicU16 = AtomicU16::new(20_000);
    at(Some(place), || match carrier {
        Tcp => TcpStream::connect_timeout(&to, patience).is_ok(),
        Udp => {
            let family = if to.is_ipv4() { Family::V4 } else { Family::V6 };
            let socket = UdpSocket::bind((family.any(), NEXT_PORT.fetch_add(1, Ordering::SeqCst))).unwrap();
            socket.connect(to).unwrap();
            let deadline = Instant::now() + patience;
            loop {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return false;
                }
                socket.set_read_timeout(Some(left.min(Duration::from_secs(1)))).unwrap();
                if socket.send(b"?").is_ok() && socket.recv(&mut [0; 64]).is_ok() {
                    return true;
                }
            }
        }
    })
}

/// Waits until the rules have this policy and no other of the table: those of one family change at once.
fn until_written(family: Family, name: &str) {
    wait_for(&format!("the rules of {name}"), TIMEOUT, || {
        let listed = Command::new("nft").args(["list", "table", family.table(), "oarlock-policy"]).output().unwrap();
        let text = String::from_utf8_lossy(&listed.stdout).into_owned();
        let found: Vec<&str> = text.match_indices("default/case-").map(|(at, _)| &text[at + 8..]).collect();
        (!found.is_empty() && found.iter().all(|rest| rest.starts_with(name))).then_some(())
    });
}

fn each_kind_of_peer_and_port_lets_through_what_it_names(world: &mut World, family: Family) {
    // Long for what has to be answered. What must not be is not answered later either.
    const SHORT: Duration = Duration::from_millis(100);
    populate_table(world, family);
    for (direction, kind, peers) in [("ingress", "Ingress", "from"), ("egress", "Egress", "to")] {
        for (number, case) in cases(family).into_iter().chain(named_cases(direction)).enumerate() {
            let name = format!("case-{}-{direction}-{number:02}", family.table());
            let rule = json!({peers: case.peers, "ports": case.ports});
            let spec = json!({"podSelector": select("a"), "policyTypes": [kind], direction: [rule]});
            policy(world, &name, spec.clone());
            until_written(family, &name);
            let wrong: Vec<String> = std::thread::scope(|scope| {
                let ask = |peer: &'static str, (carrier, port): (Carrier, u16)| {
                    let (from, to) = if direction == "ingress" { (peer, "a") } else { ("a", peer) };
                    let wanted = (case.open)(peer, carrier, port);
                    let patience = if wanted { TIMEOUT } else { SHORT };
                    let to_address = SocketAddr::new(address_of(family, to), port);
                    let probe = move || {
                        let is_open = is_answered(from, carrier, to_address, patience);
                        (is_open != wanted).then(|| format!("{from} to {to} {carrier:?} {port}: open is {is_open}"))
                    };
                    scope.spawn(probe)
                };
                let all = PEERS.iter().flat_map(|peer| PORTS.map(|port| ask(peer, port))).collect::<Vec<_>>();
                all.into_iter().filter_map(|probe| probe.join().unwrap()).collect()
            });
            assert!(wrong.is_empty(), "{spec}: {wrong:#?}");
            no_policy(world, &name);
        }
    }
    // A namespace's labels decide as they change.
    let a = (family.pod(11), 8080);
    policy(
        world,
        "red",
        json!({"podSelector": select("a"), "ingress": [{"from": [{"namespaceSelector": color("red")}]}]}),
    );
    until_open(Some("b"), a);
    wait_for("d to be shut out", TIMEOUT, || (!is_answered("d", Tcp, a.into(), SHORT)).then_some(()));
    let paint = |color: &str| {
        world.api.edit("namespaces", "", "blue", |namespace| namespace["metadata"]["labels"]["color"] = json!(color));
    };
    paint("red");
    until_open(Some("d"), a);
    paint("blue");
    wait_for("d to be shut out", TIMEOUT, || (!is_answered("d", Tcp, a.into(), SHORT)).then_some(()));
    no_policy(world, "red");
    until_open(Some("d"), a);
}
