//! Service traffic as a user sees it: Services and endpoints in, packets through the planned tables, against a plain model
//! of what the traffic policies mean. And changes one by one, against the same state written at once.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use oarlock_nft::trace::{Outcome, Packet, trace};
use oarlock_nft::{Command, Element, Fake, Family, Kernel, Key, Table, Transaction};
use proptest::prelude::*;

use crate::conntrack;
use crate::ledger::{Delta, Ledger};
use crate::plan::{self, Context, Map};
use crate::rules::{self, Settings};
use crate::service::{Endpoint, Port, Protocol, Service, ServiceName, Shape, Slice};
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
        masquerade_bridged: false,
    }
}

fn context() -> Context {
    Context { is_ipv4: true, dns_address: Some(DNS.into()) }
}

fn service(number: u8) -> Service {
    Service {
        name: ServiceName::new("default", &format!("s{number}")),
        shape: Shape::Virtual(vec![[10, 43, 1, number].into()]),
        ports: vec![Port { name: "p".into(), protocol: Protocol::TCP, number: 80, node_port: None }],
        affinity_seconds: None,
        internal_local: false,
        external_local: false,
        ingress: Vec::new(),
        publish_not_ready: false,
        other_proxy: false,
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
        hostname: None,
    };
    Slice {
        service: of.name.clone(),
        name: "slice".into(),
        ports: of.ports.iter().map(|port| ((port.name.clone(), port.protocol), 8080)).collect(),
        endpoints: endpoints.iter().map(endpoint).collect(),
    }
}

fn proxier() -> Proxier<Fake> {
    Proxier::new(Fake::new(), settings())
}

