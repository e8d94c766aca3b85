//! The way to other nodes' pods: through the node itself where it is on a network of ours, through WireGuard or VXLAN where
//! it is not.
//!
//! A node says by an annotation that it can be reached through WireGuard. Two nodes use it when both say so, which both know
//! from the API, so they come to the same answer. Where VXLAN may be used too it carries until the other end has answered,
//! so a firewall in between costs nothing but the encryption.
//!
//! One VXLAN device for each address family, made only when some node needs it. It learns nothing: for each such node there
//! is a route to its pods through the first address of their network, a permanent neighbour that says which Ethernet
//! address that has, and a forwarding entry that says which node has the Ethernet address. That is made of the node's
//! name, so nodes need not tell each other. Everything is compared with what is there, and only differences are written.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::time::{Instant, SystemTime};

use ipnet::IpNet;
use oarlock_netlink::{Connection, Link, Mac, Neighbour, Protocol, Route, Vxlan, WireguardKey};
use tracing::warn;

use crate::config::Tunnel;
use crate::node::{Node, ROUTE_PROTOCOL};
use crate::wireguard::{self, Answers, Peer, WireguardError};

pub const DEVICES: [&str; 2] = ["oar-vxlan4", "oar-vxlan6"];
/// The network's number and the port, those that other cluster networks of this kind use.
const NETWORK: u32 = 4096;
const PORT: u16 = 8472;
/// What the outer headers take of a packet.
/// What links have where nobody says anything else.
const USUAL_MTU: u32 = 1500;
const OVERHEAD_IPV4_BYTES: u32 = 50;
const OVERHEAD_IPV6_BYTES: u32 = 70;

/// A node that is reached through VXLAN.
#[derive(Debug, Clone, PartialEq, Eq)]
struct VxlanWay {
    pods: IpNet,
    mac: Mac,
    node: IpAddr,
}

/// The ways to all other nodes' pods.
#[derive(Debug, Default, PartialEq, Eq)]
struct Ways {
    direct: Vec<Route>,
    tunnels: Vec<VxlanWay>,
    secure: Vec<Peer>,
}

/// This node as far as ways to others depend on it.
#[derive(Debug, Clone, Copy)]
pub struct Own<'a> {
    pub name: &'a str,
    pub node: Option<&'a Node>,
    pub tunnel: Tunnel,
    /// Where the key of WireGuard is kept.
    pub wireguard_key: Option<&'a Path>,
    /// Whether VXLAN devices stay that this node does not send through: others may do so still.
    pub keeps_vxlan: bool,
    /// The addresses of all pods of all nodes.
    pub cluster: &'a [IpNet],
}

/// The Ethernet address of a node's VXLAN device: locally administered, of the node's name.
fn mac_of(node: &str) -> Mac {
    let hash = node
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    let [_, _, _, a, b, c, d, e] = hash.to_be_bytes();
    Mac([0x0e, a, b, c, d, e])
}

/// Whether a network of this node is one that others know it by. Through another one it would find nodes near that do not
/// find it near: they would send into a tunnel, at whose other end nobody listens.
fn is_shared(net: IpNet, internal: &[IpAddr]) -> bool {
    let mut of_family = internal.iter().filter(|address| address.is_ipv4() == net.addr().is_ipv4()).peekable();
    of_family.peek().is_none() || of_family.any(|address| net.contains(address))
}

