//! The cpu, memory and topology managers' fields. Pure.

use std::collections::BTreeMap;

use oarlock_allocation::CpuOptions;
use oarlock_allocation::hints::Policy;

use super::fields::Fields;
use super::{KubeletConfigError, wrong};
use crate::Config;

impl Fields {
    /// After the reservations, which reservedSystemCPUs overrides.
    pub(super) fn assignment(&self, config: &mut Config) -> Result<(), KubeletConfigError> {
        self.cpus(config)?;
        self.memory(config)?;
        self.topology(config)
    }

    fn cpus(&self, config: &mut Config) -> Result<(), KubeletConfigError> {
        if let Some(text) = self.reserved_system_cpus.as_deref().filter(|text| !text.is_empty()) {
            let cpus: oarlock_allocation::CpuSet =
                text.parse().map_err(|error| wrong("reservedSystemCPUs", format!("{error}")))?;
            config.reserved_cpu_millis = cpus.len() as u64 * 1000;
            config.assignment.reserved_cpus = Some(cpus);
        }
        let own = &mut config.assignment;
        own.cpu_static = match self.cpu_manager_policy.as_deref().unwrap_or_default() {
            "" | "none" => false,
            "static" => true,
            other => return Err(wrong("cpuManagerPolicy", format!("{other:?} is neither none nor static"))),
        };
        let none = BTreeMap::new();
        let options = self.cpu_manager_policy_options.as_ref().unwrap_or(&none);
        if !own.cpu_static && !options.is_empty() {
            return Err(wrong("cpuManagerPolicyOptions", "the none policy has no options"));
        }
        let bad = |(name, problem): (String, String)| wrong("cpuManagerPolicyOptions", format!("{name}: {problem}"));
        own.cpu_options = CpuOptions::named(options).map_err(bad)?;
        if let Some(period) = self.cpu_manager_reconcile_period {
            own.reconcile_period = period.0.max(std::time::Duration::from_secs(1));
        }
        if own.cpu_static && config.reserved_cpu_millis == 0 {
            let problem = "the static policy needs reservedSystemCPUs, or some cpu in kubeReserved or systemReserved";
            return Err(wrong("cpuManagerPolicy", problem));
        }
        Ok(())
    }

    fn memory(&self, config: &mut Config) -> Result<(), KubeletConfigError> {
        let own = &mut config.assignment;
        own.memory_static = match self.memory_manager_policy.as_deref().unwrap_or_default() {
            "" | "None" | "none" => false,
            "Static" => true,
            other => return Err(wrong("memoryManagerPolicy", format!("{other:?} is neither None nor Static"))),
        };
        own.reserved_memory.clear();
        for reserved in self.reserved_memory.iter().flatten() {
            let node = own.reserved_memory.entry(reserved.numa_node).or_default();
            for (kind, text) in &reserved.limits {
                let known = kind == "memory" || kind.starts_with("hugepages-");
                let size = oarlock_quantity::units(text).and_then(|size| u64::try_from(size).ok());
                let bad = || wrong("reservedMemory", format!("{kind}: {text:?} is no size of memory or huge pages"));
                let size = size.filter(|size| known && *size > 0).ok_or_else(bad)?;
                if node.insert(kind.clone(), size).is_some() {
                    return Err(wrong("reservedMemory", format!("{kind} is given twice for one node")));
                }
            }
        }
        if own.memory_static && own.reserved_memory.is_empty() {
            return Err(wrong("memoryManagerPolicy", "the Static policy needs reservedMemory"));
        }
        Ok(())
    }

    fn topology(&self, config: &mut Config) -> Result<(), KubeletConfigError> {
        let own = &mut config.assignment;
        let name = self.topology_manager_policy.as_deref().unwrap_or_default();
        let bad = || wrong("topologyManagerPolicy", format!("{name:?} is no policy"));
        own.topology_policy = Policy::named(name).ok_or_else(bad)?;
        own.topology_scope_pod = match self.topology_manager_scope.as_deref().unwrap_or_default() {
            "" | "container" => false,
            "pod" => true,
            other => return Err(wrong("topologyManagerScope", format!("{other:?} is neither container nor pod"))),
        };
        for (name, text) in self.topology_manager_policy_options.iter().flatten() {
            let bad = || wrong("topologyManagerPolicyOptions", format!("{name}: {text:?} is not usable"));
            match name.as_str() {
                "prefer-closest-numa-nodes" => own.prefer_closest = text.parse().map_err(|_| bad())?,
                "max-allowable-numa-nodes" => {
                    own.most_nodes = text.parse().ok().filter(|most| *most >= 8).ok_or_else(bad)?;
                }
                _ => return Err(wrong("topologyManagerPolicyOptions", format!("{name} is not an option"))),
            }
        }
        Ok(())
    }
}
