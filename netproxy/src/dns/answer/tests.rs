//! What names mean, by name.

use super::*;
use std::collections::HashSet;

fn zone() -> Zone {
    Zone {
        domain: Name::from_ascii("cluster.local.").unwrap(),
        cluster_cidrs: vec!["10.42.0.0/16".parse().unwrap(), "fd42::/48".parse().unwrap()],
        service_cidrs: vec!["10.43.0.0/16".parse().unwrap(), "fd43::/112".parse().unwrap()],
        dns_addresses: vec!["10.43.0.10".parse().unwrap(), "fd43::a".parse().unwrap()],
    }
}

fn service(name: &str, shape: Shape) -> Service {
    Service {
        name: ServiceName::new("default", name),
        shape,
        ports: Box::new([crate::service::Port {
            name: "http".into(),
            protocol: Protocol::TCP,
            number: 80,
            node_port: None,
        }]),
        affinity_seconds: None,
        internal_local: false,
        external_local: false,
        ingress: Box::default(),
        external_ips: Box::default(),
        source_ranges: Box::default(),
        health_check_port: None,
        publish_not_ready: false,
        other_proxy: false,
        balancer_class: None,
    }
}

fn endpoint(address: &str, hostname: Option<&str>, ready: bool) -> Endpoint {
    Endpoint {
        address: address.parse().unwrap(),
        ready,
        serving: ready,
        terminating: false,
        local: true,
        node: None,
        hostname: hostname.map(Into::into),
        hints: None,
    }
}

fn cluster() -> Cluster {
    let mut cluster = Cluster::default();
    let addresses = Box::new(["10.43.0.5".parse().unwrap(), "fd43::5".parse().unwrap()]);
    let all = [
        service("web", Shape::Virtual(addresses)),
        service("db", Shape::Headless),
        service("empty", Shape::Headless),
        service("elsewhere", Shape::External("example.org".into())),
    ];
    for one in all {
        cluster.set_service(&one.name.clone(), Some(one));
    }
    let slice = Slice {
        service: ServiceName::new("default", "db"),
        name: "db-1".into(),
        ports: Box::new([crate::service::SlicePort { name: "http".into(), protocol: Protocol::TCP, number: 8080 }]),
        endpoints: Box::new([
            endpoint("10.42.0.2", Some("db-0"), true),
            endpoint("10.42.0.3", None, true),
            endpoint("10.42.0.4", Some("db-2"), false),
        ]),
    };
    cluster.set_slice(&("default".into(), "db-1".into()), Some(slice), &mut HashSet::new());
    cluster.set_listed();
    cluster
}

fn ask(name: &str, kind: RecordType) -> Answer {
    ask_of(&cluster(), name, kind)
}

fn ask_of(cluster: &Cluster, name: &str, kind: RecordType) -> Answer {
    let name = Name::from_ascii(name).unwrap();
    zone().answer(cluster, &Asked { name: &name, kind, now_seconds: 1, most: usize::MAX, seed: 1 })
}

fn records(name: &str, kind: RecordType) -> Records {
    match ask(name, kind) {
        Answer::Records(records) => records,
        other => panic!("{name} {kind}: {other:?}"),
    }
}

fn data(name: &str, kind: RecordType) -> Vec<String> {
    let mut data: Vec<String> = records(name, kind).answers.iter().map(|record| record.data.to_string()).collect();
    data.sort();
    data
}

#[test]
fn a_service_has_its_addresses_by_family() {
    assert_eq!(data("web.default.svc.cluster.local.", RecordType::A), ["10.43.0.5"]);
    assert_eq!(data("WEB.Default.svc.cluster.local.", RecordType::AAAA), ["fd43::5"]);
}

#[test]
fn a_headless_service_has_its_ready_endpoints() {
    assert_eq!(data("db.default.svc.cluster.local.", RecordType::A), ["10.42.0.2", "10.42.0.3"]);
    assert_eq!(data("db-0.db.default.svc.cluster.local.", RecordType::A), ["10.42.0.2"]);
    assert_eq!(data("10-42-0-3.db.default.svc.cluster.local.", RecordType::A), ["10.42.0.3"]);
    assert!(matches!(ask("db-2.db.default.svc.cluster.local.", RecordType::A), Answer::NoName(_)));
    assert!(matches!(ask("empty.default.svc.cluster.local.", RecordType::A), Answer::NoName(_)));
}

#[test]
fn ports_have_service_records() {
    assert_eq!(
        data("_http._tcp.web.default.svc.cluster.local.", RecordType::SRV),
        ["0 100 80 web.default.svc.cluster.local."]
    );
    assert_eq!(
        data("_http._tcp.db.default.svc.cluster.local.", RecordType::SRV),
        ["0 100 8080 10-42-0-3.db.default.svc.cluster.local.", "0 100 8080 db-0.db.default.svc.cluster.local."]
    );
    assert_eq!(records("_http._tcp.db.default.svc.cluster.local.", RecordType::SRV).additional.len(), 2);
    assert!(matches!(ask("_http._udp.web.default.svc.cluster.local.", RecordType::SRV), Answer::NoName(_)));
}

