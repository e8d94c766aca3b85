//! Everything that policies depend on, and what it means for this node, kept up to date change by change. Pure.
//!
//! A pod that comes, changes or goes is held against the policies of its namespace and against the peers that those rules
//! name which are in use here: never against all policies, and never all pods against anything. Only a policy that is new
//! here, with peers that no other has, looks at the pods; and only a namespace whose labels change at the pods in it.
//!
//! ```text
//!  pods of this node ──▶ chain of pods with the same policies ──▶ chains of policies ──▶ sets of peers, of named ports
//! ```
//!
//! What nothing on the left leads to any longer goes.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use oarlock_nft::{Bytes, Field, Key};

use super::objects::{Group, Labels, Name, Namespaces, Peer, Pod, Policy, PortMatch};
use super::plan::{self, Content, Desired, Direction, Members};
use crate::packet::Header;
use crate::service::Protocol;

/// One family's table as it should be, and where it has changed since it was last written.
#[derive(Debug)]
pub struct Side {
    family: Header,
    cidrs: Vec<IpNet>,
    pub desired: Desired,
    pub touched: Touched,
    /// How many more pods than one have an element: two have the same address for a moment.
    more: HashMap<(String, Bytes), usize>,
}

/// Names and keys that may have changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Touched {
    pub sets: BTreeMap<String, BTreeSet<Bytes>>,
    pub chains: BTreeSet<String>,
    pub maps: [BTreeSet<Bytes>; 2],
}

impl Touched {
    /// All that there is.
    pub fn all(desired: &Desired) -> Touched {
        Touched {
            sets: desired.sets.iter().map(|(name, members)| (name.clone(), members.elements.clone())).collect(),
            chains: desired.chains.keys().cloned().collect(),
            maps: [0, 1].map(|index| desired.maps[index].keys().copied().collect()),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.sets.is_empty() && self.chains.is_empty() && self.maps.iter().all(BTreeSet::is_empty)
    }
}

impl Side {
    fn new(is_ipv4: bool) -> Side {
        let family = Header::of(is_ipv4);
        let (desired, touched) = (Desired::default(), Touched::default());
        let mut side = Side { family, cidrs: Vec::new(), desired, touched, more: HashMap::new() };
        side.add_set(plan::KNOWN, vec![family.address()]);
        side.add_set(plan::ITSELF, vec![family.address(), family.address()]);
        side.render_base();
        side
    }

    pub fn is_ipv4(&self) -> bool {
        self.family.is_ipv4()
    }

    fn render_base(&mut self) {
        for direction in Direction::BOTH {
            let content = plan::base_content(self.family, direction, &self.cidrs);
            self.set_chain(direction.name().to_owned(), Some(content));
        }
    }

    fn set_chain(&mut self, name: String, content: Option<Content>) {
        match content {
            Some(content) => drop(self.desired.chains.insert(name.clone(), content)),
            None => drop(self.desired.chains.remove(&name)),
        }
        self.touched.chains.insert(name);
    }

    fn add_set(&mut self, name: &str, fields: Vec<Field>) {
        self.desired.sets.insert(name.to_owned(), Members { fields, elements: BTreeSet::new() });
        self.touched.sets.entry(name.to_owned()).or_default();
    }

    fn drop_set(&mut self, name: &str) {
        let gone = self.desired.sets.remove(name).map(|members| members.elements).unwrap_or_default();
        self.more.retain(|(set, _), _| set != name);
        // One of the same name may come again before anything is written.
        self.touched.sets.entry(name.to_owned()).or_default().extend(gone);
    }

    fn add(&mut self, set: &str, key: Bytes) {
        let Some(members) = self.desired.sets.get_mut(set) else { return };
        if members.elements.insert(key) {
            self.touched.sets.entry(set.to_owned()).or_default().insert(key);
        } else {
            *self.more.entry((set.to_owned(), key)).or_default() += 1;
        }
    }

    fn remove(&mut self, set: &str, key: Bytes) {
        if let Some(more) = self.more.get_mut(&(set.to_owned(), key)) {
            *more -= 1;
            if *more == 0 {
                self.more.remove(&(set.to_owned(), key));
            }
        } else if self.desired.sets.get_mut(set).is_some_and(|members| members.elements.remove(&key)) {
            self.touched.sets.entry(set.to_owned()).or_default().insert(key);
        }
    }

