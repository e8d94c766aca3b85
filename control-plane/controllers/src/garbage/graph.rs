//! Who owns whom, over all kinds. Pure: it is told what was seen, and answers what should be looked at.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};

pub(super) const ORPHAN: &str = "orphan";
pub(super) const FOREGROUND: &str = "foregroundDeletion";

/// Owners known to be gone are remembered, so that each of their dependents need not ask again.
const ABSENT_LIMIT: usize = 500;

pub(super) type Uid = Arc<str>;

/// Where an object is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub api_version: Arc<str>,
    pub kind: Arc<str>,
    pub namespace: String,
    pub name: String,
}

/// An ownerReference, as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    pub uid: Uid,
    pub blocks: bool,
}

#[derive(Debug)]
pub(super) struct Node {
    pub place: Place,
    pub owners: Vec<Owner>,
    pub dependents: HashSet<Uid>,
    /// Known from a reference only; nobody has seen it.
    pub virtual_: bool,
    pub deleting: bool,
    pub orphaning: bool,
    pub foreground: bool,
}

impl Node {
    /// Waits for its dependents to go first.
    pub fn waits(&self) -> bool {
        self.deleting && self.foreground
    }
}

/// Something to look at.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Work {
    /// May have lost its owners, or waits for its dependents.
    Check(Uid),
    /// Is being deleted and leaves its dependents behind.
    Orphan(Uid),
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Check(uid) => write!(f, "check {uid}"),
            Self::Orphan(uid) => write!(f, "orphan {uid}"),
        }
    }
}

#[derive(Default)]
pub(super) struct Graph {
    nodes: HashMap<Uid, Node>,
    absent: HashSet<Uid>,
    absent_order: VecDeque<Uid>,
}

pub(super) fn has_finalizer(meta: &ObjectMeta, finalizer: &str) -> bool {
    meta.finalizers.iter().flatten().any(|candidate| candidate == finalizer)
}

impl Graph {
    pub fn node(&self, uid: &str) -> Option<&Node> {
        self.nodes.get(uid)
    }

    pub fn is_absent(&self, uid: &str) -> bool {
        self.absent.contains(uid)
    }

    /// An object was added or changed.
    pub fn observe(&mut self, place: Place, meta: &ObjectMeta) -> Vec<Work> {
        let Some(uid) = meta.uid.as_deref() else { return Vec::new() };
        let uid: Uid = self.nodes.get_key_value(uid).map_or_else(|| Arc::from(uid), |(uid, _)| uid.clone());
        let references = meta.owner_references.as_deref().unwrap_or_default();
        let owners: Vec<Owner> = references
            .iter()
            .map(|owner| Owner { uid: Arc::from(owner.uid.as_str()), blocks: owner.block_owner_deletion == Some(true) })
            .collect();
        let mut work = Vec::new();
        let node = self.nodes.entry(uid.clone()).or_insert_with(|| Node::unseen(place.clone()));
        let (was_orphaning, was_waiting) = (!node.virtual_ && node.deleting && node.orphaning, node.waits());
        node.place = place;
        node.virtual_ = false;
        node.deleting = meta.deletion_timestamp.is_some();
        node.orphaning = has_finalizer(meta, ORPHAN);
        node.foreground = has_finalizer(meta, FOREGROUND);
        let old = std::mem::replace(&mut node.owners, owners.clone());
        if node.deleting && node.orphaning && !was_orphaning {
            work.push(Work::Orphan(uid.clone()));
        }
        if node.waits() && !was_waiting {
            work.extend(node.dependents.iter().cloned().map(Work::Check));
            work.push(Work::Check(uid.clone()));
        }
        self.link(&uid, &old, &owners, references, &mut work);
        work
    }

    /// Brings the owners' lists of dependents up to date.
    fn link(&mut self, uid: &Uid, old: &[Owner], new: &[Owner], references: &[OwnerReference], work: &mut Vec<Work>) {
        let namespace = self.nodes.get(uid).map(|node| node.place.namespace.clone()).unwrap_or_default();
        for (owner, reference) in new.iter().zip(references) {
            let before = old.iter().find(|candidate| candidate.uid == owner.uid);
            if before.is_some_and(|before| before.blocks == owner.blocks) {
                continue;
            }
            let is_new = !self.nodes.contains_key(&owner.uid);
            let node = self.nodes.entry(owner.uid.clone()).or_insert_with(|| {
                Node::unseen(Place {
                    api_version: Arc::from(reference.api_version.as_str()),
                    kind: Arc::from(reference.kind.as_str()),
                    namespace: namespace.clone(),
                    name: reference.name.clone(),
                })
            });
            node.dependents.insert(uid.clone());
            if is_new || node.waits() {
                work.push(Work::Check(owner.uid.clone()));
            }
        }
        for gone in old.iter().filter(|owner| new.iter().all(|kept| kept.uid != owner.uid)) {
            self.unlink(uid, &gone.uid, work);
        }
    }

    fn unlink(&mut self, dependent: &Uid, owner: &Uid, work: &mut Vec<Work>) {
        let Some(node) = self.nodes.get_mut(owner) else { return };
        node.dependents.remove(dependent);
        if node.waits() {
            work.push(Work::Check(owner.clone()));
        }
        if node.virtual_ && node.dependents.is_empty() {
            self.nodes.remove(owner);
        }
    }

