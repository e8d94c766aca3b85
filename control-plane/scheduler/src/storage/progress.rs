//! How far the volumes of a pod with a node have come: whether all its claims have theirs, or will not get them there. Pure.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use oarlock_machinery::Key;
use oarlock_machinery::volumes::{self, reaches};

use super::{Choice, Storage, selected_node};

/// The versions of what was written for a choice: what is known that is older says nothing.
#[derive(Debug, Default)]
pub(crate) struct Written {
    pub volumes: BTreeMap<String, u64>,
    pub claims: Vec<(Key, u64)>,
}

/// How far a choice has come.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    Waiting,
    Done,
    /// It will not come about.
    Failed(String),
}

/// A version as a number: versions of one API can be compared.
pub(crate) fn version(metadata: &ObjectMeta) -> u64 {
    metadata.resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or(0)
}

impl Storage {
    /// How far `choice` has come since it was written.
    pub fn progress(&self, choice: &Choice, written: &Written, labels: &BTreeMap<String, String>) -> Progress {
        let mut whole = Progress::Done;
        for key in choice.claims() {
            match self.progress_of(key, choice, written, labels) {
                Progress::Done => {}
                Progress::Waiting => whole = Progress::Waiting,
                failed => return failed,
            }
        }
        whole
    }

    fn progress_of(
        &self,
        key: &Key,
        choice: &Choice,
        written: &Written,
        labels: &BTreeMap<String, String>,
    ) -> Progress {
        let failed = |why: String| Progress::Failed(why);
        let name = &key.name;
        let Some(claim) = self.claims.get(key) else {
            return failed(format!("persistentvolumeclaim {name:?} not found"));
        };
        if volumes::is_bound(claim) {
            let volume = volumes::volume_name(claim).unwrap_or_default();
            return match self.volumes.get(volume) {
                None => Progress::Waiting,
                Some(found) if reaches(found, &choice.node, labels) => Progress::Done,
                Some(_) => failed(format!(
                    "pv {volume:?} node affinity doesn't match node {:?}: no matching NodeSelectorTerms",
                    choice.node
                )),
            };
        }
        if let Some((volume, _)) = choice.bind.iter().find(|(_, of)| of == key) {
            let Some(found) = self.volumes.get(volume) else {
                return failed(format!("persistentvolume {volume:?} not found"));
            };
            let old = written.volumes.get(volume).is_none_or(|at| version(&found.metadata) < *at);
            if !old && !volumes::is_kept_for(claim, found) {
                return failed(format!("ClaimRef got reset for pv {volume:?}"));
            }
            return Progress::Waiting;
        }
        let old = written.claims.iter().find(|(of, _)| of == key).is_none_or(|(_, at)| version(&claim.metadata) < *at);
        match selected_node(claim) {
            _ if old => Progress::Waiting,
            None => failed(format!("selectedNode annotation reset for PVC {name:?}")),
            Some(node) if node != choice.node => {
                failed(format!("selectedNode annotation value {node:?} not set to scheduled node {:?}", choice.node))
            }
            Some(_) => Progress::Waiting,
        }
    }
}