    fn set_holder(&mut self, direction: Direction, address: IpAddr, chain: Option<&String>) {
        let (key, index) = (Key::single(address), direction as usize);
        match chain {
            Some(chain) => drop(self.desired.maps[index].insert(key, chain.clone())),
            None => drop(self.desired.maps[index].remove(&key)),
        }
        self.touched.maps[index].insert(key);
    }
}

/// Something that others refer to: what it is made of, and how many do.
#[derive(Debug)]
struct Used<T> {
    what: T,
    uses: usize,
}

/// A pod of this node as the tables have it.
#[derive(Debug, Default)]
struct Local {
    addresses: Vec<IpAddr>,
    /// The chain for each direction in which it is isolated.
    chains: [Option<String>; 2],
}

/// Sets that a policy's chain looks into.
#[derive(Debug, Default)]
struct Lookups {
    groups: Vec<Arc<Group>>,
    ports: Vec<PortName>,
}

type PortName = (Protocol, Box<str>);

/// Everything that is known as far as policies are concerned, and the tables that follow from it.
#[derive(Debug)]
pub struct Index {
    sides: Vec<Side>,
    policies: HashMap<Arc<str>, BTreeMap<Arc<str>, Policy>>,
    pods: HashMap<Name, Pod>,
    pods_of: HashMap<Arc<str>, HashSet<Name>>,
    namespaces: HashMap<Arc<str>, Labels>,
    locals: HashMap<Name, Local>,
    locals_of: HashMap<Arc<str>, BTreeSet<Name>>,
    /// Whose an address of this node is: the last one's that was seen with it.
    holders: HashMap<IpAddr, Vec<Name>>,
    /// By name: the policies that it tries.
    pods_chains: HashMap<String, Used<Vec<Name>>>,
    /// By name.
    policy_chains: HashMap<String, Used<Lookups>>,
    /// With the name of the set.
    groups: HashMap<Arc<Group>, Used<String>>,
    groups_of: HashMap<Arc<str>, HashSet<Arc<Group>>>,
    groups_by_selector: HashSet<Arc<Group>>,
    ports: HashMap<PortName, Used<String>>,
}

impl Index {
    /// `families` says of each whether it is IPv4.
    pub fn new(families: &[bool]) -> Index {
        Index {
            sides: families.iter().map(|is_ipv4| Side::new(*is_ipv4)).collect(),
            policies: HashMap::new(),
            pods: HashMap::new(),
            pods_of: HashMap::new(),
            namespaces: HashMap::new(),
            locals: HashMap::new(),
            locals_of: HashMap::new(),
            holders: HashMap::new(),
            pods_chains: HashMap::new(),
            policy_chains: HashMap::new(),
            groups: HashMap::new(),
            groups_of: HashMap::new(),
            groups_by_selector: HashSet::new(),
            ports: HashMap::new(),
        }
    }

    pub fn sides(&mut self) -> &mut [Side] {
        &mut self.sides
    }

    pub fn has_policies(&self) -> bool {
        !self.policies.is_empty()
    }

    /// Whether a pod of this node is isolated in any direction.
    pub fn isolates(&self) -> bool {
        !self.pods_chains.is_empty()
    }

    /// The networks of this node's pods.
    pub fn set_pod_cidrs(&mut self, cidrs: &[IpNet]) {
        for side in &mut self.sides {
            let own: Vec<IpNet> = cidrs.iter().filter(|net| net.addr().is_ipv4() == side.is_ipv4()).copied().collect();
            if own != side.cidrs {
                side.cidrs = own;
                side.render_base();
            }
        }
    }

    /// Takes a policy's state in, `None` when it is gone.
    pub fn set_policy(&mut self, name: &Name, policy: Option<Policy>) {
        let of = self.policies.entry(name.0.clone()).or_default();
        let before = match policy {
            Some(policy) => {
                let before = of.insert(name.1.clone(), policy.clone());
                if before.as_ref() == Some(&policy) {
                    return;
                }
                before
            }
            None => of.remove(&name.1),
        };
        if of.is_empty() {
            self.policies.remove(&name.0);
        }
        if before.is_some() {
            Direction::BOTH.into_iter().for_each(|direction| self.render_again(direction, name));
        }
        let locals: Vec<Name> = self.locals_of.get(&name.0).into_iter().flatten().cloned().collect();
        locals.iter().for_each(|local| self.place(local));
    }

