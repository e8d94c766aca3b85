//! Whether a node can have what a pod's claims need, and what has to be written for it. Pure.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use oarlock_machinery::Key;
use oarlock_machinery::node_terms::topologies_match;
use oarlock_machinery::volumes::{self, NO_PROVISIONER, fitting, reaches};

use super::{Storage, selected_node};
use crate::cache::NodeInfo;

const ELSEWHERE: &str = "node(s) didn't match PersistentVolume's node affinity";
const LOST: &str = "node(s) unavailable due to one or more pvc(s) bound to non-existent pv(s)";
const NO_VOLUME: &str = "node(s) didn't find available persistent volumes to bind";
const NO_ROOM: &str = "node(s) did not have enough free storage";

/// What is to be written so that open claims get volumes on a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Choice {
    pub node: String,
    /// Volumes that are there, and the claims that get them.
    pub bind: Vec<(String, Key)>,
    /// Claims that get volumes made for them.
    pub provision: Vec<Key>,
}

impl Choice {
    pub fn is_empty(&self) -> bool {
        self.bind.is_empty() && self.provision.is_empty()
    }

    /// The claims that it serves.
    pub fn claims(&self) -> impl Iterator<Item = &Key> {
        self.bind.iter().map(|(_, key)| key).chain(&self.provision)
    }
}

/// A claim without a volume, and the volumes that it could have, the best first.
#[derive(Clone, Debug)]
struct Open<'a> {
    key: Key,
    claim: &'a PersistentVolumeClaim,
    volumes: Vec<&'a Arc<PersistentVolume>>,
}

/// What a pod's claims need of a node. The default is nothing.
#[derive(Clone, Debug, Default)]
pub(crate) struct Needs<'a> {
    storage: Option<&'a Storage>,
    bound: Vec<Option<&'a PersistentVolume>>,
    open: Vec<Open<'a>>,
}

impl<'a> Needs<'a> {
    pub(super) fn of(storage: &'a Storage) -> Self {
        Self { storage: Some(storage), ..Default::default() }
    }

    pub(super) fn add_bound(&mut self, volume: &str) {
        let found = self.storage.and_then(|storage| storage.volume(volume));
        self.bound.push(found.map(|volume| &**volume));
    }

    pub(super) fn add_open(&mut self, key: Key, claim: &'a PersistentVolumeClaim) {
        let Some(storage) = self.storage else { return };
        // With a node chosen for it, a claim waits for a volume to be made there.
        let volumes = if selected_node(claim).is_some() { Vec::new() } else { fitting(claim, storage.all_volumes()) };
        self.open.push(Open { key, claim, volumes });
    }

    /// Small claims choose first, so that large volumes are left for large claims.
    pub(super) fn sort(&mut self) {
        self.open.sort_by_key(|open| volumes::requested_bytes(open.claim));
    }

    /// What is to be written for the node, or why it cannot be had there.
    pub fn judge(&self, node: &NodeInfo) -> Result<Choice, Vec<String>> {
        let mut reasons = Vec::new();
        if self.bound.iter().any(Option::is_none) {
            reasons.push(LOST.to_owned());
        }
        if self.bound.iter().flatten().any(|volume| !reaches(volume, &node.name, &node.labels)) {
            reasons.push(ELSEWHERE.to_owned());
        }
        match self.choose(node) {
            Ok(choice) if reasons.is_empty() => Ok(choice),
            Ok(_) => Err(reasons),
            Err(reason) => {
                reasons.push(reason.to_owned());
                Err(reasons)
            }
        }
    }

    fn choose(&self, node: &NodeInfo) -> Result<Choice, &'static str> {
        let mut choice = Choice { node: node.name.clone(), ..Default::default() };
        for open in &self.open {
            if selected_node(open.claim).is_some_and(|chosen| chosen != node.name) {
                return Err(NO_VOLUME);
            }
            let is_free = |volume: &&&Arc<PersistentVolume>| {
                let name = volume.metadata.name.as_ref();
                !choice.bind.iter().any(|(taken, _)| Some(taken) == name) && reaches(volume, &node.name, &node.labels)
            };
            match open.volumes.iter().find(is_free) {
                Some(volume) => {
                    choice.bind.push((volume.metadata.name.clone().unwrap_or_default(), open.key.clone()));
                }
                // What is kept for the claim is elsewhere.
                None if open.volumes.iter().any(|volume| volumes::is_kept_for(open.claim, volume)) => {
                    return Err(NO_VOLUME);
                }
                None => choice.provision.push(open.key.clone()),
            }
        }
        for open in self.open.iter().filter(|open| choice.provision.contains(&open.key)) {
            self.can_provision(open.claim, node)?;
        }
        Ok(choice)
    }

    fn can_provision(&self, claim: &PersistentVolumeClaim, node: &NodeInfo) -> Result<(), &'static str> {
        let storage = self.storage.ok_or(NO_VOLUME)?;
        let class = storage.classes.get(volumes::class_name(claim)).ok_or(NO_VOLUME)?;
        let topologies = class.allowed_topologies.as_deref().unwrap_or_default();
        if class.provisioner.is_empty()
            || class.provisioner == NO_PROVISIONER
            || !topologies_match(topologies, &node.labels)
        {
            return Err(NO_VOLUME);
        }
        if !storage.measuring.contains(&class.provisioner) {
            return Ok(());
        }
        let wanted = volumes::requested_bytes(claim);
        let has_room = storage.rooms.values().any(|room| {
            room.class == volumes::class_name(claim)
                && room.bytes.is_some_and(|bytes| bytes >= wanted)
                && room.nodes.as_ref().is_some_and(|nodes| nodes.matches(Some(&node.labels)))
        });
        if has_room { Ok(()) } else { Err(NO_ROOM) }
    }
}
