//! Random Services and endpoints: what the documentation says should happen, and what happens to real packets in the kernel.
//! The proxy's own tests hold the same model against a tracer of the rules that it writes.

#[macro_use]
mod netproxy_world;

use std::collections::HashSet;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use netproxy_world::{Family, World, at, endpoint_list, read_answer, serve};
use oarlock_netlink::{Connection, Protocol, Route};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};

in_each_mode! { packets_go_where_the_traffic_policies_say }

/// New cases are begun for so long, for each family.
const DURATION: Duration = Duration::from_secs(12);
/// A connection whose packets should be dropped is given up after this.
const DROPPED: Duration = Duration::from_millis(400);
/// A refusal that comes while the caller's own kernel is still sending is lost, and the next one comes a second later.
const PATIENCE: Duration = Duration::from_secs(3);
const SETTLED: Duration = Duration::from_secs(8);
const SERVICES: u16 = 3;

/// Where an endpoint is: on this node, or on another one, for which the neighbour outside stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Place {
    A,
    B,
    Elsewhere,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Ready,
    Terminating,
    NotReady,
}

#[derive(Debug, Clone)]
struct Case {
    endpoints: Vec<(Place, State)>,
    node_port: bool,
    internal_local: bool,
    external_local: bool,
    balanced: bool,
    affinity: bool,
    /// Who may use the balancer's address, besides everybody without any.
    sources: Vec<Source>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Pod,
    Node,
    Outside,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Frontend {
    Cluster,
    NodePort,
    Balancer,
}

fn case() -> impl Strategy<Value = Case> {
    let state = prop_oneof![3 => Just(State::Ready), 1 => Just(State::Terminating), 1 => Just(State::NotReady)];
    let place = prop_oneof![Just(Place::A), Just(Place::B), Just(Place::Elsewhere)];
    let sources = prop_oneof![
        4 => Just(vec![]),
        1 => Just(vec![Source::Outside]),
        1 => Just(vec![Source::Pod]),
        1 => Just(vec![Source::Pod, Source::Outside]),
    ];
    let endpoints = proptest::collection::vec((place, state), 0..4).prop_map(|mut all| {
        let mut seen = HashSet::new();
        all.retain(|(place, _)| seen.insert(*place));
        all
    });
    (endpoints, any::<[bool; 5]>(), sources).prop_map(|(endpoints, flags, sources)| {
        let [node_port, internal_local, external_local, balanced, affinity] = flags;
        Case { endpoints, node_port, internal_local, external_local, balanced, affinity, sources }
    })
}

/// What should happen: the endpoints that may answer and whether they see the node as client, or how it fails.
fn model(case: &Case, source: Source, frontend: Frontend) -> Result<(HashSet<Place>, bool), ErrorKind> {
    let usable = |only_local: bool| -> HashSet<Place> {
        let of = |wanted: State| -> HashSet<Place> {
            let matching = case.endpoints.iter().filter(|(_, state)| *state == wanted);
            matching.map(|(place, _)| *place).filter(|place| !only_local || *place != Place::Elsewhere).collect()
        };
        let ready = of(State::Ready);
        if ready.is_empty() { of(State::Terminating) } else { ready }
    };
    let is_guarded = frontend == Frontend::Balancer && !case.sources.is_empty();
    if is_guarded && !case.sources.contains(&source) {
        return Err(ErrorKind::TimedOut);
    }
    let (all, local) = (usable(false), usable(true));
    if all.is_empty() {
        return Err(ErrorKind::ConnectionRefused);
    }
    let from_pod = source == Source::Pod;
    let or_dropped = |endpoints: HashSet<Place>, masqueraded: bool| {
        if endpoints.is_empty() { Err(ErrorKind::TimedOut) } else { Ok((endpoints, masqueraded)) }
    };
    match frontend {
        Frontend::Cluster if case.internal_local => or_dropped(local, !from_pod),
        Frontend::Cluster => Ok((all, !from_pod)),
        _ if !case.external_local => Ok((all, true)),
        _ if source != Source::Outside => Ok((all, !from_pod)),
        _ => or_dropped(local, false),
    }
}

fn name(number: u16, family: Family) -> String {
    format!("random-{number}-{}", if family == Family::V4 { 4 } else { 6 })
}

fn balancer(family: Family, number: u16) -> IpAddr {
    if family == Family::V4 {
        [198, 51, 100, number as u8].into()
    } else {
        format!("fd99::{number:x}").parse().unwrap()
    }
}

fn node_port(family: Family, number: u16) -> u16 {
    30_500 + number + if family == Family::V4 { 0 } else { 10 }
}

fn address(family: Family, place: Place) -> IpAddr {
    match place {
        Place::A => family.pod(11),
        Place::B => family.pod(12),
        Place::Elsewhere => family.outside(),
    }
}

fn write(world: &World, family: Family, number: u16, case: &Case) {
    let name = name(number, family);
    let mut endpoints =
        endpoint_list(&case.endpoints.iter().map(|(place, _)| address(family, *place)).collect::<Vec<_>>());
    for (endpoint, (place, state)) in endpoints.as_array_mut().unwrap().iter_mut().zip(&case.endpoints) {
        endpoint["conditions"] = json!({
            "ready": *state == State::Ready, "serving": *state != State::NotReady, "terminating": *state == State::Terminating,
        });
        if *place == Place::Elsewhere {
            endpoint["nodeName"] = "elsewhere".into();
        }
    }
    let policy = |local: bool| if local { "Local" } else { "Cluster" };
    let (kind, port) = if case.balanced {
        ("LoadBalancer", Some(node_port(family, number)))
    } else if case.node_port {
        ("NodePort", Some(node_port(family, number)))
    } else {
        ("ClusterIP", None)
    };
    let range = |source: &Source| match source {
        Source::Pod => if family == Family::V4 { "10.42.0.0/16" } else { "fd2a::/48" }.to_owned(),
        Source::Node => family.node().to_string(),
        Source::Outside => format!("{}/{}", family.outside(), if family == Family::V4 { 32 } else { 128 }),
    };
    let ranges: Vec<String> = case.sources.iter().map(range).collect();
    let spec = json!({
        "type": kind, "clusterIP": family.service(60 + number), "clusterIPs": [family.service(60 + number)],
        "ports": [{"name": "p", "protocol": "TCP", "port": 80, "targetPort": 8080, "nodePort": port}],
        "internalTrafficPolicy": policy(case.internal_local), "externalTrafficPolicy": policy(case.external_local),
        "sessionAffinity": if case.affinity { "ClientIP" } else { "None" }, "loadBalancerSourceRanges": ranges,
    });
    let ingress: Value = if case.balanced { json!([{"ip": balancer(family, number)}]) } else { Value::Null };
    let status = json!({"loadBalancer": {"ingress": ingress}});
    if world.api.get("services", "default", &name).is_none() {
        world.slice(&name, "TCP", &[]);
        world.service(&name, spec.clone());
    }
    world.api.edit("endpointslices", "default", &format!("{name}-1"), |slice| {
        slice["addressType"] = if family == Family::V4 { "IPv4" } else { "IPv6" }.into();
        slice["endpoints"] = endpoints;
    });
    world.api.edit("services", "default", &name, |service| {
        service["spec"] = spec;
        service["status"] = status;
    });
}

/// Who answers and which client they see.
fn ask(source: Source, to: SocketAddr, patience: Duration) -> Result<(String, IpAddr), ErrorKind> {
    let place = match source {
        Source::Pod => Some("client"),
        Source::Node => None,
        Source::Outside => Some("outside"),
    };
    at(place, || {
        let mut stream = TcpStream::connect_timeout(&to, patience)?;
        read_answer(&mut stream)
    })
    .map_err(|error| error.kind())
}

/// Whether a Service behaves as the model says in every way that it can be used.
fn check(family: Family, number: u16, case: &Case) -> Result<(), String> {
    let mut frontends = vec![(Frontend::Cluster, family.service(60 + number), 80)];
    if case.node_port || case.balanced {
        frontends.push((Frontend::NodePort, family.node(), node_port(family, number)));
    }
    if case.balanced {
        frontends.push((Frontend::Balancer, balancer(family, number), 80));
    }
    for (frontend, to, port) in frontends {
        for source in [Source::Pod, Source::Node, Source::Outside] {
            // The node has no route to these addresses, which nobody but its neighbours would give it.
            if frontend == Frontend::Balancer && source == Source::Node {
                continue;
            }
            let told = |what: String| Err(format!("{source:?} to {frontend:?} of Service {number}: {what}"));
            let (endpoints, masqueraded) = match model(case, source, frontend) {
                Ok(expected) => expected,
                Err(expected) => {
                    let patience = if expected == ErrorKind::TimedOut { DROPPED } else { PATIENCE };
                    match ask(source, (to, port).into(), patience) {
                        Err(found) if expected == found => continue,
                        found => return told(format!("{found:?}, not {expected:?}")),
                    }
                }
            };
            let mut seen = HashSet::new();
            for _ in 0..60 {
                let (who, client) = match ask(source, (to, port).into(), PATIENCE) {
                    Ok(answer) => answer,
                    Err(error) => return told(format!("{error:?}, not one of {endpoints:?}")),
                };
                let place = match who.as_str() {
                    "a" => Place::A,
                    "b" => Place::B,
                    _ => Place::Elsewhere,
                };
                if !endpoints.contains(&place) {
                    return told(format!("{place:?} is none of {endpoints:?}"));
                }
                let own = match source {
                    Source::Pod => family.pod(13),
                    Source::Outside => family.outside(),
                    Source::Node => family.node(),
                };
                let node = if place == Place::Elsewhere { family.node() } else { family.gateway() };
                let expected = if masqueraded { node } else { own };
                if client != expected {
                    return told(format!("{place:?} sees {client}, not {expected}"));
                }
                seen.insert(place);
                if seen == endpoints {
                    break;
                }
            }
            if case.affinity && seen.len() != 1 {
                return told(format!("one client got {seen:?} with session affinity"));
            }
            if !case.affinity && seen != endpoints {
                return told(format!("only {seen:?} of {endpoints:?} were ever chosen"));
            }
        }
    }
    Ok(())
}

fn packets_go_where_the_traffic_policies_say(world: &mut World, family: Family) {
    serve("outside", family.outside());
    // The kernel refuses only so often each second, which is less often than this test asks.
    for limit in ["ipv4/icmp_ratelimit", "ipv6/icmp/ratelimit"] {
        std::fs::write(format!("/proc/sys/net/{limit}"), "0").unwrap();
    }
    // As on nearly every machine, there is a route to everywhere.
    let mut connection = Connection::open(Protocol::Route).unwrap();
    let link = connection.require_link("to-outside").unwrap().index;
    let anywhere = if family == Family::V4 { "0.0.0.0/0" } else { "::/0" }.parse().unwrap();
    connection.add_route(&Route::new(anywhere, Some(family.outside()), link)).unwrap();
    let begin = Instant::now();
    let count = std::cell::Cell::new(0);
    let config = Config { cases: 10_000, max_shrink_iters: 40, failure_persistence: None, ..Config::default() };
    let world = &*world;
    let outcome = TestRunner::new(config).run(&proptest::collection::vec(case(), usize::from(SERVICES)), |cases| {
        if begin.elapsed() > DURATION {
            return Ok(());
        }
        for (number, case) in cases.iter().enumerate() {
            write(world, family, number as u16, case);
        }
        for (number, case) in cases.iter().enumerate() {
            // The proxy takes its time to hear of a change; once all is as it should be, it stays so.
            let deadline = Instant::now() + SETTLED;
            let mut found = check(family, number as u16, case);
            while found.is_err() && Instant::now() < deadline {
                std::thread::park_timeout(Duration::from_millis(20));
                found = check(family, number as u16, case);
            }
            found = found.and_then(|()| check(family, number as u16, case));
            prop_assert!(found.is_ok(), "{:?}: {:?}", found, case);
        }
        count.set(count.get() + 1);
        Ok(())
    });
    let count = count.get();
    eprintln!("{count} sets of {SERVICES} Services of {family:?} in {:?}", begin.elapsed());
    if let Err(error) = outcome {
        panic!("{error}");
    }
    assert!(count > 0);
}
