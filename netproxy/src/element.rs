//! Elements of the table's maps, small and without nftables' byte layout: which map, which key, what it leads to. Pure.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::service::Protocol;

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
    Guarded,
    Sources,
}

impl Map {
    pub const ALL: [Map; 15] = [
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
        Map::Guarded,
        Map::Sources,
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
            Map::Guarded => "guarded",
            Map::Sources => "sources",
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
/// The start of the names of chains that look whether a source is allowed.
const FROM: &str = "from-";

/// A chain that comes and goes with the elements that lead to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dynamic {
    Balance(Balancer),
    /// Remembers for so many seconds which endpoint a client got.
    Remember(u32),
    /// Lets only allowed sources pass.
    Guard(Lengths),
}

impl Dynamic {
    /// The number by which elements name the chain, as far as they do: 2^28 and more.
    pub fn class(&self) -> Option<u32> {
        const KIND_SHIFT: u32 = 28;
        const AFFINITY: u32 = 1 << 27;
        const REMEMBER_KIND: u32 = 7;
        match self {
            Dynamic::Balance(one) => {
                let affinity = if one.affinity { AFFINITY } else { 0 };
                Some((one.scope as u32 + 1) << KIND_SHIFT | affinity | one.endpoints)
            }
            Dynamic::Remember(seconds) => Some(REMEMBER_KIND << KIND_SHIFT | *seconds),
            Dynamic::Guard(_) => None,
        }
    }

    pub fn chain(&self) -> String {
        match self {
            Dynamic::Balance(balancer) => balancer.chain(),
            Dynamic::Remember(seconds) => format!("{REMEMBER}{seconds}"),
            Dynamic::Guard(lengths) => {
                let texts: Vec<String> = lengths.iter().map(|length| length.to_string()).collect();
                format!("{FROM}{}", texts.join("-"))
            }
        }
    }

    /// The chain of a name, as far as [`Dynamic::chain`] made it.
    pub fn of_chain(name: &str) -> Option<Dynamic> {
        if let Some(seconds) = name.strip_prefix(REMEMBER) {
            return seconds.parse().ok().map(Dynamic::Remember);
        }
        if let Some(lengths) = name.strip_prefix(FROM) {
            let lengths: Option<Vec<u8>> = lengths.split('-').map(|length| length.parse().ok()).collect();
            return lengths.map(|lengths| Dynamic::Guard(Lengths::of(lengths)));
        }
        Balancer::of_chain(name).map(Dynamic::Balance)
    }
}

/// The prefix lengths, 1 to 128, of the networks in a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Lengths([u32; 4]);

impl Lengths {
    pub fn of(lengths: impl IntoIterator<Item = u8>) -> Lengths {
        let mut words = [0; 4];
        for bit in lengths.into_iter().map(|length| usize::from(length.clamp(1, 128)) - 1) {
            words[bit / 32] |= 1 << (bit % 32);
        }
        Lengths(words)
    }

    /// In rising order.
    pub fn iter(&self) -> impl Iterator<Item = u8> {
        let words = self.0;
        (0..128_u8).filter(move |bit| words[usize::from(bit / 32)] >> (bit % 32) & 1 == 1).map(|bit| bit + 1)
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

/// An address of either family in sixteen bytes: IPv4 as IPv6 writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Packed(Ipv6Addr);

impl Packed {
    pub const NONE: Packed = Packed(Ipv6Addr::UNSPECIFIED);

    pub fn address(self) -> IpAddr {
        self.0.to_canonical()
    }
}

impl From<IpAddr> for Packed {
    fn from(address: IpAddr) -> Packed {
        match address {
            IpAddr::V4(address) => Packed(address.to_ipv6_mapped()),
            IpAddr::V6(address) => Packed(address),
        }
    }
}

/// Which element of which map: the map and the fields of its keys, those that it has not being zero. Small, because a node
/// holds hundreds of thousands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ElementKey {
    pub map: Map,
    pub protocol: Protocol,
    pub port: u16,
    pub number: u32,
    pub address: Packed,
}

impl ElementKey {
    /// The frontend with an address, protocol and port in a map by address.
    pub fn by_address(map: Map, address: IpAddr, protocol: Protocol, port: u16) -> ElementKey {
        ElementKey { map, protocol, port, number: 0, address: address.into() }
    }

