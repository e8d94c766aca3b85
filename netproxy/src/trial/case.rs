//! What a case consists of: a node, the Services and endpoints of a moment, and the packets that are sent. No behaviour.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::config::Network;

/// The node whose proxy is tried.
pub fn node_name() -> &'static str {
    "node-1"
}

/// Another node of the cluster.
pub fn far_node() -> &'static str {
    "node-2"
}

/// The zone that the node is in, when it is in one; hints name this one or another.
pub fn zone() -> &'static str {
    "here"
}

/// The addresses of the node and of those around it, in one family.
#[derive(Debug, Clone)]
pub struct Ground {
    pub network: Network,
    /// The node's own addresses: the one that others know it by, then that towards its pods.
    pub node: [IpAddr; 2],
    pub loopback: IpAddr,
    /// Pods of the node that answer.
    pub pods: [IpAddr; 2],
    /// A pod of the node that only asks.
    pub client: IpAddr,
    /// A pod of another node, which answers.
    pub far: IpAddr,
    /// Somebody who is not in the cluster.
    pub outside: IpAddr,
    /// Where external addresses of Services are.
    pub external: IpNet,
}

impl Ground {
    pub fn is_ipv4(&self) -> bool {
        self.network.is_ipv4()
    }

    pub fn place(&self, place: Place) -> IpAddr {
        match place {
            Place::First => self.pods[0],
            Place::Second => self.pods[1],
            Place::Far => self.far,
            Place::Node => self.node[0],
        }
    }

    pub fn source(&self, source: Source) -> IpAddr {
        match source {
            Source::Client => self.client,
            Source::First => self.pods[0],
            Source::Far => self.far,
            Source::Node => self.node[0],
            Source::Outside => self.outside,
        }
    }

    /// The address of a Service by its number.
    pub fn cluster_address(&self, service: u16) -> IpAddr {
        nth(self.network.service_cidr, 60 + u32::from(service))
    }

    pub fn balancer_address(&self, service: u16) -> IpAddr {
        nth(self.external, 1 + u32::from(service))
    }

    pub fn external_address(&self, service: u16) -> IpAddr {
        nth(self.external, 101 + u32::from(service))
    }
}

/// An address of a network by its number.
fn nth(net: IpNet, number: u32) -> IpAddr {
    match net.network() {
        IpAddr::V4(first) => std::net::Ipv4Addr::from_bits(first.to_bits() + number).into(),
        IpAddr::V6(first) => std::net::Ipv6Addr::from_bits(first.to_bits() + u128::from(number)).into(),
    }
}

/// Where an endpoint is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Place {
    First,
    Second,
    /// On another node.
    Far,
    /// A process of the node itself, as pods with its network are.
    Node,
}

impl Place {
    pub const ALL: [Place; 4] = [Place::First, Place::Second, Place::Far, Place::Node];

    pub fn is_local(self) -> bool {
        self != Place::Far
    }
}

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Source {
    Client,
    /// The pod that is an endpoint at times.
    First,
    Far,
    Node,
    Outside,
}

impl Source {
    pub const ALL: [Source; 5] = [Source::Client, Source::First, Source::Far, Source::Node, Source::Outside];

    pub fn is_pod(self) -> bool {
        matches!(self, Source::Client | Source::First | Source::Far)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Transport {
    Tcp,
    Udp,
    Sctp,
}

/// What an endpoint's conditions say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Ready,
    NotReady,
    /// Terminating, and still serving.
    Leaving,
    /// Terminating, and no longer serving.
    Gone,
}

/// An endpoint of a Service in one of its slices, with whom it is meant for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointCase {
    pub place: Place,
    pub state: State,
    /// Which of the Service's two slices it is in.
    pub slice: u8,
    pub for_zones: Vec<&'static str>,
    pub for_nodes: Vec<&'static str>,
}