fn apply(proxier: &mut Proxier<Fake>, service: &Service, slices: &[&Slice]) {
    proxier.stage(&service.name, plan::service(service, slices, &context()));
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
    trace(fake, &[NODE.into(), DNS.into()], packet, |modulus| random % modulus)
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
    dns.shape = Shape::Virtual(vec![DNS.into()]);
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
fn a_flush_by_somebody_else_is_undone() {
    let mut proxier = proxier();
    let web = service(1);
    apply(&mut proxier, &web, &[&slice(&web, &[([10, 42, 0, 2], true, State::Ready)])]);
    let now = Instant::now();
    let flushes: [fn(&mut Fake); 3] = [Fake::flush_ruleset, Fake::flush_rules, |fake| {
        let mut transaction = Transaction::new(settings().table);
        transaction.push(Command::FlushSet(Map::Endpoints.name().into()));
        fake.commit(&transaction).unwrap();
    }];
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
    let element = Element::data(key, rules::endpoint_bytes("10.42.0.2:8080".parse().unwrap()));
    bound.push(Command::AddElements { set: rules::AFFINITY.into(), elements: vec![element], exclusive: true });
    kernel.commit(&bound).unwrap();
    let mut second = Proxier::new(kernel, settings());
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
    let mut proxier = Proxier::new(kernel, settings());
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
    ledger.set(&web.name, plan::service(&web, &[&slice], &context()), &mut Delta::default());
    let scope = conntrack::Scope {
        service_cidr: settings().service_cidr,
        cluster_cidr: settings().cluster_cidr,
        dns_address: Some(DNS.into()),
        node_ports: (30_000, 32_767),
    };
    let stale = |wanted: &str, actual: &str| {
        let client: SocketAddr = "10.42.0.99:1000".parse().unwrap();
        let tuple = |source, destination| Tuple { protocol: Protocol::UDP.0, source, destination };
        let flow =
            Flow { original: tuple(client, wanted.parse().unwrap()), reply: tuple(actual.parse().unwrap(), client) };
        conntrack::is_stale(&flow, &ledger, &scope)
    };
    assert!(!stale("10.43.1.1:80", "10.42.0.2:8080"));
    assert!(stale("10.43.1.1:80", "10.42.0.3:8080"), "endpoint is gone");
    assert!(stale("10.43.1.1:80", "10.43.1.1:80"), "began before there were endpoints");
    assert!(stale("10.43.1.7:80", "10.42.0.2:8080"), "Service is gone");
    assert!(!stale("192.168.0.10:30080", "10.42.0.2:8080"));
    assert!(stale("192.168.0.10:30080", "10.42.0.9:8080"));
    assert!(stale("192.168.0.10:30081", "10.42.0.2:8080"), "node port is gone");
    assert!(!stale("10.43.0.10:53", "10.43.0.10:53"), "cluster DNS");
    assert!(!stale("8.8.8.8:53", "8.8.8.8:53"), "none of ours");
}

#[test]
fn the_fixed_rules_are_what_they_were() {
    let mut text = rules::foundation(&settings()).to_string();
    let balance = |scope, affinity| plan::Dynamic::Balance(plan::Balancer { scope, endpoints: 3, affinity });
    let chains = [
        balance(plan::Scope::Cluster, false),
        balance(plan::Scope::NodePort, true),
        balance(plan::Scope::Local, false),
        plan::Dynamic::Remember(60),
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

/// A Service of the property test with its endpoints.
#[derive(Debug, Clone)]
struct Case {
    service: Service,
    endpoints: Vec<([u8; 4], bool, State)>,
}

fn case(number: u8) -> impl Strategy<Value = Case> {
    let state = prop_oneof![3 => Just(State::Ready), 1 => Just(State::Terminating), 1 => Just(State::NotReady)];
    let endpoint = (0..6u8, any::<bool>(), state)
        .prop_map(|(last, local, state)| ([10, 42, u8::from(!local), last + 2], local, state));
    (proptest::collection::vec(endpoint, 0..5), any::<[bool; 4]>()).prop_map(
        move |(endpoints, [node_port, internal, external, ingress])| {
            let mut service = service(number);
            service.ports[0].node_port = node_port.then_some(30_000 + u16::from(number));
            service.internal_local = internal;
            service.external_local = external;
            if ingress {
                service.ingress = vec![[198, 51, 100, number].into()];
            }
            Case { service, endpoints }
        },
    )
}

/// What the documentation says should happen: the set of endpoints, and whether the source becomes the node's.
fn model(case: &Case, source: [u8; 4], to: Target) -> Result<(HashSet<[u8; 4]>, bool), Outcome> {
    let usable = |only_local: bool| -> HashSet<[u8; 4]> {
        let of = |wanted: fn(&State) -> bool| -> HashSet<[u8; 4]> {
            case.endpoints
                .iter()
                .filter(|(_, local, state)| (*local || !only_local) && wanted(state))
                .map(|(a, ..)| *a)
                .collect()
        };
        let ready = of(|state| matches!(state, State::Ready));
        if ready.is_empty() { of(|state| matches!(state, State::Terminating)) } else { ready }
    };
    let all = usable(false);
    if all.is_empty() {
        return Err(Outcome::Rejected);
    }
    let from_pod = source == POD;
    match to {
        Target::Cluster if case.service.internal_local => {
            let local = usable(true);
            if local.is_empty() { Err(Outcome::Dropped) } else { Ok((local, !from_pod)) }
        }
        Target::Cluster => Ok((all, !from_pod)),
        Target::External if !case.service.external_local => Ok((all, true)),
        Target::External if from_pod || source == NODE => Ok((all, !from_pod)),
        Target::External => {
            let local = usable(true);
            if local.is_empty() { Err(Outcome::Dropped) } else { Ok((local, false)) }
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Target {
    Cluster,
    External,
}

fn check_traffic(fake: &mut Fake, case: &Case) {
    let number = match case.service.virtual_addresses() {
        [IpAddr::V4(address)] => address.octets()[3],
        _ => return,
    };
    let mut frontends = vec![([10, 43, 1, number], 80, Target::Cluster)];
    frontends.extend(case.service.ports[0].node_port.map(|port| (NODE, port, Target::External)));
    let [a, b, c, _] = BALANCER;
    frontends.extend(case.service.ingress.first().map(|_| ([a, b, c, number], 80, Target::External)));
    for (address, port, to) in frontends {
        for source in [POD, NODE, OUTSIDE] {
            let expected = model(case, source, to);
            let mut seen = HashSet::new();
            for random in 0..12 {
                match (send(fake, source, address, port, random), &expected) {
                    (
                        Outcome::Delivered { destination: IpAddr::V4(destination), port: 8080, masqueraded },
                        Ok((_, wanted)),
                    ) => {
                        assert_eq!(masqueraded, *wanted, "source of {source:?} to {address:?}:{port} in {case:?}");
                        seen.insert(destination.octets());
                    }
                    (outcome, Err(wanted)) => {
                        assert_eq!(outcome, *wanted, "{source:?} to {address:?}:{port} in {case:?}")
                    }
                    (outcome, _) => panic!("{source:?} to {address:?}:{port}: {outcome:?} in {case:?}"),
                }
            }
            if let Ok((endpoints, _)) = expected {
                assert_eq!(seen, endpoints, "{source:?} to {address:?}:{port} in {case:?}");
            }
        }
    }
}

fn state_of(fake: &mut Fake) -> BTreeMap<&'static str, BTreeMap<String, String>> {
    let mut all = BTreeMap::new();
    for map in Map::ALL {
        let elements = fake.elements(&settings().table, map.name()).unwrap().unwrap();
        all.insert(
            map.name(),
            elements.iter().map(|element| (format!("{:?}", element.key), format!("{:?}", element.value))).collect(),
        );
    }
    let chains = fake.chains(&settings().table).unwrap();
    all.insert("chains", chains.into_iter().map(|name| (name, String::new())).collect());
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn packets_go_where_the_traffic_policies_say(case in case(1)) {
        let mut proxier = proxier();
        apply(&mut proxier, &case.service, &[&slice(&case.service, &case.endpoints)]);
        check_traffic(proxier.kernel_mut(), &case);
    }

    #[test]
    fn changes_one_by_one_end_where_one_big_write_does(
        steps in proptest::collection::vec((1..5u8).prop_flat_map(|number| (case(number), any::<bool>())), 1..12)
    ) {
        let mut step_by_step = proxier();
        let mut last: HashMap<ServiceName, Option<Case>> = HashMap::new();
        for (case, deleted) in steps {
            let name = case.service.name.clone();
            if deleted {
                step_by_step.stage(&name, Vec::new());
                step_by_step.commit().unwrap();
                last.insert(name, None);
            } else {
                apply(&mut step_by_step, &case.service, &[&slice(&case.service, &case.endpoints)]);
                last.insert(name, Some(case));
            }
        }
        let mut at_once = proxier();
        for case in last.values().flatten() {
            at_once.stage(&case.service.name, plan::service(&case.service, &[&slice(&case.service, &case.endpoints)], &context()));
        }
        at_once.commit().unwrap();
        prop_assert_eq!(state_of(step_by_step.kernel_mut()), state_of(at_once.kernel_mut()));
        for case in last.values().flatten() {
            check_traffic(step_by_step.kernel_mut(), case);
        }
    }
}
