//! What a Service means in nftables: from a [`Service`] and its [`Slice`]s to elements of maps. Pure.
//!
//! A frontend is an address with protocol and port, or a node port. Each has one element in a verdict map, which leads to
//! the chain that balances over as many endpoints as it has, and one element for each endpoint, numbered from 0. Without
//! endpoints it has an element that rejects. Which map and which chain depends on the traffic policy:
//!
//! With session affinity there is one more element, which leads to the chain that remembers a client's endpoint.
//!
//! | frontend | traffic | map | source |
//! |---|---|---|---|
//! | cluster address | any | services | kept for pods, the node's for others |
//! | balancer address, policy Cluster | any | services | the node's |
//! | balancer address, policy Local | from outside | local-services | kept |
//! | balancer address, policy Local | from pods and the node | services | kept for pods, the node's for the node |
//! | node port | alike | nodeports, local-nodeports | alike |

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use oarlock_nft::{Bytes, Key};

use crate::service::{Endpoint, Port, Protocol, Service, Slice};

/// The maps of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Map {
    Services,
    NodePorts,
    LocalServices,
    LocalNodePorts,
    NoEndpoints,
    NoEndpointNodePorts,
    Endpoints,
    NodePortEndpoints,
    LocalEndpoints,
    LocalNodePortEndpoints,
    Hairpin,
    Affine,
    AffineNodePorts,
}

impl Map {
    pub const ALL: [Map; 13] = [
        Map::Services,
        Map::NodePorts,
        Map::LocalServices,
        Map::LocalNodePorts,
        Map::NoEndpoints,
        Map::NoEndpointNodePorts,
        Map::Endpoints,
        Map::NodePortEndpoints,
        Map::LocalEndpoints,
        Map::LocalNodePortEndpoints,
        Map::Hairpin,
        Map::Affine,
        Map::AffineNodePorts,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Map::Services => "services",
            Map::NodePorts => "nodeports",
            Map::LocalServices => "local-services",
            Map::LocalNodePorts => "local-nodeports",
            Map::NoEndpoints => "no-endpoints",
            Map::NoEndpointNodePorts => "no-endpoint-nodeports",
            Map::Endpoints => "endpoints",
            Map::NodePortEndpoints => "nodeport-endpoints",
            Map::LocalEndpoints => "local-endpoints",
            Map::LocalNodePortEndpoints => "local-nodeport-endpoints",
            Map::Hairpin => "hairpin",
            Map::Affine => "affine",
            Map::AffineNodePorts => "affine-nodeports",
        }
    }
}

/// Where a balancing chain belongs: which map it reads, and whose packets get the node's address as source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scope {
    /// Addresses; packets of others than pods are masqueraded.
    Cluster,
    /// Addresses; all packets are masqueraded.
    External,
    /// Addresses, from outside to endpoints of this node; nothing is masqueraded.
    Local,
    /// Node ports, as the three above.
    NodePortCluster,
    NodePort,
    LocalNodePort,
}

impl Scope {
    pub const ALL: [Scope; 6] =
        [Scope::Cluster, Scope::External, Scope::Local, Scope::NodePortCluster, Scope::NodePort, Scope::LocalNodePort];

    pub fn name(self) -> &'static str {
        match self {
            Scope::Cluster => "cluster",
            Scope::External => "external",
            Scope::Local => "local",
            Scope::NodePortCluster => "nodeport-cluster",
            Scope::NodePort => "nodeport",
            Scope::LocalNodePort => "local-nodeport",
        }
    }

    pub fn is_by_address(self) -> bool {
        matches!(self, Scope::Cluster | Scope::External | Scope::Local)
    }

    pub fn endpoints(self) -> Map {
        match self {
            Scope::Cluster | Scope::External => Map::Endpoints,
            Scope::Local => Map::LocalEndpoints,
            Scope::NodePortCluster | Scope::NodePort => Map::NodePortEndpoints,
            Scope::LocalNodePort => Map::LocalNodePortEndpoints,
        }
    }
}

/// The start of the names of chains that remember which endpoint a client got.
const REMEMBER: &str = "remember-";
/// The start of the names of balancing chains with session affinity.
const AFFINE: &str = "affine-";

