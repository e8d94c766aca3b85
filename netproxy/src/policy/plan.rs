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

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;
use std::sync::Arc;

use ipnet::IpNet;
use oarlock_nft::{
    Bytes, Chain, ChainKind, Command, CtKey, Element, Expr, Field, HookPoint, Key, MetaKey, Reg, Rule, Set, Verdict,
};

use super::objects::{Group, Labels, Name, Namespaces, Peer, Pod, Policy, PortMatch, Rule as PolicyRule};
use crate::packet::{Header, in_net, load_port};
use crate::service::Protocol;

/// Everything that is known, as far as policies are concerned.
#[derive(Debug, Default)]
pub struct World {
    pub policies: BTreeMap<Name, Policy>,
    pub pods: HashMap<Name, Pod>,
    pub namespaces: HashMap<Arc<str>, Labels>,
}

const INGRESS: &str = "ingress";
const EGRESS: &str = "egress";
const KNOWN: &str = "known";
const OWN: &str = "itself";
/// After routing decisions of the Service proxy, before most filters.
const EGRESS_PRIORITY: i32 = -20;
const INGRESS_PRIORITY: i32 = -19;

/// A set with its elements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Members {
    pub fields: Vec<Field>,
    pub elements: BTreeSet<Bytes>,
}

/// What the table should hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Desired {
    pub sets: BTreeMap<String, Members>,
    /// The rules of each chain, with a comment for the first.
    pub chains: BTreeMap<String, (String, Vec<Vec<Expr>>)>,
    /// The chain of each isolated pod, in the maps `ingress` and `egress`.
    pub maps: [(&'static str, BTreeMap<Bytes, String>); 2],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Ingress,
    Egress,
}

impl Direction {
    fn rules(self, policy: &Policy) -> Option<&[PolicyRule]> {
        match self {
            Direction::Ingress => policy.ingress.as_deref(),
            Direction::Egress => policy.egress.as_deref(),
        }
    }

    fn name(self) -> &'static str {
        if self == Direction::Ingress { INGRESS } else { EGRESS }
    }
}

/// The plan for one family. `pod_cidrs` are those of this node.
pub fn plan(world: &World, is_ipv4: bool, pod_cidrs: &[IpNet]) -> Desired {
    let mut plan = Plan { world, family: Header::of(is_ipv4), desired: Desired::default() };
    let cidrs: Vec<IpNet> = pod_cidrs.iter().filter(|net| net.addr().is_ipv4() == is_ipv4).copied().collect();
    let local: Vec<&Pod> = world.pods.values().filter(|pod| pod.local).collect();
    let address = plan.family.address();
    for (name, fields) in [(KNOWN, vec![address]), (OWN, vec![address, address])] {
        plan.desired.sets.insert(name.to_owned(), Members { fields, elements: BTreeSet::new() });
    }
    for pod in &local {
        for ip in pod.addresses.iter().filter(|ip| ip.is_ipv4() == is_ipv4) {
            plan.add(KNOWN, Key::single(*ip));
            plan.add(OWN, Key::new().address(*ip).address(*ip).bytes());
        }
    }
    let maps = [Direction::Ingress, Direction::Egress].map(|direction| {
        let mut map = BTreeMap::new();
        for pod in &local {
            if let Some(chain) = plan.pod_chain(pod, direction) {
                let own = pod.addresses.iter().filter(|ip| ip.is_ipv4() == is_ipv4);
                map.extend(own.map(|ip| (Key::single(*ip), chain.clone())));
            }
        }
        (direction.name(), map)
    });
    plan.base_chain(Direction::Egress, &cidrs);
    plan.base_chain(Direction::Ingress, &cidrs);
    plan.desired.maps = maps;
    plan.desired
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
pub fn rules(chain: &str, (comment, rules): &(String, Vec<Vec<Expr>>)) -> Vec<Command> {
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
    let text = format!("{parts:?}");
    let hash = text
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    format!("{hash:016x}")
}

struct Plan<'a> {
    world: &'a World,
    family: Header,
    desired: Desired,
}