/// `answered` are the peers that have answered through WireGuard; none if this node cannot be reached through it, or others do
/// not know that yet.
fn plan(
    others: &BTreeMap<String, Node>,
    own_networks: &[(u32, IpNet)],
    tunnel: Tunnel,
    answered: Option<&[WireguardKey]>,
) -> Ways {
    let mut ways = Ways::default();
    let is_near = |address: &IpAddr| own_networks.iter().any(|(_, own)| own.contains(address));
    for (name, node) in others {
        let is_far = tunnel == Tunnel::Wireguard || !node.internal.iter().any(is_near);
        if let (true, Some(answered), Some(key), Some(address)) =
            (is_far, answered, node.wireguard_key, node.internal.first())
        {
            let carries = tunnel == Tunnel::Wireguard || answered.contains(&key);
            let pods = node.pod_cidrs.iter().map(IpNet::trunc).collect();
            ways.secure.push(Peer { key, node: *address, pods, carries });
            if carries {
                continue;
            }
        }
        if tunnel == Tunnel::Wireguard {
            // Its key will come; until then nothing goes there in plain sight.
            continue;
        }
        for net in &node.pod_cidrs {
            let of_family = || node.internal.iter().filter(|address| address.is_ipv4() == net.addr().is_ipv4());
            let near = of_family().find_map(|address| {
                own_networks.iter().find(|(_, own)| own.contains(address)).map(|(link, _)| (*link, *address))
            });
            match (near, of_family().next()) {
                (Some((link, gateway)), _) => {
                    let route = Route::new(net.trunc(), Some(gateway), link);
                    ways.direct.push(Route { protocol: ROUTE_PROTOCOL, ..route });
                }
                (None, Some(address)) => {
                    ways.tunnels.push(VxlanWay { pods: net.trunc(), mac: mac_of(name), node: *address });
                }
                // A node without an address of the family has no way to its pods of that family.
                (None, None) => {}
            }
        }
    }
    ways.direct.sort_by_key(|route| (route.destination, route.gateway));
    ways
}

/// What was done, and what pods have to know.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Synced {
    pub changed: usize,
    /// The largest packet, in bytes, that pods may send; 0 for the usual.
    pub mtu: u32,
    /// What the annotation of this node has to say, as long as somebody could need it.
    pub wireguard_key: Option<WireguardKey>,
    /// Peers that packets go to through WireGuard.
    pub secure: usize,
    /// Peers that have not answered through WireGuard yet, so that packets go another way.
    pub called: usize,
}

