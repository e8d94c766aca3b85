//! Which node announces an address. Pure: every node that knows the same comes to the same answer, without talking.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::num::NonZeroU64;
use std::sync::Arc;

use ipnet::IpNet;

/// A node's name in eight bytes: there are as many of them as endpoints.
pub type NodeId = NonZeroU64;

pub fn node_id(name: &str) -> NodeId {
    NonZeroU64::new(hash(&[name.as_bytes()])).unwrap_or(NonZeroU64::MIN)
}

fn hash(parts: &[&[u8]]) -> u64 {
    let bytes = parts.iter().flat_map(|part| part.iter().copied().chain([0]));
    let mixed = bytes
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    // The last bytes alone would not reach the upper bits, by which nodes are ranked.
    let mixed = (mixed ^ (mixed >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    mixed ^ (mixed >> 33)
}

/// A node that may announce.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    pub name: Arc<str>,
    pub internal: Vec<IpAddr>,
}

/// All that the election depends on beside who is alive.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct World {
    /// The addresses to be announced, with the nodes that may where not all may.
    pub addresses: BTreeMap<IpAddr, Option<BTreeSet<NodeId>>>,
    pub nodes: Vec<Candidate>,
}

/// The nodes that may announce an address on the segment of `network`, the best first.
pub fn ranked(world: &World, address: IpAddr, network: IpNet) -> Vec<&Candidate> {
    let only = world.addresses.get(&address).and_then(Option::as_ref);
    let may = |node: &&Candidate| {
        node.internal.iter().any(|one| network.contains(one))
            && only.is_none_or(|only| only.contains(&node_id(&node.name)))
    };
    let mut nodes: Vec<&Candidate> = world.nodes.iter().filter(may).collect();
    let bytes = oarlock_netlink::wire::address_bytes(address);
    nodes.sort_by_cached_key(|node| (hash(&[&bytes, node.name.as_bytes()]), node.name.clone()));
    nodes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn world(names: &[&str]) -> World {
        let node = |(number, name): (usize, &&str)| Candidate {
            name: (*name).into(),
            internal: vec![IpAddr::from([192, 168, 0, number as u8 + 1])],
        };
        let addresses = (0..200).map(|last| (IpAddr::from([192, 168, 0, last]), None)).collect();
        World { addresses, nodes: names.iter().enumerate().map(node).collect() }
    }

    fn owners(world: &World) -> Vec<Arc<str>> {
        let network = "192.168.0.0/24".parse().unwrap();
        world.addresses.keys().map(|address| ranked(world, *address, network)[0].name.clone()).collect()
    }

    #[test]
    fn addresses_are_spread_and_only_those_of_a_lost_node_move() {
        let all = owners(&world(&["a", "b", "c", "d"]));
        for name in ["a", "b", "c", "d"] {
            let share = all.iter().filter(|owner| owner.as_ref() == name).count();
            assert!((25..=75).contains(&share), "{name} has {share} of 200");
        }
        let fewer = owners(&world(&["a", "b", "c"]));
        assert!(all.iter().zip(&fewer).all(|(before, after)| before == after || before.as_ref() == "d"));
    }

    #[test]
    fn only_nodes_of_the_segment_that_may_are_asked() {
        let mut world = world(&["a", "b", "c"]);
        world.nodes[0].internal = vec![IpAddr::from([10, 0, 0, 1])];
        let address = IpAddr::from([192, 168, 0, 9]);
        world.addresses.insert(address, Some([node_id("a"), node_id("c")].into()));
        let found = ranked(&world, address, "192.168.0.0/24".parse().unwrap());
        assert_eq!(found.iter().map(|node| node.name.as_ref()).collect::<Vec<_>>(), ["c"]);
    }
}