#[test]
fn a_name_without_the_type_is_told_from_a_name_that_does_not_exist() {
    for name in [
        "web.default.svc.cluster.local.",
        "default.svc.cluster.local.",
        "svc.cluster.local.",
        "_tcp.web.default.svc.cluster.local.",
    ] {
        assert!(matches!(ask(name, RecordType::MX), Answer::NoData(_)), "{name}");
    }
    for name in [
        "nope.default.svc.cluster.local.",
        "web.other.svc.cluster.local.",
        "other.svc.cluster.local.",
        "x.cluster.local.",
        "a.b.c.web.default.svc.cluster.local.",
    ] {
        assert!(matches!(ask(name, RecordType::A), Answer::NoName(_)), "{name}");
    }
    assert_eq!(ask("example.org.", RecordType::A), Answer::NotOurs);
}

#[test]
fn addresses_have_names() {
    assert_eq!(data("5.0.43.10.in-addr.arpa.", RecordType::PTR), ["web.default.svc.cluster.local."]);
    assert_eq!(data("2.0.42.10.in-addr.arpa.", RecordType::PTR), ["db-0.db.default.svc.cluster.local."]);
    let in_ipv6 = "5.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.3.4.d.f.ip6.arpa.";
    assert_eq!(data(in_ipv6, RecordType::PTR), ["web.default.svc.cluster.local."]);
    assert!(matches!(ask("9.0.43.10.in-addr.arpa.", RecordType::PTR), Answer::NoName(_)));
    assert_eq!(ask("1.1.168.192.in-addr.arpa.", RecordType::PTR), Answer::NotOurs);
}

#[test]
fn the_rest_of_the_specification() {
    assert_eq!(data("dns-version.cluster.local.", RecordType::TXT), ["1.1.0"]);
    assert_eq!(data("10-42-0-9.default.pod.cluster.local.", RecordType::A), ["10.42.0.9"]);
    assert_eq!(data("fd42--9.default.pod.cluster.local.", RecordType::AAAA), ["fd42::9"]);
    assert_eq!(data("ns.dns.cluster.local.", RecordType::AAAA), ["fd43::a"]);
    // Pods have names in every namespace, also where there is no Service.
    assert_eq!(data("10-42-0-9.lonely.pod.cluster.local.", RecordType::A), ["10.42.0.9"]);
    assert_eq!(data("192-168-1-1.lonely.pod.cluster.local.", RecordType::A), ["192.168.1.1"]);
    assert!(matches!(ask("fd42--9.lonely.pod.cluster.local.", RecordType::A), Answer::NoData(_)));
    assert!(matches!(ask("lonely.pod.cluster.local.", RecordType::A), Answer::NoData(_)));
    assert!(matches!(ask("web.default.pod.cluster.local.", RecordType::A), Answer::NoName(_)));
    assert!(
        matches!(ask("elsewhere.default.svc.cluster.local.", RecordType::A), Answer::Alias(_, target) if target.to_ascii() == "example.org.")
    );
    assert!(matches!(ask("cluster.local.", RecordType::SOA), Answer::Records(_)));
}

fn large(count: u16) -> Cluster {
    let mut cluster = cluster();
    for (family, address) in [("v4", "10.42"), ("v6", "fd42:")] {
        let of = |number: u16| match family {
            "v4" => format!("{address}.{}.{}", number >> 8, number & 255),
            _ => format!("{address}:{number:x}"),
        };
        let slice = Slice {
            service: ServiceName::new("default", "db"),
            name: format!("db-{family}").into(),
            ports: Box::new([crate::service::SlicePort { name: "http".into(), protocol: Protocol::TCP, number: 8080 }]),
            endpoints: (1..=count).map(|number| endpoint(&of(number), Some(&format!("db-{number}")), true)).collect(),
        };
        cluster.set_slice(&("default".into(), slice.name.clone()), Some(slice), &mut HashSet::new());
    }
    cluster.set_slice(&("default".into(), "db-1".into()), None, &mut HashSet::new());
    cluster
}

#[test]
fn a_target_has_its_addresses_of_both_families() {
    let cluster = large(2);
    let Answer::Records(found) = ask_of(&cluster, "_http._tcp.db.default.svc.cluster.local.", RecordType::SRV) else {
        panic!("no records");
    };
    let mut additional: Vec<String> =
        found.additional.iter().map(|record| format!("{} {}", record.name, record.data)).collect();
    additional.sort();
    let targets = "db.default.svc.cluster.local.";
    let wanted = ["1 10.42.0.1", "1 fd42::1", "2 10.42.0.2", "2 fd42::2"].map(|text| {
        let (number, address) = text.split_once(' ').unwrap();
        format!("db-{number}.{targets} {address}")
    });
    assert_eq!((found.answers.len(), additional), (2, wanted.to_vec()));
}