/// A chain that comes and goes with the elements that lead to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dynamic {
    Balance(Balancer),
    /// Remembers for so many seconds which endpoint a client got.
    Remember(u32),
}

impl Dynamic {
    pub fn chain(&self) -> String {
        match self {
            Dynamic::Balance(balancer) => balancer.chain(),
            Dynamic::Remember(seconds) => format!("{REMEMBER}{seconds}"),
        }
    }

    /// The chain of a name, as far as [`Dynamic::chain`] made it.
    pub fn of_chain(name: &str) -> Option<Dynamic> {
        match name.strip_prefix(REMEMBER) {
            Some(seconds) => seconds.parse().ok().map(Dynamic::Remember),
            None => Balancer::of_chain(name).map(Dynamic::Balance),
        }
    }
}

/// A chain that balances over a number of endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Balancer {
    pub scope: Scope,
    pub endpoints: u32,
    /// Whether a client that has been here gets the endpoint that it had.
    pub affinity: bool,
}

impl Balancer {
    fn chain(&self) -> String {
        format!("{}{}-{}", if self.affinity { AFFINE } else { "" }, self.scope.name(), self.endpoints)
    }

    fn of_chain(name: &str) -> Option<Balancer> {
        let (affinity, rest) = match name.strip_prefix(AFFINE) {
            Some(rest) => (true, rest),
            None => (false, name),
        };
        let (scope, endpoints) = rest.rsplit_once('-')?;
        let scope = Scope::ALL.into_iter().find(|one| one.name() == scope)?;
        Some(Balancer { scope, endpoints: endpoints.parse().ok()?, affinity })
    }
}

/// What an element's key leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    Balance(Balancer),
    Remember(u32),
    Endpoint(SocketAddr),
    Reject,
    Drop,
    /// An element of a set, which leads nowhere.
    Member,
}

impl Target {
    /// The chain that it leads to, if that comes and goes.
    pub fn dynamic(self) -> Option<Dynamic> {
        match self {
            Target::Balance(balancer) => Some(Dynamic::Balance(balancer)),
            Target::Remember(seconds) => Some(Dynamic::Remember(seconds)),
            _ => None,
        }
    }
}

/// An element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    pub map: Map,
    pub key: Bytes,
    pub target: Target,
}

/// What the plan depends on beside the objects.
#[derive(Debug, Clone)]
pub struct Context {
    pub is_ipv4: bool,
    /// This node answers DNS there itself as long as the Service has no endpoints.
    pub dns_address: Option<IpAddr>,
}

/// Where connections come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Frontend {
    Address(IpAddr, Protocol, u16),
    NodePort(Protocol, u16),
}

impl Frontend {
    fn key(self) -> Key {
        match self {
            Frontend::Address(address, protocol, port) => Key::new().address(address).protocol(protocol.0).port(port),
            Frontend::NodePort(protocol, port) => Key::new().protocol(protocol.0).port(port),
        }
    }
}

/// The key of a frontend with an address, as in [`Map::Services`].
pub fn address_key(address: IpAddr, protocol: Protocol, port: u16) -> Bytes {
    Frontend::Address(address, protocol, port).key().bytes()
}

/// The key of a node port, as in [`Map::NodePorts`].
pub fn node_port_key(protocol: Protocol, port: u16) -> Bytes {
    Frontend::NodePort(protocol, port).key().bytes()
}

/// The elements of one Service in one address family, sorted, each key once.
pub fn service(service: &Service, slices: &[&Slice], context: &Context) -> Vec<Entry> {
    let mut plan = Plan { context, affinity_seconds: service.affinity_seconds, entries: Vec::new() };
    let of_family = |address: &&IpAddr| address.is_ipv4() == context.is_ipv4;
    let addresses: Vec<IpAddr> = service.virtual_addresses().iter().filter(of_family).copied().collect();
    if addresses.is_empty() || service.other_proxy {
        return Vec::new();
    }
    for port in &service.ports {
        let pools = Pools::new(slices, port, context.is_ipv4);
        for address in &addresses {
            plan.cluster_address(*address, port, service.internal_local, &pools);
        }
        for address in service.ingress.iter().filter(of_family) {
            plan.external(Frontend::Address(*address, port.protocol, port.number), service.external_local, &pools);
        }
        if let Some(node_port) = port.node_port {
            plan.external(Frontend::NodePort(port.protocol, node_port), service.external_local, &pools);
        }
        plan.hairpin(&pools);
    }
    let mut entries = plan.entries;
    entries.sort();
    entries.dedup_by(|later, earlier| (later.map, later.key) == (earlier.map, earlier.key));
    entries
}

