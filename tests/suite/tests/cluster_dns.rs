//! Cluster DNS with real sockets: UDP and TCP, answers that are too large, EDNS, service records, stub domains, counts.

#[macro_use]
mod netproxy_world;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use netproxy_world::{Family, TIMEOUT, World, at, port};
use oarlock_testkit::wait_for;
use serde_json::json;

in_each_mode! {
    large_answers_are_cut_by_udp_and_whole_by_tcp
    a_connection_takes_questions_as_they_come
    extensions_are_understood_and_other_versions_refused
    service_records_bring_the_addresses_along
    domains_with_resolvers_of_their_own_are_asked_of_those
    what_became_of_questions_is_counted
    names_follow_their_endpoints
}

fn kind_of(family: Family) -> RecordType {
    if family == Family::V4 { RecordType::A } else { RecordType::AAAA }
}

fn question(name: &str, kind: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

/// As [`question`], from somebody who takes as many bytes by UDP.
fn taking(bytes: u16, name: &str, kind: RecordType) -> Message {
    let mut message = question(name, kind);
    let mut edns = Edns::new();
    edns.set_max_payload(bytes);
    message.set_edns(edns);
    message
}

/// The answer by UDP, and its length.
fn by_udp(place: Option<&str>, family: Family, question: &Message) -> (Message, usize) {
    let mut buffer = [0; 9000];
    let length = at(place, || {
        let socket = UdpSocket::bind((family.any(), 0)).unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        socket.connect((family.service(10), 53)).unwrap();
        socket.send(&question.to_vec().unwrap()).unwrap();
        socket.recv(&mut buffer).unwrap()
    });
    let answer = Message::from_vec(&buffer[..length]).unwrap();
    assert_eq!(
        (answer.metadata.id, answer.metadata.message_type, &answer.queries),
        (question.metadata.id, MessageType::Response, &question.queries)
    );
    (answer, length)
}

fn connection(family: Family) -> TcpStream {
    let stream = TcpStream::connect_timeout(&(family.service(10), 53).into(), TIMEOUT).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    stream
}

fn framed(message: &Message) -> Vec<u8> {
    let bytes = message.to_vec().unwrap();
    [&(bytes.len() as u16).to_be_bytes()[..], &bytes].concat()
}

fn read_framed(stream: &mut TcpStream) -> Message {
    let mut length = [0; 2];
    stream.read_exact(&mut length).unwrap();
    let mut bytes = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut bytes).unwrap();
    Message::from_vec(&bytes).unwrap()
}

fn by_tcp(place: Option<&str>, family: Family, question: &Message) -> Message {
    at(place, || {
        let mut stream = connection(family);
        stream.write_all(&framed(question)).unwrap();
        read_framed(&mut stream)
    })
}

fn addresses_of(records: &[Record]) -> Vec<IpAddr> {
    let address = |record: &Record| match &record.data {
        RData::A(A(address)) => Some(IpAddr::V4(*address)),
        RData::AAAA(AAAA(address)) => Some(IpAddr::V6(*address)),
        _ => None,
    };
    records.iter().filter_map(address).collect()
}

fn sorted(mut addresses: Vec<IpAddr>) -> Vec<IpAddr> {
    addresses.sort();
    addresses
}

/// A headless Service of this many endpoints in this family, and the name of both.
fn headless(world: &World, family: Family, name: &str, endpoints: &[IpAddr]) -> String {
    until_served(family);
    let name = format!("{name}-{}", family.table());
    world.slice(&name, "TCP", endpoints);
    world.service(&name, json!({"clusterIP": "None", "ports": port("TCP", None)}));
    let name = format!("{name}.default.svc.cluster.local.");
    wait_for("the name", TIMEOUT, || {
        let found = by_tcp(None, family, &question(&name, kind_of(family)));
        (found.answers.len() == endpoints.len()).then_some(())
    });
    name
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

/// A resolver of one address for every name by UDP, of three addresses by TCP. By UDP it says so when the name begins with
/// `large.`. While it is `broken` it answers that it failed.
fn resolver(place: SocketAddr, address: IpAddr, seconds: u32) -> Arc<AtomicBool> {
    let broken = Arc::new(AtomicBool::new(false));
    let (socket, listener) = (UdpSocket::bind(place).unwrap(), TcpListener::bind(place).unwrap());
    let data = match address {
        IpAddr::V4(address) => RData::A(A(address)),
        IpAddr::V6(address) => RData::AAAA(AAAA(address)),
    };
    let answer = move |question: &Message, by_tcp: bool, is_broken: bool| {
        let mut answer = Message::response(question.metadata.id, question.metadata.op_code);
        answer.add_queries(question.queries.iter().cloned());
        let name = question.queries[0].name().clone();
        if is_broken {
            answer.metadata.response_code = ResponseCode::ServFail;
        } else if !by_tcp && name.to_ascii().starts_with("large.") {
            answer.metadata.truncation = true;
        } else {
            answer.add_answer(Record::from_rdata(name.clone(), seconds, data.clone()));
            if by_tcp {
                answer.add_answer(Record::from_rdata(name, seconds, RData::A(A(Ipv4Addr::new(192, 0, 2, 99)))));
            }
        }
        answer
    };
    let by_tcp = answer.clone();
    let is_broken = broken.clone();
    std::thread::spawn(move || {
        let mut buffer = [0; 1500];
        while let Ok((length, asker)) = socket.recv_from(&mut buffer) {
            let answer =
                answer(&Message::from_vec(&buffer[..length]).unwrap(), false, is_broken.load(Ordering::SeqCst));
            let _ = socket.send_to(&answer.to_vec().unwrap(), asker);
        }
    });
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let question = read_framed(&mut stream);
            let _ = stream.write_all(&framed(&by_tcp(&question, true, false)));
        }
    });
    broken
}

