//! Cluster DNS with real sockets: UDP and TCP, answers that are too large, EDNS, service records, what a start or a kill of the
//! proxy shows, and another DNS in its place.

#[macro_use]
mod netproxy_world;
mod dns_client;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};

use dns_client::{
    Resolver, addresses_of, by_tcp, by_udp, connection, framed, headless, kind_of, question, read_framed, taking,
    until_served,
};
use hickory_proto::op::{Message, OpCode, ResponseCode};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use netproxy_world::{Family, TIMEOUT, World, at, endpoint_list, port};
use oarlock_machinery::fake::Refused;
use oarlock_testkit::wait_for;
use serde_json::json;

in_each_mode! {
    large_answers_are_cut_by_udp_and_whole_by_tcp
    a_connection_takes_questions_as_they_come
    extensions_are_understood_and_other_versions_refused
    service_records_bring_the_addresses_along
    names_follow_their_endpoints
    endpoints_that_are_not_ready_have_names_where_the_service_says_so
    one_source_does_not_take_all_connections
    nothing_is_denied_before_the_cluster_is_known
    names_outlive_a_kill_of_the_proxy
    another_dns_takes_over_and_gives_back
}

fn sorted(mut addresses: Vec<IpAddr>) -> Vec<IpAddr> {
    addresses.sort();
    addresses
}

fn many(family: Family, count: u16) -> Vec<IpAddr> {
    (0..count).map(|number| family.pod(20 + number)).collect()
}

fn large_answers_are_cut_by_udp_and_whole_by_tcp(world: &mut World, family: Family) {
    let kind = kind_of(family);
    let (large, larger) = (many(family, 35), many(family, 150));
    let name = headless(world, family, "large", &large);
    let huge = headless(world, family, "larger", &larger);
    for place in [Some("client"), None] {
        // Without extensions 512 bytes are taken, and with less than that too.
        for asked in [question(&name, kind), taking(100, &name, kind)] {
            let (cut, length) = by_udp(place, family, &asked);
            assert!(cut.metadata.truncation && length <= 512, "{length} bytes");
            assert_eq!(cut.metadata.response_code, ResponseCode::NoError);
            let found = addresses_of(&cut.answers);
            assert!(
                length > 512 - 28 && found.iter().all(|address| large.contains(address)),
                "as much as there is room"
            );
        }
        let (whole, length) = by_udp(place, family, &taking(1232, &name, kind));
        assert!(!whole.metadata.truncation && (512..=1232).contains(&length), "{length} bytes");
        assert_eq!(sorted(addresses_of(&whole.answers)), large);
        let (cut, length) = by_udp(place, family, &taking(8192, &huge, kind));
        assert!(cut.metadata.truncation && length <= 1232, "what would be fragmented is cut: {length} bytes");
        assert!(cut.edns.is_some(), "there is room for what the asker has to know");
        for (name, all) in [(&name, &large), (&huge, &larger)] {
            let whole = by_tcp(place, family, &question(name, kind));
            assert!(!whole.metadata.truncation);
            assert_eq!(sorted(addresses_of(&whole.answers)), *all);
        }
    }
}

fn a_connection_takes_questions_as_they_come(world: &mut World, family: Family) {
    let name = headless(world, family, "tcp", &[family.pod(11)]);
    let asked = question(&name, kind_of(family));
    let unknown = question("nope.default.svc.cluster.local.", kind_of(family));
    let mut stream = connection(family);
    stream.set_nodelay(true).unwrap();
    // Two in one segment, then one in pieces, whose length comes in two.
    stream.write_all(&[framed(&asked), framed(&unknown)].concat()).unwrap();
    let first = read_framed(&mut stream);
    assert_eq!((first.metadata.id, addresses_of(&first.answers)), (asked.metadata.id, vec![family.pod(11)]));
    let second = read_framed(&mut stream);
    assert_eq!((second.metadata.id, second.metadata.response_code), (unknown.metadata.id, ResponseCode::NXDomain));
    let bytes = framed(&asked);
    for piece in [&bytes[..1], &bytes[1..9], &bytes[9..]] {
        stream.write_all(piece).unwrap();
    }
    assert_eq!(addresses_of(&read_framed(&mut stream).answers), [family.pod(11)]);
    // What is no question ends the connection, and only that one.
    let mut other = connection(family);
    other.write_all(&[0, 3, 1, 2, 3]).unwrap();
    assert_eq!(other.read(&mut [0; 16]).unwrap(), 0);
    stream.write_all(&framed(&asked)).unwrap();
    assert_eq!(addresses_of(&read_framed(&mut stream).answers), [family.pod(11)]);
}

