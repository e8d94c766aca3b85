//! What a Service means in nftables: from a [`Service`] and its [`Slice`]s to elements of maps. Pure.
//!
//! A frontend is an address with protocol and port, or a node port. Each has one element in a verdict map, which leads to
//! the chain that balances over as many endpoints as it has, and one element for each endpoint, numbered from 0. Without
//! endpoints it has an element that rejects. Which map and which chain depends on the traffic policy:
//!
//! | frontend | traffic | map | source |
//! |---|---|---|---|
//! | cluster address | any | services | kept for pods, the node's for others |
//! | balancer or external address, policy Cluster | any | services | the node's |
//! | balancer or external address, policy Local | from outside | local-services | kept |
//! | balancer or external address, policy Local | from pods and the node | services | kept for pods, the node's for the node |
//! | node port | alike | nodeports, local-nodeports | alike |
//!
//! With session affinity there is one more element, which leads to the chain that remembers a client's endpoint. With
//! source ranges a balancer address has an element that leads to the chain that looks for the source in networks of the
//! lengths in use, and one element for each network.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use crate::config::{Config, Network};
use crate::element::{Balancer, ElementKey, Entry, Lengths, Map, Scope, Target};
use crate::service::{Endpoint, Port, Protocol, Service, Slice};

/// What the plan depends on beside the objects.
#[derive(Debug, Clone, Default)]
pub struct Context {
    pub is_ipv4: bool,
    /// This node answers DNS there itself as long as the Service has no endpoints.
    pub dns_address: Option<IpAddr>,
    /// The node's name and zone, which endpoints can be meant for.
    pub node_name: String,
    pub zone: Option<String>,
    /// Where a Service's external addresses have to be to be taken.
    pub external_allowed: Vec<IpNet>,
}