/// The endpoints of one port: all that may be used, and those of this node.
struct Pools {
    cluster: Vec<SocketAddr>,
    local: Vec<SocketAddr>,
}

impl Pools {
    fn new(slices: &[&Slice], port: &Port, is_ipv4: bool) -> Pools {
        let key = (port.name.clone(), port.protocol);
        let mut all: Vec<(&Endpoint, u16)> = Vec::new();
        for slice in slices {
            if let Some(number) = slice.ports.get(&key) {
                let of_family = slice.endpoints.iter().filter(|endpoint| endpoint.address.is_ipv4() == is_ipv4);
                all.extend(of_family.map(|endpoint| (endpoint, *number)));
            }
        }
        let local: Vec<(&Endpoint, u16)> = all.iter().filter(|(endpoint, _)| endpoint.local).copied().collect();
        Pools { cluster: usable(&all), local: usable(&local) }
    }
}

/// Ready endpoints, or while there are none, those that still serve although they are terminating.
fn usable(endpoints: &[(&Endpoint, u16)]) -> Vec<SocketAddr> {
    let choose = |test: fn(&Endpoint) -> bool| -> BTreeSet<SocketAddr> {
        let chosen = endpoints.iter().filter(|(endpoint, _)| test(endpoint));
        chosen.map(|(endpoint, port)| SocketAddr::new(endpoint.address, *port)).collect()
    };
    let ready = choose(|endpoint| endpoint.ready);
    let chosen = if ready.is_empty() { choose(|endpoint| endpoint.serving && endpoint.terminating) } else { ready };
    chosen.into_iter().collect()
}

struct Plan<'a> {
    context: &'a Context,
    affinity_seconds: Option<u32>,
    entries: Vec<Entry>,
}

impl Plan<'_> {
    fn push(&mut self, map: Map, key: Bytes, target: Target) {
        self.entries.push(Entry { map, key, target });
    }

    fn cluster_address(&mut self, address: IpAddr, port: &Port, local_only: bool, pools: &Pools) {
        let frontend = Frontend::Address(address, port.protocol, port.number);
        let pool = if local_only { &pools.local } else { &pools.cluster };
        if !pool.is_empty() {
            self.balance(frontend, Map::Services, Scope::Cluster, pool);
        } else if self.context.dns_address != Some(address) {
            // With endpoints elsewhere only, the policy says no more than that they are not for this node.
            let target = if pools.cluster.is_empty() { Target::Reject } else { Target::Drop };
            self.push(Map::NoEndpoints, frontend.key().bytes(), target);
        }
    }

    /// A frontend that the world outside the cluster may use.
    fn external(&mut self, frontend: Frontend, local_only: bool, pools: &Pools) {
        let by_address = matches!(frontend, Frontend::Address(..));
        if pools.cluster.is_empty() {
            let map = if by_address { Map::NoEndpoints } else { Map::NoEndpointNodePorts };
            return self.push(map, frontend.key().bytes(), Target::Reject);
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
            self.push(local, frontend.key().bytes(), Target::Drop);
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
            self.push(affine, frontend.key().bytes(), Target::Remember(seconds));
        }
        self.push(map, frontend.key().bytes(), Target::Balance(balancer));
        for (number, endpoint) in pool.iter().enumerate() {
            self.push(scope.endpoints(), frontend.key().mark(number as u32).bytes(), Target::Endpoint(*endpoint));
        }
    }

    /// Pods of this node that reach themselves through a Service must see another address than their own as source.
    fn hairpin(&mut self, pools: &Pools) {
        for endpoint in &pools.local {
            let key = Key::new().address(endpoint.ip()).address(endpoint.ip()).bytes();
            self.push(Map::Hairpin, key, Target::Member);
        }
    }
}
