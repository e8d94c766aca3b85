//! Random Services one after the other: the planned tables, traced, do to every packet what the model says, and changes one
//! by one end where one big write does. The kernel is held against the same cases by the privileged tests.

use std::net::IpAddr;

use crate::config::{Config, Network};
use crate::trial::{Case, Ground, Replay, Tracer, Trial, describe, node_name};

const CASES: usize = 50;

fn ground(is_ipv4: bool) -> Ground {
    let address = |v4: &str, v6: &str| -> IpAddr { if is_ipv4 { v4 } else { v6 }.parse().unwrap() };
    let net = |v4: &str, v6: &str| if is_ipv4 { v4 } else { v6 }.parse().unwrap();
    let node = address("192.168.0.10", "fd07::10");
    Ground {
        network: Network {
            cluster_cidr: net("10.42.0.0/16", "fd2a::/48"),
            service_cidr: net("10.43.0.0/16", "fd2b::/112"),
            cluster_dns: address("10.43.0.10", "fd2b::a"),
            node_ip: Some(node),
        },
        node: [node, address("10.42.0.1", "fd2a::1")],
        loopback: address("127.0.0.1", "::1"),
        pods: [address("10.42.0.11", "fd2a::11"), address("10.42.0.12", "fd2a::12")],
        client: address("10.42.0.13", "fd2a::13"),
        far: address("10.42.1.5", "fd2a::1:0:0:0:5"),
        outside: address("203.0.113.5", "fd09::5"),
        external: net("198.51.100.0/24", "fd99::/64"),
    }
}

fn config(trial: &Trial, case: &Case) -> Config {
    let networks = trial.grounds.iter().map(|ground| ground.network.clone()).collect();
    let mut config = Config { node_name: node_name().to_owned(), networks, ..Config::default() };
    trial.configure(case, &mut config);
    config
}

fn all_packets(trial: &Trial, case: &Case, tracer: &mut Tracer) -> Result<(), String> {
    trial.probes(case).iter().try_for_each(|probe| {
        let checked = tracer.check(trial, case, probe, &trial.verdict(case, probe));
        checked.map_err(|told| format!("{told}\n{:?}\n{}", case.node, describe(&case.services[probe.service])))
    })
}

fn alone(trial: &Trial, case: &Case) -> Result<(), String> {
    let mut tracer = Tracer::new(trial, &config(trial, case), None);
    tracer.apply(&trial.objects(case));
    all_packets(trial, case, &mut tracer)
}

/// The failure of the smallest case that still fails of those that a case can be cut down to, if it fails by itself.
fn smallest(trial: &Trial, mut case: Case) -> Option<String> {
    let mut told = alone(trial, &case).err()?;
    while let Some((smaller, why)) =
        case.smaller().into_iter().find_map(|smaller| alone(trial, &smaller).err().map(|why| (smaller, why)))
    {
        (case, told) = (smaller, why);
    }
    Some(told)
}

fn run(families: &[bool], masquerade_bridged: bool) {
    let replay = Replay::from_environment();
    let grounds = families.iter().map(|is_ipv4| ground(*is_ipv4)).collect();
    let trial = Trial { run: replay.run, grounds, masquerade_bridged };
    let mut tracer: Option<Tracer> = None;
    let mut node = None;
    for number in replay.cases().take(CASES) {
        let case = trial.case(number);
        if node != Some(case.node) {
            tracer = Some(Tracer::new(&trial, &config(&trial, &case), tracer.take()));
            node = Some(case.node);
        }
        let tracer = tracer.as_mut().unwrap();
        let objects = trial.objects(&case);
        tracer.apply(&objects);
        if let Err(told) = all_packets(&trial, &case, tracer) {
            let told = smallest(&trial, case).unwrap_or(told);
            panic!("case {number} of families {families:?}: {told}\n{}", replay.again(number));
        }
        let mut at_once = Tracer::new(&trial, &config(&trial, &case), None);
        at_once.apply(&objects);
        assert_eq!(tracer.elements(), at_once.elements(), "{}", replay.again(number));
    }
}

#[test]
fn packets_of_ipv4_go_where_the_documentation_says() {
    run(&[true], false);
}

#[test]
fn packets_of_ipv6_go_where_the_documentation_says() {
    run(&[false], false);
}

#[test]
fn packets_of_both_families_go_where_the_documentation_says() {
    run(&[true, false], false);
    run(&[false, true], true);
}