    /// The node port in a map by port.
    pub fn by_port(map: Map, protocol: Protocol, port: u16) -> ElementKey {
        ElementKey { map, protocol, port, number: 0, address: Packed::NONE }
    }

    /// The member of the hairpin set for a pod.
    pub fn hairpin(address: IpAddr) -> ElementKey {
        ElementKey { map: Map::Hairpin, protocol: Protocol(0), port: 0, number: 0, address: address.into() }
    }

    /// The same frontend's element with a number, in a map of numbered elements.
    #[must_use]
    pub fn numbered(self, map: Map, number: u32) -> ElementKey {
        ElementKey { map, number, ..self }
    }
}

/// What an element's key leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    Balance(Balancer),
    Remember(u32),
    Endpoint(Backend),
    Reject,
    Drop,
    /// An element of a set, which leads nowhere.
    Member,
    /// Only for sources that are listed, by networks of these lengths.
    Guard(Lengths),
    /// A network that is listed.
    Source(Packed, u8),
}

/// An address and port that connections are sent to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Backend {
    address: Packed,
    port: u16,
}

impl Backend {
    pub fn socket(self) -> SocketAddr {
        SocketAddr::new(self.address.address(), self.port)
    }
}

impl From<SocketAddr> for Backend {
    fn from(socket: SocketAddr) -> Backend {
        Backend { address: socket.ip().into(), port: socket.port() }
    }
}

impl Target {
    /// The chain that it leads to, if that comes and goes.
    pub fn dynamic(self) -> Option<Dynamic> {
        match self {
            Target::Balance(balancer) => Some(Dynamic::Balance(balancer)),
            Target::Remember(seconds) => Some(Dynamic::Remember(seconds)),
            Target::Guard(lengths) => Some(Dynamic::Guard(lengths)),
            _ => None,
        }
    }
}

/// An element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    pub key: ElementKey,
    pub target: Target,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_small() {
        assert_eq!((size_of::<ElementKey>(), size_of::<Entry>()), (24, 44));
    }

    #[test]
    fn every_chain_has_a_class_of_its_own() {
        let balance = |scope, endpoints, affinity| Dynamic::Balance(Balancer { scope, endpoints, affinity });
        let all: Vec<Dynamic> = Scope::ALL
            .into_iter()
            .flat_map(|scope| [balance(scope, 3, false), balance(scope, 3, true), balance(scope, 100_000, false)])
            .chain([Dynamic::Remember(3), Dynamic::Remember(86_400)])
            .collect();
        let classes: std::collections::HashSet<u32> = all.iter().filter_map(Dynamic::class).collect();
        assert_eq!(classes.len(), all.len());
        assert!(classes.iter().all(|class| *class >= 1 << 28));
    }

    #[test]
    fn the_names_of_chains_say_what_they_are() {
        let balancer = Balancer { scope: Scope::LocalNodePort, endpoints: 12, affinity: true };
        let guard = Dynamic::Guard(Lengths::of([24, 8, 128]));
        assert_eq!(guard.chain(), "from-8-24-128");
        for chain in [Dynamic::Balance(balancer), Dynamic::Remember(60), guard] {
            assert_eq!(Dynamic::of_chain(&chain.chain()), Some(chain));
        }
        assert_eq!(Dynamic::of_chain("from-x"), None);
    }

    #[test]
    fn addresses_of_both_families_are_packed_and_unpacked() {
        for text in ["10.42.0.7", "fd00:10:42::7"] {
            let address: IpAddr = text.parse().unwrap();
            assert_eq!(Packed::from(address).address(), address);
        }
    }
}
