//! What the policies mean in nftables, for the pods of this node in one address family. Pure.
//!
//! Two chains look at forwarded packets, one for the sender's policies and one for the receiver's. Each looks up the pod in
//! a verdict map. A pod that no policy isolates is not there. For the others it leads to a chain that tries the chains of
//! the pod's policies, in which whatever matches is accepted, and then drops. Pods that share their policies share that
//! chain. Peers are sets of addresses, shared by all rules with the same selectors; a pod that comes or goes is one element
//! of each set that it is in. Named ports are sets of address and port.
//!
//! While there are policies, addresses of this node's pods that belong to no pod that is known yet are cut off, so that a
//! pod is isolated before it runs.
//!
//! What is here is how all of that looks. Which of it there has to be is kept by `index`.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use oarlock_nft::{
    Bytes, Chain, ChainKind, Command, CtKey, Element, Expr, Field, HookPoint, Key, MetaKey, Reg, Rule, Set, Verdict,
};
use sha2::{Digest, Sha256};

use super::index::Touched;
use super::objects::{Group, Name, Peer, Policy, PortMatch, Rule as PolicyRule};
use crate::packet::{Header, in_net, load_port};
use crate::service::Protocol;

const INGRESS: &str = "ingress";
const EGRESS: &str = "egress";
/// The addresses of this node's pods that are known.
pub const KNOWN: &str = "known";
/// The same addresses, each twice: a pod reaches itself.
pub const ITSELF: &str = "itself";
/// After routing decisions of the Service proxy, before most filters.
const EGRESS_PRIORITY: i32 = -20;
const INGRESS_PRIORITY: i32 = -19;

/// A set with its elements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Members {
    pub fields: Vec<Field>,
    pub elements: BTreeSet<Bytes>,
}

/// A chain's rules, with a comment for the first.
pub type Content = (String, Vec<Vec<Expr>>);

/// What the table should hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Desired {
    pub sets: BTreeMap<String, Members>,
    pub chains: BTreeMap<String, Content>,
    /// The chain of each isolated pod, by direction.
    pub maps: [BTreeMap<Bytes, String>; 2],
}

