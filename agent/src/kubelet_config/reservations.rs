//! What is reserved for daemons, whether they are held to it, and who may use swap. Pure.

use std::collections::BTreeMap;

use super::fields::Fields;
use super::{KubeletConfigError, wrong};
use crate::{Config, EnforcedGroup};

impl Fields {
    pub(super) fn reservations(&self, config: &mut Config) -> Result<(), KubeletConfigError> {
        let kube = amounts("kubeReserved", self.kube_reserved.as_ref())?;
        let system = amounts("systemReserved", self.system_reserved.as_ref())?;
        for reserved in [&kube, &system] {
            config.reserved_cpu_millis += reserved.cpu_millis.unwrap_or(0);
            config.reserved_memory_bytes += reserved.memory_bytes.unwrap_or(0);
            config.reserved_storage_bytes += reserved.storage_bytes;
        }
        config.limited_swap = match self.memory_swap.as_ref().and_then(|swap| swap.swap_behavior.as_deref()) {
            None | Some("" | "NoSwap") => false,
            Some("LimitedSwap") => true,
            Some(other) => {
                let problem = format!("invalid value: {other:?}, must be one of: \"\", \"LimitedSwap\" or \"NoSwap\"");
                return Err(wrong("memorySwap.swapBehavior", problem));
            }
        };
        let Some(parts) = &self.enforce_node_allocatable else { return Ok(()) };
        let bad = |problem: String| wrong("enforceNodeAllocatable", problem);
        let whole = |name: &str| parts.iter().any(|part| part == name);
        if whole("none") && parts.len() > 1 {
            return Err(bad("may contain only one option when it contains \"none\"".to_owned()));
        }
        config.enforce_pods = whole("pods");
        for part in parts {
            let (name, compressible) = part.strip_suffix("-compressible").map_or((part.as_str(), false), |n| (n, true));
            if compressible && whole(name) {
                return Err(bad(format!("{part:?} and {name:?} exclude each other")));
            }
            let (cgroup, field, reserved) = match name {
                "system-reserved" => (&self.system_reserved_cgroup, "systemReservedCgroup", &system),
                "kube-reserved" => (&self.kube_reserved_cgroup, "kubeReservedCgroup", &kube),
                "pods" | "none" | "" if !compressible => continue,
                _ => return Err(bad(format!("{part:?} is not an option"))),
            };
            let cgroup = cgroup.clone().filter(|cgroup| !cgroup.trim_matches('/').is_empty());
            let missing = || wrong(field, format!("must be specified when {part:?} is in enforceNodeAllocatable"));
            config.enforced.push(EnforcedGroup {
                whose: if name == "kube-reserved" { "kube" } else { "system" },
                cgroup: cgroup.ok_or_else(missing)?,
                cpu_millis: reserved.cpu_millis,
                memory_bytes: reserved.memory_bytes.filter(|_| !compressible),
                pids: reserved.pids.filter(|_| !compressible),
            });
        }
        Ok(())
    }
}

/// One reservation; what is not named is not bounded.
#[derive(Default)]
struct Reserved {
    cpu_millis: Option<u64>,
    memory_bytes: Option<u64>,
    storage_bytes: u64,
    pids: Option<u64>,
}

fn amounts(field: &'static str, map: Option<&BTreeMap<String, String>>) -> Result<Reserved, KubeletConfigError> {
    let mut reserved = Reserved::default();
    for (name, text) in map.into_iter().flatten() {
        let bad = || wrong(field, format!("{name}: {text:?} is not a quantity"));
        let amount = |value: Option<i64>| value.and_then(|value| u64::try_from(value).ok()).ok_or_else(bad);
        match name.as_str() {
            "cpu" => reserved.cpu_millis = Some(amount(oarlock_quantity::milli(text))?),
            "memory" => reserved.memory_bytes = Some(amount(oarlock_quantity::units(text))?),
            "ephemeral-storage" => reserved.storage_bytes = amount(oarlock_quantity::units(text))?,
            "pid" => reserved.pids = Some(amount(oarlock_quantity::units(text))?),
            other => return Err(wrong(field, format!("{other} cannot be reserved"))),
        }
    }
    Ok(reserved)
}