/// Makes our routes in the kernel the wanted ones. `own` is this node, by name.
pub fn sync(own: Own<'_>, others: &BTreeMap<String, Node>, answers: &mut Answers) -> Result<Synced, WireguardError> {
    let mut connection = Connection::open(Protocol::Route)?;
    let ours = |link: &Link| crate::node::is_cluster_link(&link.name);
    let devices: Vec<u32> = connection.links()?.iter().filter(|link| ours(link)).map(|link| link.index).collect();
    let addresses = connection.addresses()?;
    let networks = addresses
        .iter()
        .filter(|address| !devices.contains(&address.link) && address.net.prefix_len() < address.net.max_prefix_len())
        .map(|address| (address.link, address.net));
    let internal = own.node.map(|node| node.internal.as_slice()).unwrap_or_default();
    let networks: Vec<(u32, IpNet)> = networks.filter(|(_, net)| is_shared(*net, internal)).collect();
    let is_own = |node: &Node| node.internal.iter().any(|one| addresses.iter().any(|own| own.net.addr() == *one));
    let foreign: BTreeMap<String, Node> =
        others.iter().filter(|(_, node)| !is_own(node)).map(|(name, node)| (name.clone(), node.clone())).collect();
    let mut synced = Synced::default();
    let is_near = |node: &Node| node.internal.iter().any(|one| networks.iter().any(|(_, net)| net.contains(one)));
    let needs_wireguard = match own.tunnel {
        Tunnel::Vxlan | Tunnel::None => false,
        Tunnel::Wireguard => !foreign.is_empty(),
        Tunnel::Auto => foreign.values().any(|node| !is_near(node)),
    };
    let mut device = None;
    if let Some(key_file) = own.wireguard_key.filter(|_| needs_wireguard) {
        device = wireguard::ensure(&mut connection, key_file)?;
    }
    synced.wireguard_key = device.as_ref().map(|device| device.key);
    let announced = own.node.and_then(|node| node.wireguard_key);
    let device = device.filter(|device| announced == Some(device.key));
    let clock = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let answered = device.map(|device| answers.of(&device.handshakes, Instant::now(), clock));
    let ways = plan(&foreign, &networks, own.tunnel, answered.as_deref());
    synced.secure = ways.secure.iter().filter(|peer| peer.carries).count();
    synced.called = ways.secure.len() - synced.secure;
    let mut wanted = ways.direct;
    let mut devices_kept = Vec::new();
    if synced.wireguard_key.is_some() {
        wanted.extend(sync_wireguard(&mut connection, own, &ways.secure, &mut synced)?);
    } else {
        wireguard::remove(&mut connection)?;
    }
    for is_ipv4 in [true, false] {
        let tunnels: Vec<&VxlanWay> = ways.tunnels.iter().filter(|one| one.pods.addr().is_ipv4() == is_ipv4).collect();
        let name = DEVICES[usize::from(!is_ipv4)];
        let is_needed = !tunnels.is_empty() || (own.keeps_vxlan && connection.link(name)?.is_some());
        let own = (own.name, own.node);
        let Some((device, mtu)) = ensure_device(&mut connection, name, own, is_ipv4, is_needed)? else {
            continue;
        };
        take_from_anywhere(name);
        synced.mtu = if synced.mtu == 0 { mtu } else { synced.mtu.min(mtu) };
        synced.changed += add_entries(&mut connection, device, &tunnels)?;
        wanted.extend(tunnels.iter().map(|tunnel| {
            let route = Route::new(tunnel.pods, Some(tunnel.pods.network()), device);
            Route { protocol: ROUTE_PROTOCOL, on_link: true, ..route }
        }));
        devices_kept.push((device, tunnels));
    }
    // What the old way needs stays until there is the new one.
    synced.changed += sync_routes(&mut connection, &wanted)?;
    for (device, tunnels) in devices_kept {
        synced.changed += remove_entries(&mut connection, device, &tunnels)?;
    }
    synced.changed += sync_unreachable(&mut connection, &nowhere(own, &foreign))?;
    synced.mtu = match (synced.mtu, underlay_mtu(&mut connection, internal)?) {
        (0, Some(mtu)) if mtu != USUAL_MTU => mtu,
        (tunnel, _) => tunnel,
    };
    Ok(synced)
}

/// The networks that no route but those to nodes' pods leads to: what is for pods of a node that is gone, or cannot be reached
/// as it should be, must not go to the world by the default route. Not where nodes themselves have such addresses.
fn nowhere(own: Own<'_>, others: &BTreeMap<String, Node>) -> Vec<IpNet> {
    if own.tunnel == Tunnel::None {
        return Vec::new();
    }
    let nodes = || own.node.into_iter().chain(others.values()).flat_map(|node| &node.internal);
    own.cluster.iter().filter(|net| !nodes().any(|address| net.contains(address))).map(IpNet::trunc).collect()
}

fn sync_unreachable(connection: &mut Connection, wanted: &[IpNet]) -> oarlock_netlink::Result<usize> {
    let existing = connection.unreachable(ROUTE_PROTOCOL)?;
    let (stale, new) =
        (existing.iter().filter(|net| !wanted.contains(net)), wanted.iter().filter(|net| !existing.contains(net)));
    let changed = stale.clone().count() + new.clone().count();
    stale.into_iter().try_for_each(|net| connection.remove_unreachable(*net, ROUTE_PROTOCOL))?;
    new.into_iter().try_for_each(|net| connection.ensure_unreachable(*net, ROUTE_PROTOCOL))?;
    Ok(changed)
}

/// The largest packet on the link that has the node's address; none where that is loopback, or not there.
fn underlay_mtu(connection: &mut Connection, internal: &[IpAddr]) -> oarlock_netlink::Result<Option<u32>> {
    let addresses = connection.addresses()?;
    let of_node = |address: &&oarlock_netlink::Address| internal.contains(&address.net.addr());
    let Some(own) = addresses.iter().find(of_node).filter(|own| !own.net.addr().is_loopback()) else { return Ok(None) };
    let link = connection.link_by_index(own.link)?;
    Ok(link.filter(|link| link.name != "lo").map(|link| link.mtu))
}

