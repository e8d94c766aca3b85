//! Cases and packets by seed: the same number makes the same case.

use std::fmt;
use std::net::SocketAddr;

use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};

use super::case::{
    Case, EndpointCase, Frontend, Ground, Kind, NodePorts, NodeSide, Place, PortCase, Probe, Range, ServiceCase,
    Source, State, Transport, far_node, node_name, zone,
};

/// Says which cases to try again, as a failure printed it: `<run>`, or `<run>/<case>` for that case alone.
const VARIABLE: &str = "OARLOCK_TRIAL";
/// After so many cases the node is set up in another way.
const NODE_STAYS: u32 = 6;
const SERVICES: u16 = 3;
const TARGETS: [u16; 2] = [8080, 8081];

/// Which cases are tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Replay {
    pub run: u32,
    /// This case alone, and not one after the other.
    pub only: Option<u32>,
    /// Somebody asked for these, and they are not by chance.
    pub is_wanted: bool,
}

impl Replay {
    /// What the environment asks for, or any.
    pub fn from_environment() -> Replay {
        match std::env::var(VARIABLE) {
            Ok(text) => Replay::parse(&text).expect("OARLOCK_TRIAL is a number, or two with a stroke between"),
            Err(_) => Replay { run: rand::random(), only: None, is_wanted: false },
        }
    }

    fn parse(text: &str) -> Option<Replay> {
        let (run, only) = match text.split_once('/') {
            Some((run, case)) => (run, Some(case.parse().ok()?)),
            None => (text, None),
        };
        Some(Replay { run: run.parse().ok()?, only, is_wanted: true })
    }

    /// The numbers of the cases, without end unless it is one alone.
    pub fn cases(self) -> impl Iterator<Item = u32> {
        let first = self.only.unwrap_or(0);
        (first..).take(if self.only.is_some() { 1 } else { usize::MAX })
    }

    /// How to see a case again.
    pub fn again(self, case: u32) -> impl fmt::Display {
        format!("{VARIABLE}={} for all cases up to it, {VARIABLE}={}/{case} for it alone", self.run, self.run)
    }
}

/// All cases of a run.
#[derive(Debug, Clone)]
pub struct Trial {
    pub run: u32,
    pub grounds: Vec<Ground>,
    /// Whether the node has no br_netfilter, so that pods that share its bridge must see it as source.
    pub masquerade_bridged: bool,
}

impl Trial {
    fn random(&self, stream: u32, number: u32) -> StdRng {
        StdRng::seed_from_u64(u64::from(self.run) << 32 | u64::from(stream << 30 ^ number))
    }

    /// A case by its number.
    pub fn case(&self, number: u32) -> Case {
        let mut random = self.random(0, number);
        let exists: Vec<u16> = (0..SERVICES).filter(|_| random.random_bool(0.9)).collect();
        Case {
            node: node(&mut self.random(1, number / NODE_STAYS)),
            services: exists.into_iter().map(|number| service(&mut random, number, self.grounds.len())).collect(),
        }
    }

    /// All packets that say something about a case.
    pub fn probes(&self, case: &Case) -> Vec<Probe> {
        let mut probes = Vec::new();
        for (ground_number, ground) in self.grounds.iter().enumerate() {
            for (service_number, service) in case.services.iter().enumerate() {
                for (port_number, port) in service.ports.iter().enumerate() {
                    for (frontend, to) in frontends(ground, service, port_number) {
                        let sources = Source::ALL.into_iter().filter(|source| can_ask(*source, frontend, service));
                        probes.extend(sources.map(|source| Probe {
                            ground: ground_number,
                            service: service_number,
                            port: port_number,
                            transport: port.transport,
                            source,
                            frontend,
                            to,
                        }));
                    }
                }
            }
        }
        probes
    }
}

fn frontends(ground: &Ground, service: &ServiceCase, port: usize) -> Vec<(Frontend, SocketAddr)> {
    let mut all = Vec::new();
    if service.kind != Kind::Headless {
        let address = ground.cluster_address(service.number);
        all.push((Frontend::Cluster, SocketAddr::new(address, ServiceCase::PORT)));
        if port == 0 {
            all.push((Frontend::WrongPort, SocketAddr::new(address, ServiceCase::PORT + 1)));
        }
    }
    if matches!(service.kind, Kind::NodePort | Kind::LoadBalancer) {
        let at = |address| SocketAddr::new(address, service.node_port());
        all.extend([
            (Frontend::NodePort(0), at(ground.node[0])),
            (Frontend::NodePort(1), at(ground.node[1])),
            (Frontend::LoopbackPort, at(ground.loopback)),
        ]);
    }
    if service.kind == Kind::LoadBalancer {
        let at = SocketAddr::new(ground.balancer_address(service.number), ServiceCase::PORT);
        all.push((Frontend::Balancer, at));
    }
    if service.external {
        let at = SocketAddr::new(ground.external_address(service.number), ServiceCase::PORT);
        all.push((Frontend::External, at));
    }
    all
}