/// A port of a Service. All its ports have the same number and node port, and differ in their protocols.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortCase {
    pub transport: Transport,
    pub target: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    ClusterIp,
    NodePort,
    LoadBalancer,
    Headless,
}

/// An entry of `loadBalancerSourceRanges`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Range {
    Everybody,
    /// Something that is no range.
    Nonsense,
    Pods,
    Node,
    Outside,
    /// Somewhere else.
    Nobody,
    /// Everybody of the other address family.
    OtherFamily,
}

/// A Service with its endpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceCase {
    pub number: u16,
    /// For each family of the cluster in its order, whether the Service has an address of it.
    pub families: Vec<bool>,
    pub kind: Kind,
    /// Another proxy takes care of it.
    pub other_proxy: bool,
    pub ports: Vec<PortCase>,
    pub endpoints: Vec<EndpointCase>,
    /// The second slice has the first port only.
    pub sparse: bool,
    pub internal_local: bool,
    pub external_local: bool,
    pub affinity_seconds: Option<u32>,
    /// Whether it has an external address beside the others.
    pub external: bool,
    /// The balancer sends to node ports itself.
    pub balancer_is_proxy: bool,
    pub ranges: Vec<Range>,
}

impl ServiceCase {
    /// The port that all its ports have on its own addresses.
    pub const PORT: u16 = 80;

    pub fn node_port(&self) -> u16 {
        30_500 + self.number
    }

    pub fn name(&self) -> String {
        format!("trial-{}", self.number)
    }
}

/// On which of the node's addresses node ports are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodePorts {
    Everywhere,
    /// On the first of them.
    First,
    Nowhere,
}

/// How the node is set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeSide {
    pub node_ports: NodePorts,
    pub has_zone: bool,
    pub external_allowed: bool,
}

/// The cluster at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Case {
    pub node: NodeSide,
    pub services: Vec<ServiceCase>,
}

impl Case {
    /// Cases with one thing less in them, from which whoever reads of a failure learns more.
    pub fn smaller(&self) -> Vec<Case> {
        let mut all = Vec::new();
        for position in 0..self.services.len() {
            let mut fewer = self.clone();
            fewer.services.remove(position);
            all.push(fewer);
            let with = |change: &dyn Fn(&mut ServiceCase)| {
                let mut less = self.clone();
                change(&mut less.services[position]);
                less
            };
            let service = &self.services[position];
            all.extend((0..service.endpoints.len()).map(|one| {
                with(&|service| {
                    service.endpoints.remove(one);
                })
            }));
            all.extend((0..service.ranges.len()).map(|one| {
                with(&|service| {
                    service.ranges.remove(one);
                })
            }));
            all.extend((1..service.ports.len()).map(|_| with(&|service| service.ports.truncate(1))));
            all.extend([
                with(&|service| service.endpoints.iter_mut().for_each(|one| one.for_nodes.clear())),
                with(&|service| service.endpoints.iter_mut().for_each(|one| one.for_zones.clear())),
                with(&|service| service.affinity_seconds = None),
                with(&|service| service.external = false),
                with(&|service| service.internal_local = false),
                with(&|service| service.external_local = false),
                with(&|service| service.sparse = false),
            ]);
        }
        all.retain(|case| case != self);
        all
    }
}

/// Which of a Service's addresses a packet goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Frontend {
    Cluster,
    /// A port of the cluster address that the Service has not.
    WrongPort,
    /// The node port at one of the node's addresses.
    NodePort(u8),
    /// The node port at the loopback address, which no packet from elsewhere has.
    LoopbackPort,
    Balancer,
    External,
}

/// The first packet of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probe {
    /// The family, as the number of the ground.
    pub ground: usize,
    /// The Service, as its place in the case, and its port likewise.
    pub service: usize,
    pub port: usize,
    pub transport: Transport,
    pub source: Source,
    pub frontend: Frontend,
    pub to: std::net::SocketAddr,
}