fn extensions_are_understood_and_other_versions_refused(world: &mut World, family: Family) {
    let kind = kind_of(family);
    let name = headless(world, family, "edns", &[family.pod(11)]);
    assert!(by_udp(None, family, &question(&name, kind)).0.edns.is_none(), "who has none gets none");
    let mut asked = taking(4096, &name, kind);
    asked.edns.as_mut().unwrap().set_dnssec_ok(true);
    let answer = by_udp(Some("client"), family, &asked).0;
    let edns = answer.edns.as_ref().unwrap();
    assert_eq!((edns.version(), edns.max_payload(), edns.flags().dnssec_ok), (0, 1232, true));
    assert_eq!(addresses_of(&answer.answers), [family.pod(11)]);
    let mut newer = taking(4096, &name, kind);
    newer.edns.as_mut().unwrap().set_version(1);
    for answer in [by_udp(None, family, &newer).0, by_tcp(None, family, &newer)] {
        assert_eq!(u16::from(answer.metadata.response_code), 16, "BADVERS");
        assert!(answer.answers.is_empty());
        assert_eq!(answer.edns.unwrap().version(), 0, "the version that is understood");
    }
    let transfer = by_tcp(None, family, &question("cluster.local.", RecordType::AXFR));
    assert_eq!(transfer.metadata.response_code, ResponseCode::NotImp);
    let mut update = question(&name, kind);
    update.metadata.op_code = OpCode::Notify;
    assert_eq!(by_udp(None, family, &update).0.metadata.response_code, ResponseCode::NotImp);
}

/// Service records as `port target`, and the addresses of targets.
fn services(answer: &Message) -> (BTreeSet<String>, BTreeMap<String, Vec<IpAddr>>) {
    let record = |record: &Record| match &record.data {
        RData::SRV(srv) => Some(format!("{} {}", srv.port, srv.target)),
        _ => None,
    };
    let mut addresses: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
    for additional in &answer.additionals {
        let of = addresses.entry(additional.name.to_ascii()).or_default();
        of.extend(addresses_of(std::slice::from_ref(additional)));
    }
    (answer.answers.iter().filter_map(record).collect(), addresses)
}