impl Plan<'_> {
    fn add(&mut self, set: &str, key: Bytes) {
        if let Some(members) = self.desired.sets.get_mut(set) {
            members.elements.insert(key);
        }
    }

    /// The chain for all policies about a pod in one direction; none when it is not isolated.
    fn pod_chain(&mut self, pod: &Pod, direction: Direction) -> Option<String> {
        let world = self.world;
        let about = world.policies.iter().filter(|((namespace, _), policy)| {
            **namespace == *pod.namespace && direction.rules(policy).is_some() && policy.pods.matches(&pod.labels)
        });
        let policies: Vec<(&Name, &Policy)> = about.collect();
        if policies.is_empty() {
            return None;
        }
        let names: Vec<&Name> = policies.iter().map(|(name, _)| *name).collect();
        let chain = format!("{}-pods-{}", direction.name(), short_hash(&names));
        if !self.desired.chains.contains_key(&chain) {
            let mut rules: Vec<Vec<Expr>> = Vec::new();
            let mut comment = String::new();
            for (name, policy) in &policies {
                let _ = write!(comment, "{}/{} ", name.0, name.1);
                rules.push(vec![Expr::Verdict(Verdict::Jump(self.policy_chain(name, policy, direction)))]);
            }
            rules.push(vec![Expr::Verdict(Verdict::Drop)]);
            self.desired.chains.insert(chain.clone(), (comment.trim_end().to_owned(), rules));
        }
        Some(chain)
    }

    fn policy_chain(&mut self, name: &Name, policy: &Policy, direction: Direction) -> String {
        let chain = format!("{}-{}", direction.name(), short_hash(name));
        if self.desired.chains.contains_key(&chain) {
            return chain;
        }
        let mut rules = Vec::new();
        for rule in direction.rules(policy).unwrap_or_default() {
            let peers = match &rule.peers {
                None => vec![Vec::new()],
                Some(peers) => peers.iter().filter_map(|peer| self.peer(peer, direction)).collect(),
            };
            let ports = match &rule.ports {
                None => vec![Vec::new()],
                Some(ports) => ports.iter().map(|port| self.port(port)).collect(),
            };
            for peer in &peers {
                for port in &ports {
                    rules.push([peer.as_slice(), port, &[Expr::Verdict(Verdict::Accept)]].concat());
                }
            }
        }
        self.desired.chains.insert(chain.clone(), (format!("{}/{}", name.0, name.1), rules));
        chain
    }

    /// Goes on when the other end is the peer; nothing for networks of the other family, which no packet here is from.
    fn peer(&mut self, peer: &Peer, direction: Direction) -> Option<Vec<Expr>> {
        let family = self.family;
        let load = match direction {
            Direction::Ingress => family.load_source(0),
            Direction::Egress => family.load_destination(0),
        };
        match peer {
            Peer::Pods(group) => {
                let set = self.group(group);
                Some(vec![load, Expr::InSet { set, key: Reg(0), inverted: false }])
            }
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

    /// The set of the addresses of a group of pods, of all nodes.
    fn group(&mut self, group: &Group) -> String {
        let name = format!("peers-{}", short_hash(group));
        if !self.desired.sets.contains_key(&name) {
            let world = self.world;
            let empty = Labels::new();
            let in_namespace = |pod: &Pod| match &group.namespaces {
                Namespaces::One(namespace) => *namespace == pod.namespace,
                Namespaces::Selected(selector) => {
                    selector.matches(world.namespaces.get(&pod.namespace).unwrap_or(&empty))
                }
            };
            let members = world.pods.values().filter(|pod| group.pods.matches(&pod.labels) && in_namespace(pod));
            let addresses = members.flat_map(|pod| &pod.addresses).filter(|ip| ip.is_ipv4() == self.family.is_ipv4());
            let elements = addresses.map(|ip| Key::single(*ip)).collect();
            self.desired.sets.insert(name.clone(), Members { fields: vec![self.family.address()], elements });
        }
        name
    }

    /// Goes on when the packet is for the port.
    fn port(&mut self, port: &PortMatch) -> Vec<Expr> {
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
                let set = self.named_ports(*protocol, name);
                let width = self.family.width();
                let find = Expr::InSet { set, key: Reg(0), inverted: false };
                [of(*protocol), vec![self.family.load_destination(0), load_port(width), find]].concat()
            }
        }
    }

    /// The set of address and port of every pod that has a port of that name.
    fn named_ports(&mut self, protocol: Protocol, port: &str) -> String {
        let name = format!("ports-{}", short_hash(&(protocol, port)));
        if !self.desired.sets.contains_key(&name) {
            let mut elements = BTreeSet::new();
            for pod in self.world.pods.values() {
                for (_, _, number) in pod.ports.iter().filter(|(found, of, _)| **found == *port && *of == protocol) {
                    let own = pod.addresses.iter().filter(|ip| ip.is_ipv4() == self.family.is_ipv4());
                    elements.extend(own.map(|ip| Key::new().address(*ip).port(*number).bytes()));
                }
            }
            let fields = vec![self.family.address(), Field::Port];
            self.desired.sets.insert(name.clone(), Members { fields, elements });
        }
        name
    }

    fn base_chain(&mut self, direction: Direction, cidrs: &[IpNet]) {
        // Bits of the connection's state: established, related, and untracked, as neighbour discovery is.
        const GOING_ON: u32 = 2 | 4 | 64;
        let family = self.family;
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
            Expr::InSet { set: OWN.to_owned(), key: Reg(0), inverted: false },
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
        self.desired.chains.insert(direction.name().to_owned(), (String::new(), rules));
    }
}