#[test]
fn nothing_is_denied_before_everything_was_listed() {
    let mut cluster = Cluster::default();
    let unknown = [
        ("web.default.svc.cluster.local.", RecordType::A),
        ("default.svc.cluster.local.", RecordType::A),
        ("_http._tcp.db.default.svc.cluster.local.", RecordType::SRV),
        ("5.0.43.10.in-addr.arpa.", RecordType::PTR),
        ("2.0.42.10.in-addr.arpa.", RecordType::PTR),
    ];
    for (name, kind) in unknown {
        assert_eq!(ask_of(&cluster, name, kind), Answer::Unknown, "{name}");
    }
    // Other names are asked of others, and what needs no list is answered.
    assert_eq!(ask_of(&cluster, "example.org.", RecordType::A), Answer::NotOurs);
    assert_eq!(ask_of(&cluster, "1.1.168.192.in-addr.arpa.", RecordType::PTR), Answer::NotOurs);
    for (name, kind) in [("ns.dns.cluster.local.", RecordType::A), ("10-42-0-9.x.pod.cluster.local.", RecordType::A)] {
        assert!(matches!(ask_of(&cluster, name, kind), Answer::Records(_)), "{name}");
    }
    // An address is an address, but endpoints may be some of many.
    let web = service("web", Shape::Virtual(Box::new(["10.43.0.5".parse().unwrap()])));
    for one in [web, service("db", Shape::Headless)] {
        cluster.set_service(&one.name.clone(), Some(one));
    }
    assert!(matches!(ask_of(&cluster, unknown[0].0, RecordType::A), Answer::Records(_)));
    assert!(matches!(ask_of(&cluster, unknown[0].0, RecordType::AAAA), Answer::NoData(_)));
    assert_eq!(ask_of(&cluster, "db.default.svc.cluster.local.", RecordType::A), Answer::Unknown);
    assert_eq!(ask_of(&cluster, "nope.default.svc.cluster.local.", RecordType::A), Answer::Unknown);
    cluster.set_listed();
    assert!(matches!(ask_of(&cluster, "nope.default.svc.cluster.local.", RecordType::A), Answer::NoName(_)));
}

#[test]
fn endpoints_outside_the_clusters_addresses_have_names_too() {
    let mut cluster = cluster();
    let slice = Slice {
        service: ServiceName::new("default", "db"),
        name: "db-2".into(),
        ports: Box::default(),
        endpoints: Box::new([endpoint("192.168.1.1", Some("db-7"), true), endpoint("2001:db8::1", None, true)]),
    };
    cluster.set_slice(&("default".into(), "db-2".into()), Some(slice), &mut HashSet::new());
    let pointer = |text: &str| {
        let name = Name::from(text.parse::<IpAddr>().unwrap()).to_ascii();
        match ask_of(&cluster, &name, RecordType::PTR) {
            Answer::Records(records) => Some(records.answers[0].data.to_string()),
            Answer::NotOurs => None,
            other => panic!("{text}: {other:?}"),
        }
    };
    assert_eq!(pointer("192.168.1.1").as_deref(), Some("db-7.db.default.svc.cluster.local."));
    assert_eq!(pointer("2001:db8::1").as_deref(), Some("2001-db8--1.db.default.svc.cluster.local."));
    assert_eq!(pointer("192.168.1.2"), None, "asked of others");
}

#[test]
fn as_many_records_are_made_as_there_is_room_for_and_any_of_all() {
    let cluster = large(300);
    let name = Name::from_ascii("db.default.svc.cluster.local.").unwrap();
    let mut seen = HashSet::new();
    let mut firsts = HashSet::new();
    for seed in 0..200 {
        let asked = Asked { name: &name, kind: RecordType::A, now_seconds: 1, most: 30, seed };
        let Answer::Records(found) = zone().answer(&cluster, &asked) else { panic!("no records") };
        let addresses: Vec<String> = found.answers.iter().map(|record| record.data.to_string()).collect();
        assert!(found.is_cut && addresses.len() == 30 && found.additional.is_empty());
        firsts.insert(addresses[0].clone());
        seen.extend(addresses);
    }
    assert!(seen.len() == 300 && firsts.len() > 50, "{} of 300, {} first", seen.len(), firsts.len());
    let asked = Asked { name: &name, kind: RecordType::SRV, now_seconds: 1, most: 30, seed: 1 };
    let Answer::Records(found) = zone().answer(&cluster, &asked) else { panic!("no records") };
    assert!(found.is_cut && found.answers.len() == 30 && found.additional.is_empty());
}
