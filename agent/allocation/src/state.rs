//! The text of the state files, under upstream's names (`cpu_manager_state`, `memory_manager_state`) so that one kubelet can
//! follow another. Owns no files.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::cpuset::CpuSet;
use crate::memory::{Block, NodeMemory};

/// A state file that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    #[error("could not read it: {0}")]
    Form(String),
    #[error("configured policy {configured:?} differs from state checkpoint policy {saved:?}")]
    OtherPolicy { configured: String, saved: String },
}

/// Who has which processors.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CpuState {
    pub shared: CpuSet,
    /// By pod UID and container.
    pub assigned: BTreeMap<String, BTreeMap<String, CpuSet>>,
}

/// Who has which memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemoryState {
    pub nodes: BTreeMap<u32, NodeMemory>,
    /// By pod UID and container.
    pub assigned: BTreeMap<String, BTreeMap<String, Vec<Block>>>,
}

#[derive(Serialize, Deserialize)]
struct CpuFile {
    #[serde(rename = "policyName")]
    policy: String,
    #[serde(rename = "defaultCpuSet", alias = "defaultCPUSet", default)]
    shared: String,
    #[serde(default)]
    entries: BTreeMap<String, BTreeMap<String, String>>,
    /// Zero is taken as none; the file is replaced as a whole, so that it is never half of one.
    #[serde(default)]
    checksum: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct MemoryFile {
    policy_name: String,
    #[serde(default)]
    machine_state: BTreeMap<u32, NodeMemory>,
    #[serde(default)]
    entries: BTreeMap<String, BTreeMap<String, Vec<Block>>>,
    #[serde(default)]
    checksum: u64,
}

/// Newer files hold the state as text within the text.
#[derive(Deserialize)]
struct Wrapped {
    data: Option<String>,
}

fn parse<T: for<'a> Deserialize<'a>>(text: &str) -> Result<T, StateError> {
    let form = |error: serde_json::Error| StateError::Form(error.to_string());
    let inner = serde_json::from_str::<Wrapped>(text).map_err(form)?.data;
    serde_json::from_str(inner.as_deref().unwrap_or(text)).map_err(form)
}

fn same_policy(configured: &str, saved: &str) -> Result<(), StateError> {
    let differs = || StateError::OtherPolicy { configured: configured.to_owned(), saved: saved.to_owned() };
    (configured == saved).then_some(()).ok_or_else(differs)
}

impl CpuState {
    pub fn read(text: &str, policy: &str) -> Result<Self, StateError> {
        let file: CpuFile = parse(text)?;
        same_policy(policy, &file.policy)?;
        let set = |text: &str| text.parse::<CpuSet>().map_err(|error| StateError::Form(error.to_string()));
        let mut assigned: BTreeMap<String, BTreeMap<String, CpuSet>> = BTreeMap::new();
        for (pod, containers) in &file.entries {
            for (container, cpus) in containers {
                assigned.entry(pod.clone()).or_default().insert(container.clone(), set(cpus)?);
            }
        }
        Ok(Self { shared: set(&file.shared)?, assigned })
    }

    pub fn text(&self, policy: &str) -> String {
        let shown = |containers: &BTreeMap<String, CpuSet>| {
            containers.iter().map(|(container, cpus)| (container.clone(), cpus.to_string())).collect()
        };
        let entries = self.assigned.iter().map(|(pod, containers)| (pod.clone(), shown(containers))).collect();
        let file = CpuFile { policy: policy.to_owned(), shared: self.shared.to_string(), entries, checksum: 0 };
        serde_json::to_string(&file).unwrap_or_default()
    }
}

impl MemoryState {
    pub fn read(text: &str, policy: &str) -> Result<Self, StateError> {
        let file: MemoryFile = parse(text)?;
        same_policy(policy, &file.policy_name)?;
        Ok(Self { nodes: file.machine_state, assigned: file.entries })
    }

    pub fn text(&self, policy: &str) -> String {
        let file = MemoryFile {
            policy_name: policy.to_owned(),
            machine_state: self.nodes.clone(),
            entries: self.assigned.clone(),
            checksum: 0,
        };
        serde_json::to_string(&file).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_another_kubelet_are_read_in_both_forms() {
        let old = r#"{"policyName":"static","defaultCpuSet":"0,3","entries":{"u":{"c":"1-2"}},"checksum":1942532442}"#;
        let new = r#"{"policyName":"x","checksum":1,"data":"{\"policyName\":\"static\",\"defaultCPUSet\":\"0,3\",\"entries\":{\"u\":{\"c\":\"1-2\"}}}","dataChecksum":5}"#;
        for text in [old, new] {
            let state = CpuState::read(text, "static").unwrap();
            assert_eq!((state.shared.to_string(), state.assigned["u"]["c"].to_string()), ("0,3".into(), "1-2".into()));
            assert_eq!(CpuState::read(&state.text("static"), "static").unwrap(), state);
        }
        let other = CpuState::read(old, "none").unwrap_err().to_string();
        assert_eq!(other, "configured policy \"none\" differs from state checkpoint policy \"static\"");
        assert!(CpuState::read("{", "static").is_err());
        assert!(CpuState::read(&old.replace("1-2", "asd"), "static").is_err());
    }

    #[test]
    fn memory_is_read_as_it_was_written() {
        let text = r#"{"policyName":"Static","machineState":{"0":{"numberOfAssignments":1,"memoryMap":{"memory":{"total":2048,"systemReserved":512,"allocatable":1536,"reserved":512,"free":1024}},"cells":[0]}},"entries":{"pod":{"c":[{"numaAffinity":[0],"type":"memory","size":512}]}},"checksum":4215593881}"#;
        let state = MemoryState::read(text, "Static").unwrap();
        assert_eq!(state.nodes[&0].memory_map["memory"].free, 1024);
        assert_eq!(MemoryState::read(&state.text("Static"), "Static").unwrap(), state);
    }
}
