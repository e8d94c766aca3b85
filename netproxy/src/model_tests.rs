//! Service traffic as a user sees it: Services and endpoints in, packets through the planned tables, case by case. Random
//! ones are in `trial_tests`.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use oarlock_nft::trace::{Outcome, Packet, trace};
use oarlock_nft::{Command, Element, Fake, Family, Kernel, Key, Table, Transaction};

use crate::conntrack;
use crate::element::{self, Map};
use crate::ledger::{Delta, Ledger};
use crate::plan::{self, Context};
use crate::rules::{self, Settings};
use crate::service::{Endpoint, Port, Protocol, Service, ServiceName, Shape, Slice, SlicePort};
use crate::sync::Proxier;

const NODE: [u8; 4] = [192, 168, 0, 10];
const POD: [u8; 4] = [10, 42, 0, 99];
const OUTSIDE: [u8; 4] = [203, 0, 113, 5];
const BALANCER: [u8; 4] = [198, 51, 100, 1];
const DNS: [u8; 4] = [10, 43, 0, 10];

fn settings() -> Settings {
    Settings {
        table: Table::new(Family::Ip, "oarlock-netproxy"),
        cluster_cidr: "10.42.0.0/16".parse().unwrap(),
        service_cidr: "10.43.0.0/16".parse().unwrap(),
        dns_address: Some(DNS.into()),
        balancer_pools: Vec::new(),
        node_port_addresses: None,
        masquerade_bridged: false,
    }
}

fn context() -> Context {
    Context { is_ipv4: true, dns_address: Some(DNS.into()), ..Context::default() }
}