    /// Takes a pod's state in, `None` when it is gone.
    pub fn set_pod(&mut self, name: &Name, pod: Option<Pod>) {
        if self.pods.get(name) == pod.as_ref() {
            return;
        }
        let before = match &pod {
            Some(pod) => {
                self.pods_of.entry(name.0.clone()).or_default().insert(name.clone());
                self.pods.insert(name.clone(), pod.clone())
            }
            None => {
                forget(&mut self.pods_of, &name.0, name);
                self.pods.remove(name)
            }
        };
        // What is new comes first: nothing that both have goes in between.
        if let Some(pod) = &pod {
            self.join_sets(pod, true);
        }
        if let Some(before) = &before {
            self.join_sets(before, false);
        }
        match pod.filter(|pod| pod.local) {
            Some(_) => drop(self.locals_of.entry(name.0.clone()).or_default().insert(name.clone())),
            None => {
                let gone = self.locals_of.get_mut(&name.0).is_some_and(|names| names.remove(name) && names.is_empty());
                if gone {
                    self.locals_of.remove(&name.0);
                }
            }
        }
        self.place(name);
    }

    /// Takes a namespace's labels in, `None` when it is gone.
    pub fn set_namespace(&mut self, name: &Arc<str>, labels: Option<Labels>) {
        let after = labels.clone().unwrap_or_default();
        let before = match labels {
            Some(labels) => self.namespaces.insert(name.clone(), labels),
            None => self.namespaces.remove(name),
        };
        let before = before.unwrap_or_default();
        if before == after {
            return;
        }
        let groups: Vec<_> = self.groups_by_selector.iter().cloned().collect();
        for group in groups {
            let Namespaces::Selected(selector) = &group.namespaces else { continue };
            let (was, is) = (selector.matches(&before), selector.matches(&after));
            if was == is {
                continue;
            }
            let set = self.groups.get(&group).map(|used| used.what.clone()).unwrap_or_default();
            let names = self.pods_of.get(name).into_iter().flatten();
            for pod in names.filter_map(|name| self.pods.get(name)).filter(|pod| group.pods.matches(&pod.labels)) {
                change_addresses(&mut self.sides, &set, pod, is);
            }
        }
    }

    /// Puts a pod's addresses and ports into the sets that it belongs to, or takes them out.
    fn join_sets(&mut self, pod: &Pod, is_in: bool) {
        let labels = self.namespaces.get(&pod.namespace);
        let none = Labels::new();
        let labels = labels.unwrap_or(&none);
        let own = self.groups_of.get(&pod.namespace).into_iter().flatten();
        let by_selector = self.groups_by_selector.iter().filter(|group| match &group.namespaces {
            Namespaces::One(_) => false,
            Namespaces::Selected(selector) => selector.matches(labels),
        });
        for group in own.chain(by_selector).filter(|group| group.pods.matches(&pod.labels)) {
            if let Some(used) = self.groups.get(group) {
                change_addresses(&mut self.sides, &used.what, pod, is_in);
            }
        }
        for (name, protocol, number) in &pod.ports {
            if let Some(used) = self.ports.get(&(*protocol, name.clone())) {
                change_ports(&mut self.sides, &used.what, pod, *number, is_in);
            }
        }
    }

    /// Brings a pod of this node, or what there was of it, to the chains that it should be in.
    fn place(&mut self, name: &Name) {
        let after = match self.pods.get(name).filter(|pod| pod.local) {
            Some(pod) => {
                let addresses = pod.addresses.clone();
                let policies = Direction::BOTH.map(|direction| self.policies_about(pod, direction));
                let mut chains = [None, None];
                for (direction, policies) in Direction::BOTH.into_iter().zip(policies) {
                    chains[direction as usize] =
                        (!policies.is_empty()).then(|| self.use_pods_chain(direction, policies));
                }
                Some(Local { addresses, chains })
            }
            None => None,
        };
        let addresses = after.as_ref().map(|local| local.addresses.clone()).unwrap_or_default();
        let before = match after {
            Some(after) => self.locals.insert(name.clone(), after),
            None => self.locals.remove(name),
        };
        let before = before.unwrap_or_default();
        for address in addresses.iter().filter(|one| !before.addresses.contains(one)) {
            self.holders.entry(*address).or_default().push(name.clone());
            change_own(&mut self.sides, *address, true);
        }
        for address in before.addresses.iter().filter(|one| !addresses.contains(one)) {
            let holders = self.holders.entry(*address).or_default();
            holders.retain(|holder| holder != name);
            if holders.is_empty() {
                self.holders.remove(address);
            }
            change_own(&mut self.sides, *address, false);
        }
        addresses.iter().chain(&before.addresses).for_each(|address| self.point(*address));
        for (direction, chain) in Direction::BOTH.into_iter().zip(before.chains) {
            if let Some(chain) = chain {
                self.leave_pods_chain(direction, &chain);
            }
        }
    }