/// While two nodes change over from one tunnel to another, what comes by the old one would be answered by the new one. Hosts
/// that take packets only from where they would answer to would drop it.
fn take_from_anywhere(device: &str) {
    const LOOSE: &str = "2";
    let settings = Path::new("/proc/sys/net/ipv4/conf");
    let path = settings.join(device).join("rp_filter");
    // The larger of the device's and of the one for all holds.
    let of = |path: &Path| fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u8>().ok());
    let is_strict = of(&path).max(of(&settings.join("all/rp_filter"))) == Some(1);
    if is_strict && let Err(error) = fs::write(&path, LOOSE) {
        warn!(device, error = &error as &dyn std::error::Error, "packets may be lost while tunnels change");
    }
}

/// The peers, and the routes to their pods.
fn sync_wireguard(
    connection: &mut Connection,
    own: Own<'_>,
    peers: &[Peer],
    synced: &mut Synced,
) -> oarlock_netlink::Result<Vec<Route>> {
    let internal = own.node.map(|node| node.internal.as_slice()).unwrap_or_default();
    let addresses = connection.addresses()?;
    let underlay = addresses.iter().find(|address| internal.contains(&address.net.addr())).map(|address| address.link);
    let link = underlay.map(|index| connection.link_by_index(index)).transpose()?.flatten();
    let underlay_mtu = link.map_or(1500, |link| link.mtu);
    // What the node itself sends to pods there comes from an address that its peers take.
    let pods = own.node.map(|node| node.pod_cidrs.as_slice()).unwrap_or_default();
    let own_addresses: Vec<IpNet> = pods.iter().map(|net| IpNet::from(net.network())).collect();
    take_from_anywhere(wireguard::DEVICE);
    let (device, mtu, changed) = wireguard::sync(connection, peers, &own_addresses, underlay_mtu)?;
    synced.changed += changed;
    if !peers.is_empty() {
        synced.mtu = mtu;
    }
    let nets = peers.iter().filter(|peer| peer.carries).flat_map(|peer| &peer.pods);
    let route = |net: &IpNet| Route { protocol: ROUTE_PROTOCOL, ..Route::new(*net, None, device) };
    Ok(nets.map(route).collect())
}

/// The device and the largest packet through it; deleted when nobody needs it. One that was made for another address of
/// this node is made again.
fn ensure_device(
    connection: &mut Connection,
    name: &str,
    (node_name, own): (&str, Option<&Node>),
    is_ipv4: bool,
    needed: bool,
) -> oarlock_netlink::Result<Option<(u32, u32)>> {
    let addresses = connection.addresses()?;
    let of_family = |address: &&IpAddr| address.is_ipv4() == is_ipv4;
    let local = own.and_then(|own| own.internal.iter().find(of_family)).copied();
    let pods = own.and_then(|own| own.pod_cidrs.iter().find(|net| net.addr().is_ipv4() == is_ipv4)).copied();
    let underlay = addresses.iter().find(|address| Some(address.net.addr()) == local).map(|address| address.link);
    let existing = connection.link(name)?;
    let (Some(local), Some(pods), Some(underlay), true) = (local, pods, underlay, needed) else {
        if let Some(link) = existing {
            connection.delete_link(link.index)?;
        }
        return Ok(None);
    };
    let underlay_mtu = connection.link_by_index(underlay)?.map_or(1500, |link| link.mtu);
    let overhead = if is_ipv4 { OVERHEAD_IPV4_BYTES } else { OVERHEAD_IPV6_BYTES };
    let mtu = underlay_mtu.saturating_sub(overhead);
    let own_address = IpNet::from(pods.network());
    let fits = |link: &Link| {
        let has = |address: &oarlock_netlink::Address| address.link == link.index && address.net == own_address;
        link.up
            && link.mtu == mtu
            && link.mac == Some(mac_of(node_name))
            && link.local == Some(local)
            && addresses.iter().any(has)
    };
    if let Some(link) = &existing {
        if fits(link) {
            return Ok(Some((link.index, mtu)));
        }
        connection.delete_link(link.index)?;
    }
    connection.create_vxlan(&Vxlan { name, mac: mac_of(node_name), id: NETWORK, local, port: PORT, mtu })?;
    let link = connection.require_link(name)?;
    connection.ensure_address(link.index, own_address)?;
    Ok(Some((link.index, mtu)))
}

