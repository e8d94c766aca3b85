//! What the documentation says should become of a packet. It knows nothing of how the proxy does it.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use super::case::{Case, EndpointCase, Frontend, Ground, NodePorts, Place, Probe, Range, ServiceCase, Source, State};
use super::case::{Kind, node_name, zone};
use super::generate::Trial;

/// What an endpoint that answers sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    pub place: Place,
    /// The node as client, and not who asked.
    pub masqueraded: bool,
}

/// What should become of the first packet of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// One of these answers, each as often as any other; with `sticky` always the same for one client.
    Answered {
        any_of: BTreeMap<SocketAddr, Answer>,
        sticky: bool,
    },
    Refused,
    Dropped,
    /// It is none of the proxy's, and goes on as it was.
    Untouched,
}

impl Trial {
    /// What should become of a packet.
    pub fn verdict(&self, case: &Case, probe: &Probe) -> Verdict {
        let (ground, service) = (&self.grounds[probe.ground], &case.services[probe.service]);
        if !is_served(ground, case, service, probe) {
            let is_service_address = ground.network.service_cidr.contains(&probe.to.ip());
            return if is_service_address { Verdict::Refused } else { Verdict::Untouched };
        }
        let source = ground.source(probe.source);
        if probe.frontend == Frontend::Balancer && !is_allowed(ground, service, source) {
            return Verdict::Dropped;
        }
        let pools = Pools::of(case, service, probe.port);
        if pools.cluster.is_empty() {
            return Verdict::Refused;
        }
        let (is_pod, is_node) = (probe.source.is_pod(), probe.source == Source::Node);
        let (pool, masqueraded) = match probe.frontend {
            Frontend::Cluster if service.internal_local => (pools.local, !is_pod),
            Frontend::Cluster => (pools.cluster, !is_pod),
            _ if !service.external_local => (pools.cluster, true),
            _ if is_pod || is_node => (pools.cluster, !is_pod),
            _ => (pools.local, false),
        };
        if pool.is_empty() {
            return Verdict::Dropped;
        }
        let target = service.ports[probe.port].target;
        let answer = |place: Place| {
            let address = ground.place(place);
            let is_pod_of_bridge = is_pod && ground.network.cluster_cidr.contains(&address);
            let wanted =
                masqueraded || address == source && place.is_local() || self.masquerade_bridged && is_pod_of_bridge;
            // What ends at the node itself never leaves it, and keeps its source, unless it began there.
            let masqueraded = wanted && (place != Place::Node || is_node);
            (SocketAddr::new(address, target), Answer { place, masqueraded })
        };
        let any_of = pool.into_iter().map(answer).collect();
        Verdict::Answered { any_of, sticky: service.affinity_seconds.is_some() }
    }
}

/// Whether the proxy has anything to do with what a packet is sent to.
fn is_served(ground: &Ground, case: &Case, service: &ServiceCase, probe: &Probe) -> bool {
    if service.other_proxy || service.kind == Kind::Headless || !service.families[probe.ground] {
        return false;
    }
    match probe.frontend {
        Frontend::Cluster => true,
        Frontend::WrongPort | Frontend::LoopbackPort => false,
        Frontend::NodePort(_) => match case.node.node_ports {
            NodePorts::Everywhere => true,
            NodePorts::First => probe.to.ip() == ground.node[0],
            NodePorts::Nowhere => false,
        },
        Frontend::Balancer => !service.balancer_is_proxy,
        Frontend::External => case.node.external_allowed,
    }
}

/// Whether the ranges of a Service let somebody use its balancer's address.
fn is_allowed(ground: &Ground, service: &ServiceCase, source: IpAddr) -> bool {
    let lets = |range: &Range| match range {
        Range::Everybody => true,
        Range::Pods => ground.network.cluster_cidr.contains(&source),
        Range::Node => source == ground.node[0],
        Range::Outside => source == ground.outside,
        Range::Nonsense | Range::Nobody | Range::OtherFamily => false,
    };
    service.ranges.is_empty() || service.ranges.iter().any(lets)
}

/// The endpoints of a port: those that the whole cluster may use, and those of this node.
struct Pools {
    cluster: Vec<Place>,
    local: Vec<Place>,
}

impl Pools {
    fn of(case: &Case, service: &ServiceCase, port: usize) -> Pools {
        let has_port = |endpoint: &&EndpointCase| port == 0 || !(service.sparse && endpoint.slice == 1);
        let all: Vec<&EndpointCase> = service.endpoints.iter().filter(has_port).collect();
        let local: Vec<&EndpointCase> = all.iter().filter(|endpoint| endpoint.place.is_local()).copied().collect();
        let near = near(&all, case.node.has_zone);
        Pools { cluster: if near.is_empty() { usable(&all) } else { near }, local: usable(&local) }
    }
}

fn places(endpoints: &[&EndpointCase], wanted: impl Fn(&EndpointCase) -> bool) -> Vec<Place> {
    let mut all: Vec<Place> = endpoints.iter().filter(|one| wanted(one)).map(|one| one.place).collect();
    all.sort();
    all.dedup();
    all
}

/// Those that are ready, and while there are none, those that still serve while they terminate.
fn usable(endpoints: &[&EndpointCase]) -> Vec<Place> {
    let ready = places(endpoints, |one| one.state == State::Ready);
    if ready.is_empty() { places(endpoints, |one| one.state == State::Leaving) } else { ready }
}

/// Those that are meant for this node, or for its zone: only where every ready one is meant for somebody.
fn near(endpoints: &[&EndpointCase], has_zone: bool) -> Vec<Place> {
    let ready: Vec<&EndpointCase> = endpoints.iter().filter(|one| one.state == State::Ready).copied().collect();
    if ready.iter().all(|one| !one.for_nodes.is_empty()) {
        let here = places(&ready, |one| one.for_nodes.contains(&node_name()));
        if !here.is_empty() {
            return here;
        }
    }
    if has_zone && ready.iter().all(|one| !one.for_zones.is_empty()) {
        return places(&ready, |one| one.for_zones.contains(&zone()));
    }
    Vec::new()
}