fn service_records_bring_the_addresses_along(world: &mut World, family: Family) {
    let (a, b) = (family.pod(11), family.pod(12));
    let name = headless(world, family, "db", &[a, b]);
    world.api.edit("endpointslices", "default", &format!("db-{}-1", family.table()), |slice| {
        slice["endpoints"][0]["hostname"] = "db-0".into();
    });
    let dashes = b.to_string().replace(['.', ':'], "-");
    let wanted = (
        BTreeSet::from([format!("8080 db-0.{name}"), format!("8080 {dashes}.{name}")]),
        BTreeMap::from([(format!("db-0.{name}"), vec![a]), (format!("{dashes}.{name}"), vec![b])]),
    );
    let asked = taking(1232, &format!("_p._tcp.{name}"), RecordType::SRV);
    wait_for("the host name", TIMEOUT, || (services(&by_udp(None, family, &asked).0) == wanted).then_some(()));
    let answer = by_tcp(Some("client"), family, &asked);
    assert!(answer.metadata.authoritative && services(&answer) == wanted, "{answer:?}");
    for (target, addresses) in &wanted.1 {
        let found = by_udp(Some("client"), family, &question(target, kind_of(family))).0;
        assert_eq!(addresses_of(&found.answers), *addresses, "the target is a name");
    }
    // A Service with an address is one target at its own port.
    let own = format!("web-{}", family.table());
    world.slice(&own, "TCP", &[a, b]);
    world.service(&own, json!({"clusterIP": family.service(50).to_string(), "ports": port("TCP", None)}));
    let web = format!("{own}.default.svc.cluster.local.");
    let asked = question(&format!("_p._tcp.{web}"), RecordType::SRV);
    let wanted = (BTreeSet::from([format!("80 {web}")]), BTreeMap::from([(web.clone(), vec![family.service(50)])]));
    wait_for("the Service", TIMEOUT, || (services(&by_udp(None, family, &asked).0) == wanted).then_some(()));
    let missing = by_udp(None, family, &question(&format!("_q._tcp.{web}"), RecordType::SRV)).0;
    assert_eq!(missing.metadata.response_code, ResponseCode::NXDomain);
    // Addresses that do not fit are left out, and the answer is still whole.
    let all = many(family, 15);
    let large = headless(world, family, "many", &all);
    let (answer, length) = by_udp(None, family, &taking(1232, &format!("_p._tcp.{large}"), RecordType::SRV));
    let (found, addresses) = services(&answer);
    assert!(!answer.metadata.truncation && found.len() == 15 && addresses.is_empty(), "{length} bytes: {answer:?}");
    let whole = by_tcp(None, family, &question(&format!("_p._tcp.{large}"), RecordType::SRV));
    assert_eq!(services(&whole).1.len(), 15);
}

fn names_follow_their_endpoints(world: &mut World, family: Family) {
    let kind = kind_of(family);
    let name = headless(world, family, "moving", &[family.pod(11)]);
    let service = format!("moving-{}", family.table());
    let reverse = |last: u16| Name::from(family.pod(last)).to_ascii();
    for last in [12, 13, 11, 13] {
        world.set_endpoints(&service, &[family.pod(last)]);
        wait_for("the new endpoint", TIMEOUT, || {
            let answer = by_udp(Some("client"), family, &question(&name, kind)).0;
            (addresses_of(&answer.answers) == [family.pod(last)]).then_some(())
        });
        let dashes = family.pod(last).to_string().replace(['.', ':'], "-");
        let pointer = by_udp(None, family, &question(&reverse(last), RecordType::PTR)).0;
        assert_eq!(pointer.answers[0].data.to_string(), format!("{dashes}.{name}"), "its address has its name");
    }
    let gone = by_udp(None, family, &question(&reverse(11), RecordType::PTR)).0;
    assert_eq!(gone.metadata.response_code, ResponseCode::NXDomain, "nor has one that went away");
    world.set_endpoints(&service, &[]);
    wait_for("no endpoint", TIMEOUT, || {
        let answer = by_udp(Some("client"), family, &question(&name, kind)).0;
        (answer.metadata.response_code == ResponseCode::NXDomain).then_some(())
    });
    world.set_endpoints(&service, &[family.pod(11), family.pod(12)]);
    wait_for("two endpoints", TIMEOUT, || {
        let answer = by_udp(Some("client"), family, &question(&name, kind)).0;
        (sorted(addresses_of(&answer.answers)) == [family.pod(11), family.pod(12)]).then_some(())
    });
}

fn endpoints_that_are_not_ready_have_names_where_the_service_says_so(world: &mut World, family: Family) {
    let kind = kind_of(family);
    let (ready, starting) = (family.pod(11), family.pod(12));
    let name = headless(world, family, "starting", &[ready, starting]);
    let service = format!("starting-{}", family.table());
    world.api.edit("endpointslices", "default", &format!("{service}-1"), |slice| {
        slice["endpoints"][1]["conditions"]["ready"] = false.into();
    });
    let answers = |name: &str, kind| by_udp(Some("client"), family, &question(name, kind)).0;
    let dashes = starting.to_string().replace(['.', ':'], "-");
    let reverse = Name::from(starting).to_ascii();
    for publishes in [false, true, false] {
        world.api.edit("services", "default", &service, |service| {
            service["spec"]["publishNotReadyAddresses"] = publishes.into();
        });
        let wanted = if publishes { vec![ready, starting] } else { vec![ready] };
        wait_for("the addresses", TIMEOUT, || {
            (sorted(addresses_of(&answers(&name, kind).answers)) == wanted).then_some(())
        });
        let own = answers(&format!("{dashes}.{name}"), kind);
        assert_eq!(addresses_of(&own.answers), &wanted[1..], "its own name");
        assert_eq!(answers(&format!("_p._tcp.{name}"), RecordType::SRV).answers.len(), wanted.len(), "service records");
        assert_eq!(answers(&reverse, RecordType::PTR).answers.len(), wanted.len() - 1, "its address");
    }
}