/// A pod of another node reaches Services by its own node's proxy, and here only what leads to this node. It never meets
/// itself: a packet that came from it and goes back to it unchanged is none that anybody answers.
fn can_ask(source: Source, frontend: Frontend, service: &ServiceCase) -> bool {
    match (source, frontend) {
        (_, Frontend::LoopbackPort) => source == Source::Node,
        (Source::Far, Frontend::Cluster | Frontend::WrongPort) => false,
        (Source::Far, _) => service.endpoints.iter().all(|endpoint| endpoint.place != Place::Far),
        _ => true,
    }
}

fn node(random: &mut StdRng) -> NodeSide {
    let node_ports = [NodePorts::Everywhere, NodePorts::Everywhere, NodePorts::First, NodePorts::Nowhere];
    NodeSide {
        node_ports: pick(random, &node_ports),
        has_zone: random.random_bool(0.6),
        external_allowed: random.random_bool(0.7),
    }
}

fn pick<T: Copy>(random: &mut StdRng, choices: &[T]) -> T {
    *choices.choose(random).expect("there are choices")
}

fn service(random: &mut StdRng, number: u16, families: usize) -> ServiceCase {
    let mut has: Vec<bool> = (0..families).map(|_| random.random_bool(0.75)).collect();
    if !has.contains(&true) {
        let one = random.random_range(0..families);
        has[one] = true;
    }
    let kinds = [
        Kind::ClusterIp,
        Kind::ClusterIp,
        Kind::NodePort,
        Kind::NodePort,
        Kind::NodePort,
        Kind::LoadBalancer,
        Kind::LoadBalancer,
        Kind::LoadBalancer,
        Kind::LoadBalancer,
        Kind::LoadBalancer,
        Kind::LoadBalancer,
        Kind::Headless,
    ];
    let mut transports = [Transport::Tcp, Transport::Udp, Transport::Sctp];
    transports.shuffle(random);
    let ports = transports.into_iter().take(pick(random, &[1, 1, 2]));
    let ports = ports.map(|transport| PortCase { transport, target: pick(random, &TARGETS) }).collect();
    ServiceCase {
        number,
        families: has,
        kind: pick(random, &kinds),
        other_proxy: random.random_bool(0.06),
        ports,
        endpoints: endpoints(random),
        sparse: random.random_bool(0.25),
        internal_local: random.random_bool(0.4),
        external_local: random.random_bool(0.5),
        affinity_seconds: random.random_bool(0.35).then(|| pick(random, &[60, 3600])),
        external: random.random_bool(0.3),
        balancer_is_proxy: random.random_bool(0.1),
        ranges: ranges(random),
    }
}

fn endpoints(random: &mut StdRng) -> Vec<EndpointCase> {
    // All of them are meant for somebody, or all but some, or none.
    let (zones, nodes) = pick(random, &[(0.0, 0.0), (0.0, 0.0), (0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.8, 0.8)]);
    let states = [State::Ready, State::Ready, State::Ready, State::Leaving, State::NotReady, State::Gone];
    let count = random.random_range(0..5);
    (0..count)
        .map(|_| EndpointCase {
            place: pick(random, &Place::ALL),
            state: pick(random, &states),
            slice: random.random_range(0..2),
            for_zones: if random.random_bool(zones) { vec![pick(random, &[zone(), "there"])] } else { vec![] },
            for_nodes: if random.random_bool(nodes) { vec![pick(random, &[node_name(), far_node()])] } else { vec![] },
        })
        .collect()
}

fn ranges(random: &mut StdRng) -> Vec<Range> {
    let all = [
        Range::Everybody,
        Range::Nonsense,
        Range::Pods,
        Range::Node,
        Range::Outside,
        Range::Nobody,
        Range::OtherFamily,
    ];
    let count = pick(random, &[0, 0, 0, 0, 1, 2, 3]);
    (0..count).map(|_| pick(random, &all)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variable_says_which_cases() {
        assert_eq!(Replay::parse("7"), Some(Replay { run: 7, only: None, is_wanted: true }));
        let one = Replay::parse("7/12").unwrap();
        assert_eq!(one.cases().collect::<Vec<_>>(), [12]);
        assert_eq!(Replay::parse("7/"), None);
        assert!(one.again(12).to_string().contains("OARLOCK_TRIAL=7/12 "));
    }
}