/// Forwarding entries and neighbours of the device that are missing; says how many there were.
fn add_entries(connection: &mut Connection, device: u32, tunnels: &[&VxlanWay]) -> oarlock_netlink::Result<usize> {
    let mut changed = 0;
    let existing = connection.forwarding(device)?;
    for tunnel in tunnels.iter().filter(|one| !existing.contains(&(one.mac, one.node))) {
        connection.set_forwarding(device, tunnel.mac, tunnel.node)?;
        changed += 1;
    }
    let known = permanent_neighbours(connection, device)?;
    for new in tunnels.iter().map(|tunnel| neighbour(device, tunnel)).filter(|one| !known.contains(one)) {
        connection.set_neighbour(&new)?;
        changed += 1;
    }
    Ok(changed)
}

/// Takes away those that no way needs; says how many there were.
fn remove_entries(connection: &mut Connection, device: u32, tunnels: &[&VxlanWay]) -> oarlock_netlink::Result<usize> {
    let mut changed = 0;
    let existing = connection.forwarding(device)?;
    for (mac, address) in existing.iter().filter(|entry| !tunnels.iter().any(|one| (one.mac, one.node) == **entry)) {
        connection.delete_forwarding(device, *mac, *address)?;
        changed += 1;
    }
    let wanted: Vec<Neighbour> = tunnels.iter().map(|tunnel| neighbour(device, tunnel)).collect();
    let known = permanent_neighbours(connection, device)?;
    for stale in known.iter().filter(|one| !wanted.contains(one) && !one.address.is_multicast()) {
        connection.delete_neighbour(stale)?;
        changed += 1;
    }
    Ok(changed)
}

fn neighbour(device: u32, tunnel: &VxlanWay) -> Neighbour {
    Neighbour { link: device, address: tunnel.pods.network(), mac: Some(tunnel.mac), permanent: true }
}

fn permanent_neighbours(connection: &mut Connection, device: u32) -> oarlock_netlink::Result<Vec<Neighbour>> {
    Ok(connection.neighbours()?.into_iter().filter(|one| one.link == device && one.permanent).collect())
}

fn sync_routes(connection: &mut Connection, wanted: &[Route]) -> oarlock_netlink::Result<usize> {
    let secure = connection.link(wireguard::DEVICE)?.map(|link| link.index);
    let ours =
        |route: &Route| route.protocol == ROUTE_PROTOCOL && (route.gateway.is_some() || Some(route.link) == secure);
    let existing: Vec<Route> = connection.routes()?.into_iter().filter(ours).collect();
    let same = |a: &Route, b: &Route| (a.destination, a.gateway, a.link) == (b.destination, b.gateway, b.link);
    let mut changed = 0;
    // One to the same pods is replaced as a whole, but not in IPv6, where the kernel takes no gateway that another device's
    // route leads to.
    let is_replaced = |route: &Route| {
        route.destination.addr().is_ipv4() && wanted.iter().any(|one| one.destination == route.destination)
    };
    for route in existing.iter().filter(|route| !wanted.iter().any(|one| same(one, route)) && !is_replaced(route)) {
        connection.delete_route(route)?;
        changed += 1;
    }
    for route in wanted.iter().filter(|route| !existing.iter().any(|one| same(one, route))) {
        connection.replace_route(route)?;
        changed += 1;
    }
    Ok(changed)
}