impl Context {
    /// Of one of a configuration's networks; the zone is the Node's to tell.
    pub fn new(config: &Config, network: &Network) -> Context {
        Context {
            is_ipv4: network.is_ipv4(),
            dns_address: Some(network.cluster_dns),
            node_name: config.node_name.clone(),
            zone: None,
            external_allowed: config.external_ips_allowed.clone(),
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Frontend {
    Address(IpAddr, Protocol, u16),
    NodePort(Protocol, u16),
}

impl Frontend {
    fn key(self, map: Map) -> ElementKey {
        match self {
            Frontend::Address(address, protocol, port) => ElementKey::by_address(map, address, protocol, port),
            Frontend::NodePort(protocol, port) => ElementKey::by_port(map, protocol, port),
        }
    }
}

/// The elements of one Service in one address family, sorted, each key once.
pub fn service(service: &Service, slices: &[&Slice], context: &Context) -> Vec<Entry> {
    let mut plan = Plan { context, affinity_seconds: service.affinity_seconds, entries: Vec::new() };
    let of_family = |address: &&IpAddr| address.is_ipv4() == context.is_ipv4;
    let addresses: Vec<IpAddr> = service.virtual_addresses().iter().filter(of_family).copied().collect();
    if addresses.is_empty() || service.other_proxy {
        return Vec::new();
    }
    let allowed = |address: &&IpAddr| context.external_allowed.iter().any(|net| net.contains(*address));
    for port in &service.ports {
        let pools = Pools::new(slices, port, context);
        for address in &addresses {
            plan.cluster_address(*address, port, service.internal_local, &pools);
        }
        for address in service.external_ips.iter().filter(of_family).filter(allowed) {
            plan.external(Frontend::Address(*address, port.protocol, port.number), service.external_local, &pools);
        }
        for address in service.ingress.iter().filter(of_family) {
            plan.external(Frontend::Address(*address, port.protocol, port.number), service.external_local, &pools);
            plan.guard(*address, port, &service.source_ranges);
        }
        if let Some(node_port) = port.node_port {
            plan.external(Frontend::NodePort(port.protocol, node_port), service.external_local, &pools);
        }
        plan.hairpin(&pools);
    }
    let mut entries = plan.entries;
    entries.sort();
    entries.dedup_by(|later, earlier| later.key == earlier.key);
    entries
}

/// The endpoints of this node that a Service of policy Local can use, whatever the port: what a balancer's health check asks.
pub fn local_endpoints(slices: &[&Slice]) -> usize {
    let ready = slices.iter().flat_map(|slice| &slice.endpoints).filter(|endpoint| endpoint.local && endpoint.ready);
    ready.map(|endpoint| endpoint.address).collect::<BTreeSet<_>>().len()
}

/// The endpoints of one port: all that may be used, and those of this node.
struct Pools {
    cluster: Vec<SocketAddr>,
    local: Vec<SocketAddr>,
}

impl Pools {
    fn new(slices: &[&Slice], port: &Port, context: &Context) -> Pools {
        let mut all: Vec<(&Endpoint, u16)> = Vec::new();
        for slice in slices {
            if let Some(number) = slice.port(&port.name, port.protocol) {
                let of_family = slice.endpoints.iter().filter(|one| one.address.is_ipv4() == context.is_ipv4);
                all.extend(of_family.map(|endpoint| (endpoint, number)));
            }
        }
        let local: Vec<(&Endpoint, u16)> = all.iter().filter(|(endpoint, _)| endpoint.local).copied().collect();
        let local = usable(&local);
        let near = meant_for_here(&all, context);
        let cluster = if near.is_empty() { usable(&all) } else { near };
        Pools { cluster, local }
    }
}

/// Ready endpoints, or while there are none, those that still serve although they are terminating.
fn usable(endpoints: &[(&Endpoint, u16)]) -> Vec<SocketAddr> {
    let ready = sockets(endpoints, |endpoint| endpoint.ready);
    if ready.is_empty() { sockets(endpoints, |endpoint| endpoint.serving && endpoint.terminating) } else { ready }
}

fn sockets(endpoints: &[(&Endpoint, u16)], test: impl Fn(&Endpoint) -> bool) -> Vec<SocketAddr> {
    let chosen = endpoints.iter().filter(|(endpoint, _)| test(endpoint));
    let unique: BTreeSet<SocketAddr> = chosen.map(|(one, port)| SocketAddr::new(one.address, *port)).collect();
    unique.into_iter().collect()
}

/// The ready endpoints that hints mean for this node, or else for its zone. None unless every ready endpoint has such a
/// hint and some are meant for here: hints that are half there, or leave somebody with nothing, are no hints.
fn meant_for_here(endpoints: &[(&Endpoint, u16)], context: &Context) -> Vec<SocketAddr> {
    let ready = || endpoints.iter().map(|(endpoint, _)| *endpoint).filter(|endpoint| endpoint.ready);
    let for_node = |one: &Endpoint| one.hints.as_ref().is_some_and(|hints| hints.nodes.contains(&context.node_name));
    let has_nodes = |one: &Endpoint| one.hints.as_ref().is_some_and(|hints| !hints.nodes.is_empty());
    if ready().all(has_nodes) && ready().any(for_node) {
        return sockets(endpoints, |endpoint| endpoint.ready && for_node(endpoint));
    }
    let Some(zone) = &context.zone else { return Vec::new() };
    let for_zone = |one: &Endpoint| one.hints.as_ref().is_some_and(|hints| hints.zones.contains(zone));
    let has_zones = |one: &Endpoint| one.hints.as_ref().is_some_and(|hints| !hints.zones.is_empty());
    if ready().all(has_zones) {
        sockets(endpoints, |endpoint| endpoint.ready && for_zone(endpoint))
    } else {
        Vec::new()
    }
}

struct Plan<'a> {
    context: &'a Context,
    affinity_seconds: Option<u32>,
    entries: Vec<Entry>,
}

impl Plan<'_> {
    fn push(&mut self, key: ElementKey, target: Target) {
        self.entries.push(Entry { key, target });
    }

    fn cluster_address(&mut self, address: IpAddr, port: &Port, local_only: bool, pools: &Pools) {
        let frontend = Frontend::Address(address, port.protocol, port.number);
        let pool = if local_only { &pools.local } else { &pools.cluster };
        if !pool.is_empty() {
            self.balance(frontend, Map::Services, Scope::Cluster, pool);
        } else if self.context.dns_address != Some(address) {
            // With endpoints elsewhere only, the policy says no more than that they are not for this node.
            let target = if pools.cluster.is_empty() { Target::Reject } else { Target::Drop };
            self.push(frontend.key(Map::NoEndpoints), target);
        }
    }

    /// A frontend that the world outside the cluster may use.
    fn external(&mut self, frontend: Frontend, local_only: bool, pools: &Pools) {
        let by_address = matches!(frontend, Frontend::Address(..));
        if pools.cluster.is_empty() {
            let map = if by_address { Map::NoEndpoints } else { Map::NoEndpointNodePorts };
            return self.push(frontend.key(map), Target::Reject);
        }
        let (all, local) =
            if by_address { (Map::Services, Map::LocalServices) } else { (Map::NodePorts, Map::LocalNodePorts) };
        if !local_only {
            let scope = if by_address { Scope::External } else { Scope::NodePort };
            return self.balance(frontend, all, scope, &pools.cluster);
        }
        let scope = if by_address { Scope::Cluster } else { Scope::NodePortCluster };
        self.balance(frontend, all, scope, &pools.cluster);
        if pools.local.is_empty() {
            self.push(frontend.key(local), Target::Drop);
        } else {
            let scope = if by_address { Scope::Local } else { Scope::LocalNodePort };
            self.balance(frontend, local, scope, &pools.local);
        }
    }

    fn balance(&mut self, frontend: Frontend, map: Map, scope: Scope, pool: &[SocketAddr]) {
        let affinity = self.affinity_seconds.is_some();
        let balancer = Balancer { scope, endpoints: pool.len() as u32, affinity };
        if let Some(seconds) = self.affinity_seconds {
            let affine = if scope.is_by_address() { Map::Affine } else { Map::AffineNodePorts };
            self.push(frontend.key(affine), Target::Remember(seconds));
        }
        self.push(frontend.key(map), Target::Balance(balancer));
        for (number, endpoint) in pool.iter().enumerate() {
            let key = frontend.key(map).numbered(scope.endpoints(), number as u32);
            self.push(key, Target::Endpoint((*endpoint).into()));
        }
    }

    /// Only sources in these ranges may use a balancer's address. A range of everything is none, and ranges of the other
    /// family alone let nobody in.
    fn guard(&mut self, address: IpAddr, port: &Port, ranges: &[IpNet]) {
        if ranges.is_empty() {
            return;
        }
        let of_family: Vec<IpNet> =
            ranges.iter().filter(|net| net.addr().is_ipv4() == address.is_ipv4()).copied().collect();
        let nets = IpNet::aggregate(&of_family);
        if nets.iter().any(|net| net.prefix_len() == 0) {
            return;
        }
        let guarded = ElementKey::by_address(Map::Guarded, address, port.protocol, port.number);
        if nets.is_empty() {
            return self.push(guarded, Target::Drop);
        }
        self.push(guarded, Target::Guard(Lengths::of(nets.iter().map(IpNet::prefix_len))));
        for (number, net) in nets.iter().enumerate() {
            let key = guarded.numbered(Map::Sources, number as u32);
            self.push(key, Target::Source(net.network().into(), net.prefix_len()));
        }
    }

    /// Pods of this node that reach themselves through a Service must see another address than their own as source.
    fn hairpin(&mut self, pools: &Pools) {
        for endpoint in &pools.local {
            self.push(ElementKey::hairpin(endpoint.ip()), Target::Member);
        }
    }
}