    /// An object is gone.
    pub fn remove(&mut self, uid: &str) -> Vec<Work> {
        let Some((uid, node)) = self.nodes.remove_entry(uid) else { return Vec::new() };
        let mut work = Vec::new();
        for owner in &node.owners {
            self.unlink(&uid, &owner.uid, &mut work);
        }
        if !node.dependents.is_empty() {
            if self.absent.insert(uid.clone()) {
                self.absent_order.push_back(uid);
            }
            while self.absent_order.len() > ABSENT_LIMIT {
                if let Some(oldest) = self.absent_order.pop_front() {
                    self.absent.remove(&oldest);
                }
            }
        }
        work.extend(node.dependents.into_iter().map(Work::Check));
        work
    }

    /// Dependents that keep `uid` from going in foreground deletion.
    pub fn blockers(&self, uid: &str) -> Vec<Uid> {
        let Some(node) = self.nodes.get(uid) else { return Vec::new() };
        let blocks = |dependent: &&Uid| {
            let dependent = self.nodes.get(*dependent);
            dependent.is_some_and(|node| node.owners.iter().any(|owner| &*owner.uid == uid && owner.blocks))
        };
        node.dependents.iter().filter(blocks).cloned().collect()
    }
}

impl Node {
    fn unseen(place: Place) -> Self {
        Self {
            place,
            owners: Vec::new(),
            dependents: HashSet::new(),
            virtual_: true,
            deleting: false,
            orphaning: false,
            foreground: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use k8s_openapi::jiff::Timestamp;
    use proptest::prelude::*;

    fn place(name: &str) -> Place {
        Place { api_version: "v1".into(), kind: "Thing".into(), namespace: "ns".into(), name: name.into() }
    }

    fn meta(uid: &str, owners: &[&str], finalizers: &[&str], deleting: bool) -> ObjectMeta {
        ObjectMeta {
            uid: Some(uid.into()),
            owner_references: Some(
                owners
                    .iter()
                    .map(|uid| OwnerReference {
                        uid: (*uid).into(),
                        name: (*uid).into(),
                        block_owner_deletion: Some(true),
                        ..Default::default()
                    })
                    .collect(),
            ),
            finalizers: Some(finalizers.iter().map(|f| (*f).to_owned()).collect()),
            deletion_timestamp: deleting.then_some(Time(Timestamp::UNIX_EPOCH)),
            ..Default::default()
        }
    }

    fn see(graph: &mut Graph, uid: &str, owners: &[&str], finalizers: &[&str], deleting: bool) -> Vec<Work> {
        graph.observe(place(uid), &meta(uid, owners, finalizers, deleting))
    }

    fn check(uid: &str) -> Work {
        Work::Check(uid.into())
    }

    #[test]
    fn an_owner_nobody_has_seen_is_checked_once_and_forgotten_with_its_last_dependent() {
        let mut graph = Graph::default();
        assert_eq!(see(&mut graph, "a", &["ghost"], &[], false), [check("ghost")]);
        assert_eq!(see(&mut graph, "b", &["ghost"], &[], false), []);
        assert!(graph.node("ghost").unwrap().virtual_);
        graph.remove("a");
        graph.remove("b");
        assert!(graph.node("ghost").is_none());
    }

    #[test]
    fn when_an_owner_goes_its_dependents_are_checked() {
        let mut graph = Graph::default();
        see(&mut graph, "owner", &[], &[], false);
        see(&mut graph, "a", &["owner"], &[], false);
        assert_eq!(graph.remove("owner"), [check("a")]);
        assert!(graph.is_absent("owner"));
    }

    #[test]
    fn foreground_deletion_checks_dependents_and_then_the_owner() {
        let mut graph = Graph::default();
        see(&mut graph, "owner", &[], &[], false);
        see(&mut graph, "a", &["owner"], &[], false);
        assert_eq!(see(&mut graph, "owner", &[], &[FOREGROUND], true), [check("a"), check("owner")]);
        assert_eq!(graph.blockers("owner"), [Uid::from("a")]);
        assert_eq!(see(&mut graph, "owner", &[], &[FOREGROUND], true), [], "an echo is no news");
        assert_eq!(graph.remove("a"), [check("owner")]);
        assert!(graph.blockers("owner").is_empty());
    }

    #[test]
    fn orphaning_is_announced_once() {
        let mut graph = Graph::default();
        assert_eq!(see(&mut graph, "owner", &[], &[ORPHAN], true), [Work::Orphan("owner".into())]);
        assert_eq!(see(&mut graph, "owner", &[], &[ORPHAN], true), []);
    }

    proptest! {
        /// Whatever happens in whatever order, owners and dependents agree about each other.
        #[test]
        fn links_are_symmetric(steps in proptest::collection::vec((0u8..8, proptest::option::of(proptest::collection::btree_set(0u8..8, 0..3))), 1..80)) {
            let mut graph = Graph::default();
            for (uid, owners) in steps {
                let uid = uid.to_string();
                match owners {
                    None => drop(graph.remove(&uid)),
                    Some(owners) => {
                        let owners: Vec<String> = owners.iter().map(ToString::to_string).filter(|o| *o != uid).collect();
                        let owners: Vec<&str> = owners.iter().map(String::as_str).collect();
                        see(&mut graph, &uid, &owners, &[], false);
                    }
                }
                for (uid, node) in &graph.nodes {
                    for dependent in &node.dependents {
                        prop_assert!(graph.nodes[dependent].owners.iter().any(|owner| owner.uid == *uid));
                    }
                    prop_assert!(!node.virtual_ || !node.dependents.is_empty());
                }
            }
        }
    }
}