fn one_source_does_not_take_all_connections(world: &mut World, family: Family) {
    let name = headless(world, family, "busy", &[family.pod(11)]);
    let asked = question(&name, kind_of(family));
    let held: Vec<TcpStream> = at(Some("client"), || (0..300).map(|_| connection(family)).collect());
    // Those that there is no room for are closed; the others are answered.
    let served = held.iter().filter(|stream| {
        let mut stream: &TcpStream = stream;
        let _ = stream.write_all(&framed(&asked));
        matches!(stream.read(&mut [0; 2]), Ok(2))
    });
    assert_eq!(served.count(), 32);
    for place in [Some("a"), None] {
        assert_eq!(addresses_of(&by_tcp(place, family, &asked).answers), [family.pod(11)], "others are served");
    }
    drop(held);
    wait_for("room again", TIMEOUT, || {
        at(Some("client"), || {
            let mut stream = connection(family);
            stream.write_all(&framed(&asked)).ok()?;
            stream.read_exact(&mut [0; 2]).ok()
        })
    });
}

/// Asks until there is an answer with this address; before it nothing but failures comes.
fn only_failures_until(family: Family, asked: &Message, address: IpAddr) {
    wait_for("an answer", TIMEOUT, || {
        let answer = by_udp(Some("client"), family, asked).0;
        if answer.metadata.response_code == ResponseCode::ServFail {
            return None;
        }
        assert_eq!(addresses_of(&answer.answers), [address], "{answer:?}");
        Some(())
    });
}

fn nothing_is_denied_before_the_cluster_is_known(world: &mut World, family: Family) {
    let name = headless(world, family, "known", &[family.pod(11)]);
    let asked = question(&name, kind_of(family));
    for away in ["services", "endpointslices"] {
        world.stop_proxy();
        world.api.refuse("GET", away, usize::MAX, Refused::new(503, "ServiceUnavailable", "starting"));
        let config = world.config();
        let mut ready = world.launch_proxy(config);
        until_served(family);
        let unknown = by_udp(Some("client"), family, &question("nope.default.svc.cluster.local.", RecordType::A)).0;
        let pointer = by_udp(None, family, &question(&Name::from(family.pod(11)).to_ascii(), RecordType::PTR)).0;
        let known = by_udp(Some("client"), family, &asked).0;
        for answer in [unknown, pointer, known] {
            assert_eq!(answer.metadata.response_code, ResponseCode::ServFail, "{away}: {answer:?}");
        }
        world.api.allow("GET", away);
        only_failures_until(family, &asked, family.pod(11));
        world.runtime.block_on(ready.wait_for(|ready| *ready)).unwrap();
        let unknown = by_udp(Some("client"), family, &question("nope.default.svc.cluster.local.", RecordType::A)).0;
        assert_eq!(unknown.metadata.response_code, ResponseCode::NXDomain, "now it is known");
    }
}

fn names_outlive_a_kill_of_the_proxy(world: &mut World, family: Family) {
    let name = headless(world, family, "kept", &[family.pod(11)]);
    let asked = question(&name, kind_of(family));
    let ask = asker(Some("client"), family);
    for _ in 0..3 {
        world.kill_proxy();
        let config = world.config();
        drop(world.launch_proxy(config));
        // Whatever moment it is, there is no answer or a right one.
        wait_for("the name", TIMEOUT, || {
            let answer = ask(&asked)?;
            let code = answer.metadata.response_code;
            assert!(matches!(code, ResponseCode::ServFail | ResponseCode::NoError), "{code}");
            (addresses_of(&answer.answers) == [family.pod(11)]).then_some(())
        });
        assert_eq!(addresses_of(&by_tcp(Some("client"), family, &asked).answers), [family.pod(11)]);
    }
}