impl Desired {
    /// Becomes what `other` is where it was touched.
    pub fn copy(&mut self, other: &Desired, touched: &Touched) {
        for (name, keys) in &touched.sets {
            match (self.sets.get_mut(name), other.sets.get(name)) {
                (_, None) => drop(self.sets.remove(name)),
                (None, Some(members)) => drop(self.sets.insert(name.clone(), members.clone())),
                (Some(own), Some(members)) => keys.iter().for_each(|key| {
                    if members.elements.contains(key) {
                        own.elements.insert(*key);
                    } else {
                        own.elements.remove(key);
                    }
                }),
            }
        }
        for name in &touched.chains {
            match other.chains.get(name) {
                Some(content) => drop(self.chains.insert(name.clone(), content.clone())),
                None => drop(self.chains.remove(name)),
            }
        }
        for (index, keys) in touched.maps.iter().enumerate() {
            for key in keys {
                match other.maps[index].get(key) {
                    Some(chain) => drop(self.maps[index].insert(*key, chain.clone())),
                    None => drop(self.maps[index].remove(key)),
                }
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    Ingress = 0,
    Egress = 1,
}

impl Direction {
    pub const BOTH: [Direction; 2] = [Direction::Ingress, Direction::Egress];

    /// The rules of a policy, if it is about the direction.
    pub fn rules(self, policy: &Policy) -> Option<&[PolicyRule]> {
        match self {
            Direction::Ingress => policy.ingress.as_deref(),
            Direction::Egress => policy.egress.as_deref(),
        }
    }

    /// Of the base chain and of its map.
    pub fn name(self) -> &'static str {
        if self == Direction::Ingress { INGRESS } else { EGRESS }
    }

    /// The chain of a policy.
    pub fn policy_chain(self, policy: &Name) -> String {
        format!("{}-{}", self.name(), short_hash(policy))
    }

    /// The chain of the pods that these policies are about.
    pub fn pods_chain(self, policies: &[Name]) -> String {
        format!("{}-pods-{}", self.name(), short_hash(&policies.iter().collect::<Vec<_>>()))
    }

    /// Tries each of the policies, and drops what none lets through.
    pub fn pods_content(self, policies: &[Name]) -> Content {
        let comment: Vec<String> = policies.iter().map(|name| format!("{}/{}", name.0, name.1)).collect();
        let jump = |name| vec![Expr::Verdict(Verdict::Jump(self.policy_chain(name)))];
        let rules = policies.iter().map(jump).chain([vec![Expr::Verdict(Verdict::Drop)]]).collect();
        (comment.join(" "), rules)
    }
}

/// The sets, maps and base chains that are there whatever the policies say.
pub fn foundation(is_ipv4: bool) -> Vec<Command> {
    let address = Header::of(is_ipv4).address();
    let base = |name, priority| Command::AddChain(Chain::base(name, ChainKind::Filter, HookPoint::Forward, priority));
    vec![
        Command::AddSet(Set::verdict_map(INGRESS, &[address])),
        Command::AddSet(Set::verdict_map(EGRESS, &[address])),
        base(EGRESS, EGRESS_PRIORITY),
        base(INGRESS, INGRESS_PRIORITY),
    ]
}

/// A chain's rules as commands.
pub fn rules(chain: &str, (comment, rules): &Content) -> Vec<Command> {
    let rule = |(index, expressions): (usize, &Vec<Expr>)| {
        let rule = Rule::new(chain, expressions.clone());
        Command::AddRule(if index == 0 && !comment.is_empty() { rule.comment(comment.clone()) } else { rule })
    };
    rules.iter().enumerate().map(rule).collect()
}

pub fn map_element(pod: &Bytes, chain: &str) -> Element {
    Element::verdict(*pod, Verdict::Goto(chain.to_owned()))
}

/// A short name for anything, the same at every start.
fn short_hash(parts: &impl std::fmt::Debug) -> String {
    // Users choose these names, and none of them is to find one that stands for another's.
    let hash = Sha256::digest(format!("{parts:?}"));
    hash.iter().take(16).fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

/// The set of the addresses of a group of pods, of all nodes.
pub fn group_set(group: &Group) -> String {
    format!("peers-{}", short_hash(group))
}

/// The set of address and port of every pod that has a port of that name.
pub fn ports_set(protocol: Protocol, port: &str) -> String {
    format!("ports-{}", short_hash(&(protocol, port)))
}

/// The rules of a policy's chain.
pub fn policy_content(family: Header, direction: Direction, name: &Name, policy: &Policy) -> Content {
    let mut rules = Vec::new();
    for rule in direction.rules(policy).unwrap_or_default() {
        let peers = match &rule.peers {
            None => vec![Vec::new()],
            Some(peers) => peers.iter().filter_map(|one| peer(family, one, direction)).collect(),
        };
        let ports = match &rule.ports {
            None => vec![Vec::new()],
            Some(ports) => ports.iter().map(|one| port(family, one)).collect(),
        };
        for peer in &peers {
            for port in &ports {
                rules.push([peer.as_slice(), port, &[Expr::Verdict(Verdict::Accept)]].concat());
            }
        }
    }
    (format!("{}/{}", name.0, name.1), rules)
}

/// Goes on when the other end is the peer; nothing for networks of the other family, which no packet here is from.
fn peer(family: Header, peer: &Peer, direction: Direction) -> Option<Vec<Expr>> {
    let load = match direction {
        Direction::Ingress => family.load_source(0),
        Direction::Egress => family.load_destination(0),
    };
    match peer {
        Peer::Pods(group) => Some(vec![load, Expr::InSet { set: group_set(group), key: Reg(0), inverted: false }]),
        Peer::Block { net, .. } if net.addr().is_ipv4() != family.is_ipv4() => None,
        Peer::Block { net, except } => {
            let mut expressions = in_net(load.clone(), *net, true);
            for part in except.iter().filter(|part| part.addr().is_ipv4() == family.is_ipv4()) {
                expressions.extend(in_net(load.clone(), *part, false));
            }
            Some(expressions)
        }
    }
}

/// Goes on when the packet is for the port.
fn port(family: Header, port: &PortMatch) -> Vec<Expr> {
    let of = |protocol: Protocol| {
        vec![
            Expr::LoadMeta { key: MetaKey::L4Protocol, to: Reg(0) },
            Expr::Compare { register: Reg(0), equal: true, value: vec![protocol.0] },
        ]
    };
    match port {
        PortMatch::Any(protocol) => of(*protocol),
        PortMatch::Range(protocol, first, last) if first == last => {
            let value = first.to_be_bytes().to_vec();
            let is_port = Expr::Compare { register: Reg(0), equal: true, value };
            [of(*protocol), vec![load_port(0), is_port]].concat()
        }
        PortMatch::Range(protocol, first, last) => {
            let (first, last) = (first.to_be_bytes().to_vec(), last.to_be_bytes().to_vec());
            [of(*protocol), vec![load_port(0), Expr::Between { register: Reg(0), first, last }]].concat()
        }
        PortMatch::Named(protocol, name) => {
            let find = Expr::InSet { set: ports_set(*protocol, name), key: Reg(0), inverted: false };
            [of(*protocol), vec![family.load_destination(0), load_port(family.width()), find]].concat()
        }
    }
}

/// The rules of a base chain; `cidrs` are those of this node's pods in the family.
pub fn base_content(family: Header, direction: Direction, cidrs: &[IpNet]) -> Content {
    // Bits of the connection's state: established, related, and untracked, as neighbour discovery is.
    const GOING_ON: u32 = 2 | 4 | 64;
    let load = |to| match direction {
        Direction::Ingress => family.load_destination(to),
        Direction::Egress => family.load_source(to),
    };
    let going_on = vec![
        Expr::LoadCt { key: CtKey::State, to: Reg(0) },
        Expr::Bitwise { register: Reg(0), mask: GOING_ON.to_ne_bytes().to_vec(), xor: vec![0; 4] },
        Expr::Compare { register: Reg(0), equal: false, value: vec![0; 4] },
        Expr::Verdict(Verdict::Accept),
    ];
    let itself = vec![
        family.load_source(0),
        family.load_destination(family.width()),
        Expr::InSet { set: ITSELF.to_owned(), key: Reg(0), inverted: false },
        Expr::Verdict(Verdict::Accept),
    ];
    let isolated = vec![load(0), Expr::VerdictMap { map: direction.name().to_owned(), key: Reg(0) }];
    let mut rules = vec![going_on, itself, isolated];
    for net in cidrs {
        let unknown = vec![
            load(0),
            Expr::InSet { set: KNOWN.to_owned(), key: Reg(0), inverted: true },
            Expr::Verdict(Verdict::Drop),
        ];
        rules.push([in_net(load(0), *net, true), unknown].concat());
    }
    (String::new(), rules)
}

/// The keys of a pod's address in `known` and `itself`.
pub fn own_keys(address: std::net::IpAddr) -> [(&'static str, Bytes); 2] {
    [(KNOWN, Key::single(address)), (ITSELF, Key::new().address(address).address(address).bytes())]
}