/// Starts the proxy anew with stub domains, and with the resolver for all else.
fn with_stubs(world: &mut World, stubs: &[(&str, &[SocketAddr])], resolver: Option<IpAddr>) {
    world.stop_proxy();
    let mut config = world.config();
    config.stub_domains = stubs.iter().map(|(domain, servers)| ((*domain).to_owned(), servers.to_vec())).collect();
    if let Some(address) = resolver {
        std::fs::write(&config.upstream_resolv_conf, format!("nameserver {address}\n")).unwrap();
    }
    world.start_proxy_with(config);
    world.families.iter().for_each(|family| until_served(*family));
}

/// The proxy's DNS sockets come a moment after its rules.
fn until_served(family: Family) {
    let address = (family.service(10), 53).into();
    wait_for("the proxy's DNS", TIMEOUT, || TcpStream::connect_timeout(&address, TIMEOUT).ok());
}

fn domains_with_resolvers_of_their_own_are_asked_of_those(world: &mut World, family: Family) {
    let (kind, own) = (kind_of(family), |port: u16| SocketAddr::new(family.loopback(), port));
    resolver(own(5301), family.pod(101), 60);
    resolver(own(5302), family.pod(102), 60);
    resolver((family.node(), 53).into(), family.pod(103), 60);
    // Nobody is at the first port of `corp`.
    let stubs: [(&str, &[SocketAddr]); 2] =
        [("corp.example", &[own(5300), own(5301)]), ("lab.corp.example", &[own(5302)])];
    with_stubs(world, &stubs, Some(family.node()));
    for (name, last) in [
        ("www.corp.example.", 101),
        ("WWW.Corp.Example.", 101),
        ("corp.example.", 101),
        ("www.lab.corp.example.", 102),
        ("www.notcorp.example.", 103),
        ("example.", 103),
    ] {
        let answer = by_udp(Some("client"), family, &question(name, kind)).0;
        assert_eq!(addresses_of(&answer.answers), [family.pod(last)], "{name}");
        assert!(!answer.metadata.authoritative && answer.metadata.recursion_available, "{name}");
    }
    // An answer that a resolver cut is asked for again by TCP.
    let answer = by_udp(None, family, &question("large.corp.example.", kind)).0;
    assert_eq!(addresses_of(&answer.answers), [family.pod(101), Ipv4Addr::new(192, 0, 2, 99).into()]);
    // A Service of another name leads there.
    let alias = format!("alias-{}", family.table());
    world.service(&alias, json!({"type": "ExternalName", "externalName": "www.lab.corp.example"}));
    let asked = question(&format!("{alias}.default.svc.cluster.local."), kind);
    let answer = wait_for("the alias", TIMEOUT, || {
        Some(by_udp(Some("client"), family, &asked).0).filter(|answer| answer.answers.len() == 2)
    });
    assert_eq!(answer.answers[0].record_type(), RecordType::CNAME);
    assert_eq!(addresses_of(&answer.answers), [family.pod(102)]);
}

/// The DNS counters of the metrics, by their names without what all share.
fn counts() -> BTreeMap<String, u64> {
    let mut stream = TcpStream::connect_timeout(&(Ipv4Addr::LOCALHOST, 10_249).into(), TIMEOUT).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n").unwrap();
    let text = std::io::read_to_string(stream).unwrap();
    let count = |line: &str| {
        let (name, value) = line.strip_prefix("oarlock_dns_")?.split_once(' ')?;
        Some((name.to_owned(), value.parse().unwrap()))
    };
    text.lines().filter_map(count).collect()
}

fn what_became_of_questions_is_counted(world: &mut World, family: Family) {
    let kind = kind_of(family);
    let name = headless(world, family, "counted", &[family.pod(11)]);
    let own = |port: u16| SocketAddr::new(family.loopback(), port);
    let broken = resolver(own(5301), family.pod(101), 1);
    resolver(own(5302), family.pod(102), 600);
    let stubs: [(&str, &[SocketAddr]); 3] =
        [("short.example", &[own(5301)]), ("long.example", &[own(5302)]), ("none.example", &[own(5300)])];
    with_stubs(world, &stubs, None);
    wait_for("the name", TIMEOUT, || (by_udp(None, family, &question(&name, kind)).0.answers.len() == 1).then_some(()));
    // Each question and the counters that it moves.
    let steps: [(&str, &[&str]); 5] = [
        (&name, &["requests_total"]),
        ("www.long.example.", &["requests_total", "forwarded_total"]),
        ("www.long.example.", &["requests_total", "cache_hits_total"]),
        ("www.none.example.", &["requests_total", "forwarded_total", "forward_failures_total"]),
        ("www.short.example.", &["requests_total", "forwarded_total"]),
    ];
    for (name, moved) in steps {
        let mut wanted = counts();
        for counter in moved {
            *wanted.get_mut(*counter).unwrap_or_else(|| panic!("{counter} is there")) += 1;
        }
        by_udp(Some("client"), family, &question(name, kind));
        assert_eq!(counts(), wanted, "{name}");
    }
    // What was said is over after a second, and then better than nothing.
    broken.store(true, Ordering::SeqCst);
    let before = counts()["stale_answers_total"];
    wait_for("an answer from before", TIMEOUT, || {
        let answer = by_udp(None, family, &question("www.short.example.", kind)).0;
        assert_eq!(addresses_of(&answer.answers), [family.pod(101)]);
        (counts()["stale_answers_total"] == before + 1).then_some(())
    });
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
