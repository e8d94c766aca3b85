//! The agent's own small record of a pod: restart delays and probe outcomes, one file a pod, replaced as a whole.
//!
//! Losing one costs a fresh delay or one more probe, so a file that cannot be read counts as absent.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use oarlock_probes::{InitialOutcomes, Outcome};
use serde::{Deserialize, Serialize};

use crate::model::PodUid;
use crate::plan::Backoff;

/// What is kept.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Ledger {
    pub backoff: BTreeMap<String, Backoff>,
    /// By container id.
    pub probes: BTreeMap<String, InitialOutcomes>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct OnDisk {
    backoff: BTreeMap<String, Backoff>,
    /// Startup and readiness: true passed, false failed.
    probes: BTreeMap<String, (Option<bool>, Option<bool>)>,
}

fn path(state_dir: &Path, uid: &PodUid) -> Option<PathBuf> {
    let plain = !uid.as_str().is_empty() && !uid.as_str().contains(['/', '.']);
    plain.then(|| state_dir.join("pods").join(format!("{uid}.json")))
}

/// What was kept of the pod; nothing when there is no readable file.
pub(super) fn load(state_dir: &Path, uid: &PodUid) -> Ledger {
    let bytes = path(state_dir, uid).and_then(|path| std::fs::read(path).ok()).unwrap_or_default();
    let kept: OnDisk = serde_json::from_slice(&bytes).unwrap_or_default();
    let outcome = |passed: bool| if passed { Outcome::Success } else { Outcome::Failure };
    let probes = kept.probes.into_iter().map(|(id, (startup, readiness))| {
        (id, InitialOutcomes { startup: startup.map(outcome), readiness: readiness.map(outcome), liveness: None })
    });
    Ledger { backoff: kept.backoff, probes: probes.collect() }
}

/// Replaces the file.
pub(super) fn store(state_dir: &Path, uid: &PodUid, ledger: &Ledger) {
    let Some(path) = path(state_dir, uid) else { return };
    let passed = |outcome: Outcome| outcome == Outcome::Success;
    let probes = ledger
        .probes
        .iter()
        .map(|(id, outcomes)| (id.clone(), (outcomes.startup.map(passed), outcomes.readiness.map(passed))));
    let kept = OnDisk { backoff: ledger.backoff.clone(), probes: probes.collect() };
    let written = serde_json::to_vec(&kept).map_err(std::io::Error::other).and_then(|bytes| {
        std::fs::create_dir_all(state_dir.join("pods"))?;
        let partial = path.with_extension("tmp");
        std::fs::write(&partial, bytes)?;
        std::fs::rename(&partial, &path)
    });
    if let Err(error) = written {
        tracing::warn!(pod.uid = %uid, %error, "the pod's record could not be kept");
    }
}

/// Removes the file.
pub(super) fn remove(state_dir: &Path, uid: &PodUid) {
    if let Some(path) = path(state_dir, uid) {
        let _ = std::fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stored_comes_back_and_garbage_is_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let uid = PodUid::from("u-1");
        let mut ledger = Ledger::default();
        let outcomes = InitialOutcomes { readiness: Some(Outcome::Success), ..Default::default() };
        ledger.probes.insert("c".into(), outcomes);
        store(dir.path(), &uid, &ledger);
        assert_eq!(load(dir.path(), &uid), ledger);
        std::fs::write(dir.path().join("pods/u-1.json"), "{").unwrap();
        assert_eq!(load(dir.path(), &uid), Ledger::default());
        remove(dir.path(), &uid);
        assert_eq!(load(dir.path(), &PodUid::from("../x")), Ledger::default());
    }
}
