//! What the tables should be, worked out from nothing: everything is held against everything. For tests, which compare
//! `index` with it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use oarlock_nft::{Bytes, Field, Key};

use super::Event;
use super::objects::{Group, Labels, Name, Namespaces, Peer, Pod, Policy, PortMatch};
use super::plan::{self, Desired, Direction, Members};
use crate::packet::Header;

/// Everything that is known, as far as policies are concerned.
#[derive(Debug, Clone, Default)]
pub struct World {
    pub policies: BTreeMap<Name, Policy>,
    pub pods: BTreeMap<Name, Pod>,
    pub namespaces: HashMap<Arc<str>, Labels>,
}

impl World {
    pub fn take(&mut self, event: Event) {
        match event {
            Event::Policy(name, Some(policy)) => drop(self.policies.insert(name, policy)),
            Event::Policy(name, None) => drop(self.policies.remove(&name)),
            Event::Pod(name, Some(pod)) => drop(self.pods.insert(name, pod)),
            Event::Pod(name, None) => drop(self.pods.remove(&name)),
            Event::Namespace(name, Some(labels)) => drop(self.namespaces.insert(name, labels)),
            Event::Namespace(name, None) => drop(self.namespaces.remove(&name)),
            Event::Listed(_) => {}
        }
    }

    /// What leads to this world from an empty one.
    pub fn events(&self) -> Vec<Event> {
        let namespaces =
            self.namespaces.iter().map(|(name, labels)| Event::Namespace(name.clone(), Some(labels.clone())));
        let pods = self.pods.iter().map(|(name, pod)| Event::Pod(name.clone(), Some(pod.clone())));
        let policies = self.policies.iter().map(|(name, policy)| Event::Policy(name.clone(), Some(policy.clone())));
        namespaces.chain(pods).chain(policies).collect()
    }
}

/// The table of one family; no two pods of this node have the same address.
pub fn plan(world: &World, is_ipv4: bool, pod_cidrs: &[IpNet]) -> Desired {
    let family = Header::of(is_ipv4);
    let cidrs: Vec<IpNet> = pod_cidrs.iter().filter(|net| net.addr().is_ipv4() == is_ipv4).copied().collect();
    let own =
        |pod: &Pod| -> Vec<IpAddr> { pod.addresses.iter().filter(|ip| ip.is_ipv4() == is_ipv4).copied().collect() };
    let mut desired = Desired::default();
    let (address, mut known, mut itself) = (family.address(), BTreeSet::new(), BTreeSet::new());
    for ip in world.pods.values().filter(|pod| pod.local).flat_map(own) {
        known.insert(Key::single(ip));
        itself.insert(Key::new().address(ip).address(ip).bytes());
    }
    desired.sets.insert(plan::KNOWN.into(), Members { fields: vec![address], elements: known });
    desired.sets.insert(plan::ITSELF.into(), Members { fields: vec![address, address], elements: itself });
    for direction in Direction::BOTH {
        let base = plan::base_content(family, direction, &cidrs);
        desired.chains.insert(direction.name().into(), base);
        for pod in world.pods.values().filter(|pod| pod.local) {
            let about: Vec<(&Name, &Policy)> = world
                .policies
                .iter()
                .filter(|(name, policy)| {
                    name.0 == pod.namespace && direction.rules(policy).is_some() && policy.pods.matches(&pod.labels)
                })
                .collect();
            if about.is_empty() {
                continue;
            }
            let names: Vec<Name> = about.iter().map(|(name, _)| (*name).clone()).collect();
            let chain = direction.pods_chain(&names);
            desired.chains.insert(chain.clone(), direction.pods_content(&names));
            desired.maps[direction as usize].extend(own(pod).into_iter().map(|ip| (Key::single(ip), chain.clone())));
            for (name, policy) in about {
                let content = plan::policy_content(family, direction, name, policy);
                desired.chains.insert(direction.policy_chain(name), content);
                add_sets(world, family, direction, policy, &mut desired);
            }
        }
    }
    desired
}

fn add_sets(world: &World, family: Header, direction: Direction, policy: &Policy, desired: &mut Desired) {
    let own = |pod: &Pod| -> Vec<IpAddr> {
        pod.addresses.iter().filter(|ip| ip.is_ipv4() == family.is_ipv4()).copied().collect()
    };
    for rule in direction.rules(policy).unwrap_or_default() {
        for peer in rule.peers.iter().flatten() {
            let Peer::Pods(group) = peer else { continue };
            let members = world.pods.values().filter(|pod| is_member(world, group, pod));
            let elements = members.flat_map(own).map(Key::single).collect();
            let set = Members { fields: vec![family.address()], elements };
            desired.sets.insert(plan::group_set(group), set);
        }
        for port in rule.ports.iter().flatten() {
            let PortMatch::Named(protocol, name) = port else { continue };
            let mut elements: BTreeSet<Bytes> = BTreeSet::new();
            for pod in world.pods.values() {
                for (_, _, number) in pod.ports.iter().filter(|(found, of, _)| found == name && of == protocol) {
                    elements.extend(own(pod).iter().map(|ip| Key::new().address(*ip).port(*number).bytes()));
                }
            }
            let set = Members { fields: vec![family.address(), Field::Port], elements };
            desired.sets.insert(plan::ports_set(*protocol, name), set);
        }
    }
}

fn is_member(world: &World, group: &Group, pod: &Pod) -> bool {
    let none = Labels::new();
    let in_namespace = match &group.namespaces {
        Namespaces::One(namespace) => *namespace == pod.namespace,
        Namespaces::Selected(selector) => selector.matches(world.namespaces.get(&pod.namespace).unwrap_or(&none)),
    };
    in_namespace && group.pods.matches(&pod.labels)
}