/// Takes the devices away, with all that is theirs.
pub fn remove(connection: &mut Connection) -> oarlock_netlink::Result<()> {
    wireguard::remove(connection)?;
    sync_unreachable(connection, &[])?;
    DEVICES.iter().try_for_each(|name| connection.delete_link_by_name(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn node(pods: &[&str], internal: &[&str]) -> Node {
        Node {
            pod_cidrs: pods.iter().map(|text| net(text)).collect(),
            internal: internal.iter().map(|text| text.parse().unwrap()).collect(),
            zone: None,
            takes_traffic: true,
            wireguard_key: None,
            leaving: false,
        }
    }

    #[test]
    fn near_nodes_are_gateways_and_far_ones_are_tunnelled_to() {
        let others = BTreeMap::from([
            ("near".to_owned(), node(&["10.42.1.0/24", "fd42:0:0:1::/64"], &["192.168.0.2"])),
            ("far".to_owned(), node(&["10.42.2.0/24"], &["172.16.0.2"])),
        ]);
        let ways = plan(&others, &[(2, net("192.168.0.1/24"))], Tunnel::Auto, Some(&[]));
        assert_eq!(ways.direct.len(), 1, "the near node has no IPv6 address");
        let route = &ways.direct[0];
        assert_eq!((route.destination, route.link), (net("10.42.1.0/24"), 2));
        assert_eq!(route.gateway, Some("192.168.0.2".parse().unwrap()));
        let tunnel = VxlanWay { pods: net("10.42.2.0/24"), mac: mac_of("far"), node: "172.16.0.2".parse().unwrap() };
        assert_eq!(ways.tunnels, [tunnel]);
    }

    #[test]
    fn nodes_with_keys_are_reached_through_wireguard_once_they_know_this_ones_and_answer() {
        let with_key = |node: Node, last: u8| Node { wireguard_key: Some([last; 32]), ..node };
        let others = BTreeMap::from([
            ("near".to_owned(), with_key(node(&["10.42.1.0/24"], &["192.168.0.2"]), 1)),
            ("far".to_owned(), with_key(node(&["10.42.2.0/24"], &["172.16.0.2"]), 2)),
            ("old".to_owned(), node(&["10.42.3.0/24"], &["172.16.0.3"])),
        ]);
        let own = [(2, net("192.168.0.1/24"))];
        let counts = |tunnel, answered: Option<&[WireguardKey]>| {
            let ways = plan(&others, &own, tunnel, answered);
            let secure = ways.secure.iter().map(|peer| (peer.key[0], peer.carries)).collect::<Vec<_>>();
            (ways.direct.len(), ways.tunnels.len(), secure)
        };
        assert_eq!(counts(Tunnel::Auto, Some(&[])), (1, 2, vec![(2, false)]), "it has not answered");
        assert_eq!(counts(Tunnel::Auto, Some(&[[2; 32]])), (1, 1, vec![(2, true)]));
        assert_eq!(counts(Tunnel::Auto, None), (1, 2, vec![]));
        assert_eq!(counts(Tunnel::Vxlan, None), (1, 2, vec![]));
        let both = vec![(2, true), (1, true)];
        assert_eq!(counts(Tunnel::Wireguard, Some(&[])), (0, 0, both), "and never in plain sight");
        assert_eq!(counts(Tunnel::Wireguard, None), (0, 0, vec![]));
    }

    #[test]
    fn only_networks_that_others_know_this_node_by_make_nodes_near() {
        let internal: Vec<IpAddr> = vec!["192.168.0.1".parse().unwrap()];
        assert!(is_shared(net("192.168.0.1/24"), &internal));
        assert!(!is_shared(net("172.16.0.1/24"), &internal), "the node's second link");
        assert!(is_shared(net("fd07::1/64"), &internal), "a family in which others do not know it");
        assert!(is_shared(net("172.16.0.1/24"), &[]));
    }

    #[test]
    fn ethernet_addresses_are_local_unicast_and_differ_by_name() {
        assert_ne!(mac_of("a"), mac_of("b"));
        assert_eq!(mac_of("a").0[0] & 3, 2);
    }
}