    /// Leads an address to the chains of the pod that has it.
    fn point(&mut self, address: IpAddr) {
        let holder = self.holders.get(&address).and_then(|names| names.last()).and_then(|name| self.locals.get(name));
        for side in self.sides.iter_mut().filter(|side| side.is_ipv4() == address.is_ipv4()) {
            for direction in Direction::BOTH {
                let chain = holder.and_then(|local| local.chains[direction as usize].as_ref());
                side.set_holder(direction, address, chain);
            }
        }
    }

    fn policies_about(&self, pod: &Pod, direction: Direction) -> Vec<Name> {
        let policies = self.policies.get(&pod.namespace).into_iter().flatten();
        let about =
            policies.filter(|(_, policy)| direction.rules(policy).is_some() && policy.pods.matches(&pod.labels));
        about.map(|(name, _)| (pod.namespace.clone(), name.clone())).collect()
    }

    fn use_pods_chain(&mut self, direction: Direction, policies: Vec<Name>) -> String {
        let chain = direction.pods_chain(&policies);
        if let Some(used) = self.pods_chains.get_mut(&chain) {
            used.uses += 1;
            return chain;
        }
        policies.iter().for_each(|name| self.use_policy_chain(direction, name));
        let content = direction.pods_content(&policies);
        self.sides.iter_mut().for_each(|side| side.set_chain(chain.clone(), Some(content.clone())));
        self.pods_chains.insert(chain.clone(), Used { what: policies, uses: 1 });
        chain
    }

    fn leave_pods_chain(&mut self, direction: Direction, chain: &str) {
        let Some(policies) = leave(&mut self.pods_chains, chain) else { return };
        self.sides.iter_mut().for_each(|side| side.set_chain(chain.to_owned(), None));
        policies.iter().for_each(|name| self.leave_policy_chain(direction, name));
    }

    fn use_policy_chain(&mut self, direction: Direction, name: &Name) {
        let chain = direction.policy_chain(name);
        if let Some(used) = self.policy_chains.get_mut(&chain) {
            used.uses += 1;
            return;
        }
        let lookups = self.render(direction, name);
        self.policy_chains.insert(chain, Used { what: lookups, uses: 1 });
    }

    fn leave_policy_chain(&mut self, direction: Direction, name: &Name) {
        let chain = direction.policy_chain(name);
        let Some(lookups) = leave(&mut self.policy_chains, &chain) else { return };
        self.sides.iter_mut().for_each(|side| side.set_chain(chain.clone(), None));
        self.leave_lookups(&lookups);
    }

    /// Writes a policy's chain as it is now, if it is in use. That of a policy which is gone is empty until its pods leave it.
    fn render_again(&mut self, direction: Direction, name: &Name) {
        let chain = direction.policy_chain(name);
        if !self.policy_chains.contains_key(&chain) {
            return;
        }
        let lookups = self.render(direction, name);
        let before = self.policy_chains.get_mut(&chain).map(|used| std::mem::replace(&mut used.what, lookups));
        self.leave_lookups(&before.unwrap_or_default());
    }

    fn render(&mut self, direction: Direction, name: &Name) -> Lookups {
        let nothing = Policy::default();
        let policy = self.policies.get(&name.0).and_then(|of| of.get(&name.1)).unwrap_or(&nothing);
        let mut lookups = Lookups::default();
        for rule in direction.rules(policy).unwrap_or_default() {
            let groups = rule.peers.iter().flatten().filter_map(|peer| match peer {
                Peer::Pods(group) => Some(Arc::new(group.clone())),
                Peer::Block { .. } => None,
            });
            lookups.groups.extend(groups);
            let ports = rule.ports.iter().flatten().filter_map(|port| match port {
                PortMatch::Named(protocol, name) => Some((*protocol, name.clone())),
                _ => None,
            });
            lookups.ports.extend(ports);
        }
        let chain = direction.policy_chain(name);
        for side in &mut self.sides {
            let content = plan::policy_content(side.family, direction, name, policy);
            side.set_chain(chain.clone(), Some(content));
        }
        lookups.groups.iter().for_each(|group| self.use_group(group));
        lookups.ports.iter().for_each(|port| self.use_ports(port));
        lookups
    }