fn service(number: u8) -> Service {
    Service {
        name: ServiceName::new("default", &format!("s{number}")),
        shape: Shape::Virtual(Box::new([[10, 43, 1, number].into()])),
        ports: Box::new([Port { name: "p".into(), protocol: Protocol::TCP, number: 80, node_port: None }]),
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

#[derive(Debug, Clone, Copy)]
enum State {
    Ready,
    Terminating,
    NotReady,
}

fn slice(of: &Service, endpoints: &[([u8; 4], bool, State)]) -> Slice {
    let endpoint = |(address, local, state): &([u8; 4], bool, State)| Endpoint {
        address: (*address).into(),
        ready: matches!(state, State::Ready),
        serving: !matches!(state, State::NotReady),
        terminating: matches!(state, State::Terminating),
        local: *local,
        node: None,
        hostname: None,
        hints: None,
    };
    Slice {
        service: of.name.clone(),
        name: "slice".into(),
        ports: of
            .ports
            .iter()
            .map(|port| SlicePort { name: port.name.clone(), protocol: port.protocol, number: 8080 })
            .collect(),
        endpoints: endpoints.iter().map(endpoint).collect(),
    }
}

fn proxier() -> Proxier<Fake> {
    Proxier::new(Fake::new(), settings(), || vec![NODE.into()])
}

fn apply(proxier: &mut Proxier<Fake>, service: &Service, slices: &[&Slice]) {
    proxier.stage(&service.name, &plan::service(service, slices, &context()));
    proxier.commit().unwrap();
}

fn send(fake: &mut Fake, source: [u8; 4], to: [u8; 4], port: u16, random: u32) -> Outcome {
    let packet = Packet {
        protocol: Protocol::TCP.0,
        source: source.into(),
        source_port: 40_000,
        destination: to.into(),
        destination_port: port,
        from_node: source == NODE,
    };
    trace(fake, &[NODE.into(), DNS.into(), [172, 20, 0, 1].into()], packet, |modulus| random % modulus)
}

fn delivered(destination: [u8; 4], port: u16, masqueraded: bool) -> Outcome {
    Outcome::Delivered { destination: destination.into(), port, masqueraded }
}

#[test]
fn a_cluster_address_balances_over_all_ready_endpoints() {
    let mut proxier = proxier();
    let web = service(1);
    let endpoints = [
        ([10, 42, 0, 2], true, State::Ready),
        ([10, 42, 1, 3], false, State::Ready),
        ([10, 42, 1, 4], false, State::NotReady),
    ];
    apply(&mut proxier, &web, &[&slice(&web, &endpoints)]);
    let fake = proxier.kernel_mut();
    assert_eq!(send(fake, POD, [10, 43, 1, 1], 80, 0), delivered([10, 42, 0, 2], 8080, false));
    assert_eq!(send(fake, POD, [10, 43, 1, 1], 80, 1), delivered([10, 42, 1, 3], 8080, false));
    assert_eq!(send(fake, POD, [10, 43, 1, 1], 80, 2), delivered([10, 42, 0, 2], 8080, false));
    assert_eq!(send(fake, NODE, [10, 43, 1, 1], 80, 0), delivered([10, 42, 0, 2], 8080, true));
    assert_eq!(send(fake, [10, 42, 0, 2], [10, 43, 1, 1], 80, 0), delivered([10, 42, 0, 2], 8080, true), "hairpin");
    assert_eq!(send(fake, POD, [10, 43, 1, 1], 81, 0), Outcome::Rejected, "no such port");
}

#[test]
fn without_endpoints_connections_are_refused_and_terminating_ones_are_the_last_resort() {
    let mut proxier = proxier();
    let mut web = service(1);
    web.ports[0].node_port = Some(30_080);
    apply(&mut proxier, &web, &[]);
    assert_eq!(send(proxier.kernel_mut(), POD, [10, 43, 1, 1], 80, 0), Outcome::Rejected);
    assert_eq!(send(proxier.kernel_mut(), NODE, [10, 43, 1, 1], 80, 0), Outcome::Rejected);
    assert_eq!(send(proxier.kernel_mut(), OUTSIDE, NODE, 30_080, 0), Outcome::Rejected);
    apply(&mut proxier, &web, &[&slice(&web, &[([10, 42, 0, 2], true, State::Terminating)])]);
    assert_eq!(send(proxier.kernel_mut(), POD, [10, 43, 1, 1], 80, 0), delivered([10, 42, 0, 2], 8080, false));
    let both = [([10, 42, 0, 2], true, State::Terminating), ([10, 42, 0, 3], true, State::Ready)];
    apply(&mut proxier, &web, &[&slice(&web, &both)]);
    assert_eq!(send(proxier.kernel_mut(), POD, [10, 43, 1, 1], 80, 1), delivered([10, 42, 0, 3], 8080, false));
}

#[test]
fn cluster_dns_is_left_to_this_node_until_the_service_has_endpoints() {
    let mut proxier = proxier();
    let mut dns = service(1);
    dns.shape = Shape::Virtual(Box::new([DNS.into()]));
    dns.ports[0].number = 53;
    apply(&mut proxier, &dns, &[]);
    assert_eq!(send(proxier.kernel_mut(), POD, DNS, 53, 0), delivered(DNS, 53, false));
    assert_eq!(send(proxier.kernel_mut(), NODE, DNS, 53, 0), delivered(DNS, 53, false));
    assert_eq!(send(proxier.kernel_mut(), OUTSIDE, DNS, 53, 0), Outcome::Dropped);
    apply(&mut proxier, &dns, &[&slice(&dns, &[([10, 42, 0, 2], true, State::Ready)])]);
    assert_eq!(send(proxier.kernel_mut(), POD, DNS, 53, 0), delivered([10, 42, 0, 2], 8080, false));
}

#[test]
fn session_affinity_keeps_a_client_until_its_endpoint_goes() {
    let mut proxier = proxier();
    let mut web = service(1);
    web.affinity_seconds = Some(60);
    let both = [([10, 42, 0, 2], true, State::Ready), ([10, 42, 0, 3], true, State::Ready)];
    apply(&mut proxier, &web, &[&slice(&web, &both)]);
    assert_eq!(send(proxier.kernel_mut(), POD, [10, 43, 1, 1], 80, 1), delivered([10, 42, 0, 3], 8080, false));
    assert_eq!(send(proxier.kernel_mut(), POD, [10, 43, 1, 1], 80, 0), delivered([10, 42, 0, 3], 8080, false));
    assert_eq!(send(proxier.kernel_mut(), OUTSIDE, [10, 43, 1, 1], 80, 0), delivered([10, 42, 0, 2], 8080, true));
    apply(&mut proxier, &web, &[&slice(&web, &both[..1])]);
    assert_eq!(proxier.release_clients().unwrap(), 1);
    assert_eq!(send(proxier.kernel_mut(), POD, [10, 43, 1, 1], 80, 0), delivered([10, 42, 0, 2], 8080, false));
}

#[test]
fn session_affinity_of_the_node_itself_is_not_that_of_clients_from_outside() {
    let mut proxier = proxier();
    let mut web = service(1);
    web.affinity_seconds = Some(60);
    web.external_local = true;
    web.ports[0].node_port = Some(30_080);
    let here = |state| ([10, 42, 0, 2], true, state);
    apply(&mut proxier, &web, &[&slice(&web, &[here(State::Ready)])]);
    for source in [NODE, OUTSIDE] {
        assert_eq!(
            send(proxier.kernel_mut(), source, NODE, 30_080, 0),
            delivered([10, 42, 0, 2], 8080, source == NODE)
        );
    }
    let both = [here(State::Terminating), ([10, 42, 1, 3], false, State::Ready)];
    apply(&mut proxier, &web, &[&slice(&web, &both)]);
    assert_eq!(proxier.release_clients().unwrap(), 1);
    assert_eq!(send(proxier.kernel_mut(), NODE, NODE, 30_080, 0), delivered([10, 42, 1, 3], 8080, true));
    assert_eq!(send(proxier.kernel_mut(), OUTSIDE, NODE, 30_080, 0), delivered([10, 42, 0, 2], 8080, false));
    assert_eq!(proxier.release_clients().unwrap(), 0);
}

#[test]
fn node_ports_are_served_only_on_the_addresses_that_are_chosen() {
    let other: [u8; 4] = [172, 20, 0, 1];
    let chosen = Settings { node_port_addresses: Some(vec!["192.168.0.0/24".parse().unwrap()]), ..settings() };
    let mut web = service(1);
    web.ports[0].node_port = Some(30_080);
    for (settings, served) in [(settings(), true), (chosen, false)] {
        let mut proxier = Proxier::new(Fake::new(), settings, Vec::new);
        apply(&mut proxier, &web, &[&slice(&web, &[([10, 42, 0, 2], true, State::Ready)])]);
        assert_eq!(send(proxier.kernel_mut(), OUTSIDE, NODE, 30_080, 0), delivered([10, 42, 0, 2], 8080, true));
        let to_other = send(proxier.kernel_mut(), OUTSIDE, other, 30_080, 0);
        assert_eq!(matches!(to_other, Outcome::Delivered { port: 8080, .. }), served);
    }
}

#[test]
fn endpoints_meant_for_this_zone_or_node_are_preferred_as_long_as_hints_are_whole() {
    use crate::service::Hints;
    let web = service(1);
    let mut whole = slice(&web, &[([10, 42, 0, 2], true, State::Ready), ([10, 42, 1, 3], false, State::Ready)]);
    let hint = |zone: &str, node: &str| {
        let list = |text: &str| if text.is_empty() { Vec::new() } else { vec![text.to_owned()] };
        Some(Box::new(Hints { zones: list(zone), nodes: list(node) }))
    };
    let here = Context { node_name: "n1".into(), zone: Some("a".into()), ..context() };
    let chosen = |slice: &Slice, context: &Context| {
        let planned = plan::service(&web, &[slice], context);
        planned.iter().filter(|entry| entry.key.map == Map::Endpoints).count()
    };
    whole.endpoints[0].hints = hint("b", "");
    whole.endpoints[1].hints = hint("a", "");
    assert_eq!(chosen(&whole, &here), 1, "one is meant for zone a");
    assert_eq!(chosen(&whole, &Context { zone: None, ..here.clone() }), 2, "a node without a zone takes all");
    assert_eq!(chosen(&whole, &Context { zone: Some("c".into()), ..here.clone() }), 2, "nothing is meant for zone c");
    whole.endpoints[0].hints = hint("b", "n1");
    assert_eq!(chosen(&whole, &here), 1, "only one has a node, so zones decide");
    whole.endpoints[1].hints = None;
    assert_eq!(chosen(&whole, &here), 2, "hints that are half there are none");
    whole.endpoints[0].hints = hint("", "n1");
    whole.endpoints[1].hints = hint("", "n2");
    assert_eq!(chosen(&whole, &here), 1, "one is meant for this node");
}

#[test]
fn external_addresses_are_served_only_where_that_is_allowed() {
    let mut web = service(1);
    web.external_ips = Box::new([BALANCER.into()]);
    let ready = slice(&web, &[([10, 42, 0, 2], true, State::Ready)]);
    for (allowed, served) in [(vec![], false), (vec!["198.51.100.0/24".parse().unwrap()], true)] {
        let mut proxier = proxier();
        let context = Context { external_allowed: allowed, ..context() };
        proxier.stage(&web.name, &plan::service(&web, &[&ready], &context));
        proxier.commit().unwrap();
        let outcome = send(proxier.kernel_mut(), OUTSIDE, BALANCER, 80, 0);
        assert_eq!(outcome == delivered([10, 42, 0, 2], 8080, true), served);
    }
}

#[test]
fn a_flush_by_somebody_else_is_undone() {
    let mut proxier = proxier();
    let web = service(1);
    apply(&mut proxier, &web, &[&slice(&web, &[([10, 42, 0, 2], true, State::Ready)])]);
    let now = Instant::now();
    fn flush(fake: &mut Fake, set: &str) {
        let mut transaction = Transaction::new(settings().table);
        transaction.push(Command::FlushSet(set.into()));
        fake.commit(&transaction).unwrap();
    }
    let flushes: [fn(&mut Fake); 4] = [
        Fake::flush_ruleset,
        Fake::flush_rules,
        |fake| flush(fake, Map::Endpoints.name()),
        |fake| flush(fake, rules::CLASSES[0]),
    ];
    for (round, flush) in flushes.into_iter().enumerate() {
        flush(proxier.kernel_mut());
        let later = now + Duration::from_secs(100 * (round as u64 + 1));
        assert!(proxier.audit(later).unwrap(), "round {round}");
        assert_eq!(send(proxier.kernel_mut(), POD, [10, 43, 1, 1], 80, 0), delivered([10, 42, 0, 2], 8080, false));
        assert!(!proxier.audit(later + Duration::from_secs(100)).unwrap(), "round {round}");
    }
}

#[test]
fn a_restart_adopts_the_table_and_changes_only_what_differs() {
    let mut first = proxier();
    let (web, gone) = (service(1), service(2));
    apply(&mut first, &web, &[&slice(&web, &[([10, 42, 0, 2], true, State::Ready)])]);
    apply(&mut first, &gone, &[&slice(&gone, &[([10, 42, 0, 3], true, State::Ready)])]);
    let mut kernel = first.kernel_mut().clone();
    // Something that only a table that was kept still has.
    let key = Key::new().address(POD.into()).address([10, 43, 1, 1].into()).protocol(6).port(80).bytes();
    let mut bound = Transaction::new(settings().table);
    let element = Element::data(key, rules::endpoint_bytes("10.42.0.2:8080".parse::<SocketAddr>().unwrap().into()));
    bound.push(Command::AddElements { set: rules::AFFINITY.into(), elements: vec![element], exclusive: true });
    kernel.commit(&bound).unwrap();
    let mut second = Proxier::new(kernel, settings(), Vec::new);
    apply(&mut second, &web, &[&slice(&web, &[([10, 42, 0, 4], true, State::Ready)])]);
    assert_eq!(send(second.kernel_mut(), POD, [10, 43, 1, 1], 80, 0), delivered([10, 42, 0, 4], 8080, false));
    assert_eq!(send(second.kernel_mut(), POD, [10, 43, 1, 2], 80, 0), Outcome::Rejected);
    assert_eq!(second.kernel_mut().elements(&settings().table, rules::AFFINITY).unwrap().unwrap().len(), 1);
}

#[test]
fn a_table_of_another_version_is_replaced_in_one_step() {
    let mut kernel = Fake::new();
    let mut foreign = Transaction::new(settings().table);
    foreign.push(Command::AddTable { comment: "oarlock netproxy of another version".into(), exclusive: true });
    kernel.commit(&foreign).unwrap();
    let mut proxier = Proxier::new(kernel, settings(), Vec::new);
    let web = service(1);
    apply(&mut proxier, &web, &[&slice(&web, &[([10, 42, 0, 2], true, State::Ready)])]);
    assert_eq!(send(proxier.kernel_mut(), POD, [10, 43, 1, 1], 80, 0), delivered([10, 42, 0, 2], 8080, false));
}

#[test]
fn udp_flows_to_endpoints_and_services_that_are_gone_are_stale() {
    use oarlock_netlink::conntrack::{Flow, Tuple};
    let mut ledger = Ledger::default();
    let mut web = service(1);
    web.ports[0] = Port { name: "p".into(), protocol: Protocol::UDP, number: 80, node_port: Some(30_080) };
    let slice = slice(&web, &[([10, 42, 0, 2], true, State::Ready)]);
    ledger.set(&web.name, &plan::service(&web, &[&slice], &context()), &mut Delta::default());
    let scope = conntrack::Scope {
        service_cidr: settings().service_cidr,
        cluster_cidr: settings().cluster_cidr,
        dns_address: Some(DNS.into()),
        node_ports: (30_000, 32_767),
        external: vec!["192.0.2.0/28".parse().unwrap()],
    };
    let key = element::ElementKey::by_address(Map::Services, [198, 51, 100, 9].into(), Protocol::UDP, 53);
    let retired = [(key, Instant::now())].into();
    let stale = |wanted: &str, actual: &str| {
        let client: SocketAddr = "10.42.0.99:1000".parse().unwrap();
        let tuple = |source, destination| Tuple { protocol: Protocol::UDP.0, source, destination };
        let flow =
            Flow { original: tuple(client, wanted.parse().unwrap()), reply: tuple(actual.parse().unwrap(), client) };
        conntrack::is_stale(&flow, &ledger, &scope, &retired, &[[192, 168, 7, 1].into()])
    };
    assert!(stale("192.0.2.1:53", "10.42.0.2:8080"), "an address of a pool that no Service has any more");
    assert!(stale("198.51.100.9:53", "10.42.0.2:8080"), "an address that a Service had");
    assert!(!stale("198.51.100.9:54", "10.42.0.2:8080"), "another's");
    assert!(!stale("198.51.100.9:53", "198.51.100.9:53"), "never translated");
    assert!(!stale("10.43.1.1:80", "10.42.0.2:8080"));
    assert!(stale("10.43.1.1:80", "10.42.0.3:8080"), "endpoint is gone");
    assert!(stale("10.43.1.1:80", "10.43.1.1:80"), "began before there were endpoints");
    assert!(stale("10.43.1.7:80", "10.42.0.2:8080"), "Service is gone");
    assert!(!stale("192.168.0.10:30080", "10.42.0.2:8080"));
    assert!(stale("192.168.0.10:30080", "10.42.0.9:8080"));
    assert!(stale("192.168.0.10:30081", "10.42.0.2:8080"), "node port is gone");
    assert!(!stale("10.43.0.10:53", "10.43.0.10:53"), "cluster DNS");
    assert!(!stale("8.8.8.8:53", "8.8.8.8:53"), "none of ours");
    assert!(!stale("8.8.8.8:30080", "8.8.8.8:30080"), "somebody else's port of that number");
    assert!(stale("192.168.7.1:30080", "192.168.7.1:30080"), "began before there was a node port");
}

#[test]
fn what_this_nodes_dns_began_keeps_nobody_from_the_one_that_took_over() {
    use oarlock_netlink::conntrack::{Flow, Tuple};
    let mut dns = service(1);
    dns.shape = Shape::Virtual(Box::new([DNS.into()]));
    dns.ports[0] = Port { name: "dns".into(), protocol: Protocol::UDP, number: 53, node_port: None };
    let scope = conntrack::Scope {
        service_cidr: settings().service_cidr,
        cluster_cidr: settings().cluster_cidr,
        dns_address: Some(DNS.into()),
        node_ports: (30_000, 32_767),
        external: Vec::new(),
    };
    let mut ledger = Ledger::default();
    let tuple = |source: &str, destination: &str| Tuple {
        protocol: Protocol::UDP.0,
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
    };
    let (server, client) = ("10.43.0.10:53", "10.42.0.99:1000");
    let flow = Flow { original: tuple(server, client), reply: tuple(client, server) };
    assert!(!conntrack::is_stale(&flow, &ledger, &scope, &[].into(), &[]), "this node answers");
    let slice = slice(&dns, &[([10, 42, 0, 2], true, State::Ready)]);
    ledger.set(&dns.name, &plan::service(&dns, &[&slice], &context()), &mut Delta::default());
    assert!(conntrack::is_stale(&flow, &ledger, &scope, &[].into(), &[]));
}

#[test]
fn the_fixed_rules_are_what_they_were() {
    let mut text = rules::foundation(&settings()).to_string();
    let balance = |scope, affinity| element::Dynamic::Balance(element::Balancer { scope, endpoints: 3, affinity });
    let chains = [
        balance(element::Scope::Cluster, false),
        balance(element::Scope::NodePort, true),
        balance(element::Scope::Local, false),
        element::Dynamic::Remember(60),
    ];
    for command in chains.iter().flat_map(|chain| rules::dynamic(&settings(), chain)) {
        text.push_str(&command.to_string());
    }
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/src/golden/rules.txt");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(golden, &text).unwrap();
    }
    assert_eq!(text, std::fs::read_to_string(golden).unwrap(), "run with UPDATE_GOLDEN=1 if this is meant");
}