/// One client of the DNS address with one socket, as programs have that ask again and again.
fn asker(place: Option<&str>, family: Family) -> impl Fn(&Message) -> Option<Message> {
    let socket = at(place, || {
        let socket = UdpSocket::bind((family.any(), 0)).unwrap();
        socket.connect((family.service(10), 53)).unwrap();
        socket
    });
    socket.set_read_timeout(Some(std::time::Duration::from_secs(2))).unwrap();
    move |asked| {
        socket.send(&asked.to_vec().unwrap()).ok()?;
        let mut buffer = [0; 1500];
        let length = socket.recv(&mut buffer).ok()?;
        Some(Message::from_vec(&buffer[..length]).unwrap()).filter(|answer| answer.metadata.id == asked.metadata.id)
    }
}

fn another_dns_takes_over_and_gives_back(world: &mut World, family: Family) {
    let name = headless(world, family, "taken", &[family.pod(11)]);
    let asked = question(&name, kind_of(family));
    let place = |last: u16| SocketAddr::new(family.pod(last), 53);
    let pods = [Resolver::start(Some("a"), place(11), &[family.pod(101)], 5)];
    let slice = format!("kube-dns-{}", family.table());
    let ports =
        json!([{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53, "protocol": "TCP"}]);
    world.api.create(json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": slice, "namespace": "kube-system", "labels": {"kubernetes.io/service-name": "kube-dns"}},
        "addressType": if family == Family::V4 { "IPv4" } else { "IPv6" }, "ports": ports, "endpoints": [],
    }));
    let (ours, theirs) = (family.pod(11), family.pod(101));
    let places = [Some("client"), Some("b"), None];
    let askers = places.map(|place| asker(place, family));
    for endpoints in [vec![], vec![family.pod(11)], vec![], vec![family.pod(11)], vec![]] {
        world.api.edit("endpointslices", "kube-system", &slice, |slice| {
            slice["endpoints"] = endpoint_list(&endpoints);
        });
        let wanted = if endpoints.is_empty() { ours } else { theirs };
        for (place, ask) in places.iter().zip(&askers) {
            wait_for(&format!("{endpoints:?} for {place:?}"), TIMEOUT, || {
                (addresses_of(&ask(&asked)?.answers) == [wanted]).then_some(())
            });
            let fresh = by_udp(*place, family, &asked).0;
            assert_eq!(addresses_of(&fresh.answers), [wanted], "{place:?}");
            let by_tcp = by_tcp(*place, family, &asked);
            assert_eq!(addresses_of(&by_tcp.answers)[0], wanted, "{place:?}");
        }
    }
    assert!(!pods[0].heard(&name).is_empty());
    // Nodes that have none of it may keep their own.
    let policy = |policy: &str| {
        world.api.edit("services", "kube-system", "kube-dns", |service| {
            service["spec"]["internalTrafficPolicy"] = policy.into();
        });
    };
    policy("Local");
    for (node, wanted) in [("node-1", theirs), ("node-2", ours), ("node-1", theirs)] {
        world.api.edit("endpointslices", "kube-system", &slice, |slice| {
            slice["endpoints"] = endpoint_list(&[family.pod(11)]);
            slice["endpoints"][0]["nodeName"] = node.into();
        });
        for (place, ask) in places.iter().zip(&askers) {
            wait_for(&format!("the DNS of {node} for {place:?}"), TIMEOUT, || {
                (addresses_of(&ask(&asked)?.answers) == [wanted]).then_some(())
            });
        }
    }
    policy("Cluster");
    world.api.delete("endpointslices", "kube-system", &slice, json!({}));
}