    fn leave_lookups(&mut self, lookups: &Lookups) {
        for group in &lookups.groups {
            let Some(set) = leave(&mut self.groups, group) else { continue };
            match &group.namespaces {
                Namespaces::One(namespace) => forget(&mut self.groups_of, namespace, group),
                Namespaces::Selected(_) => drop(self.groups_by_selector.remove(group)),
            }
            self.sides.iter_mut().for_each(|side| side.drop_set(&set));
        }
        for port in &lookups.ports {
            if let Some(set) = leave(&mut self.ports, port) {
                self.sides.iter_mut().for_each(|side| side.drop_set(&set));
            }
        }
    }

    fn use_group(&mut self, group: &Arc<Group>) {
        if let Some(used) = self.groups.get_mut(group) {
            used.uses += 1;
            return;
        }
        let set = plan::group_set(group);
        self.sides.iter_mut().for_each(|side| side.add_set(&set, vec![side.family.address()]));
        let none = Labels::new();
        let namespaces: Vec<&Arc<str>> = match &group.namespaces {
            Namespaces::One(namespace) => vec![namespace],
            Namespaces::Selected(selector) => {
                let is_meant = |name: &&Arc<str>| selector.matches(self.namespaces.get(*name).unwrap_or(&none));
                self.pods_of.keys().filter(is_meant).collect()
            }
        };
        let names = namespaces.into_iter().flat_map(|namespace| self.pods_of.get(namespace).into_iter().flatten());
        for pod in names.filter_map(|name| self.pods.get(name)).filter(|pod| group.pods.matches(&pod.labels)) {
            change_addresses(&mut self.sides, &set, pod, true);
        }
        match &group.namespaces {
            Namespaces::One(namespace) => {
                self.groups_of.entry(namespace.clone()).or_default().insert(group.clone());
            }
            Namespaces::Selected(_) => drop(self.groups_by_selector.insert(group.clone())),
        }
        self.groups.insert(group.clone(), Used { what: set, uses: 1 });
    }

    fn use_ports(&mut self, port: &PortName) {
        if let Some(used) = self.ports.get_mut(port) {
            used.uses += 1;
            return;
        }
        let set = plan::ports_set(port.0, &port.1);
        self.sides.iter_mut().for_each(|side| side.add_set(&set, vec![side.family.address(), Field::Port]));
        for pod in self.pods.values() {
            for (_, _, number) in pod.ports.iter().filter(|(name, of, _)| *name == port.1 && *of == port.0) {
                change_ports(&mut self.sides, &set, pod, *number, true);
            }
        }
        self.ports.insert(port.clone(), Used { what: set, uses: 1 });
    }
}

/// One use less; what it was when that was the last.
fn leave<K: std::hash::Hash + Eq + std::borrow::Borrow<Q>, Q: std::hash::Hash + Eq + ?Sized, T>(
    all: &mut HashMap<K, Used<T>>,
    key: &Q,
) -> Option<T> {
    let used = all.get_mut(key)?;
    used.uses -= 1;
    if used.uses > 0 {
        return None;
    }
    all.remove(key).map(|used| used.what)
}

fn forget<T: std::hash::Hash + Eq>(all: &mut HashMap<Arc<str>, HashSet<T>>, key: &Arc<str>, value: &T) {
    if all.get_mut(key).is_some_and(|values| values.remove(value) && values.is_empty()) {
        all.remove(key);
    }
}

fn change(sides: &mut [Side], address: IpAddr, set: &str, key: Bytes, is_in: bool) {
    for side in sides.iter_mut().filter(|side| side.is_ipv4() == address.is_ipv4()) {
        if is_in { side.add(set, key) } else { side.remove(set, key) }
    }
}

fn change_addresses(sides: &mut [Side], set: &str, pod: &Pod, is_in: bool) {
    pod.addresses.iter().for_each(|address| change(sides, *address, set, Key::single(*address), is_in));
}

fn change_ports(sides: &mut [Side], set: &str, pod: &Pod, number: u16, is_in: bool) {
    for address in &pod.addresses {
        change(sides, *address, set, Key::new().address(*address).port(number).bytes(), is_in);
    }
}

fn change_own(sides: &mut [Side], address: IpAddr, is_in: bool) {
    plan::own_keys(address).into_iter().for_each(|(set, key)| change(sides, address, set, key, is_in));
}
